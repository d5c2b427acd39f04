"""The label-budget study: what it trains, skips, refuses and lists with a fake trainer; one real
run of train.py."""

import json
import logging
import sys
from collections import Counter

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from dd import config
from dd.data.datasets import choose_shots
from dd.evaluation.budget import ARMS, Job, Plan, Prices
from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.study import Measuring
from dd.stages.study import study as budget
from dd.store.locks import Busy, Lock
from dd.store.provenance import read_json, write_json
from tests.doors import door, watched

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


class Lab:
    """Trains at once, one second a step, and remembers what is finished. The best learning rate
    on tune is 1e-2."""

    def __init__(self):
        self.finished, self.trained, self.judged, self.scored = set(), [], [], []
        self.fails = lambda job: None

    def train(self, job):
        if job not in self.finished:
            if job.after is not None:
                assert job.after in self.finished, (
                    "the training that a run goes on from comes first"
                )
            if error := self.fails(job):
                raise error
            self.trained.append(job)
            self.finished.add(job)
        return {
            "run": f"{job.recipe}-{len(self.finished)}",
            "seconds": float(job.steps),
            "steps": job.steps,
        }

    def judge(self, job):
        self.train(job)
        self.judged.append(job)
        return 50 - 1000 * abs(job.learning_rate - 1e-2)

    def score(self, job, domain):
        self.scored.append((job, domain))
        images = {None: 0, "all": 100}.get(job.shots, job.shots)
        miou = 40.0 + 10 * (job.recipe not in ("real", "real_short")) + images / 10 + job.seed
        miou += 2.0 * (job.draw == "again")
        return {"miou": miou, "num_images": 30, "per_image": None}

    def study(self, folder, study=None, identity=None, **more):
        study = study or plan()
        return budget(
            folder,
            study,
            Measuring(self.train, self.judge, self.score),
            identity or {"seeds": study.seeds},
            Prices(),
            **more,
        )


def test_every_point_of_every_arm_is_measured(tmp_path):
    lab = Lab()
    result = lab.study(tmp_path, generation_seconds={"drawn": 1000.0})
    assert json.loads(json.dumps(result)) == read_json(tmp_path / "budget.json")
    arms = result["arms"]
    assert (
        list(arms) == list(ARMS)
        and list(arms["finetune"]) == ["0", "16", "all"]
        and list(arms["real"]) == ["16", "all"]
    )
    assert arms["finetune"]["16"] == {"here": [51.6, 52.6], "there": [51.6, 52.6]}
    assert (
        arms["real"]["all"]["here"] == [50.0, 51.0] and arms["mixed"]["0"] == arms["finetune"]["0"]
    )
    per_seed = 1 + 1 + 2 * 2 * 4  # pre-training, synthetic alone, then domains x shots x arms
    assert len(lab.trained) == len(set(lab.trained)) == 2 * per_seed and not lab.judged
    assert (
        result["steps"] == {"finetune": 300, "mixed": 300, "real": 300, "real_short": 60}
        and result["failed"] == []
    )
    seconds = result["cost"]["seconds"]
    assert seconds["finetune"]["16"]["here"] == [1300.0, 1300.0] and seconds["real"]["16"][
        "here"
    ] == [300.0, 300.0]
    assert seconds["finetune"]["0"]["there"] == [1300.0, 1300.0] and seconds["real_short"]["all"][
        "here"
    ] == [60.0, 60.0]
    assert len(result["runs"]) == 2 * 2 * (2 * 3 + 2 * 2) and {
        r["seed"] for r in result["runs"]
    } == {0, 1}


def test_a_finished_study_trains_nothing(tmp_path):
    lab = Lab()
    first, lab.trained = lab.study(tmp_path), []
    assert lab.study(tmp_path)["arms"] == first["arms"] and lab.trained == []


def test_a_study_says_which_of_its_runs_it_is_at(tmp_path, capsys):
    lab = Lab()
    small = {"shots": [0, 16], "seeds": [0], "domains": {"here": 100}, "arms": ["finetune", "real"]}
    lab.study(tmp_path, plan(**small, learning_rates={"real": [1e-3, 1e-2]}))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert (
        len(lines) == len(lab.trained) == 5
    )  # two candidates, synthetic alone, the pre-training, what goes on from it
    assert lines[0] == "run 1 of 5: real here shots=16 seed=0 learning_rate=0.001"
    assert lines[1].startswith("run 2 of 5: real") and lines[1].endswith("left in all")
    assert lines[4].startswith("run 5 of 5: finetune here") and ", 60 s left in all" in lines[4]


@pytest.mark.parametrize(
    "rates", [{}, {"synthetic": [1e-3, 1e-2], "finetune": [1e-3, 1e-2], "mixed": [1e-2, 1e-1]}]
)
def test_the_number_of_runs_is_that_of_the_trainings(tmp_path, capsys, rates):
    lab = Lab()
    lab.study(tmp_path, plan(learning_rates=rates))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    number = len(lab.trained)
    assert [line.partition(":")[0] for line in lines] == [
        f"run {i + 1} of {number}" for i in range(number)
    ]


