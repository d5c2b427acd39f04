"""Intervals against values worked out by hand or by scipy, and by how often they hold the truth."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from dd.evaluation.statistics import Interval, Score, holm, interval, miou


def confusions(rng, n, share):
    """n images of 100 pixels, two classes, a ``share`` of the pixels right."""
    right = rng.binomial(50, share, size=(n, 2))
    return np.stack(
        [[[right[i, 0], 50 - right[i, 0]], [50 - right[i, 1], right[i, 1]]] for i in range(n)]
    )


def test_seeds_alone_give_students_paired_interval():
    a, b = [70.0, 72.0, 75.0], [71.0, 72.5, 77.0]
    found = interval({i: Score(v) for i, v in enumerate(a)}, {i: Score(v) for i, v in enumerate(b)})
    expected = stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((-3.5 / 3, low, high))
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.runs, found.seeds, found.images) == (3, 3, None)


def test_pairing_is_by_seed_and_not_by_order():
    a = {2: Score(75.0), 0: Score(70.0), 1: Score(72.0)}
    b = {0: Score(69.0), 1: Score(71.0), 2: Score(74.0), 7: Score(0.0)}
    found = interval(a, b)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    assert not found.holds_zero


def test_images_alone_give_the_bootstraps_interval():
    rng = np.random.default_rng(0)
    matrices = confusions(rng, 400, 0.9)
    found = interval({0: Score(float(miou(matrices.sum(0))), matrices)})
    drawn = [
        miou(matrices[rng.integers(0, 400, 400)].sum(0)) for _ in range(2000)
    ]  # an independent bootstrap
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.1)
    assert found.high == pytest.approx(high, abs=0.1)
    assert found.p is None and found.images == 400


def test_the_variance_of_the_images_is_that_of_all_their_resamplings():
    """Three images have 27 equally likely draws, each scored here by hand."""
    images = np.array([[[10, 0], [0, 10]], [[5, 5], [5, 5]], [[9, 1], [8, 2]]])

    def by_hand(total):
        return 50 * sum(
            total[c, c] / (total[c].sum() + total[:, c].sum() - total[c, c]) for c in (0, 1)
        )

    every = [by_hand(images[list(choice)].sum(0)) for choice in product(range(3), repeat=3)]
    error = np.sqrt(np.var(every) * 3 / 2)  # a bootstrap of n is too narrow by (n - 1) / n
    found = interval({0: Score(by_hand(images.sum(0)), images)}, draws=20000)
    assert found.high - found.value == pytest.approx(error * stats.t.ppf(0.975, 2), rel=0.03)


def test_equal_images_have_no_spread_and_a_class_that_is_nowhere_is_left_out():
    confusion = np.zeros((4, 3, 3), int)
    confusion[:, 0, 0], confusion[:, 1, 1], confusion[:, 1, 0] = 6, 3, 3
    score = 100 * (6 / 9 + 3 / 6) / 2
    found = interval({0: Score(score, confusion)})
    assert miou(confusion.sum(0)) == pytest.approx(score)
    assert (found.low, found.high) == pytest.approx((score, score))
    noisy = np.random.default_rng(0).integers(1, 50, (20, 3, 3))
    same = interval({0: Score(40.0, noisy)}, {0: Score(40.0, noisy)})
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_nothing_is_said_of_one_run_without_images():
    found = interval({0: Score(70.0)}, {0: Score(60.0)})
    assert found == Interval(10.0, None, None, None, 1, 1, None)
    assert found.holds_zero and not found.decides


def test_few_images_or_seeds_decide_nothing():
    shown = Interval(5.0, 4.0, 6.0, 0.001, 3, 3, 30)
    assert shown.decides
    assert not Interval(5.0, 4.0, 6.0, 0.001, 3, 3, 29).decides
    assert not Interval(5.0, 4.0, 6.0, 0.001, 4, 2, 512).decides
    assert not Interval(5.0, -1.0, 6.0, 0.2, 3, 3, 512).decides


def test_crossed_draws_and_seeds_widen_the_interval():
    """A spread between draws counts as one of two draws, not of six independent runs."""
    values = {(s, d): Score(70.0 + 4.0 * d + 0.1 * s) for s in range(3) for d in range(2)}
    six = dict(enumerate(values.values()))
    crossed, naive = interval(values), interval(six)
    assert crossed.value == naive.value
    assert crossed.high - crossed.low > 5 * (naive.high - naive.low)
    assert (crossed.runs, crossed.seeds) == (6, 3)


def test_unbalanced_draws_are_averaged_within_their_seed():
    values = {(0, "a"): Score(70.0), (0, "b"): Score(74.0), (1, "a"): Score(71.0)}
    found = interval(values)
    low, high = stats.t.interval(0.95, 1, loc=np.mean([72, 71]), scale=stats.sem([72, 71]))
    assert found.high - found.low == pytest.approx(high - low)


@pytest.mark.parametrize("spread, noise", [(0.0, 1.0), (2.0, 0.3), (1.0, 1.0)])
def test_95_percent_intervals_hold_the_truth_at_least_that_often(spread, noise):
    """Seeds move an arm by ``spread`` points; each image adds its own, seeds share the images."""
    rng, held, trials = np.random.default_rng(1), 0, 200
    truth = float(miou(np.array([[45, 5], [5, 45]])))
    for _ in range(trials):
        base = confusions(rng, 60, 0.9) if noise else np.tile([[45, 5], [5, 45]], (60, 1, 1))
        shift = rng.normal(0, spread, 3)
        scores = {s: Score(float(miou(base.sum(0))) + shift[s], base) for s in range(3)}
        found = interval(scores, draws=100)
        held += found.low <= truth <= found.high
    assert held / trials >= 0.93


def test_other_images_cannot_be_paired():
    a, b = np.ones((4, 2, 2), int), np.ones((5, 2, 2), int)
    with pytest.raises(ValueError, match=r"\[4, 2, 2\], \[5, 2, 2\].*same images and classes"):
        interval({0: Score(50.0, a)}, {0: Score(50.0, b)})
    with pytest.raises(ValueError, match="same seed"):
        interval({0: Score(50.0)}, {1: Score(50.0)})


def test_holm_as_published():
    """Holm's step-down on four p-values, worked out by hand; a larger p is never adjusted lower."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
