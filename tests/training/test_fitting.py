"""A training that is killed, stopped or requeued at any moment ends with the weights of one that
was left alone.

Trainings run in forks of this process, which saves the seconds of importing; they really die of
SIGKILL.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from dd.evaluation import metrics
from dd.stages.train_segmenter import train_segmenter
from dd.store import checkpoints
from dd.store.provenance import read_json
from dd.training import fitting
from dd.training.datamodule import whole_loader
from dd.training.fitting import warn_of_slow_bfloat16
from dd.training.mean_teacher import MeanTeacher
from dd.training.segmentation import EMA, LastCheckpoint, Segmentation, count

STEPS = 9
RECORD = {"taxonomy": {"name": "pets", "names": ["cat", "dog"]}, "supervision": "A", "scale": 8}
VALIDATED = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}


class Signal(pl.Callback):
    """A signal to this process (of ``rank``) in the middle of a step, before the optimiser's, or
    in a validation."""

    def __init__(self, number, step=None, rank=0, validation=False):
        self.number, self.step, self.rank, self.validation = number, step, rank, validation

    def _send(self, trainer):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_before_optimizer_step(self, trainer, *_):
        if not self.validation:
            self._send(trainer)

    def on_validation_batch_start(self, trainer, *_):
        if self.validation:
            self._send(trainer)


class Slow(pl.Callback):
    """A step takes a while."""

    def on_train_batch_start(self, *_):
        time.sleep(0.15)


class Look(pl.Callback):
    """Writes what this process validated (its pixels) and what all of them found."""

    def on_validation_epoch_end(self, trainer, module):
        self.pixels = int(module.confusion.confmat.sum())

    def on_validation_end(self, trainer, module):
        found = {"pixels": self.pixels, "miou": float(trainer.callback_metrics["tune/miou"])}
        path = os.path.join(
            trainer.default_root_dir, f"look-{trainer.global_step}-{trainer.global_rank}.json"
        )
        with open(path, "w") as file:
            json.dump(found, file)


def crash_in(call, number, monkeypatch):
    """SIGKILL instead of the ``number``-th ``os.replace`` or ``os.fsync`` of a checkpoint; half
    of what is synced is lost."""
    real, seen = getattr(os, call), []

    def crash(*arguments):
        name = (
            str(arguments[0]) if call == "replace" else os.readlink(f"/proc/self/fd/{arguments[0]}")
        )
        if "checkpoints" in name:
            seen.append(name)
            if len(seen) == number:
                if call == "fsync":
                    os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    monkeypatch.setattr(os, call, crash)


@pytest.fixture
def training(tiny_segmenter, toy_data, make_trainer):
    """``training(folder, callbacks=(), tune=None, photos=None, every=2, **trainer)``: the stage,
    with dropout and checkpoints every two steps; ``photos``: (photographs, their transform) of
    self-training."""

    def run(folder, callbacks=(), tune=None, photos=None, every=2, **trainer):
        segmenter = tiny_segmenter()
        segmenter.backbone.append(torch.nn.Dropout(0.5))
        teacher = photos and MeanTeacher(3, confidence=0.4, momentum=0.8)
        module = Segmentation(
            segmenter, ["background", "cat", "dog"], learning_rate=0.05, teacher=teacher
        )
        parts = [EMA(0.7), LastCheckpoint(str(folder / "checkpoints"), every), *callbacks]
        how = {**(VALIDATED if tune else {}), **trainer}
        data = toy_data(tune=tune, batch_size=2 * trainer.get("devices", 1))
        data.photos = photos
        return train_segmenter(
            folder,
            module,
            data,
            lambda: make_trainer(folder, STEPS, parts, **how),
            {"seed": 0},
            RECORD,
        )

    return run


def forked(work, processes=1, timeout=120, kill_after=None):
    """(exit code, negative for a signal; what it wrote to stderr) of each of ``processes`` forks
    that do ``work()``; several train together, as torchrun starts them. ``kill_after``: seconds
    until SIGKILL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children, pipes = [], []
    for rank in range(processes):
        pipes.append(os.pipe())
        children.append(os.fork())
        if children[-1] == 0:
            _child(work, rank, processes, port, pipes[-1][1], timeout)
        os.close(pipes[-1][1])
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(children[0], signal.SIGKILL)  # not yet waited for: its number is still its own
    said = [_read(read) for read, _ in pipes]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    return list(zip(codes, said, strict=True))


def _read(descriptor):
    with open(descriptor, errors="replace") as file:
        return file.read()


def _child(work, rank, processes, port, channel, timeout):
    sys.stdout = sys.stderr = os.fdopen(channel, "w", buffering=1)
    signal.alarm(timeout)
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "GROUP_RANK": "0",
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test",
        }
        rank_zero_only.rank = rank  # Lightning reads it when it is imported
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def finish(training, folder, processes=1, **settings):
    """A training that nothing stops; what it wrote to stderr."""
    done = forked(lambda: training(folder, **settings), processes)
    assert [code for code, _ in done] == [0] * processes, done
    return "".join(said for _, said in done)


