"""benchmarks/train.py: its data, configurations and turns; and, among the long tests, all five
trainings at a small size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import train
from benchmarks.train_sides import Setup, Side, Timed, Turns, ours, runner, runner_config
from benchmarks.voc import write_voc
from dd.data.datasets import SegmentationFolder
from dd.taxonomy import taxonomy


@pytest.fixture
def setup(tmp_path):
    return Setup(
        str(write_voc(tmp_path / "VOC", 8)), str(tmp_path), "cpu", 18, 64, 2, 0, turns=2, turn=1
    )


class Parent:
    """The other end of a training's connection: it always says go."""

    def __init__(self):
        self.told = []

    def send(self, message):
        self.told.append(message)

    def recv(self):
        return "go"


def test_the_images_are_a_voc_data_set(setup):
    data = SegmentationFolder(setup.data, "train", taxonomy("voc"))
    sizes = {image.shape[:2] for image, _ in data}
    assert len(data) == 8 and sizes == {(375, 500), (333, 500), (500, 375)}
    values = set().union(*(np.unique(mask).tolist() for _, mask in data))
    assert {0, 255} < values and len(values) > 5
    weights = [p.stat().st_size for p in (Path(setup.data) / "JPEGImages").iterdir()]
    assert min(weights) > 50_000 and max(weights) < 300_000


@pytest.mark.parametrize(("side", "train_side"), [("runner", runner), ("ours", ours)])
def test_each_training_takes_its_turns(setup, side, train_side):
    parent = Parent()
    turns = Turns(parent, setup)
    train_side(turns, Side(side, side == "runner", True), setup)
    first, told, second, last = parent.told
    assert first == second == "ready" and turns.steps == 2
    for turn in (told, last):
        assert 0 < turn["waited"] < turn["seconds"] and turn["peak_bytes"] > 10**7
        assert 1 < turn["loss"] < 10  # near 1.4 * log(21) at the start


def test_the_runners_configuration_is_its_own(setup):
    cfg = runner_config(Side("runner", True, False), setup)
    assert cfg.model.type == "EncoderDecoder" and cfg.model.backbone.depth == 18
    assert cfg.optim_wrapper.type == "OptimWrapper" and cfg.optim_wrapper.optimizer.type == "SGD"
    steps = [s.type for s in cfg.train_dataloader.dataset.pipeline]
    assert steps[2:] == [
        "RandomResize",
        "RandomCrop",
        "RandomFlip",
        "PhotoMetricDistortion",
        "Pad",
        "PackSegInputs",
    ]
    setup.device = "cuda"
    cfg = runner_config(Side("runner", True, True), setup)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == ("AmpOptimWrapper", "bfloat16")
    assert cfg.model.backbone.norm_cfg.type == "SyncBN"


def test_the_time_spent_waiting_is_that_of_the_loader():
    timed = Timed([1, 2, 3])
    assert len(timed) == 3 and list(timed) == [1, 2, 3] and timed.seconds > 0


def test_rates_and_ratios_are_of_the_medians(setup):
    times = {
        "ours_fp32": 2.0,
        "runner_fp32": 4.0,
        "ours_bf16": 1.0,
        "runner_bf16": 1.5,
        "everything": 0.5,
    }
    taken = {
        name: {"seconds": [s, 100.0, s], "waited": 1.0, "peak_bytes": 2**30, "loss": 3.0}
        for name, s in times.items()
    }
    found = train.summary(taken, setup)
    assert found["trainings"]["runner_bf16"]["images_per_second"] == pytest.approx(
        2 / 1.5, abs=1e-4
    )
    assert found["trainings"]["ours_fp32"]["waiting_percent"] == pytest.approx(100 / 104, abs=0.01)
    ratios = [
        found[f"{k}_over_runner_{p}"]
        for k, p in (("ours", "fp32"), ("ours", "bf16"), ("everything", "bf16"))
    ]
    assert ratios == pytest.approx([2, 1.5, 3], abs=1e-3)


@pytest.mark.parametrize("argument", [["--batch", "1"], ["--steps", "0"], ["--workers", "-1"]])
def test_what_cannot_be_measured_is_refused(argument, capsys):
    with pytest.raises(SystemExit):
        train.parse([*argument, "--device", "cpu"])
    assert f"{argument[0]} {argument[1]}: use" in capsys.readouterr().err


@pytest.mark.full
def test_all_five_trainings(capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = train.main(
        ["--device", "cpu", "--depth", "18", "--size", "64", "--steps", "1", "--profile"]
    )
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == result
    assert list(result["trainings"]) == [
        "ours_fp32",
        "runner_fp32",
        "ours_bf16",
        "runner_bf16",
        "everything",
    ]
    assert all(row["images_per_second"] > 0 for row in result["trainings"].values())
    assert len(result["operations_percent"]) == 8 and not torch.cuda.is_available()
    same = [result["trainings"][name]["last_loss"] for name in ("ours_bf16", "everything")]
    assert same[0] == pytest.approx(
        same[1], rel=0.02
    )  # the layout and the fused optimiser: rounding of bfloat16 alone
