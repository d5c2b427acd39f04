"""Agreement of two mask sets, by numbers counted by hand."""

import numpy as np
import pytest

from dd.evaluation.agreement import agreeing_share, agreement, joint_counts

A = np.array([[0, 0, 1, 1], [2, 2, 255, 1]], np.uint8)
B = np.array([[0, 1, 1, 1], [2, 255, 255, 0]], np.uint8)


def test_counts_by_hand():
    counts = joint_counts(A, B, 4)
    assert counts.shape == (5, 5) and counts.sum() == 8
    expected = {(0, 0): 1, (0, 1): 1, (1, 1): 2, (2, 2): 1, (2, 4): 1, (4, 4): 1, (1, 0): 1}
    assert {(i, j): n for (i, j), n in np.ndenumerate(counts) if n} == expected


def test_scores_by_hand():
    found = agreement(joint_counts(A, B, 4))
    # background: 1 of {1 + (0,1) + (1,0)}; class 1: 2 of 4; class 2: 1 of 1 (the rest is 255 in b)
    assert found["iou"] == pytest.approx([100 / 3, 50, 100, None], nan_ok=True)
    assert found["miou"] == pytest.approx((100 / 3 + 50 + 100) / 3)
    assert found["certain"] == 75 and found["uncertain"] == [12.5, 25]
    assert found["a"] == [25, 37.5, 25, 0] and found["b"] == [25, 37.5, 12.5, 0]
    assert agreeing_share(joint_counts(A, B, 4)) == 62.5


def test_it_is_the_same_in_both_directions():
    one, other = agreement(joint_counts(A, B, 4)), agreement(joint_counts(B, A, 4))
    assert one["iou"] == other["iou"] and one["uncertain"] == other["uncertain"][::-1]


def test_masks_without_a_certain_pixel_in_common_have_no_score():
    none = np.full((2, 4), 255, np.uint8)
    found = agreement(joint_counts(A, none, 4))
    assert found["miou"] is None and found["iou"] == [None] * 4 and found["certain"] == 0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="differ in size"):
        joint_counts(A, A[:1], 4)
    with pytest.raises(ValueError, match=r"not a class: \[2\]"):
        joint_counts(A, A, 2)
