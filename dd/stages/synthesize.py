"""Stage: prompts -> images and heat maps. Costly and resumable; :mod:`dd.stages.label` makes masks
later."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator

from dd.data.datasets import IMAGE_SUFFIXES, write_split
from dd.evaluation.supervision import LabelSet
from dd.execution import Executor, Local, Task
from dd.execution.base import Unit
from dd.execution.units import (
    Tools,
    drop_records,
    finished,
    make_unit,
    open_tools,
    read_run,
    sweep_samples,
    worker_died,
)
from dd.prompts.base import PromptSource
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
    Sample,
    append_records,
    make_plan,
    open_units,
    outcomes,
    plan_lines,
    plan_sha256,
    without_failed,
)
from dd.store.settings import Count, Natural, Settings
from dd.taxonomy import Taxonomy

if TYPE_CHECKING:  # both load heavy libraries
    from dd.data.quality import Scores
    from dd.generators.base import Generator


def _suffix(given: str) -> str:
    suffix = "." + given.lstrip(".")
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"image_format={given!r}; allowed: {', '.join(IMAGE_SUFFIXES)}")
    return suffix


class SynthesisSettings(Settings):
    """``num_images`` None: as many as the source of prompts has; ``unit_size``: samples that are
    generated together; ``image_format``: the images' suffix; ``prompts_over_limit``: what happens
    to prompts longer than the text encoder reads (:func:`dd.prompts.check.within_limit`);
    ``redraw``: how often a bad image (blacked out, not finite, constant) is drawn again before its
    sample is left out of the split and of every mask set."""

    num_images: Count | None
    seed: Natural
    unit_size: Count
    image_format: Annotated[str, AfterValidator(_suffix)] = ".jpg"
    prompts_over_limit: Literal["refuse", "trim"] = "refuse"
    redraw: Natural = 3


@dataclass(frozen=True)
class Makers:
    """``generator``: makes images and heat of a unit; ``clip``: scores images for the quality
    signals of their records; ``executor``: who makes the units; ``build(device)`` gives
    (generator, clip) to a worker process."""

    generator: "Generator"
    clip: "Scores | None" = None
    executor: Executor = field(default_factory=Local)
    build: Callable[..., Tools] | None = None


def synthesize(
    folder: str | Path,
    makers: Makers,
    prompts: PromptSource,
    taxonomy: Taxonomy,
    settings: SynthesisSettings,
    chosen_on: Iterable[LabelSet] = (),
    prompts_sha256: str | None = None,
) -> dict[str, Any]:
    """Make (or continue) the synthetic data set in ``folder``; returns counts, seconds and whether
    it is ``complete``.

    ``chosen_on``: the labels that chose settings (:mod:`dd.evaluation.supervision`), for run.json;
    ``prompts_sha256``: hash of what prompts are drawn from, by which reports recognise draws of one
    recipe.

    The plan is written first and never changes; each sample's record is appended after its files
    are in place. FileExistsError if the folder was made with other settings, which changes nothing;
    Busy if another run writes to it; UnitsFailed if too many units failed; ValueError if no image
    is good.

    A set can grow: with a larger ``num_images`` and prompts that begin with its own, the further
    samples form units of their own, and existing units stay as they are. Until the new samples are
    made and labelled, the set counts as unfinished.
    """
    folder, generator, executor = Path(folder), makers.generator, makers.executor
    drawn = prompts(taxonomy, settings.num_images, settings.seed)
    wanted = within_limit(drawn, generator, settings.prompts_over_limit)
    ends, old = _ends(folder, len(wanted), settings.unit_size)
    plan = make_plan(wanted, taxonomy, settings.seed, settings.unit_size, ends)
    identity = {
        "generator": generator.identity(),
        "plan_sha256": plan_sha256(plan),
        "num_images": len(plan),
        "seed": settings.seed,
        "unit_size": settings.unit_size,
        "image_format": settings.image_format,
        "taxonomy": {"name": taxonomy.name, "names": list(taxonomy.names)},
        **({} if settings.redraw == 3 else {"redraw": settings.redraw}),
        **({"grown": list(ends)} if ends else {}),
    }
    before = _grows_from(folder, old, identity, plan)
    if not before:
        refuse_other(folder / "run.json", identity, "data set")
    if before or not (folder / "run.json").exists():
        check_spans(plan, generator)  # find a missing class word now, not in the middle
        print_summary(summarise(wanted, taxonomy, generator))
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder, executor.shard) as lock:
        if before and _identity(folder) == old:
            _begin_anew(folder, lock, len(plan) - before)
        else:  # another run may have been quicker
            refuse_other(folder / "run.json", identity, "data set")
        known = {
            "terms": generator.terms,
            "sites": generator.where_read(),
            "chosen_on": list(chosen_on),
            "prompts_sha256": prompts_sha256,
        }
        _freeze(folder, plan, wanted.dropped, identity, known)
        lock.share()
        mine = executor.share(open_units(plan, ()))
        todo = _unfinished(folder, mine, settings.image_format, executor)
        started = time.monotonic()
        _make(folder, makers, settings, mine, todo, lock)
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


def _make(
    folder: Path,
    makers: Makers,
    settings: SynthesisSettings,
    units: list[Unit],
    todo: list[Unit],
    lock: Lock,
) -> None:
    """Make the units ``todo`` of ``units``, those of this driver."""
    generator, executor, suffix = makers.generator, makers.executor, settings.image_format
    identity = json.loads(json.dumps(generator.identity()))
    task = Task(
        partial(make_unit, folder, suffix, settings.seed, settings.redraw),
        (generator, makers.clip),
        makers.build and partial(open_tools, makers.build, identity),
        partial(worker_died, folder, suffix),
    )
    planned, device = sum(map(len, units)), getattr(generator, "device", "cpu")
    with Progress("generate", planned, planned - sum(map(len, todo))) as progress:
        lost = executor.run(todo, len(units), task, progress, device, lock)
    for number, error in lost.items():
        rows = [
            {"id": s.id, "unit": s.unit, "failed": True, "seconds": 0.0, "error": error[:1000]}
            for s in todo[number]
        ]
        append_records(folder, executor.name(0), rows)


def _freeze(
    folder: Path,
    plan: list[Sample],
    dropped: list[dict[str, Any]],
    identity: dict[str, Any],
    known: dict[str, Any],
) -> None:
    """Write the definition of the set: plan.jsonl, dropped captions, and last run.json, unless they
    exist."""
    path = folder / "plan.jsonl"
    if not path.is_file() or sha256(path) != identity["plan_sha256"]:
        write_atomic(path, plan_lines(plan))
    if dropped:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in dropped)
        write_atomic(folder / "dropped_captions.jsonl", lines)
    if _identity(folder) != json.loads(json.dumps(identity)):
        write_json(folder / "run.json", {"identity": identity, **known, **made_by()})


def _identity(folder: Path) -> dict[str, Any] | None:
    """The identity of the existing set; None if none was begun."""
    return read_run(folder)["identity"] if (folder / "run.json").exists() else None


def _ends(
    folder: Path, number: int, unit_size: int
) -> tuple[tuple[int, ...], dict[str, Any] | None]:
    """(where units end that a smaller set has left short, its identity)."""
    old = _identity(folder)
    if old is None:
        return (), None
    ends, there = tuple(old.get("grown", ())), old.get("num_images")
    if type(there) is int and there < number and (there - max(ends, default=0)) % unit_size:
        ends += (there,)
    return ends, old


def _grows_from(
    folder: Path, old: dict[str, Any] | None, identity: dict[str, Any], plan: list[Sample]
) -> int:
    """How many samples the set has, if ``identity`` is the same with more samples, else 0.
    FileExistsError if only its prompts prevent this."""

    def fixed(one: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in one.items() if k not in ("num_images", "plan_sha256", "grown")}

    if old is None or differences(fixed(old), fixed(identity)):
        return 0
    number = old.get("num_images")
    if type(number) is not int or number >= len(plan):
        return 0
    if plan_sha256(plan[:number]) != old["plan_sha256"]:
        raise FileExistsError(
            f"{folder} has {number} samples and {len(plan)} are wanted, but the first {number} "
            "prompts of so many are not those of the set (other prompts=..., or a source that "
            "reorders all of them): it cannot grow. Nothing was changed. Make another set: "
            "name=..."
        )
    return number


def _begin_anew(folder: Path, lock: Lock, more: int) -> None:
    """Remove the list of a growing set until it is complete again; its mask sets are made again.
    Busy while other shards are running."""
    if not lock.alone():
        raise Busy(f"{folder}: samples can be added only after the other shards have ended")
    print(f"{folder}: {more} samples are added to it; what is made stays as it is")
    (folder / "ImageSets" / "Segmentation" / "train.txt").unlink(missing_ok=True)


def _unfinished(folder: Path, units: list[Unit], suffix: str, executor: Executor) -> list[Unit]:
    """The units that are not finished; removes what killed processes have left of them."""
    found = outcomes(folder)
    done = finished(folder, suffix, found)
    todo = [unit for unit in units if any(s.id not in done for s in unit)]
    names, alone = {s.id for unit in todo for s in unit}, executor.shard is None
    if not alone:
        sweep_samples(folder, names)  # otherwise the lock has done it
    if any(name in found for name in names):
        drop_records(folder, names, "*.jsonl" if alone else f"{executor.name(0)}*.jsonl")
    return todo
