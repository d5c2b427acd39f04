"""Stages: PASCAL VOC 2012 and its SBD augmentation, downloaded or used in place."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from dd.data.conversion import MaskJob, Part, finished, keep_out, write_part
from dd.data.datasets import read_mask, read_split
from dd.data.sbd_masks import read_sbd_mask
from dd.store.downloads import GB, Archive, obtain
from dd.store.provenance import fingerprint, read_text
from dd.taxonomy import taxonomy

# Checksums as published with torchvision's VOCSegmentation and SBDataset.
ARCHIVES = {
    "trainval": Archive(
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "md5:6cd6e144f989b92b3379bac3b3de84fd",
        4 * GB,
    ),
    "sbd": Archive(
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/"
        "grouping/semantic_contours/benchmark.tgz",
        "md5:82b4d87ceb2ed10f6038a1cba92111cb",
        8 * GB,
    ),
}
EXPECTED = {"train": 1464, "val": 1449, "trainval": 2913, "train_aug": 10582}


def prepare_voc(
    data_root: str | Path = "data",
    archives: dict[str, Archive] | None = None,
    existing: str | Path | None = None,
) -> tuple[Path, list[str]]:
    """(folder of VOC 2012, notes): ``existing`` or ``data_root/VOCdevkit/VOC2012``, downloaded if
    it is missing.

    Nothing is written into an existing folder. FileNotFoundError lists what an incomplete copy
    lacks.
    """
    root = Path(existing or Path(data_root) / "VOCdevkit" / "VOC2012")
    if existing is None and not root.is_dir():
        obtain((archives or ARCHIVES)["trainval"], Path(data_root) / "downloads", root, "VOC2012")
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: --existing is the folder VOC2012 itself")
    splits = {s: read_split(root, s) for s in ("train", "val", "trainval") if _listed(root, s)}
    if not {"train", "val"} <= splits.keys():
        raise FileNotFoundError(
            f"{root} has no ImageSets/Segmentation/train.txt and val.txt: give the folder that "
            "holds them"
        )
    files = [
        root / "JPEGImages" / f"{i}.jpg" for i in {i: None for ids in splits.values() for i in ids}
    ]
    _complete(root, [*files, *(root / "SegmentationClass" / f"{f.stem}.png" for f in files)])
    return root, _counts({split: len(ids) for split, ids in splits.items()})


def prepare_voc_aug(
    data_root: str | Path = "data",
    archives: dict[str, Archive] | None = None,
    existing: str | Path | None = None,
    sbd: str | Path | None = None,
    workers: int | None = None,
) -> tuple[Path, list[str]]:
    """(``data_root/voc_aug``, notes): VOC 2012 with ``train_aug`` = (VOC train ∪ SBD train and val)
    minus VOC val.

    VOC's own masks are kept for its images, SBD's are converted to palette PNGs; images are read
    from the VOC folder. ``sbd``: an existing folder with cls/, train.txt and val.txt.
    """
    archives = archives or ARCHIVES
    keep_out(Path(data_root) / "voc_aug", (existing, sbd))
    voc, notes = prepare_voc(data_root, archives, existing)
    source = Path(sbd or Path(data_root) / "SBD")
    if sbd is None and not source.is_dir():
        obtain(archives["sbd"], Path(data_root) / "downloads", source, "dataset")
    lists = {name: source / f"{name}.txt" for name in ("train", "val")}
    _complete(source, lists.values())
    extra = sorted({Path(i).name for path in lists.values() for i in read_text(path).split()})
    splits = {s: read_split(voc, s) for s in ("train", "val", "trainval") if _listed(voc, s)}
    theirs = {i for ids in splits.values() for i in ids}
    extra = [i for i in extra if i not in theirs]
    held_out = set(splits["val"])
    splits["train_aug"] = [i for i in [*splits["train"], *extra] if i not in held_out]
    _complete(source, [source / "cls" / f"{i}.mat" for i in extra])
    folders = [f for f in (voc / "JPEGImages", source / "img") if f.is_dir()]
    checked = partial(read_mask, taxonomy=taxonomy("voc"))
    jobs = [
        _job(i, folders, voc / "SegmentationClass" / f"{i}.png", checked) for i in sorted(theirs)
    ]
    jobs += [_job(i, folders, source / "cls" / f"{i}.mat", read_sbd_mask) for i in extra]
    root, identity = (
        Path(data_root) / "voc_aug",
        {"lists_sha256": {s: fingerprint(ids) for s, ids in splits.items()}},
    )
    done = finished(root, "train_aug", identity, tuple(folders)) or write_part(
        Part(root, "train_aug", identity, jobs, splits, folders, taxonomy("voc")), workers
    )
    return root, [*notes, *done["notes"], *_counts({"train_aug": len(splits["train_aug"])})]


def _job(name: str, folders: list[Path], mask: Path, read: Callable[[Path], np.ndarray]) -> MaskJob:
    image = next((p for f in folders if (p := f / f"{name}.jpg").is_file()), None)
    if image is None:
        raise FileNotFoundError(
            f"no image {name}.jpg in {' or '.join(map(str, folders))}, whose mask is {mask}"
        )
    return MaskJob(name, image, str(mask), partial(read, mask))


def _listed(root: Path, split: str) -> bool:
    return (root / "ImageSets" / "Segmentation" / f"{split}.txt").is_file()


def _complete(root: Path, files: Iterable[Path]) -> None:
    files = list(files)
    missing = [f for f in files if not f.is_file() or not f.stat().st_size]
    if missing:
        raise FileNotFoundError(
            f"{root} is not complete: {len(missing)} of {len(files)} files are missing or empty, "
            f"such as {missing[0]}. Repair "
            "it, or move it away and run the command again to download it"
        )


def _counts(found: dict[str, int]) -> list[str]:
    return [
        f"{k} holds {n} images, the published data {EXPECTED[k]}"
        for k, n in found.items()
        if n != EXPECTED[k]
    ]
