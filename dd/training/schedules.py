"""The learning rate as a function of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch


def stepwise(
    optimizer: torch.optim.Optimizer, factor: Callable[[int], float]
) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
    """What ``configure_optimizers`` returns: ``optimizer``, its rates times ``factor(step)``."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def warmup_cosine(warmup: int, total: int, floor: float = 0.05) -> Callable[[int], float]:
    """A factor that rises to 1 in ``warmup`` steps and falls to ``floor`` as half a cosine."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
