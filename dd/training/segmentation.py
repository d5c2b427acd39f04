"""Training a segmenter (the LightningModule, its schedule, the average of its weights) and
predicting with it."""

import time
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.plugins.precision import Precision

from dd.evaluation import metrics
from dd.segmenters.transforms import EvalTransform
from dd.store import checkpoints
from dd.taxonomy import IGNORE
from dd.training.mean_teacher import MeanTeacher, class_mix

PAPER_SCALES = (
    0.5,
    0.75,
    1.0,
    1.25,
    1.5,
    1.75,
)  # of the paper's test-time augmentation, which also mirrors
MAX_LONG = 2048  # of the long side at scale 1, mmsegmentation's


def ema_average(decay: float):
    """Exponential moving average whose decay warms up as (1 + n) / (10 + n), so that short runs are
    averaged too.

    ``average(averaged, current, count)`` changes a list of tensors of one kind at once: on a GPU
    some kernels, and one wait for ``count``, in place of as many for each tensor. Whole numbers are
    copied.
    """

    def average(averaged, current, count):
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

    def __init__(self, decay: float = 0.999):
        super().__init__(use_buffers=True, multi_avg_fn=ema_average(decay))

    def on_fit_start(self, trainer, module):
        # Lightning makes the copy before the module moves to its GPU: each step would bring all
        # weights back to the CPU
        self._average_model.to(module.device)

    @property
    def average(self) -> pl.LightningModule:
        """The averaged copy of the module that is trained."""
        return self._average_model.module


