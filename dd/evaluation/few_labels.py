"""mIoU of a set's masks from the labels of a few of its images, with an honest interval.

The labelled images are a random sample of the set, without replacement. mIoU is a mean of ratios of
sums. Each labelled image therefore gets a *pseudo-value* of the delete-one jackknife: its
contribution to the estimate, corrected for small-sample bias. Every image of the set has a
prediction of this value (here: how far two mask sets agree on it). The predictions correct the
estimate by regression, as in prediction-powered inference (Angelopoulos et al. 2023, arXiv
2301.09633; PPI++, arXiv 2311.01453) and, long before, in survey sampling (Cochran, *Sampling
Techniques*, chapter 7). The variance is the jackknife's of the whole estimate. Predictions that are
too weak are not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from scipy.stats import t as student

LEAST_IMAGES = 20  # with fewer labelled images there is no interval
LEAST_OF_CLASS = 5  # a class in fewer labelled images is named and left out


@dataclass(frozen=True)
class Estimated:
    """mIoU in percent over the set, with its interval; ``plain_low`` and ``plain_high``: without
    predictions. ``correlation`` of prediction and pseudo-value, nan if undefined; ``used``: whether
    the predictions were used. ``classes`` in the mIoU (ids, background 0); ``rare``: {id: labelled
    images} of classes left out because too few labels hold them. ``more``: further labels needed
    for an interval of at most ± ``within``; None: even all images are not enough."""

    miou: float
    low: float
    high: float
    plain: float
    plain_low: float
    plain_high: float
    correlation: float
    used: bool
    classes: tuple[int, ...]
    rare: dict[int, int]
    labelled: int
    images: int
    more: int | None
    within: float


def sums(mask_HW: np.ndarray, truth_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels int64 [C, 2] of one image: intersection and union of each class. Pixels whose truth is
    255 are not counted; 255 in the mask counts as background, so that nothing is hidden."""
    known = truth_HW != 255
    mask, truth = np.where(mask_HW == 255, 0, mask_HW)[known], truth_HW[known]
    for name, values in (("mask", mask), ("truth", truth)):
        if values.size and values.max() >= num_classes:
            raise ValueError(
                f"a {name} holds the value {values.max()}; allowed: 0..{num_classes - 1}, and 255"
            )
    hit = np.bincount(mask[mask == truth], minlength=num_classes)
    both = np.bincount(mask, minlength=num_classes) + np.bincount(truth, minlength=num_classes)
    return np.stack([hit, both - hit], 1)


def image_miou(sums_NC2: np.ndarray) -> np.ndarray:
    """mIoU of each image [N], in percent, over the classes that occur in it; nan if no pixel is
    counted."""
    hit, union = sums_NC2[..., 0].astype(float), sums_NC2[..., 1]
    share = np.divide(hit, union, out=np.zeros_like(hit), where=union > 0)
    there = (union > 0).sum(-1)
    return 100 * np.divide(share.sum(-1), there, out=np.full(len(hit), np.nan), where=there > 0)


