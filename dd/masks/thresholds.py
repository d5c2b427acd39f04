"""Finds the score from which a pixel gets a class, without labels, from the scores [K, h, w] of the
classes of an image: one threshold for each class, [K]."""

import numpy as np
import torch

BINS = 256
ROUNDS = 64  # of expectation and maximisation


def _histograms(scores_Khw: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(counts [K, BINS] of the scores, clipped to [0, 1]; middles of the bins)."""
    bins = (scores_Khw.flatten(1).clamp(0, 1) * BINS).long().clamp(max=BINS - 1)
    counts = torch.stack([torch.bincount(b, minlength=BINS) for b in bins])
    return counts.double().numpy(), (np.arange(BINS) + 0.5) / BINS


def otsu(scores_Khw: torch.Tensor) -> torch.Tensor:
    """The score that splits a class's histogram into two groups with the largest variance between
    them (Otsu 1979)."""
    counts, middles = _histograms(scores_Khw)
    below, total = counts.cumsum(1), counts.sum(1, keepdims=True)
    first = (counts * middles).cumsum(1)
    above = total - below
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = first / below - (first[:, -1:] - first) / above
        between = np.where((below > 0) & (above > 0), below * above * apart**2, -1.0)
    # of several equal ones, the middle: the scores may have a gap
    peak = between.max(1, keepdims=True)
    best = between >= peak - 1e-12 * np.abs(peak)
    place = (best * (np.arange(BINS) + 1)).sum(1) / best.sum(1)
    return torch.from_numpy(place / BINS)


def two_gaussians(scores_Khw: torch.Tensor, posterior: float = 0.5) -> torch.Tensor:
    """The score at which a pixel belongs to the upper one of two Gaussians with probability
    ``posterior``. They are fitted to a class's histogram by expectation and maximisation, starting
    from Otsu's split. Otsu's threshold if the two do not cross."""
    counts, middles = _histograms(scores_Khw)
    splits, found = otsu(scores_Khw).numpy(), []
    for row, split in zip(counts, splits, strict=True):
        upper, mean = (middles >= split).astype(float), np.array([0.0, 1.0])
        for _ in range(ROUNDS):
            shares = np.stack([1 - upper, upper]) * row
            weight = shares.sum(1)
            if (weight < 1e-9).any():
                break
            mean = shares @ middles / weight
            variance = (shares * (middles - mean[:, None]) ** 2).sum(1) / weight + 1e-6
            density = weight[:, None] * np.exp(
                -((middles - mean[:, None]) ** 2) / (2 * variance[:, None])
            )
            density = density / np.sqrt(variance)[:, None] + 1e-300
            upper = density[1] / density.sum(0)
        # between the two means only: far outside, the wider Gaussian wins again
        inside = (middles >= min(mean)) & (middles <= max(mean))
        crossed = np.flatnonzero(inside & (upper >= posterior))
        found.append(middles[crossed[0]] if len(crossed) else split)
    return torch.tensor(found, dtype=torch.float64)
