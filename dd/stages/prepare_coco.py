"""Stage: COCO 2017 as semantic masks of 80 thing classes and background."""

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from dd.data import coco_json as coco
from dd.data.conversion import MaskJob, Part, finished, keep_out, write_part
from dd.data.datasets import RECORD
from dd.store.downloads import GB, Archive, obtain
from dd.store.provenance import read_own, sha256
from dd.store.schemas import PARTS
from dd.taxonomy import taxonomy

# The site publishes no checksums; these are in use in public repositories (PaddlePaddle's and
# MLPerf's among them).
ARCHIVES = {
    "annotations": Archive(
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "md5:f4bbac642086de4f52a3fdda2de5fa2c",
        3 * GB,
    ),
    "val": Archive(
        "http://images.cocodataset.org/zips/val2017.zip",
        "md5:442b8da7639aecaf257c1dceb8ba8c80",
        3 * GB,
    ),
    "train": Archive(
        "http://images.cocodataset.org/zips/train2017.zip",
        "md5:cced6f7f71b7629ddf16f17bbcfab6b2",
        40 * GB,
    ),
}
SIZE = attrgetter(*coco.SIDES)
EXPECTED = {"train": 118287, "val": 5000}


def prepare_coco(
    data_root: str | Path = "data",
    archives: dict[str, Archive] | None = None,
    existing: str | Path | None = None,
    splits: Sequence[str] = ("val", "train"),
    workers: int | None = None,
) -> tuple[Path, list[str]]:
    """(``data_root/coco``, notes): masks and lists of the chosen splits. Images are read from
    ``existing`` or ``data_root/coco2017`` (annotations/, train2017/, val2017/), and downloaded if
    they are missing.

    FileExistsError if masks were made from another annotation file; ValueError if it does not match
    the images.
    """
    unknown = [s for s in splits if s not in EXPECTED]
    if unknown or not splits:
        raise ValueError(f"splits {list(splits)}; allowed: {', '.join(EXPECTED)}")
    source, root = Path(existing or Path(data_root) / "coco2017"), Path(data_root) / "coco"
    keep_out(root, [existing])
    absent, notes = existing is None and not source.is_dir(), []
    if absent and (record := _ready(root, splits)):  # made from a copy in another place
        return root, [f"{s}: {note}" for s in splits for note in record["parts"][s]["notes"]]
    for split in splits:
        annotations, images = (
            _folder(source, existing, data_root, name, (archives or ARCHIVES)[key])
            for key, name in (("annotations", "annotations"), (split, f"{split}2017"))
        )
        path = annotations / f"instances_{split}2017.json"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: is {annotations} that of COCO 2017 (instances)?")
        identity = {"annotations_sha256": sha256(path), "rule": "large to small, crowds 255"}
        done = finished(root, split, identity, (images,)) or _write(
            root, split, identity, path, images, workers
        )
        if done["images"] != EXPECTED[split]:
            done["notes"].append(
                f"{split} holds {done['images']} images, the published data {EXPECTED[split]}"
            )
        notes += [f"{split}: {note}" for note in done["notes"]]
    return root, notes


def _folder(
    source: Path,
    existing: str | Path | None,
    data_root: str | Path,
    name: str,
    archive: Archive,
) -> Path:
    """The location of a folder of COCO 2017; downloaded unless there is an ``existing`` copy."""
    places = [source / name, source / "images" / name]
    found = next((p for p in places if p.is_dir()), places[0])
    if not found.is_dir() and existing is not None:
        raise FileNotFoundError(
            f"{source} has no folder {name}: COCO 2017 lies in annotations, train2017 and val2017"
        )
    if not found.is_dir():
        obtain(archive, Path(data_root) / "downloads", found, name)
    return found


def _ready(root: Path, splits: Sequence[str]) -> dict[str, Any] | None:
    """The record of a prepared folder that holds all ``splits`` and whose images are still in
    place."""
    if not (root / RECORD).is_file():
        return None
    record = read_own(root / RECORD, PARTS)
    there = all((root / folder).is_dir() for folder in record["images"])
    return record if there and set(splits) <= record["parts"].keys() else None


def _write(
    root: Path, split: str, identity: dict[str, Any], path: Path, folder: Path, workers: int | None
) -> dict[str, Any]:
    classes, content = taxonomy("coco"), coco.read_coco(path)
    try:
        images, notes = coco.images_of(
            content, coco.category_values(content["categories"], classes)
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    places = {i.file_name: folder / Path(i.file_name).name for i in images}
    missing = [name for name, place in places.items() if not place.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} does not match the images: {len(missing)} of the {len(images)} it lists are "
            f"not in {folder}, such as {', '.join(missing[:5])}"
        )
    unlisted = len({p.stem for p in folder.glob("*.jpg")} - {i.stem for i in images})
    if unlisted:
        notes.append(f"{unlisted} images in {folder} are not listed in {path.name}: left out")
    jobs = [
        MaskJob(
            i.stem,
            places[i.file_name],
            f"{path.name}, {i.file_name}",
            partial(coco.draw, i),
            partial(coco.lost, i),
            partial(SIZE, i),
        )
        for i in images
    ]
    lists = {split: [i.stem for i in images]}
    return write_part(
        Part(root, split, identity, jobs, lists, [folder], classes), workers, notes=notes
    )
