"""One mask of many: what a pixel is where the masks of several classes lie over one another, and
where whole mask sets do not agree.

Shape letters: K classes of a sample, S mask sets, H W image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dd.taxonomy import IGNORE


@dataclass(frozen=True)
class Resolved:
    """``mask`` uint8 [H, W]; how many pixels more than one class claims (``overlaps``), and of how
    many the highest scores are equal (``ties``)."""

    mask: np.ndarray
    overlaps: int
    ties: int


def resolve(scores_KHW: np.ndarray, class_ids: Sequence[int], size: tuple[int, int]) -> Resolved:
    """The mask of classes that claim pixels with scores, float [K, H, W]; where a class claims
    nothing its score is 0 or less. Of several classes the highest score wins; equal ones are a tie,
    which nobody decides: 255. A pixel that no class claims is background. ``size``: (H, W), for
    images without a class."""
    mask = np.zeros(size, np.uint8)
    if not len(scores_KHW):
        return Resolved(mask, 0, 0)
    best, claimed = scores_KHW.max(0), (scores_KHW > 0).sum(0)
    mask[:] = np.array(class_ids, np.uint8)[scores_KHW.argmax(0)]
    tied = ((scores_KHW == best) & (best > 0)).sum(0) > 1
    mask[tied] = IGNORE
    mask[claimed == 0] = 0
    return Resolved(mask, int((claimed > 1).sum()), int(tied.sum()))


def agreed(masks_SHW: Sequence[np.ndarray]) -> np.ndarray:
    """Masks uint8 [H, W] of one image as one: what all of them say, 255 where they differ."""
    first = masks_SHW[0]
    same = np.logical_and.reduce([mask == first for mask in masks_SHW])
    return np.where(same, first, np.uint8(IGNORE))
