"""Stage: your own images and classes as a data set in VOC layout, whose images stay where they
lie."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dd.data import coco_json as coco
from dd.data.annotations import (
    LABELMAP,
    cvat_masks,
    label_studio_masks,
    labelmap_colours,
    read_by_labelmap,
)
from dd.data.conversion import MaskJob, Part, finished, keep_out, write_part
from dd.data.datasets import image_size, read_coloured_mask, rgb
from dd.data.folders import (
    IMAGES,
    MASKS,
    Files,
    Finder,
    bare,
    check_kept,
    grown_splits,
    index,
    kept_splits,
    listed_splits,
    one_form,
    shared_splits,
)
from dd.data.groups import Groups, grouped_splits, groups_of
from dd.data.mask_values import Renamed
from dd.evaluation.uncertainty import look, near_pairs
from dd.store.names import folder_name
from dd.store.provenance import fingerprint, sha256, write_atomic
from dd.taxonomy import Taxonomy, taxonomy, taxonomy_yaml

LISTS = ("train", "val", "tune", "test")
TWINS = 3  # of 64 bits of two looks that differ: as a frame of a video and the next
LOOKED_AT = 256  # pixels
SIZE = attrgetter(*coco.SIDES)


@dataclass(frozen=True)
class OwnData:
    """What is labelled, and how: ``images`` with ``masks`` (ids or the taxonomy's colours), a
    ``coco_file`` (or {split: file}), an export of CVAT ("Segmentation mask 1.1", zip or folder) or
    of Label Studio (JSON); or a folder ``voc`` in VOC layout.

    ``mask_ending``, ``mask_beginning`` and those of images: what the names of ``masks`` and
    ``images`` have more than each other. ``mapping`` {label or value of a mask: class}; ``crowds``
    belongs to ``coco_file``, ``brushes_only`` to ``label_studio``. Splits: ``split_files`` {split:
    file}, or ``shares`` {split: part} drawn by ``seed`` (default: val=0.2), whole groups with
    ``group`` (:func:`dd.data.groups.groups_of`). ``splits_of``: the folder of an earlier, smaller
    set, whose images stay in their splits (:func:`dd.data.folders.grown_splits`).
    """

    images: str | Path | None = None
    masks: str | Path | None = None
    coco_file: str | Path | Mapping[str, str | Path] | None = None
    cvat: str | Path | None = None
    label_studio: str | Path | None = None
    voc: str | Path | None = None
    mask_ending: str = ""
    mask_beginning: str = ""
    image_ending: str = ""
    image_beginning: str = ""
    mapping: Mapping[str, str] | None = None
    crowds: bool = True
    brushes_only: bool = False
    split_files: Mapping[str, str | Path] | None = None
    shares: Mapping[str, float] | None = None
    seed: int = 0
    splits_of: str | Path | None = None
    group: str | None = None


class Labelled(NamedTuple):
    """What was found: a job for each mask, what is to be said of them, what they are made from,
    and their splits where the source has its own."""

    jobs: list[MaskJob]
    notes: list[str]
    identity: dict[str, Any]
    splits: dict[str, list[str]] | None = None


def prepare_own(
    data_root: str | Path,
    taxonomy_file: str | Path,
    name: str,
    data: OwnData,
    workers: int | None = None,
) -> tuple[Path, list[str]]:
    """(``data_root/name``, notes). ValueError, FileNotFoundError or FileExistsError say what does
    not fit."""
    classes, root = taxonomy(taxonomy_file), Path(data_root) / folder_name(name, "name")
    data = data if data.voc is None else _in_voc_layout(data, Path(data.voc))
    images = _checked(data, root)
    keep_out(root, (images, data.masks, data.voc))
    found = index(images, IMAGES)
    jobs, notes, source, own_splits = _labelled(data, found, images, classes)
    ids = [job.name for job in jobs]
    groups = None if data.group is None else groups_of(ids, data.group)
    splits, more = _splits(data, own_splits, ids, groups)
    identity = {
        "taxonomy": fingerprint(taxonomy_yaml(classes)),
        "images": str(images.resolve()),
        **source,
        "splits": {split: fingerprint(names) for split, names in splits.items()},
        **({} if groups is None else {"group": groups.by}),
    }
    try:
        done = finished(root, "all", identity)
    except FileExistsError as error:
        if not (root / "settings_all.json").exists():
            raise
        raise FileExistsError(
            f"{error}\nWith more labelled images: --name {name}_{len(ids)} --splits-of {root} "
            "makes a set of its own in which those of this one stay in their splits"
        ) from None
    if done is None:
        write_atomic(root / "taxonomy.yaml", taxonomy_yaml(classes))
        part, notes = Part(root, "all", identity, jobs, splits, [images], classes), notes + more
        notes += near_twins({job.name: job.image for job in jobs}, splits, workers)
        told = {} if groups is None else {"groups": groups.told(splits)}
        notes = [*found.notes, *notes]
        done = write_part(part, workers, upright=True, notes=notes, more=told)
    return root, done["notes"]


def _in_voc_layout(data: OwnData, voc: Path) -> OwnData:
    """The images, masks and lists of a folder in VOC layout."""
    lists = {s: voc / "ImageSets" / "Segmentation" / f"{s}.txt" for s in LISTS}
    listed = None if data.shares else {s: p for s, p in lists.items() if p.is_file()}
    found = replace(data, images=voc / "JPEGImages", split_files=data.split_files or listed)
    if (voc / LABELMAP).is_file():  # which says what the colours of its masks mean
        return replace(found, masks=None, cvat=voc)
    return replace(found, masks=voc / "SegmentationClass", cvat=None)


def _checked(data: OwnData, root: Path) -> Path:
    """The folder of the images. ValueError for what does not go together."""
    sources = (data.masks, data.coco_file, data.cvat, data.label_studio)
    if data.images is None or sum(source is not None for source in sources) != 1:
        raise ValueError(
            "give --images with one of --masks, --coco, --cvat and --label-studio, or --voc alone"
        )
    images, mask_ends = Path(data.images), data.mask_beginning + data.mask_ending
    grown = data.splits_of is not None
    is_root = data.splits_of is not None and Path(data.splits_of).resolve() == root.resolve()
    together = data.masks is not None and images.resolve() == Path(data.masks).resolve()
    ends = mask_ends + data.image_beginning + data.image_ending
    for wrong, why in (
        (
            (grown and data.split_files) or is_root,
            "--splits-of names another data set, whose images stay in their splits, and goes "
            "without --split",
        ),
        (
            data.split_files and data.shares,
            "give either --split files or --share parts, not both",
        ),
        (
            data.masks is None and ends,
            "--mask-ending, --mask-beginning and those of images belong to --masks and --voc",
        ),
        (
            data.split_files and data.group is not None,
            "--group says how images are shared out (--share), and goes without --split",
        ),
        (data.coco_file is None and not data.crowds, "--crowds belongs to --coco"),
        (
            data.brushes_only and data.label_studio is None,
            "--brushes-only belongs to --label-studio",
        ),
        (
            together and not mask_ends,
            f"images and masks are one folder, {images}: say what the names of masks have more "
            "(--mask-ending _mask or --mask-beginning gt_), or lay them apart",
        ),
    ):
        if wrong:
            raise ValueError(why)
    return images


def _labelled(data: OwnData, found: Files, images: Path, classes: Taxonomy) -> Labelled:
    """What the one source of ``data`` holds."""
    if data.coco_file is not None:
        return _cocos(found, images, data.coco_file, classes, data)
    if data.masks is not None:
        return _masks(found, Path(data.masks), classes, data)
    if data.cvat is not None:
        drawn, notes, source = cvat_masks(Path(data.cvat), found, classes, data.mapping)
    else:
        path, brushes = Path(str(data.label_studio)), data.brushes_only
        drawn, notes, source = label_studio_masks(path, found, classes, data.mapping, brushes)
    jobs = [MaskJob(n, found[n], d.where, d.draw, size=d.size) for n, d in sorted(drawn.items())]
    return Labelled(jobs, notes, source)


def _splits(
    data: OwnData, own: dict[str, list[str]] | None, ids: list[str], groups: Groups | None
) -> tuple[dict[str, list[str]], list[str]]:
    """(splits of the images ``ids``, notes); ``own``: those that the source itself tells."""
    if own and (data.split_files or data.shares or groups):
        raise ValueError(
            "--coco SPLIT=FILE says what the splits are: give it without --split and --share, and "
            "without --group"
        )
    if own:
        return own, []
    if data.split_files:
        return listed_splits({k: Path(v) for k, v in data.split_files.items()}, ids)
    shares = dict(data.shares or {"val": 0.2})
    if groups is not None:
        kept = None if data.splits_of is None else kept_splits(data.splits_of)
        if kept is not None:
            check_kept(shares, kept)
        return grouped_splits(shares, groups, data.seed, kept)
    if data.splits_of is not None:
        return grown_splits(shares, ids, data.seed, kept_splits(data.splits_of))
    return shared_splits(shares, ids, data.seed), []


def near_twins(
    images: Mapping[str, Path], splits: Mapping[str, Iterable[str]], workers: int | None = None
) -> list[str]:
    """A note about images of two splits that look alike (:func:`dd.evaluation.uncertainty.look`),
    none where there are none. A file that cannot be read has no look: its mask says so."""
    owner = {name: split for split, names in splits.items() for name in names}
    looks = _looks({name: images[name] for name in owner}, workers)
    pairs = [(a, b) for a, b in near_pairs(looks, TWINS) if owner[a] != owner[b]]
    if not pairs:
        return []
    shown = "; ".join(f"{a} ({owner[a]}) and {b} ({owner[b]})" for a, b in pairs[:3])
    number = len({name for pair in pairs for name in pair})
    return [
        f"{number} images look like one of another split ({len(pairs)} pairs), such as {shown}: a "
        "score on images like those trained on is too good. --group keeps a camera, part, day or "
        "folder in one split"
    ]


def _looks(images: Mapping[str, Path], workers: int | None) -> dict[str, int]:
    names, chunk = list(images), 64
    parts = [[images[n] for n in names[i : i + chunk]] for i in range(0, len(names), chunk)]
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    if workers < 2 or len(parts) < 2:
        found = list(map(_looks_of, parts))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(_looks_of, parts))
    each = [seen for part in found for seen in part]
    return {name: seen for name, seen in zip(names, each, strict=True) if seen is not None}


def _looks_of(files: list[Path]) -> list[int | None]:
    return [_look(file) for file in files]


def _look(file: Path) -> int | None:
    try:
        with Image.open(file) as image:
            image.draft("RGB", (LOOKED_AT, LOOKED_AT))  # a JPEG is not decoded at full size
            small = rgb(image)
            return look(np.asarray(small.reduce(max(1, min(small.size) // LOOKED_AT))))
    except (ValueError, OSError, Image.DecompressionBombError):
        return None


def _masks(found: Files, folder: Path, classes: Taxonomy, data: OwnData) -> Labelled:
    """Of a folder of masks."""
    colours, mapping = labelmap_colours(folder.parent, classes, data.mapping), data.mapping
    read: Callable[[Path], np.ndarray] = partial(
        read_coloured_mask,
        taxonomy=classes,
        renamed=Renamed(mapping, classes) if mapping and colours is None else None,
    )
    if colours is not None:
        read = partial(read_by_labelmap, colours=colours)
    indexed = index(folder, MASKS, data.mask_ending, data.mask_beginning)
    theirs = set(indexed.values())  # in one folder with the images
    ends = (data.image_beginning, data.image_ending)
    bared = {n: bare(n, *ends) for n, file in found.items() if file not in theirs}
    notes = [note for note in indexed.notes if note not in found.notes]
    if odd := [n for n, name in bared.items() if name is None]:
        notes.append(
            f"{len(odd)} images are not called {'*'.join(ends)} and are left out, such as {odd[:3]}"
        )
    images = {n: one_form(name) for n, name in bared.items() if name is not None}
    masks = {one_form(name): file for name, file in indexed.items()}
    files = {n: masks[name] for n, name in images.items() if name in masks}
    if not files:
        raise ValueError(
            f"no mask in {folder} has the stem of an image: images {list(images.values())[:3]}, "
            f"masks {list(masks)[:3]} (--mask-ending _mask, --mask-beginning gt_, --image-ending "
            "and --image-beginning take a part off)"
        )
    alone = [n for n in images if n not in files], sorted(masks.keys() - set(images.values()))
    notes += [
        f"{len(left)} {what} have no {other} of the same stem and are left out, such as {left[:3]}"
        for what, other, left in zip(("images", "masks"), ("mask", "image"), alone, strict=True)
        if left
    ]
    jobs = [
        MaskJob(n, found[n], str(f), partial(read, f), size=partial(image_size, f))
        for n, f in files.items()
    ]
    state = [(n, f.stat().st_size, f.stat().st_mtime_ns) for n, f in files.items()]
    identity: dict[str, Any] = {"masks": str(folder.resolve()), "masks_state": fingerprint(state)}
    identity |= {"map": mapping} if mapping else {}
    if colours:
        identity["labelmap"] = fingerprint(sorted([*c, str(v)] for c, v in colours.items()))
    return Labelled(jobs, notes, identity)


def _cocos(
    found: Files,
    folder: Path,
    given: str | Path | Mapping[str, str | Path],
    classes: Taxonomy,
    data: OwnData,
) -> Labelled:
    """Of one COCO file, which has no splits, or of ``given`` {split: file}."""
    several, mapping = isinstance(given, Mapping), data.mapping or {}
    files = {k: Path(v) for k, v in (given if isinstance(given, Mapping) else {"": given}).items()}
    contents = {split: coco.read_coco(path) for split, path in files.items()}
    names = {str(c["name"]) for content in contents.values() for c in content["categories"]}
    if strange := sorted(mapping.keys() - names):
        shown = ", ".join(map(str, files.values()))
        raise ValueError(
            f"{shown}: map: category {strange[0]!r} is not in the file; allowed: "
            f"{', '.join(sorted(names))}"
        )
    jobs: list[MaskJob] = []
    splits: dict[str, list[str]] = {}
    notes, images = [], 0
    for split, path in files.items():
        more, told, number = _coco(found, folder, path, contents[split], classes, data)
        splits[split] = [job.name for job in more]
        if both := sorted({job.name for job in jobs} & set(splits[split])):
            raise ValueError(
                f"{path} holds {len(both)} images of another split too, such as {both[:5]}"
            )
        jobs, images = jobs + more, images + number
        notes += [f"{split}: {note}" if split else note for note in told]
    if unlisted := len(found) - images:
        where = " or ".join(path.name for path in files.values())
        notes.append(f"{unlisted} images in {folder} are not in {where}: left out")
    if data.crowds and any("crowd" in note for note in notes):
        notes.append(
            "some tools mark every brushed mask as a crowd: --crowds objects paints them as objects"
        )
    hashes = {split: sha256(path) for split, path in files.items()}
    source = hashes if several else hashes[""]
    identity = {"coco_sha256": source, "map": mapping, "crowds": data.crowds}
    return Labelled(jobs, notes, identity, splits if several else None)


def _coco(
    found: Files,
    folder: Path,
    path: Path,
    content: dict[str, Any],
    classes: Taxonomy,
    data: OwnData,
) -> tuple[list[MaskJob], list[str], int]:
    """(jobs of one COCO file, notes, number of its images)."""
    labels, categories = {str(c["name"]) for c in content["categories"]}, content["categories"]
    mapping = {label: name for label, name in (data.mapping or {}).items() if label in labels}
    try:
        used = coco.used_categories(content)
        values = coco.category_values(categories, classes, mapping, used)
        images, notes = coco.images_of(content, values, data.crowds)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names = _files_of(images, found, folder, path)
    empty = sum(not i.shapes for i in images)
    notes += [f"{empty} images have no object: background"] if empty else []
    jobs = [
        MaskJob(
            n,
            found[n],
            f"{path.name}, {i.file_name}",
            partial(coco.draw, i),
            partial(coco.lost, i),
            partial(SIZE, i),
        )
        for n, i in zip(names, images, strict=True)
    ]
    return jobs, notes, len(images)


def _files_of(images: list[coco.CocoImage], found: Files, folder: Path, path: Path) -> list[str]:
    """The name in ``found`` of each image of the COCO file ``path``: of the files below it where
    all are there, as Roboflow lays each split out. ValueError for an image without a file."""
    below = {n: f for n, f in found.items() if f.is_relative_to(path.parent)}
    for pool in (below, found):
        find = Finder(pool)
        each = [find(image.file_name) or find.upload(image.file_name) for image in images]
        if None not in each:
            break
    names = [name for name in each if name is not None]
    missing = [find.near(i.file_name) for i, n in zip(images, each, strict=True) if n is None]
    what = f"{len(missing)} of the {len(images)} images it lists are not in {folder}, such as "
    if missing:
        raise ValueError(f"{path} does not match the images: {what}{', '.join(missing[:5])}")
    if len(set(names)) != len(names):
        raise ValueError(f"{path} does not match the images: it lists a file twice")
    return names