def estimate(
    true_nC2: np.ndarray,
    labelled: Sequence[int],
    predicted_NC2: np.ndarray,
    within: float = 2.0,
    level: float = 0.95,
) -> Estimated:
    """``true_nC2``: :func:`sums` of the ``labelled`` images (positions in the set) against their
    labels; ``predicted_NC2``: of all images against a substitute for the labels, such as another
    mask set.

    ValueError for fewer than :data:`LEAST_IMAGES` labelled images.
    """
    number, size = len(labelled), len(predicted_NC2)
    if number < LEAST_IMAGES:
        raise ValueError(
            f"{number} labelled images: an interval needs at least {LEAST_IMAGES} of the set's "
            f"{size}, drawn at random"
        )
    there = (true_nC2[..., 1] > 0).sum(0)
    counted = np.flatnonzero(there >= LEAST_OF_CLASS)
    rare = {int(c): int(there[c]) for c in np.flatnonzero((there > 0) & (there < LEAST_OF_CLASS))}
    seen = predicted_NC2[..., 1].sum(0) > 0
    rare |= {int(c): 0 for c in np.flatnonzero(seen & (there == 0))}
    if not len(counted):
        raise ValueError(
            f"no class is in {LEAST_OF_CLASS} of the {number} labelled images: an interval cannot "
            "be given for any"
        )
    values = pseudo_values(true_nC2[:, counted])
    guesses_N = influence(predicted_NC2[:, counted])
    guess_n, left = guesses_N[list(labelled)], 1 - number / size
    plain, error = float(values.mean()), float(values.std(ddof=1))
    reach = float(student.ppf((1 + level) / 2, number - 1)) * sqrt(left / number)
    ends = plain - reach * error, plain + reach * error
    weak = guess_n.std() == 0 or error == 0
    correlation = float("nan") if weak else float(np.corrcoef(guess_n, values)[0, 1])
    used = not weak and correlation >= 1 / sqrt(number - 2)
    found, (low, high) = plain, ends
    if used:
        found, adjusted = _regressed(values, guess_n, float(guesses_N.mean()))
        error = float(adjusted.std(ddof=1))
        reach = float(student.ppf((1 + level) / 2, number - 2)) * sqrt(left / number)
        low, high = found - reach * error, found + reach * error
    more = _more(error, number, size, within, level)
    return Estimated(
        miou=found,
        low=low,
        high=high,
        plain=plain,
        plain_low=ends[0],
        plain_high=ends[1],
        correlation=correlation,
        used=used,
        classes=tuple(int(c) for c in counted),
        rare=rare,
        labelled=number,
        images=size,
        more=more,
        within=within,
    )


def pseudo_values(sums_nC2: np.ndarray) -> np.ndarray:
    """Jackknife pseudo-values [n] of the mIoU in percent: their mean is the estimate."""
    total, number = sums_nC2.sum(0, dtype=float), len(sums_nC2)
    rest_nC2 = total - sums_nC2
    whole = 100 * float((total[:, 0] / total[:, 1]).mean())
    without = 100 * (rest_nC2[..., 0] / rest_nC2[..., 1]).mean(1)
    return number * whole - (number - 1) * without


def _regressed(values_n: np.ndarray, guess_n: np.ndarray, mean: float) -> tuple[float, np.ndarray]:
    """(mean of ``values_n``, shifted by regression on ``guess_n`` to the set's ``mean`` prediction;
    the pseudo-values [n] of that estimate). The slope is fitted again without each image: a few
    images with extreme predictions determine it, and residuals do not show that."""

    def found(number: int, x: Any, y: Any, xx: Any, xy: Any) -> Any:
        slope = (xy / number - x * y / number**2) / (xx / number - (x / number) ** 2)
        return y / number + slope * (mean - x / number)

    number = len(values_n)
    parts = (guess_n, values_n, guess_n**2, guess_n * values_n)
    whole = found(number, *(part.sum() for part in parts))
    without = found(number - 1, *(part.sum() - part for part in parts))
    return float(whole), number * whole - (number - 1) * without


def influence(sums_NC2: np.ndarray) -> np.ndarray:
    """How much each image [N] raises the mIoU of the set, in percent points times N: the linear
    part, whose mean over the set is 0."""
    total = sums_NC2.sum(0, dtype=float)
    seen = total[:, 1] > 0
    ratio, size = total[seen, 0] / total[seen, 1], total[seen, 1] / len(sums_NC2)
    part = (sums_NC2[:, seen, 0] - ratio * sums_NC2[:, seen, 1]) / size
    return 100 * part.mean(1)


def _more(error: float, number: int, size: int, within: float, level: float) -> int | None:
    """Labels that are missing for ± ``within``, if further images are like the labelled ones."""
    for n in range(number, size):
        reach = float(student.ppf((1 + level) / 2, n - 1)) * sqrt((1 - n / size) / n)
        if reach * error <= within:
            return n - number
    return None if size == number else size - number


def label_more(found: Estimated) -> str:
    """``label 12 more to be within ± 2``, or that it is reached."""
    if found.more == 0:
        return f"within ± {found.within:g}"
    if found.more is None:
        return "every image is labelled"
    return f"label {found.more} more to be within ± {found.within:g}"
