"""A data set in the form that exports need: its lists, its classes, and every file checked before
anything is written."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dd.data.datasets import RECORD, SegmentationFolder, image_size, read_split
from dd.data.groups import recorded_groups
from dd.evaluation.supervision import behind, class_of_masks
from dd.exports.source import ExportItem, Source
from dd.store.names import folder_name
from dd.store.progress import Progress
from dd.store.provenance import fingerprint, read_json, read_own, sha256
from dd.store.samples import Sample, read_records, read_whole_plan
from dd.store.schemas import DATASET, WHOLE_MASKS
from dd.taxonomy import TAXONOMIES, Taxonomy, taxonomy


def read_source(
    folder: Path,
    run: dict[str, Any] | None,
    masks: str,
    splits: list[str] | None,
    classes: Taxonomy | Path | str | None = None,
) -> tuple[Source, str]:
    """(the checked data set, hash of its content). ``run``: run.json of a synthetic set, None for
    real data; the other arguments, and the errors, are those of
    :func:`dd.stages.export.export`."""
    folder_name(masks, "--masks", parts=True)
    synthetic, run = run is not None, run or {}
    hashes = _mask_set(folder, masks, synthetic)
    chosen = _classes(folder, run, classes)
    names = _splits(folder, splits, synthetic)
    sets = {split: SegmentationFolder(folder, split, chosen, masks) for split in names}
    for split, data in sets.items():
        if twice := [name for name, number in Counter(data.ids).items() if number > 1]:
            raise ValueError(
                f"split {split} lists {twice[0]!r} more than once: remove it from the list"
            )
    plan = {s.id: s for s in read_whole_plan(folder)} if synthetic else {}
    records = read_records(folder) if synthetic else {}
    wanted = {name: data for data in sets.values() for name in data.ids}
    items, content, pixels, images = {}, {}, np.zeros(256, np.int64), np.zeros(256, np.int64)
    with Progress("check", len(wanted)) as progress:
        for name, data in wanted.items():
            items[name], counts, image_hash, mask_hash = _item(data, name, plan.get(name))
            recorded = records.get(name, {}).get("image_sha256", image_hash)
            _compare(folder, "image", items[name].image, image_hash, recorded)
            recorded = mask_hash if hashes is None else hashes.get(name)
            _compare(folder, "mask", items[name].mask, mask_hash, recorded)
            content[name] = [image_hash, mask_hash, items[name].facts]
            pixels, images = pixels + counts, images + (counts > 0)
            progress.advance(1)
    source = Source(
        folder.resolve().name,
        chosen,
        {split: data.ids for split, data in sets.items()},
        items,
        _counted(pixels),
        _counted(images),
        _about(folder, masks, run),
    )
    return source, fingerprint(content)


def is_synthetic(folder: Path) -> bool:
    """Whether the folder holds what generate.py writes. FileNotFoundError if there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no data set at {folder}")
    if (folder / "plan.jsonl").is_file():
        return True
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    identity = run.get("identity") if isinstance(run, dict) else None
    return isinstance(identity, dict) and "generator" in identity


def _mask_set(folder: Path, masks: str, synthetic: bool) -> dict[str, str] | None:
    """Hashes of the masks by id; None for real data without any. FileNotFoundError for a set that
    is not finished."""
    if not synthetic and any(folder.glob("settings_*.json")) and not (folder / RECORD).is_file():
        raise FileNotFoundError(
            f"{folder} is not finished (no {RECORD}): run its python -m dd prepare ... again"
        )
    path = folder / masks / "masks.json"
    if path.is_file():
        return read_own(path, WHOLE_MASKS)["sha256"]
    if not synthetic:
        return None
    there = sorted(str(p.parent.relative_to(folder)) for p in folder.glob("**/masks.json"))
    raise FileNotFoundError(
        f"{folder} has no finished mask set {masks} (no masks.json); finished ones: "
        f"{', '.join(there) or 'none'}. Masks are made by generate.py stage=label"
    )


def _classes(folder: Path, run: dict[str, Any], given: Taxonomy | Path | str | None) -> Taxonomy:
    """The given taxonomy, or the one that the folder names."""
    if given is not None:
        return given if isinstance(given, Taxonomy) else taxonomy(given)
    if (folder / "taxonomy.yaml").is_file():
        return taxonomy(folder / "taxonomy.yaml")
    record = read_own(folder / RECORD, DATASET) if (folder / RECORD).is_file() else {}
    told = run.get("identity", record).get("taxonomy")
    if not told:
        raise ValueError(
            f"{folder} does not say what its classes are: give --taxonomy {'|'.join(TAXONOMIES)} "
            "or a YAML file"
        )
    known = TAXONOMIES.get(told["name"])
    same = known is not None and list(known.names) == told["names"]
    return known if known and same else Taxonomy(told["name"], told["names"])


def _splits(folder: Path, wanted: list[str] | None, synthetic: bool) -> list[str]:
    if wanted:
        return list(dict.fromkeys(wanted))
    found = sorted(path.stem for path in (folder / "ImageSets" / "Segmentation").glob("*.txt"))
    if not found and synthetic:
        raise FileNotFoundError(
            f"{folder} is not finished (no list of samples): run its generate.py command again"
        )
    if not found:
        read_split(folder, "train")  # its error says what is missing
    return found


def _item(
    data: SegmentationFolder, name: str, sample: Sample | None
) -> tuple[ExportItem, np.ndarray, str, str]:
    """(item, pixels of each value, SHA-256 of image and mask); ValueError names the file and what
    is wrong."""
    image, mask = data.image_path(name), data.mask_path(name)
    size = image_size(image)
    ids = data.mask(name, size)
    with Image.open(mask) as stored:
        if stored.mode not in ("P", "L"):
            raise ValueError(
                f"mask {mask} has mode {stored.mode}; exports copy masks in grey of 8 bits or with "
                "a palette, which python -m dd prepare own makes"
            )
    counts = np.bincount(ids.ravel(), minlength=256)
    facts: dict[str, Any] = {}
    if sample:
        facts = {"prompt": sample.prompt, "classes": list(sample.classes), "seed": sample.seed}
    values = tuple(int(v) for v in np.flatnonzero(counts))
    return ExportItem(name, image, mask, size, values, facts), counts, sha256(image), sha256(mask)


def _compare(folder: Path, kind: str, path: Path, found: str, recorded: str | None) -> None:
    if found != recorded:
        raise ValueError(
            f"{kind} {path} does not match its record; python -m dd verify {folder} lists all "
            "damaged files, and how to repair them"
        )


def _counted(numbers: np.ndarray) -> dict[int, int]:
    return {int(value): int(numbers[value]) for value in np.flatnonzero(numbers)}


def _labeler(identity: dict[str, Any]) -> str:
    """Who made the masks, in words; "" for attention."""
    if "teacher" in identity:
        return "predicted by a trained segmenter (self-training)"
    name = identity.get("labeler", {}).get("name")
    return f"made by the labeler {name} (docs/labelers.md)" if name else ""


def _about(folder: Path, masks: str, run: dict[str, Any]) -> dict[str, Any]:
    """The data card's information on the set, from its run.json and masks.json."""
    made = read_json(folder / masks / "masks.json") if run else {}
    terms = run.get("terms") or {}
    return {
        "synthetic": bool(run),
        "generator": run["identity"]["generator"] if run else None,
        "masks": masks,
        "licence": terms.get("licence"),
        "link": terms.get("link"),
        "labels": behind(made) if run else [],
        "labeler": _labeler(made.get("identity") or {}),
        "supervision": class_of_masks(made) if run else "real",
        "groups": None if run else recorded_groups(folder),
    }
