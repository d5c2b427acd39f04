"""What a training reports beyond numbers: pictures of the tune set and its confusion matrix to the
loggers, and each validation to a search."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from dd.evaluation import metrics
from dd.store.progress import Progress
from dd.taxonomy import IGNORE
from dd.training.loggers import ShownImage, tell


def image_miou(truth: torch.Tensor, prediction: torch.Tensor, num_classes: int) -> float | None:
    """mIoU in percent of one image over the classes in it or its prediction; None if every pixel is
    255."""
    kept = truth != IGNORE
    pairs = truth[kept].long() * num_classes + prediction[kept].long()
    confusion = torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    return metrics.miou(confusion) if kept.any() else None


class ShownPredictions(pl.Callback):
    """Shows the first ``count`` images of the tune set with truth and prediction, and the confusion
    matrix over the whole set, at each validation, and a table of the images at the end, in loggers
    that support this. ``validation_step`` returns its batch's predictions, and the module keeps the
    matrix as ``counts``."""

    def __init__(self, count: int = 8) -> None:
        self.count = count
        self.shown: list[ShownImage] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.shown = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        able = any(
            hasattr(type(getattr(logger, "logger", None)), "show") for logger in trainer.loggers
        )
        if not able or not trainer.is_global_zero or trainer.sanity_checking:
            return
        data, left = trainer.datamodule.tune, self.count - len(self.shown)
        for prediction, mask in list(zip(outputs, batch[1], strict=True))[:left]:
            index = len(self.shown)
            name = str(getattr(data, "ids", range(index + 1))[index])
            truth, found = (m.cpu().numpy().astype(np.uint8) for m in (mask, prediction))
            miou = image_miou(mask, prediction, len(module.class_names))
            self.shown.append(ShownImage(name, data[index][0], truth, found, miou))

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.shown:
            tell(trainer, "show", self.shown, module.class_names, trainer.global_step)
        if module.counts is not None and not trainer.sanity_checking:
            counts = module.counts.numpy()
            tell(trainer, "confusion", counts, module.class_names, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.shown:
            tell(trainer, "table", self.shown, module.class_names, trainer.global_step)


class Steps(pl.Callback):
    """Progress of a training by :class:`dd.store.progress.Progress`: steps, rate, time left,
    loss."""

    def __init__(self, name: str, bar: bool = True) -> None:
        self.name, self.bar, self.validating = name, bar, False
        self.progress: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.progress = Progress(
                self.name,
                trainer.max_steps,
                trainer.global_step,
                unit="steps",
                note=partial(self._note, trainer),
                bar=self.bar,
            ).__enter__()

    def _note(self, trainer: pl.Trainer) -> str:
        if self.validating:
            return "validating"
        loss = trainer.callback_metrics.get("train/loss")
        return "" if loss is None else f"loss {float(loss):.3g}"

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.progress:
            self.progress.advance(trainer.global_step - self.progress.done)

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.progress:
            self.validating = True
            self.progress.advance(0)

    def on_validation_end(self, *_: Any) -> None:
        self.validating = False

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self.progress:
            self.progress.__exit__()
            self.progress = None


class Report(pl.Callback):
    """Calls ``report(step, mIoU on tune, last)`` at each validation; it may raise to end the
    training. ``last``: the training is ending anyway."""

    def __init__(self, report: Callable[[int, float, bool], object]) -> None:
        self.report = report

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get("tune/miou")
        if value is not None and not trainer.sanity_checking:
            self.report(trainer.global_step, float(value), trainer.global_step >= trainer.max_steps)
