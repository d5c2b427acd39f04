"""The two trainings that benchmarks/train.py compares, each in a process of its own: ours as
train.py builds it, and mmsegmentation's Runner with its own configuration. They take turns:
while one trains the other waits."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import numpy as np
import pytorch_lightning as pl
import torch

from dd import config
from dd.generators.memory import peak_bytes, reset_peak
from dd.segmenters.deeplabv3 import (
    CHANNELS,
    quiet_construction,
)  # puts the placeholder for compiled operations in place
from dd.segmenters.transforms import EvalTransform
from dd.training.datamodule import SegmentationData
from dd.training.fitting import Reseed

CONFIGS = "deeplabv3/deeplabv3_r50-d8_4xb4-20k_voc12aug-512x512.py"
OPERATIONS = 8  # of the profiler's table


@dataclass
class Side:
    """One training. ``bf16``: mixed precision. ``overrides``: of train.py, ours alone."""

    name: str
    runner: bool
    bf16: bool
    overrides: list = field(default_factory=list)
    profiled: bool = False


@dataclass
class Setup:
    """What all trainings share: ``data`` a VOC folder, ``turns`` of ``turn`` steps each, the
    first one not counted."""

    data: str
    work: str
    device: str
    depth: int
    size: int
    batch: int
    workers: int
    turns: int
    turn: int

    def steps(self, side: Side) -> int:
        return self.turns * self.turn + side.profiled


class Timed:
    """Batches of a loader, and the seconds spent waiting for them."""

    def __init__(self, batches):
        self.batches, self.seconds = batches, 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        self.iterator = iter(self.batches)
        return self

    def __next__(self):
        started = time.perf_counter()
        batch = next(self.iterator)
        self.seconds += time.perf_counter() - started
        return batch


class Turns:
    """Waits for its turn before the first step and after each ``turn`` steps, and tells what the
    turn took."""

    def __init__(self, connection, setup: Setup):
        self.connection, self.setup, self.loader, self.steps, self.losses = (
            connection,
            setup,
            None,
            0,
            [],
        )

    def begin(self, loader: Timed) -> None:
        self.loader = loader
        reset_peak(self.setup.device)
        self._wait()

    def step(self, loss) -> None:
        self.losses.append(loss)
        self.steps += 1
        if self.steps % self.setup.turn or self.steps > self.setup.turns * self.setup.turn:
            return
        if self.setup.device == "cuda":
            torch.cuda.synchronize()
        told = {
            "seconds": time.perf_counter() - self.started,
            "waited": self.loader.seconds - self.waited,
        }
        told |= {"peak_bytes": peak_bytes(self.setup.device), "loss": float(self.losses[-1])}
        self.connection.send(told)
        if self.steps < self.setup.turns * self.setup.turn:
            self._wait()

    def _wait(self) -> None:
        self.connection.send("ready")
        self.connection.recv()
        self.waited, self.started = self.loader.seconds, time.perf_counter()


class TimedData(SegmentationData):
    def train_dataloader(self):
        self.loader = Timed(super().train_dataloader())
        return self.loader


class TakeTurns(pl.Callback):
    """Stands last, so that a step's average of the weights is part of the step. The step after
    the last turn is profiled."""

    def __init__(self, turns: Turns, data: TimedData):
        self.turns, self.data, self.profiler = turns, data, None

    def on_train_start(self, *_):
        self.turns.begin(self.data.loader)

    def on_train_batch_start(self, *_):
        if self.turns.steps == self.turns.setup.turns * self.turns.setup.turn:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.turns.step(outputs["loss"].detach())
        if self.profiler:
            self.profiler.stop()


def ours(turns: Turns, side: Side, setup: Setup) -> list:
    """Train by dd's parts as train.py puts them together; returns the profiler's first lines, if
    ``side`` is profiled."""
    overrides = [
        "experiment=paper_synthetic",
        "source=real",
        f"data.root={setup.data}",
        f"batch_size={setup.batch}",
        f"num_workers={setup.workers}",
        f"scale={setup.size}",
        f"device={setup.device}",
        "segmenter.pretrained=null",
        f"segmenter.depth={setup.depth}",
        f"trainer.max_steps={setup.steps(side)}",
        f"output_root={setup.work}",
        f"name={side.name}",
        f"trainer.precision={'bf16-mixed' if side.bf16 else '32-true'}",
        "trainer.callbacks.last=null",
        "trainer.enable_progress_bar=false",
        *side.overrides,
    ]
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = hydra.compose("train", overrides)
    images, _ = config.training_sets(cfg)
    config.seed_everything(cfg.seed)
    network = config.instantiate(cfg.segmenter, num_classes=len(images.taxonomy))
    module = config.instantiate(
        cfg.optimizer, segmenter=network, class_names=list(images.taxonomy.all_names)
    )
    transform = config.instantiate(cfg.transform)
    data = TimedData(
        images, None, transform, EvalTransform(cfg.scale), cfg.batch_size, cfg.num_workers, cfg.seed
    )
    last = TakeTurns(turns, data)
    trainer = config.trainer(cfg, False, [Reseed(cfg.seed), last])
    trainer.fit(module, datamodule=data)
    return operations(last.profiler) if last.profiler else []


def operations(profiler) -> list:
    """[name, percent of the time] of the operations that took longest by themselves."""
    rows = profiler.key_averages()

    def own(row) -> float:
        return row.self_device_time_total if torch.cuda.is_available() else row.self_cpu_time_total

    total = sum(map(own, rows))
    longest = sorted(rows, key=own, reverse=True)[:OPERATIONS]
    return [[row.key, round(100 * own(row) / total, 1)] for row in longest]


def runner_config(side: Side, setup: Setup):
    """mmsegmentation's own configuration; what is changed in it: paths, sizes, no validation, no
    checkpoint, one device."""
    import mmseg
    from mmengine.config import Config

    cfg = Config.fromfile(Path(mmseg.__file__).parent / ".mim/configs" / CONFIGS)
    decode_in, decode, auxiliary_in, auxiliary = CHANNELS[setup.depth]
    cfg.model.pretrained, cfg.model.backbone.depth = None, setup.depth
    cfg.model.decode_head.update(in_channels=decode_in, channels=decode)
    cfg.model.auxiliary_head.update(in_channels=auxiliary_in, channels=auxiliary)
    if setup.device == "cpu":  # SyncBN is for GPUs
        for part in ("backbone", "decode_head", "auxiliary_head"):
            cfg.model[part].norm_cfg.type = "BN"
    size = (setup.size, setup.size)
    cfg.model.data_preprocessor.size = size
    data = cfg.dataset_train
    data.data_root = setup.data
    for step in data.pipeline:
        changed = {
            "RandomResize": {"scale": (4 * setup.size, setup.size)},
            "RandomCrop": {"crop_size": size},
            "Pad": {"size": size},
        }
        step.update(changed.get(step.type, {}))
    cfg.train_dataloader.dataset = data
    cfg.train_dataloader.update(
        batch_size=setup.batch, num_workers=setup.workers, persistent_workers=setup.workers > 0
    )
    cfg.train_cfg.update(max_iters=setup.steps(side), val_interval=10**9)
    for key in (
        "val_dataloader",
        "val_cfg",
        "val_evaluator",
        "test_dataloader",
        "test_cfg",
        "test_evaluator",
    ):
        cfg[key] = None
    cfg.default_hooks.checkpoint = None
    cfg.update(work_dir=f"{setup.work}/{side.name}", log_level="ERROR", randomness={"seed": 0})
    if side.bf16:
        cfg.optim_wrapper.update(
            {"type": "AmpOptimWrapper", "dtype": "bfloat16"}
            if setup.device == "cuda"
            else {"type": "Bf16"}
        )
    return cfg


def runner(turns: Turns, side: Side, setup: Setup) -> list:
    """Train by mmengine's Runner."""
    from mmengine.hooks import Hook
    from mmengine.optim import OptimWrapper
    from mmengine.registry import OPTIM_WRAPPERS
    from mmengine.runner import Runner

    @OPTIM_WRAPPERS.register_module(force=True)
    class Bf16(OptimWrapper):
        """AmpOptimWrapper refuses a CPU."""

        def optim_context(self, model):
            return torch.autocast("cpu", torch.bfloat16)

    class TakeTurnsHook(Hook):
        def before_train(self, runner):
            runner.train_loop.dataloader_iterator = iter(
                Timed(runner.train_loop.dataloader_iterator)
            )
            turns.begin(runner.train_loop.dataloader_iterator)

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            turns.step(outputs["loss"].detach())

    with quiet_construction():
        made = Runner.from_cfg(runner_config(side, setup))
    made.register_hook(TakeTurnsHook(), "LOWEST")
    made.train()
    return []


def child(connection, side: Side, setup: Setup) -> None:
    """The process of one side; sends {"operations": [...]} at the end."""
    sys.stdout = sys.stderr  # the last line of the output is the parent's
    np.random.seed(0)
    turns = Turns(connection, setup)
    connection.send({"operations": (runner if side.runner else ours)(turns, side, setup)})
