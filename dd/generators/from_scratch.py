"""Builds and saves a Stable Diffusion with random weights: tokenizer, VAE, text encoder and UNet,
or Stable Diffusion 3's two text encoders and transformer."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(
    captions: Iterable[str], merges: int, folder: str | Path, max_length: int = 77
) -> CLIPTokenizer:
    """Learn a byte-pair encoding in CLIP's format (vocab.json, merges.txt) from captions and save
    it to ``folder``.

    ``merges``: number of merges. With few of them, rare words stay in several tokens, as in CLIP's
    own vocabulary.
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
        special_tokens=letters,  # fixed ids, so that ties are always broken alike
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


def _text_config(tokenizer: CLIPTokenizer, sizes: dict[str, Any]) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )


def build_text_and_unet(
    tokenizer: CLIPTokenizer, text_encoder: dict[str, Any], unet: dict[str, Any]
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """A CLIP text encoder and a conditional UNet with random weights; the settings are those of
    transformers and diffusers."""
    text = CLIPTextModel(_text_config(tokenizer, text_encoder))
    return text, UNet2DConditionModel(cross_attention_dim=text.config.hidden_size, **unet)


def build_texts_and_transformer(
    tokenizer: CLIPTokenizer,
    text_encoder: dict[str, Any],
    text_encoder_2: dict[str, Any],
    transformer: dict[str, Any],
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, SD3Transformer2DModel]:
    """Stable Diffusion 3's two CLIP text encoders and its transformer with random weights; the
    settings are those of transformers and diffusers.

    A text row is as wide as the rows of both encoders together, without T5's padding.
    """
    sizes = text_encoder, text_encoder_2
    texts = [CLIPTextModelWithProjection(_text_config(tokenizer, s)) for s in sizes]
    width, pooled = (
        sum(getattr(t.config, name) for t in texts) for name in ("hidden_size", "projection_dim")
    )
    network = SD3Transformer2DModel(
        joint_attention_dim=width,
        pooled_projection_dim=pooled,
        caption_projection_dim=(
            transformer["attention_head_dim"] * transformer["num_attention_heads"]
        ),
        **transformer,
    )
    return texts[0], texts[1], network


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


def flow_scheduler(shift: float = 1.0) -> FlowMatchEulerDiscreteScheduler:
    """Stable Diffusion 3's schedule: a straight line from the image to the noise. ``shift`` above 1
    spends more of the steps at high noise, for larger images (1 = evenly)."""
    return FlowMatchEulerDiscreteScheduler(shift=shift)


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Change the convolutions around the latent so that each channel of the latents of ``images``
    [N, 3, H, W] in [-1, 1] has mean 0 and standard deviation 1. The decoded images stay the same.

    ``scaling_factor`` is then 1 and ``shift_factor`` 0, which both Stable Diffusion (which has no
    shift) and Stable Diffusion 3 read alike.
    """
    means = [vae.encode(part).latent_dist.mean.double() for part in images.split(32)]
    latents = torch.cat(means)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    encode, decode = vae.quant_conv, vae.post_quant_conv  # 1x1
    back = decode.weight.double()  # decode changes first: its old weight takes the mean back
    decode.bias.add_((back[:, :, 0, 0] @ mean).float())
    decode.weight.copy_(back * std[None, :, None, None])
    channels = len(mean)
    encode.bias[:channels].sub_(mean.float()).div_(std.float())
    encode.weight[:channels].div_(std.float()[:, None, None, None])
    encode.bias[channels:].sub_(2 * std.float().log())  # the second half is the log variance
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


def save_pipeline(
    folder: str | Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    training_scheduler: DDPMScheduler,
) -> None:
    """Write a complete Stable Diffusion folder in float16 safetensors, with DPM-Solver++ as its
    scheduler."""
    pipe = StableDiffusionPipeline(
        **_halves(vae=vae, text_encoder=text_encoder, unet=unet),
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler.from_config(training_scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _save(pipe, folder)


def save_joint_pipeline(
    folder: str | Path,
    vae: AutoencoderKL,
    text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    transformer: SD3Transformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> None:
    """Write a complete Stable Diffusion 3 folder without T5 in float16 safetensors; both text
    encoders have the same tokenizer."""
    first, second = text_encoders
    pipe = StableDiffusion3Pipeline(
        **_halves(vae=vae, text_encoder=first, text_encoder_2=second, transformer=transformer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=scheduler,
    )
    _save(pipe, folder)


def _halves(**modules: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: half(module) for name, module in modules.items()}


def half(module: torch.nn.Module) -> torch.nn.Module:
    """A copy in float16 on the CPU, as it is saved."""
    return copy.deepcopy(module).to("cpu", torch.float16)


def _save(pipe: DiffusionPipeline, folder: str | Path) -> None:
    pipe.save_pretrained(folder, safe_serialization=True)
    for path in Path(folder).glob("*/config.json"):
        _without_origin(path)
    for name in ("tokenizer", "tokenizer_2"):
        if (tokenizer := getattr(pipe, name, None)) is not None:
            # vocab.json and merges.txt beside tokenizer.json
            tokenizer.backend_tokenizer.model.save(str(Path(folder) / name))


def save_vae(folder: str | Path, vae: AutoencoderKL) -> None:
    """Write an autoencoder in float16 safetensors."""
    half(vae).save_pretrained(folder)
    _without_origin(Path(folder) / "config.json")


def _without_origin(path: Path) -> None:
    """Remove the path a model was loaded from: it is not a property of the model."""
    settings = json.loads(path.read_text())
    if settings.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(settings, indent=2) + "\n")


def load_vae(folder: str | Path) -> AutoencoderKL:
    """A saved autoencoder, safetensors only."""
    return AutoencoderKL.from_pretrained(folder, use_safetensors=True)


def load_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """A tokenizer of :func:`train_tokenizer`."""
    return CLIPTokenizer.from_pretrained(folder)