def test_what_was_chosen_is_said_in_words(tmp_path, capsys):
    Lab().study(tmp_path, plan(learning_rates={"real": [1e-3, 1e-2]}))
    said = capsys.readouterr().out
    assert "learning rate, finetune: 0.0003 (as set)\n" in said
    assert (
        "learning rate, real: 0.01 (best mIoU of the candidates; 0.001: 41.0, 0.01: 50.0)\n" in said
    )


def test_an_interrupted_study_goes_on(tmp_path):
    lab = Lab()
    lab.fails = lambda job: KeyboardInterrupt() if len(lab.trained) == 7 else None
    with pytest.raises(KeyboardInterrupt):
        lab.study(tmp_path)
    assert len(lab.trained) == 7 and not (tmp_path / "budget.json").exists()
    lab.fails = lambda job: None
    result = lab.study(tmp_path)
    assert len(lab.trained) == len(set(lab.trained)) == 36  # nothing twice
    assert result["arms"] == Lab().study(tmp_path / "whole")["arms"]


def test_jobs_of_another_process_come_last_and_are_waited_for(tmp_path, monkeypatch, capsys):
    """Of two processes: each job is trained once, by either, and both end with the same study."""
    monkeypatch.setattr("dd.stages.study.POLL", 0.0)
    lab, asked = Lab(), Counter()
    candidates = {"learning_rates": {"real": [1e-3, 1e-2]}}

    def busy(job):
        asked[job] += 1
        if job.recipe == "real" and job not in lab.finished:
            if asked[job] == 3:  # the other process has finished it
                lab.finished.add(job)
            return Busy("held")

    lab.fails = busy
    result = lab.study(tmp_path, plan(**candidates))
    assert "waiting for what other processes are at: 2 of the jobs" in capsys.readouterr().out
    assert not any(job.recipe == "real" for job in lab.trained) and len(lab.trained) == len(
        set(lab.trained)
    )
    assert (
        result["failed"] == []
        and result["arms"] == Lab().study(tmp_path / "alone", plan(**candidates))["arms"]
    )


def test_failed_runs_are_listed_and_tried_again(tmp_path, capsys):
    lab, broken = (
        Lab(),
        lambda job: (
            torch.OutOfMemoryError("GPU is full")
            if job.recipe == "real" and job.seed == 1
            else None
        ),
    )
    lab.fails = broken
    with pytest.raises(
        ValueError,
        match="4 of 40 points are missing; the same command(.|\n)*real there shots=all seed=1",
    ) as stop:
        lab.study(tmp_path)
    assert str(stop.value).count("OutOfMemoryError: GPU is full") == 4
    found = read_json(tmp_path / "budget.json")
    assert found["arms"]["real"]["16"]["here"] == [41.6, None] and found["arms"]["mixed"]["16"][
        "here"
    ] == [51.6, 52.6]
    at = found["skipped"]["finetune"]["real"]["here"]["16"]["runs"]  # seed 1 has no control
    assert [(run["low"], run["high"]) for run in at] == [(84, None), (None, None)]
    lab.fails, lab.trained = lambda job: None, []
    assert lab.study(tmp_path)["failed"] == [] and [j.recipe for j in lab.trained] == ["real"] * 4


def test_what_goes_on_from_a_failed_run_waits(tmp_path):
    lab = Lab()
    lab.fails = lambda job: RuntimeError("broken") if job.steps == 240 else None
    with pytest.raises(ValueError, match="8 of 40 points are missing") as stop:
        lab.study(tmp_path)
    assert str(stop.value).count("broken") == 2 and not any(
        job.recipe == "finetune" for job in lab.trained
    )


def test_a_long_list_of_failures_fits_one_screen(tmp_path):
    lab = Lab()
    lab.fails = lambda job: RuntimeError("broken")
    with pytest.raises(ValueError, match="and 18 more, in") as stop:
        lab.study(tmp_path)
    assert (
        len(str(stop.value).splitlines()) == 12
        and len(read_json(tmp_path / "budget.json")["failed"]) == 28
    )


def test_a_score_that_fails_is_a_missing_point(tmp_path):
    lab = Lab()
    lab.score = lambda job, domain: 1 / 0
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        lab.study(tmp_path)
    assert {r["miou"] for r in read_json(tmp_path / "budget.json")["runs"]} == {None}


def test_a_study_whose_settings_changed_is_refused(tmp_path):
    lab = Lab()
    lab.study(
        tmp_path,
        identity={"seeds": [0, 1], "recipes": {"real": {"optimizer": {"learning_rate": 1e-3}}}},
    )
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    lab.trained = []
    with pytest.raises(
        FileExistsError, match=r"recipes\.real\.optimizer\.learning_rate: 0\.001 -> 0\.003\n"
    ) as stop:
        lab.study(
            tmp_path,
            identity={
                "seeds": [0, 1, 2],
                "recipes": {"real": {"optimizer": {"learning_rate": 3e-3}}},
            },
        )
    assert "seeds: [0, 1] -> [0, 1, 2]" in str(stop.value) and str(stop.value).startswith("study ")
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before and not lab.trained
    with pytest.raises(ValueError, match="study.targets"):
        lab.study(tmp_path, targets="high")


