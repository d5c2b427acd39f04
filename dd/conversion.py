"""Masks of any source written as a prepared data set, in parallel and resumable; the images stay where they lie."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dd.datasets import RECORD, check_values, encode_image, encode_mask, orientation, read_mask, rgb, write_split
from dd.progress import Progress
from dd.provenance import read_own, refuse_other, write_atomic, write_json
from dd.schemas import IDENTIFIED, PARTS
from dd.taxonomy import IGNORE, Taxonomy

CHUNK = 64  # masks between two looks at the progress bar; fewer are made without further processes


@dataclass(frozen=True)
class MaskJob:
    """A mask to write: its id, its image's file, the file it comes from (for messages), and what reads or draws it."""

    name: str
    image: Path
    source: str
    draw: Callable[[], np.ndarray]
    lost: Callable[[], int] | None = None  # how many of its annotations cover no pixel


def keep_out(root: str | Path, folders) -> None:
    """FileExistsError if ``root`` lies in one of ``folders``, which are only read."""
    for folder in folders:
        if folder is not None and Path(root).resolve().is_relative_to(Path(folder).resolve()):
            raise FileExistsError(
                f"{root} lies in {folder}, which holds other data, which is not written to: choose another --root"
            )


KINDS = ({"train", "val"}, {"train_aug"}, {"all"})  # parts of COCO, of augmented VOC, of own data: never in one folder


def finished(root: str | Path, part: str, identity: dict, images: tuple[Path, ...] = ()) -> dict | None:
    """The record of a finished part, or None; FileExistsError if it was made from something else, or holds other data.

    ``images``: where the images lie now; recorded folders that are gone are replaced by them.
    """
    root = Path(root)
    if root.is_dir() and any(root.iterdir()) and not any(root.glob("settings_*.json")):
        raise FileExistsError(f"{root} holds other data, which is not written to: move it, or prepare below another --root")
    record = read_own(root / RECORD, PARTS) if (root / RECORD).is_file() else {"parts": {}}
    strangers = record["parts"].keys() - next(kind for kind in KINDS if part in kind)
    if strangers:
        raise FileExistsError(
            f"{root} is another data set (it holds {', '.join(sorted(strangers))}). Choose another --name or --root"
        )
    if part in record["parts"]:
        refuse_other(root / f"settings_{part}.json", identity, "data set")
        there = [f for f in record["images"] if (root / f).is_dir()]
        if images and len(there) < len(record["images"]):
            record["images"] = there + [f for f in (_relative(i, root) for i in images) if f not in there]
            write_json(root / RECORD, record)
    return record["parts"].get(part)


def write_part(
    root: str | Path, part: str, identity: dict, jobs: list[MaskJob], splits: dict[str, list[str]], images: list[Path],
    taxonomy: Taxonomy, workers: int | None = None, upright: bool = False, notes: tuple[str, ...] = (),
) -> dict:  # fmt: skip
    """Masks, split lists and, last, the record of one part (a split or all) of a prepared data set; returns its record.

    An interrupted part goes on where it stopped, or begins anew if its source is another now. ``images``: the folders that
    hold the images; below ``root``'s parent they are recorded relative to ``root``, so that the whole can be moved.
    """
    root, settings = Path(root), Path(root) / f"settings_{part}.json"
    if settings.exists() and read_own(settings, IDENTIFIED)["identity"] != identity:
        for job in jobs:
            for folder in ("SegmentationClass", "JPEGImages"):
                (root / folder / f"{job.name}.png").unlink(missing_ok=True)
    write_json(settings, {"identity": identity})
    counts = convert(jobs, root, taxonomy, workers, upright)
    for split, ids in splits.items():
        write_split(root, split, ids)
    absent = [name for name in taxonomy.names if not counts["classes"][name]["images"]]
    listed = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
    notes = [*notes, f"{len(absent)} classes are in no mask: {listed}"] if absent else list(notes)
    if counts["lost"]:
        notes.append(f"{counts['lost']} annotations cover no pixel (no area, or outside the image): left out")
    if counts["upright"]:
        notes.append(f"{counts['upright']} images carry an EXIF rotation: upright copies lie in {root / 'JPEGImages'}")
    record = read_own(root / RECORD, PARTS) if (root / RECORD).is_file() else {"images": [], "parts": {}}
    record["images"] += [f for f in (_relative(i, root) for i in images) if f not in record["images"]]
    record["taxonomy"] = {"name": taxonomy.name, "names": list(taxonomy.names)}
    found = {"identity": identity, "splits": {k: len(v) for k, v in splits.items()}, **counts, "notes": notes}
    record["parts"][part] = found
    write_json(root / RECORD, record)
    return found


