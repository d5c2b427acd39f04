"""How much labelling can be skipped, and what a target costs: pure functions on measured curves.

A curve is ``{k: mIoU in percent}`` with k real labelled images; a confusion array is int [N, C, C] (image, true, predicted).
"""

import math
from dataclasses import dataclass

import numpy as np


def _miou(confusion: np.ndarray) -> np.ndarray:
    """mIoU in percent of confusion matrices [..., C, C], over the classes that occur in each."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    union = confusion.sum(-1) + confusion.sum(-2) - hit
    share = np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)
    return 100 * np.nanmean(share, axis=-1)


def bootstrap(per_image: np.ndarray, other: np.ndarray | None = None, draws: int = 1000, level: float = 0.95, seed: int = 0):
    """(low, high) of the mIoU, or of its difference to ``other`` (``per_image`` minus ``other``, same images in both).

    Percentile bootstrap over images: each draw takes N images with replacement and scores the sum of their matrices.
    ValueError for no image, or for two runs of another number of images or classes.
    """
    if per_image.ndim != 3 or not len(per_image) or per_image.shape[1] != per_image.shape[2]:
        raise ValueError(f"bootstrap: confusions int [N, C, C] of at least one image, got {list(per_image.shape)}")
    if other is not None and other.shape != per_image.shape:
        raise ValueError(
            f"bootstrap: the two runs were scored on {list(per_image.shape)} and {list(other.shape)} (images, classes, "
            "classes); only runs on the same images and classes can be compared"
        )
    n, c = len(per_image), per_image.shape[1]
    rng, scores = np.random.default_rng([seed, 4]), []
    flat = [a.reshape(n, -1).astype(np.float64) for a in (per_image, other) if a is not None]
    for start in range(0, draws, 100):  # weights of 100 draws at a time: a matrix product instead of a gather
        size = min(100, draws - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        drawn = [_miou((weights @ a).reshape(size, c, c)) for a in flat]
        scores.append(drawn[0] - drawn[1] if len(drawn) == 2 else drawn[0])
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(scores), [tail, 100 - tail])
    return float(low), float(high)


def images_for(curve: dict[int, float], target: float) -> float | None:
    """Number of labelled images at which ``curve`` first reaches ``target``, linear in log(k) between measured points.

    The smallest measured k if it is reached there already; None if no measured k reaches it. k = 0 is joined linearly.
    """
    points = sorted(curve.items())
    if not points:
        raise ValueError("images_for: the curve is empty")
    if points[0][1] >= target:
        return float(points[0][0])
    for (k0, m0), (k1, m1) in zip(points, points[1:], strict=False):
        if m1 >= target:
            share = (target - m0) / (m1 - m0)
            return k0 + share * (k1 - k0) if k0 == 0 else math.exp(math.log(k0) + share * (math.log(k1) - math.log(k0)))
    return None


def images_skipped(with_synthetic: dict[int, float], real_only: dict[int, float]) -> dict[int, dict]:
    """For each k of ``with_synthetic``: ``needed``, the real images that the control needs for the same mIoU, and ``skipped``,
    needed - k (negative: the synthetic start costs images). Both None if no measured control gets there; ``at_least`` is
    then what is skipped for sure."""
    largest, found = max(real_only), {}
    for k, miou in sorted(with_synthetic.items()):
        needed = images_for(real_only, miou)
        found[k] = {"needed": needed, "skipped": None if needed is None else needed - k}
        if needed is None:
            found[k]["at_least"] = largest - k
    return found


@dataclass(frozen=True)
class Prices:
    """``minutes_per_image``: annotation; ``per_hour``: of an annotator; ``per_gpu_hour``: of the machine that computes."""

    minutes_per_image: float = 10.0
    per_hour: float = 20.0
    per_gpu_hour: float = 2.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (isinstance(value, int | float) and value >= 0 and math.isfinite(value)):
                raise ValueError(f"prices: {name}={value!r}; a number of 0 or more is needed")


def cost(images: int, gpu_seconds: float, prices: Prices) -> dict[str, float]:
    """What ``images`` labelled by hand and ``gpu_seconds`` of computing cost: labelling, computing, total."""
    labelling = images * prices.minutes_per_image / 60 * prices.per_hour
    computing = gpu_seconds / 3600 * prices.per_gpu_hour
    return {"labelling": labelling, "computing": computing, "total": labelling + computing}