def last(folder):
    return checkpoints.load(folder / "checkpoints/last.ckpt")


def same(a, b):
    """Whether two nested structures are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


PARTS = (
    "global_step",
    "state_dict",
    "current_model_state",
    "averaging_state",
    "optimizer_states",
    "lr_schedulers",
)


def assert_same(folder, other):
    one, two = last(folder), last(other)
    assert [part for part in PARTS if not same(one[part], two[part])] == []
    assert read_json(folder / "run.json")["steps"] == STEPS
    assert not list(folder.glob("hpc_ckpt*")) and not list(folder.rglob("*.tmp"))


@pytest.fixture(scope="module")
def straight(request, tmp_path_factory):
    """What an uninterrupted training ends with, of one process or two."""
    known = {}

    def get(training, processes=1, **settings):
        key = (processes, *sorted(settings))
        if key not in known:
            known[key] = folder = tmp_path_factory.mktemp("straight")
            finish(training, folder, processes, **settings)
        return known[key]

    return get


def test_dropout_has_an_effect(training, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    finish(training, tmp_path / "run")
    monkeypatch.undo()
    assert not same(last(tmp_path / "run")["state_dict"], last(straight(training))["state_dict"])


@pytest.mark.parametrize("step", [0, 1, 2, 5, 8])
def test_a_training_that_is_killed_in_a_step_ends_as_if_it_had_not_been(
    training, straight, tmp_path, step
):
    folder = tmp_path / "run"
    ((code, _),) = forked(lambda: training(folder, [Signal(signal.SIGKILL, step)]))
    assert code == -signal.SIGKILL and not (folder / "run.json").exists()
    finish(training, folder)
    assert_same(folder, straight(training))


# The first checkpoint is three files (sums, itself, sums), each later one five changes of names and
# three files.
OFTEN = [("fsync", 2), ("fsync", 5), ("replace", 6), ("replace", 7)]
RARELY = [("fsync", n) for n in (1, 3, 4, 6, 8, 12)] + [
    ("replace", n) for n in (1, 2, 3, 4, 5, 8, 11, 12, 17, 22)
]


@pytest.mark.parametrize(
    ("call", "number"), [*OFTEN, *(pytest.param(*m, marks=pytest.mark.full) for m in RARELY)]
)
def test_a_training_that_is_killed_while_it_writes_a_checkpoint(
    training, straight, tmp_path, monkeypatch, call, number
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_in(call, number, patch)
        ((code, _),) = forked(lambda: training(folder))
    assert code == -signal.SIGKILL and not (folder / "run.json").exists()
    said = finish(training, folder)
    assert "damaged" not in said
    assert_same(folder, straight(training))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_a_training_that_is_killed_again_and_again(training, straight, tmp_path, seed):
    """From outside, at random moments; a checkpoint after each step, so that many of them fall
    into a write."""
    folder, rng, kills = tmp_path / "run", random.Random(seed), 0
    for _ in range(8):
        callbacks = [Slow(), LastCheckpoint(str(folder / "checkpoints"), 1)]
        ((code, _),) = forked(
            lambda c=callbacks: training(folder, c), kill_after=rng.uniform(0.2, 1.2)
        )
        kills += code == -signal.SIGKILL
    finish(training, folder)
    assert kills  # the first run takes longer than it is given
    assert_same(folder, straight(training))


def test_a_damaged_checkpoint_is_skipped_and_the_end_is_the_same(training, straight, tmp_path):
    folder = tmp_path / "run"
    forked(lambda: training(folder, [Signal(signal.SIGKILL, 5)]))
    path = folder / "checkpoints/last.ckpt"
    assert last(folder)["global_step"] == 4
    path.write_bytes(path.read_bytes()[:-1000])
    ((code, said),) = forked(lambda: training(folder))
    assert (
        code == 0
        and f"warning: {path} is damaged" in said
        and "resuming from the one before" in said
    )
    assert_same(folder, straight(training))
    assert "not resumable" not in said


def test_without_a_sound_checkpoint_a_training_says_what_to_do(training, tmp_path):
    folder = tmp_path / "run"
    forked(lambda: training(folder, [Signal(signal.SIGKILL, 3)]))
    (folder / "checkpoints/last.ckpt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged .*Restore a copy of one of them"):
        training(folder)


# Signals


def test_sigterm_ends_a_training_after_the_step_with_a_checkpoint_of_it(
    training, straight, tmp_path
):
    folder = tmp_path / "run"
    ((code, said),) = forked(lambda: training(folder, [Signal(signal.SIGTERM, 4)]))
    assert (
        code == 143
        and "terminated at step 5 of 9: the last checkpoint is kept. The same command resumes"
        in said
    )
    assert "Traceback" not in said and last(folder)["global_step"] == 5
    ((code, said),) = forked(lambda: training(folder))
    assert code == 0 and "not resumable" not in said
    assert_same(folder, straight(training))


def test_sigterm_in_a_validation_ends_it_at_once(training, straight, tmp_path):
    folder = tmp_path / "run"
    ((code, said),) = forked(
        lambda: training(folder, [Signal(signal.SIGTERM, 4, validation=True)], tune=5)
    )
    assert code == 143 and "terminated at step 4 of 9" in said and last(folder)["global_step"] == 4
    finish(training, folder, tune=5)
    assert_same(
        folder, straight(training)
    )  # validation takes nothing from the generators of the training


def test_ctrl_c_ends_a_training_after_the_step_with_a_checkpoint_of_it(
    training, straight, tmp_path
):
    folder = tmp_path / "run"
    ((code, said),) = forked(lambda: training(folder, [Signal(signal.SIGINT, 4)]))
    assert (
        code == 130
        and "stopped at step 5 of 9: the last checkpoint is kept. The same command resumes" in said
    )
    assert (
        "stopping after this step" in said
        and "Traceback" not in said
        and last(folder)["global_step"] == 5
    )
    finish(training, folder)
    assert_same(folder, straight(training))


def test_a_second_ctrl_c_ends_a_training_at_once_and_says_what_is_saved(training, tmp_path):
    folder = tmp_path / "run"

    class Twice(pl.Callback):
        """Two interrupts in one step that takes longer than the time between them."""

        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step == self.step:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1.1)
                os.kill(os.getpid(), signal.SIGINT)

    for step, saved in ((1, "nothing is saved yet"), (3, "its last checkpoint is kept")):
        Twice.step = step

        def work():
            try:
                training(folder, [Twice()])
            except KeyboardInterrupt as stop:
                print(stop)
                sys.exit(130)

        ((code, said),) = forked(work)
        assert code == 130 and f"training stopped at step {step} of 9, {saved}" in said


def test_a_stop_in_a_validation_loses_no_step(training, straight, tmp_path):
    """Validation follows step 4, checkpoints are due every 3: one is written before it."""
    folder = tmp_path / "run"
    ((code, said),) = forked(
        lambda: training(folder, [Signal(signal.SIGINT, 4, validation=True)], tune=5, every=3)
    )
    assert code == 130 and "stopped at step 4 of 9" in said and last(folder)["global_step"] == 4
    finish(training, folder, tune=5)
    assert_same(folder, straight(training))


def test_sigterm_in_the_last_step_lets_the_training_end(training, tmp_path):
    ((code, _),) = forked(lambda: training(tmp_path / "run", [Signal(signal.SIGTERM, STEPS - 1)]))
    assert code == 0 and (tmp_path / "run/run.json").is_file()


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM job as Lightning sees it; ``scontrol`` writes down what it is asked."""
    asked = tmp_path / "asked"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for key, value in {
        "JOB_ID": "17",
        "JOB_NAME": "train",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    return asked


@pytest.mark.parametrize("validation", [False, True])
def test_slurms_signal_puts_the_job_back_into_the_queue(
    training, straight, slurm, tmp_path, validation
):
    folder, tune = tmp_path / "run", 5 if validation else None
    ((code, said),) = forked(
        lambda: training(folder, [Signal(signal.SIGUSR1, 4, validation=validation)], tune=tune)
    )
    assert code == 143 and "scontrol requeue 17: done" in said
    assert slurm.read_text() == "requeue 17\n" and last(folder)["global_step"] == (
        4 if validation else 5
    )
    ((code, _),) = forked(lambda: training(folder, tune=tune))
    assert code == 0 and slurm.read_text() == "requeue 17\n"
    assert_same(folder, straight(training))


def test_an_array_task_that_cannot_be_queued_again_says_so(training, slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "18")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\necho 'Requeue is disabled' >&2; exit 1\n")
    ((code, said),) = forked(lambda: training(tmp_path / "run", [Signal(signal.SIGUSR1, 4)]))
    assert code == 143
    assert "scontrol requeue 18_3: failed (Requeue is disabled): submit the same job again" in said


# Self-training


class Certainty(pl.Callback):
    """Writes how sure the teacher of this process is of each class."""

    def on_train_end(self, trainer, module):
        path = os.path.join(trainer.default_root_dir, f"certainty-{trainer.global_rank}.json")
        with open(path, "w") as file:
            json.dump(module.teacher.certainty.tolist(), file)


def shown(photo, seed):
    view = torch.from_numpy(photo.astype(np.float32).transpose(2, 0, 1))
    return view, view + seed % 7, torch.ones(photo.shape[:2], dtype=torch.bool)


PHOTOS = [np.full((8, 10, 3), 12 * i, np.uint8) for i in range(20)], shown


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_self_training_ends_alike_and_its_processes_agree(training, tmp_path, processes):
    settings = {"photos": PHOTOS, **({"devices": 2, "strategy": "ddp"} if processes == 2 else {})}
    one, other = tmp_path / "one", tmp_path / "other"
    finish(training, one, processes, callbacks=[Certainty()], **settings)
    forked(
        lambda: training(other, [Signal(signal.SIGKILL, 5, rank=processes - 1)], **settings),
        processes,
    )
    assert not (other / "run.json").exists()
    finish(training, other, processes, **settings)
    assert_same(one, other)
    sure = [read_json(one / f"certainty-{rank}.json") for rank in range(processes)]
    assert all(each == sure[0] for each in sure) and min(sure[0]) < 1
    assert sure[0] == last(one)["state_dict"]["teacher.certainty"].tolist()


# Several processes


TOGETHER = {"devices": 2, "strategy": "ddp", "tune": 5, "callbacks": (Look(),)}


def test_two_processes_validate_each_image_once_with_the_same_weights(
    training, straight, tiny_segmenter, toy_data
):
    folder = straight(training, 2, **TOGETHER)
    looks = [[read_json(folder / f"look-{step}-{rank}.json") for rank in (0, 1)] for step in (4, 8)]
    data = toy_data(tune=5)
    assert [sum(look["pixels"] for look in pair) for pair in looks] == [
        sum((data.tune[i][1] != 255).sum() for i in range(5))
    ] * 2
    assert all(
        pair[0]["pixels"] and pair[1]["pixels"] and pair[0]["miou"] == pair[1]["miou"]
        for pair in looks
    )
    state = checkpoints.load(folder / "checkpoints/previous.ckpt")  # of step 8, as validated
    segmenter = tiny_segmenter().eval()
    segmenter.backbone.append(torch.nn.Dropout(0.5))
    segmenter.load_state_dict(
        {k.removeprefix("segmenter."): v for k, v in state["state_dict"].items()}
    )
    confusion = count(
        segmenter.eval(), whole_loader(data.tune, data.eval_transform), metrics.confusion_matrix(3)
    )
    assert state["global_step"] == 8 and looks[1][0]["miou"] == pytest.approx(
        metrics.miou(confusion), rel=1e-6
    )


def test_two_processes_go_on_after_one_was_killed(training, straight, tmp_path):
    folder, settings = (
        tmp_path / "run",
        {**TOGETHER, "callbacks": [Look(), Signal(signal.SIGKILL, 5, rank=1)]},
    )
    (_, (code, _)) = forked(lambda: training(folder, **settings), 2)
    assert code == -signal.SIGKILL and not (folder / "run.json").exists()
    finish(training, folder, 2, **TOGETHER)
    assert_same(folder, straight(training, 2, **TOGETHER))
    assert not same(last(folder)["state_dict"], last(straight(training))["state_dict"])


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_stop_after_the_same_step(training, straight, tmp_path, rank):
    folder, settings = (
        tmp_path / "run",
        {**TOGETHER, "callbacks": [Signal(signal.SIGTERM, 4, rank=rank)]},
    )
    done = forked(lambda: training(folder, **settings), 2)
    assert [code for code, _ in done] == [143, 143] and last(folder)["global_step"] == 5
    assert "".join(said for _, said in done).count("terminated at step 5 of 9") == 1
    finish(training, folder, 2, **TOGETHER)
    assert_same(folder, straight(training, 2, **TOGETHER))


def test_a_training_of_two_processes_does_not_go_on_with_one(training, tmp_path):
    folder, settings = tmp_path / "run", {**TOGETHER, "callbacks": [Signal(signal.SIGTERM, 2)]}
    forked(lambda: training(folder, **settings), 2)
    ((code, said),) = forked(lambda: training(folder))
    assert (
        code == 1
        and "ValueError: the checkpoint was written by a training with batch_size=4, processes=2"
        in said
    )


@pytest.mark.parametrize(
    ("processor", "slow"),
    [
        ({"architecture": "x86_64", "avx512_f": False}, True),
        ({"architecture": "x86_64", "avx512_f": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_a_processor_that_is_slow_in_bfloat16_is_told_of(capsys, processor, slow):
    warn_of_slow_bfloat16(processor)
    assert ("trainer.precision=32-true is faster" in capsys.readouterr().err) == slow


def test_a_training_on_a_cpu_asks_what_its_processor_can(training, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fitting, "warn_of_slow_bfloat16", lambda found: asked.append(found))
    training(tmp_path / "plain", precision="32-true")
    assert asked == []
    training(tmp_path / "narrow", precision="bf16-mixed")
    assert len(asked) == 1
