"""Bicubic resizing of maps, equal to torch's, by two thin matrix products."""

from functools import lru_cache

import torch
import torch.nn.functional as F


@lru_cache(maxsize=32)
def _bicubic(side: int, length: int) -> torch.Tensor:
    """Bicubic interpolation along one axis as a matrix [length, side]."""
    unit = torch.eye(side).view(side, 1, side, 1)
    resized = F.interpolate(unit, size=(length, 1), mode="bicubic", align_corners=False)
    return resized.view(side, length).T.contiguous()


def resize(maps_Krr: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic resize of maps [K, r, r] to [K, H, W]; equal to torch's but several times faster."""
    sides = zip(maps_Krr.shape[1:], size, strict=True)
    height, width = (_bicubic(side, length).to(maps_Krr) for side, length in sides)
    return height @ (maps_Krr @ width.T)
