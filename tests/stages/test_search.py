"""The search of hyper-parameters: a study on disk, what it is told, and trials that are runs of
train.py."""

import csv
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import hydra
import optuna
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dd import config
from dd.data.datasets import SegmentationFolder
from dd.evaluation import metrics
from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.search import SearchSettings
from dd.stages.search import search as tune
from dd.store.provenance import read_json
from dd.taxonomy import taxonomy
from dd.training.datamodule import whole_loader
from dd.training.search import Study, corners, distributions, override, overrides
from dd.training.segmentation import Views, count
from tests.doors import door, watched

ROOT = Path(__file__).parents[2]
SPACE = {"x": {"low": -2.0, "high": 5.0}, "kind": {"choices": ["good", "bad"]}}


def hill(number, settings, report):
    """Best at x = 3 with kind = good."""
    return -((settings["x"] - 3) ** 2) - (settings["kind"] == "bad")


def search(folder, train_trial=hill, trials=6, **changes):
    fixed = {"sampler": "random", "pruner": "median", "pruner_settings": None}
    how = {"trials": trials, **fixed, **changes}
    given = [how.pop("identity", {"seed": 0}), how.pop("space", SPACE)]
    seed = how.pop("seed", 0)
    return tune(folder, train_trial, *given, SearchSettings(**how), seed)


def table(folder):
    with open(folder / "trials.csv") as file:
        return list(csv.DictReader(file))


# The space


def test_each_form_is_a_distribution():
    made = distributions(
        {
            "a": {"low": 1e-5, "high": 1e-2, "log": True},
            "b": {"low": 0, "high": 8, "step": 2},
            "c": {"low": 0, "high": 1.0},
        }
        | {"d": {"choices": ["x", 2, 0.5, True, None, [0.5, 2.0]]}}
    )
    d = optuna.distributions
    assert made == {
        "a": d.FloatDistribution(1e-5, 1e-2, log=True),
        "b": d.IntDistribution(0, 8, step=2),
        "c": d.FloatDistribution(0, 1),
        "d": d.CategoricalDistribution(["x", "2", "0.5", "true", "null", "[0.5, 2.0]"]),
    }


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "expected keys of the configuration, each with {low"),
        (None, "expected keys of the configuration"),
        ({"a": [1, 2]}, r"a: \[1, 2\]: expected {low"),
        ({"a": {"low": 1}}, "expected {low"),
        ({"a": {"low": 1, "high": 2, "lgo": True}}, "expected {low"),
        ({"a": {"choices": [1]}}, "at least two choices"),
        ({"a": {"low": 2, "high": 1}}, "numbers low < high"),
        ({"a": {"low": "1e-5", "high": 1}}, "numbers low < high"),
        ({"a": {"low": 0.0, "high": 1.0, "log": True}}, "a: .*log"),
        ({"a": {"low": 1, "high": 2, "log": "yes"}}, "log: true"),
        ({"a": {"low": False, "high": True}}, "numbers low < high"),
    ],
)
def test_a_space_of_another_form_is_refused(space, message):
    with pytest.raises(ValueError, match=message):
        distributions(space)


def test_settings_as_overrides():
    assert (
        override("a.b", 1e-5) == "a.b=1e-05" and override("a", "deeplabv3_r18") == "a=deeplabv3_r18"
    )
    assert (
        override("a", [0.5, 2.0]) == "a=[0.5, 2.0]"
        and override("a", None) == "a=null"
        and override("a", "x=1") == 'a="x=1"'
    )
    assert overrides({"b": 2, "a": "[1, 2]"}, {"a": {}, "b": {}}) == ["a=[1, 2]", "b=2"]
    assert corners(SPACE) == [["x=-2.0", "kind=good"], ["x=5.0", "kind=bad"]]


# A study