def test_learning_rates_are_chosen_on_tune_at_one_place(tmp_path):
    lab = Lab()
    rates = {
        "synthetic": [1e-3, 1e-2],
        "finetune": [1e-2, 1e-1, 1e-3],
        "real": [1e-3, 9e-3],
        "mixed": [0.5],
        "real_short": None,
    }
    result = lab.study(tmp_path, plan(learning_rates=rates))
    edges = {recipe: c["edge"] for recipe, c in result["learning_rates"].items() if c["edge"]}
    assert list(edges) == ["synthetic", "real"]
    assert {at["end"] for at in edges.values()} == {"highest"}
    chosen = {recipe: c["chosen"] for recipe, c in result["learning_rates"].items()}
    assert chosen == {
        "synthetic": 1e-2,
        "finetune": 1e-2,
        "real": 9e-3,
        "mixed": 0.5,
        "real_short": 1e-3,
    }
    assert result["learning_rates"]["real"]["candidates"] == {
        "0.001": pytest.approx(41),
        "0.009": pytest.approx(49),
    }
    assert result["learning_rates"]["real"]["judged_on"] == "12 images of here/tune"
    assert (
        result["learning_rates"]["mixed"]["why"]
        == result["learning_rates"]["real_short"]["why"]
        == "as set"
    )
    assert {(j.domain, j.shots, j.seed) for j in lab.judged} == {
        (None, None, 0),
        ("here", 16, 0),
    } and len(lab.judged) == 7
    assert {j.after.learning_rate for j in lab.judged if j.after} == {
        1e-2
    }  # the pre-training's rate is chosen first
    assert {j.learning_rate for j, _ in lab.scored if j.recipe == "real"} == {
        9e-3
    }  # others never see the test split
    assert len(lab.trained) == 36 + 1 + 2 + 1  # the candidates that lost


def test_without_images_to_judge_on_the_rates_stay_and_that_is_said(tmp_path, capsys):
    lab = Lab()
    result = lab.study(tmp_path, plan(learning_rates={"real": [1e-3, 1e-2]}, judged_on=None))
    assert not lab.judged and result["learning_rates"]["real"]["chosen"] == 1e-3
    assert (
        "learning rate, real: 0.001 (nothing to judge candidates on: the experiment's own"
        in capsys.readouterr().out
    )


def test_a_candidate_that_fails_keeps_its_recipe_waiting(tmp_path):
    lab = Lab()
    lab.fails = lambda job: RuntimeError("broken") if job.learning_rate == 5.0 else None
    with pytest.raises(ValueError, match="learning_rate=5: RuntimeError: broken"):
        lab.study(tmp_path, plan(learning_rates={"real": [1e-3, 5.0]}))
    found = read_json(tmp_path / "budget.json")
    assert found["learning_rates"]["real"]["chosen"] is None and found["arms"]["real"]["16"][
        "here"
    ] == [None, None]
    assert found["arms"]["finetune"]["16"]["here"] == [51.6, 52.6]
    lab.fails = lambda job: None
    assert (
        lab.study(tmp_path, plan(learning_rates={"real": [1e-3, 5.0]}))["learning_rates"]["real"][
            "chosen"
        ]
        == 1e-3
    )


def test_skipped_images_and_costs_are_printed(tmp_path, capsys):
    result = Lab().study(tmp_path, plan(domains={"here": 100}, shots=[16, "all"]), targets=[50.0])
    at = result["skipped"]["finetune"]["real"]["here"][16]
    assert at["median"] == at["range"] == {"low": 84, "high": None} and at["shown"]
    shown = capsys.readouterr().out
    assert "equal total steps: real images skipped: at least 84 (84 or more)" in shown
    assert "less real only, equal total steps with 16: +10.0 [10.0, 10.0] (2 seeds" in shown
    (row,) = result["cost"]["targets"]["here"]
    fine = row["arms"]["finetune"]
    assert fine["images"]["median"] == {"low": None, "high": 16}
    assert fine["price"]["median"]["high"] == pytest.approx(16 / 6 * 20 + 300 / 3600 * 2)
    at = {(r["arm"], r["k"], r["against"]): r for r in result["differences"]}
    row = at["mixed", 16, "finetune"]
    assert (row["value"], row["p_holm"], row["seeds"], row["images"]) == (0, 1, 2, None)


