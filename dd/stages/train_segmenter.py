"""Stage: train a segmenter on a synthetic or a real set, from scratch or from an earlier run."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dd.store import checkpoints
from dd.store.locks import Lock
from dd.store.provenance import SETTINGS, differences, finished_run, made_by, read_own, write_json
from dd.store.schemas import IDENTIFIED, NAMED
from dd.training.clock import hardware, peak_memory
from dd.training.fitting import fit
from dd.training.loggers import is_main_process

CHECKPOINT = Path("checkpoints") / "last.ckpt"
HINT = (
    "Runs of another name train beside it; train.py stage=study and stage=search share their "
    "work by themselves"
)


def load_weights(run: str | Path, weights: str = "ema") -> dict[str, torch.Tensor]:
    """The segmenter's weights of a run's last checkpoint: ``ema`` (the reported ones) or ``raw``
    (the ablation).

    FileNotFoundError if the run is not finished; ValueError for other ``weights``, a damaged file,
    or averaged weights that do not match run.json. Only tensors are read, no pickled code.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r}; allowed: ema, raw")
    path = Path(run) / CHECKPOINT
    if not path.is_file() or not (Path(run) / "run.json").is_file():
        raise FileNotFoundError(
            f"{run} is not a finished training run (no run.json or {CHECKPOINT}); train it with "
            "train.py"
        )
    checkpoint = checkpoints.load(path)
    average = _segmenter(checkpoint["state_dict"])
    known = read_own(Path(run) / "run.json", {"weights_sha256": str})["weights_sha256"]
    if (found := checkpoints.weights_sha256(average)) != known:
        raise ValueError(
            f"{path} holds other weights (sha256 {found[:12]}...) than {run}/run.json names "
            f"({known[:12]}...). Restore the right file, or train the run again under another name"
        )
    if weights == "ema":
        return average
    return _segmenter(checkpoint.get("current_model_state", checkpoint["state_dict"]))


def fill(segmenter: torch.nn.Module, state: dict[str, torch.Tensor], run: str | Path) -> None:
    """Load the weights of a run into a segmenter; ValueError for those of another segmenter."""
    try:
        segmenter.load_state_dict(state)
    except RuntimeError as error:
        listed = "\n".join(str(error).splitlines()[1:4])
        raise ValueError(
            f"{run}: its segmenter is another one, or has other classes. Use the same "
            f"segmenter=..., and the run.json that was written with its weights\n{listed}"
        ) from None


def _segmenter(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The segmenter's part of a checkpoint, by the segmenter's own names."""
    return {k.removeprefix("segmenter."): v for k, v in state.items() if k.startswith("segmenter.")}


def train_segmenter(
    folder: str | Path,
    module: Any,
    data: Any,
    make_trainer: Callable[[], Any],
    identity: dict[str, Any],
    record: dict[str, Any],
    init_from: str | Path | None = None,
) -> dict[str, Any]:
    """Fit ``module`` (:class:`dd.training.segmentation.Segmentation`) on ``data`` and return the
    content of run.json.

    ``run.json`` is written last: a folder that has it with the same ``identity`` is finished and
    left alone; one with another identity is refused. An interrupted run resumes from its last
    checkpoint. ``init_from``: a finished run whose averaged weights are the start.
    ``make_trainer()`` gives the Lightning trainer; it is called after all checks. ``record``: what
    evaluation needs to know (segmenter, classes, supervision, ...).
    :class:`dd.store.locks.Busy` while another process trains in the folder. Of the processes of one
    training (several GPUs) the first one holds the lock and writes.
    """
    folder = Path(folder)
    if (done := _finished(folder, identity)) is not None:
        return _sound(folder, done)
    if init_from is not None:
        fill(module.segmenter, _same_classes(init_from, record), f"init_from={init_from}")
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder, hint=HINT) if is_main_process() else nullcontext():
        if (done := finished_run(folder, identity)) is not None:  # finished in the meantime
            return _sound(folder, done)
        if is_main_process():
            write_json(folder / SETTINGS, {"identity": identity})
        trainer = make_trainer()
        last, started = folder / CHECKPOINT, time.perf_counter()
        fit(trainer, module, data, last)
        done = {"identity": identity, **record, "steps": trainer.global_step}
        if is_main_process():
            seconds = round(time.perf_counter() - started, 1)
            weights = checkpoints.weights_sha256(_segmenter(checkpoints.load(last)["state_dict"]))
            done |= {"seconds": seconds, "memory_bytes": peak_memory(), "hardware": hardware()}
            done |= {"weights_sha256": weights, **made_by()}
            write_json(folder / "run.json", done)
    return done


def _finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """:func:`finished_run`. If only the number of steps is larger, the error says how to continue
    from the run."""
    try:
        return finished_run(folder, identity)
    except FileExistsError as error:
        raise FileExistsError(f"{error}{_more_steps(folder, identity)}") from None


def _sound(folder: Path, done: dict[str, Any]) -> dict[str, Any]:
    """``done``, run.json of a finished run, after checking that its checkpoint is undamaged; else
    ValueError."""
    path = folder / CHECKPOINT
    wrong = checkpoints.damage(path) if path.is_file() else "it is gone"
    if wrong:
        raise ValueError(
            f"{folder} is finished, but its {CHECKPOINT} is damaged: {wrong}. Restore a copy of "
            "it; or remove run.json, and the same command resumes from the checkpoint before, "
            "or begins again"
        )
    return done


def _more_steps(folder: Path, identity: dict[str, Any]) -> str:
    file = folder / "run.json" if (folder / "run.json").exists() else folder / SETTINGS
    there = read_own(file, IDENTIFIED)["identity"]
    lines = differences(there, identity)
    if len(lines) != 1 or not lines[0].startswith("trainer.max_steps: "):
        return ""
    old, new = there["trainer"]["max_steps"], identity["trainer"]["max_steps"]
    if new <= old:
        return ""
    first = "" if file.name == "run.json" else f"finish it (trainer.max_steps={old}), then "
    return (
        "\nThe learning rate falls to 0 at the last step, so a longer training does not "
        f"continue this one. To start a new run from its weights: {first}the same "
        f"command with name={folder.name}_{new} init_from={folder} trainer.max_steps={new - old}"
    )


def _same_classes(init_from: str | Path, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of ``init_from``. ValueError for other classes. Only their names are compared,
    since a taxonomy that came back from a labelling tool may have another name."""
    weights, ours = load_weights(init_from), record["taxonomy"]["names"]
    theirs = read_own(Path(init_from) / "run.json", NAMED)["taxonomy"]["names"]
    if theirs != ours:
        raise ValueError(
            f"init_from={init_from} was trained for the classes {theirs}, this run has {ours}"
        )
    return weights