def _relative(folder: Path, root: Path) -> str:
    folder, root = Path(folder).resolve(), root.resolve()
    return os.path.relpath(folder, root) if folder.is_relative_to(root.parent) else str(folder)


def convert(
    jobs: list[MaskJob], root: Path, taxonomy: Taxonomy, workers: int | None = None, upright: bool = False
) -> dict:  # fmt: skip
    """Write ``root/SegmentationClass/<id>.png`` of every job that has none yet; counts images and pixels of each class.

    ``workers`` processes (None = one for each core, at most 8). ``upright``: an image with an EXIF rotation whose mask is that
    of the upright image gets an upright copy in ``root/JPEGImages``. ValueError lists the masks that could not be made, after
    all others were.
    """
    chunks = [jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)]
    work = partial(_convert_chunk, root=root, taxonomy=taxonomy, upright=upright)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    images, pixels, turned, lost, errors = np.zeros(256, np.int64), np.zeros(256, np.int64), 0, 0, []
    with Progress("masks", len(jobs), stream=sys.stderr, unit="masks") as progress:
        for done, part in map(work, chunks) if workers < 2 or len(chunks) < 2 else _parallel(work, chunks, workers):
            progress.advance(done)
            images, pixels, turned = images + part[0], pixels + part[1], turned + part[2]
            lost, errors = lost + part[3], errors + part[4]
    if errors:
        lines = "\n  ".join(sorted(errors)[:10])
        raise ValueError(f"{len(errors)} of {len(jobs)} masks could not be made (the others are kept):\n  {lines}")
    classes = {name: {"images": int(images[i]), "pixels": int(pixels[i])} for i, name in enumerate(taxonomy.all_names)}
    ignored = int(pixels[IGNORE])
    return {"images": len(jobs), "upright": turned, "lost": lost, "ignored_pixels": ignored, "classes": classes}


def _parallel(work, chunks, workers):
    """Results of ``work`` on the chunks as they come, from spawned processes."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(work, chunk) for chunk in chunks]):
            yield future.result()
    except BrokenProcessPool:
        raise OSError(
            "a worker process died (memory?); the finished masks are kept. Run the command again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _convert_chunk(jobs, root, taxonomy, upright):
    images, pixels, turned, lost, errors = np.zeros(256, np.int64), np.zeros(256, np.int64), 0, 0, []
    for job in jobs:
        try:
            mask, copied = _convert(job, root, taxonomy, upright)
        except (ValueError, OSError, Image.DecompressionBombError) as error:
            errors.append(f"{job.source}: {error}")
            continue
        counted = np.bincount(mask.ravel(), minlength=256)
        images, pixels, turned = images + (counted > 0), pixels + counted, turned + copied
        lost += job.lost() if job.lost else 0
    return len(jobs), (images, pixels, turned, lost, errors)


def _convert(job: MaskJob, root: Path, taxonomy: Taxonomy, upright: bool) -> tuple[np.ndarray, bool]:
    path, copy = root / "SegmentationClass" / f"{job.name}.png", root / "JPEGImages" / f"{job.name}.png"
    there = path.is_file()
    mask = read_mask(path) if there else job.draw()
    check_values(mask, taxonomy, job.source)
    with Image.open(job.image) as image:
        stored, turn = (image.height, image.width), orientation(image) if upright else 1
        copied = turn > 1 and mask.shape == (stored[::-1] if turn >= 5 else stored)
        if copied and not copy.is_file():
            turned = rgb(ImageOps.exif_transpose(image))
            write_atomic(copy, encode_image(np.asarray(turned), ".png"))
    if not copied and mask.shape != stored:
        raise ValueError(f"{job.image} is {stored[1]}x{stored[0]} (width x height), its mask {mask.shape[1]}x{mask.shape[0]}")
    if not there:
        write_atomic(path, encode_mask(mask, taxonomy.palette))
    return mask, copied
