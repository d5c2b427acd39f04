"""Makes scores follow the image's edges. Scores [C, h, w] and a guide [3, h, w] in [0, 1] of the
same size; pure functions, no training, no label."""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, MinLen

Dilations = Annotated[Sequence[Annotated[int, Ge(1)]], MinLen(1)]
AROUND = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
SHARPNESS = 0.1  # of PAMR: scales the local contrast that differences are divided by


def _shifted(padded: torch.Tensor, pad: int, y: int, x: int) -> torch.Tensor:
    """The pixels that lie (y, x) away, from an image that was padded by ``pad``."""
    height, width = (side - 2 * pad for side in padded.shape[-2:])
    return padded[..., pad + y : pad + y + height, pad + x : pad + x + width]


def affinity(image_3hw: torch.Tensor, dilations: Dilations) -> torch.Tensor:
    """PAMR's kernel float32 [8 * len(dilations), h, w]: for each pixel the softmax over its
    neighbours of -mean over channels of ``|x_i - x_j| / (0.1 sigma_i)``, sigma_i the standard
    deviation of these neighbours. Borders are repeated."""
    pad = max(dilations)
    padded = F.pad(image_3hw[None].float(), [pad] * 4, mode="replicate")[0]
    places = [(d * y, d * x) for d in dilations for y, x in AROUND]
    neighbours = torch.stack([_shifted(padded, pad, y, x) for y, x in places])
    contrast = SHARPNESS * neighbours.std(0) + 1e-8
    neighbours.sub_(image_3hw).abs_().div_(contrast)
    return neighbours.mean(1).neg_().softmax(0)


def pamr(
    scores_Chw: torch.Tensor,
    image_3hw: torch.Tensor,
    iterations: Annotated[int, Ge(1)] = 10,
    dilations: Dilations = (1, 2, 4, 8, 12, 24),
) -> torch.Tensor:
    """Pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020): ``iterations`` times, each
    score becomes the mean of its neighbours' scores, weighted by :func:`affinity`. ``dilations``:
    distances of the eight neighbours, in pixels of the scores."""
    kernel, pad = affinity(image_3hw, dilations), max(dilations)
    places = [(d * y, d * x) for d in dilations for y, x in AROUND]
    scores = scores_Chw.float()
    for _ in range(iterations):
        padded = F.pad(scores[None], [pad] * 4, mode="replicate")[0]
        scores = torch.zeros_like(scores)
        for weight, (y, x) in zip(kernel, places, strict=True):
            scores.addcmul_(_shifted(padded, pad, y, x), weight)
    return scores


def joint_bilateral(
    scores_Chw: torch.Tensor,
    image_3hw: torch.Tensor,
    radius: Annotated[int, Ge(1)] = 4,
    spatial: Annotated[float, Gt(0)] = 2.0,
    colour: Annotated[float, Gt(0)] = 0.1,
) -> torch.Tensor:
    """Joint bilateral filter (Kopf et al., 2007, for upsampled maps): the mean over a window of
    2 * ``radius`` + 1 pixels with weights exp(-d^2 / 2 spatial^2) exp(-D^2 / 2 colour^2), with d
    the distance in pixels and D the distance of the guide's colours."""
    guide = F.pad(image_3hw[None].float(), [radius] * 4, mode="replicate")[0]
    scores = F.pad(scores_Chw[None].float(), [radius] * 4, mode="replicate")[0]
    total, weights = torch.zeros_like(scores_Chw, dtype=torch.float32), 0.0
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            apart = (_shifted(guide, radius, y, x) - image_3hw).square().sum(0)
            weight = torch.exp(-apart / (2 * colour**2) - (y * y + x * x) / (2 * spatial**2))
            total.addcmul_(_shifted(scores, radius, y, x), weight)
            weights = weights + weight
    return total / weights
