"""Which classes of a trained run are good enough: IoU of each class with an interval over the test
images, held against a threshold.

The interval is about one run on images like those of the test split: another training is another
question. IoU is a ratio of sums, and its variance is the delete-one jackknife's over the images;
Student's t has as many degrees of freedom as test images hold the class, less one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.stats import t as student

LEAST_OF_CLASS = 10  # test images with the class; fewer are too few for an interval
LARGEST = 100_000  # test images that are still asked for
ACCEPT, LABEL, UNKNOWN = "accept", "label", "unknown"


@dataclass(frozen=True)
class ClassIou:
    """IoU of a class in percent; None where no test image and no prediction holds it. ``low`` and
    ``high`` are None with fewer than :data:`LEAST_OF_CLASS` ``images`` that hold it. ``error``:
    standard error over the images, None with fewer than two; ``level`` of the interval."""

    value: float | None
    low: float | None
    high: float | None
    images: int
    error: float | None
    level: float

    def more(self, threshold: float) -> int | None:
        """Further test images with the class until the interval leaves out ``threshold``, if they
        are like those that are there; None for more than :data:`LARGEST`."""
        least = max(LEAST_OF_CLASS, self.images + 1)
        if self.value is None or self.error is None:
            return least - self.images
        away, error = abs(self.value - threshold), self.error

        def outside(n: int) -> bool:
            return _reach(self.level, n) * error * sqrt(self.images / n) < away

        below, enough = least - 1, least
        while not outside(enough):
            below, enough = enough, 2 * enough
            if enough > LARGEST:
                return None
        while enough - below > 1:
            middle = (below + enough) // 2
            below, enough = (below, middle) if outside(middle) else (middle, enough)
        return enough - self.images


@dataclass(frozen=True)
class Decision:
    """``kind``: ACCEPT, LABEL or UNKNOWN. ``labels``: how many more are needed (LABEL; ``beyond``:
    more than these, the most that were measured), or with how many more it may be accepted
    (UNKNOWN). ``images``: further test images with the class that would tell; None where no such
    number can be given."""

    kind: str
    labels: int = 0
    images: int | None = None
    beyond: bool = False

    @property
    def text(self) -> str:
        """``accept``, ``label 16 more``, ``label more than 256``, ``unknown``."""
        if self.kind == LABEL:
            return f"label more than {self.labels}" if self.beyond else f"label {self.labels} more"
        return f"unknown with {self.labels} more" if self.labels else self.kind


def class_ious(per_image_NCC: np.ndarray, tests: int = 1, level: float = 0.95) -> list[ClassIou]:
    """IoU of each class, of the test images' confusions int [N, C, C] [true class, predicted class]
    of one run.

    All of ``tests`` intervals hold together at ``level`` (Bonferroni), since each of them decides.
    """
    counts = np.asarray(per_image_NCC, np.float64)
    hit_NC = np.diagonal(counts, axis1=1, axis2=2)
    union_NC = counts.sum(1) + counts.sum(2) - hit_NC
    images_C = (counts.sum(2) > 0).sum(0)
    each = 1 - (1 - level) / tests
    return [
        _class_iou(hit_NC[:, c], union_NC[:, c], int(images_C[c]), each)
        for c in range(counts.shape[1])
    ]


def _class_iou(hit_N: np.ndarray, union_N: np.ndarray, images: int, level: float) -> ClassIou:
    total = float(union_N.sum())
    if not total:
        return ClassIou(None, None, None, images, None, level)
    value = 100 * float(hit_N.sum()) / total
    rest_N = total - union_N
    if images < 2 or not rest_N.all():
        return ClassIou(value, None, None, images, None, level)
    without_N = 100 * (hit_N.sum() - hit_N) / rest_N
    n = len(hit_N)
    error = sqrt((n - 1) / n * float(((without_N - without_N.mean()) ** 2).sum()))
    if images < LEAST_OF_CLASS:
        return ClassIou(value, None, None, images, error, level)
    half = _reach(level, images) * error
    return ClassIou(value, max(0.0, value - half), min(100.0, value + half), images, error, level)


def _reach(level: float, images: int) -> float:
    return float(student.ppf((1 + level) / 2, images - 1))


def decide(measured: Sequence[tuple[int, ClassIou]], threshold: float) -> Decision:
    """What to do about one class. ``measured``: (labels of the run, its IoU), the fewest labels
    first; the first run is the one at hand.

    Accepted only where the lower end of an interval reaches ``threshold``: with the labels at hand,
    else with the fewest more that were measured. Of the others the first run that may reach it says
    what is unknown; where all are shown to be below, it takes more labels than the most measured.
    """
    start = measured[0][0]
    for labels, found in measured:
        if found.low is not None and found.low >= threshold:
            return Decision(LABEL if labels > start else ACCEPT, labels - start)
    for labels, found in measured:
        if found.high is None or found.high >= threshold:
            return Decision(UNKNOWN, labels - start, found.more(threshold))
    return Decision(LABEL, measured[-1][0] - start, beyond=True)
