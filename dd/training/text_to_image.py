"""Trains a small Stable Diffusion from scratch on image-caption pairs; no mask is ever read here.

LightningModules, one after the other: :class:`Autoencoder` (the VAE), then on the frozen VAE's
latents :class:`TextToImage` (UNet and CLIP text encoder), or :class:`JointTextToImage` (Stable
Diffusion 3's transformer and two CLIP text encoders). :mod:`dd.generators` builds and saves the
models.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch.utils.data import Dataset

from dd.embedded.scenes import scene
from dd.store.settings import Natural, Settings, Share
from dd.training.denoising import noised
from dd.training.loaders import Draws
from dd.training.schedules import stepwise, warmup_cosine


class CaptionedScenes(Dataset):
    """Scenes of the generator's own split as (image float [3, H, W] in [-1, 1], caption, class
    words). ``first`` shifts the window."""

    def __init__(self, length: int, seed: int = 0, first: int = 0) -> None:
        self.length, self.seed, self.first = length, seed, first

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str, str]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        s = scene("shapes", "generator", self.first + index, self.seed)
        image = torch.from_numpy(s.image).permute(2, 0, 1).float() / 127.5 - 1
        return image, s.caption, " ".join(s.classes)


class CaptionedData(Draws):
    """Batches of :class:`CaptionedScenes` from scene ``first`` on, each scene once."""

    def __init__(
        self, batch_size: int, num_workers: int = 0, seed: int = 0, first: int = 0
    ) -> None:
        scenes = partial(CaptionedScenes, seed=seed, first=first)
        super().__init__(scenes, batch_size, num_workers, seed)


def edges(images: torch.Tensor) -> torch.Tensor:
    """Differences of neighbouring pixels of images [B, C, H, W], to the right and below, as one row
    of numbers."""
    right, below = images.diff(dim=3), images.diff(dim=2)
    return torch.cat([right.flatten(), below.flatten()])


class Autoencoder(pl.LightningModule):
    """Trains an AutoencoderKL with L1 + L2 reconstruction and a small Kullback-Leibler term.

    ``edge_weight``: of the L1 error of differences between neighbouring pixels, which preserves
    details of one or two pixels. ``crop``: side in pixels of the random part of each image to train
    on (None = the whole). The VAE does not depend on position, and a part takes less time.
    """

    def __init__(
        self,
        vae: torch.nn.Module,
        learning_rate: float = 2e-3,
        kl_weight: float = 1e-4,
        warmup: int = 50,
        edge_weight: float = 0.0,
        crop: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["vae"])
        self.vae = vae

    def _cropped(self, images: torch.Tensor) -> torch.Tensor:
        side = self.hparams.crop
        if side is None:
            return images
        rows, columns = images.shape[2] - side + 1, images.shape[3] - side + 1
        tops, lefts = torch.randint(rows, (len(images),)), torch.randint(columns, (len(images),))
        parts = [
            image[:, y : y + side, x : x + side]
            for image, y, x in zip(images, tops, lefts, strict=True)
        ]
        return torch.stack(parts)

    def training_step(self, batch: Sequence[Any], _: int) -> torch.Tensor:
        image = self._cropped(batch[0])
        posterior = self.vae.encode(image).latent_dist
        recon = self.vae.decode(posterior.sample()).sample
        loss = F.l1_loss(recon, image) + F.mse_loss(recon, image)
        if self.hparams.edge_weight:
            loss = loss + self.hparams.edge_weight * F.l1_loss(edges(recon), edges(image))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        self.log_dict({"vae/loss": loss, "vae/kl": kl}, prog_bar=True)
        return loss + self.hparams.kl_weight * kl

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        optimizer = torch.optim.AdamW(
            self.vae.parameters(), self.hparams.learning_rate, weight_decay=0.0
        )
        return stepwise(optimizer, warmup_cosine(self.hparams.warmup, self.trainer.max_steps))


def prompt_variant(
    caption: str, class_words: str, rng: np.random.Generator, drop: float = 0.1
) -> str:
    """One of the forms that a prompt has at generation: the caption, the caption with the class
    words appended, the class words alone (so that the class prompt is in distribution), or nothing
    (classifier-free guidance)."""
    form = rng.random()
    if form < drop:
        return ""
    form = (form - drop) / (1 - drop)
    return caption if form < 0.35 else f"{caption}; {class_words}" if form < 0.7 else class_words


class TextToImageSettings(Settings):
    """``caption_dropout``: share of the prompts that are left out (classifier-free guidance).
    ``hide_after_end``: share of the samples in which the text's hidden states from the end token on
    are set to zero. A causal text encoder writes the whole sentence into the end and padding
    positions too, and a small UNet then reads the objects there instead of at their own words.
    Hiding these positions, in training only, makes it use the words. ``floor``: share of the
    learning rate at which a half-cosine decay ends, after ``warmup`` steps of rising from 0 (1 = a
    constant rate). ``noise_mean``: draw the amount of noise from a logit-normal distribution with
    this mean and deviation 1 (Esser et al. 2024, arXiv 2403.03206, section 3.1); None: uniform
    timesteps for a UNet, mean 0 for an MM-DiT. At high noise the text decides which object it is;
    at low noise the image shows it.
    """

    noun: ClassVar[str] = "text_to_image"
    learning_rate: Annotated[float, Ge(0)] = 8e-4
    warmup: Natural = 150
    caption_dropout: Share = 0.1
    hide_after_end: Share = 0.8
    floor: Share = 0.05
    noise_mean: float | None = None
    seed: int = 0


class Denoising(pl.LightningModule):
    """What both denoising trainings share: prompts in the forms of generation, and AdamW.
    ``settings``: :class:`TextToImageSettings`.

    Batches are (latents [B, C, h, w], captions, class words).
    """

    Settings = TextToImageSettings

    def __init__(self, tokenizer: Any, scheduler: Any, **settings: Any) -> None:
        super().__init__()
        self.settings = TextToImageSettings(**settings)
        self.save_hyperparameters(self.settings.model_dump())
        self.tokenizer, self.scheduler = tokenizer, scheduler

    @abstractmethod
    def loss(
        self,
        latents: torch.Tensor,
        prompts: list[str],
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Error of the network on clean ``latents``; ``rng`` decides which text is hidden,
        ``generator`` the noise and its amount."""

    def noise_shares(self, number: int, generator: torch.Generator) -> torch.Tensor:
        """Amounts of noise in (0, 1), logit-normal."""
        drawn = torch.randn(number, generator=generator) + (self.settings.noise_mean or 0.0)
        return drawn.sigmoid()

    def tokens(
        self, prompts: list[str], rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids [B, T], T the tokenizer's limit; whether a text row is hidden [B, T]; whether any
        row of a sample is hidden [B], never for "")."""
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(self.device)
        after_word = (ids == self.tokenizer.eos_token_id).cumsum(1) > 0
        share = self.settings.hide_after_end
        hide = torch.tensor([bool(p) and rng.random() < share for p in prompts]).to(ids.device)
        return ids, after_word & hide[:, None], hide

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> torch.Tensor:
        latents, captions, class_words = batch
        rng = np.random.default_rng([self.settings.seed, self.global_step, self.global_rank])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        prompts = [
            prompt_variant(c, w, rng, self.settings.caption_dropout)
            for c, w in zip(captions, class_words, strict=True)
        ]
        loss = self.loss(latents, prompts, rng, generator)
        self.log("text_to_image/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        given = self.settings
        optimizer = torch.optim.AdamW(
            self.parameters(), given.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        factor = warmup_cosine(given.warmup, self.trainer.max_steps, given.floor)
        return stepwise(optimizer, factor)


class TextToImage(Denoising):
    """Denoising training of ``unet`` and ``text_encoder`` on latents.

    The loss is the squared error of the scheduler's own target (epsilon or v).
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        text_encoder: torch.nn.Module,
        tokenizer: Any,
        scheduler: Any,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, scheduler, **settings)
        self.unet, self.text_encoder = unet, text_encoder

    def encode_text(self, prompts: list[str], rng: np.random.Generator) -> torch.Tensor:
        """Hidden states [B, T, D] (T: the tokenizer's limit), zeroed from the end token on in a
        share of the samples (never for "")."""
        ids, hidden, _ = self.tokens(prompts, rng)
        return self.text_encoder(ids)[0].masked_fill(hidden[..., None], 0.0)

    def loss(
        self,
        latents: torch.Tensor,
        prompts: list[str],
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> torch.Tensor:
        t = None
        if self.settings.noise_mean is not None:
            steps = self.scheduler.config.num_train_timesteps
            t = (self.noise_shares(len(latents), generator) * steps).long()
        noisy, t, target = noised(self.scheduler, latents, generator, t)
        prediction = self.unet(noisy, t, self.encode_text(prompts, rng)).sample
        return F.mse_loss(prediction.float(), target)


class JointTextToImage(Denoising):
    """Flow-matching training of Stable Diffusion 3's ``transformer`` and its two CLIP text encoders
    on latents: the squared error of the velocity, at noise shares of a logit-normal distribution
    (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    The text is laid out as the pipeline does without T5: side by side the rows of both encoders'
    last layer but one, then ``zero_rows`` rows of zeros (the pipeline's ``max_sequence_length`` at
    drawing), and separately both pooled projections. The hidden part of a sample's text (see
    :class:`TextToImageSettings`) is the rows from the end token on and the pooled projections,
    which also contain the whole sentence.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        text_encoder: torch.nn.Module,
        text_encoder_2: torch.nn.Module,
        tokenizer: Any,
        scheduler: Any,
        zero_rows: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, scheduler, **settings)
        self.transformer, self.zero_rows = transformer, zero_rows
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2

    def encode_text(
        self, prompts: list[str], rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows [B, T + ``zero_rows``, D], pooled projections [B, P])."""
        ids, hidden, hide = self.tokens(prompts, rng)
        found = [
            encoder(ids, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        rows = torch.cat([f.hidden_states[-2] for f in found], -1)
        rows = F.pad(rows.masked_fill(hidden[..., None], 0.0), (0, 0, 0, self.zero_rows))
        pooled = torch.cat([f.text_embeds for f in found], -1)
        return rows, pooled.masked_fill(hide[:, None], 0.0)

    def loss(
        self,
        latents: torch.Tensor,
        prompts: list[str],
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> torch.Tensor:
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        share = self.noise_shares(len(latents), generator).to(latents)
        noisy = torch.lerp(latents, noise, share[:, None, None, None])
        rows, pooled = self.encode_text(prompts, rng)
        timestep = share * self.scheduler.config.num_train_timesteps
        velocity = self.transformer(noisy, rows, pooled, timestep).sample
        return F.mse_loss(velocity.float(), noise - latents)
