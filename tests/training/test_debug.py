"""Debug choices and further callbacks of train.py: runs to look at, whose folder never becomes a
run's."""

import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from dd import config
from dd.stages.prepare_shapes import prepare_shapes
from tests.doors import door

ROOT = Path(__file__).parents[2]
SMALL = [
    "batch_size=2",
    "scale=64",
    "segmenter.base_channels=8",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "device=cpu",
]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``train(*arguments)`` -> exit status of train.py in a folder with a small data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    prepare_shapes(tmp_path / "data", {"train": 5, "tune": 2, "test": 1})

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as stop:
            config.main(door("train"))
        return stop.value.code

    yield call
    torch.set_flush_denormal(False)
    GlobalHydra.instance().clear()


def kept(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("debug", "more", "files"),
    [
        ("fast", [], {"config.yaml"}),
        (
            "overfit",
            ["trainer.max_steps=3", "trainer.log_every_n_steps=1"],
            {"config.yaml", "metrics.csv", "hparams.yaml"},
        ),
        (
            "profile",
            ["trainer.max_steps=2"],
            {"config.yaml", "metrics.csv", "hparams.yaml", "fit-profile.txt"},
        ),
    ],
)
def test_a_debug_run_is_no_run(train, tmp_path, capsys, debug, more, files):
    for _ in range(2):  # nothing goes on from the first one
        assert train("experiment=shapes_real", "shots=3", f"debug={debug}", *SMALL, *more) == 0, (
            capsys.readouterr().err
        )
        steps = {"fast": 1, "overfit": 3, "profile": 2}[debug]
        where = f"outputs/debug/{debug}/shapes/real_shapes/shots=3,seed=0; no run is kept)"
        said = capsys.readouterr().out
        assert f"debug={debug}: {steps} steps, train/loss=" in said and where in said
    found = kept(tmp_path / f"outputs/debug/{debug}/shapes/real_shapes/shots=3,seed=0")
    assert files <= found and not any(
        name.endswith((".ckpt", "run.json", "settings.json")) for name in found
    )
    assert kept(tmp_path / "outputs") == {
        f"debug/{debug}/shapes/real_shapes/shots=3,seed=0/{name}" for name in found
    }


def test_debug_is_about_trainings(train, capsys):
    assert train("experiment=shapes_budget", "debug=fast") == 2
    assert (
        "debug=fast tries the training of stage=segmenter; got stage=study"
        in capsys.readouterr().err
    )


WATCH = "+trainer.callbacks.rate={_target_: pytorch_lightning.callbacks.LearningRateMonitor}"


def test_further_callbacks_stand_beside_those_of_the_trainer(tmp_path):
    cfg = config.compose("train", ["name=a", WATCH, f"output_root={tmp_path}"])
    assert list(cfg.trainer.callbacks) == [
        "ema",
        "last",
        "samples",
        "best",
        "rate",
    ]
    kinds = [type(c).__name__ for c in config.trainer(cfg, validate=True).callbacks]
    assert {"EMA", "LearningRateMonitor"} <= set(kinds)
