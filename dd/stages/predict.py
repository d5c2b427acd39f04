"""Stage: segment photographs or a video with a trained run: masks, overlays, and the area of each
class."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dd.data.datasets import encode_image, encode_mask
from dd.data.folders import output_folder
from dd.data.photos import Photos, Picture, Video, batches
from dd.prompts.templates import enumerated, indefinite
from dd.report.contact_sheet import NAME, write_contact_sheet
from dd.report.pictures import legend, overlay
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.provenance import made_by, sha256, write_atomic, write_csv, write_json
from dd.store.samples import append_records, read_records
from dd.training.segmentation import Predictor, predict_fitting

SETTINGS, AREAS, CAPTIONS, UNREADABLE = (
    "predictions.json",
    "areas.csv",
    "captions.jsonl",
    "unreadable.csv",
)
CAPTIONED = 0.01  # least share of an image for a class to be in its caption
SHOWN = 20  # unreadable files on the screen; the file lists all
BATCH_PIXELS = 1 << 24  # limit of a batch's pixels, beside its number of images


def predict(
    target: str | Path,
    source: Photos | Video,
    predictor: Predictor,
    identity: dict[str, Any],
    names: list[str],
    palette: list[int],
    batch_size: int = 16,
) -> dict[str, Any]:
    """Predictions for ``source`` (:mod:`dd.data.photos`) in the folder ``target``:
    ``masks/<id>.png``, ``overlays/<id>.jpg``, areas.csv, captions.jsonl, unreadable.csv, and
    index.html to view them. Returns {"images", "kept": how many existed, "unreadable": {file: why},
    "notes"}.

    ``predictor``: images uint8 [H, W, 3] -> masks uint8 [H, W] of the classes ``names``, background
    first; ``identity``: what decides a mask beside the image (checkpoint, protocol). Existing
    results of the same file, checkpoint and protocol are kept. FileExistsError if ``target`` holds
    another run's predictions, ValueError if no image can be read.
    """
    target = output_folder(target, SETTINGS, identity, "predictions")
    with Lock(target, hint="Choose another folder with output=..."):
        write_json(target / SETTINGS, {"identity": identity, **made_by()})
        done, unreadable = _done(target, source.items), dict(source.unreadable)
        kept, todo = len(done), [item for item in source.items if item.id not in done]
        with Progress("predict", len(source.items), len(done)) as bar:
            for batch in batches(source.read(todo), batch_size, BATCH_PIXELS, unreadable, bar.fail):
                seen = predict_fitting(predictor, batch, unreadable, bar.fail)
                records = [_write(target, *row, palette, len(names)) for row in seen]
                append_records(target, "0", records)
                done |= {r["id"]: r for r in records}
                bar.advance(len(records))
        records = [done[item.id] for item in source.items if item.id in done]
        _write_tables(target, records, unreadable, names)
        pictures = [(r["file"], f"overlays/{r['id']}.jpg") for r in records]
        note = f"{len(pictures)} images, classes over them. Masks are in masks/, areas in {AREAS}."
        write_contact_sheet(
            target, f"Predictions in {target.name}", note, pictures, legend(names, palette)
        )
    if not done:
        first = next(iter(unreadable.items()))
        raise ValueError(
            f"none of the {len(unreadable)} images could be read, listed in "
            f"{target / UNREADABLE}; {first[0]}: {first[1]}"
        )
    return {"images": len(done), "kept": kept, "unreadable": unreadable, "notes": source.notes}


def print_predictions(target: str | Path, found: dict[str, Any]) -> None:
    """Print what was made, and what could not be read."""
    for note in found["notes"]:
        print(f"warning: {note}")
    print(
        f"predictions of {found['images']} images in {target} ({found['kept']} were there), areas "
        f"in {AREAS}"
    )
    print(f"to look at: {Path(target) / NAME}")
    if found["unreadable"]:
        print(f"{len(found['unreadable'])} could not be read ({UNREADABLE}):")
        for file, why in list(found["unreadable"].items())[:SHOWN]:
            print(f"  {file}: {why}")


def _done(target: Path, items: list[Picture]) -> dict[str, dict[str, Any]]:
    """Records of the items whose file and predictions are unchanged."""
    records, found = (
        read_records(target, ("source", "mask", "overlay", "width", "height", "pixels")),
        {},
    )
    for item in items:
        record = records.get(item.id)
        if record and record["source"] == item.digest:
            kept = {
                path: record[key]
                for path, key in zip(_paths(target, item.id), ("mask", "overlay"), strict=True)
            }
            if all(path.is_file() and sha256(path) == digest for path, digest in kept.items()):
                found[item.id] = {**record, "file": item.file}
    return found


def _paths(target: Path, name: str) -> tuple[Path, Path]:
    return target / "masks" / f"{name}.png", target / "overlays" / f"{name}.jpg"


def _write(
    target: Path,
    item: Picture,
    image: np.ndarray,
    mask: np.ndarray,
    palette: list[int],
    num_classes: int,
) -> dict[str, Any]:
    files = encode_mask(mask, palette), encode_image(overlay(image, mask, palette), ".jpg")
    for path, data in zip(_paths(target, item.id), files, strict=True):
        write_atomic(path, data)
    return {
        "id": item.id,
        "file": item.file,
        "source": item.digest,
        "mask": sha256(files[0]),
        "overlay": sha256(files[1]),
        "width": mask.shape[1],
        "height": mask.shape[0],
        "pixels": np.bincount(mask.ravel(), minlength=num_classes).tolist(),
    }


def _caption(record: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A caption of what an image shows, the largest class first, which needs no label and no
    captioner (:mod:`dd.stages.train_adapter`)."""
    enough = CAPTIONED * record["width"] * record["height"]
    seen = sorted(
        (-count, name)
        for count, name in zip(record["pixels"][1:], names[1:], strict=True)
        if count >= enough
    )
    classes = [name for _, name in seen]
    text = (
        f"a photo of {enumerated([indefinite(name) for name in classes])}" if classes else "a photo"
    )
    return {"filename": record["file"], "caption": text, "classes": classes}


def _write_tables(
    target: Path, records: list[dict[str, Any]], unreadable: dict[str, Any], names: list[str]
) -> None:
    head = [
        "file",
        "width",
        "height",
        *(f"{name} {unit}" for name in names for unit in ("pixels", "percent")),
    ]
    rows = [head]
    for record in records:
        size = record["width"] * record["height"]
        areas = [
            value for count in record["pixels"] for value in (count, f"{100 * count / size:.4f}")
        ]
        rows.append([record["file"], record["width"], record["height"], *areas])
    write_csv(target / AREAS, rows)
    write_atomic(
        target / CAPTIONS,
        (json.dumps(_caption(record, names), ensure_ascii=False) + "\n" for record in records),
    )
    if unreadable or (target / UNREADABLE).exists():  # replace an old list, even by an empty one
        write_csv(target / UNREADABLE, [["file", "why"], *unreadable.items()])
