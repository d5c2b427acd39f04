"""One mask from many: decides pixels where the masks of several classes overlap, and where whole
mask sets disagree.

Shape letters: K classes of a sample, S mask sets, H W image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dd.taxonomy import IGNORE


@dataclass(frozen=True)
class Resolved:
    """``mask`` uint8 [H, W]; ``overlaps``: number of pixels that more than one class claims;
    ``ties``: number of those whose highest scores are equal."""

    mask: np.ndarray
    overlaps: int
    ties: int


def resolve(scores_KHW: np.ndarray, class_ids: Sequence[int], size: tuple[int, int]) -> Resolved:
    """The mask of classes that claim pixels with scores, float [K, H, W]; a score of 0 or less
    claims nothing. The highest score wins. Equal highest scores are a tie, which is left open: 255.
    A pixel that no class claims is background. ``size``: (H, W), for images without a class."""
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
    """Masks uint8 [H, W] of one image as one: the class on which all agree, 255 where they
    differ."""
    first = masks_SHW[0]
    same = np.logical_and.reduce([mask == first for mask in masks_SHW])
    return np.where(same, first, np.uint8(IGNORE))
