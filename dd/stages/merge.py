"""Stage: join shards of one synthetic data set that were made in different places."""

from pathlib import Path

from dd.data.datasets import write_split
from dd.execution.units import drop_records, present, read_run, unit_files
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.provenance import differences, refuse_other, sha256, write_atomic
from dd.store.samples import (
    append_records,
    outcomes,
    plan_sha256,
    read_records,
    read_whole_plan,
    without_failed,
)

PART = 256  # samples whose records are appended in one go
LISTS = ("plan.jsonl", "dropped_captions.jsonl")


def merge(sources: list, into) -> dict:
    """Copy images, heat and records of ``sources`` (folders with one identity and plan) to
    ``into``, a new folder or one with the same identity; returns counts. Hashes are checked on the
    way; an interrupted merge goes on.

    ValueError names a source of other settings, samples that two sources made differently, and
    files that are not what their record says; conflicts are found before anything is written. Masks
    are not copied: the label stage makes them from heat.
    """
    sources, into = [Path(s) for s in sources], Path(into)
    runs = [read_run(source) for source in sources]
    for source, run in zip(sources[1:], runs[1:], strict=True):
        lines = differences(runs[0]["identity"], run["identity"])
        if lines:
            raise ValueError(
                f"{source} was made with other settings than {sources[0]}, they cannot be "
                "merged:\n  " + "\n  ".join(lines)
            )
    refuse_other(into / "run.json", runs[0]["identity"], "data set")
    chosen = _chosen([*sources, *([into] if (into / "run.json").is_file() else [])])
    identity, suffix = runs[0]["identity"], runs[0]["identity"]["image_format"]
    plan = read_whole_plan(sources[0])
    if plan_sha256(plan) != identity["plan_sha256"]:
        raise ValueError(
            f"{sources[0]}/plan.jsonl is not the plan of its run.json; generate.py writes it again"
        )
    into.mkdir(parents=True, exist_ok=True)
    with Lock(into):
        for name in LISTS:
            if (sources[0] / name).is_file():
                write_atomic(into / name, (sources[0] / name).read_bytes())
        if not (into / "run.json").is_file():
            write_atomic(into / "run.json", (sources[0] / "run.json").read_bytes())
        done = _done(into, suffix)
        todo = [(s.id, *chosen[s.id]) for s in plan if s.id in chosen and s.id not in done]
        drop_records(into, {name for name, *_ in todo})  # whose files have been lost
        new = []
        with Progress("merge", len(todo)) as progress:
            for name, record, source in todo:
                if not record.get("failed"):
                    _copy(source, into, name, suffix, record)
                new.append(record)
                progress.advance(1)
                if len(new) == PART:
                    append_records(into, "merged", new)
                    new = []
        if new:
            append_records(into, "merged", new)
        found = outcomes(into)
        missing = [s.id for s in plan if s.id not in found]
        if not missing:
            write_split(into, "train", [s.id for s in without_failed(plan, found, into)])
    return {
        "samples": len(plan),
        "copied": len(todo),
        "missing": len(missing),
        "command": runs[0].get("command"),
    }


def _done(into, suffix) -> set[str]:
    there = present(into, suffix)
    return {
        i
        for i, how in outcomes(into).items()
        if how == "failed" or (how != "quarantined" and i in there)
    }


def _chosen(sources) -> dict:
    """{id: (record, source)}; a unit that was quarantined in one place may have been made in
    another."""
    chosen, conflicts = {}, []
    for source in sources:
        for name, record in read_records(source).items():
            if "error" in record:
                continue
            before, where = chosen.setdefault(name, (record, source))
            if [before.get(k) for k in _HASHES] != [record.get(k) for k in _HASHES]:
                conflicts.append(f"{name}: {where} and {source}")
    if conflicts:
        raise ValueError(
            f"{len(conflicts)} samples differ between sources, in spite of the same settings "
            "(another kind of device?):\n  "
            + "\n  ".join(conflicts[:5])
            + "\nNothing was written. Remove the records of one side, or make these units again"
        )
    return chosen


_HASHES = ("image_sha256", "heat_sha256", "failed")


def _copy(source, into, name, suffix, record) -> None:
    places = zip(
        _HASHES, unit_files(source, name, suffix), unit_files(into, name, suffix), strict=False
    )
    for key, old, new in places:
        data = old.read_bytes() if old.is_file() else b""
        if sha256(data) != record.get(key):
            raise ValueError(
                f"{old} is not what its record says; python -m dd verify {source} names all that "
                "is damaged"
            )
        write_atomic(new, data)
