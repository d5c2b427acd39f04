"""Stage: prompts -> images and heat maps. Costly, resumable; masks are made later, by
:mod:`dd.stages.label`."""

import json
import time
from collections import Counter
from functools import partial
from pathlib import Path

from dd.data.datasets import IMAGE_SUFFIXES, write_split
from dd.execution import Local, Task
from dd.execution.units import (
    drop_records,
    make_unit,
    open_tools,
    present,
    read_run,
    sweep_samples,
    worker_died,
)
from dd.prompts.check import check_spans, print_summary, summarise, within_limit
from dd.store.locks import Busy, Lock
from dd.store.progress import Progress
from dd.store.provenance import (
    differences,
    made_by,
    refuse_other,
    sha256,
    sweep,
    write_atomic,
    write_json,
)
from dd.store.samples import (
    append_records,
    make_plan,
    open_units,
    outcomes,
    plan_lines,
    plan_sha256,
    without_failed,
)


def synthesize(
    folder,
    generator,
    prompts,
    taxonomy,
    num_images: int | None,
    seed: int,
    unit_size: int,
    image_format: str = "jpg",
    prompts_over_limit: str = "refuse",
    redraw: int = 3,
    clip=None,
    executor=None,
    build=None,
    chosen_on: list[dict] = (),
    prompts_sha256: str | None = None,
) -> dict:
    """Make (or go on with) the synthetic data set in ``folder``; returns counts, seconds and
    whether it is ``complete``.

    ``generator`` makes images and heat of a unit (:class:`dd.generators.StableDiffusion`),
    ``prompts(taxonomy, number, seed)`` gives the prompts (``num_images`` None: all that the source
    has); ``prompts_over_limit``: what happens to those longer than the text encoder reads
    (:func:`dd.prompts.check.within_limit`); ``redraw``: how often a bad image (blacked out, not
    finite, constant) is drawn again before its sample is left out of the split and of every mask
    set; ``clip`` (:class:`dd.data.quality.ClipScore`): scores images for the quality signals of
    their records. ``executor`` (:mod:`dd.execution`): who makes the units, None = this process;
    ``build(device)`` gives (generator, clip) to a worker. ``chosen_on``: the labels that chose
    settings (:mod:`dd.evaluation.supervision`), for run.json; ``prompts_sha256``: of what prompts
    are drawn from, by which reports tell draws of one recipe.

    The plan is written first and never changes; each sample's record is appended after its files
    are in place. FileExistsError if the folder was made with other settings: nothing is touched
    then; Busy if another run writes it; UnitsFailed if too many units failed; ValueError if no
    image is good.

    A set grows: with a larger ``num_images`` and prompts that begin with its own, the further
    samples make units of their own and the units that are made stay as they are. Until they are
    made, and labelled, the set counts as unfinished.
    """
    folder, suffix, executor = Path(folder), "." + image_format.lstrip("."), executor or Local()
    if (num_images is not None and num_images < 1) or unit_size < 1:
        raise ValueError(
            f"num_images and unit_size must be at least 1, got {num_images} and {unit_size}"
        )
    if redraw < 0:
        raise ValueError(f"redraw={redraw}: the number of further attempts must be 0 or more")
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"image_format={image_format!r}; allowed: {', '.join(IMAGE_SUFFIXES)}")
    wanted = within_limit(prompts(taxonomy, num_images, seed), generator, prompts_over_limit)
    ends, old = _ends(folder, len(wanted), unit_size)
    plan = make_plan(wanted, taxonomy, seed, unit_size, ends)
    identity = {
        "generator": generator.identity(),
        "plan_sha256": plan_sha256(plan),
        "num_images": len(plan),
        "seed": seed,
        "unit_size": unit_size,
        "image_format": suffix,
        "taxonomy": {"name": taxonomy.name, "names": list(taxonomy.names)},
    }
    identity |= (
        {} if redraw == 3 else {"redraw": redraw}
    )  # sets made before it was a setting can be gone on with
    identity |= {"grown": list(ends)} if ends else {}
    grows = _grows(folder, old, identity, plan)
    if not grows:
        refuse_other(folder / "run.json", identity, "data set")
    if grows or not (folder / "run.json").exists():
        check_spans(
            plan, generator
        )  # a missing class word is found here, not in the middle of the run
        print_summary(summarise(wanted, taxonomy, generator))
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder, executor.shard) as lock:
        if grows and _identity(folder) == old:
            if not lock.alone():
                raise Busy(f"{folder}: samples are added when the other shards have come to an end")
            _begin_anew(folder, len(plan) - old["num_images"])
        else:
            refuse_other(
                folder / "run.json", identity, "data set"
            )  # another run may have been quicker
        known = {
            "terms": generator.terms,
            "chosen_on": list(chosen_on),
            "prompts_sha256": prompts_sha256,
        }
        _freeze(folder, plan, wanted.dropped, identity, known)
        lock.share()
        mine = executor.share(open_units(plan, ()))
        todo = _unfinished(folder, mine, suffix, executor)
        work, died = (
            partial(make_unit, folder, suffix, seed, redraw),
            partial(worker_died, folder, suffix),
        )
        build, started = (
            build and partial(open_tools, build, json.loads(json.dumps(identity["generator"]))),
            time.monotonic(),
        )
        planned, device = sum(map(len, mine)), getattr(generator, "device", "cpu")
        task = Task(work, (generator, clip), build, died)
        with Progress("generate", planned, planned - sum(map(len, todo))) as progress:
            lost = executor.run(todo, len(mine), task, progress, device, lock)
        for number, error in lost.items():
            rows = [
                {"id": s.id, "unit": s.unit, "failed": True, "seconds": 0.0, "error": error[:1000]}
                for s in todo[number]
            ]
            append_records(folder, executor.name(0), rows)
        found = outcomes(folder)
        complete, good = all(s.id in found for s in plan), without_failed(plan, found, folder)
        if complete:
            write_split(folder, "train", [s.id for s in good])
        if lock.alone():
            sweep(folder)
    counts = Counter(found[s.id] for s in plan if s.id in found)
    return {
        "images": counts["good"] + counts["drawn again"],
        "made_now": sum(map(len, todo)),
        "planned": len(plan),
        "seconds": time.monotonic() - started,
        "drawn_again": counts["drawn again"],
        "failed": counts["failed"],
        "quarantined": counts["quarantined"],
        "complete": complete,
    }


