"""Stage: your own images and classes as a data set in VOC layout, whose images stay where they lie."""

from functools import partial
from pathlib import Path

from dd import coco
from dd.annotations import cvat_masks, label_studio_masks
from dd.conversion import MaskJob, finished, keep_out, write_part
from dd.datasets import read_coloured_mask
from dd.folders import (
    IMAGES,
    MASKS,
    Finder,
    grown_splits,
    index,
    kept_splits,
    listed_splits,
    shared_splits,
)
from dd.provenance import fingerprint, sha256, write_atomic
from dd.taxonomy import Taxonomy, taxonomy, taxonomy_yaml

LISTS = ("train", "val", "tune", "test")


def prepare_own(
    data_root, taxonomy_file, name: str, images=None, masks=None, coco_file=None, voc=None, mask_ending: str = "",
    split_files: dict | None = None, shares: dict[str, float] | None = None, seed: int = 0,
    mapping: dict[str, str] | None = None, crowds: bool = True, workers: int | None = None,
    cvat=None, label_studio=None, splits_of=None,
) -> tuple[Path, list[str]]:  # fmt: skip
    """(``data_root/name``, notes), from ``images`` with ``masks`` (ids or the taxonomy's colours), a ``coco_file``, an export
    of CVAT ("Segmentation mask 1.1", zip or folder) or of Label Studio (JSON), or from a folder ``voc`` in VOC layout.

    Splits: ``split_files`` {split: file}, or ``shares`` {split: part} drawn by ``seed`` (default: val=0.2). ``mapping``
    belongs to ``coco_file``, ``cvat`` and ``label_studio``, ``crowds`` to ``coco_file``. ``splits_of``: the folder of an
    earlier, smaller set, whose images stay in their splits (:func:`dd.folders.grown_splits`). ValueError, FileNotFoundError or
    FileExistsError say what does not fit.
    """
    classes, root = taxonomy(taxonomy_file), Path(data_root) / name
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"name {name!r}: expected the name of a folder, without /")
    if voc is not None:
        images, masks = Path(voc) / "JPEGImages", Path(voc) / "SegmentationClass"
        lists = {s: Path(voc) / "ImageSets" / "Segmentation" / f"{s}.txt" for s in LISTS}
        split_files = split_files or (None if shares else {s: p for s, p in lists.items() if p.is_file()})
    given = [source for source in (masks, coco_file, cvat, label_studio) if source is not None]
    if images is None or len(given) != 1:
        raise ValueError("give --images with one of --masks, --coco, --cvat and --label-studio, or --voc alone")
    if splits_of is not None and (split_files or Path(splits_of).resolve() == root.resolve()):
        raise ValueError("--splits-of names another data set, whose images stay in their splits, and goes without --split")
    if split_files and shares:
        raise ValueError("give either --split files or --share parts, not both")
    if masks is not None and (mapping or not crowds):
        raise ValueError("--map and --crowds belong to --coco: masks hold class ids or the taxonomy's colours")
    if coco_file is None and not crowds:
        raise ValueError("--crowds belongs to --coco")
    keep_out(root, (images, masks, voc))
    found = index(images, IMAGES)
    if cvat is not None or label_studio is not None:
        read, path = (cvat_masks, cvat) if cvat is not None else (label_studio_masks, label_studio)
        drawn, notes, source = read(Path(path), found, classes, mapping)
        jobs = [MaskJob(name, found[name], where, draw) for name, (where, draw) in sorted(drawn.items())]
    elif coco_file is None:
        jobs, notes, source = _masks(found, Path(masks), classes, mask_ending)
    else:
        jobs, notes, source = _coco(found, Path(images), Path(coco_file), classes, mapping, crowds)
    ids = [job.name for job in jobs]
    if split_files:
        splits, more = listed_splits({k: Path(v) for k, v in split_files.items()}, ids)
        notes += more
    elif splits_of is not None:
        splits, more = grown_splits(shares or {"val": 0.2}, ids, seed, kept_splits(splits_of))
        notes += more
    else:
        splits = shared_splits(shares or {"val": 0.2}, ids, seed)
    identity = {
        "taxonomy": fingerprint(taxonomy_yaml(classes)), "images": str(Path(images).resolve()), **source,
        "splits": {split: fingerprint(names) for split, names in splits.items()},
    }  # fmt: skip
    try:
        done = finished(root, "all", identity)
    except FileExistsError as error:
        if not (root / "settings_all.json").exists():
            raise
        raise FileExistsError(
            f"{error}\nWith more labelled images: --name {name}_{len(ids)} --splits-of {root} makes a set "
            "of its own in which those of this one stay in their splits"
        ) from None
    if done is None:
        write_atomic(root / "taxonomy.yaml", taxonomy_yaml(classes))
        done = write_part(root, "all", identity, jobs, splits, [Path(images)], classes, workers, True, tuple(notes))
    return root, done["notes"]


def _masks(found: dict[str, Path], folder: Path, classes: Taxonomy, ending: str):
    masks = index(folder, MASKS, ending)
    both = [name for name in found if name in masks]
    if not both:
        raise ValueError(
            f"no mask in {folder} has the stem of an image: images {list(found)[:3]}, masks {list(masks)[:3]} (--mask-ending "
            "_mask takes an ending off)"
        )
    notes = [
        f"{len(left)} {what} have no {other} of the same stem and are left out, such as {left[:3]}"
        for what, other, left in (
            ("images", "mask", [n for n in found if n not in masks]),
            ("masks", "image", [n for n in masks if n not in found]),
        )
        if left
    ]
    jobs = [MaskJob(n, found[n], str(masks[n]), partial(read_coloured_mask, masks[n], classes)) for n in both]
    state = [(n, masks[n].stat().st_size, masks[n].stat().st_mtime_ns) for n in both]
    return jobs, notes, {"masks": str(folder.resolve()), "masks_state": fingerprint(state)}


def _coco(found: dict[str, Path], folder: Path, path: Path, classes: Taxonomy, mapping, crowds: bool):
    content = coco.read_coco(path)
    try:
        values = coco.category_values(content["categories"], classes, mapping)
        images, notes = coco.images_of(content, values, crowds)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    find = Finder(found)
    names = [find(image.file_name) for image in images]
    missing = [i.file_name for i, name in zip(images, names, strict=True) if name is None]
    if missing or len(set(names)) != len(names):
        what = f"{len(missing)} of the {len(images)} images it lists are not in {folder}, such as {missing[:5]}"
        raise ValueError(f"{path} does not match the images: {what if missing else 'it lists a file twice'}")
    empty, unlisted = sum(not i.shapes for i in images), len(found) - len(names)
    notes += [f"{empty} images have no object: background"] if empty else []
    notes += [f"{unlisted} images in {folder} are not in {path.name}: left out"] if unlisted else []
    if crowds and any("crowd" in note for note in notes):
        notes.append("some tools mark every brushed mask as a crowd: --crowds objects paints them as objects")
    jobs = [
        MaskJob(n, found[n], f"{path.name}, {i.file_name}", partial(coco.draw, i), partial(coco.lost, i))
        for n, i in zip(names, images, strict=True)
    ]
    return jobs, notes, {"coco_sha256": sha256(path), "map": mapping or {}, "crowds": crowds}
