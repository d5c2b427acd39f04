"""Combines the powers of the image-image attention: stored heat float [K, P, r, r], whose second
axis holds (A_S)^p A_C for p = 0 ... P - 1, becomes maps [K, r, r]."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le

from dd.masks.normalise import min_max


def power(heat_KPrr: torch.Tensor, power: Annotated[int, Ge(0)]) -> torch.Tensor:
    """One power for all (Dataset Diffusion, self-attention exponentiation)."""
    return heat_KPrr[:, power]


def walk(heat_KPrr: torch.Tensor, alpha: Annotated[float, Gt(0), Le(1)] = 0.5) -> torch.Tensor:
    """A random walk that continues with probability ``alpha``, over the stored powers: their mean
    with weights alpha^p. Our own closed form."""
    weights = alpha ** torch.arange(heat_KPrr.shape[1], dtype=heat_KPrr.dtype)
    return torch.einsum("kprs,p->krs", heat_KPrr, weights / weights.sum())


def adaptive(
    heat_KPrr: torch.Tensor,
    agree: Annotated[float, Gt(0), Le(1)] = 0.98,
    threshold: Annotated[float, Gt(0), Le(1)] = 0.5,
) -> torch.Tensor:
    """For each class the first power whose mask (its min-max map from ``threshold`` on) has an IoU
    above ``agree`` with the mask of the power before; else the last power. Our own."""
    classes, powers = heat_KPrr.shape[:2]
    masks = min_max(heat_KPrr.flatten(0, 1)).view_as(heat_KPrr) >= threshold
    before, after = masks[:, :-1].flatten(2), masks[:, 1:].flatten(2)
    union = (before | after).sum(2)
    iou = (before & after).sum(2) / union.clamp(min=1)
    stops = torch.cat([iou > agree, torch.ones(classes, 1, dtype=torch.bool)], 1)
    chosen = (stops.int().argmax(1) + 1).clamp(max=powers - 1)
    return heat_KPrr[torch.arange(classes), chosen]
