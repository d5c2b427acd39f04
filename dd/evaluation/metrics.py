"""mIoU from one integer confusion matrix over the whole set, as PASCAL VOC defines it."""

from collections.abc import Iterable
from typing import Any

import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from dd.taxonomy import IGNORE


class ConfusionMatrix(MulticlassConfusionMatrix):
    """torchmetrics' matrix, counted by :func:`image_counts`: the same integers in a fraction of the
    time."""

    def update(
        self,
        predictions: torch.Tensor | list[torch.Tensor],
        labels: torch.Tensor | list[torch.Tensor],
    ) -> None:
        """Class ids [H, W] of one image and its labels, or a list of each."""
        if isinstance(predictions, torch.Tensor):
            predictions, labels = [predictions], [labels]
        self.confmat += image_counts(predictions, labels, self.num_classes).sum(0)


def confusion_matrix(num_classes: int) -> ConfusionMatrix:
    """A metric that counts pixels [true class, predicted class]; pixels whose label is 255 are
    left out."""
    return ConfusionMatrix(num_classes=num_classes, ignore_index=IGNORE, validate_args=False)


def image_counts(
    predictions: list[torch.Tensor], labels: list[torch.Tensor], num_classes: int
) -> torch.Tensor:
    """Confusion matrix of each image, int64 [N, C, C] [true class, predicted class], on the images'
    device.

    ``predictions``: class ids, any integers; ``labels``: of the same sizes, class ids or 255, which
    is left out. ValueError for other labels. All images are counted together: a GPU is waited for
    once a batch instead of several times an image.
    """
    rows = IGNORE + 1  # one for each possible label: nothing has to be removed before counting
    pairs = []
    for i, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
        pair = (label.to(torch.int32) * num_classes).add_(prediction)
        pairs.append(pair.add_(i * rows * num_classes).flatten())
    size = len(pairs) * rows * num_classes
    counts = torch.bincount(torch.cat(pairs), minlength=size)[:size]
    counts = counts.view(len(pairs), rows, num_classes)
    if counts[:, num_classes:IGNORE].any():
        wrong = counts[:, num_classes:IGNORE].sum((0, 2)).nonzero().flatten() + num_classes
        raise ValueError(
            f"labels hold the values {wrong[:8].tolist()}; allowed: 0..{num_classes - 1}, and "
            f"{IGNORE} to leave a pixel out"
        )
    return counts[:, :num_classes]


def iou(confusion: torch.Tensor) -> list[float | None]:
    """IoU of each class in percent; None for a class that neither labels nor predictions hold."""
    hit = confusion.diag().double()
    union = confusion.sum(0).double() + confusion.sum(1).double() - hit
    return [100 * h / u if u else None for h, u in zip(hit.tolist(), union.tolist(), strict=True)]


def miou(confusion: torch.Tensor) -> float:
    """Mean of :func:`iou` over the classes that occur, background counted. ValueError for an
    empty matrix."""
    present = [v for v in iou(confusion) if v is not None]
    if not present:
        raise ValueError("the confusion matrix is empty: no pixel was scored (are all labels 255?)")
    return sum(present) / len(present)


def with_uncertain(counts: torch.Tensor) -> dict[str, float | None]:
    """Scores of masks with uncertain pixels, from integer counts [C, C + 1] [true class, class in
    the mask] whose last column counts the uncertain pixels.

    ``miou``: uncertain pixels count as background, so that none is hidden; ``miou_certain``: they
    are left out (None if nothing is certain); ``uncertain``: their share in percent. ValueError if
    no pixel was counted.
    """
    certain, uncertain = counts[:, :-1], counts[:, -1]
    shown = certain.clone()
    shown[:, 0] += uncertain
    return {
        "miou": miou(shown),
        "miou_certain": miou(certain) if certain.any() else None,
        "uncertain": float(100 * uncertain.sum().double() / counts.sum().double()),
    }


def pixel_accuracy(confusion: torch.Tensor) -> float:
    """Share of scored pixels that are right, in percent."""
    return float(100 * confusion.diag().sum().double() / confusion.sum().double())


def summarise(confusion: torch.Tensor, class_names: Iterable[str]) -> dict[str, Any]:
    """The measured part of metrics.json; ``class_names`` with background first."""
    return {
        "miou": miou(confusion),
        "iou": dict(zip(class_names, iou(confusion), strict=True)),
        "pixel_accuracy": pixel_accuracy(confusion),
        "confusion": confusion.tolist(),
    }
