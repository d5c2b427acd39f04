"""Stage: a trained segmenter labels the synthetic images it was trained on; the next one is trained
on these labels from scratch (self-training, Dataset Diffusion)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator

from dd.data.datasets import SegmentationFolder, read_image
from dd.labelers.base import Labelled
from dd.labelers.writing import Batches, write_set
from dd.segmenters.base import Segmenter
from dd.store.provenance import fingerprint, read_own
from dd.store.samples import recorded
from dd.store.schemas import RUN
from dd.store.settings import Count, Name, Natural, Settings, Share
from dd.taxonomy import Taxonomy
from dd.training.datamodule import whole_loader
from dd.training.segmentation import Views, to_device


def _new_set(given: str) -> str:
    if given == "SegmentationClass":
        raise ValueError(
            f"mask_set={given!r}: expected the name of a new set in masks, such as self_training"
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
    """A trained run: its run.json, its segmenter with its weights, its views of an image."""

    run: dict[str, Any]
    segmenter: Segmenter
    views: Views
    device: str = "cpu"


def label_by_run(folder: str | Path, teacher: Teacher, settings: LabelerSettings) -> Path:
    """Write the teacher's predictions for the training images of the synthetic set ``folder`` to
    ``masks/<mask_set>``, beside the existing masks; returns that folder.

    ``masks.json`` comes last, as in the label stage. An interrupted set resumes, and a finished one
    is left alone. ValueError for a teacher with other classes. FileExistsError for a set of another
    teacher or other settings: its predictions were costly, so it is not changed.
    """
    folder = Path(folder)
    target, images = folder / "masks" / settings.mask_set, _training_images(folder, teacher.run)
    head = {
        "identity": _identity(folder, images, teacher, settings),
        "chosen_on": teacher.run.get("chosen_on", []),
    }
    look = partial(_look, images, teacher, settings)
    what = f"label {images.root.name} again"
    write_set(target, head, images.ids, settings.batch_size, look, what)
    return target


def _look(
    images: SegmentationFolder, teacher: Teacher, settings: LabelerSettings, batches: Batches
) -> Iterator[list[Labelled]]:
    """The teacher's predictions for batches of images by name."""
    run, views, device = teacher.run, teacher.views, teacher.device
    todo = [name for batch in batches for name in batch]
    unlabelled, size = _Unlabelled(images, todo), settings.batch_size
    loader = whole_loader(unlabelled, views, size, settings.num_workers)
    segmenter = teacher.segmenter.to(device).eval()
    for shown, empty in loader:
        with (
            torch.no_grad(),
            torch.autocast(device.split(":")[0], torch.bfloat16, enabled=run.get("bf16", False)),
        ):
            sizes = [tuple(e.shape) for e in empty]
            found = views.predict(segmenter, to_device(shown, device), sizes, settings.confidence)
        yield [Labelled(mask.cpu().numpy().astype(np.uint8)) for mask in found]


class _Unlabelled:
    """Images by name, each with an empty mask that gives its size."""

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
    including its mask set."""
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