def test_draws_are_crossed_with_seeds_and_recorded(tmp_path):
    """Two synthetic sets: the second gives 2 points more. Controls see neither, and train once."""
    lab = Lab()
    lab.fails = lambda job: KeyboardInterrupt() if len(lab.trained) == 30 else None
    study = plan(draws=["drawn", "again"])
    seconds = {"drawn": 1000.0, "again": 500.0}
    with pytest.raises(KeyboardInterrupt):
        lab.study(tmp_path, study)
    lab.fails = lambda job: None
    result = lab.study(tmp_path, study, generation_seconds=seconds)
    controls, others = 2 * 2 * 2, 2 * (1 + 1 + 2 * 2 * 2)  # domains x shots x arms; two draws
    assert len(lab.trained) == len(set(lab.trained)) == 2 * (controls + others)
    assert result["draws"] == read_json(tmp_path / "budget.json")["draws"] == ["drawn", "again"]
    assert result["arms"]["mixed"]["16"]["here"] == [51.6, 53.6, 52.6, 54.6]  # draws within seeds
    assert result["arms"]["real"]["16"]["here"] == [41.6, 42.6]
    rows = [r for r in result["runs"] if (r["arm"], r["shots"]) == ("finetune", 16)]
    found = [(r["seed"], r["draw"], r["miou"], r["seconds"]) for r in rows if r["domain"] == "here"]
    assert found == [
        (0, "drawn", 51.6, 1300),
        (0, "again", 53.6, 800),
        (1, "drawn", 52.6, 1300),
        (1, "again", 54.6, 800),
    ]
    assert {r["draw"] for r in result["runs"] if r["arm"] == "real"} == {None}
    rows = [r for r in result["differences"] if (r["arm"], r["k"]) == ("mixed", 16)]
    row = next(r for r in rows if (r["against"], r["domain"]) == ("real", "here"))
    assert row["value"] == pytest.approx(11) and (row["runs"], row["seeds"]) == (4, 2)
    assert row["low"] < 0 < row["high"]  # draws 2 points apart: with two of them nothing is shown
    assert {tuple(c["runs"]) for c in result["curves"] if c["arm"] == "mixed"} == {(4, 4, 4)}


def test_a_rate_for_each_number_of_images(tmp_path, capsys):
    """With few images 1e-3 is best, with all of them 1e-2; each is a mean over two seeds."""
    lab = Lab()

    def judge(job):
        lab.train(job)
        lab.judged.append(job)
        best = 1e-3 if job.shots == 16 else 1e-2
        return 50 - 1000 * abs(job.learning_rate - best) + job.seed

    lab.judge = judge
    study = plan(
        shots=[0, 8, 16, 32, "all"],
        choose={"shots": [16, "all"], "seed": [0, 1]},
        learning_rates={
            "real": [1e-3, 1e-2],
            "finetune": [3e-3, 1e-3, 1e-2],
            "synthetic": [1e-3, 1e-2],
        },
    )
    result = lab.study(tmp_path, study)
    real = result["learning_rates"]["real"]["by_shots"]
    assert {k: choice["chosen"] for k, choice in real.items()} == {"16": 1e-3, "all": 1e-2}
    assert real["16"]["candidates"] == {"0.001": pytest.approx(50.5), "0.01": pytest.approx(41.5)}
    assert real["16"]["edge"] == {"end": "lowest", "add": 1e-4}
    assert real["all"]["edge"] == {"end": "highest", "add": 0.1}
    assert result["learning_rates"]["synthetic"]["chosen"] == 1e-2 and real["all"]["judged_on"]
    rates = {j.shots: j.learning_rate for j, _ in lab.scored if j.recipe == "real"}
    assert rates == {8: 1e-3, 16: 1e-3, 32: 1e-3, "all": 1e-2}  # nearest fewer, else fewest
    said = capsys.readouterr().out
    assert "learning rate, real at 16 images: 0.001 (best mIoU" in said
    assert "the lowest of its candidates: a better one may lie beyond it; add 0.0001" in said
    trained = len(lab.trained)
    assert lab.study(tmp_path, study)["arms"] == result["arms"] and len(lab.trained) == trained


def test_where_a_candidate_of_one_number_of_images_failed_only_these_wait(tmp_path):
    lab = Lab()
    bad = lambda job: (job.shots, job.learning_rate) == ("all", 5.0)  # noqa: E731
    lab.fails = lambda job: RuntimeError("broken") if bad(job) else None
    study = plan(learning_rates={"real": [1e-3, 5.0]}, choose={"shots": "each", "seed": 0})
    with pytest.raises(ValueError, match="learning_rate=5: RuntimeError: broken"):
        lab.study(tmp_path, study)
    found = read_json(tmp_path / "budget.json")
    assert found["learning_rates"]["real"]["by_shots"]["all"]["chosen"] is None
    real = found["arms"]["real"]
    assert real["all"]["here"] == [None, None] and real["16"]["here"] == [41.6, 42.6]


# What labels decided


CHOSEN = [{"what": "masks", "data": "here/tune", "labels": 12}]


