"""One unit of a synthetic data set on disk: make it, check whether it is finished, take it back.
This is the work of every executor's workers."""

import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from dd.data.datasets import IMAGE_SUFFIXES, as_stored, encode_image, heat_bytes, read_image
from dd.data.quality import sample_signals
from dd.store.provenance import differences, is_temporary, read_own, sha256, write_atomic
from dd.store.samples import (
    Sample,
    append_records,
    each_record,
    record_line,
    sample_seed,
)
from dd.store.schemas import WHOLE_RUN

if TYPE_CHECKING:
    from dd.data.quality import Scores

FOLDERS = ("JPEGImages", "heat")
Heat: TypeAlias = dict[str, np.ndarray]  # {words that are read: [K, P, r, r]}
Tools: TypeAlias = "tuple[Source, Scores | None]"  # what draws images, what scores them
WRITERS = 8  # threads that encode, hash and sync the files of a unit


class Source(Protocol):
    """Where images and heat come from: the part of :class:`dd.generators.base.Generator` that a
    unit needs."""

    def generate(
        self, samples: list[Sample]
    ) -> tuple[np.ndarray, list[Heat], list[str | None]]: ...

    def identity(self) -> dict[str, Any]: ...


def read_run(folder: str | Path) -> dict[str, Any]:
    """run.json of a synthetic data set; FileNotFoundError or ValueError say what is wrong with
    it."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a synthetic data set: no run.json. Make one with generate.py"
        )
    made = read_own(path, {}).get("identity")
    if isinstance(made, dict) and "domain" in made:
        raise ValueError(
            f"{folder} is not a synthetic data set: its images are the scenes of "
            f"{made['domain']!r}, made by python -m dd prepare shapes (and again, if it is removed)"
        )
    run = read_own(path, WHOLE_RUN)
    if run["identity"]["image_format"] not in IMAGE_SUFFIXES:
        raise ValueError(
            f"{path} is damaged: it does not say what the data set is. Restore it from a copy"
        )
    return run


def check_generated(folder: str | Path, plan: list[Sample], records: Collection[str]) -> None:
    """ValueError for samples of a plan that have no record (ids in ``records``)."""
    if missing := [s.id for s in plan if s.id not in records]:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(plan)} samples are not generated yet, such as "
            f"{missing[0]}; run generate.py first (python -m dd verify tells whether their records "
            "are damaged)"
        )


def check_read(
    folder: str | Path, plan: list[Sample], heat: Collection[str], reading: str | None
) -> None:
    """:func:`check_generated` for samples whose heat comes from a reading; None = while drawing."""
    if reading is None:
        return check_generated(folder, plan, heat)
    if missing := [s.id for s in plan if s.id not in heat]:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(plan)} samples are not read yet in their present "
            f"form, such as {missing[0]}; generate.py stage=read reader={reading}, with its "
            "diffusion=..., resumes"
        )


def unit_files(folder: str | Path, name: str, suffix: str) -> tuple[Path, Path]:
    """The paths of a sample's image and heat."""
    images, heat = (Path(folder) / place for place in FOLDERS)
    return images / f"{name}{suffix}", heat / f"{name}.safetensors"


def make_unit(
    folder: Path, suffix: str, seed: int, redraw: int, tools: Tools, unit: list[Sample], worker: str
) -> Callable[[], None]:
    """Draw a unit. The returned function writes it: image, heat and, last, the records of its
    samples; it may be called in another thread. ``tools``: (generator, CLIP model or None); the
    other arguments are those of :func:`dd.stages.synthesize.synthesize`.

    Both models run in this thread: torch keeps settings for each thread (flushing of denormals, the
    device). They also run one after the other, since memory was measured for one at a time.
    """
    started, (generator, clip) = time.perf_counter(), tools
    drawn = list(_draw(generator, unit, seed, redraw))
    each = round((time.perf_counter() - started) / len(unit), 4)
    if clip is not None:
        drawn = _scored(drawn, suffix, clip)
    return partial(_write_unit, folder, suffix, worker, drawn, each)


@dataclass(frozen=True)
class Drawn:
    """A sample that is not written yet. ``image`` None: every attempt was bad; ``record``: the
    attempts, for its record; ``encoded`` image and ``signals``: only with a CLIP model, which sees
    the image as it will be stored."""

    sample: Sample
    image: np.ndarray | None
    maps: Heat
    record: dict[str, Any]
    encoded: bytes | None = None
    signals: dict[str, Any] | None = None


def _scored(drawn: list[Drawn], suffix: str, clip: "Scores") -> list[Drawn]:
    def encoded(d: Drawn) -> bytes | None:
        return None if d.image is None else encode_image(d.image, suffix)

    def scored(d: Drawn, data: bytes | None) -> Drawn:
        if data is None:
            return d
        return replace(d, encoded=data, signals=_signals(d, clip, read_image(BytesIO(data))))

    with ThreadPoolExecutor(WRITERS) as pool:
        each = list(pool.map(encoded, drawn))
    return [scored(d, data) for d, data in zip(drawn, each, strict=True)]


def _signals(
    drawn: Drawn, clip: "Scores | None" = None, image: np.ndarray | None = None
) -> dict[str, Any]:
    return sample_signals(drawn.sample, as_stored(drawn.maps), clip, image)


