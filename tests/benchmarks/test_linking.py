"""What the benchmark of linking says of rows that are known."""

import numpy as np
import pytest
import torch

from benchmarks.linking import by_offset, labels, lift

SIDE = 6
LABEL = torch.zeros(SIDE, SIDE, dtype=torch.int64)
LABEL[1:4, 2:4] = 5
LABEL = LABEL.flatten()
SAME = (LABEL[None] == LABEL[:, None]).float()


def test_equal_rows_are_chance_and_rows_of_one_thing_are_not():
    equal = torch.full((SIDE**2, SIDE**2), 1 / SIDE**2)
    assert lift(equal, LABEL) == pytest.approx(1)
    assert lift(SAME / SAME.sum(1, keepdim=True), LABEL) == pytest.approx(36 / 6)
    unlike = 1 - SAME
    assert lift(unlike / unlike.sum(1, keepdim=True), LABEL) == 0
    assert lift(equal, torch.zeros_like(LABEL)) is None


def test_rows_of_distance_alone_stay_and_others_lose_what_they_see():
    y, x = np.divmod(np.arange(SIDE**2), SIDE)
    near = np.exp(-np.hypot(y[:, None] - y, x[:, None] - x))
    alone = torch.from_numpy(near).float()
    alone /= alone.sum(1, keepdim=True)
    rows = by_offset(SAME / SAME.sum(1, keepdim=True))
    torch.testing.assert_close(rows.sum(1), torch.ones(SIDE**2))
    assert lift(rows, LABEL) < 3
    shift = torch.roll(torch.eye(SIDE**2), SIDE, 1)[:-SIDE]  # each pixel to the one below
    square = torch.cat([shift, torch.eye(SIDE**2)[-SIDE:]])
    found = by_offset(square)
    assert (found[:-SIDE].argmax(1) == torch.arange(SIDE**2 - SIDE) + SIDE).all()


def test_a_cell_is_of_what_most_of_it_is():
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :3] = 7
    assert labels(mask, 2, [7]).tolist() == [7, 0, 0, 0]
    mask[:4, 1:3] = 0
    assert labels(mask, 2, [7]).tolist() == [0, 0, 0, 0]
