"""Images that a curve needs, as bounds, against cases worked out by hand."""

import math

import pytest

from dd.evaluation.savings import (
    Bounds,
    bounds_text,
    dips,
    images_for,
    images_skipped,
    middle,
    price_text,
    range_text,
    seeds_interval,
    skipped_text,
    spread,
    summary,
)
from dd.evaluation.statistics import Interval

CURVE = {16: 40.0, 64: 60.0, 256: 70.0}
GAIN = Interval(5.0, 4.0, 6.0, 0.001, 3, 3, 512)
LOSS = Interval(-5.0, -6.0, -4.0, 0.001, 3, 3, 512)
NOTHING = Interval(5.0, -1.0, 11.0, 0.1, 3, 3, 512)


def exactly(value):
    return Bounds(pytest.approx(value), pytest.approx(value))


def test_the_number_of_images_is_read_off_in_logarithms():
    assert images_for(CURVE, 50.0) == exactly(32)  # half-way between 16 and 64 in log(k)
    assert images_for(CURVE, 65.0) == exactly(128)
    assert images_for(CURVE, 70.0) == exactly(256)
    assert images_for({0: 0.0, 10: 50.0}, 25.0) == exactly(5)  # 0 has no logarithm


def test_what_was_not_measured_is_a_bound():
    assert images_for(CURVE, 1.0) == images_for(CURVE, 40.0) == Bounds(None, 16)
    assert images_for(CURVE, 70.1) == Bounds(256, None)
    assert images_for({}, 1.0) == Bounds()
    assert images_for({0: 50.0, 16: 60.0}, 40.0) == Bounds(0, 0)  # fewer than none there are not


def test_a_dip_in_the_curve_counts_its_first_crossing_and_is_told():
    dipping = {16: 40.0, 64: 60.0, 128: 55.0, 256: 70.0}
    assert images_for(dipping, 58.0) == images_for(CURVE, 58.0)
    assert dips(dipping, 58.0) and not dips(dipping, 50.0)
    assert not dips(dipping, 80.0) and not dips({}, 1.0)


def test_a_median_of_bounds_is_bounded_by_the_medians_of_their_ends():
    three = [Bounds(512, None), Bounds(141, 141), Bounds(90, 90)]
    assert middle(three) == Bounds(141, 141) and spread(three) == Bounds(90, None)
    assert middle([Bounds(None, 16), Bounds(None, 16), Bounds(20, 20)]) == Bounds(None, 16)
    assert middle([Bounds(10, 10), Bounds(20, 20)]) == Bounds(15, 15)
    assert middle([Bounds(10, 10), Bounds(20, None)]) == Bounds(15, None)
    assert spread([Bounds(), Bounds(3, 4)]) == Bounds()


def test_the_interval_over_seeds_is_students_in_log_k():
    needed = {0: exactly_read(10), 1: exactly_read(100), 2: exactly_read(1000)}
    half = 4.302653 * math.log(10) / math.sqrt(3)  # t of 2 degrees of freedom; sd log(10)
    found = seeds_interval(needed)
    assert found.low == pytest.approx(100 / math.exp(half), rel=1e-5)
    assert found.high == pytest.approx(100 * math.exp(half), rel=1e-5)
    assert seeds_interval({**needed, 3: Bounds(None, 16)}) is None
    assert seeds_interval({0: exactly_read(10)}) is None and seeds_interval({}) is None


def exactly_read(k):
    return Bounds(float(k), float(k))


def test_each_seed_is_read_off_its_own_control():
    """Behind the gap at 64 images: three seeds of the embedded benchmark's published study."""
    mious = {0: 79.62355769344026, 1: 77.20149080371979, 2: 73.20598244733722}
    control = {
        0: {16: 49.38378694885025, 64: 72.71345603178041, 256: 79.30364391461168, 768: 80.127526},
        1: {16: 53.081007452777165, 64: 74.22570382447988, 256: 79.05726238641405, 768: 74.62454},
        2: {16: 47.16342469899783, 64: 71.34355870564649, 256: 76.97788144005861, 768: 81.86183},
    }
    found = images_skipped(64, mious, control, GAIN)
    assert [round(run["low"]) for run in found["runs"]] == [328, 86, 37]
    assert [run["low"] for run in found["runs"]] == [run["high"] for run in found["runs"]]
    assert found["median"]["low"] == found["runs"][1]["low"] and found["falls_again"] == 1
    assert found["interval"]["low"] < 0 < found["interval"]["high"] and not found["shown"]
    assert skipped_text(found) == "not shown (37 to 328)"