def _write_unit(folder: Path, suffix: str, worker: str, drawn: list[Drawn], each: float) -> None:
    """Write files, then rename them, then append their records: a unit is done or it is not."""
    # encoding and hashing release the interpreter, syncing waits for the disk
    with ThreadPoolExecutor(WRITERS) as pool:
        written = list(pool.map(partial(_write, folder, suffix), drawn))
    records = []
    for d, found in zip(drawn, written, strict=True):
        record: dict[str, Any] = {"id": d.sample.id, "unit": d.sample.unit}
        record |= d.record | found | {"seconds": each}
        if d.image is not None:
            record["signals"] = d.signals or _signals(d)
        records.append(record)
    for name in FOLDERS:
        _sync(folder / name)  # sync the names too before a record refers to them
    append_records(folder, worker, records)


def _write(folder: Path, suffix: str, drawn: Drawn) -> dict[str, Any]:
    """Write image and heat of a sample; returns their hashes."""
    if drawn.image is None:
        return {"failed": True}
    powers = next(iter(drawn.maps.values())).shape[1]
    description = {"classes": drawn.sample.classes, "powers": powers}
    contents = (
        drawn.encoded or encode_image(drawn.image, suffix),
        heat_bytes(drawn.maps, description),
    )
    for path, data in zip(unit_files(folder, drawn.sample.id, suffix), contents, strict=True):
        write_atomic(path, data)
    return dict(zip(("image_sha256", "heat_sha256"), map(sha256, contents), strict=True))


def _draw(generator: Source, unit: list[Sample], seed: int, redraw: int) -> Iterator[Drawn]:
    """The samples of a unit; the image is None if every attempt was bad. Further attempts are drawn
    alone, with the attempt's own seed, so that they depend only on the sample."""
    images, heat, faults = generator.generate(unit)
    for sample, image, maps, fault in zip(unit, images, heat, faults, strict=True):
        seen: list[str] = []
        while fault is not None:
            seen.append(fault)
            if len(seen) > redraw:
                image = None
                break
            again = replace(sample, seed=sample_seed(seed, sample.id, attempt=len(seen)))
            (image,), (maps,), (fault,) = generator.generate([again])
        record: dict[str, Any] = {"attempt": min(len(seen), redraw)}
        yield Drawn(sample, image, maps, record | ({"faults": seen} if seen else {}))


def _sync(folder: Path) -> None:
    if folder.is_dir():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_tools(build: Callable[..., Tools], identity: dict[str, Any], device: str) -> Tools:
    """``build(device=device)`` for a worker process; ValueError unless its generator is the one
    with which the run was begun."""
    generator, clip = build(device=device)
    lines = differences(identity, json.loads(json.dumps(generator.identity())))
    if lines:
        raise ValueError(
            "the worker's generator differs from the driver's:\n  " + "\n  ".join(lines)
        )
    return generator, clip


def worker_died(folder: Path, suffix: str, unit: list[Sample], worker: str, pid: int) -> bool:
    """Whether the unit was recorded before its worker died; if not, its remains are removed."""
    names, path = {s.id for s in unit}, folder / "records" / f"{worker}.jsonl"
    if path.is_file() and names <= {r["id"] for r in each_record(path) if "error" not in r}:
        return True
    drop_records(folder, names, f"{worker}.jsonl")
    for name in names:
        for file in unit_files(folder, name, suffix):
            file.with_name(f".{file.name}.{pid}.tmp").unlink(missing_ok=True)
    return False


def drop_records(folder: str | Path, names: set[str], pattern: str = "*.jsonl") -> None:
    """Remove the records of these samples, and torn lines, from the files that hold some. Nobody
    may be writing to them."""
    for path in sorted((Path(folder) / "records").glob(pattern)):
        with open(path, "rb") as file:
            lines = sum(1 for _ in file)
        kept = sum(record["id"] not in names for record in each_record(path))
        if kept < lines:
            write_atomic(path, (record_line(r) for r in each_record(path) if r["id"] not in names))
        if not kept:
            path.unlink()


def present(folder: str | Path, suffix: str) -> set[str]:
    """Ids whose image and heat are both there."""
    images, heat = (
        {e.name.removesuffix(end) for e in _entries(Path(folder) / name) if e.name.endswith(end)}
        for name, end in zip(FOLDERS, (suffix, ".safetensors"), strict=True)
    )
    return images & heat


def finished(folder: str | Path, suffix: str, found: dict[str, str]) -> set[str]:
    """Ids that need no more work by their :func:`dd.store.samples.outcomes`: both files are there,
    or every attempt was bad."""
    there = present(folder, suffix)
    made = {i for i, how in found.items() if how != "quarantined" and i in there}
    return made | {i for i, how in found.items() if how == "failed"}


def sweep_samples(folder: str | Path, names: set[str]) -> None:
    """Remove the temporary files of the images and heat of ``names`` while others are at work
    (else: :func:`dd.store.provenance.sweep`)."""
    for place in FOLDERS:
        for entry in _entries(Path(folder) / place):
            if entry.name[1:].partition(".")[0] in names and is_temporary(entry.name):
                Path(entry.path).unlink(missing_ok=True)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as found:
        yield from found
