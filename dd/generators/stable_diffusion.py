"""The generator: prompts in, images and the heat maps of their classes out."""

import math
from contextlib import nullcontext

import numpy as np
import torch
from diffusers import DDPMScheduler

from dd.attention import maths as attention
from dd.generators import loading, memory, speed
from dd.generators.adapter import find_adapter, merge
from dd.generators.recorder import AttentionRecorder, attention_sides, choose_side
from dd.masks.threshold import flat
from dd.prompts.prompt import class_words, token_spans, word_places

SWITCH = {"on": True, "off": False, True: True, False: False}  # YAML reads a bare on as true
MOST_STEPS, MOST_POWER = 1000, 64
WORDS = ("appended", "caption")  # of the full prompt, at which its attention can be read


OPENRAIL_M = {
    "licence": "CreativeML OpenRAIL-M",
    "link": "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
}
TERMS = {  # of models named by their hub id, whatever configuration they are named in
    "CompVis/stable-diffusion-v1-4": OPENRAIL_M,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": OPENRAIL_M,
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "licence": "CreativeML OpenRAIL++-M",
        "link": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0",
    },
}


class StableDiffusion:
    """A Stable Diffusion checkpoint (1.x, 2.x, XL, or the embedded one) that makes images and the
    heat maps of their classes.

    ``model``: ``embedded``, a local folder in diffusers format, or a hub id (with ``revision``, a
    commit if ``require_revision``); safetensors only, of ``variant`` (``fp16`` where a folder holds
    nothing else). ``scheduler``: a diffusers scheduler class name, or None for the checkpoint's
    own. ``size``: side of the image in pixels, None for the checkpoint's own. ``cross_resolution``
    and ``self_resolution``: side of the attention maps that are read, None for a quarter and a half
    of the latent (SD at 512 px: 16 and 32; XL at 1024 px: 32 and 64); heat has the side of the
    latter. ``max_power``: heat is kept for the powers 0 ... max_power; ``full_prompt``: keep the
    maps of words of the full prompt too (ablations): ``appended``, the class words behind the
    caption; ``caption``, the caption's own; True, both, or the caption's own where none are
    appended. ``cross_layers`` and ``cross_heads``: the cross-attention layers (by the beginning of
    their names) and heads that are read, None for all of that resolution; ``capture_every``:
    attention is read in each so-manieth step only, from the first on. ``safety_checker``: the
    checkpoint's own, ``on`` or ``off``. ``vae_slicing`` and ``offload`` (``none`` or ``model``)
    save GPU memory; ``channels_last``, ``fused_projections`` and ``compile``
    (:mod:`dd.generators.speed`) save time and round otherwise. ``truncate``: pixels become bytes by
    cutting off what is behind the point, not by rounding. ``licence`` and ``link``: of the weights,
    for the data card. ``adapter``: a run folder of train.py or a file of LoRA weights, added
    ``adapter_weight`` times to the checkpoint's own (:mod:`dd.generators.adapter`).
    """

    def __init__(
        self,
        model: str | None = "embedded",
        revision: str | None = None,
        variant: str | None = None,
        require_revision: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
        steps: int = 25,
        guidance: float = 7.5,
        negative_prompt: str = "",
        scheduler: str | None = "DPMSolverMultistepScheduler",
        size: int | None = None,
        cross_resolution: int | None = None,
        self_resolution: int | None = None,
        max_power: int = 8,
        full_prompt: bool | str = False,
        cross_layers: list[str] | None = None,
        cross_heads: list[int] | None = None,
        capture_every: int = 1,
        safety_checker: bool | str = "off",
        vae_slicing: bool = False,
        offload: str = "none",
        channels_last: bool = False,
        fused_projections: bool = False,
        compile: bool = False,
        licence: str | None = None,
        link: str | None = None,
        adapter: str | None = None,
        adapter_weight: float = 1.0,
        truncate: bool = False,
    ):
        if adapter is None and adapter_weight != 1:
            raise ValueError(
                f"diffusion.adapter_weight={adapter_weight} has no effect without "
                "diffusion.adapter=<run or file>"
            )
        found = None if adapter is None else find_adapter(adapter)
        if safety_checker not in SWITCH:
            raise ValueError(f"diffusion.safety_checker={safety_checker!r}; allowed: on, off")
        if offload not in ("none", "model"):
            raise ValueError(f"diffusion.offload={offload!r}; allowed: none, model")
        if not 1 <= steps <= MOST_STEPS or not 0 <= max_power <= MOST_POWER:
            raise ValueError(
                f"diffusion: got steps={steps}, max_power={max_power}; expected 1 to {MOST_STEPS} "
                "steps (those of the "
                f"training) and a max_power of 0 to {MOST_POWER} (the heat of each power is kept)"
            )
        if full_prompt not in (False, True, *WORDS):
            allowed = "false, true (all words), " + ", ".join(WORDS)
            raise ValueError(f"diffusion.full_prompt={full_prompt!r}; allowed: {allowed}")
        if type(guidance) not in (int, float) or not math.isfinite(guidance):
            raise ValueError(f"diffusion.guidance={guidance!r}: expected a number, such as 7.5")
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(
                f"diffusion.size={size!r}: expected the side in pixels, a whole number: images "
                "are square"
            )
        if type(capture_every) is not int or not 1 <= capture_every <= steps:
            raise ValueError(
                f"diffusion.capture_every={capture_every!r}: expected a whole number from 1 to "
                f"steps={steps}"
            )
        checker = SWITCH[safety_checker]
        self.device, self.steps, self.guidance, self.negative_prompt = (
            device,
            steps,
            guidance,
            negative_prompt,
        )
        self.max_power, self.full_prompt, self.truncate = max_power, full_prompt, truncate
        self.cross_layers, self.cross_heads, self.capture_every = (
            cross_layers,
            cross_heads,
            capture_every,
        )
        self.terms = TERMS.get(model) or {"licence": licence, "link": link}
        self.checkpoint = loading.find(model, revision, variant, checker, require_revision)
        self.pipe = loading.load(self.checkpoint, dtype, variant, checker)
        self.pipe.set_progress_bar_config(disable=True)
        if found is not None:
            merge(self.pipe, found, adapter_weight, self.checkpoint.sha256())
        self.unet, self.vae = self.pipe.unet, self.pipe.vae
        self.tokenizers = [
            t
            for t in (self.pipe.tokenizer, getattr(self.pipe, "tokenizer_2", None))
            if t is not None
        ]
        if scheduler is not None:
            self.pipe.scheduler = loading.choose_scheduler(scheduler, self.pipe.scheduler)
        factor = self.pipe.vae_scale_factor
        self.size = size or self.unet.config.sample_size * factor
        if self.size % max(8, factor) or self.size < 0:
            raise ValueError(f"diffusion.size={size}: must be a multiple of {max(8, factor)}")
        latent = self.size // factor
        sides = attention_sides(self.unet, latent)
        self.cross_resolution = choose_side("cross", cross_resolution, sides["cross"], latent)
        self.self_resolution = choose_side("self", self_resolution, sides["self"], latent)
        self.settings = {
            "model": model,
            "revision": self.checkpoint.commit or revision,
            "dtype": dtype,
            "steps": steps,
            "guidance": guidance,
            "negative_prompt": negative_prompt,
            "scheduler": scheduler,
            "size": size,
            "cross_resolution": self.cross_resolution,
            "self_resolution": self.self_resolution,
            "max_power": max_power,
            "full_prompt": full_prompt,
            "heat_dtype": "float32",
        }
        # Younger settings are named only where they change something: sets made before they existed
        # can be gone on with.
        self.settings |= {"safety_checker": "on"} if checker else {}
        self.settings |= {"vae_slicing": True} if vae_slicing else {}
        faster = {
            "channels_last": channels_last,
            "fused_projections": fused_projections,
            "compile": compile,
        }
        self.settings |= {name: True for name, wanted in faster.items() if wanted}
        self.settings |= {"cross_layers": cross_layers} if cross_layers is not None else {}
        self.settings |= {"cross_heads": cross_heads} if cross_heads is not None else {}
        self.settings |= {"capture_every": capture_every} if capture_every > 1 else {}
        self.settings |= {"truncate": True} if truncate else {}
        if found is not None:
            self.settings |= {
                "adapter_sha256": found.sha256(),
                "adapter_weight": float(adapter_weight),
            }
        if vae_slicing:
            self.vae.enable_slicing()
        if offload == "model":
            self.pipe.enable_model_cpu_offload(device=device)
        else:
            self.pipe.to(device)
        if channels_last:
            speed.channels_last(self.pipe)
        if fused_projections:
            speed.fuse_projections(self.pipe)
        if compile:
            speed.compile_blocks(self.pipe)

    def identity(self) -> dict:
        """What decides a pixel or a heat value, for run.json: the settings, the weights' hash,
        device type, threads."""
        device = {"device": torch.device(self.device).type, "threads": torch.get_num_threads()}
        scheduler = loading.plain(self.pipe.scheduler.config)
        return {
            **self.settings,
            "scheduler_config": scheduler,
            "weights_sha256": self.checkpoint.sha256(),
            **device,
        }

    # -------------------------------------------------------------------------------------- prompts

    @property
    def token_limit(self) -> int:
        """Tokens that a prompt may have, special ones included."""
        return min(t.model_max_length for t in self.tokenizers)

    def token_count(self, text: str) -> int:
        """Tokens of a prompt, special ones included, nothing cut off."""
        return max(len(t(text).input_ids) for t in self.tokenizers)

    def _offsets(self, text: str):
        """Character span of each token; ValueError if two tokenizers differ, since their states
        are joined by position."""
        limit = {"truncation": True, "max_length": self.token_limit}
        each = [
            t(text, return_offsets_mapping=True, **limit).offset_mapping for t in self.tokenizers
        ]
        if any(offsets != each[0] for offsets in each):
            raise ValueError(
                f"the two tokenizers of this model split {text!r} differently: no token is one "
                "word's alone"
            )
        return each[0]

    def spans(self, sample) -> dict[str, list[list[int]]]:
        """Token positions of each class of a sample by source (``dd.masks.threshold.SOURCES``),
        those of the full prompt as far as they are captured; those of all its words where a class
        is appended more than once.

        ValueError for a class word that is missing or cut off by the token limit.
        """
        words = class_words(sample.class_prompt, sample.classes)
        offsets = self._offsets(sample.class_prompt)
        spans = {"class_prompt": token_spans(sample.class_prompt, words, offsets)}
        if self.full_prompt:
            places = word_places(sample.prompt, sample.class_prompt)
            offsets = self._offsets(sample.prompt)
            for where in places if self.full_prompt is True else [self.full_prompt]:
                if where not in places:
                    raise ValueError(
                        f"no class words are appended to {sample.prompt!r}: prompts.append=true "
                        "appends them, diffusion.full_prompt=caption reads the caption's own"
                    )
                read = words if where == "appended" else sample.classes
                try:
                    found = token_spans(sample.prompt, read, offsets, *places[where])
                except ValueError as error:
                    raise ValueError(f"full_prompt_{where}: {error}") from None
                spans[f"full_prompt_{where}"] = found
        return spans

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States [B, T, C] of the text encoders as the pipeline computes them for its own
        prompts (XL: those of both, joined along C), and XL's pooled state [B, D]."""
        found = self.pipe.encode_prompt(
            list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return found[0], found[2] if len(found) > 2 else None

    # ------------------------------------------------------------------------------------ attention

    def _recorder(self, samples, every=1):
        states, _ = self.encode([s.class_prompt for s in samples])
        return AttentionRecorder(
            self.unet,
            states,
            self.cross_resolution,
            self.self_resolution,
            bool(self.full_prompt),
            self.cross_layers,
            self.cross_heads,
            every,
        )

    def _heat(self, recorder, spans) -> list[dict[str, np.ndarray]]:
        recorder.check()
        cross, self_attention = recorder.cross, recorder.self_attention

        def maps(i, source, positions):
            cross_NT = cross["class_prompt" if source == "class_prompt" else "full_prompt"][i]
            return attention.heat_maps(
                cross_NT, self_attention[i], positions, self.max_power
            ).numpy()

        return [{s: maps(i, s, at) for s, at in each.items()} for i, each in enumerate(spans)]

    # ----------------------------------------------------------------------------------- generation

    def largest_batch(self, sample) -> int:
        """The largest batch that fits into memory, attention recorded
        (:func:`dd.generators.memory.largest_batch`); measured on copies of ``sample`` with as
        few steps as hold everything that a whole generation holds."""
        budget, steps = memory.budget_bytes(self.device), self.steps

        def peak(batch):
            memory.reset_peak(self.device)
            self.generate([sample] * batch)
            return memory.peak_bytes(self.device)

        self.steps = min(steps, self.capture_every + 1)
        try:
            memory.reset_peak(self.device)
            return memory.largest_batch(peak, memory.peak_bytes(self.device), budget)
        finally:
            self.steps = steps

    def generate(self, samples, capture: bool = True):
        """(images uint8 [B, size, size, 3]; per sample, heat float64 [K, P, r, r] by source
        (``dd.masks.threshold.SOURCES``), nothing without ``capture``; per sample, what is wrong
        with its image or None, see :func:`faults`). Noise comes from each sample's own seed."""
        spans = [self.spans(s) for s in samples]
        recorder = self._recorder(samples, self.capture_every) if capture else nullcontext()

        def after_step(pipe, step, timestep, tensors):
            if capture and step == 0:
                recorder.check()
            return tensors

        with recorder:
            made = self.pipe(
                prompt=[s.prompt for s in samples],
                # None and not "": XL's own setting for an empty prompt is zeros, not the states of
                # an empty text
                negative_prompt=[self.negative_prompt] * len(samples)
                if self.negative_prompt
                else None,
                generator=[torch.Generator("cpu").manual_seed(s.seed) for s in samples],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                height=self.size,
                width=self.size,
                output_type="pt",
                callback_on_step_end=after_step,
            )
        heat = self._heat(recorder, spans) if capture else []
        pixels, finite, constant = eight_bit(made.images, self.truncate)
        return (
            pixels,
            heat,
            faults(finite, constant, heat, getattr(made, "nsfw_content_detected", None)),
        )

    @torch.no_grad()
    def read_real(
        self, images: np.ndarray, samples, timesteps: list[int], seed: int = 0
    ) -> list[dict[str, np.ndarray]]:
        """Heat of *real* images uint8 [B, size, size, 3]: noised to each timestep (0 ... 999),
        shown to the UNet with their prompt, attention read as in generation. Compared with exact
        masks it measures a generator's attention."""
        spans = [self.spans(s) for s in samples]
        latents = self._latents(torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device))
        noiser = DDPMScheduler.from_config(self.pipe.scheduler.config)
        states, pooled = self.encode([s.prompt for s in samples])
        added = None
        if pooled is not None:  # XL is told the size of the picture and where it was cropped
            times = torch.tensor(
                [[self.size, self.size, 0, 0, self.size, self.size]] * len(samples)
            ).to(pooled)
            added = {"text_embeds": pooled, "time_ids": times}
        generator = torch.Generator().manual_seed(seed)
        with self._recorder(samples) as recorder:
            for t in timesteps:
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                step = torch.full((len(samples),), t, device=self.device)
                self.unet(
                    noiser.add_noise(latents, noise, step), step, states, added_cond_kwargs=added
                )
        return self._heat(recorder, spans)

    def _latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scaled latents of images uint8 [B, 3, H, W]; in float32 where the VAE overflows in
        half precision."""
        half = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if half:
            self.vae.to(torch.float32)
        try:
            latents = (
                self.vae.encode(pixels.to(self.vae.dtype) / 127.5 - 1).latent_dist.mean
                * self.vae.config.scaling_factor
            )
        finally:
            if half:
                self.vae.to(torch.float16)
        return latents.to(self.unet.dtype)


def eight_bit(images_BCHW: torch.Tensor, truncate: bool = False):
    """(uint8 [B, H, W, C] of images in [0, 1], rounded or with ``truncate`` cut off; whether each
    is finite [bool]; whether each is of one colour [bool]); on the images' device, which then sends
    a byte for each value."""
    finite = images_BCHW.isfinite().flatten(1).all(1)
    values = images_BCHW.float().nan_to_num(0, 1, 0) * 255
    pixels = (values if truncate else values.round()).to(torch.uint8)
    constant = (pixels == pixels[:, :, :1, :1]).flatten(1).all(1)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), finite.tolist(), constant.tolist()


def faults(finite: list[bool], constant: list[bool], heat, flagged) -> list[str | None]:
    """What is wrong with each image (or None): ``safety checker`` blacked it out, ``not finite``
    (a pixel or a heat value, overflow in half precision), ``constant`` (one colour), ``empty
    mask`` (the maps of all its classes are flat at a power and source, whose mask would be
    background)."""
    found = []
    for i, whole in enumerate(finite):
        if flagged is not None and flagged[i]:
            found.append("safety checker")
        elif not whole or not all(np.isfinite(m).all() for m in (heat[i].values() if heat else ())):
            found.append("not finite")
        else:
            empty = heat and any(flat(torch.from_numpy(m)).all(0).any() for m in heat[i].values())
            found.append("constant" if constant[i] else "empty mask" if empty else None)
    return found