class CheckedCheckpointIO(TorchCheckpointIO):
    """How Lightning writes and reads every checkpoint of a training, ``best.ckpt`` too:
    :mod:`dd.store.checkpoints`."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        checkpoints.save(checkpoint, path)

    def load_checkpoint(self, path, map_location=None, weights_only=True):
        return checkpoints.load(path)


class LastCheckpoint(pl.Callback):
    """Writes ``dirpath/last.ckpt`` and keeps the one before: every ``every_n_steps`` optimiser
    steps, at the last one, and before each validation, in which a training may be stopped.
    Stands after :class:`EMA` in the list of callbacks, so that the average already holds the
    step."""

    def __init__(self, dirpath: str, every_n_steps: int = 1000):
        self.path, self.every_n_steps, self._saved = (
            Path(dirpath) / checkpoints.LAST,
            every_n_steps,
            None,
        )

    def setup(self, trainer, module, stage):
        trainer.strategy.checkpoint_io = CheckedCheckpointIO()

    def on_train_start(self, trainer, module):
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer, *_):
        if (
            trainer.global_step % self.every_n_steps == 0
            or trainer.global_step == trainer.max_steps
        ):
            self._save(trainer)

    def on_validation_start(self, trainer, *_):
        if not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer):
        if trainer.global_step != self._saved:
            trainer.save_checkpoint(self.path)
            self._saved = trainer.global_step


def _logits(segmenter, images, sizes, mirrored=False):
    """Logits [K, H, W] of one image after the other, resized bilinearly to the original size;
    images of one shape are shown together. ``mirrored``: the images are, and the logits are
    turned back."""
    if len({i.shape for i in images}) == 1:
        logits = list(segmenter(torch.stack(images)).float())
    else:
        logits = [segmenter(i[None])[0].float() for i in images]
    for x, size in zip(logits, sizes, strict=True):
        x = x.flip(-1) if mirrored else x
        yield F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


def predict(
    segmenter, images: list[torch.Tensor], sizes: list[tuple[int, int]]
) -> list[torch.Tensor]:
    """Class ids [H, W] per image: logits resized bilinearly to the original size (H, W), then
    argmax."""
    return [
        logits.max(0).indices for logits in _logits(segmenter, images, sizes)
    ]  # on a CPU argmax takes four times as long


class Views:
    """What a segmenter is shown of a whole image: its short side at ``short_side`` pixels times
    each of ``scales``, and mirrored too with ``flip``. More than one view is test-time
    augmentation.

    ``views(image)`` turns uint8 [H, W, 3] into one uint8 [3, h, w] per scale: a transform for
    :func:`dd.training.datamodule.whole_loader`. ValueError for scales that are not positive, or
    repeated.
    """

    def __init__(self, short_side: int, scales=(1.0,), flip: bool = False):
        numbers = isinstance(scales, list | tuple) and all(
            type(s) in (int, float) and s > 0 for s in scales
        )
        if not numbers or not scales or len(set(scales)) < len(scales):
            raise ValueError(
                f"scales={scales}: expected different numbers above 0, as [1.0] or "
                f"{list(PAPER_SCALES)}"
            )
        if not isinstance(flip, bool):
            raise ValueError(f"flip={flip!r}: expected true or false")
        self.short_side, self.scales, self.flip = (
            short_side,
            tuple(sorted(map(float, scales))),
            flip,
        )
        self.resize = [
            EvalTransform(max(1, round(short_side * s)), max(1, round(MAX_LONG * s)))
            for s in self.scales
        ]

    @property
    def protocol(self) -> dict:
        """What metrics.json and masks.json record."""
        return {"scales": list(self.scales), "flip": self.flip, "resize": self.short_side}

    @property
    def name(self) -> str:
        """A folder for results of this protocol: empty for one view at scale 1, ``ms_flip`` for
        the paper's augmentation."""
        parts = (
            ["ms"]
            if self.scales == PAPER_SCALES
            else ["scales", "-".join(f"{s:g}" for s in self.scales)]
        )
        return "_".join((parts if self.scales != (1.0,) else []) + ["flip"] * self.flip)

    def __call__(self, image) -> list[torch.Tensor]:
        return [resize(image) for resize in self.resize]

    def probabilities(
        self, segmenter, images: list[list[torch.Tensor]], sizes
    ) -> list[torch.Tensor]:
        """Mean over the views of the class probabilities [K, H, W] at original size, as
        mmsegmentation's ``SegTTAModel`` averages them: the softmax of each view's resized
        logits."""
        total, number = [0.0] * len(images), len(self.scales) * (1 + self.flip)
        for scaled in zip(*images, strict=True):
            for mirrored in (False, True)[: 1 + self.flip]:
                shown = [i.flip(-1) for i in scaled] if mirrored else list(scaled)
                for k, logits in enumerate(_logits(segmenter, shown, sizes, mirrored)):
                    total[k] = total[k] + logits.softmax(0)
        return [t / number for t in total]

    def predict(
        self, segmenter, images: list[list[torch.Tensor]], sizes, confidence: float | None = None
    ) -> list[torch.Tensor]:
        """Class ids [H, W] per image: the argmax of the logits of one view, or of the mean
        probabilities of several. ``confidence``: pixels whose strongest class has a smaller
        probability are 255."""
        if len(self.scales) == 1 and not self.flip and confidence is None:
            return predict(segmenter, [i for (i,) in images], sizes)
        found = []
        for probabilities in self.probabilities(segmenter, images, sizes):
            best, ids = probabilities.max(0)
            found.append(ids if confidence is None else ids.masked_fill(best < confidence, IGNORE))
        return found


@torch.no_grad()
def count(
    segmenter, loader, confusion, device="cpu", on_batch=None, predict=predict
) -> torch.Tensor:
    """Confusion matrix of a segmenter over a loader of
    :func:`dd.training.datamodule.whole_loader`; ``on_batch`` gets each batch's predictions.
    ``predict`` fits the loader's transform: the method of the :class:`Views` that resized its
    images."""
    for images, masks in loader:
        predictions = predict(segmenter, to_device(images, device), [tuple(m.shape) for m in masks])
        confusion.update(predictions, to_device(masks, device))
        if on_batch:
            on_batch(predictions)
    return confusion.compute()


def to_device(images, device):
    """Images, or lists of views, of a batch moved to ``device``."""
    return [i.to(device) if isinstance(i, torch.Tensor) else to_device(i, device) for i in images]


class DoesNotFit(ValueError):
    """Images that need more memory than the device has."""


