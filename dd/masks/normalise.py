"""Puts heat on a common scale: maps float [K, h, w] of an image's classes become scores."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt

FLAT = 1e-6  # largest contrast, relative to the peak, that counts as rounding of the attention


def flat(maps: torch.Tensor) -> torch.Tensor:
    """Whether each map [..., h, w] shows nothing: its contrast is at most ``FLAT`` of its peak."""
    return maps.amax((-2, -1)) - maps.amin((-2, -1)) <= FLAT * maps.abs().amax((-2, -1))


def min_max(maps_Khw: torch.Tensor) -> torch.Tensor:
    """Each class map stretched to [0, 1] (Dataset Diffusion, section on mask generation); a map
    that is :func:`flat` becomes 0."""
    low, high = maps_Khw.amin((1, 2), keepdim=True), maps_Khw.amax((1, 2), keepdim=True)
    nothing = flat(maps_Khw)[:, None, None]
    return ((maps_Khw - low) / (high - low).masked_fill(nothing, 1)).masked_fill(nothing, 0)


def elbo(
    maps_Khw: torch.Tensor, alone_K: torch.Tensor, base: Annotated[float, Ge(1)] = 3.0
) -> torch.Tensor:
    """:func:`min_max` scores to the power of ``base`` ** e (ELBO-T2IAlign). e [K] is the error of
    the noise predicted with the class alone, from 0 for the best explained class of the image to 1
    for the worst; ``alone_K`` is what the class takes off that error
    (:data:`dd.masks.presence.ALONE`). One class, and classes with equal errors, keep power 1."""
    low, high = alone_K.min(), alone_K.max()
    error_K = (high - alone_K) / (high - low) if high > low else torch.zeros_like(alone_K)
    return min_max(maps_Khw) ** (base**error_K)[:, None, None].to(maps_Khw)


def per_pixel(maps_Khw: torch.Tensor) -> torch.Tensor:
    """Each pixel's share of its attention to all classes, then :func:`min_max`. GoCA's per-pixel
    rescaling sums over all content words of a caption; this sums over the classes, whose heat is
    stored. With a single class the map is kept, since there is nothing to share."""
    if len(maps_Khw) == 1:
        return min_max(maps_Khw)
    shown = maps_Khw.masked_fill(flat(maps_Khw)[:, None, None], 0)
    total = shown.sum(0).clamp(min=torch.finfo(shown.dtype).tiny)
    return min_max(shown / total)


def softmax(
    maps_Khw: torch.Tensor,
    temperature: Annotated[float, Gt(0)] = 0.1,
    background: float = 0.5,
) -> torch.Tensor:
    """Probabilities of the classes in a softmax over :func:`min_max` scores and a background of
    constant score, all divided by ``temperature``."""
    scores = min_max(maps_Khw)
    constant = torch.full_like(scores[:1], background)
    return (torch.cat([constant, scores]) / temperature).softmax(0)[1:]
