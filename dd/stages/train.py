"""Stage: train a segmenter on a synthetic or a real set, from scratch or from an earlier run."""

import time
from contextlib import nullcontext
from pathlib import Path

import torch

from dd import checkpoints
from dd.fitting import fit
from dd.locks import Lock
from dd.provenance import SETTINGS, finished_run, made_by, read_own, sha256, write_json
from dd.schemas import NAMED
from dd.tracking.loggers import is_main_process

CHECKPOINT = Path("checkpoints") / "last.ckpt"
HINT = "Runs of another name train beside it; train.py stage=budget and stage=tune share their work by themselves"


def load_weights(run, weights: str = "ema") -> dict[str, torch.Tensor]:
    """The segmenter's weights of a run's last checkpoint: ``ema`` (what is reported) or ``raw`` (the ablation).

    FileNotFoundError if the run is not finished, ValueError for other weights or a damaged file; weights only, no pickled
    code.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r}; allowed: ema, raw")
    path = Path(run) / CHECKPOINT
    if not path.is_file() or not (Path(run) / "run.json").is_file():
        raise FileNotFoundError(f"{run} is not a finished training run (no run.json or {CHECKPOINT}); train it with train.py")
    checkpoint = checkpoints.load(path)
    state = checkpoint.get("current_model_state", checkpoint["state_dict"]) if weights == "raw" else checkpoint["state_dict"]
    return {k.removeprefix("segmenter."): v for k, v in state.items() if k.startswith("segmenter.")}


def train(folder, module, data, make_trainer, identity: dict, record: dict, init_from=None) -> dict:
    """Fit ``module`` (:class:`dd.segmentation.Segmentation`) on ``data`` and return what run.json holds.

    ``run.json`` is written last: a folder that has it with the same ``identity`` is finished and is left alone, one
    with another identity is refused. An interrupted run goes on from its last checkpoint. ``init_from``: a finished
    run whose averaged weights are the start. ``make_trainer()`` gives the Lightning trainer; it is called when
    nothing is refused any more. ``record``: what evaluation needs to know (segmenter, classes, supervision, ...).
    :class:`dd.locks.Busy` while another process trains in the folder. Of the processes of one training (several GPUs) the
    first one holds the lock and writes.
    """
    folder = Path(folder)
    if (done := finished_run(folder, identity)) is not None:
        return _sound(folder, done)
    if init_from is not None:
        try:
            module.segmenter.load_state_dict(_same_classes(init_from, record))
        except RuntimeError as error:
            listed = "\n".join(str(error).splitlines()[1:4])
            raise ValueError(
                f"init_from={init_from}: its segmenter is another one. Use the same segmenter=...\n{listed}"
            ) from None
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder, hint=HINT) if is_main_process() else nullcontext():
        if (done := finished_run(folder, identity)) is not None:  # by another process in between
            return _sound(folder, done)
        if is_main_process():
            write_json(folder / SETTINGS, {"identity": identity})
        trainer = make_trainer()
        last, started = folder / CHECKPOINT, time.perf_counter()
        fit(trainer, module, data, last)
        done = {"identity": identity, **record, "steps": trainer.global_step}
        if is_main_process():
            done |= {"seconds": round(time.perf_counter() - started, 1), "checkpoint_sha256": sha256(last), **made_by()}
            write_json(folder / "run.json", done)
    return done


def _sound(folder: Path, done: dict) -> dict:
    """``done``, run.json of a finished run, once its checkpoint has shown that it is as it was written; else ValueError."""
    path = folder / CHECKPOINT
    wrong = checkpoints.damage(path) if path.is_file() else "it is gone"
    if wrong:
        raise ValueError(
            f"{folder} is finished, but its {CHECKPOINT} is damaged: {wrong}. Put a copy of it back; or remove run.json, and "
            "the same command goes on from the checkpoint before, or begins anew"
        )
    return done


def real_labels(trained_on: dict | None) -> list:
    """How many real images (a number, or ``all``) had their labels used: by a run itself, by the run it went on from, by the
    teacher that labelled its synthetic images or the choice of their mask settings, and so on back. ``trained_on`` is
    run.json's; [] = none at all."""
    if not trained_on:
        return []
    found = [trained_on.get("shots") or "all"] if trained_on["source"] in ("real", "mixed") else []
    for part in (trained_on, trained_on.get("synthetic", {})):
        found += _mask_labels(part.get("mask_settings"))
    return found + real_labels(trained_on.get("after"))


def _mask_labels(masks: dict | None) -> list:
    """:func:`real_labels` behind a mask set, from its masks.json: of its teacher, of its ``calibration`` (by images, or by a
    sweep against a reference that is a mask set itself)."""
    if not masks:
        return []
    calibration = masks.get("calibration", {})
    found = [calibration["shots"]] if "shots" in calibration else []
    return found + real_labels(masks.get("teacher", {}).get("trained_on")) + _mask_labels(calibration.get("reference"))


def supervision(trained_on: dict, before: str | None) -> str:
    """Supervision class of a run; ``before`` is that of the run it goes on from.

    Real images alone are ``real``, and fine-tuning a run of class A with them keeps its class: the column says what made
    the synthetic images, ``trained_on`` how many real ones followed. All else is ``A`` only if no real label was used
    anywhere (:func:`real_labels`), ``B`` if a chosen number of real images was, ``real`` if whole splits were.
    """
    if trained_on["source"] == "real" and before in (None, "A", "real"):
        return before or "real"
    labels = real_labels(trained_on)
    return "real" if "all" in labels else "B" if labels else "A"


def _same_classes(init_from, record) -> dict:
    weights = load_weights(init_from)
    theirs, ours = read_own(Path(init_from) / "run.json", NAMED)["taxonomy"]["names"], record["taxonomy"]["names"]
    if theirs != ours:  # the names alone: a list of classes that came back from a labelling tool may be called otherwise
        raise ValueError(f"init_from={init_from} was trained for the classes {theirs}, this run has {ours}")
    return weights
