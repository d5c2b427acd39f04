"""Training a small Stable Diffusion from scratch on image-caption pairs: no mask is ever read here.

Two LightningModules, one after the other: :class:`Autoencoder` (the VAE), then :class:`TextToImage`
(UNet and CLIP text encoder on the frozen VAE's latents). The models themselves are built and saved
by :mod:`dd.generators`.
"""

import math

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from dd.embedded.shapes import scene
from dd.training.loaders import ResumableLoader


class CaptionedScenes(Dataset):
    """Scenes of the generator's own split as (image float [3, H, W] in [-1, 1], caption, class
    words).

    ``first`` moves the window.
    """

    def __init__(self, length: int, domain: str = "shapes", seed: int = 0, first: int = 0):
        self.length, self.domain, self.seed, self.first = length, domain, seed, first

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        s = scene(self.domain, "generator", self.first + index, self.seed)
        return (
            torch.from_numpy(s.image).permute(2, 0, 1).float() / 127.5 - 1,
            s.caption,
            " ".join(s.classes),
        )


class CaptionedData(pl.LightningDataModule):
    """Batches of :class:`CaptionedScenes` from scene ``first`` on, each scene once; a resumed
    training takes the next ones."""

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0, first: int = 0):
        super().__init__()
        self.batch_size, self.num_workers, self.seed, self.first = (
            batch_size,
            num_workers,
            seed,
            first,
        )

    def train_dataloader(self):
        trainer = self.trainer
        number = trainer.max_steps * trainer.accumulate_grad_batches * self.batch_size
        scenes = CaptionedScenes(number, seed=self.seed, first=self.first)
        return ResumableLoader(scenes, trainer, self.batch_size, self.num_workers)


def _warmup_cosine(optimizer, warmup: int, total: int, floor: float = 0.05):
    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}


class Autoencoder(pl.LightningModule):
    """Trains an AutoencoderKL with L1 + L2 reconstruction and a small Kullback-Leibler term."""

    def __init__(self, vae, learning_rate: float = 2e-3, kl_weight: float = 1e-4, warmup: int = 50):
        super().__init__()
        self.save_hyperparameters(ignore=["vae"])
        self.vae = vae

    def training_step(self, batch, _):
        image = batch[0]
        posterior = self.vae.encode(image).latent_dist
        recon = self.vae.decode(posterior.sample()).sample
        loss = F.l1_loss(recon, image) + F.mse_loss(recon, image)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        self.log_dict({"vae/loss": loss, "vae/kl": kl}, prog_bar=True)
        return loss + self.hparams.kl_weight * kl

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            self.vae.parameters(), self.hparams.learning_rate, weight_decay=0.0
        )
        return [optimizer], [_warmup_cosine(optimizer, self.hparams.warmup, self.trainer.max_steps)]


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


class TextToImage(pl.LightningModule):
    """Denoising training of ``unet`` and ``text_encoder`` on the latents of a frozen ``vae``.

    The loss is the squared error of the scheduler's own target (epsilon or v), all timesteps alike.
    ``hide_after_end``: share of the samples in which the text's hidden states from the end token on
    are set to zero. A causal text encoder writes the whole sentence into the end and padding
    positions too, and a small UNet then reads the objects from there instead of from their own
    words; hiding them teaches the words. Training only.
    """

    def __init__(
        self,
        unet,
        text_encoder,
        vae,
        tokenizer,
        scheduler,
        learning_rate: float = 8e-4,
        warmup: int = 150,
        caption_dropout: float = 0.1,
        hide_after_end: float = 0.8,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters(
            "learning_rate", "warmup", "caption_dropout", "hide_after_end", "seed"
        )
        self.unet, self.text_encoder = unet, text_encoder
        self._frozen = {
            "vae": vae.requires_grad_(False).eval()
        }  # not a sub-module: neither saved nor averaged
        self.tokenizer, self.scheduler = tokenizer, scheduler

    def encode_text(self, prompts: list[str], rng) -> torch.Tensor:
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
        hide = torch.tensor(
            [bool(p) and rng.random() < self.hparams.hide_after_end for p in prompts]
        )
        return states.masked_fill((after_word & hide[:, None].to(ids.device))[..., None], 0.0)

    def training_step(self, batch, batch_idx):
        images, captions, class_words = batch
        rng = np.random.default_rng([self.hparams.seed, self.global_step, self.global_rank])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        prompts = [
            prompt_variant(c, w, rng, self.hparams.caption_dropout)
            for c, w in zip(captions, class_words, strict=True)
        ]
        vae = self._frozen["vae"].to(self.device)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean.float() * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        t = torch.randint(
            0, self.scheduler.config.num_train_timesteps, (len(latents),), generator=generator
        )
        t = t.to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, t)
        v_prediction = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, t) if v_prediction else noise
        prediction = self.unet(noisy, t, self.encode_text(prompts, rng)).sample
        loss = F.mse_loss(prediction.float(), target)
        self.log("text_to_image/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, self.hparams.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        return [optimizer], [_warmup_cosine(optimizer, self.hparams.warmup, self.trainer.max_steps)]
