"""Differences, skipped images and prices of a study, against cases computed by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from dd.evaluation.budget import Prices
from dd.evaluation.budget_results import (
    Measured,
    curves,
    differences,
    skipped,
    target_cost,
    target_costs,
)
from dd.evaluation.savings import Bounds
from dd.evaluation.statistics import miou

FOUND = {
    "finetune": {"0": {"d": [40.0, 60.0]}, "16": {"d": [59.0, 61.0]}, "all": {"d": [72.0, 74.0]}},
    "real": {"16": {"d": [38.0, 42.0]}, "64": {"d": [60.0, 60.0]}, "all": {"d": [70.0, None]}},
}
SIZES = {"d": 256}


def measured(arms=FOUND, seeds=(0, 1), draws=(None,), **more):
    return Measured(arms, SIZES, list(seeds), list(draws), **more)


def test_curves_have_the_mean_and_the_spread_of_the_runs_that_are_there():
    fine, real = curves(FOUND, SIZES)
    assert (fine["k"], fine["mean"], fine["label"]) == (
        [0, 16, 256],
        [50, 60, 73],
        "synthetic, then real",
    )
    assert fine["sd"] == pytest.approx([math.sqrt(200), math.sqrt(2), math.sqrt(2)])
    assert (real["k"], real["sd"], real["runs"]) == (
        [16, 64, 256],
        [pytest.approx(math.sqrt(8)), 0, None],
        [2, 2, 1],
    )


def test_a_missing_run_leaves_the_others_of_its_seed():
    found = measured()
    assert found.mious("real", 256, "d") == {0: 70.0} and found.means("real", "d") == {
        16: 40,
        64: 60,
    }
    assert found.curves_of("real", "d") == {
        0: {16: 38.0, 64: 60.0, 256: 70.0},
        1: {16: 42.0, 64: 60.0},
    }
    assert measured({"real": {"16": {}}}).points("real", "d") == []


def test_skipped_images_of_a_study_by_hand():
    found = skipped(measured())
    assert list(found) == ["finetune"] and list(found["finetune"]) == ["real"]
    at = found["finetune"]["real"]["d"]
    # seed 0: 40 is 2 of 22 points from 16 to 64 (log); seed 1: 60 is reached at 64
    first = 16 * 4 ** (2 / 22)
    assert [run["low"] for run in at[0]["runs"]] == pytest.approx([first, 64])
    assert at[0]["median"] == {
        "low": pytest.approx((first + 64) / 2),
        "high": pytest.approx((first + 64) / 2),
    }
    # with 16: 59 is 21 of 22 points; 61 is more than seed 1 reaches with its 64
    assert at[16]["runs"][0]["low"] == pytest.approx(16 * 4 ** (21 / 22) - 16)
    assert at[16]["runs"][1] == {"seed": 1, "draw": None, "low": 48.0, "high": None}
    assert at[16]["range"] == {"low": pytest.approx(16 * 4 ** (21 / 22) - 16), "high": None}
    assert [run["low"] for run in at[256]["runs"]] == [0, -192]
    # 2 and 18 more than the control's 16: holds 0; then 21 and 19: [7, 33]; one pair with 256
    assert {k: entry["shown"] for k, entry in at.items()} == {0: False, 16: True, 256: False}
    assert skipped(measured({"real": FOUND["real"]})) == {}
    assert skipped(measured({"finetune": FOUND["finetune"]})) == {"finetune": {}}


def test_differences_are_paired_over_seeds_and_adjusted_for_all_of_them():
    arms = {
        "finetune": {"0": {"d": [50.0, 60.0, 70.0]}, "16": {"d": [61.0, 71.5, 81.0]}},
        "mixed": {"0": {"d": [50.0, 60.0, 70.0]}, "16": {"d": [62.0, 70.0, 82.0]}},
        "real": {"16": {"d": [59.0, 69.0, 79.5]}},
        "real_short": {"16": {"d": [1.0, 2.0, 3.0]}},
    }
    rows = differences(measured(arms, seeds=(0, 1, 2)))
    what = [(r["arm"], r["k"], r["against"], r["against_k"]) for r in rows]
    assert what == [
        ("finetune", 0, "real", 16),
        ("finetune", 16, "real", 16),
        ("finetune", 16, "finetune", 0),
        ("mixed", 16, "real", 16),
        ("mixed", 16, "mixed", 0),
        ("mixed", 16, "finetune", 16),
    ]
    expected = stats.ttest_rel([61.0, 71.5, 81.0], [59.0, 69.0, 79.5])
    low, high = expected.confidence_interval(0.95)
    assert (rows[1]["value"], rows[1]["low"], rows[1]["high"]) == pytest.approx((2, low, high))
    assert rows[1]["p"] == pytest.approx(expected.pvalue)
    assert low > 0  # unpaired, the 10 points between seeds hide it
    assert (rows[1]["seeds"], rows[1]["runs"], rows[1]["images"]) == (3, 3, None)
    smallest = min(rows, key=lambda r: r["p"])
    assert smallest["p_holm"] == pytest.approx(6 * smallest["p"])
    assert all(r["p_holm"] >= r["p"] for r in rows)


def test_test_images_count_where_they_are_stored():
    rng = np.random.default_rng(0)
    stored = {}

    def per_image(arm, shots, domain, run):
        if (arm, run) not in stored:
            right = rng.binomial(50, 0.9 if arm == "real" else 0.95, size=(40, 2))
            stored[arm, run] = np.stack([[[a, 50 - a], [50 - b, b]] for a, b in right])
        return stored[arm, run]

    arms = {}
    for arm in ("mixed", "real"):
        values = [float(miou(per_image(arm, "16", "d", run).sum(0))) for run in range(3)]
        arms[arm] = {"16": {"d": values}}
    (row,) = differences(measured(arms, seeds=(0, 1, 2), per_image=per_image))
    (alone,) = differences(measured(arms, seeds=(0, 1, 2)))
    assert row["images"] == 40 and alone["images"] is None and row["value"] == alone["value"] > 0


def test_a_control_stands_beside_each_draw_of_its_seed():
    arms = {
        "mixed": {"16": {"d": [61.0, 65.0, 62.0, 66.0]}},  # seed 0: draws a, b; seed 1: a, b
        "real": {"16": {"d": [60.0, 61.0]}, "64": {"d": [70.0, 71.0]}},
    }
    found = measured(arms, draws=("a", "b"))
    (row,) = differences(found)
    assert row["value"] == pytest.approx(3) and (row["runs"], row["seeds"]) == (4, 2)
    assert row["low"] < 0 < row["high"]  # two draws, 4 apart: one degree of freedom
    runs = skipped(found)["mixed"]["real"]["d"][16]["runs"]
    assert [(r["seed"], r["draw"]) for r in runs] == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    assert [r["low"] for r in runs] == pytest.approx([16 * 4**s - 16 for s in (0.1, 0.5, 0.1, 0.5)])


def test_the_cost_of_a_target_by_hand():
    prices = Prices(minutes_per_image=6, per_hour=30, per_gpu_hour=3.6)
    seconds = {16: 1000.0, 64: 2000.0}
    curve = {16: 40.0, 64: 60.0}
    at = target_cost(50.0, curve, seconds, prices)  # 32 images at 3, 2,000 s at 0.001
    price = Bounds(pytest.approx(98), pytest.approx(98))
    assert at == {"images": Bounds(32, 32), "labels": Bounds(32, 32), "price": price}
    more = target_cost(50.0, curve, seconds, prices, lambda images: images + 8)  # 8 chose settings
    assert (more["images"], more["labels"]) == (Bounds(32, 32), Bounds(40, 40))
    assert more["price"].low == pytest.approx(98 + 8 * 3)
    rounded_up = target_cost(50.1, curve, seconds, prices)["images"]
    assert rounded_up == Bounds(33, 33)
    few, many = (target_cost(target, curve, seconds, prices) for target in (30.0, 61.0))
    assert (few["images"], few["price"]) == (Bounds(None, 16), Bounds(None, 49))
    assert (many["images"], many["price"]) == (Bounds(64, None), Bounds(194, None))


def test_targets_are_what_the_control_reaches_and_each_run_is_read_by_itself():
    seconds = {arm: {k: {"d": [100.0, 300.0]} for k in values} for arm, values in FOUND.items()}
    rows = target_costs(
        measured(), seconds, Prices(minutes_per_image=60, per_hour=1, per_gpu_hour=0)
    )["d"]
    assert [(r["target"], r["why"]) for r in rows] == [
        (40, "real only, equal total steps, 16 images"),
        (60, "real only, equal total steps, 64 images"),
    ]
    fine, real = rows[0]["arms"]["finetune"], rows[0]["arms"]["real"]
    assert [(r["low"], r["high"]) for r in fine["images"]["runs"]] == [(0, 0), (0, 0)]
    assert [(r["low"], r["high"]) for r in real["images"]["runs"]] == [(19, 19), (None, 16)]
    assert real["images"]["median"] == {"low": None, "high": 17.5}
    assert real["images"]["range"] == {"low": None, "high": 19}
    assert real["price"] == {**real["images"], "runs": real["price"]["runs"]}  # an image costs 1
    (row,) = target_costs(measured(), seconds, Prices(), [80.0])["d"]
    assert row["arms"]["finetune"]["images"]["median"] == {"low": 256, "high": None}
    assert row["arms"]["real"]["images"]["runs"][1] == {
        "seed": 1,
        "draw": None,
        "low": 64,
        "high": None,
    }
    labels = lambda arm, domain, k: k + 5 * (arm == "real")  # noqa: E731
    prices = Prices(minutes_per_image=60, per_hour=1, per_gpu_hour=0)
    more = target_costs(measured(), seconds, prices, None, labels)
    paid = {arm: at["labels"]["median"]["high"] for arm, at in more["d"][1]["arms"].items()}
    assert paid == {"finetune": 10, "real": 69}  # fine-tuned: 20 and 0 images
    empty = {"real": {"16": {"d": [None, None]}}}
    assert target_costs(measured(empty), empty, Prices()) == {"d": []}
