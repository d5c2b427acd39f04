"""Stage: your own images and classes as a data set in VOC layout, whose images stay where they
lie."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dd.data import coco
from dd.data.annotations import (
    LABELMAP,
    cvat_masks,
    label_studio_masks,
    labelmap_colours,
    read_by_labelmap,
)
from dd.data.conversion import MaskJob, Part, finished, keep_out, write_part
from dd.data.datasets import image_size, read_coloured_mask
from dd.data.folders import (
    IMAGES,
    MASKS,
    Finder,
    bare,
    grown_splits,
    index,
    kept_splits,
    listed_splits,
    one_form,
    shared_splits,
)
from dd.data.mask_values import Renamed
from dd.store.names import folder_name
from dd.store.provenance import fingerprint, sha256, write_atomic
from dd.taxonomy import Taxonomy, taxonomy, taxonomy_yaml

LISTS = ("train", "val", "tune", "test")


def prepare_own(
    data_root: str | Path,
    taxonomy_file: str | Path,
    name: str,
    images: str | Path | None = None,
    masks: str | Path | None = None,
    coco_file: str | Path | Mapping[str, str | Path] | None = None,
    voc: str | Path | None = None,
    mask_ending: str = "",
    split_files: dict[str, Any] | None = None,
    shares: dict[str, float] | None = None,
    seed: int = 0,
    mapping: dict[str, str] | None = None,
    crowds: bool = True,
    workers: int | None = None,
    cvat: str | Path | None = None,
    label_studio: str | Path | None = None,
    mask_beginning: str = "",
    image_ending: str = "",
    image_beginning: str = "",
    brushes_only: bool = False,
    splits_of: str | Path | None = None,
) -> tuple[Path, list[str]]:
    """(``data_root/name``, notes), from ``images`` with ``masks`` (ids or the taxonomy's colours),
    a ``coco_file`` (or {split: file}), an export of CVAT ("Segmentation mask 1.1", zip or folder)
    or of Label Studio (JSON), or from a folder ``voc`` in VOC layout.

    Splits: ``split_files`` {split: file}, or ``shares`` {split: part} drawn by ``seed`` (default:
    val=0.2). ``mapping`` {label or value of a mask: class}; ``crowds`` belongs to ``coco_file``.
    ``mask_ending``, ``mask_beginning`` and those of images: what the names of ``masks`` and
    ``images`` have more than each other. ``splits_of``: the folder of an earlier, smaller set,
    whose images stay in their splits (:func:`dd.data.folders.grown_splits`). ValueError,
    FileNotFoundError or FileExistsError say what does not fit.
    """
    classes, root = taxonomy(taxonomy_file), Path(data_root) / folder_name(name, "name")
    if voc is not None:
        cvat = voc if (Path(voc) / LABELMAP).is_file() else None  # which says what its colours mean
        images, masks = Path(voc) / "JPEGImages", Path(voc) / "SegmentationClass"
        lists = {s: Path(voc) / "ImageSets" / "Segmentation" / f"{s}.txt" for s in LISTS}
        split_files = split_files or (
            None if shares else {s: p for s, p in lists.items() if p.is_file()}
        )
        masks = masks if cvat is None else None
    given = [source for source in (masks, coco_file, cvat, label_studio) if source is not None]
    if images is None or len(given) != 1:
        raise ValueError(
            "give --images with one of --masks, --coco, --cvat and --label-studio, or --voc alone"
        )
    if splits_of is not None and (split_files or Path(splits_of).resolve() == root.resolve()):
        raise ValueError(
            "--splits-of names another data set, whose images stay in their splits, and goes "
            "without --split"
        )
    if split_files and shares:
        raise ValueError("give either --split files or --share parts, not both")
    if masks is None and (mask_ending or mask_beginning or image_ending or image_beginning):
        raise ValueError(
            "--mask-ending, --mask-beginning and those of images belong to --masks and --voc"
        )
    if coco_file is None and not crowds:
        raise ValueError("--crowds belongs to --coco")
    if brushes_only and label_studio is None:
        raise ValueError("--brushes-only belongs to --label-studio")
    if (
        masks is not None
        and not (mask_ending or mask_beginning)
        and Path(images).resolve() == Path(masks).resolve()
    ):
        raise ValueError(
            f"images and masks are one folder, {images}: say what the names of masks have more "
            "(--mask-ending _mask or "
            "--mask-beginning gt_), or lay them apart"
        )
    keep_out(root, (images, masks, voc))
    found, splits = index(images, IMAGES), None
    if cvat is not None or label_studio is not None:
        studio = partial(label_studio_masks, brushes_only=brushes_only)
        read, path = (cvat_masks, cvat) if cvat is not None else (studio, label_studio)
        drawn, notes, source = read(Path(path), found, classes, mapping)
        jobs = [
            MaskJob(n, found[n], d.where, d.draw, size=d.size) for n, d in sorted(drawn.items())
        ]
    elif coco_file is None:
        ends = (mask_beginning, mask_ending, image_beginning, image_ending)
        jobs, notes, source = _masks(found, Path(masks), classes, ends, mapping)
    else:
        jobs, notes, source, splits = _cocos(
            found, Path(images), coco_file, classes, mapping, crowds
        )
    notes, ids = [*found.notes, *notes], [job.name for job in jobs]
    if splits and (split_files or shares):
        raise ValueError(
            "--coco SPLIT=FILE says what the splits are: give it without --split and --share"
        )
    if splits:
        pass
    elif split_files:
        splits, more = listed_splits({k: Path(v) for k, v in split_files.items()}, ids)
        notes += more
    elif splits_of is not None:
        splits, more = grown_splits(shares or {"val": 0.2}, ids, seed, kept_splits(splits_of))
        notes += more
    else:
        splits = shared_splits(shares or {"val": 0.2}, ids, seed)
    identity = {
        "taxonomy": fingerprint(taxonomy_yaml(classes)),
        "images": str(Path(images).resolve()),
        **source,
        "splits": {split: fingerprint(names) for split, names in splits.items()},
    }
    try:
        done = finished(root, "all", identity)
    except FileExistsError as error:
        if not (root / "settings_all.json").exists():
            raise
        raise FileExistsError(
            f"{error}\nWith more labelled images: --name {name}_{len(ids)} --splits-of {root} "
            "makes a set "
            "of its own in which those of this one stay in their splits"
        ) from None
    if done is None:
        write_atomic(root / "taxonomy.yaml", taxonomy_yaml(classes))
        done = write_part(
            Part(root, "all", identity, jobs, splits, [Path(images)], classes),
            workers,
            upright=True,
            notes=notes,
        )
    return root, done["notes"]


def _masks(
    found: dict[str, Path],
    folder: Path,
    classes: Taxonomy,
    ends: tuple,
    mapping: dict[str, str] | None,
) -> Found:
    """Jobs, notes and identity of a folder of masks. ``ends``: beginning and ending of masks'
    names, then of images'."""
    colours = labelmap_colours(folder.parent, classes, mapping)
    renamed = Renamed(mapping, classes) if mapping and colours is None else None
    read = (
        partial(read_coloured_mask, taxonomy=classes, renamed=renamed)
        if colours is None
        else partial(read_by_labelmap, colours=colours)
    )
    masks = index(folder, MASKS, ends[1], ends[0])
    theirs = set(masks.values())  # in one folder with the images
    images = {n: bare(n, *ends[2:]) for n, file in found.items() if file not in theirs}
    notes = [note for note in masks.notes if note not in found.notes]
    if odd := [n for n, name in images.items() if name is None]:
        notes.append(
            f"{len(odd)} images are not called {ends[2]}*{ends[3]} and are left out, such as "
            f"{odd[:3]}"
        )
    images = {n: one_form(name) for n, name in images.items() if name is not None}
    masks = {one_form(name): file for name, file in masks.items()}
    files = {n: masks[name] for n, name in images.items() if name in masks}
    if not files:
        raise ValueError(
            f"no mask in {folder} has the stem of an image: images {list(images.values())[:3]}, "
            f"masks {list(masks)[:3]} "
            "(--mask-ending _mask, --mask-beginning gt_, --image-ending and --image-beginning take "
            "a part off)"
        )
    notes += [
        f"{len(left)} {what} have no {other} of the same stem and are left out, such as {left[:3]}"
        for what, other, left in (
            ("images", "mask", [n for n in images if n not in files]),
            ("masks", "image", sorted(masks.keys() - set(images.values()))),
        )
        if left
    ]
    jobs = [
        MaskJob(n, found[n], str(f), partial(read, f), size=partial(image_size, f))
        for n, f in files.items()
    ]
    state = [(n, f.stat().st_size, f.stat().st_mtime_ns) for n, f in files.items()]
    identity = {"masks": str(folder.resolve()), "masks_state": fingerprint(state)}
    identity |= {"map": mapping} if mapping else {}
    identity |= (
        {"labelmap": fingerprint(sorted([*c, str(v)] for c, v in colours.items()))}
        if colours
        else {}
    )
    return jobs, notes, identity


def _cocos(
    found: dict[str, Path],
    folder: Path,
    given: str | Path | Mapping[str, str | Path],
    classes: Taxonomy,
    mapping: Mapping[str, str] | None,
    crowds: bool,
) -> Found:
    """Jobs, notes, identity and splits of one COCO file (no splits: None), or of ``given``
    {split: file}."""
    files = (
        {split: Path(path) for split, path in given.items()}
        if isinstance(given, dict)
        else {None: Path(given)}
    )
    contents = {split: coco.read_coco(path) for split, path in files.items()}
    names = {str(c["name"]) for content in contents.values() for c in content["categories"]}
    if strange := sorted((mapping or {}).keys() - names):
        shown = ", ".join(map(str, files.values()))
        raise ValueError(
            f"{shown}: map: category {strange[0]!r} is not in the file; allowed: "
            f"{', '.join(sorted(names))}"
        )
    jobs, notes, splits, images = [], [], {}, 0
    for split, path in files.items():
        more, told, number = _coco(found, folder, path, contents[split], classes, mapping, crowds)
        both = {job.name for job in jobs} & {job.name for job in more}
        if both:
            raise ValueError(
                f"{path} holds {len(both)} images of another split too, such as {sorted(both)[:5]}"
            )
        jobs, images, splits[split] = jobs + more, images + number, [job.name for job in more]
        notes += [f"{split}: {note}" if split else note for note in told]
    if unlisted := len(found) - images:
        where = " or ".join(path.name for path in files.values())
        notes.append(f"{unlisted} images in {folder} are not in {where}: left out")
    if crowds and any("crowd" in note for note in notes):
        notes.append(
            "some tools mark every brushed mask as a crowd: --crowds objects paints them as objects"
        )
    hashes = {split: sha256(path) for split, path in files.items()}
    identity = {
        "coco_sha256": hashes if isinstance(given, dict) else hashes[None],
        "map": mapping or {},
        "crowds": crowds,
    }
    return jobs, notes, identity, splits if isinstance(given, dict) else None


def _coco(
    found: dict[str, Path],
    folder: Path,
    path: Path,
    content: dict[str, Any],
    classes: Taxonomy,
    mapping: Mapping[str, str] | None,
    crowds: bool,
) -> tuple[list[MaskJob], list[str], int]:
    """(jobs of one COCO file, notes, number of its images)."""
    names = {str(c["name"]) for c in content["categories"]}
    mapping = {label: name for label, name in (mapping or {}).items() if label in names}
    try:
        values = coco.category_values(
            content["categories"], classes, mapping, coco.used_categories(content)
        )
        images, notes = coco.images_of(content, values, crowds)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    below = {
        n: f for n, f in found.items() if f.is_relative_to(path.parent)
    }  # as Roboflow lays each split out
    for pool in (below, found):
        find = Finder(pool)
        names = (
            [find(image.file_name) or find.upload(image.file_name) for image in images]
            if pool
            else [None]
        )
        if None not in names:
            break
    missing = [
        find.near(i.file_name) for i, name in zip(images, names, strict=True) if name is None
    ]
    if missing or len(set(names)) != len(names):
        what = (
            f"{len(missing)} of the {len(images)} images it lists are not in {folder}, such as "
            f"{', '.join(missing[:5])}"
        )
        raise ValueError(
            f"{path} does not match the images: {what if missing else 'it lists a file twice'}"
        )
    empty = sum(not i.shapes for i in images)
    notes += [f"{empty} images have no object: background"] if empty else []
    jobs = [
        MaskJob(
            n,
            found[n],
            f"{path.name}, {i.file_name}",
            partial(coco.draw, i),
            partial(coco.lost, i),
            partial(tuple, (i.height, i.width)),
        )
        for n, i in zip(names, images, strict=True)
    ]
    return jobs, notes, len(images)
