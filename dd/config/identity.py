"""What makes a training another one: every setting of its configuration, except those that their
model marks (:class:`dd.config.settings.Train`), each with its reason.

A key that is not marked counts, and so does an unknown key of Lightning's trainer: a folder never
stands for settings that it was not made with.
"""

from typing import Any

import torch

from dd.config.objects import plain
from dd.config.settings import Recorded, Train, marks
from dd.store.settings import NoResult

# Fields that their model marks with a reason why they decide no weight, and fields recorded by the
# content they lead to, not as written. The last two belong to nodes with other classes.
CHANGES_NO_WEIGHT = {
    **marks(Train, NoResult),
    "segmenter.trusted": "whether a file may be read; what it holds is recorded by content",
    "trainer._target_": "no other class is allowed",
}
RECORDED = marks(Train, Recorded)
OBSERVERS = {  # callbacks by class, whatever their name
    "dd.training.segmentation.LastCheckpoint": "writes checkpoints",
    "dd.training.callbacks.ShownPredictions": "shows predictions",
    "pytorch_lightning.callbacks.ModelCheckpoint": "writes checkpoints",
    "pytorch_lightning.callbacks.LearningRateMonitor": "logs",
    "pytorch_lightning.callbacks.DeviceStatsMonitor": "logs",
    "pytorch_lightning.callbacks.ModelSummary": "shows",
    "pytorch_lightning.callbacks.RichProgressBar": "shows",
    "pytorch_lightning.callbacks.TQDMProgressBar": "shows",
}


def settings_identity(cfg: Any) -> dict[str, Any]:
    """The settings of a training that decide its weights, except those that
    :func:`dd.config.training_record` records by content. ValueError for a debug switch."""
    found = _without(plain(cfg), "")
    return {**found, "trainer": trainer_identity(cfg), "processes": processes(cfg)}


def trainer_identity(cfg: Any) -> dict[str, Any]:
    """The settings of Lightning's trainer and its callbacks that decide weights. ValueError for
    ``fast_dev_run``, which trains one step and would then count the folder as finished, and for
    ``overfit_batches``, which our order of the images does not support."""
    if cfg.trainer.get("overfit_batches"):
        raise ValueError(
            f"trainer.overfit_batches={cfg.trainer.overfit_batches}: images come in an order of "
            "our own, of which Lightning would take the first batches. To overfit one batch: "
            "debug=overfit"
        )
    if cfg.trainer.get("fast_dev_run"):
        raise ValueError(
            f"trainer.fast_dev_run={cfg.trainer.fast_dev_run} replaces the schedule, the "
            "callbacks and the loggers of a training: it leaves no usable run. To try a few "
            "steps: trainer.max_steps=2 name=try"
        )
    node = plain(cfg.trainer)
    callbacks = node.pop("callbacks", None) or {}
    kept = {k: v for k, v in callbacks.items() if v and v.get("_target_") not in OBSERVERS}
    return {**_without(node, "trainer."), "callbacks": {"ema": callbacks.get("ema"), **kept}}


def processes(cfg: Any) -> int:
    """Number of processes that train together; they share the ``batch_size`` images of a step."""
    devices, kind = cfg.trainer.devices, cfg.trainer.accelerator
    nodes = cfg.trainer.get("num_nodes") or 1
    if cfg.device != "auto":  # as in dd.config.training.trainer
        chosen = torch.device(cfg.device)
        devices, kind = devices if chosen.index is None else 1, chosen.type
    if devices in ("auto", -1, "-1", None):
        return nodes * max(1, torch.cuda.device_count() if kind in ("auto", "gpu", "cuda") else 1)
    if isinstance(devices, str):  # as Lightning reads it: "2" is a number, "0,1" and "2," are lists
        devices = [d for d in devices.split(",") if d.strip()] if "," in devices else int(devices)
    return nodes * (devices if isinstance(devices, int) else len(devices))


def _without(node: dict[str, Any], prefix: str) -> dict[str, Any]:
    """``node`` without the keys of the two tables, whose names begin with ``prefix``."""
    found = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if name not in CHANGES_NO_WEIGHT and name not in RECORDED:
            found[key] = _without(value, f"{name}.") if isinstance(value, dict) else value
    return found
