"""A score [h, w] for the background: from the scores of the classes [K, h, w], or from the maps of
background words [W, h, w]."""

from typing import Annotated

import torch
from annotated_types import Gt


def words(maps_Whw: torch.Tensor) -> torch.Tensor:
    """The strongest of the background's words, each map scaled like those of the classes (iSeg:
    background words in the class prompt)."""
    return maps_Whw.amax(0)


def inverse(scores_Khw: torch.Tensor, alpha: Annotated[float, Gt(0)] = 1.0) -> torch.Tensor:
    """(1 - strongest class)^alpha: background is where no class is. With alpha 1 a class wins from
    0.5 on; a larger alpha lets it win from less."""
    return (1 - scores_Khw.amax(0)).clamp(0, 1) ** alpha
