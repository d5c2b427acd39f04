"""Combines the heat of several groups of layers: float [K, P, r, r] each."""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, MinLen

Sides = Annotated[Sequence[Annotated[int, Ge(1)]], MinLen(1)]
Shares = Annotated[Sequence[Annotated[float, Gt(0)]], MinLen(1)]


def by_side(heats_GKPrr: Sequence[torch.Tensor], sides: Sides, shares: Shares) -> torch.Tensor:
    """Mean of the heat of the cross-attention of each of ``sides``, weighted by ``shares``; each
    map is first divided by its sum (iSeg: 0.7 of 16 and 0.3 of 32; FA-Seg: 0.15, 0.7 and 0.15 of 8,
    16 and 32). ValueError unless there is a share for each side."""
    if len(sides) != len(shares):
        raise ValueError(
            f"steps: {{weight: by_side}}: {len(sides)} sides and {len(shares)} shares; give one "
            "share for each side"
        )
    parts = (h / h.sum((-2, -1), keepdim=True) for h in heats_GKPrr)
    total = sum(share * part for share, part in zip(shares, parts, strict=True))
    return torch.as_tensor(total / sum(shares))
