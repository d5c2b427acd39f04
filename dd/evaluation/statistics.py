"""How certain a mean mIoU or a difference of two arms is: paired over runs and test images.

A *run* is one training, named by (seed, draw): the draw is the synthetic set that it saw, None if
there is only one. The interval of a mean adds two independent variances: that of the runs, and that
of the test images (a bootstrap of the mean over the runs). Each run's own share of the images'
variance is counted in both, so the intervals are too wide rather than too narrow.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from math import inf, sqrt
from statistics import mean, variance

import numpy as np
from scipy.stats import t as student

LEAST_IMAGES, LEAST_SEEDS = 30, 3  # fewer test images or seeds decide nothing
BATCH = 100  # bootstrap draws that are scored at once


@dataclass(frozen=True)
class Score:
    """mIoU of one run in percent; ``per_image`` its confusions int [N, C, C], None if not
    stored."""

    miou: float
    per_image: np.ndarray | None = None


@dataclass(frozen=True)
class Interval:
    """A mean or a mean difference in percent points, and its interval.

    ``low`` and ``high`` are None if nothing can be said (one run, no images). ``p`` is the
    two-sided p-value against 0, for differences. ``runs``, ``seeds`` and ``images`` count what it
    is based on; ``images`` is None if the runs' own images were not stored.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    runs: int
    seeds: int
    images: int | None

    @property
    def holds_zero(self) -> bool:
        """Whether the interval contains 0, or is missing: then nothing is shown."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    @property
    def decides(self) -> bool:
        """Whether it counts as a difference: 0 outside, enough seeds and test images."""
        enough = self.seeds >= LEAST_SEEDS and (self.images or 0) >= LEAST_IMAGES
        return enough and not self.holds_zero


def interval(
    scores: Mapping[Hashable, Score],
    other: Mapping[Hashable, Score] | None = None,
    level: float = 0.95,
    draws: int = 1000,
) -> Interval:
    """The mean of ``scores``, or of their differences to ``other``, by (seed, draw) or seed.

    Differences are taken between runs of the same key, and between the same test images; runs
    without a partner are left out. ValueError if no run is left, or if the paired runs were
    scored on different numbers of images or classes.
    """
    keys = sorted((k for k in scores if other is None or k in other), key=str)
    if not keys:
        raise ValueError("interval: no run is in both arms; only runs of the same seed are paired")
    values = {k: scores[k].miou - (other[k].miou if other else 0.0) for k in keys}
    arms = [arm for arm in (scores, other) if arm is not None]
    sides = [[m for k in keys if (m := arm[k].per_image) is not None] for arm in arms]
    pieces, images = [_runs_variance(values)], None
    if all(len(side) == len(keys) for side in sides):
        images = _same_shape(sides)
        pieces.append((_images_variance(sides, draws), images - 1))
    pieces = [(v, df) for v, df in pieces if df > 0]
    value, seeds = mean(values.values()), len({_seed(k) for k in keys})
    low, high, p = _student(value, pieces, level) if pieces else (None, None, None)
    return Interval(value, low, high, p if other is not None else None, len(keys), seeds, images)


def holm(p_values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """p-values adjusted for multiple comparisons (Holm 1979), in the given order."""
    adjusted, largest = {}, 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[key]))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}


def class_shares(confusion: np.ndarray) -> np.ndarray:
    """IoU, 0 to 1, of each class of confusions [..., C, C]; nan for a class that occurs neither in
    labels nor predictions."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    union = confusion.sum(-1) + confusion.sum(-2) - hit
    return np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)


def miou(confusion: np.ndarray) -> np.ndarray:
    """mIoU in percent of confusions [..., C, C], over the classes that occur in each."""
    return 100 * np.nanmean(class_shares(confusion), axis=-1)


def _seed(key: Hashable) -> Hashable:
    return key[0] if isinstance(key, tuple) else key


def _runs_variance(values: dict[Hashable, float]) -> tuple[float, float]:
    """(variance of the mean over runs, its degrees of freedom); 0 degrees for a single seed.

    Seeds and draws are crossed: with each seed on each draw, the mean's variance is
    (MS_seed + MS_draw - MS_rest) / runs. If some are missing, draws are averaged within a seed.
    """
    seeds = sorted({_seed(k) for k in values}, key=str)
    draws = sorted({k[1] for k in values if isinstance(k, tuple)}, key=str)
    if len(draws) > 1 and len(seeds) > 1 and len(values) == len(seeds) * len(draws):
        table = np.array([[values[s, d] for d in draws] for s in seeds])
        s, d = table.shape
        by_seed, by_draw = table.mean(1), table.mean(0)
        rest = table - by_seed[:, None] - by_draw + table.mean()
        a_df, b_df, r_df = s - 1, d - 1, (s - 1) * (d - 1)
        a, b = d * by_seed.var(ddof=1), s * by_draw.var(ddof=1)
        r = float((rest**2).sum()) / r_df
        total = max(a + b - r, a, b)  # the estimate can fall below that of one factor alone
        spread = a**2 / a_df + b**2 / b_df + (r**2 / r_df if total == a + b - r else 0)
        return total / table.size, total**2 / spread if spread else inf
    means = [mean(v for k, v in values.items() if _seed(k) == s) for s in seeds]
    if len(means) < 2:
        return 0.0, 0
    return variance(means) / len(means), len(means) - 1


def _same_shape(sides: list[list[np.ndarray]]) -> int:
    """Number of test images; ValueError for runs scored on other images or classes."""
    shapes = {m.shape for side in sides for m in side}
    if len(shapes) > 1 or not next(iter(shapes))[0]:
        raise ValueError(
            "interval: the runs were scored on (images, classes, classes) of "
            f"{', '.join(str(list(s)) for s in sorted(shapes))}; only runs on the same images and "
            "classes can be compared"
        )
    return next(iter(shapes))[0]


def _images_variance(sides: list[list[np.ndarray]], draws: int) -> float:
    """Variance of the mean mIoU of the runs (or of its difference) over draws of test images."""
    n, c = sides[0][0].shape[:2]
    flat = [[m.reshape(n, -1).astype(np.float64) for m in side] for side in sides]
    rng, scores = np.random.default_rng(4), []
    for start in range(0, draws, BATCH):
        size = min(BATCH, draws - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        mious = ([miou((weights @ m).reshape(size, c, c)) for m in side] for side in flat)
        drawn = [np.mean(runs, axis=0) for runs in mious]
        scores.append(drawn[0] - drawn[1] if len(drawn) == 2 else drawn[0])
    spread = float(np.concatenate(scores).var(ddof=1))
    return spread * n / (n - 1) if n > 1 else 0.0  # a bootstrap of n is too narrow by (n - 1) / n


def _student(
    value: float, pieces: list[tuple[float, float]], level: float
) -> tuple[float, float, float]:
    """(low, high, p against 0); degrees of freedom after Welch and Satterthwaite."""
    total = sum(v for v, _ in pieces)
    if total == 0:
        return value, value, float(value == 0)
    df = total**2 / sum(v**2 / df for v, df in pieces)
    error = sqrt(total)
    half = error * float(student.ppf((1 + level) / 2, df))
    return value - half, value + half, float(2 * student.sf(abs(value) / error, df))
