"""Stage: your own images and classes as a data set in VOC layout, whose images stay where they lie."""

from functools import partial
from pathlib import Path

from dd import coco
from dd.annotations import LABELMAP, cvat_masks, label_studio_masks, labelmap_colours, read_by_labelmap
from dd.conversion import MaskJob, finished, keep_out, write_part
from dd.data.mask_values import Renamed
from dd.datasets import image_size, read_coloured_mask
from dd.folders import IMAGES, MASKS, Finder, bare, index, listed_splits, one_form, shared_splits
from dd.provenance import fingerprint, sha256, write_atomic
from dd.taxonomy import Taxonomy, taxonomy, taxonomy_yaml

LISTS = ("train", "val", "tune", "test")


def prepare_own(
    data_root, taxonomy_file, name: str, images=None, masks=None, coco_file=None, voc=None, mask_ending: str = "",
    split_files: dict | None = None, shares: dict[str, float] | None = None, seed: int = 0,
    mapping: dict[str, str] | None = None, crowds: bool = True, workers: int | None = None,
    cvat=None, label_studio=None, mask_beginning: str = "", image_ending: str = "", image_beginning: str = "",
) -> tuple[Path, list[str]]:  # fmt: skip
    """(``data_root/name``, notes), from ``images`` with ``masks`` (ids or the taxonomy's colours), a ``coco_file``, an export
    of CVAT ("Segmentation mask 1.1", zip or folder) or of Label Studio (JSON), or from a folder ``voc`` in VOC layout.

    Splits: ``split_files`` {split: file}, or ``shares`` {split: part} drawn by ``seed`` (default: val=0.2). ``mapping``
    {label or value of a mask: class}; ``crowds`` belongs to ``coco_file``. ``mask_ending``, ``mask_beginning`` and those of
    images: what the names of ``masks`` and ``images`` have more than each other. ValueError, FileNotFoundError or
    FileExistsError say what does not fit.
    """
    classes, root = taxonomy(taxonomy_file), Path(data_root) / name
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"name {name!r}: expected the name of a folder, without /")
    if voc is not None:
        cvat = voc if (Path(voc) / LABELMAP).is_file() else None  # which says what its colours mean
        images, masks = Path(voc) / "JPEGImages", Path(voc) / "SegmentationClass"
        lists = {s: Path(voc) / "ImageSets" / "Segmentation" / f"{s}.txt" for s in LISTS}
        split_files = split_files or (None if shares else {s: p for s, p in lists.items() if p.is_file()})
        masks = masks if cvat is None else None
    given = [source for source in (masks, coco_file, cvat, label_studio) if source is not None]
    if images is None or len(given) != 1:
        raise ValueError("give --images with one of --masks, --coco, --cvat and --label-studio, or --voc alone")
    if split_files and shares:
        raise ValueError("give either --split files or --share parts, not both")
    if masks is None and (mask_ending or mask_beginning or image_ending or image_beginning):
        raise ValueError("--mask-ending, --mask-beginning and those of images belong to --masks and --voc")
    if coco_file is None and not crowds:
        raise ValueError("--crowds belongs to --coco")
    keep_out(root, (images, masks, voc))
    found = index(images, IMAGES)
    if cvat is not None or label_studio is not None:
        read, path = (cvat_masks, cvat) if cvat is not None else (label_studio_masks, label_studio)
        drawn, notes, source = read(Path(path), found, classes, mapping)
        jobs = [MaskJob(n, found[n], d.where, d.draw, size=d.size) for n, d in sorted(drawn.items())]
    elif coco_file is None:
        ends = (mask_beginning, mask_ending, image_beginning, image_ending)
        jobs, notes, source = _masks(found, Path(masks), classes, ends, mapping)
    else:
        jobs, notes, source = _coco(found, Path(images), Path(coco_file), classes, mapping, crowds)
    notes, ids = [*found.notes, *notes], [job.name for job in jobs]
    if split_files:
        splits, more = listed_splits({k: Path(v) for k, v in split_files.items()}, ids)
        notes += more
    else:
        splits = shared_splits(shares or {"val": 0.2}, ids, seed)
    identity = {
        "taxonomy": fingerprint(taxonomy_yaml(classes)), "images": str(Path(images).resolve()), **source,
        "splits": {split: fingerprint(names) for split, names in splits.items()},
    }  # fmt: skip
    done = finished(root, "all", identity)
    if done is None:
        write_atomic(root / "taxonomy.yaml", taxonomy_yaml(classes))
        done = write_part(root, "all", identity, jobs, splits, [Path(images)], classes, workers, True, tuple(notes))
    return root, done["notes"]


def _masks(found: dict[str, Path], folder: Path, classes: Taxonomy, ends: tuple, mapping: dict[str, str] | None):
    """Jobs, notes and identity of a folder of masks. ``ends``: beginning and ending of masks' names, then of images'."""
    colours = labelmap_colours(folder.parent, classes, mapping)
    renamed = Renamed(mapping, classes) if mapping and colours is None else None
    read = (
        partial(read_coloured_mask, taxonomy=classes, renamed=renamed)
        if colours is None
        else partial(read_by_labelmap, colours=colours)
    )
    masks = index(folder, MASKS, ends[1], ends[0])
    notes, images = [*masks.notes], {n: bare(n, *ends[2:]) for n in found}
    if odd := [n for n, name in images.items() if name is None]:
        notes.append(f"{len(odd)} images are not called {ends[2]}*{ends[3]} and are left out, such as {odd[:3]}")
    images = {n: one_form(name) for n, name in images.items() if name is not None}
    masks = {one_form(name): file for name, file in masks.items()}
    files = {n: masks[name] for n, name in images.items() if name in masks}
    if not files:
        raise ValueError(
            f"no mask in {folder} has the stem of an image: images {list(images.values())[:3]}, masks {list(masks)[:3]} "
            "(--mask-ending _mask, --mask-beginning gt_, --image-ending and --image-beginning take a part off)"
        )
    notes += [
        f"{len(left)} {what} have no {other} of the same stem and are left out, such as {left[:3]}"
        for what, other, left in (
            ("images", "mask", [n for n in images if n not in files]),
            ("masks", "image", sorted(masks.keys() - set(images.values()))),
        )
        if left
    ]
    jobs = [MaskJob(n, found[n], str(f), partial(read, f), size=partial(image_size, f)) for n, f in files.items()]
    state = [(n, f.stat().st_size, f.stat().st_mtime_ns) for n, f in files.items()]
    identity = {"masks": str(folder.resolve()), "masks_state": fingerprint(state)}
    identity |= {"map": mapping} if mapping else {}
    identity |= {"labelmap": fingerprint(sorted([*c, str(v)] for c, v in colours.items()))} if colours else {}
    return jobs, notes, identity


def _coco(found: dict[str, Path], folder: Path, path: Path, classes: Taxonomy, mapping, crowds: bool):
    content = coco.read_coco(path)
    try:
        values = coco.category_values(content["categories"], classes, mapping)
        images, notes = coco.images_of(content, values, crowds)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    find = Finder(found)
    names = [find(image.file_name) or find.upload(image.file_name) for image in images]
    missing = [find.near(i.file_name) for i, name in zip(images, names, strict=True) if name is None]
    if missing or len(set(names)) != len(names):
        what = f"{len(missing)} of the {len(images)} images it lists are not in {folder}, such as {', '.join(missing[:5])}"
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