def predict_fitting(
    call, batch: list[tuple], unreadable: dict[str, str], fail=lambda what: None
) -> list[tuple]:
    """(item, image, ``call``'s result) of a batch of (item, image): together or, where they do
    not fit into the device's memory, one by one; what does not fit alone goes to ``unreadable``
    {file: why}, and ``fail`` is told."""
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
    the views that ``run`` (run.json) is evaluated in. ``segmenter``: with its weights.
    DoesNotFit where the device's memory ends."""

    def __init__(self, run: dict, segmenter, views: Views, device: str = "cpu"):
        self.segmenter, self.views, self.device = segmenter.to(device).eval(), views, device
        self.bf16 = run.get("bf16", False)

    @torch.no_grad()
    def __call__(self, images: list) -> list:
        with self._fits(images), self._autocast():
            found = self.views.predict(
                self.segmenter, self._shown(images), [image.shape[:2] for image in images]
            )
        return [mask.to(torch.uint8).cpu().numpy() for mask in found]

    @torch.no_grad()
    def probabilities(self, images: list) -> list[torch.Tensor]:
        """Class probabilities float32 [K, H, W] of each image at its own size, on the device."""
        with self._fits(images), self._autocast():
            return self.views.probabilities(
                self.segmenter, self._shown(images), [image.shape[:2] for image in images]
            )

    def _autocast(self):
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def _fits(self, images: list):
        try:
            yield
        except torch.OutOfMemoryError:
            height, width = max(
                (image.shape[:2] for image in images), key=lambda size: size[0] * size[1]
            )
            raise DoesNotFit(
                f"{len(images)} images of up to {width}x{height} do not fit into the memory of "
                f"{self.device}: make them "
                "smaller, or choose device=cpu"
            ) from None

    def _shown(self, images: list) -> list:
        return to_device([self.views(image) for image in images], self.device)


