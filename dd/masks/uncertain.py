"""Which pixels stay uncertain (255 in a mask). Some functions return edges [K]: the scores from
which a pixel surely has its class, and from which it is not background. Others decide pixel by
pixel, bool [H, W], from the scores [C, H, W] of the classes and the background."""

from typing import Annotated, TypeAlias

import torch
from annotated_types import Ge, Gt, Le, Lt

from dd.masks.thresholds import two_gaussians

Edges: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def band(sure_K: torch.Tensor, width: float) -> Edges:
    """Uncertain within ``width`` below the threshold (Dataset Diffusion, mask generation)."""
    return sure_K, sure_K - width


def posterior(
    scores_Khw: torch.Tensor,
    sure: Annotated[float, Gt(0), Lt(1)] = 0.7,
    known: Annotated[float, Gt(0), Lt(1)] = 0.3,
) -> Edges:
    """Uncertain where the probability of the upper one of two Gaussians
    (:func:`dd.masks.thresholds.two_gaussians`) lies between ``known`` and ``sure``."""
    upper = two_gaussians(scores_Khw, sure)
    return upper, torch.minimum(upper, two_gaussians(scores_Khw, known))


def margin(scores_CHW: torch.Tensor, least: Annotated[float, Ge(0)] = 0.1) -> torch.Tensor:
    """Uncertain where the two highest scores are less than ``least`` apart."""
    if len(scores_CHW) < 2:
        return torch.zeros(scores_CHW.shape[1:], dtype=torch.bool)
    first, second = scores_CHW.topk(2, dim=0).values
    return first - second < least


def disagreement(
    scores_KHW: torch.Tensor,
    others_KHW: torch.Tensor,
    most: Annotated[float, Gt(0), Le(1)] = 0.2,
) -> torch.Tensor:
    """Uncertain where the standard deviation of two readings' scores exceeds ``most`` for a
    class."""
    return ((scores_KHW - others_KHW).abs() / 2 > most).any(0)


def entropy(scores_CHW: torch.Tensor, most: Annotated[float, Gt(0), Le(1)] = 0.9) -> torch.Tensor:
    """Uncertain where the entropy of the scores (as shares of their sum) exceeds the share ``most``
    of its maximum."""
    if len(scores_CHW) < 2:
        return torch.zeros(scores_CHW.shape[1:], dtype=torch.bool)
    scores = scores_CHW.clamp(min=1e-6)
    shares = scores / scores.sum(0)
    bits = -(shares * shares.log()).sum(0) / torch.tensor(float(len(scores))).log()
    return bits > most
