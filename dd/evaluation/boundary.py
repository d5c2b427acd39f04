"""Boundary IoU (Cheng et al., CVPR 2021): IoU of the pixels near the outlines alone. Large objects
cannot hide errors at their outlines in it."""

import numpy as np
from scipy.ndimage import binary_erosion

SHARE = 0.02  # share of the image's diagonal that counts as near, as published


def near_outline(region_HW: np.ndarray, width: int) -> np.ndarray:
    """bool [H, W]: the pixels of a region within ``width`` pixels of its outline; the image's
    border counts as outline."""
    around = np.ones((3, 3), bool)
    return region_HW & ~binary_erosion(region_HW, around, iterations=width, border_value=0)


def boundary_counts(mask_HW: np.ndarray, truth_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels int64 [C, 2] of one image: intersection and union of the pixels near the outlines in
    ``mask_HW`` and in ``truth_HW``, for each class (0, background, stays 0). Pixels whose truth is
    255 are left out; 255 in the mask belongs to no class."""
    height, width = truth_HW.shape
    near = max(1, round(SHARE * float(np.hypot(height, width))))
    known, counts = truth_HW != 255, np.zeros((num_classes, 2), np.int64)
    for value in np.union1d(np.unique(mask_HW), np.unique(truth_HW)):
        if 0 < value < num_classes:
            one, other = (near_outline(m == value, near) & known for m in (mask_HW, truth_HW))
            counts[value] = (one & other).sum(), (one | other).sum()
    return counts


def boundary_iou(counts_C2: np.ndarray) -> float | None:
    """Mean over the classes that occur, in percent; None if none occurs."""
    shown = counts_C2[counts_C2[:, 1] > 0]
    return float(100 * (shown[:, 0] / shown[:, 1]).mean()) if len(shown) else None
