"""Stage: mIoU of a trained run on real data, and the audit of a synthetic set's masks by such a
run."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dd.data.datasets import SegmentationFolder, encode_mask
from dd.evaluation import metrics
from dd.segmenters.base import Segmenter
from dd.store.progress import Progress
from dd.store.provenance import read_own, sha256, write_atomic, write_json
from dd.store.schemas import MASKS
from dd.store.settings import Count, Natural, Settings
from dd.training.datamodule import whole_loader
from dd.training.segmentation import Views, count

EXAMPLES = 8  # keep the predictions of this many first images as pictures,
EXTREMES = 4  # and of those with the best and with the worst mIoU
FOUND = 0.002  # least share of an image's pixels for a predicted class to count as found
PER_IMAGE = "per_image.npz"


class PerImage:
    """A confusion matrix that also keeps that of each image: ``images``, uint32 [C, C] each."""

    def __init__(self, num_classes: int) -> None:
        self.images: list[np.ndarray] = []
        self.total = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predictions: list[torch.Tensor], masks: list[torch.Tensor]) -> None:
        counts = metrics.image_counts(predictions, masks, len(self.total)).cpu()
        self.total += counts.sum(0)
        self.images.extend(counts.numpy().astype(np.uint32))

    def compute(self) -> torch.Tensor:
        return self.total


class Shown:
    """Predictions worth looking at: of the first images, and of those with the lowest and the
    highest mIoU."""

    def __init__(self) -> None:
        self.first: list[tuple[int, torch.Tensor]] = []
        self.ranked: list[tuple[float, int, torch.Tensor]] = []
        self.seen = 0

    def add(self, prediction: torch.Tensor, confusion: np.ndarray) -> None:
        if self.seen < EXAMPLES:
            self.first.append((self.seen, prediction.cpu()))
        if confusion.any():  # else every pixel is 255
            miou = metrics.miou(torch.from_numpy(confusion.astype(np.int64)))
            self.ranked.append((miou, self.seen, prediction))
            self.ranked.sort(key=lambda row: row[:2])
            del self.ranked[EXTREMES:-EXTREMES]
            # only kept predictions leave the GPU
            self.ranked = [(miou, seen, kept.cpu()) for miou, seen, kept in self.ranked]
        self.seen += 1

    def predictions(self) -> dict[int, torch.Tensor]:
        """{position: prediction}."""
        return dict(self.first) | {position: prediction for _, position, prediction in self.ranked}


class Found:
    """The classes asked for in each image that a segmenter finds in it."""

    def __init__(self, asked: Sequence[Sequence[int]], num_classes: int) -> None:
        self.asked, self.seen, self.counts = asked, 0, np.zeros((num_classes, 2), np.int64)

    def add(self, prediction: torch.Tensor) -> None:
        pixels = prediction.flatten().long().bincount(minlength=len(self.counts)).tolist()
        for value in self.asked[self.seen]:
            self.counts[value] += pixels[value] >= FOUND * prediction.numel(), 1
        self.seen += 1

    def summary(self, class_names: Sequence[str]) -> dict[str, dict[str, int]]:
        """{class: {"found", "asked"}: images} of the classes that were asked for."""
        rows = zip(class_names, self.counts.tolist(), strict=True)
        return {name: {"found": f, "asked": a} for name, (f, a) in rows if a}


class ScoreSettings(Settings):
    """How to score. ``per_image``: write each image's own matrix to per_image.npz beside
    metrics.json (``confusion`` uint32 [N, C, C], ``ids``)."""

    batch_size: Count = 16
    num_workers: Natural = 0
    weights: Literal["ema", "raw"] = "ema"
    device: str = "cpu"
    per_image: bool = True


def score(
    path: str | Path,
    run: dict[str, Any],
    segmenter: Segmenter,
    data: SegmentationFolder,
    views: Views,
    settings: ScoreSettings,
    asked: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Score ``segmenter`` (weights loaded) on every image of ``data`` and write metrics.json to
    ``path``.

    ``run`` is the run's run.json, ``views`` the protocol: single scale, or test-time augmentation.
    ``asked``, {id: class ids} for images that were drawn: counts in how many of them each class is
    found. One integer confusion matrix at original image size, 255 left out. An existing file of
    the same checkpoint, data and protocol is kept. ValueError if the run's classes are not the
    data's.
    """
    path = Path(path)
    theirs = run["taxonomy"]["names"]
    if list(data.taxonomy.names) != theirs:
        raise ValueError(
            f"the run was trained for the classes {theirs}, data {data.root.name!r} has "
            f"{list(data.taxonomy.names)}: a run is evaluated on data with its own classes"
        )
    head = {
        "data": data.root.name,
        "split": data.split,
        "masks": data.masks,
        "num_images": len(data),
        "content": data.content(),
        "checkpoint": "checkpoints/last.ckpt",
        "weights_sha256": run["weights_sha256"],
        "weights": settings.weights,
        "protocol": views.protocol,
        "supervision": run["supervision"],
        "trained_on": run["trained_on"],
        "masks_made_with": _made_with(data),
        **({"chosen_on": run["chosen_on"]} if "chosen_on" in run else {}),
    }
    if path.exists():
        there = read_own(path, {})
        kept = "per_image" in there and path.with_name(PER_IMAGE).is_file()
        whole = (kept or not settings.per_image) and (asked is None or "found" in there)
        if whole and {k: there.get(k) for k in head} == head:
            return there
    confusion, shown, classes = PerImage(len(data.taxonomy)), Shown(), len(data.taxonomy)
    found = Found([asked[name] for name in data.ids] if asked else [()] * len(data), classes)
    kept_of = confusion, shown, found
    counted = _count(segmenter, data, views, settings, run.get("bf16", False), *kept_of)
    for position, prediction in shown.predictions().items():
        target = path.parent / "examples" / f"{data.ids[position]}.png"
        write_atomic(target, encode_mask(prediction.numpy().astype(np.uint8)))
    result = {**head, **metrics.summarise(counted, data.taxonomy.all_names)}
    if asked is not None:
        result["found"] = found.summary(data.taxonomy.all_names)
    if settings.per_image:
        digest = _write_per_image(path, confusion.images, data.ids)
        result["per_image"] = {"file": PER_IMAGE, "sha256": digest}
    write_json(path, result)
    return result


