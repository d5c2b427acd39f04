"""Masks of any source written as a prepared data set, in parallel and resumable; the images stay
where they lie."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dd.data.datasets import (
    RECORD,
    check_values,
    dark_note,
    encode_image,
    encode_mask,
    is_dark,
    orientation,
    read_mask,
    rgb,
    write_split,
)
from dd.store.progress import Progress
from dd.store.provenance import read_own, refuse_other, write_atomic, write_json
from dd.store.schemas import IDENTIFIED, PARTS
from dd.taxonomy import IGNORE, Taxonomy

CHUNK = 64  # masks between two looks at the progress bar; fewer are made without further processes


@dataclass(frozen=True)
class MaskJob:
    """A mask to write: its id, its image's file, the file it comes from (for messages), and what
    reads or draws it."""

    name: str
    image: Path
    source: str
    draw: Callable[[], np.ndarray]
    lost: Callable[[], int] | None = None  # how many of its annotations cover no pixel
    size: Callable[[], tuple[int, int]] | None = (
        None  # (height, width) of the mask, before it is drawn
    )


def keep_out(root: str | Path, folders) -> None:
    """FileExistsError if ``root`` lies in one of ``folders``, which are only read."""
    for folder in folders:
        if folder is not None and Path(root).resolve().is_relative_to(Path(folder).resolve()):
            raise FileExistsError(
                f"{root} lies in {folder}, which holds other data, which is not written to: "
                "choose another --root"
            )


KINDS = (
    {"train", "val"},
    {"train_aug"},
    {"all"},
)  # parts of COCO, of augmented VOC, of own data: never in one folder


def finished(
    root: str | Path, part: str, identity: dict, images: tuple[Path, ...] = ()
) -> dict | None:
    """The record of a finished part, or None; FileExistsError if it was made from something else,
    or holds other data.

    ``images``: where the images lie now; recorded folders that are gone are replaced by them.
    """
    root = Path(root)
    if root.is_dir() and any(root.iterdir()) and not any(root.glob("settings_*.json")):
        raise FileExistsError(
            f"{root} holds other data, which is not written to: move it, or prepare below another "
            "--root"
        )
    record = read_own(root / RECORD, PARTS) if (root / RECORD).is_file() else {"parts": {}}
    strangers = record["parts"].keys() - next(kind for kind in KINDS if part in kind)
    if strangers:
        raise FileExistsError(
            f"{root} is another data set (it holds {', '.join(sorted(strangers))}). Choose "
            "another --name or --root"
        )
    if part in record["parts"]:
        refuse_other(root / f"settings_{part}.json", identity, "data set")
        there = [f for f in record["images"] if (root / f).is_dir()]
        if images and len(there) < len(record["images"]):
            record["images"] = there + [
                f for f in (_relative(i, root) for i in images) if f not in there
            ]
            write_json(root / RECORD, record)
    return record["parts"].get(part)


def write_part(
    root: str | Path,
    part: str,
    identity: dict,
    jobs: list[MaskJob],
    splits: dict[str, list[str]],
    images: list[Path],
    taxonomy: Taxonomy,
    workers: int | None = None,
    upright: bool = False,
    notes: tuple[str, ...] = (),
) -> dict:
    """Masks, split lists and, last, the record of one part (a split or all) of a prepared data set;
    returns its record.

    An interrupted part goes on where it stopped, or begins anew if its source is another now.
    ``images``: the folders that hold the images; below ``root``'s parent they are recorded relative
    to ``root``, so that the whole can be moved.
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
    if jobs and not any(counts["classes"][name]["images"] for name in taxonomy.names):
        ignored = counts["ignored_pixels"]
        raise ValueError(
            f"no class of taxonomy {taxonomy.name!r} occurs in the {len(jobs)} masks: they hold "
            + ("0 (background) and 255 (ignored) alone" if ignored else "background alone")
            + ". If an object is written as 255 (black and white masks): --map 255=CLASS; if all "
            "objects of a COCO "
            "file are marked as crowds: --crowds objects; else nothing is labelled in them"
        )
    absent = [name for name in taxonomy.names if not counts["classes"][name]["images"]]
    listed = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
    notes = [*notes, f"{len(absent)} classes are in no mask: {listed}"] if absent else list(notes)
    if counts["lost"]:
        notes.append(
            f"{counts['lost']} annotations cover no pixel (no area, or outside the image): left out"
        )
    if counts["undecided"]:
        notes.append(_told_by_the_others(counts["undecided"], *counts["votes"]))
    if counts["dark"]:
        notes.append(dark_note(counts["dark"]))
    if counts["upright"]:
        notes.append(
            f"{counts['upright']} images carry an EXIF rotation: upright copies lie in "
            f"{root / 'JPEGImages'}"
        )
    record = (
        read_own(root / RECORD, PARTS) if (root / RECORD).is_file() else {"images": [], "parts": {}}
    )
    record["images"] += [
        f for f in (_relative(i, root) for i in images) if f not in record["images"]
    ]
    record["taxonomy"] = {"name": taxonomy.name, "names": list(taxonomy.names)}
    found = {
        "identity": identity,
        "splits": {k: len(v) for k, v in splits.items()},
        **counts,
        "notes": notes,
    }
    record["parts"][part] = found
    write_json(root / RECORD, record)
    return found