def test_labels_that_chose_are_in_the_price_each_set_once(tmp_path, capsys):
    """Runs say that masks were chosen on 12 tune labels; the study judges rates on the same ones,
    with 16 images of ``here``."""
    lab = Lab()
    train = lab.train
    lab.train = lambda job: {
        **train(job),
        "chosen_on": CHOSEN if job.recipe not in ("real", "real_short") else [],
    }
    judges = [{"data": "here/tune", "labels": 12}]
    rates = {"synthetic": [1e-3, 1e-2], "real": [1e-3, 1e-2]}
    study = plan(
        learning_rates=rates, judges=judges, lists={"here": "here/train", "there": "other/train"}
    )
    result = lab.study(tmp_path, study, targets=[50.0])
    rate = {"what": "learning_rate", "data": "here/tune", "labels": 12}
    drawn = {"what": "learning_rate", "data": "here/train", "labels": 16, "seed": 0}
    assert result["learning_rates"]["synthetic"]["chosen_on"] == judges
    assert result["learning_rates"]["finetune"]["chosen_on"] is None
    assert result["chosen_on"] == {
        "finetune": [*CHOSEN, rate],
        "mixed": [*CHOSEN, rate],
        "real": [drawn, rate],
        "real_short": [],
    }
    paid = result["cost"]["labels"]
    assert (
        paid["finetune"]["0"] == {"here": 12, "there": 12}
        and paid["finetune"]["16"]["here"] == 16 + 12
    )
    assert paid["real"] == {
        "16": {"here": 16 + 12, "there": 16 + 16 + 12},
        "all": {"here": 112, "there": 50 + 16 + 12},
    }
    assert paid["real_short"]["16"] == {"here": 16, "there": 16}  # as set
    row = result["cost"]["targets"]["here"][0]["arms"]["finetune"]
    assert (row["images"]["median"], row["labels"]["median"]) == (
        {"low": 0, "high": 0},
        {"low": 12, "high": 12},
    )
    assert row["price"]["median"]["high"] >= 12 / 6 * 20
    shown = capsys.readouterr().out
    assert "settings of real only, equal fine-tuning steps were chosen on: no real label" in shown
    assert "chosen on: 12 labels of here/tune (masks, learning_rate)" in shown


# train.py

SIZES = {"train": 6, "tune": 2, "test": 2}
TINY = [
    "device=cpu",
    "scale=64",
    "transform.crop_size=32",
    "segmenter.base_channels=8",
    "batch_size=2",
    "trainer.max_steps=1",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """Both domains; the first images of ``shapes`` stand for a synthetic set."""
    root = tmp_path_factory.mktemp("data")
    prepare_shapes(root, SIZES)
    (root / "synthetic").mkdir()
    (root / "synthetic/shapes").symlink_to(root / "shapes")
    write_json(
        root / "shapes/SegmentationClass/masks.json", {"identity": {"power": 0}, "chosen_on": []}
    )
    (root / "shapes/records").mkdir()
    (root / "shapes/records/0.jsonl").write_text(
        '{"id": "a", "seconds": 1.5}\n{"id": "b", "seconds": 2.0}\n'
    )
    return root


@pytest.fixture
def command(monkeypatch, data_root, tmp_path):
    """``command(*overrides, do=train.run)`` -> (exit status, what ``do(cfg)`` returned) of
    train.py in this process."""
    handlers, level = logging.root.handlers[:], logging.root.level
    monkeypatch.delenv("DD_TRACEBACK", raising=False)

    def call(*arguments, do=None):
        returned = []
        study = (
            []
            if any(a.startswith("experiment=") for a in arguments)
            else ["experiment=shapes_budget", f"data_root={data_root}"]
        )
        line = [*study, f"output_root={tmp_path}", *arguments]
        monkeypatch.setattr(sys, "argv", ["train.py", *line])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as stop:
            config.main(
                watched("train", lambda cfg: returned.append((do or door("train").run)(cfg)))
            )
        return stop.value.code, *returned

    yield call
    logging.root.handlers[:], logging.root.level = handlers, level
    torch.set_flush_denormal(False)
    GlobalHydra.instance().clear()


SMALL = ["study.shots=[0,2,all]", "study.choose.shots=2"]


def test_one_command_trains_scores_and_goes_on(command, tmp_path, data_root):
    """Two trainings, the second from the first, with candidates of the second on tune; then the
    same command again."""
    settings = [
        *TINY,
        "study.shots=[2]",
        "study.choose.shots=2",
        "study.domains=[shapes_shift]",
        "study.arms=[finetune]",
        "study.seeds=[3]",
        "study.choose.seed=3",
        "study.learning_rates.synthetic=null",
        "study.learning_rates.finetune=[0.01,0.001]",
    ]
    assert command(*settings)[0] == 0
    found = read_json(tmp_path / "shapes_budget/budget.json")
    (row,) = found["runs"]
    choice = found["learning_rates"]["finetune"]
    assert choice["judged_on"] == "2 images of shapes_shift/tune"
    assert choice["candidates"][f"{choice['chosen']:g}"] == max(choice["candidates"].values())
    run = read_json(f"{row['run']}/run.json")
    assert (
        run["trained_on"]["shots"] == 2
        and run["trained_on"]["root"] == "shapes_shift"
        and run["identity"]["seed"] == 3
    )
    assert run["identity"]["optimizer"]["learning_rate"] == choice["chosen"]
    sets = [
        {"data": "shapes_shift/train", "labels": 2, "seed": 3},
        {"data": "shapes_shift/tune", "labels": 2},
    ]
    rate = [{"what": "learning_rate", **one} for one in sets]
    assert (
        choice["chosen_on"] == sets
        and [c for c in run["chosen_on"] if c in rate] == rate
        and run["supervision"] == "B"
    )
    assert found["chosen_on"]["finetune"] == [*run["chosen_on"]]
    before = read_json(tmp_path / "shapes_budget/synthetic/seed=3/run.json")
    assert run["identity"]["init_from_sha256"] == before["weights_sha256"] and found["steps"] == {
        "finetune": 2
    }
    assert row["seconds"] == pytest.approx(run["seconds"] + before["seconds"] + 3.5)
    scored = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("**/metrics.json"))
    assert [p.partition("/eval/")[2] for p in scored] == [
        "shapes_shift/metrics.json"
    ]  # the loser never sees the test split
    metrics = read_json(tmp_path / scored[0])
    assert (metrics["split"], metrics["num_images"]) == ("test", 2)
    assert found["arms"] == {"finetune": {"2": {"shapes_shift": [metrics["miou"]]}}}
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("**/run.json")}
    assert len(made) == 3
    assert (
        command(*settings)[0] == 0
        and {p: p.stat().st_mtime_ns for p in tmp_path.glob("**/run.json")} == made
    )
    assert (
        command(*settings, "study.seeds=[3,4]")[0] == 2
        and len(list(tmp_path.glob("**/run.json"))) == 3
    )