def test_a_study_keeps_its_trials_and_the_best(tmp_path):
    best = search(tmp_path / "study", trials=8)
    rows = table(tmp_path / "study")
    assert [int(r["trial"]) for r in rows] == list(range(8)) and {r["state"] for r in rows} == {
        "complete"
    }
    for row in rows:
        assert float(row["objective"]) == hill(0, {"x": float(row["x"]), "kind": row["kind"]}, None)
    top = max(rows, key=lambda r: float(r["objective"]))
    assert best == yaml.safe_load((tmp_path / "study/best.yaml").read_text())
    assert (best["trial"], best["objective"]) == (int(top["trial"]), float(top["objective"]))
    assert best["overrides"] == [f"x={float(top['x'])}", f"kind={top['kind']}"]
    assert (
        best["run"] == f"{tmp_path}/study/trial={top['trial']}" and best["trials"]["complete"] == 8
    )


def test_a_study_says_how_far_it_is(tmp_path, capsys):
    search(tmp_path / "study", trials=3)
    lines = capsys.readouterr().out.splitlines()
    expected = [
        rf"trial {int(r['trial'])}: complete, mIoU {float(r['objective']):.2f} with "
        rf"x={re.escape(r['x'])} kind={r['kind']}; "
        rf"{i + 1} of 3 are over, \d+ s left in all"
        for i, r in enumerate(table(tmp_path / "study"))
    ]
    assert len(lines) == 3 and all(map(re.fullmatch, expected, lines))
    assert lines[-1].endswith("3 of 3 are over, 0 s left in all")


def test_a_finished_study_trains_nothing_and_more_trials_go_on(tmp_path):
    best = search(tmp_path)
    before = table(tmp_path)
    assert search(tmp_path, pytest.fail) == best
    search(tmp_path, trials=8)
    assert table(tmp_path)[:6] == before and len(table(tmp_path)) == 8


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_study_in_pieces_is_the_study_in_one(tmp_path, sampler):
    trained = []

    def stops_once(number, settings, report):
        trained.append((number, settings))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return hill(number, settings, report)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "pieces", stops_once, 13, sampler=sampler)
    search(tmp_path / "pieces", stops_once, 13, sampler=sampler)
    assert trained[2] == trained[3]  # the interrupted trial is trained on
    search(tmp_path / "one", trials=13, sampler=sampler)
    assert table(tmp_path / "pieces") == table(tmp_path / "one")
    assert len({r["x"] for r in table(tmp_path / "one")}) == 13
    search(tmp_path / "other", trials=3, sampler=sampler, seed=1)
    assert table(tmp_path / "other") != table(tmp_path / "one")[:3]


def test_a_study_with_other_settings_is_refused(tmp_path):
    search(tmp_path, identity={"optimizer": {"learning_rate": 1e-4}})
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(
        FileExistsError,
        match=r"study .* other settings:\n  optimizer\.learning_rate: 0\.0001 -> 0\.001\n",
    ):
        search(tmp_path, pytest.fail, identity={"optimizer": {"learning_rate": 1e-3}}, trials=20)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_bad_trials_are_pruned(tmp_path):
    steps = []

    def trial(number, settings, report):
        value = 50.0 if number < 2 else 10.0
        for step in (10, 20, 30):
            steps.append((number, step))
            report(step, value, step == 30)
        return value

    search(tmp_path, trial, 4, pruner_settings={"n_startup_trials": 2, "n_warmup_steps": 11})
    assert [s for s in steps if s[0] >= 2] == [(2, 10), (2, 20), (3, 10), (3, 20)]
    assert [(r["state"], r["last_step"]) for r in table(tmp_path)] == [("complete", "30")] * 2 + [
        ("pruned", "20")
    ] * 2


def test_a_trial_that_has_ended_anyway_is_not_pruned(tmp_path):
    def trial(number, settings, report):
        report(30, 50.0 - number, True)
        return 50.0 - number

    search(tmp_path, trial, 4, pruner_settings={"n_startup_trials": 1})
    assert {r["state"] for r in table(tmp_path)} == {"complete"}


def test_a_pruner_may_be_left_out(tmp_path):
    def trial(number, settings, report):
        report(10, -float(number), False)
        return float(number)

    search(tmp_path, trial, 8, pruner="none")
    assert {r["state"] for r in table(tmp_path)} == {"complete"}


