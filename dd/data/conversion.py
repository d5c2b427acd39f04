"""Writes masks of any source as a prepared data set, in parallel and resumable; images stay where
they are."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

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

CHUNK = 64  # masks between progress updates; fewer masks are made without further processes


@dataclass(frozen=True)
class MaskJob:
    """A mask to write: its id, its image's file, the file it comes from (for messages), and the
    function that reads or draws it."""

    name: str
    image: Path
    source: str
    draw: Callable[[], np.ndarray]
    lost: Callable[[], int] | None = None  # number of its annotations that cover no pixel
    size: Callable[[], tuple[int, int]] | None = None  # (height, width), known before drawing


@dataclass(frozen=True)
class Part:
    """A part (a split or all) of a prepared data set to be made.

    ``identity``: what it is made from. ``splits``: {name of a list: ids}. ``images``: the folders
    that hold the images. Folders below ``root``'s parent are recorded relative to ``root``, so that
    the whole can be moved.
    """

    root: Path
    name: str
    identity: Mapping[str, Any]
    jobs: list[MaskJob]
    splits: Mapping[str, list[str]]
    images: Iterable[Path]
    taxonomy: Taxonomy

    @property
    def settings(self) -> Path:
        return self.root / f"settings_{self.name}.json"


def keep_out(root: str | Path, folders: Iterable[str | Path | None]) -> None:
    """FileExistsError if ``root`` is inside one of ``folders``, which must not be written to."""
    for folder in folders:
        if folder is not None and Path(root).resolve().is_relative_to(Path(folder).resolve()):
            raise FileExistsError(
                f"{root} lies in {folder}, which holds other data and is not written to: "
                "choose another --root"
            )


# Parts of COCO, of augmented VOC, of own data: never mixed in one folder.
KINDS = ({"train", "val"}, {"train_aug"}, {"all"})


def finished(
    root: str | Path, part: str, identity: Mapping[str, Any], images: tuple[Path, ...] = ()
) -> dict[str, Any] | None:
    """The record of a finished part, or None. FileExistsError if it was made from something else,
    or if the folder holds other data.

    ``images``: the current folders of the images; they replace recorded folders that are gone.
    """
    root = Path(root)
    if root.is_dir() and any(root.iterdir()) and not any(root.glob("settings_*.json")):
        raise FileExistsError(
            f"{root} holds other data and is not written to: "
            "move it, or prepare below another --root"
        )
    record = _record(root)
    strangers = record["parts"].keys() - next(kind for kind in KINDS if part in kind)
    if strangers:
        raise FileExistsError(
            f"{root} is another data set (it holds {', '.join(sorted(strangers))}). "
            "Choose another --name or --root"
        )
    if part in record["parts"]:
        refuse_other(root / f"settings_{part}.json", identity, "data set")
        there = [f for f in record["images"] if (root / f).is_dir()]
        if images and len(there) < len(record["images"]):
            write_json(root / RECORD, record | {"images": _with(there, images, root)})
    return record["parts"].get(part)


def _record(root: Path) -> dict[str, Any]:
    """dataset.json of a prepared data set; it may be empty so far."""
    path = root / RECORD
    return read_own(path, PARTS) if path.is_file() else {"images": [], "parts": {}}


def _with(recorded: list[str], images: Iterable[Path], root: Path) -> list[str]:
    """The recorded folders of images, and ``images``."""
    return list(dict.fromkeys([*recorded, *(_relative(folder, root) for folder in images)]))


def write_part(
    part: Part,
    workers: int | None = None,
    upright: bool = False,
    notes: Iterable[str] = (),
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write masks, split lists and, last, the record of a part; returns its record. ``workers`` and
    ``upright``: see :func:`convert`; ``more``: further entries of the record.

    An interrupted part resumes where it stopped, or starts again if its source has changed.
    """
    root, names = part.root, part.taxonomy.names
    _forget_other(part)
    write_json(part.settings, {"identity": part.identity})
    counts = convert(part.jobs, root, part.taxonomy, workers, upright)
    for split, ids in part.splits.items():
        write_split(root, split, ids)
    absent = [name for name in names if not counts["classes"][name]["images"]]
    if part.jobs and len(absent) == len(names):
        ignored = "0 (background) and 255 (ignored)" if counts["ignored_pixels"] else "background"
        raise ValueError(
            f"no class of taxonomy {part.taxonomy.name!r} occurs in the {len(part.jobs)} masks: "
            f"they hold {ignored} alone. "
            "If an object is written as 255 (black and white masks): --map 255=CLASS; "
            "if all objects of a COCO file are marked as crowds: --crowds objects; "
            "else nothing is labelled in them"
        )
    found = {
        "identity": part.identity,
        "splits": {k: len(v) for k, v in part.splits.items()},
        **counts,
        **(more or {}),
        "notes": [*notes, *_notes(counts, absent, root)],
    }
    record = _record(root)
    record["images"] = _with(record["images"], part.images, root)
    record["taxonomy"] = {"name": part.taxonomy.name, "names": list(names)}
    record["parts"][part.name] = found
    write_json(root / RECORD, record)
    return found


