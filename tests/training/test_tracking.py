"""Loggers: what fails in one never ends a training, and what W&B, MLflow and TensorBoard hold is
read back."""

import csv
import itertools
import json
import os
import struct
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import Logger

from dd.store.provenance import fingerprint, read_json, write_atomic, write_json
from dd.training import loggers as loggers_module
from dd.training import segmentation
from dd.training.callbacks import Report, ShownImage, ShownPredictions, Steps, image_miou
from dd.training.log_scores import log_scores
from dd.training.loggers import (
    CELL,
    PATIENCE,
    Guarded,
    MLflow,
    TensorBoard,
    confusion_picture,
    data_sets,
    panel,
    tell,
)
from dd.training.segmentation import EMA, LastCheckpoint, Segmentation, predict
from dd.training.wandb import Wandb, log_evaluation

NAMES = ["background", "cat", "dog"]
VALIDATED = {
    "limit_val_batches": 1.0,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 1,
}
SYNTHETIC = {
    "source": "synthetic",
    "root": "toys",
    "split": "train",
    "masks": "m",
    "images": 7,
    "shots": None,
    "seed": 0,
    "after": None,
    "mask_settings": {"power": 4},
}


@pytest.fixture
def fit(tmp_path, tiny_segmenter, toy_data, make_trainer):
    """``fit(steps, loggers, callbacks)`` on seven toy pictures, validated on three of them ->
    (module, trainer)."""

    def run(steps=4, loggers=(), callbacks=(), folder=tmp_path, start=None):
        module = Segmentation(tiny_segmenter(), NAMES, learning_rate=0.05)
        averaged = [EMA(0.7), LastCheckpoint(str(folder / "checkpoints"), 2), *callbacks]
        trainer = make_trainer(folder, steps, averaged, logger=list(loggers), **VALIDATED)
        trainer.fit(module, datamodule=toy_data(tune=3), ckpt_path=start, weights_only=True)
        return module, trainer

    return run


class Memory(Logger):
    """Keeps what it is told; the calls whose number is in ``fails`` raise."""

    def __init__(self, fails=()):
        super().__init__()
        self.calls, self.fails = [], fails

    def _do(self, *call):
        self.calls.append(call)
        if len(self.calls) - 1 in self.fails:
            raise OSError("no space left")

    name = version = property(lambda self: self._do("name"))

    def log_metrics(self, metrics, step=None):
        self._do("log_metrics", metrics, step)

    def log_hyperparams(self, params, *_, **__):
        self._do("log_hyperparams", params)

    def save(self):
        self._do("save")

    def finalize(self, status):
        self._do("finalize", status)

    def show(self, samples, class_names, step):
        self._do("show", samples, class_names, step)

    def confusion(self, counts, class_names, step):
        self._do("confusion", counts, class_names, step)

    def table(self, samples, class_names, step):
        self._do("table", samples, class_names, step)


class Always:
    """Contains every number."""

    def __contains__(self, _):
        return True


# What fails


def test_a_logger_that_always_fails_is_one_warning(fit, tmp_path):
    broken, csv = Memory(Always()), CSVLogger(tmp_path, "", "")
    with pytest.warns(UserWarning) as warned:
        _, trainer = fit(loggers=[Guarded(csv), Guarded(broken)], callbacks=[ShownPredictions(2)])
        tell(trainer, "finish", False)
    assert trainer.global_step == 4
    told = [str(w.message) for w in warned if "logger" in str(w.message)]
    assert len(told) == 1 and told[0].startswith(
        "logger Memory failed in log_hyperparams (OSError: no space left); the training"
    )
    assert (
        Counter(call[0] for call in broken.calls)["log_metrics"] == PATIENCE
    )  # then it is left alone
    assert (tmp_path / "metrics.csv").read_text().count("\n") > 4  # the other one is not


def test_a_logger_that_recovers_is_heard_again():
    memory = Memory({0, 1, 3, 4})
    guarded = Guarded(memory)
    with pytest.warns(UserWarning) as warned:
        for step in range(6):
            guarded.log_metrics({"a": 1.0}, step)
    assert len(memory.calls) == 6 and len(warned) == 1


@pytest.mark.parametrize("name", ["name", "version", "save_dir", "log_dir", "experiment"])
def test_an_attribute_that_fails_is_none(name):
    broken = type("Broken", (Memory,), {name: property(lambda self: 1 / 0)})()
    with pytest.warns(UserWarning, match=f"logger Broken failed in {name} .ZeroDivisionError"):
        assert getattr(Guarded(broken), name) is None


