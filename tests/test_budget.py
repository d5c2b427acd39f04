"""Bootstrap intervals, skipped images and costs against cases computed by hand; plans of a study."""

import math
from itertools import product

import numpy as np
import pytest

from dd.budget import (
    ARMS,
    Plan,
    Prices,
    bootstrap,
    check_targets,
    cost,
    curves,
    images_for,
    images_skipped,
    means,
    skipped,
    target_cost,
    target_costs,
)


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


# The plan

RATES = {"synthetic": 1e-3, "finetune": 3e-4, "mixed": 1e-3, "real": 1e-3, "real_short": 1e-3}


def plan(**changes):
    given = {"shots": [0, 16, "all"], "seeds": [0, 1], "domains": {"here": 100, "there": 50}, "arms": list(ARMS),
             "synthetic_steps": 240, "finetune_steps": 60, "own_rates": RATES, "learning_rates": {},
             "choose": {"shots": 16, "seed": 0}, "judged_on": "12 images of here/tune"}  # fmt: skip
    return Plan(**{**given, **changes})


def test_arms_take_equal_steps_and_the_same_images():
    for k, steps in ((0, {"finetune": 300, "mixed": 300}), (16, dict.fromkeys(ARMS, 300) | {"real_short": 60})):
        jobs = {arm: plan().job(arm, "there", k, 1, RATES) for arm in ARMS}
        assert {arm: job.total_steps for arm, job in jobs.items() if job} == steps
    assert {(j.domain, j.shots, j.seed) for j in jobs.values()} == {("there", 16, 1)}
    assert (jobs["finetune"].steps, jobs["finetune"].after.steps, jobs["finetune"].after.seed) == (60, 240, 1)
    assert all(jobs[arm].after is None for arm in ("mixed", "real", "real_short"))
    alone = plan().job("finetune", "here", 0, 1, RATES)
    assert alone == plan().job("mixed", "there", 0, 1, RATES) and alone.domain is None and alone.recipe == "synthetic"


def test_without_a_learning_rate_there_is_no_job():
    assert plan().job("finetune", "here", 16, 0, {"finetune": 1e-3}) is None
    assert plan().job("real", "here", 16, 0, {"real": 1e-3}).learning_rate == 1e-3


def test_candidates_are_trained_at_one_place_only():
    study = plan(learning_rates={"finetune": [1e-4, 1e-3], "real": None, "mixed": [0.5]}, choose={"shots": "all", "seed": 7})
    job = study.candidate("finetune", 1e-4, {"synthetic": 2e-3})
    assert (job.domain, job.shots, job.seed, job.learning_rate, job.steps) == ("here", "all", 7, 1e-4, 60)
    assert (job.after.learning_rate, job.after.seed, job.after.steps) == (2e-3, 7, 240)
    assert study.candidates("finetune") == [1e-4, 1e-3] and study.candidates("real") == [1e-3]
    nothing = plan(learning_rates={"finetune": [1e-4, 1e-3], "mixed": [0.5]}, judged_on=None)
    assert nothing.candidates("finetune") == [3e-4] and nothing.candidates("mixed") == [0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": []}, r"budget.shots=\[\]"), ({"shots": [16, 16]}, "without repetition"), ({"shots": [-1]}, "budget.shots"),
        ({"shots": [True]}, "budget.shots"), ({"shots": 16}, "budget.shots=16"), ({"shots": [64]}, "of there holds 50"),
        ({"shots": [50, "all"]}, "50 and all are the same images of there"), ({"seeds": [0, 0]}, "budget.seeds"),
        ({"seeds": ["0"]}, "whole numbers"), ({"arms": ["fine"]}, "finetune, mixed, real, real_short"),
        ({"arms": ["real"]}, "holds 0, synthetic images alone"), ({"domains": {}}, "budget.domains"),
        ({"choose": {"shots": 0, "seed": 0}}, "budget.choose"), ({"choose": {}}, "budget.choose"),
        ({"choose": {"shots": 51, "seed": 0}}, "51 shots, but the training split of there holds 50"),
        ({"learning_rates": {"real": [0]}}, r"learning_rates.real=\[0\]"), ({"learning_rates": {"real": 1e-3}}, "list"),
        ({"learning_rates": {"real": [1e-3, 1e-3]}}, "different"), ({"learning_rates": {"fine": [1e-3]}}, "recipes"),
    ],
)  # fmt: skip
def test_plans_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


# What a study found