def test_a_training_that_fails_is_recorded_and_the_study_goes_on(tmp_path):
    def trial(number, settings, report):
        if number in (1, 2):
            raise torch.OutOfMemoryError("GPU is full")
        return 1.0 * number

    best = search(tmp_path, trial, 3)
    assert [r["state"] for r in table(tmp_path)] == [
        "complete",
        "fail",
        "fail",
        "complete",
        "complete",
    ]
    assert (
        table(tmp_path)[1]["error"] == "OutOfMemoryError: GPU is full"
        and best["trials"]["fail"] == 2
    )


def test_three_failures_in_a_row_end_the_study(tmp_path):
    def trial(number, settings, report):
        raise RuntimeError("broken")

    with pytest.raises(
        ValueError, match="3 trials in a row failed; the last one: RuntimeError: broken"
    ):
        search(tmp_path, trial)
    assert len(table(tmp_path)) == 3


def test_a_users_error_ends_the_study_at_once(tmp_path):
    def trial(number, settings, report):
        raise ValueError("crop_size=0")

    with pytest.raises(ValueError, match="crop_size=0"):
        search(tmp_path, trial)
    assert search(tmp_path, trials=1)["trial"] == 1  # the failed one stays behind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "grid"}, "search.sampler='grid'; allowed: tpe, random"),
        ({"pruner": "medium"}, "search.pruner='medium'; allowed: median, percentile"),
        (
            {"pruner_settings": {"warmup": 3}},
            "search.pruner_settings=.*median takes .*n_warmup_steps",
        ),
        ({"pruner": "percentile"}, "missing a required argument: 'percentile'"),
        ({"trials": 0}, "search.trials=0: expected"),
        ({"trials": 2.5}, "search.trials=2.5: expected"),
    ],
)
def test_studies_that_make_no_sense(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        search(tmp_path / "study", pytest.fail, **changes)
    assert not (tmp_path / "study").exists()


def test_a_missing_optuna_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ValueError, match=r'stage=search needs optuna, .*pip install -e "\.\[sweeps\]"'
    ):
        search(tmp_path)


# Several workers


def test_two_workers_never_share_a_trial(tmp_path):
    open_study = lambda: Study(tmp_path, {"seed": 0}, SPACE, "random", "none", {}, 0)  # noqa: E731
    first, second = open_study(), open_study()
    with ExitStack() as held, ExitStack() as also_held:
        a, b = first.next(2, held), second.next(2, also_held)
        assert (a.number, b.number) == (0, 1) and a.params != b.params
        with ExitStack() as third:
            assert first.next(2, third) is None  # both are being trained
    with ExitStack() as held:
        assert second.next(2, held).number == 0  # its worker let it go


def die(folder):
    search(folder, lambda number, settings, report: report(10, 1.0, False) or os._exit(9))