def _forget_other(part: Part) -> None:
    """Remove what an interrupted command made from another source."""
    settings = part.settings
    if settings.exists() and read_own(settings, IDENTIFIED)["identity"] != part.identity:
        for job in part.jobs:
            for folder in ("SegmentationClass", "JPEGImages"):
                (part.root / folder / f"{job.name}.png").unlink(missing_ok=True)


def _notes(counts: Mapping[str, Any], absent: list[str], root: Path) -> list[str]:
    """Messages about the masks that were made; ``absent``: classes in none of them."""
    listed = ", ".join(absent[:10]) + ", ..." * (len(absent) > 10)
    lost, undecided, upright = counts["lost"], counts["undecided"], counts["upright"]
    notes = (
        (len(absent), f"{len(absent)} classes are in no mask: {listed}"),
        (lost, f"{lost} annotations cover no pixel (no area, or outside the image): left out"),
        (undecided, _told_by_the_others(undecided, *counts["votes"])),
        (counts["dark"], dark_note(counts["dark"])),
        (
            upright,
            f"{upright} images carry an EXIF rotation: upright copies lie in {root / 'JPEGImages'}",
        ),
    )
    return [note for number, note in notes if number]


def _told_by_the_others(number: int, stored: int, upright: int) -> str:
    what = (
        f"{number} images carry an EXIF rotation, "
        "and their size does not tell whether the mask is turned"
    )
    if stored and upright:
        return (
            f"{what}: taken as upright, "
            f"but {stored} others are of stored pixels, {upright} upright: look at them"
        )
    if stored or upright:
        how = "of stored pixels" if stored else "upright"
        return f"{what}: taken as {how}, like the {stored or upright} masks whose size tells"
    return (
        f"{what}, nor does any other of the set: taken as upright, as tools show them; look at some"
    )


def _relative(folder: Path, root: Path) -> str:
    folder, root = Path(folder).resolve(), root.resolve()
    return os.path.relpath(folder, root) if folder.is_relative_to(root.parent) else str(folder)