FOUND = {
    "finetune": {"0": {"d": [40.0, 60.0]}, "16": {"d": [59.0, 61.0]}, "all": {"d": [72.0, 74.0]}},
    "real": {"16": {"d": [38.0, 42.0]}, "64": {"d": [60.0, 60.0]}, "all": {"d": [70.0, None]}},
}
SIZES = {"d": 256}


def test_curves_have_the_mean_and_the_spread_of_the_seeds_that_are_there():
    fine, real = curves(FOUND, SIZES)
    assert (fine["k"], fine["mean"], fine["label"]) == ([0, 16, 256], [50, 60, 73], "synthetic, then real")
    assert fine["sd"] == pytest.approx([math.sqrt(200), math.sqrt(2), math.sqrt(2)])
    assert (real["k"], real["sd"], real["seeds"]) == ([16, 64, 256], [pytest.approx(math.sqrt(8)), 0, None], [2, 2, 1])


def test_a_point_without_all_seeds_is_not_compared():
    assert means(FOUND["real"], "d", 256) == {16: 40, 64: 60}
    assert means({"16": {}}, "d", 256) == {}


def test_skipped_images_of_a_study_by_hand():
    found = skipped(FOUND, SIZES)
    assert list(found) == ["finetune"] and list(found["finetune"]) == ["real"]
    at = found["finetune"]["real"]["d"]
    assert at[0] == {"needed": pytest.approx(32), "skipped": pytest.approx(32)}  # 50 is half-way from 40 to 60: sqrt(16 * 64)
    assert at[16]["skipped"] == pytest.approx(48)
    assert at[256] == {"needed": None, "skipped": None, "at_least": -192}  # 64 is the last complete point of the control
    assert skipped({"real": FOUND["real"]}, SIZES) == {} and skipped({"finetune": FOUND["finetune"]}, SIZES) == {
        "finetune": {}
    }


def test_the_cost_of_a_target_by_hand():
    prices, seconds = Prices(minutes_per_image=6, per_hour=30, per_gpu_hour=3.6), {16: 1000.0, 64: 2000.0}
    at = target_cost(50.0, {16: 40.0, 64: 60.0}, seconds, prices)
    assert at == {
        "images": 32,
        "labels": 32,
        "gpu_seconds": 2000.0,
        "labelling": 96.0,
        "computing": pytest.approx(2.0),
        "total": pytest.approx(98),
    }
    more = target_cost(50.0, {16: 40.0, 64: 60.0}, seconds, prices, lambda images: images + 8)
    assert (more["images"], more["labels"], more["labelling"]) == (32, 40, 120.0)
    assert target_cost(40.0, {16: 40.0, 64: 60.0}, seconds, prices)["gpu_seconds"] == 1000
    assert target_cost(50.1, {16: 40.0, 64: 60.0}, seconds, prices)["images"] == 33  # whole images, rounded up
    assert target_cost(61.0, {16: 40.0, 64: 60.0}, seconds, prices) == {"images": None, "more_than": 64}


def test_targets_are_what_the_control_reaches():
    seconds = {arm: {k: {"d": [100.0, 300.0]} for k in values} for arm, values in FOUND.items()}
    rows = target_costs(FOUND, seconds, SIZES, Prices(60, 1.0, 0.0))["d"]
    assert [(r["target"], r["why"]) for r in rows] == [
        (40, "real only, equal total steps, 16 images"), (60, "real only, equal total steps, 64 images")
    ]  # fmt: skip
    assert [{arm: at["images"] for arm, at in r["arms"].items()} for r in rows] == [
        {"finetune": 0, "real": 16}, {"finetune": 16, "real": 64}
    ]  # fmt: skip
    real = {"images": 64, "labels": 64, "gpu_seconds": 200, "labelling": 64.0, "computing": 0, "total": 64.0}
    assert rows[1]["arms"]["real"] == real
    rows = target_costs(FOUND, seconds, SIZES, Prices(60, 1.0, 0.0), None, lambda arm, domain, k: k + 5 * (arm == "real"))["d"]
    assert [rows[1]["arms"][arm]["labels"] for arm in ("finetune", "real")] == [16, 69]
    (row,) = target_costs(FOUND, seconds, SIZES, Prices(), [80.0])["d"]
    assert row["arms"] == {"finetune": {"images": None, "more_than": 256}, "real": {"images": None, "more_than": 64}}
    assert target_costs({"real": {"16": {"d": [None]}}}, {"real": {"16": {"d": [None]}}}, SIZES, Prices()) == {"d": []}


def test_targets_are_a_list_of_numbers():
    with pytest.raises(ValueError, match="budget.targets=60"):
        check_targets(60)
    with pytest.raises(ValueError, match="budget.targets"):
        check_targets(["60"])
    check_targets(None)
