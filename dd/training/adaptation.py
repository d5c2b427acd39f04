"""Adapting a Stable Diffusion to unlabelled photographs: LoRA layers in its UNet are trained,
everything else is frozen.

No mask is ever read: the data are image files and captions.
"""

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from dd.training.loaders import ResumableLoader


def square(photo: np.ndarray, size: int, rng: np.random.Generator) -> torch.Tensor:
    """A photograph, uint8 [H, W, 3], as float [3, size, size] in [-1, 1]: its short side made
    ``size``, cut to a square at a place of ``rng``."""
    image = Image.fromarray(photo)
    scale = size / min(image.size)
    image = image.resize(
        [max(size, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS
    )
    x, y = (int(rng.integers(side - size + 1)) for side in image.size)
    pixels = np.array(image.crop((x, y, x + size, y + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


class CaptionedPhotos(Dataset):
    """Draw ``index`` as (image float [3, size, size] in [-1, 1], caption): each image once a
    round, in an order of seed and round; the cut and the choice among an image's captions are
    the draw's own. ``photos``: indexable, uint8 [H, W, 3]; ``captions``: for each of them, one
    or more."""

    def __init__(self, photos, captions: list[list[str]], size: int, length: int, seed: int = 0):
        self.photos, self.captions, self.size, self.length, self.seed = (
            photos,
            captions,
            size,
            length,
            seed,
        )
        self._round, self._order = None, None

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        number, place = divmod(index, len(self.photos))
        if number != self._round:
            self._round, self._order = (
                number,
                np.random.default_rng([self.seed, 5, number]).permutation(len(self.photos)),
            )
        chosen, rng = self._order[place], np.random.default_rng([self.seed, 6, index])
        texts = self.captions[chosen]
        caption = texts[int(rng.integers(len(texts)))]
        return square(self.photos[chosen], self.size, rng), caption


class PhotoData(pl.LightningDataModule):
    """Batches of :class:`CaptionedPhotos`; a resumed training takes the next draws."""

    def __init__(
        self, photos, captions, size: int, batch_size: int, num_workers: int = 0, seed: int = 0
    ):
        super().__init__()
        self.photos, self.captions, self.size = photos, captions, size
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def train_dataloader(self):
        trainer = self.trainer
        number = trainer.max_steps * trainer.accumulate_grad_batches * self.batch_size
        photos = CaptionedPhotos(self.photos, self.captions, self.size, number, self.seed)
        return ResumableLoader(photos, trainer, self.batch_size, self.num_workers)


def loss_weights(snr: torch.Tensor, prediction_type: str, gamma: float | None) -> torch.Tensor:
    """Weights [B] of the squared errors for signal-to-noise ratios [B]: ones without ``gamma``,
    else min-SNR weighting (Hang et al. 2023, arXiv:2303.09556) for the noise (min(snr, gamma) /
    snr) or for v (min(snr, gamma) / (snr + 1))."""
    if gamma is None:
        return torch.ones_like(snr)
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


class Adaptation(pl.LightningModule):
    """Denoising training of LoRA layers. ``parameters``: theirs; ``pipe``: the pipeline they are
    part of, otherwise frozen; ``encode(captions)`` its text states [B, T, C]; ``scheduler``: its
    noise schedule, which says what the UNet predicts.

    A share ``caption_dropout`` of the captions is left out (classifier-free guidance). Checkpoints
    hold the LoRA layers only.
    """

    def __init__(
        self,
        pipe,
        parameters,
        encode,
        scheduler,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        warmup: int = 0,
        min_snr_gamma: float | None = None,
        caption_dropout: float = 0.1,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters(
            "learning_rate", "weight_decay", "warmup", "min_snr_gamma", "caption_dropout", "seed"
        )
        self.lora = torch.nn.ParameterList(parameters)
        self._frozen = {"pipe": pipe}  # not a sub-module: neither saved nor averaged
        self.encode, self.scheduler = encode, scheduler

    def on_fit_start(self):
        self._frozen["pipe"].to(self.device)

    def training_step(self, batch, batch_idx):
        images, captions = batch
        pipe, micro = self._frozen["pipe"], batch_idx % self.trainer.accumulate_grad_batches
        rng = np.random.default_rng([self.hparams.seed, self.global_step, micro, self.global_rank])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        captions = [
            "" if rng.random() < self.hparams.caption_dropout else caption for caption in captions
        ]
        with torch.no_grad():
            latents = (
                pipe.vae.encode(images).latent_dist.sample(generator).float()
                * pipe.vae.config.scaling_factor
            )
            states = self.encode(captions)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        t = torch.randint(
            0, self.scheduler.config.num_train_timesteps, (len(latents),), generator=generator
        )
        noisy, kind = (
            self.scheduler.add_noise(latents, noise, t.to(latents.device)),
            self.scheduler.config.prediction_type,
        )
        target = self.scheduler.get_velocity(latents, noise, t) if kind == "v_prediction" else noise
        prediction = pipe.unet(noisy, t.to(latents.device), states).sample
        a = self.scheduler.alphas_cumprod[t.cpu()].double()
        weights = loss_weights(a / (1 - a), kind, self.hparams.min_snr_gamma).to(latents)
        loss = (
            F.mse_loss(prediction.float(), target, reduction="none").mean((1, 2, 3)) * weights
        ).mean()
        self.log("adaptation/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        settings = {"betas": (0.9, 0.999), "weight_decay": self.hparams.weight_decay}
        optimizer = torch.optim.AdamW(
            self.lora.parameters(), self.hparams.learning_rate, **settings
        )
        warm = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, self.hparams.warmup))
        )
        return [optimizer], [{"scheduler": warm, "interval": "step"}]


class EachSteps(pl.Callback):
    """Calls ``act(step)`` before the first step, each ``every`` steps and at the last one; in
    the first process alone."""

    def __init__(self, act, every: int):
        self.act, self.every = act, every

    def on_train_start(self, trainer, module):
        if trainer.global_step == 0 and trainer.is_global_zero:
            self.act(0)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        step, whole = trainer.global_step, (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if (
            trainer.is_global_zero
            and whole
            and (step % self.every == 0 or step == trainer.max_steps)
        ):
            self.act(step)