def test_a_guarded_logger_passes_everything_on(fit, tmp_path):
    plain, guarded = (
        CSVLogger(tmp_path / "plain", "", ""),
        Guarded(CSVLogger(tmp_path / "guarded", "", "")),
    )
    fit(loggers=[plain], folder=tmp_path / "plain")
    fit(loggers=[guarded], folder=tmp_path / "guarded")
    file = "hparams.yaml"
    assert (tmp_path / "plain" / file).read_text() == (tmp_path / "guarded" / file).read_text()
    one, other = (
        list(csv.DictReader((tmp_path / name / "metrics.csv").open()))
        for name in ("plain", "guarded")
    )
    for row in (*one, *other):
        row.pop("train/step_seconds")
    assert other == [
        {**row, "step": str(int(row["step"]) + 1)} for row in one
    ]  # steps done, not Lightning's index
    assert guarded.log_dir == guarded.logger.log_dir and guarded.name == ""


def test_what_a_logger_cannot_do_is_no_failure():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Guarded(CSVLogger("nowhere", "", "")).attempt("show", []) is None


def test_an_interruption_is_not_swallowed():
    stopped = type(
        "Stopped", (Memory,), {"save": lambda self: (_ for _ in ()).throw(KeyboardInterrupt)}
    )()
    with pytest.raises(KeyboardInterrupt):
        Guarded(stopped).save()


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda f: Wandb(f, "a"), "wandb"),
        (lambda f: MLflow(f, f, "e", "a"), "mlflow"),
        (TensorBoard, "tensorboard"),
    ],
)
def test_a_tracker_that_is_not_installed_names_its_extra(make, extra, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers_module, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=rf'logger={extra} needs {extra}, .*pip install -e "\.\[{extra}\]"'
    ):
        make(str(tmp_path))


# What is shown


def test_the_miou_of_one_image():
    truth = torch.tensor([[0, 0, 1], [1, 255, 255]])
    prediction = torch.tensor([[0, 1, 1], [1, 2, 0]])
    assert image_miou(truth, prediction, 3) == pytest.approx(
        100 * (1 / 2 + 2 / 3) / 2
    )  # class 2 only where nothing counts
    assert image_miou(truth, truth.clamp(max=1), 3) == 100
    assert image_miou(torch.full((2, 3), 255), prediction, 3) is None


def test_the_panel_shows_image_truth_and_prediction():
    image = np.full((2, 3, 3), 100, np.uint8)
    shown = panel(
        ShownImage("a", image, np.ones((2, 3), np.uint8), np.zeros((2, 3), np.uint8), 0.0)
    )
    assert shown.shape == (2, 9, 3) and shown.dtype == np.uint8
    assert (shown[:, :3] == 100).all()
    assert (shown[:, 3:6] == [40 + int(128 * 0.6), 40, 40]).all()  # VOC's class 1 is (128, 0, 0)
    assert (shown[:, 6:] == 40).all()


def test_samples_are_the_first_images_with_the_averaged_weights(fit, toy_data, tmp_path):
    memory = Memory()
    module, _ = fit(loggers=[Guarded(memory)], callbacks=[ShownPredictions(2)])
    shown = [c for c in memory.calls if c[0] in ("show", "table")]
    assert [(c[0], c[3]) for c in shown] == [("show", 2), ("show", 4), ("table", 4)]
    samples, data = shown[-1][1], toy_data(tune=3).tune
    assert [s.id for s in samples] == ["0", "1"] and shown[-1][2] == NAMES
    weights = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(weights)
    for index, sample in enumerate(samples):
        image, mask = data[index]
        assert (sample.image == image).all() and (sample.truth == mask).all()
        picture = [torch.from_numpy(image.transpose(2, 0, 1).copy())]
        found = predict(module.segmenter.eval(), picture, [mask.shape])[0]
        assert (sample.prediction == found.numpy()).all()
        assert sample.miou == image_miou(torch.from_numpy(mask), found, 3)


def test_numbers_and_pictures_have_the_number_of_steps_done(fit):
    memory = Memory()
    fit(loggers=[Guarded(memory)], callbacks=[ShownPredictions(2)])
    found = {
        what: [c for c in memory.calls if c[0] == what]
        for what in ("log_metrics", "show", "confusion", "table")
    }
    steps = lambda key: [c[2] for c in found["log_metrics"] if key in c[1]]  # noqa: E731
    assert steps("train/loss") == [1, 2, 3, 4] and steps("tune/miou") == [2, 4]
    assert [c[3] for c in found["show"]] == [c[3] for c in found["confusion"]] == [2, 4]
    assert found["table"][0][3] == 4


