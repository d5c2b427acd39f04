"""Boundary IoU against loops over the pixels."""

import numpy as np
import pytest

from dd.evaluation.boundary import boundary_counts, boundary_iou, near_outline


def by_loops(region, width):
    """Pixels of a region that have one outside it, or the border, within ``width`` (Chebyshev)."""
    height, length = region.shape
    found = np.zeros_like(region)
    for y, x in zip(*np.nonzero(region), strict=True):
        for v in range(y - width, y + width + 1):
            for u in range(x - width, x + width + 1):
                if not (0 <= v < height and 0 <= u < length) or not region[v, u]:
                    found[y, x] = True
    return found


@pytest.mark.parametrize("width", [1, 2, 3])
def test_near_the_outline_is_within_so_many_pixels(width):
    rng = np.random.default_rng(width)
    region = rng.random((14, 17)) < 0.9
    np.testing.assert_array_equal(near_outline(region, width), by_loops(region, width))


def test_intersection_and_union_near_the_outlines_of_each_class():
    rng = np.random.default_rng(0)
    truth, mask = (np.kron(rng.integers(0, 3, (5, 5)), np.ones((8, 8), int)) for _ in range(2))
    truth, mask = truth.astype(np.uint8), mask.astype(np.uint8)
    truth[:4, :4], mask[30:, 30:] = 255, 255
    width = round(0.02 * np.hypot(40, 40))
    counts = boundary_counts(mask, truth, 3)
    known = truth != 255
    for value in (1, 2):
        one, other = (by_loops(m == value, width) & known for m in (mask, truth))
        assert counts[value].tolist() == [(one & other).sum(), (one | other).sum()]
    assert counts[0].tolist() == [0, 0]
    assert boundary_iou(counts) == pytest.approx(
        100 * np.mean([counts[v, 0] / counts[v, 1] for v in (1, 2)])
    )


def test_equal_masks_have_all_and_no_class_has_none():
    mask = np.zeros((20, 20), np.uint8)
    assert boundary_iou(boundary_counts(mask, mask, 3)) is None
    mask[5:15, 5:15] = 2
    assert boundary_iou(boundary_counts(mask, mask, 3)) == 100
