"""Plans of a study and costs, against cases computed by hand."""

import math

import pytest

from dd.evaluation.budget import ARMS, Plan, Prices, check_targets, cost, edge, rate_at


def test_costs_by_hand():
    prices = Prices(minutes_per_image=6, per_hour=30, per_gpu_hour=1.8)
    assert cost(100, 2000, prices) == {
        "labelling": 300,
        "computing": pytest.approx(1.0),
        "total": pytest.approx(301),
    }
    with pytest.raises(ValueError, match="per_hour=-1"):
        Prices(per_hour=-1)
    with pytest.raises(ValueError, match="minutes_per_image"):
        Prices(minutes_per_image=math.inf)


# The plan

RATES = {"synthetic": 1e-3, "finetune": 3e-4, "mixed": 1e-3, "real": 1e-3, "real_short": 1e-3}


def plan(**changes):
    given = {
        "shots": [0, 16, "all"],
        "seeds": [0, 1],
        "domains": {"here": 100, "there": 50},
        "arms": list(ARMS),
        "synthetic_steps": 240,
        "finetune_steps": 60,
        "own_rates": RATES,
        "learning_rates": {},
        "choose": {"shots": 16, "seed": 0},
        "judged_on": "12 images of here/tune",
        "draws": ["drawn"],
    }
    return Plan(**{**given, **changes})


def test_arms_take_equal_steps_and_the_same_images():
    for k, steps in (
        (0, {"finetune": 300, "mixed": 300}),
        (16, dict.fromkeys(ARMS, 300) | {"real_short": 60}),
    ):
        jobs = {arm: plan().job(arm, "there", k, 1, RATES) for arm in ARMS}
        assert {arm: job.total_steps for arm, job in jobs.items() if job} == steps
    assert {(j.domain, j.shots, j.seed) for j in jobs.values()} == {("there", 16, 1)}
    assert (jobs["finetune"].steps, jobs["finetune"].after.steps, jobs["finetune"].after.seed) == (
        60,
        240,
        1,
    )
    assert all(jobs[arm].after is None for arm in ("mixed", "real", "real_short"))
    alone = plan().job("finetune", "here", 0, 1, RATES)
    assert (
        alone == plan().job("mixed", "there", 0, 1, RATES)
        and alone.domain is None
        and alone.recipe == "synthetic"
    )


def test_without_a_learning_rate_there_is_no_job():
    assert plan().job("finetune", "here", 16, 0, {"finetune": 1e-3}) is None
    assert plan().job("real", "here", 16, 0, {"real": 1e-3}).learning_rate == 1e-3


def test_candidates_are_trained_at_one_place_only():
    study = plan(
        learning_rates={"finetune": [1e-4, 1e-3], "real": None, "mixed": [0.5]},
        choose={"shots": "all", "seed": 7},
    )
    job = study.candidate("finetune", 1e-4, {"synthetic": 2e-3}, "all", 7)
    assert (job.domain, job.shots, job.seed, job.learning_rate, job.steps) == (
        "here",
        "all",
        7,
        1e-4,
        60,
    )
    assert (job.after.learning_rate, job.after.seed, job.after.steps) == (2e-3, 7, 240)
    assert study.candidates("finetune") == [1e-4, 1e-3] and study.candidates("real") == [1e-3]
    nothing = plan(learning_rates={"finetune": [1e-4, 1e-3], "mixed": [0.5]}, judged_on=None)
    assert nothing.candidates("finetune") == [3e-4] and nothing.candidates("mixed") == [0.5]


def test_each_draw_has_runs_of_its_own_but_for_the_controls():
    study = plan(draws=["one", "two"])
    fine = study.job("finetune", "here", 16, 1, RATES, "two")
    assert fine.draw == fine.after.draw == "two"
    assert study.job("mixed", "here", 16, 1, RATES, "two").draw == "two"
    alone = [study.job("finetune", "here", 0, 1, RATES, draw) for draw in (None, "two")]
    assert [job.draw for job in alone] == ["one", "two"]
    real = [study.job("real", "here", 16, 1, RATES, draw) for draw in ("one", "two")]
    assert real[0] == real[1] and real[0].draw is None
    assert study.candidate("mixed", 1e-3, RATES, 16, 0).draw == "one"