def test_the_trial_of_a_killed_worker_is_trained_on(tmp_path):
    worker = multiprocessing.get_context("fork").Process(target=die, args=(tmp_path,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 9
    dead = Study(tmp_path, {"seed": 0}, SPACE, "random", "median", {}, 0).trials("RUNNING")
    assert [t.number for t in dead] == [0]
    seen = []

    def trial(number, settings, report):
        seen.append((number, settings))
        report(10, 1.0, False)  # again
        return 1.0

    search(tmp_path, trial, 2)
    assert seen[0] == (0, dead[0].params) and [number for number, _ in seen] == [0, 1]


# train.py


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    prepare_shapes(root, {"train": 4, "tune": 2, "test": 1})
    return root


def tiny(data_root, output_root):
    """Overrides of a training of two steps, validated after each."""
    return [
        "experiment=shapes_real",
        "name=tiny",
        f"data_root={data_root}",
        f"output_root={output_root}",
        "device=cpu",
        "shots=4",
        "batch_size=2",
        "scale=32",
        "transform.crop_size=32",
        "segmenter.base_channels=8",
        "trainer.max_steps=2",
        "trainer.precision=32-true",
        "trainer.limit_val_batches=1.0",
        "trainer.val_check_interval=1",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
    ]


@pytest.fixture
def command(monkeypatch, data_root, tmp_path):
    """``command(*overrides)`` -> (exit status, what run returned for each job) of train.py in
    this process."""
    handlers, level = logging.root.handlers[:], logging.root.level
    monkeypatch.delenv("DD_TRACEBACK", raising=False)

    def call(*arguments, multirun=()):
        returned = []

        def run(cfg):
            returned.append(door("train").run(cfg))
            return returned[-1]

        monkeypatch.setattr(
            sys, "argv", ["train.py", *multirun, *tiny(data_root, tmp_path), *arguments]
        )
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as stop:
            config.main(watched("train", run))
        return stop.value.code, returned

    yield call
    logging.root.handlers[:], logging.root.level = handlers, level
    torch.set_flush_denormal(False)
    GlobalHydra.instance().clear()


def test_a_chain_without_a_real_label_is_of_class_a(monkeypatch, run, data_root, tmp_path):
    """The commands of runs/shapes.sh at small size: images, a rate that synthetic images choose,
    the training with it. The recipe of ``experiment=shapes_synthetic`` on the same images is of
    class B."""
    where = [f"data_root={data_root}", f"output_root={tmp_path}", "device=cpu"]
    made = ["num_images=4", "unit_size=2", "diffusion.steps=1", *where]
    run("generate", "experiment=shapes", *made)
    masks = read_json(data_root / "synthetic/shapes/SegmentationClass/masks.json")
    assert masks["chosen_on"] == []
    name = "experiment=shapes_label_free"
    small = ["batch_size=2", "scale=32", "segmenter.base_channels=8", "trainer.max_steps=2", *where]
    small += ["trainer.precision=32-true", "trainer.enable_progress_bar=false"]
    search = [
        "stage=search",
        "search.space=learning_rate",
        "search.trials=1",
        "name=search",
        "hold_out=2",
    ]
    search += ["trainer.limit_val_batches=1.0", "trainer.val_check_interval=2"]
    monkeypatch.setattr(sys, "argv", ["train.py", name, *search, *small])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stop:
        config.main(door("train"))
    found = yaml.safe_load((tmp_path / "search/best.yaml").read_text())
    assert stop.value.code == 0 and found["chosen_on"] == []
    assert found["overrides"][1:] == ["++chosen_on.learning_rate=[]"]
    run("train", name, *small, *found["overrides"])
    done = read_json(tmp_path / "shapes/label_free/seed=0/run.json")
    assert (done["supervision"], done["chosen_on"]) == ("A", [])
    rate = float(found["overrides"][0].partition("=")[2])
    assert done["identity"]["optimizer"]["learning_rate"] == rate

    run("train", "experiment=shapes_synthetic", "transform.crop_size=32", *small)
    done = read_json(tmp_path / "shapes/synthetic/seed=0/run.json")
    assert done["supervision"] == "B"
    assert {c["what"] for c in done["chosen_on"]} == {"recipe", "learning_rate"}


def validations(run_folder):
    with open(run_folder / "metrics.csv") as file:
        return [float(row["tune/miou"]) for row in csv.DictReader(file) if row["tune/miou"]]


def test_a_run_returns_and_records_its_objective(command, tmp_path, data_root):
    (status, (value,)) = command()
    folder = tmp_path / "tiny"
    recorded = read_json(folder / "objective.json")
    assert status == 0 and recorded["objective"] == value
    assert value == pytest.approx(
        validations(folder)[-1], abs=1e-4
    )  # the last validation is of the same weights
    assert (recorded["split"], recorded["num_images"], recorded["data"]) == ("tune", 2, "shapes")
    run = read_json(folder / "run.json")
    assert recorded["weights_sha256"] == run["weights_sha256"]
    averaged = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    segmenter = config.segmenter_of(run)
    segmenter.load_state_dict({k.removeprefix("segmenter."): v for k, v in averaged.items()})
    data = SegmentationFolder(data_root / "shapes", "tune", taxonomy("shapes"))
    loader, views = whole_loader(data, Views(32)), Views(32)
    counted = count(
        segmenter.eval(),
        whole_loader(data, views),
        metrics.confusion_matrix(11),
        predict=views.predict,
    )
    assert len(loader) == 1 and value == pytest.approx(metrics.miou(counted))
    assert command() == (0, [value])  # finished: nothing is trained


def test_a_multirun_returns_the_objective_of_each_job(command, tmp_path):
    status, values = command(
        "seed=0,1", "trainer.limit_val_batches=0", multirun=["-m"]
    )  # measured at the end, though not on the way
    folders = [tmp_path / f"tiny/seed={seed}" for seed in (0, 1)]
    assert status == 0 and values == [read_json(f / "objective.json")["objective"] for f in folders]
    assert [read_json(f / "run.json")["identity"]["seed"] for f in folders] == [0, 1]


def test_without_a_tune_split_there_is_no_objective(command, tmp_path):
    assert command("data.tune_split=null") == (0, [None])
    assert not (tmp_path / "tiny/objective.json").exists()


def test_a_study_of_real_trainings(command, tmp_path):
    space = (
        "search.space={optimizer.learning_rate:{low:1e-4,high:1e-2,log:true},"
        "transform.flip:{choices:[0.0,0.5]}}"
    )
    settings = ["stage=search", "search.trials=2", space]
    status, (best,) = command(*settings)
    assert status == 0
    study = tmp_path / "tiny"
    rows, found = table(study), yaml.safe_load((study / "best.yaml").read_text())
    assert best == found["objective"] == max(float(r["objective"]) for r in rows)
    for row in rows:
        folder = study / f"trial={row['trial']}"
        identity = read_json(folder / "run.json")["identity"]
        assert identity["optimizer"]["learning_rate"] == float(row["optimizer.learning_rate"])
        assert identity["transform"]["flip"] == float(row["transform.flip"])
        assert read_json(folder / "objective.json")["objective"] == float(row["objective"])
        assert identity["seed"] == 0 and row["last_step"] == "2"
    assert found["run"] == f"{study}/trial={found['trial']}" and len(found["overrides"]) == 4
    sets = [
        {"data": "shapes", "split": "train", "labels": 4, "seed": 0},
        {"data": "shapes", "split": "tune", "labels": 2},
    ]
    assert found["chosen_on"] == sets  # real images were learnt, and judged by others
    shown = "[{data:shapes,split:train,labels:4,seed:0},{data:shapes,split:tune,labels:2}]"
    assert found["overrides"][2:] == [
        f"++chosen_on.{key}={shown}" for key in ("learning_rate", "flip")
    ]
    lines = (study / "best.yaml").read_text().splitlines()
    assert all(f"- {line}" in lines for line in found["overrides"])  # as runs/shapes.sh reads them
    run = read_json(study / "trial=0/run.json")
    assert [c for c in run["chosen_on"] if c["what"] == "flip"] == [
        {"what": "flip", "data": "shapes/train", "labels": 4, "seed": 0},
        {"what": "flip", "data": "shapes/tune", "labels": 2},
    ]
    assert "chosen_on" not in json.dumps([run["identity"], read_json(study / "study.json")])
    assert command(*settings) == (0, [best])
    assert command(*settings, "batch_size=4")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["data.tune_split=null"],
            "data 'shapes' has no tune split, and nothing is ever chosen on the test split",
        ),
        (["data.tune_split=test"], "has the test split 'test' as tune split"),
        (["trainer.limit_val_batches=0"], "trainer.limit_val_batches=0 validates nothing"),
        (["trainer.devices=2"], "trainer.devices=2: a trial trains on one device"),
        (
            ["search.space={optimizer.learning_rat:{low:1e-4,high:1e-2}}"],
            "Did you mean 'learning_rate'?",
        ),
        (
            ["search.space={segmenter:{choices:[deeplabv3,deeplabv4]}}"],
            "no such segmenter; allowed",
        ),
        (["search.space={seed:{choices:[0,1]}}"], "search.space: seed is not searched"),
        (
            ["search.space={data.tune_split:{choices:[tune,test]}}"],
            "search.space: data.tune_split is not searched",
        ),
        (["search.space=nowhere.yaml"], "search.space=nowhere.yaml: no such file"),
        (["search.space={}"], "search.space={}: expected keys"),
        (["search.space=null"], "search.space=None: expected keys"),
    ],
)
def test_searches_that_make_no_sense(command, tmp_path, capsys, arguments, message):
    group = [] if arguments[0].startswith("search") else ["search.space=learning_rate"]
    assert command("stage=search", *group, *arguments)[0] == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["shots=2", "seed=5"], [("train", 2, 5), ("tune", 2, None)]),
        (["shots=all", "hold_out=1"], [("train", 4, None)]),  # what is held out is among them
        (["source=mixed", "shots=2", "hold_out=1"], [("train", 2, 0)]),
        (["source=synthetic", "shots=null"], [("tune", 2, None)]),
        (["source=synthetic", "shots=null", "hold_out=1"], []),  # judged by masks of the attention
    ],
)
def test_what_labels_a_search_looks_at(data_root, tmp_path, given, expected):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = hydra.compose("train", [*tiny(data_root, tmp_path), *given])
    found = [(one["data"], one["labels"], one.get("seed")) for one in config.judged_labels(cfg)]
    assert found == [(f"shapes/{split}", labels, seed) for split, labels, seed in expected]