def _told_by_the_others(number: int, stored: int, upright: int) -> str:
    what = (
        f"{number} images carry an EXIF rotation of which their size does not tell whether the "
        "mask is turned"
    )
    if stored and upright:
        return (
            f"{what}: taken as upright, but {stored} others are of stored pixels, {upright} "
            "upright: look at them"
        )
    if stored or upright:
        how = "of stored pixels" if stored else "upright"
        return f"{what}: taken as {how}, as the {stored or upright} masks are whose size tells"
    return (
        f"{what}, nor does any other of the set: taken as upright, as tools show them; look at some"
    )


def _relative(folder: Path, root: Path) -> str:
    folder, root = Path(folder).resolve(), root.resolve()
    return os.path.relpath(folder, root) if folder.is_relative_to(root.parent) else str(folder)


@dataclass
class Counts:
    """What became of some masks. ``images``, ``pixels`` [256]: with each value; ``votes``: masks
    that sizes show to belong to (stored, upright) pixels; ``left``: jobs of turned images of
    which sizes do not tell that."""

    images: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    votes: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    upright: int = 0
    lost: int = 0
    dark: int = 0
    left: list[MaskJob] = field(default_factory=list)
    errors: list[tuple[str, str, str]] = field(default_factory=list)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def convert(
    jobs: list[MaskJob],
    root: Path,
    taxonomy: Taxonomy,
    workers: int | None = None,
    upright: bool = False,
) -> dict:
    """Write ``root/SegmentationClass/<id>.png`` of every job that has none yet; counts images and
    pixels of each class.

    ``workers`` processes (None = one for each core, at most 8). ``upright``: an image with an EXIF
    rotation whose mask is that of the upright image gets an upright copy in ``root/JPEGImages``.
    Where sizes do not tell (square, mirrored, upside down) it is as with the images of the set
    whose sizes do; upright where they disagree or there are none. ValueError lists the masks that
    could not be made, after all others were.
    """
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    work = partial(_convert_chunk, root=root, taxonomy=taxonomy, upright=upright)
    with Progress("masks", len(jobs), stream=sys.stderr, unit="masks") as progress:
        found = _each(partial(work, guess=None), jobs, workers, progress.advance)
        stored, turned = found.votes.tolist()
        guess = turned > 0 or not stored
        found += _each(partial(work, guess=guess), found.left, workers, progress.advance)
    if found.errors:
        raise ValueError(
            f"{len(found.errors)} of {len(jobs)} masks could not be made (the others are kept):\n  "
            + "\n  ".join(_told_once(found.errors)[:10])
        )
    names = enumerate(taxonomy.all_names)
    return {
        "images": len(jobs),
        "upright": found.upright,
        "lost": found.lost,
        "dark": found.dark,
        "ignored_pixels": int(found.pixels[IGNORE]),
        "undecided": len(found.left),
        "votes": [stored, turned],
        "classes": {
            name: {"images": int(found.images[i]), "pixels": int(found.pixels[i])}
            for i, name in names
        },
    }


