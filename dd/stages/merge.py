"""Stage: join shards of one synthetic data set that were made in different places."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from dd.data.datasets import write_split
from dd.execution.units import drop_records, finished, read_run, unit_files
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.provenance import differences, refuse_other, sha256, write_atomic
from dd.store.samples import (
    append_records,
    outcomes,
    read_records,
    read_whole_plan,
    without_failed,
)

PART = 256  # samples whose records are appended together
HASHES = ("image_sha256", "heat_sha256")
KEYS = (*HASHES, "failed")  # keys in which the records of a sample must agree
Found: TypeAlias = tuple[dict[str, Any], Path]


def merge(sources: Sequence[str | Path], into: str | Path) -> dict[str, Any]:
    """Copy images, heat and records of ``sources`` (folders with one identity and plan) to
    ``into``, a new folder or one with the same identity; returns counts. Hashes are checked on the
    way; an interrupted merge resumes.

    ValueError names a source of other settings, samples that two sources made differently, and
    files that do not match their record; conflicts are found before anything is written. Masks are
    not copied: the label stage makes them from heat.
    """
    folders, into = [Path(s) for s in sources], Path(into)
    run, first = _common_run(folders), folders[0]
    refuse_other(into / "run.json", run["identity"], "data set")
    chosen = _chosen([*folders, *([into] if (into / "run.json").is_file() else [])])
    plan, suffix = read_whole_plan(first), run["identity"]["image_format"]
    into.mkdir(parents=True, exist_ok=True)
    with Lock(into):
        for name in ("plan.jsonl", "dropped_captions.jsonl", "run.json"):
            there = name == "run.json" and (into / name).is_file()
            if (first / name).is_file() and not there:
                write_atomic(into / name, (first / name).read_bytes())
        done = finished(into, suffix, outcomes(into))
        todo = [s.id for s in plan if s.id in chosen and s.id not in done]
        drop_records(into, set(todo))  # of samples whose files have been lost
        with Progress("merge", len(todo)) as progress:
            for start in range(0, len(todo), PART):
                part = todo[start : start + PART]
                for name in part:
                    _copy(*chosen[name], into, suffix)
                    progress.advance()
                append_records(into, "merged", [chosen[name][0] for name in part])
        found = outcomes(into)
        missing = sum(s.id not in found for s in plan)
        if not missing:
            write_split(into, "train", [s.id for s in without_failed(plan, found, into)])
    return {
        "samples": len(plan),
        "copied": len(todo),
        "missing": missing,
        "command": run.get("command"),
    }


def _common_run(folders: list[Path]) -> dict[str, Any]:
    """run.json of the first folder; ValueError for a folder of another identity."""
    run = read_run(folders[0])
    for folder in folders[1:]:
        if lines := differences(run["identity"], read_run(folder)["identity"]):
            raise ValueError(
                f"{folder} was made with other settings than {folders[0]}, they cannot be "
                "merged:\n  " + "\n  ".join(lines)
            )
    return run


def _chosen(sources: list[Path]) -> dict[str, Found]:
    """The record of each sample and its source, by id. A unit that was quarantined in one place may
    have been made in another."""
    chosen: dict[str, Found] = {}
    conflicts = []
    for source in sources:
        for name, record in read_records(source).items():
            if "error" in record:
                continue
            before, where = chosen.setdefault(name, (record, source))
            if [before.get(k) for k in KEYS] != [record.get(k) for k in KEYS]:
                conflicts.append(f"{name}: {where} and {source}")
    if conflicts:
        raise ValueError(
            f"{len(conflicts)} samples differ between sources, in spite of the same settings "
            "(another kind of device?):\n  "
            + "\n  ".join(conflicts[:5])
            + "\nNothing was written. Remove the records of one side, or make these units again"
        )
    return chosen


def _copy(record: dict[str, Any], source: Path, into: Path, suffix: str) -> None:
    """Copy image and heat of a sample; nothing if every attempt at it was bad."""
    if record.get("failed"):
        return
    old, new = (unit_files(folder, record["id"], suffix) for folder in (source, into))
    for key, path, target in zip(HASHES, old, new, strict=True):
        data = path.read_bytes() if path.is_file() else b""
        if sha256(data) != record.get(key):
            raise ValueError(
                f"{path} does not match its record; python -m dd verify {source} lists all "
                "damaged files"
            )
        write_atomic(target, data)
