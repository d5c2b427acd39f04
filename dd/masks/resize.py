"""Bicubic resizing of maps, as torch's, by two thin matrix products."""

from functools import lru_cache

import torch
import torch.nn.functional as F


@lru_cache(maxsize=32)
def _bicubic(side: int, length: int) -> torch.Tensor:
    """The linear map [length, side] that bicubic interpolation is along one axis."""
    unit = torch.eye(side).view(side, 1, side, 1)
    resized = F.interpolate(unit, size=(length, 1), mode="bicubic", align_corners=False)
    return resized.view(side, length).T.contiguous()


def resize(maps_Krr: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic resize of maps [K, r, r] to [K, H, W], as torch's: several times as fast."""
    sides = zip(maps_Krr.shape[1:], size, strict=True)
    height, width = (_bicubic(side, length).to(maps_Krr) for side, length in sides)
    return height @ (maps_Krr @ width.T)
