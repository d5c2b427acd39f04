"""How far two mask sets of the same images agree.

Shape letters: C classes with background; the last row and column, C, count pixels that are 255."""

from typing import Any

import numpy as np

from dd.taxonomy import IGNORE


def joint_counts(a: np.ndarray, b: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels int64 [C + 1, C + 1] of two masks uint8 [H, W] of one image: [value in a, value in b].
    ValueError if the sizes differ, and for values that are neither a class nor 255."""
    if a.shape != b.shape:
        raise ValueError(f"masks of one image differ in size: {list(a.shape)} and {list(b.shape)}")
    places = np.full(256, -1)
    places[:num_classes] = np.arange(num_classes)
    places[IGNORE] = num_classes
    pair = places[a], places[b]
    if min(p.min() for p in pair) < 0:
        outside = sorted({int(v) for m in (a, b) for v in np.unique(m) if places[v] < 0})
        raise ValueError(f"masks hold values that are not a class: {outside[:8]}")
    side = num_classes + 1
    return np.bincount((pair[0] * side + pair[1]).ravel(), minlength=side**2).reshape(side, side)


def agreement(counts: np.ndarray) -> dict[str, Any]:
    """Scores of counts [C + 1, C + 1], in percent, symmetric in the two masks. ``iou``: of each
    class where both masks are certain (None if neither has the class there); ``miou``: their mean;
    ``certain``: the share of pixels that are certain in both (None for a mean of nothing);
    ``uncertain``: the shares of 255 in the first and in the second mask; ``a``, ``b``: each class's
    share of the pixels."""
    sure, total = counts[:-1, :-1], int(counts.sum())
    hit = sure.diagonal().astype(float)
    union = sure.sum(0) + sure.sum(1) - hit
    iou = [100 * h / u if u else None for h, u in zip(hit.tolist(), union.tolist(), strict=True)]
    known = [v for v in iou if v is not None]
    share = 100 / max(total, 1)
    return {
        "iou": iou,
        "miou": sum(known) / len(known) if known else None,
        "certain": share * int(sure.sum()),
        "uncertain": [share * int(counts[-1].sum()), share * int(counts[:, -1].sum())],
        "a": [share * int(n) for n in counts.sum(1)[:-1]],
        "b": [share * int(n) for n in counts.sum(0)[:-1]],
    }


def agreeing_share(counts: np.ndarray) -> float:
    """Percent of an image's pixels that are the same in both masks, including 255."""
    return float(100 * counts.diagonal().sum() / max(int(counts.sum()), 1))
