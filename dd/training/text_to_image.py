"""Training a small Stable Diffusion from scratch on image-caption pairs: no mask is ever read here.

Two LightningModules, one after the other: :class:`Autoencoder` (the VAE), then :class:`TextToImage`
(UNet and CLIP text encoder on the frozen VAE's latents). The models themselves are built and saved
by :mod:`dd.generators`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch.utils.data import Dataset

from dd.embedded.shapes import scene
from dd.store.settings import Natural, Settings, Share
from dd.training.denoising import noised
from dd.training.loaders import Draws
from dd.training.schedules import stepwise, warmup_cosine


class CaptionedScenes(Dataset):
    """Scenes of the generator's own split as (image float [3, H, W] in [-1, 1], caption, class
    words). ``first`` moves the window."""

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


class Autoencoder(pl.LightningModule):
    """Trains an AutoencoderKL with L1 + L2 reconstruction and a small Kullback-Leibler term."""

    def __init__(
        self,
        vae: torch.nn.Module,
        learning_rate: float = 2e-3,
        kl_weight: float = 1e-4,
        warmup: int = 50,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["vae"])
        self.vae = vae

    def training_step(self, batch: Sequence[Any], _: int) -> torch.Tensor:
        image = batch[0]
        posterior = self.vae.encode(image).latent_dist
        recon = self.vae.decode(posterior.sample()).sample
        loss = F.l1_loss(recon, image) + F.mse_loss(recon, image)
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
    """One of the forms a prompt takes at generation: the caption, the caption with the class
    words appended, the class words alone (so that the class prompt is in distribution), or
    nothing (classifier-free guidance)."""
    form = rng.random()
    if form < drop:
        return ""
    form = (form - drop) / (1 - drop)
    return caption if form < 0.35 else f"{caption}; {class_words}" if form < 0.7 else class_words


class TextToImageSettings(Settings):
    """``caption_dropout``: share of the prompts that are left out (classifier-free guidance).
    ``hide_after_end``: share of the samples in which the text's hidden states from the end token on
    are set to zero. A causal text encoder writes the whole sentence into the end and padding
    positions too, and a small UNet then reads the objects from there instead of from their own
    words; hiding them teaches the words. Training only.
    """

    noun: ClassVar[str] = "text_to_image"
    learning_rate: Annotated[float, Ge(0)] = 8e-4
    warmup: Natural = 150
    caption_dropout: Share = 0.1
    hide_after_end: Share = 0.8
    seed: int = 0


class TextToImage(pl.LightningModule):
    """Denoising training of ``unet`` and ``text_encoder`` on the latents of a frozen ``vae``.
    ``settings``: :class:`TextToImageSettings`.

    The loss is the squared error of the scheduler's own target (epsilon or v), all timesteps alike.
    """

    Settings = TextToImageSettings

    def __init__(
        self,
        unet: torch.nn.Module,
        text_encoder: torch.nn.Module,
        vae: torch.nn.Module,
        tokenizer: Any,
        scheduler: Any,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings = TextToImageSettings(**settings)
        self.save_hyperparameters(self.settings.model_dump())
        self.unet, self.text_encoder = unet, text_encoder
        # not a sub-module: neither saved nor averaged
        self._frozen = {"vae": vae.requires_grad_(False).eval()}
        self.tokenizer, self.scheduler = tokenizer, scheduler

    def encode_text(self, prompts: list[str], rng: np.random.Generator) -> torch.Tensor:
        """Hidden states [B, T, D] (T: the tokenizer's limit), hidden from the end token on in a
        share of the samples (never for "")."""
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(self.device)
        states = self.text_encoder(ids)[0]
        after_word = (ids == self.tokenizer.eos_token_id).cumsum(1) > 0
        share = self.settings.hide_after_end
        hide = torch.tensor([bool(p) and rng.random() < share for p in prompts])
        return states.masked_fill((after_word & hide[:, None].to(ids.device))[..., None], 0.0)

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> torch.Tensor:
        images, captions, class_words = batch
        rng = np.random.default_rng([self.settings.seed, self.global_step, self.global_rank])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        prompts = [
            prompt_variant(c, w, rng, self.settings.caption_dropout)
            for c, w in zip(captions, class_words, strict=True)
        ]
        vae = self._frozen["vae"].to(self.device)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean.float() * vae.config.scaling_factor
        noisy, t, target = noised(self.scheduler, latents, generator)
        prediction = self.unet(noisy, t, self.encode_text(prompts, rng)).sample
        loss = F.mse_loss(prediction.float(), target)
        self.log("text_to_image/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, self.settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        return stepwise(optimizer, warmup_cosine(self.settings.warmup, self.trainer.max_steps))
