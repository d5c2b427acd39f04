"""A Stable Diffusion built from scratch: tokenizer, VAE, text encoder, UNet with random weights,
and the folder they are saved to."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(
    captions: Iterable[str], merges: int, folder: str | Path, max_length: int = 77
) -> CLIPTokenizer:
    """Learn a byte-pair encoding in CLIP's format (vocab.json, merges.txt) from captions and save
    it to ``folder``.

    ``merges``: number of merges; few of them leave rare words in several tokens, as in CLIP's own
    vocabulary.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = len(alphabet) * 2  # every byte, inside a word and at its end
    letters = [*alphabet, *(c + "</w>" for c in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=base + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=letters,  # fixed ids, so that ties are broken alike every time
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]["merges"][:merges]
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned]
    words = [*letters, *("".join(p) for p in pairs), START, END]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "vocab.json", folder / "merges.txt"
    files[0].write_text(json.dumps({w: i for i, w in enumerate(words)}, ensure_ascii=False))
    files[1].write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    tokenizer = CLIPTokenizer(*map(str, files), model_max_length=max_length, pad_token=END)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_vae(sample_size: int, **config: Any) -> AutoencoderKL:
    """An AutoencoderKL with random weights; ``config`` as in diffusers."""
    levels = len(config["block_out_channels"])
    return AutoencoderKL(
        sample_size=sample_size,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **config,
    )


def build_text_and_unet(
    tokenizer: CLIPTokenizer, text_encoder: dict[str, Any], unet: dict[str, Any]
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """A CLIP text encoder and a conditional UNet with random weights; the settings are theirs in
    transformers/diffusers."""
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **text_encoder,
        )
    )
    return text, UNet2DConditionModel(cross_attention_dim=text.config.hidden_size, **unet)


def training_scheduler(prediction_type: str) -> DDPMScheduler:
    """Stable Diffusion's noise schedule (scaled linear, 1,000 steps)."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        steps_offset=1,
    )


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """1 / standard deviation of the latents of ``images`` [N, 3, H, W] in [-1, 1]: the VAE's
    ``scaling_factor``."""
    return float(1 / vae.encode(images).latent_dist.mean.float().std())


def save_pipeline(
    folder: str | Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    training_scheduler: DDPMScheduler,
) -> None:
    """Write a complete Stable Diffusion folder in float16 safetensors, sampled with
    DPM-Solver++."""
    modules = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    half = {name: copy.deepcopy(m).to("cpu", torch.float16) for name, m in modules.items()}
    pipe = StableDiffusionPipeline(
        **half,
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler.from_config(training_scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    for path in Path(folder).glob("*/config.json"):
        settings = json.loads(path.read_text())  # where it was loaded from is no property of it
        if settings.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(settings, indent=2) + "\n")
    # vocab.json and merges.txt beside tokenizer.json
    tokenizer.backend_tokenizer.model.save(str(Path(folder) / "tokenizer"))


def load_vae(folder: str | Path) -> AutoencoderKL:
    """A saved autoencoder, safetensors only."""
    return AutoencoderKL.from_pretrained(folder, use_safetensors=True)
