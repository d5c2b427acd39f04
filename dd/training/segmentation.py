"""Trains a segmenter (the LightningModule, its schedule, the average of its weights) and predicts
with it."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from annotated_types import Ge, Len, Lt
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.plugins.precision import Precision

from dd.data.photos import Picture
from dd.evaluation import metrics
from dd.segmenters.base import Annealed, Segmenter
from dd.store import checkpoints
from dd.store.settings import Natural, Settings
from dd.taxonomy import IGNORE
from dd.training.mean_teacher import MeanTeacher, class_mix
from dd.training.schedules import stepwise

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of its test-time augmentation, each mirrored too
MAX_LONG = 2048  # of the long side at scale 1, mmsegmentation's
Size = tuple[int, int]  # height and width
Result = TypeVar("Result")


def ema_average(decay: float) -> Callable[[list[torch.Tensor], list[torch.Tensor], Any], None]:
    """Exponential moving average whose decay warms up as (1 + n) / (10 + n), so that short runs are
    averaged too.

    ``average(averaged, current, count)`` updates a list of tensors of one kind together: on a GPU
    this needs a few kernels and one wait for ``count``, instead of one of each for every tensor.
    Integer tensors are copied.
    """

    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], count: Any) -> None:
        if not torch.is_floating_point(averaged[0]):
            torch._foreach_copy_(averaged, current)
            return
        d = min(decay, (1 + int(count)) / (10 + int(count)))
        steps = torch._foreach_sub(current, averaged)
        torch._foreach_mul_(steps, 1 - d)
        torch._foreach_add_(averaged, steps)

    return average


class EMA(WeightAveraging):
    """Lightning's weight averaging with :func:`ema_average`; batch-norm statistics are averaged
    too. Checkpoints hold the average as ``state_dict`` and the raw weights as
    ``current_model_state``."""

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__(use_buffers=True, multi_avg_fn=ema_average(decay))

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning makes the copy before the module moves to its GPU; without this, each step would
        # copy all weights back to the CPU
        self._average_model.to(module.device)

    @property
    def average(self) -> pl.LightningModule:
        """The averaged copy of the trained module."""
        return self._average_model.module


class CheckedCheckpointIO(TorchCheckpointIO):
    """Makes Lightning write and read every checkpoint of a training, including ``best.ckpt``, by
    :mod:`dd.store.checkpoints`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        checkpoints.save(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return checkpoints.load(path)


class LastCheckpoint(pl.Callback):
    """Writes ``dirpath/last.ckpt`` and keeps the one before: every ``every_n_steps`` optimiser
    steps, at the last one, and before each validation, because a training may be stopped during
    validation. It must follow :class:`EMA` in the list of callbacks, so that the average already
    includes the step."""

    def __init__(self, dirpath: str, every_n_steps: int = 1000) -> None:
        self.path, self.every_n_steps = Path(dirpath) / checkpoints.LAST, every_n_steps
        self._saved: int | None = None  # the step of the file

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = CheckedCheckpointIO()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step != self._saved:
            trainer.save_checkpoint(self.path)
            self._saved = trainer.global_step


def _logits(
    segmenter: Segmenter,
    images: Sequence[torch.Tensor],
    sizes: Iterable[Size],
    mirrored: bool = False,
) -> Iterator[torch.Tensor]:
    """Logits [K, H, W] of each image in turn, resized bilinearly to the original size; images of
    one shape are processed together. ``mirrored``: the images are mirrored, and the logits are
    flipped back."""
    if len({i.shape for i in images}) == 1:
        logits = list(segmenter(torch.stack(images)).float())
    else:
        logits = [segmenter(i[None])[0].float() for i in images]
    for x, size in zip(logits, sizes, strict=True):
        x = x.flip(-1) if mirrored else x
        yield F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


def predict(
    segmenter: Segmenter, images: Sequence[torch.Tensor], sizes: Iterable[Size]
) -> list[torch.Tensor]:
    """Class ids [H, W] for each image: logits resized bilinearly to the original size (H, W), then
    argmax."""
    # on a CPU argmax takes four times as long as max
    return [logits.max(0).indices for logits in _logits(segmenter, images, sizes)]


class Views:
    """The views of a whole image that a segmenter sees: its short side at ``short_side`` pixels
    times each of ``scales``, and mirrored too with ``flip``. More than one view is test-time
    augmentation.

    ``views(image)`` turns uint8 [H, W, 3] into one uint8 [3, h, w] per scale: a transform for
    :func:`dd.training.datamodule.whole_loader`. ValueError for scales that are repeated.
    """

    def __init__(
        self, short_side: int, scales: Sequence[float] = (1.0,), flip: bool = False
    ) -> None:
        if len(set(scales)) < len(scales):
            raise ValueError(
                f"scales={scales}: expected different numbers above 0, "
                f"as [1.0] or {list(PAPER_SCALES)}"
            )
        from dd.segmenters.transforms import EvalTransform  # imports mmsegmentation, so only here

        self.short_side, self.flip = short_side, flip
        self.scales = tuple(sorted(map(float, scales)))
        self.resize = [
            EvalTransform(max(1, round(short_side * s)), max(1, round(MAX_LONG * s)))
            for s in self.scales
        ]

    @property
    def protocol(self) -> dict[str, Any]:
        """The record for metrics.json and masks.json."""
        return {"scales": list(self.scales), "flip": self.flip, "resize": self.short_side}

    @property
    def name(self) -> str:
        """Folder name for results of this protocol: empty for one view at scale 1, ``ms_flip`` for
        the paper's augmentation."""
        if self.scales == (1.0,):
            return "flip" * self.flip
        scales = "-".join(f"{s:g}" for s in self.scales)
        shown = "ms" if self.scales == PAPER_SCALES else f"scales_{scales}"
        return shown + "_flip" * self.flip

    def __call__(self, image: np.ndarray) -> list[torch.Tensor]:
        return [resize(image) for resize in self.resize]

    def probabilities(
        self, segmenter: Segmenter, images: list[list[torch.Tensor]], sizes: Sequence[Size]
    ) -> list[torch.Tensor]:
        """Mean over the views of the class probabilities [K, H, W] at original size, as
        mmsegmentation's ``SegTTAModel`` averages them: the softmax of each view's resized
        logits."""
        total: list[Any] = [0.0] * len(images)
        for scaled in zip(*images, strict=True):
            for mirrored in (False, True) if self.flip else (False,):
                shown = [i.flip(-1) for i in scaled] if mirrored else list(scaled)
                for k, logits in enumerate(_logits(segmenter, shown, sizes, mirrored)):
                    total[k] = total[k] + logits.softmax(0)
        return [t / (len(self.scales) * (1 + self.flip)) for t in total]

    def predict(
        self,
        segmenter: Segmenter,
        images: list[list[torch.Tensor]],
        sizes: Sequence[Size],
        confidence: float | None = None,
    ) -> list[torch.Tensor]:
        """Class ids [H, W] for each image: the argmax of the logits of one view, or of the mean
        probabilities of several. ``confidence``: pixels whose strongest class has a smaller
        probability become 255."""
        if len(self.scales) == 1 and not self.flip and confidence is None:
            return predict(segmenter, [i for (i,) in images], sizes)
        found = []
        for probabilities in self.probabilities(segmenter, images, sizes):
            best, ids = probabilities.max(0)
            found.append(ids if confidence is None else ids.masked_fill(best < confidence, IGNORE))
        return found


@torch.no_grad()
def count(
    segmenter: Segmenter,
    loader: Iterable[tuple[list[Any], list[torch.Tensor]]],
    confusion: metrics.ConfusionMatrix,
    device: str = "cpu",
    on_batch: Callable[[list[torch.Tensor]], object] | None = None,
    predict: Callable[..., list[torch.Tensor]] = predict,
) -> torch.Tensor:
    """Confusion matrix of a segmenter over a loader of ``dd.training.datamodule.whole_loader``.
    ``on_batch`` gets each batch's predictions. ``predict`` must fit the loader's transform: it is
    the method of the :class:`Views` that resized its images."""
    for images, masks in loader:
        predictions = predict(segmenter, to_device(images, device), [tuple(m.shape) for m in masks])
        confusion.update(predictions, to_device(masks, device))
        if on_batch:
            on_batch(predictions)
    return confusion.compute()


def to_device(images: Sequence[Any], device: str) -> list[Any]:
    """Images, or lists of views, of a batch moved to ``device``."""
    return [i.to(device) if isinstance(i, torch.Tensor) else to_device(i, device) for i in images]


class DoesNotFit(ValueError):
    """Images that need more memory than the device has."""


def predict_fitting(
    call: Callable[[list[np.ndarray]], Sequence[Result]],
    batch: Sequence[tuple[Picture, np.ndarray]],
    unreadable: dict[str, str],
    fail: Callable[[str], object] = lambda what: None,
) -> list[tuple[Picture, np.ndarray, Result]]:
    """(item, image, ``call``'s result) of a batch of (item, image): together or, if they do not fit
    into the device's memory, one by one. An image that does not fit alone goes to ``unreadable``
    {file: why}, and ``fail`` is called."""
    try:
        return [
            (*pair, found)
            for pair, found in zip(batch, call([image for _, image in batch]), strict=True)
        ]
    except DoesNotFit as error:
        if len(batch) > 1:
            return [
                row for pair in batch for row in predict_fitting(call, [pair], unreadable, fail)
            ]
        unreadable[batch[0][0].file] = str(error)
        fail(f"{batch[0][0].file} is left out")
        return []


class Predictor:
    """Images uint8 [H, W, 3] -> class ids uint8 [H, W] at their own size, in the precision and
    views in which ``run`` (run.json) is evaluated. ``segmenter``: with its weights. DoesNotFit if
    the device's memory is not enough."""

    def __init__(
        self, run: Mapping[str, Any], segmenter: Segmenter, views: Views, device: str = "cpu"
    ) -> None:
        self.segmenter, self.views, self.device = segmenter.to(device).eval(), views, device
        self.bf16 = run.get("bf16", False)

    def __call__(self, images: list[np.ndarray]) -> list[np.ndarray]:
        found = self._shown_to(self.views.predict, images)
        return [mask.to(torch.uint8).cpu().numpy() for mask in found]

    def probabilities(self, images: list[np.ndarray]) -> list[torch.Tensor]:
        """Class probabilities float32 [K, H, W] of each image at its own size, on the device."""
        return self._shown_to(self.views.probabilities, images)

    @torch.no_grad()
    def _shown_to(
        self, look: Callable[..., list[torch.Tensor]], images: list[np.ndarray]
    ) -> list[torch.Tensor]:
        sizes = [image.shape[:2] for image in images]
        with self._fits(sizes), self._autocast():
            shown = to_device([self.views(image) for image in images], self.device)
            return look(self.segmenter, shown, sizes)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def _fits(self, sizes: Sequence[tuple[int, ...]]) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            height, width = max(sizes, key=lambda size: size[0] * size[1])
            raise DoesNotFit(
                f"{len(sizes)} images of up to {width}x{height} do not fit into the memory of "
                f"{self.device}: make them smaller, or choose device=cpu"
            ) from None


def unshared_statistics(module: Segmenter) -> list[torch.Tensor]:
    """Batch-norm statistics that each process of a training collects from its own images."""
    norms = [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    return [b for m in norms if not isinstance(m, torch.nn.SyncBatchNorm) for b in m.buffers()]


class SegmentationSettings(Settings):
    """Settings of AdamW, and of the learning rate's decay to 0. Options that may make a step faster
    and change results by rounding only: ``channels_last`` (the layout of weights and activations),
    ``fused`` (AdamW in one kernel), ``compile`` (the loss by torch.compile; needs a C++ compiler,
    and minutes before the first step)."""

    noun: ClassVar[str] = "optimizer"
    learning_rate: Annotated[float, Ge(0)] = 1e-4
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    backbone_multiplier: Annotated[float, Ge(0)] = 0.1
    betas: Annotated[Sequence[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)] = (0.9, 0.999)
    poly_power: Annotated[float, Ge(0)] = 0.9
    warmup: Natural = 0
    channels_last: bool = False
    fused: bool = False
    compile: bool = False


class Segmentation(pl.LightningModule):
    """AdamW with a smaller backbone rate, polynomial decay to 0, validation mIoU over the whole
    tune set. ``settings``: :class:`SegmentationSettings`. ``teacher``: batches also hold unlabelled
    photographs, which the average of the weights (:class:`EMA`) labels."""

    Settings = SegmentationSettings
    _loss: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]
    _ema: EMA

    def __init__(
        self,
        segmenter: Segmenter,
        class_names: list[str],
        teacher: MeanTeacher | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings = SegmentationSettings(**settings)
        self.save_hyperparameters(self.settings.model_dump())
        self.segmenter, self.class_names, self.teacher = segmenter, class_names, teacher
        if self.settings.channels_last:
            self.segmenter = segmenter.to(memory_format=torch.channels_last)
        self.confusion = metrics.confusion_matrix(len(class_names))
        self._unshared: list[torch.Tensor] = []
        # confusion matrix int64 [K, K] of the last validation, on the CPU
        self.counts: torch.Tensor | None = None
        self._since = 0.0, 0  # time and step of the last logged seconds
        self._paused = 0.0  # time at which a validation began

    def on_train_start(self) -> None:
        if self.teacher is not None:
            ema = next((c for c in self.trainer.callbacks if isinstance(c, EMA)), None)
            if ema is None:
                raise ValueError(
                    "self-training needs the average of the weights "
                    "as its teacher: trainer.callbacks.ema"
                )
            self._ema = ema
            if self.trainer.world_size > 1:
                self._unshared = unshared_statistics(ema.average.segmenter)
        # not earlier: until now the module is copied for its average, which would include a
        # compiled function
        loss = self.segmenter.loss
        self._loss = torch.compile(loss) if self.settings.compile else loss
        self._since = time.perf_counter(), self.trainer.global_step

    def _is_logged(self) -> bool:
        """Whether Lightning passes the current step to the loggers; nothing is computed for the
        others."""
        return (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0

    def training_step(self, batch: Sequence[torch.Tensor], _: int) -> torch.Tensor:
        images, labels, *photos = batch
        if isinstance(self.segmenter, Annealed):
            self.segmenter.anneal(self.trainer.global_step / self.trainer.max_steps)
        losses = self._loss(images, labels)
        if self._is_logged():
            self.log("train/learning_rate", max(g["lr"] for g in self.optimizers().param_groups))
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items() if k != "loss"})
        self.log("train/loss", losses["loss"].detach(), prog_bar=True)
        if self.teacher is None or not photos:
            return losses["loss"]
        return losses["loss"] + self._photo_loss(self.teacher, images, labels, *photos)

    def _photo_loss(
        self,
        teacher: MeanTeacher,
        images: torch.Tensor,
        labels: torch.Tensor,
        shown: torch.Tensor,
        changed: torch.Tensor,
        known: torch.Tensor,
    ) -> torch.Tensor:
        """The teacher sees ``shown``; the student learns its labels on ``changed``."""
        # all processes use the same teacher, the one that a checkpoint holds
        for buffer in self._unshared:
            torch.distributed.broadcast(buffer, 0)
        found = teacher.labels(self._ema.average.segmenter, shown, known)
        # share of the pixels that got a label
        self.log("train/taught", (found != IGNORE).float().mean())
        if teacher.settings.mix:
            changed, found = class_mix(images, labels, changed, found)
        loss = self._loss(changed, found)["loss"]
        self.log("train/photo_loss", loss.detach())
        return teacher.settings.weight * loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        (then, before), now, step = self._since, time.perf_counter(), self.trainer.global_step
        if step > before and step % self.trainer.log_every_n_steps == 0:
            self.log("train/step_seconds", (now - then) / (step - before))
            self._since = now, step

    def on_validation_start(self) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self) -> None:
        self._since = self._since[0] + time.perf_counter() - self._paused, self._since[1]

    def validation_step(
        self, batch: tuple[list[torch.Tensor], list[torch.Tensor]], _: int
    ) -> list[torch.Tensor]:
        images, masks = batch
        predictions = predict(self.segmenter, images, [m.shape for m in masks])
        self.confusion.update(predictions, masks)
        return predictions  # for callbacks that display them

    def on_validation_epoch_start(self) -> None:
        # each process has batch statistics of its own images; a checkpoint holds the first one's
        if self.trainer.world_size > 1:
            for buffer in self.segmenter.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_validation_epoch_end(self) -> None:
        self.counts = confusion = self.confusion.compute().cpu()
        self.confusion.reset()
        if confusion.sum():
            # each process has the counts of all, so nothing is to be averaged or warned about
            same = {"rank_zero_only": True, "sync_dist": True}
            self.log("tune/miou", metrics.miou(confusion), prog_bar=True, **same)
            for name, value in zip(self.class_names, metrics.iou(confusion), strict=True):
                if value is not None:
                    self.log(f"tune/iou/{name}", value, **same)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does, with two differences: Lightning refuses a fused optimiser even without
        a loss scale to undo, and does not report the norm of the gradient that it clips."""
        plain = type(self.trainer.precision_plugin).clip_grad_by_norm is Precision.clip_grad_by_norm
        scaled = self.settings.fused and self.trainer.scaler is not None
        parameters, norm = [p for g in optimizer.param_groups for p in g["params"]], None
        if gradient_clip_val and gradient_clip_algorithm != "value" and plain and not scaled:
            norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            if self._is_logged() and not scaled:
                gradients = [p.grad for p in parameters if p.grad is not None]
                norm = torch.nn.utils.get_total_norm(gradients)
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if norm is not None and self._is_logged():
            self.log("train/gradient_norm", norm)  # before it is clipped

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        chosen = self.settings
        groups = self.segmenter.parameter_groups(
            chosen.learning_rate, chosen.weight_decay, chosen.backbone_multiplier
        )
        optimizer = torch.optim.AdamW(
            groups,
            chosen.learning_rate,
            betas=tuple(chosen.betas),
            weight_decay=chosen.weight_decay,
            fused=chosen.fused or None,  # None: torch chooses
        )
        total, power, warmup = self.trainer.max_steps, chosen.poly_power, chosen.warmup

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / (warmup + 1)) * max(0.0, 1 - step / total) ** power

        return stepwise(optimizer, factor)
