"""train.py from outside: stopped, starved of disk space, killed, on several devices. The same
command resumes, and ends with the same weights."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.train_segmenter import load_weights
from dd.store import checkpoints
from dd.store.provenance import read_json

ROOT = Path(__file__).parents[2]
TINY = [
    "experiment=shapes_real",
    "device=cpu",
    "shots=6",
    "batch_size=2",
    "scale=32",
    "transform.crop_size=32",
    "num_workers=1",
    "segmenter.base_channels=8",
    "trainer.precision=32-true",
    "trainer.max_steps=30",
    "trainer.limit_val_batches=1.0",
    "trainer.val_check_interval=12",
    "trainer.callbacks.last.every_n_steps=2",
    "trainer.enable_progress_bar=false",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    prepare_shapes(root, {"train": 6, "tune": 5, "test": 1})
    return root


def start(data, folder, *overrides):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *TINY,
        f"data_root={data}",
        f"output_root={folder.parent}",
    ]
    return subprocess.Popen(
        [*command, f"name={folder.name}", *overrides],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(data, folder, *overrides):
    """What a training that nothing stops says."""
    out, err = (process := start(data, folder, *overrides)).communicate(timeout=500)
    assert process.returncode == 0, err
    return out, err


def when_there_is(path, process, seconds=300):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)


def same(folder, other):
    pairs = [(load_weights(folder, kind), load_weights(other, kind)) for kind in ("ema", "raw")]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    _, err = finish(data, folder)
    assert "logging interval" not in err and "not resumable" not in err
    return folder


def test_a_training_is_stopped_then_finds_no_space_and_ends_all_the_same(data, straight, tmp_path):
    folder, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    process = start(data, folder)
    when_there_is(folder / "checkpoints/last.ckpt", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert (
        process.returncode == 143
        and "The same command resumes from" in err
        and "Traceback" not in err
    )
    last = folder / "checkpoints/last.ckpt"
    step, size = checkpoints.load(last)["global_step"], last.stat().st_size

    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        process = start(data, folder)
        _, err = process.communicate(timeout=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (
        process.returncode == 4
        and f"File too large: '{folder}/checkpoints/last." in err
        and "Traceback" not in err
    )
    assert checkpoints.load(last)["global_step"] == step
    assert not list(folder.rglob("*.tmp")) and not (folder / "run.json").exists()

    _, err = finish(data, folder)
    assert not err, err  # no advice of Lightning's about resuming
    assert same(folder, straight)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(5))
def test_a_training_that_is_killed_at_random_moments(data, straight, tmp_path, seed):
    folder, rng, kills = tmp_path / "run", random.Random(seed), 0
    for _ in range(4):
        process = start(data, folder)
        end = time.monotonic() + 300
        while (
            process.poll() is None
            and not (folder / "settings.json").exists()
            and time.monotonic() < end
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 8))
        process.kill()
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
    finish(data, folder)
    assert kills and same(folder, straight)


@pytest.mark.full
def test_two_devices(data, tmp_path):
    """Lightning starts the second process itself: the command once more."""
    two = ("trainer.devices=2", "batch_size=4")
    out, err = finish(data, tmp_path / "whole", *two)
    assert out.count("steps in") == 1 and "sync_dist" not in err
    assert (
        len(list((tmp_path / "whole").glob("metrics*.csv"))) == 1
        and read_json(tmp_path / "whole/run.json")["steps"] == 30
    )
    process = start(data, tmp_path / "stopped", *two)
    when_there_is(tmp_path / "stopped/checkpoints/last.ckpt", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143 and err.count("The same command resumes from") == 1
    finish(data, tmp_path / "stopped", *two)
    process = start(data, tmp_path / "killed", *two)
    when_there_is(tmp_path / "killed/checkpoints/last.ckpt", process)
    process.kill()
    process.communicate(timeout=300)
    finish(data, tmp_path / "killed", *two)
    assert same(tmp_path / "stopped", tmp_path / "whole") and same(
        tmp_path / "killed", tmp_path / "whole"
    )
