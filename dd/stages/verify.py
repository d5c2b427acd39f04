"""Stage: check that a synthetic data set is complete and matches its records. Reads and decodes
every file."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dd.data.datasets import (
    OtherDtype,
    heat_path,
    heat_root,
    read_image,
    read_mask,
    read_split,
    stored_heat,
)
from dd.execution.units import drop_records, read_run, unit_files
from dd.store.commands import repeated, spelled
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.provenance import fingerprint, read_own, sha256, temporary_files
from dd.store.samples import Sample, read_records, read_whole_plan
from dd.store.schemas import WHOLE_MASKS
from dd.taxonomy import IGNORE

SHOWN = 3
Problem: TypeAlias = dict[str, Any]
Size: TypeAlias = tuple[int, int]
Content = TypeVar("Content")


def verify(folder: str | Path, repair: bool = False, workers: int | None = None) -> list[Problem]:
    """Problems of the synthetic set ``folder``: [{"kind", "file", "why", "heals"}], empty if there
    are none.

    Checks plan, records, images, heat (hash, decoding, sizes, finite values), split files and mask
    sets (hash, ids in range, size of the image, heat they came from), and names files that belong
    to no sample. ``repair`` removes only what lets generate.py make the damaged parts again:
    records of damaged units, masks.json of damaged mask sets, temporary files; ``heals`` says
    whether that is enough. FileNotFoundError for a folder that is not a synthetic set, ValueError
    for a run.json that cannot be read, Busy with ``repair`` while another process writes to it.
    """
    folder = Path(folder)
    read_run(folder)
    leftover = temporary_files(folder)
    with Lock(folder) if repair else nullcontext():  # the lock removes temporary files
        return _verify(folder, repair, workers, leftover)


@dataclass(frozen=True)
class _Set:
    """A synthetic set as its own files describe it. ``classes``: their number; ``good``: ids of the
    samples that have an image; ``heats``: records of the heat by reading, None = while drawing."""

    folder: Path
    suffix: str
    classes: int
    records: dict[str, dict[str, Any]]
    good: list[str]
    heats: dict[str | None, dict[str, dict[str, Any]]]

    @property
    def mask_sets(self) -> list[Path]:
        further = sorted((self.folder / "masks").glob("*"))
        return [p for p in (self.folder / "SegmentationClass", *further) if p.is_dir()]


def _verify(folder: Path, repair: bool, workers: int | None, leftover: list[Path]) -> list[Problem]:
    run = read_run(folder)["identity"]
    try:
        plan = read_whole_plan(folder)
    except (ValueError, FileNotFoundError) as error:  # nothing else can be checked without it
        if repair:
            (folder / "plan.jsonl").unlink(missing_ok=True)
        return [_problem("plan", "plan.jsonl", str(error))]
    records = read_records(folder)
    good = [s.id for s in plan if not records.get(s.id, {}).get("failed")]
    heats = _readings(folder)
    if "given" not in run["generator"]:
        heats = {None: records, **heats}
    names = run["taxonomy"]["names"]
    of = _Set(folder, run["image_format"], len(names), records, good, heats)
    # hashing and decoding release the interpreter, so threads help
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        sizes, in_samples = _samples(of, plan, pool)
        in_masks = {target: _mask_set(of, target, sizes, pool) for target in of.mask_sets}
    found = [
        _problem("record", name, "belongs to no sample of the plan", False)
        for own in (records, *(own for reading, own in heats.items() if reading))
        for name in sorted(own.keys() - sizes.keys())
    ]
    for problems in (*in_samples.values(), *in_masks.values()):
        found += problems
    found += _splits(of) + _leftover(of, leftover)
    if repair:
        for target in (target for target, problems in in_masks.items() if problems):
            (target / "masks.json").unlink(missing_ok=True)
        _drop_damaged(of, plan, in_samples)
    return found


def _drop_damaged(of: _Set, plan: list[Sample], in_samples: dict[str, list[Problem]]) -> None:
    """Remove the records of units with repairable damage, of the drawing or of a reading."""
    broken: dict[str | None, set[int]] = {name: set() for name in (None, *of.heats)}
    for sample in plan:
        for problem in in_samples[sample.id]:
            if problem["heals"]:
                broken[_reading(problem)].add(sample.unit)
    for name, units in broken.items():
        root = of.folder if name is None else of.folder / "heat" / name
        again = units | broken[None]  # samples that are drawn again are also read again
        drop_records(root, {s.id for s in plan if s.unit in again})


def _readings(folder: Path) -> dict[str | None, dict[str, dict[str, Any]]]:
    """{name: records} of the readings by further models."""
    paths = sorted((folder / "heat").glob("*/run.json"))
    return {path.parent.name: read_records(path.parent) for path in paths}


def _problem(kind: str, file: str | Path, why: str, heals: bool = True) -> Problem:
    return {"kind": kind, "file": str(file), "why": why, "heals": heals}


def _reading(problem: Problem) -> str | None:
    """The reading that a problem belongs to, None = the set itself."""
    parts = Path(problem["file"]).parts
    return parts[1] if problem["kind"] == "heat" and len(parts) > 2 else None


def _samples(
    of: _Set, plan: list[Sample], pool: ThreadPoolExecutor
) -> tuple[dict[str, Size | None], dict[str, list[Problem]]]:
    """({id: (height, width) of the image or None}, {id: problems})."""
    sizes, problems = {}, {}
    with Progress("verify", len(plan)) as progress:
        for sample, found in zip(plan, pool.map(partial(_sample, of), plan), strict=True):
            sizes[sample.id], problems[sample.id] = found
            progress.advance()
    return sizes, problems


def _sample(of: _Set, sample: Sample) -> tuple[Size | None, list[Problem]]:
    record = of.records.get(sample.id)
    if record is None or "error" in record:
        why = "is not generated" if record is None else f"failed: {record['error']}"
        return None, [_problem("record", sample.id, why)]
    if record.get("failed"):
        return None, []
    image, _ = unit_files(of.folder, sample.id, of.suffix)
    pixels, found = _content(of, "image", image, record.get("image_sha256"), read_image)
    for reading, records in of.heats.items():
        if reading is None or sample.id in records:  # a reading may be unfinished
            own = _heat(of, sample, reading, records[sample.id].get("heat_sha256"))
            other = records[sample.id].get("image_sha256") != record.get("image_sha256")
            if reading is not None and other and not own:
                path = heat_path(of.folder, sample.id, reading).relative_to(of.folder)
                own = [_problem("heat", path, "was read of the image as it was before")]
            found += own
    return None if pixels is None else pixels.shape[:2], found


def _heat(of: _Set, sample: Sample, reading: str | None, digest: str | None) -> list[Problem]:
    path = heat_path(of.folder, sample.id, reading)
    maps, found = _content(
        of, "heat", path, digest, lambda _: stored_heat(of.folder, sample.id, reading)
    )
    for source, array in (maps or {}).items():
        whole = array.ndim == 4 and len(array) == len(sample.classes) and np.isfinite(array).all()
        if not whole:
            why = f"{source} of shape {array.shape} is not finite heat of its classes"
            found.append(_problem("heat", path.relative_to(of.folder), why))
    return found


def _content(
    of: _Set, kind: str, path: Path, digest: str | None, read: Callable[[Path], Content]
) -> tuple[Content | None, list[Problem]]:
    """(the result of ``read(path)``, []), or (None, what is wrong with the file)."""
    name = path.relative_to(of.folder)
    if not path.is_file() or (kind != "mask" and path.is_symlink()):
        return None, [_problem(kind, name, "is missing")]
    if sha256(path) != digest:
        whose = "masks.json" if kind == "mask" else "its record"
        return None, [_problem(kind, name, f"has another sha256 than {whose}")]
    try:
        return read(path), []
    except (ValueError, OSError) as error:
        heals = not isinstance(error, OtherDtype)  # then the whole set has it and cannot continue
        return None, [_problem(kind, name, f"cannot be read: {error}", heals)]


def _mask_set(
    of: _Set, target: Path, sizes: dict[str, Size | None], pool: ThreadPoolExecutor
) -> list[Problem]:
    """Problems of a mask set; none if it is merely unfinished, because its stage resumes it."""
    name, path = target.relative_to(of.folder), target / "masks.json"
    if not path.is_file():
        begun = any(target.glob("*.png"))
        return [_problem("mask set", name, "is not finished (no masks.json)")] if begun else []
    try:
        done = read_own(path, WHOLE_MASKS)
    except ValueError as error:
        return [_problem("mask set", f"{name}/masks.json", f"cannot be read: {error}")]
    hashes, heat = done["sha256"], done["identity"].get("heat")
    if sorted(hashes) != sorted(of.good):
        why = f"holds masks of {len(hashes)} samples, the data set has {len(of.good)}"
        return [_problem("mask set", name, why)]
    found = []
    records = of.heats.get(done["identity"].get("reading"), {})
    recorded = [records.get(i, {}).get("heat_sha256") for i in of.good]
    if heat is not None and None not in recorded and heat != fingerprint(recorded):
        found.append(_problem("mask set", name, "was made from other heat"))

    def check(sample_id: str) -> list[Problem]:
        return _mask(of, target / f"{sample_id}.png", hashes[sample_id], sizes[sample_id])

    return found + [problem for problems in pool.map(check, of.good) for problem in problems]


def _mask(of: _Set, path: Path, digest: str, size: Size | None) -> list[Problem]:
    mask, found = _content(of, "mask", path, digest, read_mask)
    if mask is None:
        return found
    name = path.relative_to(of.folder)
    if size not in (None, mask.shape):
        return [_problem("mask", name, f"is {mask.shape}, its image {size} (height, width)")]
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    outside = values[(values > of.classes) & (values != IGNORE)].tolist()
    return [_problem("mask", name, f"holds ids {outside[:5]} of no class")] if outside else []


def _splits(of: _Set) -> list[Problem]:
    """``train`` must list every good sample in order; other lists may hold only some."""
    names = {"train", *(p.stem for p in (of.folder / "ImageSets" / "Segmentation").glob("*.txt"))}
    return [problem for name in sorted(names) for problem in _split(of, name)]


def _split(of: _Set, name: str) -> list[Problem]:
    file, whole = f"ImageSets/Segmentation/{name}.txt", name == "train"
    try:
        ids = read_split(of.folder, name)
    except (ValueError, OSError) as error:
        return [_problem("split", file, str(error), whole)]
    if whole and ids != of.good:
        why = f"lists {len(ids)} samples, the records {len(of.good)}, or in another order"
        return [_problem("split", file, why)]
    if not set(ids) <= set(of.good) or len(set(ids)) < len(ids):
        return [_problem("split", file, "lists samples that are not there, or one twice", False)]
    return []


def _leftover(of: _Set, temporary: list[Path]) -> list[Problem]:
    """Temporary files, and files beside those of the samples."""
    wanted = {p for name in of.good for p in unit_files(of.folder, name, of.suffix)}
    wanted |= {heat_path(of.folder, name, r) for r in of.heats for name in of.good}
    wanted |= {target / f"{name}.png" for target in of.mask_sets for name in of.good}
    found = [
        _problem("temporary file", p.relative_to(of.folder), "was left by a writer that was killed")
        for p in temporary
    ]
    heats = (of.folder / "heat" / (reading or "") for reading in of.heats)
    for place in (of.folder / "JPEGImages", *heats, *of.mask_sets):
        files = {p for p in place.glob("*") if p.is_file() and not p.name.startswith(".")}
        found += [
            _problem("orphan", p.relative_to(of.folder), "belongs to no sample: remove it", False)
            for p in sorted(files - wanted)
            if p.suffix != ".json"
        ]
    return found


def print_problems(folder: str | Path, problems: list[Problem], repaired: bool) -> None:
    """Print a table of what is wrong, and what to do."""
    if not problems:
        print(f"{folder}: whole")
        return
    title = f"{folder}: {len(problems)} problems"
    table = Table("what", "number", "such as", title=title, show_lines=True)
    for kind, number in Counter(p["kind"] for p in problems).items():
        shown = [f"{p['file']} {p['why']}" for p in problems if p["kind"] == kind][:SHOWN]
        table.add_row(kind, str(number), escape("\n".join(shown)))
    Console().print(table)
    when = "ready to be" if repaired else "after python -m dd verify --repair,"
    for reading in dict.fromkeys(_reading(p) for p in problems if p["heals"]):
        run = read_own(heat_root(folder, reading) / "run.json", {})
        command = repeated(run.get("command", "generate.py with the settings of run.json"))
        print(spelled(f"{when} healed by: {command}"))
    in_masks = {p["file"] for p in problems if p["kind"] in ("mask", "mask set")}
    sets = sorted(file for file in in_masks if file.startswith("masks/"))
    if sets:
        shown = sets[:SHOWN]
        print(
            f"further mask sets are made again by the commands that made them: {', '.join(shown)}"
        )