def _count(
    segmenter: Segmenter,
    data: SegmentationFolder,
    views: Views,
    settings: ScoreSettings,
    bf16: bool,
    confusion: PerImage,
    shown: Shown,
    found: Found,
) -> torch.Tensor:
    """The confusion matrix of all images. The last three arguments collect the matrix of each
    image, predictions to show and found classes."""
    segmenter, device = segmenter.to(settings.device).eval(), settings.device
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16)
    with Progress(f"evaluate on {data.root.name}/{data.split}", len(data)) as progress, autocast:
        loader = whole_loader(data, views, settings.batch_size, settings.num_workers)

        def after(predictions: list[torch.Tensor]) -> None:
            progress.advance(len(predictions))
            own = confusion.images[-len(predictions) :]
            for prediction, counts in zip(predictions, own, strict=True):
                shown.add(prediction, counts)
                found.add(prediction)
            if not settings.per_image:
                # for 80,000 images with 81 classes they would fill 2 GB
                confusion.images.clear()

        return count(segmenter, loader, confusion, device, after, views.predict)


def _write_per_image(path: Path, images: list[np.ndarray], ids: list[str]) -> str:
    """Write per_image.npz beside metrics.json; returns its hash."""
    stream = BytesIO()
    np.savez_compressed(stream, confusion=np.stack(images), ids=np.array(ids, np.str_))
    write_atomic(path.with_name(PER_IMAGE), stream.getvalue())
    return sha256(stream.getvalue())


def _made_with(data: SegmentationFolder) -> dict[str, Any] | None:
    path = data.root / data.masks / "masks.json"
    return read_own(path, MASKS)["identity"] if path.is_file() else None


def print_table(results: dict[str, dict[str, Any]], title: str) -> None:
    """Per-class IoU and mIoU of several results, one column each."""
    table = Table(title=title)
    table.add_column("class", no_wrap=True)
    folders = [Path(name).parts for name in results]
    shared = next((i for i, p in enumerate(zip(*folders, strict=False)) if len(set(p)) > 1), 0)
    for parts in folders:
        name = "/".join(parts[shared:]).replace("/", "/ ").replace(",", ", ")
        table.add_column(name, justify="right", overflow="fold")
    for class_name in next(iter(results.values()))["iou"]:
        values = [r["iou"].get(class_name) for r in results.values()]
        table.add_row(class_name, *("-" if v is None else f"{v:.1f}" for v in values))
    table.add_section()
    table.add_row("mIoU", *(f"[bold]{r['miou']:.1f}[/bold]" for r in results.values()))
    Console().print(table)
    for name, result in results.items():
        if "found" in result:
            print(f"{name} sees, of the classes asked for: {found_text(result['found'])}")


def found_text(found: Mapping[str, Mapping[str, int]]) -> str:
    """``94.0 % of 200; apple 97.5 % of 40, ...``, the rarest first."""
    share = {name: n["found"] / n["asked"] for name, n in found.items()}
    total = sum(n["asked"] for n in found.values())
    seen = sum(n["found"] for n in found.values())
    rarest = sorted(share, key=lambda name: share[name])
    each = (f"{name} {100 * share[name]:.1f} % of {found[name]['asked']}" for name in rarest)
    return f"{100 * seen / total:.1f} % of {total}; {', '.join(each)}"