def test_the_confusion_matrix_is_that_of_the_whole_tune_set(fit):
    memory = Memory()
    fit(loggers=[Guarded(memory)], callbacks=[ShownPredictions(2)])
    (_, counts, names, _) = [c for c in memory.calls if c[0] == "confusion"][-1]
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    miou = 100 * np.mean(counts.diagonal()[union > 0] / union[union > 0])
    logged = [
        c[1]["tune/miou"] for c in memory.calls if c[0] == "log_metrics" and "tune/miou" in c[1]
    ]
    assert names == NAMES and counts.shape == (3, 3) and logged[-1] == pytest.approx(miou, abs=1e-4)


class Gradients(pl.Callback):
    """The norm of the gradient before it is clipped, and the rate, of each step."""

    def __init__(self):
        self.norms, self.rates = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):  # Lightning clips after it
        squares = sum(
            float((p.grad.double() ** 2).sum()) for p in module.parameters() if p.grad is not None
        )
        self.norms.append(squares**0.5)
        self.rates.append(max(g["lr"] for g in optimizer.param_groups))


@pytest.mark.parametrize("clip", [None, 0.01, (0.01, "value")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_rate_gradient_norm_and_seconds_come_with_the_loss(
    tmp_path, tiny_segmenter, toy_data, make_trainer, clip, accumulate
):
    memory, seen, module = (
        Memory(),
        Gradients(),
        Segmentation(tiny_segmenter(), NAMES, learning_rate=0.05),
    )
    how = (
        {"gradient_clip_val": clip}
        if not isinstance(clip, tuple)
        else dict(zip(("gradient_clip_val", "gradient_clip_algorithm"), clip, strict=True))
    )
    how |= {"log_every_n_steps": 2, "accumulate_grad_batches": accumulate}
    trainer = make_trainer(tmp_path, 6, [seen], logger=[Guarded(memory)], **how)
    trainer.fit(module, datamodule=toy_data())
    rows = [(c[2], c[1]) for c in memory.calls if c[0] == "log_metrics" and "train/loss" in c[1]]
    assert [step for step, _ in rows] == [2, 4, 6]
    for step, row in rows:
        assert row["train/gradient_norm"] == pytest.approx(seen.norms[step - 1], rel=1e-5)
        expected = 0.05 * (1 - (step - 1) / 6) ** 0.9
        assert row["train/learning_rate"] == pytest.approx(expected) == seen.rates[step - 1]
        assert row["train/step_seconds"] > 0


def test_seconds_of_a_step_leave_validations_out(
    monkeypatch, tmp_path, tiny_segmenter, toy_data, make_trainer
):
    """A clock that a step moves by 1 second and a validated batch by 100."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(segmentation, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Move(pl.Callback):
        def on_train_batch_start(self, *_):
            clock.now += 1

        def on_validation_batch_start(self, *_):
            clock.now += 100

    memory, module = Memory(), Segmentation(tiny_segmenter(), NAMES)
    how = {**VALIDATED, "log_every_n_steps": 4}
    make_trainer(tmp_path, 8, [Move()], logger=[Guarded(memory)], **how).fit(
        module, datamodule=toy_data(tune=3)
    )
    rows = [c[1] for c in memory.calls if c[0] == "log_metrics" and "train/loss" in c[1]]
    assert [row["train/step_seconds"] for row in rows] == [1, 1]


def test_clipping_is_lightnings(tmp_path, tiny_segmenter, toy_data, make_trainer, monkeypatch):
    def weights(folder):
        module = Segmentation(tiny_segmenter(), NAMES, learning_rate=0.05)
        how = {"gradient_clip_val": 0.01, "log_every_n_steps": 1}
        make_trainer(tmp_path / folder, 4, [], logger=False, **how).fit(
            module, datamodule=toy_data()
        )
        return module.state_dict()

    ours = weights("ours")
    monkeypatch.delattr(Segmentation, "configure_gradient_clipping")
    theirs = weights("theirs")
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())


def test_the_picture_of_a_confusion_matrix():
    picture = confusion_picture(np.array([[3, 1, 0], [0, 0, 0], [0, 2, 2]]), NAMES)
    assert (
        picture.dtype == np.uint8 and picture.shape[0] == picture.shape[1] and picture.shape[2] == 3
    )
    cells = picture[-3 * CELL :, -3 * CELL :]
    found = cells[CELL // 2 :: CELL, CELL // 2 :: CELL, 0]
    assert found.tolist() == [
        [64, 191, 255],
        [255, 255, 255],
        [255, 128, 128],
    ]  # 255 * (1 - share of the row)
    names = picture[: -3 * CELL, -3 * CELL :], picture[-3 * CELL :, : -3 * CELL]
    assert all((part < 128).any() for part in names)


def test_each_validation_is_reported(fit):
    heard = []
    memory = Memory()
    fit(loggers=[Guarded(memory)], callbacks=[Report(lambda *told: heard.append(told))])
    logged = [
        c[1]["tune/miou"] for c in memory.calls if c[0] == "log_metrics" and "tune/miou" in c[1]
    ]
    assert [(step, last) for step, _, last in heard] == [(2, False), (4, True)]
    assert [value for _, value, _ in heard] == pytest.approx(logged)


def test_a_training_into_a_log_file_says_how_far_it_is(fit, capsys, monkeypatch):
    """Each look at the clock is 20 s after the last one: a line at least every second look,
    steps or validation."""
    seconds = itertools.count(0, 20)
    monkeypatch.setattr("dd.store.progress.time.monotonic", lambda: float(next(seconds)))
    fit(callbacks=[Steps("pets/seed=0")])
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("pets/seed=0: ")
    ]
    assert (
        lines[-1].startswith("pets/seed=0: 4 of 4 steps, ") and ", 0:00:00 left, loss " in lines[-1]
    )
    assert any("2 of 4 steps" in line and "validating" in line for line in lines)
    assert len(lines) >= 3 and "Epoch" not in "".join(lines) and "-2" not in "".join(lines)


def test_a_resumed_training_counts_from_where_it_was(fit, monkeypatch, tmp_path):
    fit(steps=2)
    steps = Steps("pets")
    monkeypatch.setattr(steps, "teardown", lambda *_, **__: None)
    fit(steps=4, callbacks=[steps], start=str(tmp_path / "checkpoints/last.ckpt"))
    assert (steps.progress.before, steps.progress.done, steps.progress.total) == (2, 4, 4)


def test_a_report_may_end_the_training(fit, tmp_path):
    def stop(step, value, last):
        raise RuntimeError("pruned")

    with pytest.raises(RuntimeError, match="pruned"):
        fit(callbacks=[Report(stop)])


def test_data_sets_behind_a_run():
    assert data_sets(SYNTHETIC) == {
        "toys": {
            "root": "toys",
            "split": "train",
            "masks": "m",
            "images": 7,
            "shots": None,
            "mask_settings": {"power": 4},
        }
    }
    real, synthetic = (
        {"root": r, "split": "train", "masks": "m", "images": 3} for r in ("voc", "toys")
    )
    mixed = {
        "source": "mixed",
        "real": real,
        "synthetic": {**synthetic, "mask_settings": {}},
        "shots": 3,
    }
    assert data_sets(mixed) == {"voc": real, "toys": {**synthetic, "mask_settings": {}}}


# TensorBoard and MLflow


def test_tensorboard_holds_curves_and_masks(fit, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, trainer = fit(loggers=[Guarded(TensorBoard(str(tmp_path)))], callbacks=[ShownPredictions(2)])
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(found.Scalars("tune/miou")) == 2 and found.Scalars("tune/iou/background")
    pictures = found.Images("tune/masks/1")
    assert [p.step for p in pictures] == [2, 4] and (pictures[0].width, pictures[0].height) == (
        30,
        8,
    )
    for same in (found.Scalars("tune/miou"), found.Images("tune/confusion")):
        assert [p.step for p in same] == [2, 4]
    for name in ("loss", "learning_rate", "gradient_norm", "step_seconds"):
        assert [p.step for p in found.Scalars(f"train/{name}")] == [1, 2, 3, 4], name


@pytest.mark.parametrize("objective", [41.5, None])
def test_tensorboards_hyper_parameters_come_with_the_objective(fit, tmp_path, objective):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    logger = Guarded(TensorBoard(str(tmp_path)))
    logger.attempt(
        "begin",
        {"seed": 1, "optimizer": {"rate": 0.5, "betas": [0.9, 0.99]}, "shots": None},
        SYNTHETIC,
        None,
    )
    _, trainer = fit(loggers=[logger])
    tell(trainer, "end", {"weights_sha256": "ab", "steps": 4}, objective)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    given = HParamsPluginData.FromString(content).session_start_info.hparams
    values = {key: getattr(v, v.WhichOneof("kind")) for key, v in given.items()}
    assert values == {
        "seed": 1,
        "optimizer.rate": 0.5,
        "optimizer.betas": "[0.9, 0.99]",
        "shots": "None",
    }
    assert "hp_metric" not in found.Tags()["scalars"]
    if objective is None:
        assert "objective" not in found.Tags()["scalars"]
    else:
        assert [(p.step, p.value) for p in found.Scalars("objective")] == [(4, 41.5)]
        experiment = found.summary_metadata["_hparams_/experiment"].plugin_data.content
        (metric,) = HParamsPluginData.FromString(experiment).experiment.metric_infos
        assert metric.name.tag == "objective"


RESULT = {
    "miou": 50.0,
    "pixel_accuracy": 70.0,
    "iou": {"background": 60.0, "cat": 40.0, "dog": None},
    "confusion": [[3, 1, 0], [1, 1, 0], [0, 0, 0]],
}


def test_test_scores_go_to_the_trackers_of_the_run(fit, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = str(tmp_path / "mlruns")
    chosen = [
        Guarded(TensorBoard(str(tmp_path / "a"))),
        Guarded(MLflow(str(tmp_path / "a"), store, "toys", "a")),
    ]
    fit(loggers=chosen, folder=tmp_path / "a")
    write_json(tmp_path / "a/run.json", {"steps": 4})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(tensorboard|mlflow) did not take")
        log_scores(tmp_path / "a", "eval/toys", RESULT)
    expected = {"miou": 50.0, "pixel_accuracy": 70.0, "iou/background": 60.0, "iou/cat": 40.0}
    found = EventAccumulator(str(tmp_path / "a/tensorboard")).Reload()
    told = {
        name: found.Scalars(name) for name in found.Tags()["scalars"] if name.startswith("eval/")
    }
    assert {k: [(p.step, p.value) for p in v] for k, v in told.items()} == {
        f"eval/toys/{k}": [(4, v)] for k, v in expected.items()
    }
    assert [p.step for p in found.Images("eval/toys/confusion")] == [4]
    client, known = (
        MlflowClient((tmp_path / "mlruns").as_uri()),
        read_json(tmp_path / "a/mlflow.json"),
    )
    run = client.get_run(known["run_id"])
    assert {f"eval/toys/{k}": v for k, v in expected.items()}.items() <= run.data.metrics.items()
    assert run.info.status == "FINISHED"
    assert [f.path for f in client.list_artifacts(known["run_id"], "confusion")][-1:] == [
        "confusion/eval-toys.png"
    ]


def test_a_tracker_that_fails_keeps_no_score_from_the_others(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "tensorboard").mkdir()
    write_json(tmp_path / "run.json", {"steps": 4})
    write_json(
        tmp_path / "mlflow.json", {"run_id": "none", "tracking_uri": (tmp_path / "mlruns").as_uri()}
    )
    with pytest.warns(UserWarning, match="mlflow did not take the scores .*metrics.json is kept"):
        log_scores(tmp_path, "eval/toys", RESULT)
    assert (
        EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("eval/toys/miou")[0].value
        == 50
    )
    log_scores(tmp_path / "elsewhere", "eval/toys", RESULT)  # a run without trackers


def test_mlflow_goes_on_in_the_same_run(fit, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)

    def train(rate, steps):
        logger = Guarded(MLflow(str(tmp_path / "a=1"), str(tmp_path / "mlruns"), "toys", "a=1"))
        logger.attempt("begin", {"optimizer": {"learning_rate": rate}}, SYNTHETIC, None)
        _, trainer = fit(
            steps, loggers=[logger], callbacks=[ShownPredictions(2)], folder=tmp_path / "a=1"
        )
        tell(trainer, "end", {"weights_sha256": "ab", "steps": steps}, 41.5)
        return logger

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "logger MLflow")
        first, second = train(0.5, 2), train(0.25, 4)
    assert first.logger.save_dir == str(tmp_path / "a=1")
    known = read_json(tmp_path / "a=1/mlflow.json")
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.run_id == known["run_id"] == second.version and run.info.status == "FINISHED"
    assert run.info.run_name == "a=1" and run.data.params["optimizer/learning_rate"] == "0.5"
    assert len(client.get_metric_history(run.info.run_id, "tune/miou")) == 3
    assert run.data.metrics["objective"] == 41.5
    assert run.data.tags["data.toys"] == fingerprint(data_sets(SYNTHETIC)["toys"])
    assert run.data.tags["weights_sha256"] == "ab"
    artifacts = tmp_path / "mlruns" / run.info.experiment_id / run.info.run_id / "artifacts"
    with Image.open(artifacts / "masks/1/step_0000004.png") as picture:
        assert picture.size == (30, 8)
    assert [row[0] for row in json.loads((artifacts / "samples.json").read_text())["data"]] == [
        "0",
        "1",
    ]


# W&B, offline and in a process of its own

SCRIPT = """
import importlib.util, sys
from pathlib import Path
import pytorch_lightning as pl
from dd.training.datamodule import SegmentationData
from dd.training.segmentation import EMA, LastCheckpoint, Segmentation
from dd.stages.train_segmenter import train_segmenter
from dd.training.callbacks import ShownPredictions
from dd.training.loggers import Guarded, tell
from dd.training.wandb import Wandb, log_evaluation

spec = importlib.util.spec_from_file_location("fakes", sys.argv[1])
fakes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fakes)


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            raise RuntimeError("crash")


def run(folder, callbacks, after=None):
    module = Segmentation(fakes.TinySegmenter(), ["background", "cat", "dog"], learning_rate=0.05)
    pictures = fakes.ToyPictures(7), fakes.ToyPictures(3)
    data = SegmentationData(*pictures, fakes.toy_train, fakes.toy_eval, 2)
    logger = Guarded(Wandb(str(folder), "toy/run", project="p"))
    last = LastCheckpoint(str(folder / "checkpoints"), 2)
    callbacks = [EMA(0.7), last, ShownPredictions(2), *callbacks]
    trainer = fakes.quiet_trainer(folder, 4, callbacks, logger=[logger], **VALIDATED)
    tell(trainer, "begin", {"optimizer": {"learning_rate": 0.05}}, TRAINED_ON, after)
    failed = True
    try:
        how = {"identity": {"seed": 0}, "record": {"trained_on": TRAINED_ON}}
        done = train_segmenter(folder, module, data, lambda: trainer, **how)
        tell(trainer, "end", done, 42.0)
        failed = False
        return done
    finally:
        tell(trainer, "finish", failed)


folder = Path(sys.argv[2])
try:
    run(folder, [Stop()])
except RuntimeError:
    done = run(folder, [])
result = {"data": "toys", "split": "test", "masks": "m", "num_images": 3, "weights": "ema"}
result |= {"protocol": {}, "supervision": "A", "miou": 50.0, "iou": {"cat": 50.0, "dog": None}}
result |= {"pixel_accuracy": 70.0, "confusion": [[3, 1], [1, 1]]}
log_evaluation(folder, "eval/toys", {**result, "weights_sha256": done["weights_sha256"]})
run(folder.with_name("second"), [], after=folder)
"""


def read_offline(path):
    """Records of a .wandb file: W&B's own protocol buffers in LevelDB's log format (blocks of 32
    KiB, 7-byte headers)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def contents(folder):
    """{"run", "history", "config", "artifacts", "exit"} of one offline run."""
    found = {"folder": folder, "history": [], "config": {}, "artifacts": [], "used": 0}
    for record in read_offline(next(folder.glob("*.wandb"))):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "history":
            found["history"].append(
                {
                    "/".join(i.nested_key) or i.key: json.loads(i.value_json)
                    for i in record.history.item
                }
            )
        elif kind == "config":
            found["config"] |= {
                u.key or "/".join(u.nested_key): json.loads(u.value_json)
                for u in record.config.update
            }
        elif kind == "artifact":
            found["artifacts"].append(record.artifact)
        elif kind == "use_artifact":
            found["used"] += 1
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder of a run that crashed, went on and was evaluated, all offline: (folder, its W&B
    runs by time)."""
    folder = tmp_path_factory.mktemp("wandb") / "run"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "DD_"))}
    home = folder.parent / "home"
    env = {
        **kept,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "HOME": str(home),
        "XDG_DATA_HOME": str(home),
    }
    env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    script = SCRIPT.replace("VALIDATED", repr(VALIDATED)).replace("TRAINED_ON", repr(SYNTHETIC))
    fakes = str(Path(__file__).parents[1] / "conftest.py")
    done = subprocess.run(
        [sys.executable, "-c", script, fakes, str(folder)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "failed in" not in done.stderr, done.stderr
    assert not list(home.rglob("staging"))  # nothing of the run lies outside its folder
    runs = [
        contents(f)
        for f in sorted((folder / "wandb").glob("offline-run-*"), key=lambda f: f.stat().st_ctime)
    ]
    return folder, {
        "-".join(r["run"].run_id.split("-")[1:]) + str(r.get("exit", "")): r for r in runs
    }


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tracked):
    folder, runs = tracked
    known = read_json(folder / "wandb.json")
    assert known == {
        "id": known["id"],
        "entity": None,
        "project": "p",
        "name": "toy/run",
        "group": "toy",
        "offline": True,
    }
    first, second = runs["1"], runs["0"]  # by exit status
    assert first["run"].run_id == second["run"].run_id == known["id"]
    assert (second["run"].run_group, second["run"].job_type, second["run"].display_name) == (
        "toy",
        "train",
        "toy/run",
    )
    other = read_json(folder.with_name("second") / "wandb.json")
    assert other["id"] != known["id"]


def test_wandb_holds_curves_and_settings(tracked):
    _, runs = tracked
    steps = [
        r["trainer/global_step"]
        for run in (runs["1"], runs["0"])
        for r in run["history"]
        if "train/loss" in r
    ]
    assert steps == [
        1,
        2,
        3,
        4,
    ]  # the crash came before the third step was logged, the checkpoint is of the second
    validated = [r for r in runs["0"]["history"] if "tune/miou" in r]
    values = [validated[-1][f"tune/iou/{name}"] for name in NAMES]
    assert validated[-1]["tune/miou"] == pytest.approx(sum(values) / 3, rel=1e-6)
    assert runs["0"]["config"]["optimizer"] == {"learning_rate": 0.05}
    assert [r["objective"] for r in runs["0"]["history"] if "objective" in r] == [42.0]
    for key in ("tune/miou", "tune/masks/filenames", "tune/confusion/path", "objective"):
        assert [r["trainer/global_step"] for r in runs["0"]["history"] if key in r] == [4], key
    logged = [r for r in runs["0"]["history"] if "train/loss" in r]
    assert all(
        r.keys() >= {f"train/{k}" for k in ("learning_rate", "gradient_norm", "step_seconds")}
        for r in logged
    )


def test_wandb_holds_masks_with_the_names_of_the_classes(tracked, toy_data):
    _, runs = tracked
    run = runs["0"]
    row = [r for r in run["history"] if "tune/masks/filenames" in r][-1]
    labels = run["config"]["_wandb"]["mask/class_labels"]
    assert {key.rpartition("_")[2] for key in labels} >= {"truth", "prediction"}
    for named in labels.values():
        assert named["value"] == {"0": "background", "1": "cat", "2": "dog", "255": "uncertain"}
    assert len(row["tune/masks/filenames"]) == 2
    data = toy_data(tune=3).tune
    for index, (picture, masks) in enumerate(
        zip(row["tune/masks/filenames"], row["tune/masks/all_masks"], strict=True)
    ):
        files = run["folder"] / "files"
        image, truth = data[index]
        with Image.open(files / picture) as found:
            assert (np.asarray(found.convert("RGB")) == image).all()
        with Image.open(files / masks["truth"]["path"]) as found:
            assert (np.asarray(found) == truth).all()
        with Image.open(files / masks["prediction"]["path"]) as found:
            assert np.asarray(found).shape == truth.shape and np.asarray(found).max() < 3


def test_wandb_holds_a_table_of_samples(tracked):
    folder, runs = tracked
    table = json.loads(
        next((runs["0"]["folder"] / "files/media/table/tune").glob("samples*.json")).read_text()
    )
    assert table["columns"] == ["id", "image", "truth", "prediction", "miou"]
    assert [row[0] for row in table["data"]] == ["0", "1"] and all(
        0 <= row[4] <= 100 for row in table["data"]
    )
    (artifact,) = (a for a in runs["0"]["artifacts"] if a.type == "run_table")
    files = {e.path: Path(e.local_path) for e in artifact.manifest.contents}
    assert all(path.is_relative_to(folder) and path.is_file() for path in files.values())
    rows = json.loads(files["tune/samples.table.json"].read_text())["data"]
    assert [set(row[i].get("masks") or ()) for row in rows for i in (1, 2, 3)] == [
        set(),
        {"truth"},
        {"prediction"},
    ] * 2


def test_the_lineage_has_fingerprints(tracked):
    folder, runs = tracked
    checkpoint = read_json(folder / "run.json")["weights_sha256"]
    data = {"toys": fingerprint(data_sets(SYNTHETIC)["toys"])}
    assert runs["1"]["config"]["fingerprints"] == {"data": data}
    assert runs["0"]["config"]["fingerprints"] == {"data": data, "model": checkpoint}
    (model,) = (a for a in runs["0"]["artifacts"] if a.type == "model")
    assert model.name == f"model-{runs['0']['run'].run_id}" and set(model.aliases) == {
        "latest",
        checkpoint[:12],
    }
    assert json.loads(model.metadata)["weights_sha256"] == checkpoint
    assert [e.path for e in model.manifest.contents] == ["run.json"]  # no weights without log_model
    evaluated = runs["eval-toys0"]
    assert (
        evaluated["run"].job_type == "evaluate"
        and evaluated["config"]["fingerprints"]["model"] == checkpoint
    )
    (evaluation,) = (a for a in evaluated["artifacts"] if a.type == "evaluation")
    assert json.loads(evaluation.metadata)["miou"] == 50.0
    assert any("confusion/path" in row for row in evaluated["history"])
    assert [e.path for e in evaluation.manifest.contents] == ["metrics.json"]
    assert not any(run["used"] for run in runs.values())  # use_artifact fails offline


@pytest.mark.parametrize("log_model", [False, True])
def test_online_the_lineage_is_linked(tmp_path, monkeypatch, log_model):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    used, logged, told = [], [], {}
    log = lambda artifact, aliases: logged.append((artifact, aliases))  # noqa: E731
    settings = SimpleNamespace(update=lambda values, **_: told.update(values))
    run = SimpleNamespace(
        offline=False, id="second", config=settings, use_artifact=used.append, log_artifact=log
    )
    before = tmp_path / "before"
    write_json(before / "wandb.json", {"id": "first", "entity": "us", "project": "p"})
    write_json(before / "run.json", {"weights_sha256": "ab" * 32})
    write_atomic(tmp_path / "run/checkpoints/last.ckpt", b"weights")
    logger = Wandb(str(tmp_path / "run"), "a", log_model=log_model)
    logger._experiment = run
    logger.begin({"seed": 1}, SYNTHETIC, before)
    data, model = used
    print_of_data = fingerprint(data_sets(SYNTHETIC)["toys"])
    assert (data.type, data.name.partition(":")[0], data.metadata["fingerprint"]) == (
        "dataset",
        "toys",
        print_of_data,
    )
    assert model == "us/p/model-first:abababababab"
    logger.end({"weights_sha256": "cd" * 32, "trained_on": SYNTHETIC, "steps": 4}, None)
    ((artifact, aliases),) = logged
    assert set(artifact.manifest.entries) == {"run.json", *(["last.ckpt"] if log_model else [])}
    assert artifact.type == "model" and aliases == ["latest", "cd" * 6]
    assert told == {
        "seed": 1,
        "fingerprints": {"data": {"toys": print_of_data}, "model": "cd" * 32},
    }


def test_log_model_never_surprises(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match="log_model='all': expected false"):
        Wandb(str(tmp_path), "a", log_model="all")
    with pytest.raises(ValueError, match="log_model=True and offline"):
        Wandb(str(tmp_path), "a", log_model=True, offline=True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ValueError, match="log_model=True and offline"):
        Wandb(str(tmp_path), "a", log_model=True)


def test_the_run_of_a_sweep_agent_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agent1")
    assert Wandb(str(tmp_path), "a").version == "agent1"
    write_json(tmp_path / "wandb.json", {"id": "before1"})
    assert Wandb(str(tmp_path), "a").version == "before1"


def test_only_tracked_runs_are_evaluated_in_wandb(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no wandb.json: it was not trained with logger=wandb"
    ):
        log_evaluation(tmp_path, "eval/toys", {})


def test_an_evaluation_survives_a_failure_of_wandb(tmp_path):
    write_json(tmp_path / "wandb.json", {"id": "a"})
    with pytest.warns(UserWarning, match="W&B did not take the evaluation .KeyError"):
        log_evaluation(tmp_path, "eval/toys", {})
