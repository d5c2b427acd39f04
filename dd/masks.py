"""From heat maps to masks with an uncertainty band (Dataset Diffusion, section on mask generation).

Shape letters: K classes, P powers, r side of the heat map, H W image size.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dd.taxonomy import IGNORE


@dataclass(frozen=True)
class MaskSettings:
    """How heat becomes a mask. Defaults are the paper's: power 4, class from 0.6, uncertain from 0.5 to 0.6.

    ``power``: exponent of the self-attention; ``threshold``: a pixel whose strongest class reaches it gets that class;
    ``band``: below the threshold and within the band the pixel is uncertain (255), further below it is background;
    ``source``: ``class_prompt`` or, for ablations, ``full_prompt``.
    """

    power: int = 4
    threshold: float = 0.6
    band: float = 0.1
    source: str = "class_prompt"

    def __post_init__(self):
        if not (isinstance(self.power, int) and self.power >= 0):
            raise ValueError(f"masks.power must be a whole number >= 0, got {self.power!r}")
        if not 0 < self.threshold <= 1 or not 0 <= self.band < self.threshold:
            raise ValueError(
                f"masks: need 0 < threshold <= 1 and 0 <= band < threshold, got threshold={self.threshold}, band={self.band}"
            )
        if self.source not in ("class_prompt", "full_prompt"):
            raise ValueError(f"masks.source must be class_prompt or full_prompt, got {self.source!r}")


def normalise(maps_Krr: torch.Tensor) -> torch.Tensor:
    """Min-max of each class map to [0, 1]; a constant map becomes 0."""
    low, high = maps_Krr.amin((1, 2), keepdim=True), maps_Krr.amax((1, 2), keepdim=True)
    return (maps_Krr - low) / (high - low).clamp_min(1e-12)


def scores(heat_KPrr, power: int, size: tuple[int, int]) -> torch.Tensor:
    """Class scores [K, H, W]: the chosen power, min-max per class, bicubic to ``size`` (H, W)."""
    heat = torch.as_tensor(np.asarray(heat_KPrr), dtype=torch.float32)
    if power >= heat.shape[1]:
        raise ValueError(
            f"masks.power={power} is not stored in this data set: it holds powers 0 to {heat.shape[1] - 1}. "
            "Choose one of them, or generate with a larger diffusion.max_power"
        )
    return F.interpolate(normalise(heat[:, power])[None], size=size, mode="bicubic", align_corners=False)[0]


def to_mask(heat_KPrr, class_ids, size: tuple[int, int], settings: MaskSettings) -> np.ndarray:
    """Mask uint8 [H, W]: ``class_ids[argmax]`` where the score reaches the threshold, 255 in the band, else 0."""
    best, which = scores(heat_KPrr, settings.power, size).max(0)
    mask = torch.as_tensor(list(class_ids), dtype=torch.uint8)[which]
    mask[best < settings.threshold] = IGNORE
    mask[best < settings.threshold - settings.band] = 0
    return mask.numpy()