def _each(work, jobs: list[MaskJob], workers: int, advance) -> Counts:
    chunks = [jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)]
    found = Counts()
    for number, done in (
        map(work, chunks) if workers < 2 or len(chunks) < 2 else _parallel(work, chunks, workers)
    ):
        found += done
        advance(number)
    return found


def _told_once(errors: list[tuple[str, str, str]]) -> list[str]:
    """Lines for (source, what is wrong, the same without names of files): each cause once, with
    the first of its files."""
    causes = defaultdict(list)
    for source, text, cause in sorted(errors):
        causes[cause].append(text if source in text else f"{source}: {text}")
    return [
        lines[0] + (f" (and {len(lines) - 1} more for this reason)" if lines[1:] else "")
        for lines in causes.values()
    ]


def _parallel(work, chunks, workers):
    """Results of ``work`` on the chunks as they come, from spawned processes."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(work, chunk) for chunk in chunks]):
            yield future.result()
    except BrokenProcessPool:
        raise OSError(
            "a worker process died (memory?); the finished masks are kept. Run the command again "
            "with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _convert_chunk(jobs, root, taxonomy, upright, guess) -> tuple[int, Counts]:
    """(number of jobs that are finished with, what became of them)."""
    found = Counts()
    for job in jobs:
        try:
            found += _convert(job, root, taxonomy, upright, guess)
        except (ValueError, OSError, Image.DecompressionBombError) as error:
            cause = str(error).replace(job.source, "").replace(str(job.image), "")
            found.errors.append((job.source, str(error), cause))
    return len(jobs) - len(found.left), found


def _check_size(job: MaskJob, mask: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
    if mask not in sizes:
        (height, width), *_ = sizes
        raise ValueError(
            f"{job.image} is {width}x{height} (width x height), its mask {mask[1]}x{mask[0]}"
        )


def _convert(
    job: MaskJob, root: Path, taxonomy: Taxonomy, upright: bool, guess: bool | None
) -> Counts:
    """``guess``: whether the mask is that of the upright image where sizes do not tell; None
    leaves such a job."""
    path, copy = (
        root / "SegmentationClass" / f"{job.name}.png",
        root / "JPEGImages" / f"{job.name}.png",
    )
    there = path.is_file()
    with Image.open(job.image) as image:
        stored, turn = (image.height, image.width), orientation(image) if upright else 1
        sizes = [stored, stored[::-1]] if turn >= 5 else [stored]
        if job.size and not there:  # before memory is taken: a file may claim any size
            _check_size(job, tuple(job.size()), sizes)
        mask = read_mask(path) if there else job.draw()
        _check_size(job, mask.shape, sizes)
        check_values(mask, taxonomy, job.source)
        told = sizes[-1] != stored
        if turn > 1 and not told and guess is None:
            return Counts(left=[job])
        copied = turn > 1 and (mask.shape == sizes[-1] if told else guess)
        dark = is_dark(image)
        if copied and not copy.is_file():
            turned = rgb(ImageOps.exif_transpose(image))
            write_atomic(copy, encode_image(np.asarray(turned), ".png"))
    if turn > 1 and not copied:
        copy.unlink(missing_ok=True)  # of an interrupted run that knew less of the set
    if not there:
        write_atomic(path, encode_mask(mask, taxonomy.palette))
    pixels = np.bincount(mask.ravel(), minlength=256)
    vote = told and mask.any()  # masks of nothing lie as we made them
    votes = np.array([vote and not copied, vote and copied], np.int64)
    lost = job.lost() if job.lost else 0
    return Counts((pixels > 0).astype(np.int64), pixels, votes, int(copied), lost, int(dark))
