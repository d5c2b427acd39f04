"""What the published segmenters see, and how their masks are resized to the image: the steps of
transformers' image processors, which need torchvision, written out.

Shape letters: B batch, K masks, S side of the model's square, H W image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

RESCALE = 1 / 255


@dataclass(frozen=True)
class Look:
    """How a model sees an image: ``side`` of the square that it is squashed to, then ``mean`` and
    ``std`` of values in [0, 1]."""

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# image_mean, image_std and size of Sam2ImageProcessor and Sam3ImageProcessor
SAM2 = Look(1024, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SAM3 = Look(1008, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def seen(images: Sequence[np.ndarray], look: Look, device: str = "cpu") -> torch.Tensor:
    """Images uint8 [H, W, 3] as float32 [B, 3, S, S]: bilinear with antialiasing, rounded back to
    whole values as torchvision does with uint8, normalised."""
    mean = torch.tensor(look.mean).view(3, 1, 1)
    std = torch.tensor(look.std).view(3, 1, 1)
    shown = []
    for image in images:
        pixels_13HW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        size = (look.side, look.side)
        if pixels_13HW.shape[2:] != size:
            pixels_13HW = F.interpolate(pixels_13HW, size, mode="bilinear", antialias=True)
        whole = pixels_13HW[0].round().clamp(0, 255)
        shown.append((whole * RESCALE - mean) / std)
    return torch.stack(shown).to(device)


def at_size(masks_Khw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits or probabilities float [K, h, w] at an image's ``size`` (H, W), bilinear."""
    if not len(masks_Khw):
        return masks_Khw.new_zeros(0, *size)
    return F.interpolate(masks_Khw[None].float(), size, mode="bilinear", align_corners=False)[0]
