"""Stage: finished images -> heat, by a model that need not have drawn them. Each image is noised,
shown to the model with its class prompt, and read in one forward pass (docs/method.md)."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dd.data.datasets import (
    check_recorded,
    heat_bytes,
    read_image,
    squared,
    synthetic_image,
)
from dd.evaluation.supervision import LabelSet
from dd.execution import Executor, Task
from dd.execution.base import Unit
from dd.execution.units import Tools, check_generated, drop_records, open_tools
from dd.prompts.check import check_spans
from dd.store.locks import Lock
from dd.store.names import folder_name
from dd.store.progress import Progress
from dd.store.provenance import made_by, refuse_other, sha256, sweep, write_atomic, write_json
from dd.store.samples import append_records, open_units, read_plan, read_records, recorded

if TYPE_CHECKING:  # loads heavy libraries
    from dd.generators.base import Generator

FIELDS = ("image_sha256", "heat_sha256")
# keys of a generator's identity that affect only its drawing
DRAWING = ("steps", "guidance", "negative_prompt", "true_guidance", "scheduler", "truncate")


@dataclass(frozen=True)
class Reader:
    """``name``: of the reading, its folder in ``heat/``; ``generator``: the model that reads;
    ``executor`` and ``build``: as in :class:`dd.stages.synthesize.Makers`; ``chosen_on``: the
    labels that chose how it reads (:mod:`dd.evaluation.supervision`), for run.json."""

    name: str
    generator: "Generator"
    executor: Executor
    build: Callable[..., Tools] | None = None
    chosen_on: Sequence[LabelSet] = ()


def read_heat(folder: str | Path, reader: Reader) -> dict[str, Any]:
    """Read the images of the set ``folder`` into ``heat/<name>/<id>.safetensors``; returns counts,
    seconds and whether it is ``complete``.

    The reading has its own run.json, written first, and records, each appended after its file. An
    interrupted reading resumes; an image that has changed since is read again. A unit of the plan
    is read together. FileExistsError for a reading of that name by another model or in another way;
    ValueError for samples that are not drawn yet, or whose class words the model's encoder does not
    hold.
    """
    folder, executor = Path(folder), reader.executor
    target = folder / "heat" / folder_name(reader.name, "reader")
    if target.is_file():
        raise ValueError(f"reader={reader.name}: {target} is a file; choose another name")
    plan, images = read_plan(folder), recorded(folder, "image_sha256")
    check_generated(folder, plan, images)
    known = reader.generator.identity()
    identity = {"generator": {k: v for k, v in known.items() if k not in DRAWING}}
    refuse_other(target / "run.json", identity, "reading", "reader")
    check_spans(plan, reader.generator)
    target.mkdir(parents=True, exist_ok=True)
    with Lock(target, executor.shard) as lock:
        # another run may have been quicker
        refuse_other(target / "run.json", identity, "reading", "reader")
        if not (target / "run.json").exists():
            told = {"terms": reader.generator.terms, "sites": reader.generator.where_read()}
            told["chosen_on"] = list(reader.chosen_on)
            write_json(target / "run.json", {"identity": identity, **told, **made_by()})
        lock.share()
        mine = executor.share(open_units(plan, ()))
        todo = _unread(target, mine, images, executor)
        started = time.monotonic()
        plain = json.loads(json.dumps(known))
        task = Task(
            partial(_read_unit, folder, target),
            (reader.generator, None),
            reader.build and partial(open_tools, reader.build, plain),
            partial(_died, target),
        )
        planned, device = sum(map(len, mine)), getattr(reader.generator, "device", "cpu")
        with Progress("read", planned, planned - sum(map(len, todo))) as progress:
            lost = executor.run(todo, len(mine), task, progress, device, lock)
        if lock.alone():
            sweep(target)
    found = recorded(target, "heat_sha256")
    return {
        "read": sum(s.id in found for s in plan),
        "read_now": sum(map(len, todo)) - sum(len(todo[number]) for number in lost),
        "planned": len(plan),
        "seconds": time.monotonic() - started,
        "complete": all(s.id in found for s in plan),
    }


def _unread(
    target: Path, units: list[Unit], images: dict[str, str], executor: Executor
) -> list[Unit]:
    """The units with a sample whose present image has no heat; their records are removed."""
    records = read_records(target, FIELDS)
    done = {
        name
        for name, record in records.items()
        if record["image_sha256"] == images.get(name) and (target / f"{name}.safetensors").is_file()
    }
    todo = [unit for unit in units if any(s.id not in done for s in unit)]
    names = {s.id for unit in todo for s in unit}
    if names & records.keys():
        pattern = "*.jsonl" if executor.shard is None else f"{executor.name(0)}*.jsonl"
        drop_records(target, names, pattern)
    return todo


def _read_unit(
    folder: Path, target: Path, tools: Tools, unit: Unit, worker: str
) -> Callable[[], None]:
    """Read a unit; the returned function writes it."""
    generator: Any = tools[0]
    started, paths = time.perf_counter(), [synthetic_image(folder, s.id) for s in unit]
    for sample, path in zip(unit, paths, strict=True):
        check_recorded(folder, "image_sha256", sample.id, path)
    squares = np.stack([squared(read_image(path), generator.size) for path in paths])
    heat = generator.read_real(squares, unit, [], 0)
    each = round((time.perf_counter() - started) / len(unit), 4)
    hashes = [sha256(path) for path in paths]

    def write() -> None:
        rows = []
        for sample, maps, image in zip(unit, heat, hashes, strict=True):
            powers = next(iter(maps.values())).shape[1]
            content = heat_bytes(maps, {"classes": sample.classes, "powers": powers})
            write_atomic(target / f"{sample.id}.safetensors", content)
            row = {"id": sample.id, "unit": sample.unit, "image_sha256": image}
            rows.append({**row, "heat_sha256": sha256(content), "seconds": each})
        append_records(target, worker, rows)

    return write


def _died(target: Path, unit: Unit, worker: str, pid: int) -> bool:
    """Remove what a dead worker has left of a unit."""
    drop_records(target, {s.id for s in unit}, f"{worker}.jsonl")
    for sample in unit:
        (target / f".{sample.id}.safetensors.{pid}.tmp").unlink(missing_ok=True)
    return False
