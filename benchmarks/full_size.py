"""Stable Diffusion at the sizes of the published models, with random weights: speed and memory do
not depend on their values.

The sizes are those of the published configurations; the number of parameters of each UNet is
checked against theirs.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dd import generators as diffusion

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}
FOUR_LEVELS = {
    "block_out_channels": (320, 640, 1280, 1280),
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
UNETS = {
    "sd15": {**FOUR_LEVELS, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": {
        **FOUR_LEVELS,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "sample_size": 128,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
MILLIONS = {"sd15": 859.5, "sd21": 865.9, "sdxl": 2567.5}  # parameters of the published UNets
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def build_unet(kind: str, dtype=torch.float32, device="cpu") -> UNet2DConditionModel:
    """The UNet of ``kind`` with random weights, in evaluation mode."""
    unet = _fill(lambda: UNet2DConditionModel(**UNETS[kind]), dtype, device)
    millions = sum(p.numel() for p in unet.parameters()) / 1e6
    if abs(millions - MILLIONS[kind]) > 0.1:
        raise AssertionError(
            f"{kind}: {millions:.1f} million parameters, the published UNet has {MILLIONS[kind]}"
        )
    return unet


def save(kind: str, folder: Path, device: str = "cpu") -> Path:
    """A checkpoint of ``kind`` in half precision, made on ``device``, to be loaded as any other;
    returns its folder."""
    words = diffusion.train_tokenizer(
        ["a photo of a cat and a dog, a person on a sofa"] * 4, 60, folder / "tokenizer"
    )
    ids = {
        "vocab_size": len(words),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    half = torch.float16
    parts = {
        "unet": build_unet(kind, half, device),
        "tokenizer": words,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "vae": _fill(
            lambda: AutoencoderKL(**VAE, sample_size=UNETS[kind]["sample_size"] * 8), half, device
        ),
    }
    if kind == "sdxl":
        first = CLIPTextConfig(**CLIP_L, **ids, hidden_act="quick_gelu")
        second = CLIPTextConfig(**CLIP_G, **ids, hidden_act="gelu", projection_dim=1280)
        encoders = {
            "text_encoder": _fill(lambda: CLIPTextModel(first), half, device),
            "tokenizer_2": words,
        }
        encoders["text_encoder_2"] = _fill(
            lambda: CLIPTextModelWithProjection(second), half, device
        )
        pipe = StableDiffusionXLPipeline(**parts, **encoders, add_watermarker=False)
    else:
        sizes = {
            "sd15": {**CLIP_L, "hidden_act": "quick_gelu"},
            "sd21": {**CLIP_H, "hidden_act": "gelu"},
        }[kind]
        text = _fill(lambda: CLIPTextModel(CLIPTextConfig(**sizes, **ids)), half, device)
        pipe = StableDiffusionPipeline(
            **parts,
            text_encoder=text,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


def _fill(build, dtype, device="cpu"):
    """A module whose matrices are small random numbers; built without the slow initialisation of
    each layer."""
    with torch.device("meta"):
        module = build()
    buffers = dict(module.named_buffers())
    module = module.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)  # norms and biases
        for name, buffer in module.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffers[name].shape[-1]).expand(buffer.shape))
    return module
