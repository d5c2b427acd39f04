"""Bootstrap intervals, skipped images and costs against cases computed by hand."""

import math
from itertools import product

import numpy as np
import pytest

from dd.budget import Prices, bootstrap, cost, images_for, images_skipped


def image(hit0, miss0, hit1, miss1):
    """Two classes: ``miss0`` pixels of class 0 predicted as 1, ``miss1`` of class 1 as 0."""
    return [[hit0, miss0], [miss1, hit1]]


def by_hand(matrices):
    total = np.sum(matrices, axis=0)
    ious = []
    for c in range(len(total)):
        union = total[c].sum() + total[:, c].sum() - total[c, c]
        if union:
            ious.append(total[c, c] / union)
    return 100 * sum(ious) / len(ious)


def test_the_interval_is_that_of_all_resamplings_of_three_images():
    images = np.array([image(10, 0, 10, 0), image(5, 5, 5, 5), image(9, 1, 2, 8)])
    every = sorted(by_hand(images[list(choice)]) for choice in product(range(3), repeat=3))  # 27 equally likely draws
    low, high = bootstrap(images, draws=20000, level=0.8)
    assert low == pytest.approx(np.percentile(every, 10), abs=0.5) and high == pytest.approx(np.percentile(every, 90), abs=0.5)


def test_equal_images_have_no_spread_and_a_paired_difference_cancels():
    same = np.array([image(8, 2, 7, 3)] * 5)
    low, high = bootstrap(same, draws=50)
    assert low == pytest.approx(high) == pytest.approx(by_hand(same))
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 50, (20, 3, 3))
    assert bootstrap(noisy, noisy, draws=50) == (0, 0)
    assert bootstrap(noisy, draws=200, seed=1) == bootstrap(noisy, draws=200, seed=1)


def test_a_better_run_has_a_difference_above_zero():
    rng = np.random.default_rng(0)
    worse = np.stack([image(*rng.integers(20, 30, 4)) for _ in range(30)])
    better = worse + np.array(image(40, 0, 40, 0))
    low, high = bootstrap(better, worse, draws=300)
    assert 0 < low < high


def test_a_class_that_occurs_nowhere_is_left_out():
    confusion = np.zeros((4, 3, 3), int)
    confusion[:, 0, 0], confusion[:, 1, 1], confusion[:, 1, 0] = 6, 3, 3
    low, high = bootstrap(confusion, draws=20)
    assert low == high == pytest.approx(100 * (6 / 9 + 3 / 6) / 2)


def test_runs_on_other_images_are_not_compared():
    with pytest.raises(ValueError, match=r"same images and classes"):
        bootstrap(np.ones((4, 2, 2), int), np.ones((5, 2, 2), int))
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap(np.ones((0, 2, 2), int))


CURVE = {16: 40.0, 64: 60.0, 256: 70.0}


def test_the_number_of_images_is_read_off_in_logarithms():
    assert images_for(CURVE, 50.0) == pytest.approx(32)  # half-way between 16 and 64 in log(k)
    assert images_for(CURVE, 65.0) == pytest.approx(128)
    assert images_for(CURVE, 30.0) == 16 and images_for(CURVE, 40.0) == 16 and images_for(CURVE, 70.0) == pytest.approx(256)
    assert images_for(CURVE, 70.1) is None
    assert images_for({0: 0.0, 10: 50.0}, 25.0) == pytest.approx(5)


def test_a_dip_in_the_curve_counts_its_first_crossing():
    assert images_for({16: 40.0, 64: 60.0, 128: 55.0, 256: 70.0}, 58.0) < 64


def test_skipped_images_have_a_sign_and_a_bound():
    found = images_skipped({0: 50.0, 16: 60.0, 64: 35.0, 256: 72.0}, CURVE)
    assert found[0] == {"needed": pytest.approx(32), "skipped": pytest.approx(32)}
    assert found[16]["skipped"] == pytest.approx(48)
    assert found[64] == {"needed": 16, "skipped": -48}
    assert found[256] == {"needed": None, "skipped": None, "at_least": 0}


def test_costs_by_hand():
    prices = Prices(minutes_per_image=6, per_hour=30, per_gpu_hour=1.8)
    assert cost(100, 2000, prices) == {"labelling": 300, "computing": pytest.approx(1.0), "total": pytest.approx(301)}
    with pytest.raises(ValueError, match="per_hour=-1"):
        Prices(per_hour=-1)
    with pytest.raises(ValueError, match="minutes_per_image"):
        Prices(minutes_per_image=math.inf)
    with pytest.raises(ValueError, match="empty"):
        images_for({}, 1.0)
