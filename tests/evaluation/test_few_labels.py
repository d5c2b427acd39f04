import numpy as np
import pytest

from dd.evaluation.few_labels import (
    LEAST_OF_CLASS,
    estimate,
    image_miou,
    influence,
    label_more,
    pseudo_values,
    sums,
)


def world(size=400, classes=4, trust=0.8, seed=0):
    """(true, predicted) sums [N, C, 2] of images whose quality differs; ``trust``: how much of it
    the predictions know."""
    rng = np.random.default_rng(seed)
    quality = rng.beta(6, 2, size)
    guess = np.clip(trust * quality + (1 - trust) * rng.beta(6, 2, size), 0, 1)
    there = rng.random((size, classes)) < 0.5
    there[:, 0] = True
    pixels = np.where(there, rng.integers(50, 500, (size, classes)), 0)
    found = []
    for share in (quality, guess):
        noisy = np.clip(share[:, None] + rng.normal(0, 0.05, (size, classes)), 0, 1)
        found.append(np.stack([(pixels * noisy).round(), pixels], -1).astype(np.int64))
    return found


def miou(each):
    total = each.sum(0)
    return 100 * (total[:, 0] / total[:, 1]).mean()


def test_sums_of_one_image():
    mask = np.array([[0, 1, 1], [2, 255, 2]])
    truth = np.array([[0, 1, 2], [2, 1, 255]])
    # background: 1 hit, and the uncertain pixel counts as it; class 1: 1 of 3; class 2: 1 of 2
    assert sums(mask, truth, 4).tolist() == [[1, 2], [1, 3], [1, 2], [0, 0]]
    with pytest.raises(ValueError, match="a truth holds the value 4; allowed: 0..3, and 255"):
        sums(mask, np.full((2, 3), 4), 4)


def test_the_mean_over_the_classes_of_an_image():
    each = np.array([[[1, 2], [1, 4], [0, 0]], [[3, 3], [0, 0], [0, 5]]])
    assert image_miou(each).tolist() == [37.5, 50.0]


def test_all_images_labelled_give_the_very_number():
    true, predicted = world(60)
    found = estimate(true, range(60), predicted)
    assert found.low == pytest.approx(found.miou) == pytest.approx(found.high)
    # the jackknife takes out the bias of a ratio, which a whole set has not; it is small
    assert found.miou == pytest.approx(miou(true), abs=0.05)
    assert label_more(found) == "every image is labelled"


def test_pseudo_values_are_the_jackknifes():
    true, _ = world(12)
    without = [miou(np.delete(true, i, 0)) for i in range(12)]
    expected = 12 * miou(true) - 11 * np.array(without)
    np.testing.assert_allclose(pseudo_values(true), expected)


def test_influence_is_the_slope_of_the_mean():
    true, _ = world(30)
    step = 1e-6
    for i in (0, 7):
        weights = np.ones(30)
        weights[i] += step
        moved = (weights[:, None, None] * true).sum(0)
        slope = (100 * (moved[:, 0] / moved[:, 1]).mean() - miou(true)) / step
        assert influence(true)[i] == pytest.approx(30 * slope, rel=1e-3, abs=1e-3)
    assert influence(true).mean() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("trust", "shorter"), [(0.95, True), (0.0, False)])
def test_predictions_that_know_something_shorten_the_interval(trust, shorter):
    true, predicted = world(trust=trust)
    ratio, used = [], 0
    for seed in range(40):
        chosen = np.random.default_rng(seed).choice(400, 60, replace=False)
        found = estimate(true[chosen], chosen, predicted)
        ratio.append((found.high - found.low) / (found.plain_high - found.plain_low))
        used += found.used
    if shorter:
        assert np.mean(ratio) < 0.7 and used == 40
    else:
        assert np.mean(ratio) > 0.98 and used < 16


@pytest.mark.parametrize("trust", [0.9, 0.3])
@pytest.mark.parametrize("number", [20, 60])
def test_intervals_hold_the_truth_as_often_as_they_say(trust, number):
    true, predicted = world(trust=trust)
    rng, held, plain = np.random.default_rng(1), [], []
    for _ in range(1500):
        chosen = rng.choice(400, number, replace=False)
        found = estimate(true[chosen], chosen, predicted)
        target = miou(true[:, list(found.classes)])
        held.append(found.low <= target <= found.high)
        plain.append(found.plain_low <= target <= found.plain_high)
    # 1,500 draws of 95 %: a standard error of 0.6 points
    assert 0.925 < np.mean(held) < 0.972 and 0.925 < np.mean(plain) < 0.972


def test_rare_classes_are_named_and_left_out():
    true, predicted = world(100)
    true[:, 3] = 0
    true[: LEAST_OF_CLASS - 1, 3] = [5, 10]
    predicted[50, 2] = [1, 2]
    true[:, 2] = 0
    found = estimate(true[:40], range(40), predicted)
    assert found.classes == (0, 1) and found.rare == {3: LEAST_OF_CLASS - 1, 2: 0}


def test_how_many_labels_are_missing():
    true, predicted = world()
    chosen = np.random.default_rng(0).choice(400, 30, replace=False)
    found = estimate(true[chosen], chosen, predicted, within=1.0)
    assert found.more and label_more(found) == f"label {found.more} more to be within ± 1"
    more = np.random.default_rng(0).choice(400, 30 + found.more, replace=False)
    again = estimate(true[more], more, predicted, within=1.0)
    assert (again.high - again.low) / 2 == pytest.approx(1.0, rel=0.35)
    wide = estimate(true[chosen], chosen, predicted, within=50.0)
    assert wide.more == 0 and label_more(wide) == "within ± 50"


def test_few_images_have_no_interval():
    true, predicted = world(100)
    with pytest.raises(
        ValueError, match="19 labelled images: an interval needs at least 20 of .*100"
    ):
        estimate(true[:19], range(19), predicted)


def test_labels_without_a_class_that_counts_have_no_interval():
    _, predicted = world(100)
    nothing = np.zeros((30, 4, 2), np.int64)
    with pytest.raises(ValueError, match="no class is in 5 of the 30 labelled images"):
        estimate(nothing, range(30), predicted)
    assert np.isnan(image_miou(nothing)).all()
