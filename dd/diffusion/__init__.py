"""Stable Diffusion through diffusers: load, generate with its attention observed, build, save. The only importer of
diffusers."""

import dd.diffusion.quiet  # noqa: F401 (before the others)
from dd.diffusion.adapter import WEIGHTS, add_lora, noise_schedule, save_adapter
from dd.diffusion.from_scratch import (
    build_text_and_unet,
    build_vae,
    latent_scale,
    load_vae,
    save_pipeline,
    train_tokenizer,
    training_scheduler,
)
from dd.diffusion.loading import EMBEDDED
from dd.diffusion.recorder import AttentionRecorder
from dd.diffusion.stable_diffusion import StableDiffusion

__all__ = [
    "EMBEDDED",
    "AttentionRecorder",
    "StableDiffusion",
    "WEIGHTS",
    "add_lora",
    "build_text_and_unet",
    "build_vae",
    "latent_scale",
    "load_vae",
    "noise_schedule",
    "save_adapter",
    "save_pipeline",
    "train_tokenizer",
    "training_scheduler",
]
