"""Runs a training, starting from its newest sound checkpoint. If it is killed, stopped or requeued
at any point, the same command ends with the same weights, bit by bit."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment

from dd.execution import EXIT
from dd.store import checkpoints

AGAIN = 1.0  # seconds after which another Ctrl-C counts as a second one
STOPPING = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)


def fit(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, last: Path
) -> None:
    """Train for ``trainer.max_steps``, starting from ``last``, or from the checkpoint before it, if
    there is a sound one.

    A signal ends it after the current step, with a checkpoint: SystemExit(143) after SIGTERM or
    SLURM's signal, SystemExit(130) after Ctrl-C. If it is stopped otherwise, as by a second Ctrl-C,
    KeyboardInterrupt says how far it came. ValueError if there are only damaged checkpoints.
    """
    stop = Stop(last)
    trainer.callbacks += [Reseed(data.seed), stop]
    start, warning = checkpoints.newest(last.parent)
    if trainer.is_global_zero:
        checkpoints.tidy(last.parent)
        if warning:
            print(warning, file=sys.stderr, flush=True)
        if "bf16" in str(trainer.precision) and trainer.strategy.root_device.type == "cpu":
            warn_of_slow_bfloat16(getattr(torch.cpu, "get_capabilities", dict)())
    try:
        with stop.hears_slurm():
            trainer.fit(module, datamodule=data, ckpt_path=start and str(start), weights_only=True)
    except SystemExit as end:
        # our handler, that of dd.execution before the first step, or Lightning's for Ctrl-C
        if stop.left or end.code == EXIT["terminated"] or not trainer.interrupted:
            raise
    except KeyboardInterrupt:  # the second Ctrl-C, if Lightning passes it on
        trainer.interrupted = True
    except RuntimeError:
        if stop.number is None:
            raise
        stop.leave(trainer)  # a worker of the loader got the signal too and ended first
    if trainer.interrupted or trainer.global_step < trainer.max_steps:
        saved = checkpoints.newest(last.parent)[0]
        raise KeyboardInterrupt(
            f"training stopped at step {trainer.global_step} of {trainer.max_steps}, "
            + ("its last checkpoint is kept" if saved else "nothing is saved yet")
        )
    _part()


def warn_of_slow_bfloat16(processor: Mapping[str, Any]) -> None:
    """Warn on an x86 processor without AVX-512, whose bfloat16 convolutions take several times as
    long as those in float32 (docs/performance.md)."""
    if processor.get("architecture") == "x86_64" and not processor.get("avx512_f"):
        print(
            "warning: this processor has no instructions for bfloat16, so a step takes several "
            "times as long as in float32. trainer.precision=32-true is faster here; it makes "
            "other weights, and so another run (name=...)",
            file=sys.stderr,
            flush=True,
        )


def _part() -> None:
    """Detach from the other processes: only the first one continues after a training, and
    torchmetrics must not wait for the others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


class Reseed(pl.Callback):
    """Makes the randomness of a step (dropout, sampled points) a function of seed, step and
    process. A resumed training thus needs no generator state, however many numbers validation and
    loaders have drawn in between."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        micro = batch_idx % trainer.accumulate_grad_batches
        words = np.random.SeedSequence(
            [self.seed, 7, trainer.global_step, micro, trainer.global_rank]
        ).generate_state(3)
        torch.manual_seed(int(words[0]))
        np.random.seed(words[1])
        random.seed(int(words[2]))


class Stop(pl.Callback):
    """SIGTERM, Ctrl-C and, in a SLURM job, SIGUSR1 end a training after the current step, with a
    checkpoint of it.

    Lightning would write its checkpoint inside the signal's handler, perhaps in the middle of an
    optimiser's step; after Ctrl-C it writes none. Here a handler only makes a note. During
    validation the weights are the averaged ones, so the training ends with the checkpoint that
    :class:`dd.training.segmentation.LastCheckpoint` wrote before it. A second Ctrl-C, a second or
    more after the first, ends the training at once. After SIGUSR1 the SLURM job is requeued, and
    the same command resumes.
    """

    def __init__(self, last: Path) -> None:
        self.last, self.left, self.noted = last, False, 0.0
        self.number: int | None = None  # of the received signal
        self.launcher: Any = None

    @contextmanager
    def hears_slurm(self) -> Iterator[None]:
        """Within this context SIGUSR1 is ours; Lightning skips a signal that has a handler."""
        if slurm_job() is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGUSR1, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, before)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning restores the old handlers at the end
        if threading.current_thread() is threading.main_thread():
            self.launcher = trainer.strategy.launcher
            signal.signal(signal.SIGTERM, self._note)
            signal.signal(signal.SIGINT, self._interrupt)
        if trainer.received_sigterm:
            self.number = signal.SIGTERM

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number is None and self.launcher is not None:
            self.launcher.kill(number)  # forward to the processes that this one started
        self.number = number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C reaches every process of a terminal, and this one again through its launcher; that
        does not count as a second one."""
        if self.number == signal.SIGINT and time.monotonic() - self.noted >= AGAIN:
            raise KeyboardInterrupt
        if self.number is None:
            self.noted = time.monotonic()
            if os.environ.get("LOCAL_RANK", "0") == "0":
                said = "stopping after this step (Ctrl-C once more: at once)"
                print(said, file=sys.stderr, flush=True)
        self._note(number, frame)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._any(trainer, self.number is not None):
            return
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and trainer.global_step < trainer.max_steps:
            trainer.save_checkpoint(self.last)
            # all processes must ask for the same values in the same order
            heard = [n for n in STOPPING if self._any(trainer, self.number == n)]
            self.leave(trainer, heard)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self.number is not None:
            self.leave(trainer)

    def _any(self, trainer: pl.Trainer, mine: bool) -> bool:
        """Whether it is true in one of the processes: all end after the same step."""
        if trainer.world_size == 1:
            return mine
        return trainer.strategy.reduce_boolean_decision(mine, all=False)

    def leave(self, trainer: pl.Trainer, heard: Sequence[int | None] = ()) -> NoReturn:
        """End the process with exit code 143 (Ctrl-C: 130). Exit code 0 in a process that another
        one started and that would be killed for it. ``heard``: signals that the processes received;
        by default this one's own."""
        self.left, heard = True, heard or [self.number]
        word = "stopped" if signal.SIGINT in heard else "terminated"
        if trainer.is_global_zero:
            print(
                f"{word} at step {trainer.global_step} of {trainer.max_steps}: the last "
                "checkpoint is kept. The same command resumes from it.",
                file=sys.stderr,
                flush=True,
            )
            if signal.SIGUSR1 in heard:
                _requeue()
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started = isinstance(environment, LightningEnvironment) and not trainer.is_global_zero
        sys.exit(0 if started else EXIT[word])


def slurm_job() -> str | None:
    """Id of this process's SLURM job or array task; None outside SLURM and in an interactive
    job."""
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    job, task = (os.environ.get(f"SLURM_ARRAY_{what}_ID") for what in ("JOB", "TASK"))
    return f"{job}_{task}" if job and task else os.environ.get("SLURM_JOB_ID")


def _requeue() -> None:
    command = ["scontrol", "requeue", slurm_job() or ""]
    problem: str | None = None
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            problem = done.stderr.strip() or f"exit code {done.returncode}"
    except OSError as error:
        problem = error.strerror
    said = f"failed ({problem}): submit the same job again" if problem else "done"
    print(f"{' '.join(command)}: {said}", file=sys.stderr, flush=True)