def unshared_statistics(module) -> list[torch.Tensor]:
    """Batch-norm statistics that each process of a training collects from its own images."""
    norms = [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    return [b for m in norms if not isinstance(m, torch.nn.SyncBatchNorm) for b in m.buffers()]


class Segmentation(pl.LightningModule):
    """AdamW with a smaller backbone rate, polynomial decay to 0, validation mIoU over the whole
    tune set.

    ``segmenter`` offers ``loss(images, labels)``, ``forward(images)`` and
    ``parameter_groups(...)``. What may make a step shorter, and changes results by rounding alone:
    ``channels_last`` (the layout of weights and activations), ``fused`` (AdamW in one kernel),
    ``compile`` (the loss by torch.compile; needs a C++ compiler, and minutes before the first
    step). ``teacher``: batches hold unlabelled photographs too, which the average of the weights
    (:class:`EMA`) labels.
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
        fused: bool = False,
        compile: bool = False,
        teacher: MeanTeacher | None = None,
    ):
        super().__init__()
        self.save_hyperparameters(
            "learning_rate",
            "weight_decay",
            "backbone_multiplier",
            "betas",
            "poly_power",
            "warmup",
            "channels_last",
            "fused",
            "compile",
        )
        self.segmenter = (
            segmenter.to(memory_format=torch.channels_last) if channels_last else segmenter
        )
        self.class_names = class_names
        self.confusion = metrics.confusion_matrix(len(class_names))
        self.teacher, self._loss, self._averages, self._unshared = teacher, None, None, []
        self.counts = None  # confusion matrix int64 [K, K] of the last validation, on the CPU
        self._since = 0.0, 0  # time and step of the last number of seconds
        self._paused = 0.0  # time at which a validation began

    def on_train_start(self):
        self._averages = next((c for c in self.trainer.callbacks if isinstance(c, EMA)), None)
        if self.teacher is not None and self._averages is None:
            raise ValueError(
                "self-training needs the average of the weights as its teacher: "
                "trainer.callbacks.ema"
            )
        if self.teacher is not None and self.trainer.world_size > 1:
            self._unshared = unshared_statistics(self._averages.average.segmenter)
        # not before: until then the module is copied for its average, and a compiled function would
        # go with it
        self._loss = (
            torch.compile(self.segmenter.loss) if self.hparams.compile else self.segmenter.loss
        )
        self._since = time.perf_counter(), self.trainer.global_step

    def _is_logged(self) -> bool:
        """Whether the step under way is one that Lightning hands to the loggers: nothing is
        computed for the others."""
        return (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0

    def training_step(self, batch, _):
        images, labels, *photos = batch
        losses = self._loss(images, labels)
        if self._is_logged():
            self.log("train/learning_rate", max(g["lr"] for g in self.optimizers().param_groups))
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items() if k != "loss"})
        self.log("train/loss", losses["loss"].detach(), prog_bar=True)
        return (
            losses["loss"] + self._photo_loss(images, labels, *photos) if photos else losses["loss"]
        )

    def _photo_loss(self, images, labels, shown, changed, known):
        """The teacher sees ``shown``, the student learns its labels on ``changed``."""
        for (
            buffer
        ) in self._unshared:  # one teacher for all processes, the one that a checkpoint holds
            torch.distributed.broadcast(buffer, 0)
        found = self.teacher.labels(self._averages.average.segmenter, shown, known)
        self.log(
            "train/taught", (found != IGNORE).float().mean()
        )  # share of the pixels that got a label
        mixed = class_mix(images, labels, changed, found) if self.teacher.mix else (changed, found)
        loss = self._loss(*mixed)["loss"]
        self.log("train/photo_loss", loss.detach())
        return self.teacher.weight * loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        (then, before), now, step = self._since, time.perf_counter(), self.trainer.global_step
        if step > before and step % self.trainer.log_every_n_steps == 0:
            self.log("train/step_seconds", (now - then) / (step - before))
            self._since = now, step

    def on_validation_start(self):
        self._paused = time.perf_counter()

    def on_validation_end(self):
        self._since = self._since[0] + time.perf_counter() - self._paused, self._since[1]

    def validation_step(self, batch, _):
        images, masks = batch
        predictions = predict(self.segmenter, images, [m.shape for m in masks])
        self.confusion.update(predictions, masks)
        return predictions  # for callbacks that show them

    def on_validation_epoch_start(self):
        if (
            self.trainer.world_size > 1
        ):  # each has batch statistics of its own images; a checkpoint holds the first one's
            for buffer in self.segmenter.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_validation_epoch_end(self):
        confusion = self.confusion.compute().cpu()
        self.confusion.reset()
        self.counts = confusion
        if confusion.sum():
            # each process has the counts of all: nothing to average or warn of
            same = {"rank_zero_only": True, "sync_dist": True}
            self.log("tune/miou", metrics.miou(confusion), prog_bar=True, **same)
            for name, value in zip(self.class_names, metrics.iou(confusion), strict=True):
                if value is not None:
                    self.log(f"tune/iou/{name}", value, **same)

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        """As Lightning does it, which refuses a fused optimiser although without a loss scale there
        is nothing to undo, and which keeps to itself the norm of the gradient that it clips."""
        plain = type(self.trainer.precision_plugin).clip_grad_by_norm is Precision.clip_grad_by_norm
        scaled = self.hparams.fused and self.trainer.scaler is not None
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        if gradient_clip_val and gradient_clip_algorithm != "value" and plain and not scaled:
            norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            norm = None
            if self._is_logged() and not scaled:
                gradients = [p.grad for p in parameters if p.grad is not None]
                norm = torch.nn.utils.get_total_norm(gradients)
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if norm is not None and self._is_logged():
            self.log("train/gradient_norm", norm)  # before it is clipped

    def configure_optimizers(self):
        h = self.hparams
        groups = self.segmenter.parameter_groups(
            h.learning_rate, h.weight_decay, h.backbone_multiplier
        )
        how = {
            "betas": tuple(h.betas),
            "weight_decay": h.weight_decay,
            "fused": h.fused or None,
        }  # None: torch chooses
        optimizer = torch.optim.AdamW(groups, h.learning_rate, **how)
        total, power, warmup = self.trainer.max_steps, h.poly_power, h.warmup

        def factor(step):
            return min(1.0, (step + 1) / (warmup + 1)) * max(0.0, 1 - step / total) ** power

        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}
        ]
