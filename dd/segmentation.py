"""Training a segmenter: the LightningModule, its schedule and the average of its weights."""

import os
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import WeightAveraging

from dd import metrics


def ema_average(decay: float):
    """Exponential moving average whose decay warms up as (1 + n) / (10 + n), so that short runs are averaged too."""

    def average(averaged, current, count):
        if not torch.is_floating_point(averaged):
            return current
        d = min(decay, (1 + int(count)) / (10 + int(count)))
        return averaged + (current - averaged) * (1 - d)

    return average


class EMA(WeightAveraging):
    """Lightning's weight averaging with :func:`ema_average`; batch-norm statistics are averaged too. Checkpoints hold the
    average as ``state_dict`` and the raw weights as ``current_model_state``."""

    def __init__(self, decay: float = 0.999):
        super().__init__(use_buffers=True, avg_fn=ema_average(decay))


class LastCheckpoint(pl.Callback):
    """Writes ``dirpath/last.ckpt`` every ``every_n_steps`` optimiser steps and at the last one: a whole file or none. Stands
    after :class:`EMA` in the list of callbacks, so that the average already holds the step."""

    def __init__(self, dirpath: str, every_n_steps: int = 1000):
        self.path, self.every_n_steps, self._saved = Path(dirpath) / "last.ckpt", every_n_steps, None

    def on_train_batch_end(self, trainer, *_):
        step = trainer.global_step
        if step == self._saved or (step % self.every_n_steps and step != trainer.max_steps):
            return
        temporary = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, self.path)
        self._saved = step


def predict(segmenter, images: list[torch.Tensor], sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Class ids [H, W] per image: logits resized bilinearly to the original size (H, W), then argmax."""
    if len({i.shape for i in images}) == 1:
        logits = list(segmenter(torch.stack(images)).float())
    else:
        logits = [segmenter(i[None])[0].float() for i in images]
    return [
        F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)
        for x, size in zip(logits, sizes, strict=True)
    ]


@torch.no_grad()
def count(segmenter, loader, confusion, device="cpu", on_batch=None) -> torch.Tensor:
    """Confusion matrix of a segmenter over a loader of :func:`dd.datamodule.whole_loader`; ``on_batch`` gets each batch's
    predictions."""
    for images, masks in loader:
        predictions = predict(segmenter, [i.to(device) for i in images], [tuple(m.shape) for m in masks])
        for prediction, mask in zip(predictions, masks, strict=True):
            confusion.update(prediction, mask.to(device))
        if on_batch:
            on_batch(predictions)
    return confusion.compute()


class Segmentation(pl.LightningModule):
    """AdamW with a smaller backbone rate, polynomial decay to 0, validation mIoU over the whole tune set.

    ``segmenter`` offers ``loss(images, labels)``, ``forward(images)`` and ``parameter_groups(...)``.
    """

    def __init__(
        self,
        segmenter,
        class_names: list[str],
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-4,
        backbone_multiplier: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        poly_power: float = 0.9,
        warmup: int = 0,
        channels_last: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters(
            "learning_rate", "weight_decay", "backbone_multiplier", "betas", "poly_power", "warmup", "channels_last"
        )
        self.segmenter = segmenter.to(memory_format=torch.channels_last) if channels_last else segmenter
        self.class_names = class_names
        self.confusion = metrics.confusion_matrix(len(class_names))

    def training_step(self, batch, _):
        images, labels = batch
        losses = self.segmenter.loss(images, labels)
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items() if k != "loss"})
        self.log("train/loss", losses["loss"].detach(), prog_bar=True)
        return losses["loss"]

    def validation_step(self, batch, _):
        images, masks = batch
        for prediction, mask in zip(predict(self.segmenter, images, [m.shape for m in masks]), masks, strict=True):
            self.confusion.update(prediction, mask)

    def on_validation_epoch_end(self):
        confusion = self.confusion.compute().cpu()
        self.confusion.reset()
        if confusion.sum():
            self.log("tune/miou", metrics.miou(confusion), prog_bar=True, rank_zero_only=True)
            for name, value in zip(self.class_names, metrics.iou(confusion), strict=True):
                if value is not None:
                    self.log(f"tune/iou/{name}", value, rank_zero_only=True)

    def configure_optimizers(self):
        h = self.hparams
        groups = self.segmenter.parameter_groups(h.learning_rate, h.weight_decay, h.backbone_multiplier)
        optimizer = torch.optim.AdamW(groups, h.learning_rate, betas=tuple(h.betas), weight_decay=h.weight_decay)
        total, power, warmup = self.trainer.max_steps, h.poly_power, h.warmup

        def factor(step):
            return min(1.0, (step + 1) / (warmup + 1)) * max(0.0, 1 - step / total) ** power

        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}]
