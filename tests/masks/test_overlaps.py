"""One mask of many."""

import numpy as np

from dd.masks.overlaps import agreed, resolve


def test_the_highest_score_wins_and_ties_are_uncertain():
    scores = np.array([[[0.9, 0.5, 0.0, 0.0, 0.4]], [[0.3, 0.5, 0.2, 0.0, 0.6]]])
    found = resolve(scores, [7, 2], (1, 5))
    assert found.mask.tolist() == [[7, 255, 2, 0, 2]] and found.mask.dtype == np.uint8
    assert (found.overlaps, found.ties) == (3, 1)


def test_a_tie_of_weaker_classes_is_none():
    scores = np.array([[[0.3]], [[0.3]], [[0.8]]])
    found = resolve(scores, [1, 2, 3], (1, 1))
    assert found.mask.tolist() == [[3]] and (found.overlaps, found.ties) == (1, 0)


def test_nothing_claimed_is_background():
    assert not resolve(np.zeros((2, 3, 4)), [1, 2], (3, 4)).mask.any()
    assert resolve(np.zeros((0, 3, 4)), [], (3, 4)).mask.shape == (3, 4)


def test_what_all_say_is_a_label():
    a = np.array([[0, 1, 2, 255, 1]], np.uint8)
    b = np.array([[0, 1, 3, 1, 255]], np.uint8)
    c = np.array([[0, 2, 2, 255, 1]], np.uint8)
    assert agreed([a, b]).tolist() == [[0, 1, 255, 255, 255]]
    assert agreed([a, b, c]).tolist() == [[0, 255, 255, 255, 255]]
    assert agreed([a, a]).tolist() == a.tolist() and agreed([a, b]).dtype == np.uint8