@dataclass
class Counts:
    """Statistics of some masks. ``images``, ``pixels`` [256]: with each value; ``votes``: number of
    masks that by their size belong to (stored, upright) pixels; ``left``: jobs of turned images
    whose sizes do not tell."""

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
) -> dict[str, Any]:
    """Write ``root/SegmentationClass/<id>.png`` of every job that has none yet; count images and
    pixels of each class.

    ``workers`` processes (None = one for each core, at most 8). ``upright``: an image with an EXIF
    rotation gets an upright copy in ``root/JPEGImages`` if its mask fits the upright image. Where
    sizes do not tell (square, mirrored, upside down) the image follows those of the set whose sizes
    do; it is turned upright if these disagree or there are none. ValueError lists the masks that
    could not be made, after all others were made.
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


Work = Callable[[list[MaskJob]], tuple[int, Counts]]


def _each(
    work: Work, jobs: list[MaskJob], workers: int, advance: Callable[[int], object]
) -> Counts:
    chunks = [jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)]
    found, alone = Counts(), workers < 2 or len(chunks) < 2
    for number, done in map(work, chunks) if alone else _parallel(work, chunks, workers):
        found += done
        advance(number)
    return found


def _told_once(errors: list[tuple[str, str, str]]) -> list[str]:
    """Lines for (source, what is wrong, the same without file names): each cause once, with its
    first file."""
    causes = defaultdict(list)
    for source, text, cause in sorted(errors):
        causes[cause].append(text if source in text else f"{source}: {text}")
    return [
        lines[0] + (f" (and {len(lines) - 1} more for this reason)" if lines[1:] else "")
        for lines in causes.values()
    ]


def _parallel(
    work: Work, chunks: list[list[MaskJob]], workers: int
) -> Iterator[tuple[int, Counts]]:
    """Results of ``work`` on the chunks, as they arrive from spawned processes."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(work, chunk) for chunk in chunks]):
            yield future.result()
    except BrokenProcessPool:
        raise OSError(
            "a worker process died (memory?); the finished masks are kept. "
            "Run the command again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _convert_chunk(
    jobs: list[MaskJob], root: Path, taxonomy: Taxonomy, upright: bool, guess: bool | None
) -> tuple[int, Counts]:
    """(number of finished jobs, their statistics)."""
    found = Counts()
    for job in jobs:
        try:
            found += _convert(job, root, taxonomy, upright, guess)
        except (ValueError, OSError, Image.DecompressionBombError) as error:
            cause = str(error).replace(job.source, "").replace(str(job.image), "")
            found.errors.append((job.source, str(error), cause))
    return len(jobs) - len(found.left), found


def _check_size(job: MaskJob, mask: tuple[int, ...], sizes: list[tuple[int, int]]) -> None:
    if mask not in sizes:
        (height, width), *_ = sizes
        raise ValueError(
            f"{job.image} is {width}x{height} (width x height), its mask {mask[1]}x{mask[0]}"
        )


def _convert(
    job: MaskJob, root: Path, taxonomy: Taxonomy, upright: bool, guess: bool | None
) -> Counts:
    """``guess``: whether the mask fits the upright image where sizes do not tell; None leaves such
    a job for later."""
    path = root / "SegmentationClass" / f"{job.name}.png"
    copy = root / "JPEGImages" / f"{job.name}.png"
    there = path.is_file()
    with Image.open(job.image) as image:
        turn = orientation(image) if upright else 1
        sizes = _sizes(image, turn)
        mask = read_mask(path) if there else _drawn(job, sizes)
        _check_size(job, mask.shape, sizes)
        check_values(mask, taxonomy, job.source)
        told = sizes[-1] != sizes[0]
        if turn > 1 and not told and guess is None:
            return Counts(left=[job])
        copied = turn > 1 and bool(mask.shape == sizes[-1] if told else guess)
        dark = is_dark(image)
        if turn > 1:
            _write_copy(copy, image if copied else None)
    if not there:
        write_atomic(path, encode_mask(mask, taxonomy.palette))
    pixels = np.bincount(mask.ravel(), minlength=256)
    vote = told and mask.any()  # an empty mask proves nothing
    votes = np.array([vote and not copied, vote and copied], np.int64)
    lost = job.lost() if job.lost else 0
    return Counts((pixels > 0).astype(np.int64), pixels, votes, int(copied), lost, int(dark))


def _sizes(image: Image.Image, turn: int) -> list[tuple[int, int]]:
    """(height, width) of a mask of stored pixels and, if the sides change places, of an upright
    one."""
    stored = (image.height, image.width)
    return [stored, stored[::-1]] if turn >= 5 else [stored]


def _drawn(job: MaskJob, sizes: list[tuple[int, int]]) -> np.ndarray:
    """The mask, which must have one of the ``sizes``. This is checked before memory is taken,
    because a file may claim any size."""
    if job.size:
        _check_size(job, tuple(job.size()), sizes)
    return job.draw()


def _write_copy(path: Path, image: Image.Image | None) -> None:
    """Write the upright copy of an image, unless it is there. None: remove the copy of an
    interrupted run, which had seen less of the set."""
    if image is None:
        path.unlink(missing_ok=True)
    elif not path.is_file():
        write_atomic(path, encode_image(np.asarray(rgb(ImageOps.exif_transpose(image))), ".png"))