def test_a_worthless_set_is_not_credited_with_the_smallest_control():
    """1 mIoU without real images, where 92 reach 57: at most these 92, and not 92."""
    control = dict.fromkeys(range(3), {92: 57.0, 183: 60.0})
    found = images_skipped(0, {0: 1.0, 1: 1.2, 2: 0.9}, control, LOSS)
    assert {(run["low"], run["high"]) for run in found["runs"]} == {(None, 92)}
    assert found["interval"] is None and skipped_text(found) == "at most 92 (92 or fewer)"


def test_a_loss_is_not_shown_as_nothing_skipped():
    """16 images reach 27.0 alone, and 22.1 behind synthetic ones; 64 of these are as good as 16."""
    control = {0: {16: 27.0, 64: 40.0}}
    assert skipped_text(images_skipped(16, {0: 22.1}, control, LOSS)) == "at most 0"
    assert skipped_text(images_skipped(64, {0: 22.1}, control, LOSS)) == "costs at least 48"
    unlike = images_skipped(
        64, {0: 22.1}, control, LOSS, matched=False
    )  # the control had more labels, no wonder
    assert (
        not unlike["shown"] and images_skipped(64, {0: 22.1}, control, GAIN, matched=False)["shown"]
    )
    half_way = images_skipped(64, {0: 33.5}, control, LOSS)
    assert half_way["runs"] == [{"seed": 0, "draw": None, "low": -32.0, "high": -32.0}]
    assert skipped_text(half_way) == "costs 32"


def test_nothing_is_shown_where_the_interval_holds_0():
    control = dict.fromkeys(range(3), CURVE)
    mious = {0: 60.5, 1: 65.0, 2: 69.0}
    shown = images_skipped(16, mious, control, GAIN)
    assert shown["shown"] and skipped_text(shown) == "112 (53 to 207)"
    assert not images_skipped(16, mious, control, NOTHING)["shown"]
    assert not images_skipped(16, mious, control, None)["shown"]
    assert not images_skipped(128, mious, control, GAIN)["shown"]  # 69 to 223 needed


def test_a_run_without_a_control_is_unknown_and_draws_are_named():
    found = images_skipped(16, {(0, "a"): 50.0, (1, "a"): 50.0}, {(0, "a"): CURVE}, GAIN)
    assert found["runs"][1] == {"seed": 1, "draw": "a", "low": None, "high": None}
    assert skipped_text(found) == "unknown (unknown)"


@pytest.mark.parametrize(
    ("ends", "text", "of_seeds"),
    [
        ((61.2, 61.2), "61", "61"),
        ((-106, -106), "costs 106", "−106"),
        ((None, 92), "at most 92", "92 or fewer"),
        ((None, -48), "costs at least 48", "−48 or fewer"),
        ((512, None), "at least 512", "512 or more"),
        ((-192, None), "costs at most 192", "−192 or more"),
        ((None, None), "unknown", "unknown"),
        ((20, 80), "20 to 80", "20 to 80"),
        ((-80, -20), "costs 20 to 80", "−80 to −20"),
        ((-80, 20), "−80 to 20", "−80 to 20"),
        ((0, 0), "0", "0"),
        ((-0.2, -0.2), "0", "0"),
    ],
)
def test_bounds_in_words(ends, text, of_seeds):
    assert bounds_text(*ends) == text and range_text(*ends) == of_seeds


@pytest.mark.parametrize(
    ("images", "price", "text"),
    [
        ([(64, 64)], [(213.4, 213.4)], "213 (64 images)"),
        ([(0, 0)], [(0.46, 0.46)], "0.46 (0 images)"),
        ([(None, 16)], [(None, 53.0)], "at most 53 (16 images)"),
        ([(768, None)], [(2560.0, None)], "more than 768 images"),
        ([(None, None)], [(None, None)], "unknown"),
        (
            [(64, 64), (60, 60), (71, 71)],
            [(213.4, 213.4), (200, 200), (237, 237)],
            "213 (64 images; 60 to 71)",
        ),
        ([(64, 64), (768, None)], [(213, 213), (2560, None)], "more than 416 images (64 or more)"),
    ],
)
def test_prices_in_words(images, price, text):
    found = {"images": images, "price": price}
    found = {what: summary({i: Bounds(*b) for i, b in enumerate(v)}) for what, v in found.items()}
    assert price_text(found) == text