def test_a_space_may_lie_in_a_file(tmp_path):
    (tmp_path / "space.yaml").write_text(
        "optimizer.learning_rate: {low: 1e-5, high: 1.0e-2, log: true}\n"
    )
    cfg = OmegaConf.create({"search": {"space": str(tmp_path / "space.yaml")}})
    assert config.search_space(cfg) == {
        "optimizer.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}
    }


def test_the_wandb_sweep_is_made_of_overrides(monkeypatch):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((config.CONF.parent / "examples/wandb_sweep.yaml").read_text())
    assert sweep["program"] == "train.py" and sweep["metric"] == {
        "name": "objective",
        "goal": "maximize",
    }
    low = {
        k: v["value"] if "value" in v else v.get("values", [v.get("min")])[0]
        for k, v in sweep["parameters"].items()
    }
    macros = create_sweep_command_args({"args": {k: {"value": v} for k, v in low.items()}})
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    line = []
    for part in create_sweep_command(sweep["command"]):  # as W&B's agent does
        line += (
            macros.get(part[2:-1], [part])
            if part.startswith("${") and part.endswith("}")
            else [part]
        )
    given = line[line.index("${program}") + 1 :]
    config.check_overrides("train", given)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = hydra.compose("train", given)
    assert (
        cfg.name == "wandb_sweep/abc123"
        and cfg.optimizer.learning_rate == low["optimizer.learning_rate"]
    )
    assert cfg.logger == "wandb" and cfg.trainer.limit_val_batches == 1.0


# Launchers, each job in a process of its own


def launched(data_root, output_root, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "train.py", "-m", *tiny(data_root, output_root), "seed=0,1", *arguments]
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250)


@pytest.mark.full
@pytest.mark.parametrize(
    "launcher",
    [["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["hydra/launcher=submitit_local"]],
    ids=lambda x: x[0],
)
def test_launchers_train_in_folders_of_their_own(tmp_path, data_root, launcher):
    done = launched(data_root, tmp_path, *launcher)
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        folder = tmp_path / f"tiny/seed={seed}"
        run = read_json(folder / "run.json")
        assert run["identity"]["seed"] == seed and run["command"].startswith(
            "python train.py -m experiment=shapes_real"
        )
        assert read_json(folder / "objective.json")["objective"] == pytest.approx(
            validations(folder)[-1], abs=1e-4
        )


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_the_error_of_a_launched_job_is_shown(tmp_path, data_root, launcher):
    done = launched(data_root, tmp_path, f"hydra/launcher={launcher}", "shots=99")
    assert done.returncode not in (0, None)
    assert "shots=99, but the split holds 4 images" in done.stderr