def test_draws_and_a_rate_for_each_k_in_one_command(command, tmp_path, data_root):
    """Two synthetic sets, rates compared at both ks, tiny; each run saw its own draw, and a second
    call trains nothing."""
    first, again = data_root / "synthetic/shapes", tmp_path / "shapes_draw1"
    again.symlink_to(first)
    settings = [
        *TINY,
        "study.shots=[2,all]",
        "study.choose.shots=each",
        "study.seeds=[3]",
        "study.choose.seed=3",
        "study.domains=[shapes]",
        "study.arms=[mixed,real]",
        f"study.synthetic=[{first},{again}]",
        *(f"study.learning_rates.{recipe}=null" for recipe in ("synthetic", "real")),
        "study.learning_rates.mixed=[0.01,0.001]",
    ]
    assert command(*settings)[0] == 0
    found = read_json(tmp_path / "shapes_budget/budget.json")
    assert list(found["learning_rates"]["mixed"]["by_shots"]) == ["2", "all"]
    assert [len(found["arms"][arm]["2"]["shapes"]) for arm in ("mixed", "real")] == [2, 1]
    assert found["cost"]["generation_seconds"] == {f"{first}": 3.5, f"{again}": 3.5}
    (difference,) = (r for r in found["differences"] if r["k"] == 2)
    assert (difference["runs"], difference["seeds"], difference["images"]) == (2, 1, 2)
    mixed = [r for r in found["runs"] if r["arm"] == "mixed"]
    assert [r["draw"] for r in mixed if r["shots"] == 2] == [f"{first}", f"{again}"]
    roots = [read_json(f"{r['run']}/run.json")["trained_on"]["synthetic"]["root"] for r in mixed]
    assert roots == ["shapes", "shapes", "shapes_draw1", "shapes_draw1"]
    assert all(("draw=shapes_draw1" in r["run"]) == (r["draw"] == f"{again}") for r in mixed)
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("**/run.json")}
    assert len(made) == 2 + 4 + 2  # real; mixed on the first draw, both rates; on the second, one
    assert command(*settings)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("**/run.json")} == made


def test_a_study_from_before_there_were_draws_goes_on(command):
    """With one draw nothing of it is in the settings that a study is known by."""
    status, (plan, identity) = command(*SMALL, do=config.budget_plan)
    assert status == 0 and "synthetic" not in identity["budget"] and len(plan.draws) == 1
    assert plan.draws == [identity["recipes"]["synthetic"]["synthetic"]]


def test_a_run_in_another_process_is_waited_for(command, tmp_path, monkeypatch):
    """A study finds the folder of its first run locked, trains the other one first, and then
    waits until it is free."""
    settings = [
        *TINY,
        "study.shots=[2]",
        "study.choose.shots=2",
        "study.domains=[shapes_shift]",
        "study.seeds=[3]",
        "study.arms=[real,mixed]",
    ]
    settings += [f"study.learning_rates.{recipe}=null" for recipe in ("synthetic", "real", "mixed")]
    held = tmp_path / "shapes_budget/real_shapes_shift/shots=2,seed=3,max_steps=2"
    held.mkdir(parents=True)
    other = Lock(held)
    other.__enter__()
    monkeypatch.setattr("dd.stages.study.time.sleep", lambda _: other.__exit__())
    assert command(*settings)[0] == 0
    trained = sorted(tmp_path.glob("**/run.json"), key=lambda p: p.stat().st_mtime_ns)
    assert [p.parent.parent.name for p in trained] == ["mixed_shapes_shift", "real_shapes_shift"]
    assert not list(tmp_path.glob("**/.lock"))


