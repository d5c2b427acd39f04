"""Stage: a trained segmenter labels the synthetic images it learnt from, and the next one is
trained on these labels from scratch (self-training, Dataset Diffusion)."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator

from dd.data.datasets import SegmentationFolder, encode_mask, read_image
from dd.execution.units import intact_masks
from dd.segmenters.base import Segmenter
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.provenance import differences, fingerprint, read_own, sha256, write_atomic, write_json
from dd.store.samples import append_records, read_records, recorded
from dd.store.schemas import IDENTIFIED, RUN
from dd.store.settings import Count, Name, Natural, Settings, Share
from dd.taxonomy import Taxonomy
from dd.training.datamodule import whole_loader
from dd.training.segmentation import Views, to_device

NEEDS = ("sha256", "pixels")  # of the record of a mask


def _new_set(given: str) -> str:
    if given == "SegmentationClass":
        raise ValueError(
            f"mask_set={given!r}: expected the name of a new set in masks, as self_training"
        )
    return given


class LabelerSettings(Settings):
    """``confidence``: pixels whose strongest class has a smaller probability become 255; None keeps
    every pixel."""

    noun = "labeler"

    mask_set: Annotated[Name, AfterValidator(_new_set)] = "self_training"
    confidence: Share | None = None
    weights: str = "ema"
    batch_size: Count = 16
    num_workers: Natural = 0


@dataclass(frozen=True)
class Teacher:
    """A trained run: its run.json, its segmenter with its weights, how it looks at an image."""

    run: dict[str, Any]
    segmenter: Segmenter
    views: Views
    device: str = "cpu"


def label_by_run(folder: str | Path, teacher: Teacher, settings: LabelerSettings) -> Path:
    """Write the teacher's predictions for the training images of the synthetic set ``folder`` to
    ``masks/<mask_set>``, beside the masks that are there; returns that folder.

    ``masks.json`` comes last, as in the label stage; an interrupted set goes on, and a finished one
    is left alone. ValueError for a teacher of other classes; FileExistsError for a set of another
    teacher or other settings, whose predictions were costly: nothing is touched then.
    """
    folder = Path(folder)
    target, images = folder / "masks" / settings.mask_set, _training_images(folder, teacher.run)
    identity = _identity(folder, images, teacher, settings)
    _refuse_other(target, identity)
    if not (target / "masks.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        with Lock(target, hint="Choose another name with mask_set=..."):
            if not (target / "masks.json").exists():  # by another process in between
                _label(target, identity, images, teacher, settings)
    return target


def _label(
    target: Path,
    identity: dict[str, Any],
    images: SegmentationFolder,
    teacher: Teacher,
    settings: LabelerSettings,
) -> None:
    run, views, device, size = teacher.run, teacher.views, teacher.device, settings.batch_size
    head = {"identity": identity, "chosen_on": run.get("chosen_on", [])}
    write_json(target / "settings.json", head)
    done = intact_masks(target, NEEDS)
    batches = [images.ids[i : i + size] for i in range(0, len(images), size)]
    # whole ones: rounding depends on a batch
    batches = [batch for batch in batches if not done.issuperset(batch)]
    todo = [name for batch in batches for name in batch]
    loader = whole_loader(_Unlabelled(images, todo), views, size, settings.num_workers)
    segmenter = teacher.segmenter.to(device).eval()
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=run.get("bf16", False))
    progress = Progress(f"label {images.root.name} again", len(images), len(images) - len(todo))
    with progress, torch.no_grad(), autocast:
        for names, (shown, empty) in zip(batches, loader, strict=True):
            sizes = [tuple(e.shape) for e in empty]
            found = views.predict(segmenter, to_device(shown, device), sizes, settings.confidence)
            rows = [_write(target, *pair) for pair in zip(names, found, strict=True)]
            append_records(target, "0", rows)
            progress.advance(len(names))
    records, pixels = read_records(target, NEEDS), Counter[str]()
    for name in images.ids:
        pixels.update(records[name]["pixels"])
    hashes = {name: records[name]["sha256"] for name in images.ids}
    write_json(target / "masks.json", {**head, "pixels": dict(pixels), "sha256": hashes})


class _Unlabelled:
    """Images by name, each with an empty mask that says its size."""

    def __init__(self, images: SegmentationFolder, names: list[str]) -> None:
        self.images, self.names = images, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        image = read_image(self.images.image_path(self.names[index]))
        return image, np.zeros(image.shape[:2], np.uint8)


def _training_images(folder: Path, run: dict[str, Any]) -> SegmentationFolder:
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not a synthetic data set (no run.json); make one with generate.py"
        )
    classes = read_own(folder / "run.json", RUN)["identity"]["taxonomy"]
    if classes["names"] != run["taxonomy"]["names"]:
        raise ValueError(
            f"the teacher was trained for the classes {run['taxonomy']['names']}, the synthetic "
            f"set {folder} has {classes['names']}: a teacher labels images of its own classes"
        )
    return SegmentationFolder(folder, "train", Taxonomy(classes["name"], classes["names"]))


def _identity(
    folder: Path, images: SegmentationFolder, teacher: Teacher, settings: LabelerSettings
) -> dict[str, Any]:
    """What decides a mask: settings, the images, and the teacher with what it was trained on,
    its mask set included."""
    hashes = recorded(folder, "image_sha256")
    missing = [name for name in images.ids if name not in hashes]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(images)} images have no record; run generate.py "
            "again"
        )
    how = {"confidence": settings.confidence, "weights": settings.weights}
    return {
        "settings": {**teacher.views.protocol, **how},
        "images": fingerprint([hashes[name] for name in images.ids]),
        "teacher": {k: teacher.run[k] for k in ("weights_sha256", "supervision", "trained_on")},
    }


def _refuse_other(target: Path, identity: dict[str, Any]) -> None:
    for file in (target / "masks.json", target / "settings.json"):
        there = read_own(file, IDENTIFIED)["identity"] if file.exists() else identity
        if lines := differences(there, identity):
            more = [f"... and {len(lines) - 8} more"] if len(lines) > 8 else []
            raise FileExistsError(
                f"mask set {target} was made by another teacher or with other settings:\n  "
                + "\n  ".join([line[:200] for line in lines[:8]] + more)
                + "\nNothing was changed. Choose another name (mask_set=...), or remove the "
                "folder to make it anew."
            )


def _write(target: Path, name: str, prediction: torch.Tensor) -> dict[str, Any]:
    """Write a mask and return its record."""
    mask = prediction.cpu().numpy().astype(np.uint8)
    data = encode_mask(mask)
    write_atomic(target / f"{name}.png", data)
    pixels = {str(v): int(n) for v, n in zip(*np.unique(mask, return_counts=True), strict=True)}
    return {"id": name, "sha256": sha256(data), "pixels": pixels}
