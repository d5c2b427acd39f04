"""Text-to-image models through diffusers: load, draw while observing attention, build, save.
The only room that imports diffusers."""

import dd.generators.quiet  # noqa: F401 (before the others)
from dd.generators.adapter import WEIGHTS, Trainable
from dd.generators.from_scratch import (
    build_text_and_unet,
    build_texts_and_transformer,
    build_vae,
    flow_scheduler,
    load_tokenizer,
    load_vae,
    save_joint_pipeline,
    save_pipeline,
    save_vae,
    standardise_latents,
    train_tokenizer,
    training_scheduler,
)
from dd.generators.loading import EMBEDDED
from dd.generators.text_to_image import TextToImage

__all__ = [
    "EMBEDDED",
    "TextToImage",
    "Trainable",
    "WEIGHTS",
    "build_text_and_unet",
    "build_texts_and_transformer",
    "build_vae",
    "flow_scheduler",
    "load_tokenizer",
    "load_vae",
    "save_joint_pipeline",
    "save_pipeline",
    "save_vae",
    "standardise_latents",
    "train_tokenizer",
    "training_scheduler",
]