def test_runs_are_those_of_the_experiments_own_commands(command, tmp_path):
    """Folder and settings of each arm, against ``train.py experiment=... data=... shots=...
    seed=...``."""

    def parts(cfg):
        plan, identity = config.budget_plan(cfg)
        rates = plan.own_rates
        jobs = {arm: plan.job(arm, "shapes_shift", 2, 1, rates) for arm in ARMS} | {
            "pre": plan.pretraining(1, rates)
        }
        jobs["alone"] = plan.job("finetune", "shapes", 0, 1, rates)
        jobs["other"] = Job("real", 1, 360, 0.5, "shapes", 2)
        return {name: config.plain(config.budget_run(cfg, job)) for name, job in jobs.items()}

    status, found = command(*SMALL, "num_workers=0", do=parts)
    names = {name: part["name"] for name, part in found.items()}
    assert status == 0 and names == {
        "finetune": "shapes/finetune_shapes_shift/shots=2,seed=1",
        "mixed": "shapes/mixed_shapes_shift/shots=2,seed=1",
        "real": "shapes/real_shapes_shift/shots=2,seed=1",
        "pre": "shapes/synthetic/seed=1",
        "real_short": "shapes_budget/real_short_shapes_shift/shots=2,seed=1,max_steps=40",
        "alone": "shapes_budget/synthetic/seed=1,max_steps=360",
        "other": "shapes_budget/real_shapes/shots=2,seed=1,learning_rate=0.5",
    }
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        for name, experiment in {
            "finetune": "finetune",
            "mixed": "mixed",
            "real": "real",
            "pre": "synthetic",
        }.items():
            more = [] if name == "pre" else ["data=shapes_shift", "shots=2"]
            own = hydra.compose(
                "train",
                [
                    f"experiment=shapes_{experiment}",
                    "seed=1",
                    f"output_root={tmp_path}",
                    "num_workers=0",
                    *more,
                ],
            )
            given = {
                k: v
                for k, v in config.plain(own).items()
                if k not in ("data_root", "synthetic", "data", "stage")
            }
            assert {k: found[name][k] for k in given} == given
    _, changed = command(
        *SMALL, "scale=64", do=parts
    )  # a command with settings of its own keeps its runs to itself
    assert all(
        part["name"].startswith("shapes_budget/") and part["scale"] == 64
        for part in changed.values()
    )
    assert len({part["name"] for part in changed.values()}) == len(changed)


@pytest.mark.parametrize("rate", [1e-4, 1e-3], ids=["its own", "another"])
def test_a_rate_that_labels_chose_is_told_whichever_wins(command, rate):
    """An experiment that says that no label chose its rate shares no run with a study in which
    labels did."""

    def look(cfg):
        plan, _ = config.budget_plan(cfg)
        job = plan.pretraining(0, {"synthetic": rate})
        return plan.choices["synthetic"], config.plain(
            config.budget_run(cfg, job, choices=plan.choices)
        )

    free = [
        "study.experiments.synthetic=shapes_label_free",
        "study.learning_rates.synthetic=[1e-4,1e-3]",
    ]
    status, (sets, part) = command(*SMALL, *free, do=look)
    assert status == 0 and [s["data"] for s in sets] == ["shapes/tune"]
    assert (
        part["name"].startswith("shapes_budget/synthetic/")
        and part["optimizer"]["learning_rate"] == rate
    )
    assert part["chosen_on"]["learning_rate"] == [
        {"data": "shapes", "split": "tune", "labels": sets[0]["labels"]}
    ]


def test_the_shots_of_a_study_may_be_published_lists(command, tmp_path):
    """A list for each number of shots; the synthetic images alone need none."""
    for number in (2, 4):
        names = [f"JPEGImages/train_{i:05d}.png x.png" for i in range(1, number + 1)]
        (tmp_path / f"{number}.txt").write_text("\n".join(names))

    def look(cfg):
        plan, _ = config.budget_plan(cfg)
        jobs = {k: plan.job("real", "shapes", k, 0, plan.own_rates) for k in (2, 4)}
        parts = {k: config.budget_run(cfg, job) for k, job in jobs.items()}
        alone = config.budget_run(cfg, plan.job("finetune", "shapes", 0, 0, plan.own_rates))
        found = {k: sorted(config.training_sets(part)[0].ids) for k, part in parts.items()}
        return found, parts[2].name, config.training_sets(alone)[0].listed

    more = ["study.shots=[0,2,4]", "study.choose.shots=2", "study.domains=[shapes]"]
    status, (found, name, none) = command(*more, f"shots_list={tmp_path}/${{shots}}.txt", do=look)
    assert status == 0 and none is None and name == "shapes_budget/real_shapes/shots=2,seed=0"
    assert found == {k: [f"train_{i:05d}" for i in range(1, k + 1)] for k in (2, 4)}


