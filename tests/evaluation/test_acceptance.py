import numpy as np
import pytest
from scipy.stats import t as student

from dd.evaluation.acceptance import ClassIou, class_ious, decide


def images(hits, misses, alarms):
    """Confusions [N, 2, 2] of 100 pixels an image: of class 1 so many hits, misses and false
    alarms."""
    counts = np.zeros((len(hits), 2, 2), np.int64)
    counts[:, 1, 1], counts[:, 1, 0], counts[:, 0, 1] = hits, misses, alarms
    counts[:, 0, 0] = 100 - counts.sum((1, 2))
    return counts


def test_iou_and_interval_are_the_jackknife_by_hand():
    rng = np.random.default_rng(0)
    hits, misses, alarms = (rng.integers(1, 20, 12) for _ in range(3))
    found = class_ious(images(hits, misses, alarms))[1]
    whole = hits.sum() / (hits + misses + alarms).sum()
    each = []
    for i in range(12):
        rest = [j for j in range(12) if j != i]
        each.append(100 * hits[rest].sum() / (hits + misses + alarms)[rest].sum())
    error = np.sqrt(11 / 12 * sum((v - np.mean(each)) ** 2 for v in each))
    assert found.value == pytest.approx(100 * whole) and found.images == 12
    assert found.low == pytest.approx(100 * whole - student.ppf(0.975, 11) * error)
    assert found.high == pytest.approx(100 * whole + student.ppf(0.975, 11) * error)


def test_many_tests_widen_every_interval():
    counts = images(*(np.random.default_rng(1).integers(1, 20, (3, 40))))
    one, many = class_ious(counts)[1], class_ious(counts, tests=44)[1]
    assert many.low < one.low and many.high > one.high and many.value == one.value
    assert many.high - many.value == pytest.approx(student.ppf(1 - 0.025 / 44, 39) * one.error)


def test_a_rare_class_has_no_interval_and_an_absent_one_no_iou():
    counts = images([5] * 9 + [0] * 30, [5] * 9 + [0] * 30, [0] * 39)
    found = class_ious(counts)[1]
    assert (found.value, found.low, found.high, found.images) == (50.0, None, None, 9)
    absent = class_ious(images([0] * 30, [0] * 30, [0] * 30))[1]
    assert absent.value is None and absent.low is None
    assert decide([(0, absent)], 70).images == 10


def iou(value, half, number=40):
    return ClassIou(value, value - half, value + half, number, half / 2.0227, 0.95)


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        ([(0, iou(75, 5))], "accept"),
        ([(0, iou(74.9, 5))], "unknown"),
        ([(0, iou(50, 5)), (16, iou(72, 5)), (64, iou(80, 5))], "label 64 more"),
        ([(0, iou(50, 5)), (16, iou(72, 5))], "unknown with 16 more"),
        ([(0, iou(50, 5)), (16, iou(60, 5))], "label more than 16"),
        ([(16, iou(50, 5)), (64, iou(80, 5))], "label 48 more"),
        ([(0, ClassIou(90.0, None, None, 4, 1.0, 0.95))], "unknown"),
        ([(0, ClassIou(90.0, None, None, 4, 1.0, 0.95)), (16, iou(80, 5))], "label 16 more"),
    ],
)
def test_decisions(measured, text):
    assert decide(measured, 70).text == text


def test_the_images_that_would_tell_are_just_enough():
    found = iou(75, 8)
    more = found.more(70)

    def half(n):
        return student.ppf(0.975, n - 1) * found.error * np.sqrt(40 / n)

    assert half(40 + more) < 5 <= half(40 + more - 1)
    assert decide([(0, found)], 70).images == more
    assert iou(70.0001, 8).more(70) is None  # too near
    rare = ClassIou(90.0, None, None, 4, 1.0, 0.95)
    assert rare.more(70) == 6  # until there are ten


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Ten images of very unlike objects, as the fewest that get an interval."""
    rng, held, runs = np.random.default_rng(0), 0, 400
    share = rng.beta(6, 2, 200_000)
    sizes = rng.lognormal(6, 0.8, 200_000)
    truth = 100 * (share * sizes).sum() / sizes.sum()
    for _ in range(runs):
        chosen = rng.integers(0, len(share), 10)
        union = np.rint(sizes[chosen]).astype(int) + 1
        hit = np.rint(share[chosen] * union).astype(int)
        counts = np.zeros((10, 2, 2), int)
        counts[:, 1, 1], counts[:, 1, 0], counts[:, 0, 0] = hit, union - hit, 1000
        found = class_ious(counts)[1]
        held += found.low <= truth <= found.high
    assert held / runs > 0.9
