"""Weights of heads and layers that no label chose (GoCA, Meng et al., CVPR 2026, arXiv 2603.06178).

Shape letters as in :mod:`dd.attention.maths`; C: width of a layer's output.
"""

import math

import torch
import torch.nn.functional as F


def output_of(out_BHND: torch.Tensor, projection_CE: torch.Tensor) -> torch.Tensor:
    """What all heads together add to the pixels, float32 [B, N, C]: the concatenated outputs of the
    heads, projected; E = H*D. The bias belongs to no head."""
    return out_BHND.float().transpose(1, 2).flatten(2) @ projection_CE.float().T


def head_weights(out_BHND: torch.Tensor, projection_CE: torch.Tensor) -> torch.Tensor:
    """Share of each head in a layer's output at each pixel, float32 [B, H, N]:
    w_n = <O_n, O> / sum_m <O_m, O>, where O_n is what head n adds and O is their sum.

    The shares of a pixel sum to 1; a head that works against the others has a negative share. Where
    the heads add nothing, the shares are equal.
    """
    heads = out_BHND.shape[1]
    back = output_of(out_BHND, projection_CE) @ projection_CE.float()  # <O_n, O> = <out_n, W_n^T O>
    back_BHND = back.unflatten(2, (heads, -1)).transpose(1, 2)
    parts = (out_BHND.float() * back_BHND).sum(3)
    total = parts.sum(1, keepdim=True)
    return torch.where(total > 0, parts / total, 1 / heads)


def reference(features_BNC: torch.Tensor, side: int) -> torch.Tensor:
    """R = softmax(F F^T / sqrt(C)) of the features F of one layer, float32 [B, M, M] with
    M = ``side`` squared: which pixels are similar. Features of another side are resized to it
    bilinearly."""
    features = features_BNC.float()
    own = math.isqrt(features.shape[1])
    if own != side:
        grid = features.mT.unflatten(2, (own, own))
        resized = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
        features = resized.flatten(2).mT
    return (features @ features.mT / features.shape[2] ** 0.5).softmax(-1)


def layer_weight(output_BNC: torch.Tensor, reference_BNN: torch.Tensor) -> torch.Tensor:
    """How well a layer's output separates the same pixels as the reference, float32 [B]:
    max(0, sum of R * S), with S the cosines between the output's pixels.

    What we know of the paper does not define its S; this one is ours.
    """
    directions = F.normalize(output_BNC.float(), dim=2)
    agreement = (reference_BNN * (directions @ directions.mT)).sum((1, 2))
    return agreement.clamp(min=0)