def test_shots_without_a_choice_take_that_of_the_nearest_fewer():
    rates = {64: 1e-3, 16: 3e-3, "all": 1e-4}
    found = [rate_at(rates, k) for k in (2, 16, 63, 64, 700, "all")]
    assert found == [3e-3, 3e-3, 3e-3, 1e-3, 1e-3, 1e-4]
    assert rate_at(0.5, 16) == 0.5 and rate_at({16: None, 64: 1e-3}, 20) is None
    study = plan(shots=[0, 8, 16, 32, "all"], choose={"shots": "each", "seed": [0, 1]})
    assert study.choice_shots() == [8, 16, 32, "all"] and study.choice_seeds() == [0, 1]
    several = {**RATES, "real": {16: 1e-3, "all": 3e-3}, "finetune": {16: None, "all": 1e-4}}
    steps = [study.job("real", "here", k, 0, several).learning_rate for k in (8, 16, 32, "all")]
    assert steps == [1e-3, 1e-3, 1e-3, 3e-3]
    assert study.job("finetune", "here", 32, 0, several) is None  # its choice is still to be made
    assert study.job("finetune", "here", "all", 0, several).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("chosen", "candidates", "found"),
    [
        (3e-3, [1e-3, 3e-3], {"end": "highest", "add": 9e-3}),
        (1e-3, [3e-3, 1e-3], {"end": "lowest", "add": 3.3e-4}),
        (3e-3, [1e-3, 3e-4, 3e-3], {"end": "highest", "add": 9e-3}),
        (1e-3, [1e-3, 3e-4, 3e-3], None),
        (1e-3, [1e-3], None),
    ],
)
def test_a_choice_at_the_edge_of_its_grid_says_what_to_add(chosen, candidates, found):
    assert edge(chosen, candidates) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": []}, r"study.shots=\[\]"),
        ({"shots": [16, 16]}, "without repetition"),
        ({"shots": [-1]}, "study.shots"),
        ({"shots": [True]}, "study.shots"),
        ({"shots": 16}, "study.shots=16"),
        ({"shots": [64]}, "of there holds 50"),
        ({"shots": [50, "all"]}, "50 and all are the same images of there"),
        ({"seeds": [0, 0]}, "study.seeds"),
        ({"seeds": ["0"]}, "each a whole number of 0 or more"),
        ({"arms": ["fine"]}, "finetune, mixed, real, real_short"),
        ({"arms": ["real"]}, "includes 0, synthetic images alone"),
        ({"domains": {}}, "study.domains"),
        ({"choose": {"shots": 0, "seed": 0}}, "study.choose"),
        ({"choose": {}}, "study.choose"),
        (
            {"choose": {"shots": 51, "seed": 0}},
            "51 shots, but the training split of there holds 50",
        ),
        ({"choose": {"shots": [16, 16], "seed": 0}}, "without repetition"),
        ({"choose": {"shots": [], "seed": 0}}, "study.choose"),
        ({"choose": {"shots": 16, "seed": [0, -1]}}, "study.choose"),
        ({"choose": {"shots": [16, 0], "seed": 0}}, "study.choose"),
        ({"draws": []}, r"study.synthetic=\[\]"),
        ({"draws": ["a", "a"]}, "different synthetic sets"),
        ({"learning_rates": {"real": [0]}}, r"learning_rates.real=\[0\]"),
        ({"learning_rates": {"real": 1e-3}}, "list"),
        ({"learning_rates": {"real": [1e-3, 1e-3]}}, "different"),
        ({"learning_rates": {"fine": [1e-3]}}, "recipes"),
    ],
)
def test_plans_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_targets_are_a_list_of_numbers():
    with pytest.raises(ValueError, match="study.targets=60"):
        check_targets(60)
    with pytest.raises(ValueError, match="study.targets"):
        check_targets(["60"])
    check_targets(None)
