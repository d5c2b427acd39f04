"""Stage: is a synthetic data set whole, and as its records say? Every file is read and decoded."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dd.data.datasets import OtherDtype, read_image, read_mask, read_split, stored_heat
from dd.execution.units import drop_records, read_run, unit_files
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.provenance import fingerprint, read_own, sha256, temporary_files
from dd.store.samples import plan_sha256, read_records, read_whole_plan
from dd.store.schemas import WHOLE_MASKS
from dd.taxonomy import IGNORE

SHOWN = 3


def verify(folder, repair: bool = False, workers: int | None = None) -> list[dict]:
    """Problems of the synthetic set ``folder``: [{"kind", "file", "why", "heals"}], empty if it is
    whole.

    Read are plan, records, images, heat (hash, decoding, sizes, finite values), split files, mask
    sets (hash, ids in range, size of the image, heat they came from); files that belong to no
    sample are named. ``repair`` takes away what lets generate.py make the damaged parts again, and
    nothing else: records of damaged units, masks.json of damaged mask sets, temporary files;
    ``heals`` says whether that is enough. FileNotFoundError for a folder that is no synthetic set,
    ValueError for a run.json that cannot be read, Busy with ``repair`` while it is written.
    """
    folder = Path(folder)
    read_run(folder)
    leftover = temporary_files(folder)
    if repair:
        with Lock(folder):  # which removes them
            return _verify(folder, True, workers, leftover)
    return _verify(folder, False, workers, leftover)


def _verify(folder, repair, workers, leftover):
    run, found = read_run(folder)["identity"], []
    try:
        plan = read_whole_plan(folder)
        why = (
            "is not the plan that run.json names"
            if plan_sha256(plan) != run["plan_sha256"]
            else None
        )
    except (ValueError, FileNotFoundError) as error:
        why = str(error)
    if why:  # nothing else can be judged without it
        if repair:
            (folder / "plan.jsonl").unlink(missing_ok=True)
        return [_problem("plan", "plan.jsonl", why)]
    records, suffix = read_records(folder), run["image_format"]
    known = {s.id for s in plan}
    found += [
        _problem("record", name, "belongs to no sample of the plan", False)
        for name in sorted(records.keys() - known)
    ]
    sizes, broken = {}, set()
    with ThreadPoolExecutor(
        workers or min(8, os.cpu_count() or 1)
    ) as pool:  # hashing and decoding let other threads run
        with Progress("verify", len(plan)) as progress:
            for sample, (size, problems) in zip(
                plan, pool.map(partial(_sample, folder, suffix, records), plan), strict=True
            ):
                progress.advance(1)
                sizes[sample.id] = size
                found += problems
                broken |= {sample.unit} if any(p["heals"] for p in problems) else set()
        good = [s.id for s in plan if not records.get(s.id, {}).get("failed")]
        sets = [
            p
            for p in [folder / "SegmentationClass", *sorted((folder / "masks").glob("*"))]
            if p.is_dir()
        ]
        for target in sets:
            problems = _mask_set(
                folder, target, good, records, sizes, len(run["taxonomy"]["names"]), pool
            )
            found += problems
            if problems and repair:
                (target / "masks.json").unlink(missing_ok=True)
    found += _splits(folder, good)
    wanted = {p for name in good for p in unit_files(folder, name, suffix)} | {
        t / f"{n}.png" for t in sets for n in good
    }
    found += [
        _problem("temporary file", p.relative_to(folder), "was left by a writer that was killed")
        for p in leftover
    ]
    for place in (folder / "JPEGImages", folder / "heat", *sets):
        extra = {p for p in place.glob("*") if p.is_file() and not p.name.startswith(".")} - wanted
        extra = sorted(p for p in extra if p.suffix != ".json")
        found += [
            _problem("orphan", p.relative_to(folder), "belongs to no sample: remove it", False)
            for p in extra
        ]
    if repair:
        drop_records(folder, {s.id for s in plan if s.unit in broken})
    return found


def _problem(kind, file, why, heals=True):
    return {"kind": kind, "file": str(file), "why": why, "heals": heals}


def _sample(folder, suffix, records, sample) -> tuple:
    """((height, width) of the image or None, problems) of a sample."""
    record = records.get(sample.id)
    if record is None or "error" in record:
        return None, [
            _problem(
                "record",
                sample.id,
                "is not generated" if record is None else f"failed: {record['error']}",
            )
        ]
    if record.get("failed"):
        return None, []
    found, size = [], None
    for key, path in zip(("image", "heat"), unit_files(folder, sample.id, suffix), strict=True):
        name = path.relative_to(folder)
        if not path.is_file() or path.is_symlink():
            found.append(_problem(key, name, "is missing"))
            continue
        if sha256(path) != record.get(f"{key}_sha256"):
            found.append(_problem(key, name, "has another sha256 than its record"))
            continue
        try:
            if key == "image":
                size = read_image(path).shape[:2]
            else:
                for source, maps in stored_heat(folder, sample.id).items():
                    if (
                        maps.ndim != 4
                        or len(maps) != len(sample.classes)
                        or not np.isfinite(maps).all()
                    ):
                        found.append(
                            _problem(
                                key,
                                name,
                                f"{source} of shape {maps.shape} is not finite heat of its classes",
                            )
                        )
        except (ValueError, OSError) as error:
            heals = not isinstance(error, OtherDtype)  # all of a set is, it cannot be gone on with
            found.append(_problem(key, name, f"cannot be read: {error}", heals))
    return size, found


def _mask_set(folder, target, good, records, sizes, classes, pool) -> list[dict]:
    """Problems of a mask set; none if it is merely unfinished, which its stage goes on with."""
    name, path = target.relative_to(folder), target / "masks.json"
    if not path.is_file():
        return (
            [_problem("mask set", name, "is not finished (no masks.json)")]
            if list(target.glob("*.png"))
            else []
        )
    try:
        done = read_own(path, WHOLE_MASKS)
    except ValueError as error:
        return [_problem("mask set", f"{name}/masks.json", f"cannot be read: {error}")]
    hashes, heat = done["sha256"], done["identity"].get("heat")
    if list(hashes) != good and sorted(hashes) != sorted(good):
        return [
            _problem(
                "mask set",
                name,
                f"holds masks of {len(hashes)} samples, the data set has {len(good)}",
            )
        ]
    found = []
    recorded = [records.get(i, {}).get("heat_sha256") for i in good]
    if heat is not None and None not in recorded and heat != fingerprint(recorded):
        found.append(_problem("mask set", name, "was made from other heat"))
    check = partial(_mask, folder, target, hashes, sizes, classes)
    return found + [problem for problem in pool.map(check, good) if problem]


def _mask(folder, target, hashes, sizes, classes, sample_id):
    path = target / f"{sample_id}.png"
    name = path.relative_to(folder)
    if not path.is_file():
        return _problem("mask", name, "is missing")
    if sha256(path) != hashes[sample_id]:
        return _problem("mask", name, "has another sha256 than masks.json")
    try:
        mask = read_mask(path)
    except (ValueError, OSError) as error:
        return _problem("mask", name, f"cannot be read: {error}")
    if sizes[sample_id] is not None and mask.shape != sizes[sample_id]:
        return _problem(
            "mask", name, f"is {mask.shape}, its image {sizes[sample_id]} (height, width)"
        )
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    outside = values[(values > classes) & (values != IGNORE)]
    return (
        _problem("mask", name, f"holds ids {outside[:5].tolist()} of no class")
        if len(outside)
        else None
    )


def _splits(folder, good) -> list[dict]:
    """``train`` lists every good sample in order, other lists some of them."""
    found, place = [], folder / "ImageSets" / "Segmentation"
    for name in sorted({"train", *(p.stem for p in place.glob("*.txt"))}):
        file = f"ImageSets/Segmentation/{name}.txt"
        try:
            ids = read_split(folder, name)
        except (ValueError, OSError) as error:
            found.append(_problem("split", file, str(error), name == "train"))
            continue
        if name == "train" and ids != good:
            found.append(
                _problem(
                    "split",
                    file,
                    f"lists {len(ids)} samples, the records {len(good)}, or in another order",
                )
            )
        elif not set(ids) <= set(good) or len(set(ids)) < len(ids):
            found.append(
                _problem("split", file, "lists samples that are not there, or one twice", False)
            )
    return found


def print_problems(folder, problems: list[dict], repaired: bool) -> None:
    """A table of what is wrong, and what to do."""
    if not problems:
        return print(f"{folder}: whole")
    table = Table(
        "what", "number", "such as", title=f"{folder}: {len(problems)} problems", show_lines=True
    )
    for kind, number in Counter(p["kind"] for p in problems).items():
        shown = [f"{p['file']} {p['why']}" for p in problems if p["kind"] == kind][:SHOWN]
        table.add_row(kind, str(number), escape("\n".join(shown)))
    Console().print(table)
    command = read_run(folder).get("command", "generate.py with the settings of run.json")
    sets = sorted(
        {
            p["file"]
            for p in problems
            if p["kind"] in ("mask", "mask set") and p["file"].startswith("masks/")
        }
    )
    if any(p["heals"] for p in problems):
        what = (
            "ready to be healed by" if repaired else "after python -m dd verify --repair, healed by"
        )
        print(f"{what}: python {command}")
    if sets:
        print(
            "further mask sets are made again by the commands that made them: "
            f"{', '.join(sets[:SHOWN])}"
        )
    return None