def test_held_out_images_judge_where_there_is_no_tune_split(command):
    def look(cfg):
        plan, _ = config.budget_plan(cfg)
        if plan.judged_on is None:
            return None, None
        part = config.budget_run(cfg, Job("real", 0, 360, 3e-3, "shapes", 4), judged=True)
        images, tune = config.training_sets(part)
        return plan.judged_on, (part.name, set(images.ids) | set(tune.ids), len(tune), tune.split)

    more = [
        "study.choose.shots=4",
        "study.shots=[2]",
        "study.domains=[shapes]",
        "data.tune_split=null",
    ]
    assert command(*more, do=look) == (0, (None, None))
    status, (said, (name, ids, held, split)) = command(*more, "hold_out=1", do=look)
    assert (
        status == 0
        and said == "1 images held out of the training set"
        and (held, split) == (1, "train")
    )
    assert name == "shapes_budget/real_shapes/shots=4,seed=0,hold_out=1"
    assert ids == set(choose_shots([f"train_{i:05d}" for i in range(6)], 4, 0))
    assert command(*more, "hold_out=4", do=look)[0] == 2


@pytest.mark.parametrize(
    ("data", "root", "steps"), [("voc", "VOCdevkit/VOC2012", 20000), ("coco", "coco", 40000)]
)
def test_the_paper_data_sets_have_studies_too(command, tmp_path, data, root, steps):
    """Equal steps, the same data in every arm, ImageNet weights in the controls, learning rates
    kept: no tune split exists."""
    for folder, splits in ((root, {"train": 300, "val": 2}), (f"synthetic/{data}", {"train": 4})):
        (tmp_path / "data" / folder / "ImageSets/Segmentation").mkdir(parents=True)
        (tmp_path / "data" / folder / "SegmentationClass").mkdir()
        for split, count in splits.items():
            path = tmp_path / "data" / folder / f"ImageSets/Segmentation/{split}.txt"
            path.write_text("".join(f"{split}{i}\n" for i in range(count)))

    def parts(cfg):
        plan, _ = config.budget_plan(cfg)
        jobs = {
            (arm, k): plan.job(arm, data, k, 2, plan.own_rates) for arm in ARMS for k in (0, 16)
        }
        runs = {key: config.plain(config.budget_run(cfg, job)) for key, job in jobs.items() if job}
        return plan, {key: job.total_steps for key, job in jobs.items() if job}, runs

    more = [
        "experiment=paper_budget",
        f"data={data}",
        f"data_root={tmp_path}/data",
        "study.learning_rates.real=[1e-4,3e-4]",
    ]
    status, (plan, total, runs) = command(*more, do=parts)
    assert (
        status == 0
        and plan.domains == {data: 300}
        and plan.judged_on is None
        and plan.candidates("real") == [1e-4]
    )
    assert (
        set(total.values()) == {steps + 4000, 4000}
        and total["finetune", 16] == total["real", 16] == steps + 4000
    )
    assert {part["data"]["name"] for part in runs.values()} == {data} and {
        part["seed"] for part in runs.values()
    } == {2}
    assert runs["finetune", 16]["init_from"] == f"{tmp_path}/{data}_synthetic/seed=2"
    assert {key: part["source"] for key, part in runs.items() if key[1]} == {
        ("finetune", 16): "real",
        ("mixed", 16): "mixed",
        ("real", 16): "real",
        ("real_short", 16): "real",
    }
    assert (
        runs["real", 16]["name"]
        == f"{data}_budget/real_{data}/shots=16,seed=2,max_steps={steps + 4000}"
    )
    assert (
        runs["real", 16]["init_from"] is None
        and runs["real", 16]["segmenter"]["pretrained"] is not None
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study.shots=[0,99]"], "99 shots, but the training split of shapes holds 6"),
        (["seed=1"], "seed=1: stage=study sets"),
        (["trainer.devices=2"], "trains on one device"),
        (["optimizer.learning_rate=0.1"], "stage=study sets this for each run"),
        (["study.domains=[shapes,shaeps]"], "'shaeps' is neither 'shapes' nor one of coco"),
        (["study.domains=shapes"], "study.domains='shapes': expected a list"),
        (["study.arms=[fine]"], "study.arms"),
        (["study.experiments.real=shapes_rael"], "'shapes_rael'; allowed: coco"),
        (["study.shot=[0]"], "Did you mean 'shots'?"),
        (
            ["data.tune_split=test", "study.domains=[shapes]"],
            "nothing is ever chosen on the test split",
        ),
        (["data.masks=Other"], "data.masks=Other would change every domain"),
        (["synthetic=nowhere"], "no data set at nowhere"),
        (["study.domains=[shapes,voc]"], "'voc' has other classes than 'shapes'"),
        (["study.synthetic=nowhere"], "study.synthetic='nowhere': expected a list, each text"),
        (["study.synthetic=[nowhere]"], "no data set at nowhere"),
        (["study.synthetic=[a/x,b/x]"], "two have the same"),
        (["study.synthetic=[a]", "synthetic=b"], "both name synthetic sets"),
        (["study.choose.shots=[2,99]"], "99 shots, but the training split"),
        (["study.choose.shots=each", "hold_out=2"], "expected a number of images below"),
        (["study.prices.per_hour=-1"], "per_hour=-1"),
        (["study.generation_seconds=soon"], "study.generation_seconds"),
        (["study.targets=60"], "study.targets=60"),
    ],
)
def test_studies_that_make_no_sense(command, tmp_path, capsys, arguments, message):
    assert command(*SMALL, *arguments)[0] == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