def _freeze(folder, plan, dropped, identity, known: dict) -> None:
    """Write what says what is made: plan.jsonl, dropped captions, and last run.json, unless they
    are there."""
    path = folder / "plan.jsonl"
    if not path.is_file() or sha256(path) != identity["plan_sha256"]:
        write_atomic(path, plan_lines(plan))
    if dropped:
        write_atomic(
            folder / "dropped_captions.jsonl",
            (json.dumps(row, ensure_ascii=False) + "\n" for row in dropped),
        )
    if _identity(folder) != json.loads(json.dumps(identity)):
        write_json(folder / "run.json", {"identity": identity, **known, **made_by()})


def _identity(folder: Path) -> dict | None:
    """That of the set as it is; None where none was begun."""
    return read_run(folder)["identity"] if (folder / "run.json").exists() else None


def _ends(folder: Path, number: int, unit_size: int) -> tuple[tuple[int, ...], dict | None]:
    """(where units end that a set of fewer samples has left short, its identity)."""
    old = _identity(folder)
    if old is None:
        return (), None
    ends, there = tuple(old.get("grown", ())), old.get("num_images")
    if type(there) is int and there < number and (there - max(ends, default=0)) % unit_size:
        ends += (there,)
    return ends, old


def _grows(folder: Path, old: dict | None, identity: dict, plan) -> bool:
    """Whether the set of ``identity`` is that of ``old`` and more samples. FileExistsError if it
    would be but for its prompts."""
    free = ("num_images", "plan_sha256", "grown")
    same = old is not None and not differences(
        *({k: v for k, v in one.items() if k not in free} for one in (old, identity))
    )
    if not same or type(old.get("num_images")) is not int or old["num_images"] >= len(plan):
        return False
    number = old["num_images"]
    if plan_sha256(plan[:number]) != old["plan_sha256"]:
        raise FileExistsError(
            f"{folder} has {number} samples and {len(plan)} are wanted, but the first {number} "
            "prompts "
            "of so many are not those of the set (other prompts=..., or a source that orders all "
            "of them anew): it cannot grow. Nothing was changed. Make another set: name=..."
        )
    return True


def _begin_anew(folder: Path, more: int) -> None:
    """The list of a set that grows goes until it is whole again; its mask sets are made again."""
    print(f"{folder}: {more} samples are added to it; what is made stays as it is")
    (folder / "ImageSets" / "Segmentation" / "train.txt").unlink(missing_ok=True)


def _unfinished(folder, units, suffix, executor) -> list:
    """The units that are not finished; what killed processes have left of them is swept."""
    found, there = outcomes(folder), present(folder, suffix)
    done = {
        name
        for name, how in found.items()
        if how == "failed" or (how != "quarantined" and name in there)
    }
    todo = [unit for unit in units if any(s.id not in done for s in unit)]
    names, alone = {s.id for unit in todo for s in unit}, executor.shard is None
    if not alone:
        sweep_samples(folder, names)  # else the lock has swept
    if any(name in found for name in names):
        drop_records(folder, names, "*.jsonl" if alone else f"{executor.name(0)}*.jsonl")
    return todo
