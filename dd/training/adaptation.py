"""Adapts a Stable Diffusion to unlabelled photographs: trains LoRA layers in its UNet and freezes
everything else.

No mask is ever read: the data are image files and captions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from PIL import Image
from torch.utils.data import Dataset

from dd.store.settings import Natural, Settings, Share
from dd.training.datamodule import Photographs
from dd.training.denoising import noised
from dd.training.loaders import Draws
from dd.training.schedules import stepwise


def square(photo: np.ndarray, size: int, rng: np.random.Generator) -> torch.Tensor:
    """A photograph, uint8 [H, W, 3], as float [3, size, size] in [-1, 1]: scaled so that its short
    side is ``size``, then cropped to a square at a position drawn from ``rng``."""
    image = Image.fromarray(photo)
    scale = size / min(image.size)
    image = image.resize(
        [max(size, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS
    )
    x, y = (int(rng.integers(side - size + 1)) for side in image.size)
    pixels = np.array(image.crop((x, y, x + size, y + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


class CaptionedPhotos(Dataset):
    """Draw ``index`` as (image float [3, size, size] in [-1, 1], caption): each image once a round,
    in an order of seed and round. Each draw has its own crop and choice of caption. ``photos``:
    indexable, uint8 [H, W, 3]; ``captions``: for each photo, one or more."""

    def __init__(
        self,
        photos: Photographs,
        captions: Sequence[Sequence[str]],
        size: int,
        length: int,
        seed: int = 0,
    ) -> None:
        self.photos, self.captions, self.size = photos, captions, size
        self.length, self.seed = length, seed
        self._round, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        number, place = divmod(index, len(self.photos))
        if number != self._round:
            order = np.random.default_rng([self.seed, 5, number]).permutation(len(self.photos))
            self._round, self._order = number, order
        chosen, rng = self._order[place], np.random.default_rng([self.seed, 6, index])
        texts = self.captions[chosen]
        caption = texts[int(rng.integers(len(texts)))]
        return square(self.photos[chosen], self.size, rng), caption


class PhotoData(Draws):
    """Batches of :class:`CaptionedPhotos`."""

    def __init__(
        self,
        photos: Photographs,
        captions: Sequence[Sequence[str]],
        size: int,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        draws = partial(CaptionedPhotos, photos, captions, size, seed=seed)
        super().__init__(draws, batch_size, num_workers, seed)


def loss_weights(snr: torch.Tensor, prediction_type: str, gamma: float | None) -> torch.Tensor:
    """Weights [B] of the squared errors for signal-to-noise ratios [B]. Without ``gamma`` ones;
    else min-SNR weights (Hang et al. 2023, arXiv:2303.09556) for the noise (min(snr, gamma) / snr)
    or for v (min(snr, gamma) / (snr + 1))."""
    if gamma is None:
        return torch.ones_like(snr)
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


class AdaptationSettings(Settings):
    """``min_snr_gamma``: see :func:`loss_weights`. ``caption_dropout``: share of the captions that
    are left out (classifier-free guidance)."""

    noun: ClassVar[str] = "adapter.training"
    learning_rate: Annotated[float, Ge(0)] = 1e-4
    weight_decay: Annotated[float, Ge(0)] = 0.01
    warmup: Natural = 0
    min_snr_gamma: Annotated[float, Gt(0)] | None = None
    caption_dropout: Share = 0.1
    seed: int = 0


class Adaptation(pl.LightningModule):
    """Denoising training of LoRA layers. ``model``: the model with these layers, otherwise frozen
    (:class:`dd.generators.adapter.Trainable`). ``settings``: :class:`AdaptationSettings`.
    Checkpoints hold only the LoRA layers."""

    Settings = AdaptationSettings

    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__()
        self.settings = AdaptationSettings(**settings)
        self.save_hyperparameters(self.settings.model_dump())
        self.lora = torch.nn.ParameterList(model.parameters)
        self._frozen = {"model": model}  # not a sub-module, so neither saved nor averaged
        self.scheduler = model.scheduler

    def on_fit_start(self) -> None:
        self._frozen["model"].to(self.device)

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> torch.Tensor:
        images, captions = batch
        model, micro = self._frozen["model"], batch_idx % self.trainer.accumulate_grad_batches
        rng = np.random.default_rng([self.settings.seed, self.global_step, micro, self.global_rank])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        dropout = self.settings.caption_dropout
        shown = ["" if rng.random() < dropout else caption for caption in captions]
        with torch.no_grad():
            latents, states = model.latents(images, generator), model.encode(shown)
        noisy, t, target = noised(self.scheduler, latents, generator)
        prediction = model.predict(noisy, t, states)
        a = self.scheduler.alphas_cumprod[t.cpu()].double()
        kind, gamma = self.scheduler.config.prediction_type, self.settings.min_snr_gamma
        weights = loss_weights(a / (1 - a), kind, gamma).to(latents)
        errors = F.mse_loss(prediction.float(), target, reduction="none").mean((1, 2, 3))
        loss = (errors * weights).mean()
        self.log("adaptation/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        optimizer = torch.optim.AdamW(
            self.lora.parameters(),
            self.settings.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=self.settings.weight_decay,
        )
        warmup = max(1, self.settings.warmup)
        return stepwise(optimizer, lambda step: min(1.0, (step + 1) / warmup))


class EachSteps(pl.Callback):
    """Calls ``act(step)`` before the first step, each ``every`` steps and at the last one; only in
    the first process."""

    def __init__(self, act: Callable[[int], object], every: int) -> None:
        self.act, self.every = act, every

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            self.act(0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, whole = trainer.global_step, (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = step % self.every == 0 or step == trainer.max_steps
        if trainer.is_global_zero and whole and due:
            self.act(step)
