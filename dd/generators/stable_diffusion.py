"""The generator: prompts in, images and the heat maps of their classes out."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import DDPMScheduler

from dd.attention import maths as attention
from dd.generators import loading, memory, speed
from dd.generators.adapter import find_adapter, merge
from dd.generators.recorder import AttentionRecorder, Reading, attention_sides, choose_side
from dd.generators.settings import GeneratorSettings
from dd.masks.from_heat import flat
from dd.prompts.prompt import class_words, token_spans, word_places
from dd.store.samples import Sample

Terms: TypeAlias = dict[str, str | None]
OPENRAIL_M: Terms = {
    "licence": "CreativeML OpenRAIL-M",
    "link": "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
}
# of models named by their hub id, whatever configuration they are named in
TERMS: dict[str, Terms] = {
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

    An :class:`dd.generators.base.Generator`; the settings are those of
    :class:`dd.generators.settings.GeneratorSettings`.
    """

    Settings = GeneratorSettings

    def __init__(self, device: str = "cpu", **settings: Any) -> None:
        self.device, self.settings = device, GeneratorSettings(**settings)
        given = self.settings
        self.steps = given.steps
        adapter = None if given.adapter is None else find_adapter(given.adapter)
        own = {"licence": given.licence, "link": given.link}
        self.terms = TERMS.get(given.model or "", own)
        self.checkpoint = loading.find(
            given.model, given.revision, given.variant, given.checked, given.require_revision
        )
        self.pipe = loading.load(self.checkpoint, given.dtype, given.variant, given.checked)
        self.pipe.set_progress_bar_config(disable=True)
        self.adapted: dict[str, Any] = {}
        if adapter is not None:
            merge(self.pipe, adapter, given.adapter_weight, self.checkpoint.sha256())
            self.adapted["adapter_sha256"] = adapter.sha256()
            self.adapted["adapter_weight"] = given.adapter_weight
        self.unet, self.vae = self.pipe.unet, self.pipe.vae
        both = self.pipe.tokenizer, getattr(self.pipe, "tokenizer_2", None)
        self.tokenizers = [t for t in both if t is not None]
        if given.scheduler is not None:
            self.pipe.scheduler = loading.choose_scheduler(given.scheduler, self.pipe.scheduler)
        self._choose_sides()
        self._place()

    def _choose_sides(self) -> None:
        """Of the image and of the attention maps."""
        given, factor = self.settings, self.pipe.vae_scale_factor
        self.size = given.size or self.unet.config.sample_size * factor
        if self.size % max(8, factor):
            raise ValueError(f"diffusion.size={given.size}: must be a multiple of {max(8, factor)}")
        latent = self.size // factor
        sides = attention_sides(self.unet, latent)
        self.cross_resolution = choose_side("cross", given.cross_resolution, sides["cross"], latent)
        self.self_resolution = choose_side("self", given.self_resolution, sides["self"], latent)

    def _place(self) -> None:
        """Onto the device, with what saves memory or time."""
        given = self.settings
        if given.vae_slicing:
            self.vae.enable_slicing()
        if given.offload == "model":
            self.pipe.enable_model_cpu_offload(device=self.device)
        else:
            self.pipe.to(self.device)
        for wanted, apply in (
            (given.channels_last, speed.channels_last),
            (given.fused_projections, speed.fuse_projections),
            (given.compile, speed.compile_blocks),
        ):
            if wanted:
                apply(self.pipe)

    def identity(self) -> dict[str, Any]:
        """What decides a pixel or a heat value, for run.json: the settings, the weights' hash,
        device type, threads."""
        return {
            **self.settings.identity(),
            "revision": self.checkpoint.commit or self.settings.revision,
            "cross_resolution": self.cross_resolution,
            "self_resolution": self.self_resolution,
            "heat_dtype": "float32",
            **self.adapted,
            "scheduler_config": loading.plain(self.pipe.scheduler.config),
            "weights_sha256": self.checkpoint.sha256(),
            "device": torch.device(self.device).type,
            "threads": torch.get_num_threads(),
        }

    # -------------------------------------------------------------------------------------- prompts

    @property
    def token_limit(self) -> int:
        """Tokens that a prompt may have, special ones included."""
        return min(t.model_max_length for t in self.tokenizers)

    def token_count(self, text: str) -> int:
        """Tokens of a prompt, special ones included, nothing cut off."""
        return max(len(t(text).input_ids) for t in self.tokenizers)

    def _offsets(self, text: str) -> list[tuple[int, int]]:
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

    def spans(self, sample: Sample) -> dict[str, list[list[int]]]:
        """Token positions of each class of a sample by source (``dd.masks.from_heat.SOURCES``),
        those of the full prompt as far as they are captured; those of all its words where a class
        is appended more than once.

        ValueError for a class word that is missing or cut off by the token limit.
        """
        words = class_words(sample.class_prompt, sample.classes)
        offsets = self._offsets(sample.class_prompt)
        spans = {"class_prompt": token_spans(sample.class_prompt, words, offsets)}
        full = self.settings.full_prompt
        if full:
            places = word_places(sample.prompt, sample.class_prompt)
            offsets = self._offsets(sample.prompt)
            for where in places if full is True else [full]:
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

    def _recorder(self, samples: Sequence[Sample], every: int = 1) -> AttentionRecorder:
        given = self.settings
        states, _ = self.encode([s.class_prompt for s in samples])
        reading = Reading(bool(given.full_prompt), given.cross_layers, given.cross_heads, every)
        sides = self.cross_resolution, self.self_resolution
        return AttentionRecorder(self.unet, states, *sides, reading)

    def _heat(
        self, recorder: AttentionRecorder, spans: Iterable[Mapping[str, list[list[int]]]]
    ) -> list[dict[str, np.ndarray]]:
        recorder.check()
        cross, self_attention = recorder.cross, recorder.self_attention

        def maps(i: int, source: str, positions: list[list[int]]) -> np.ndarray:
            cross_NT = cross["class_prompt" if source == "class_prompt" else "full_prompt"][i]
            power = self.settings.max_power
            return attention.heat_maps(cross_NT, self_attention[i], positions, power).numpy()

        return [{s: maps(i, s, at) for s, at in each.items()} for i, each in enumerate(spans)]

    # ----------------------------------------------------------------------------------- generation

    def largest_batch(self, sample: Sample) -> int:
        """The largest batch that fits into memory, attention recorded
        (:func:`dd.generators.memory.largest_batch`); measured on copies of ``sample`` with as
        few steps as hold everything that a whole generation holds."""
        budget, steps = memory.budget_bytes(self.device), self.steps

        def peak(batch: int) -> int:
            memory.reset_peak(self.device)
            self.generate([sample] * batch)
            return memory.peak_bytes(self.device)

        self.steps = min(steps, self.settings.capture_every + 1)
        try:
            memory.reset_peak(self.device)
            return memory.largest_batch(peak, memory.peak_bytes(self.device), budget)
        finally:
            self.steps = steps

    def generate(
        self, samples: Sequence[Sample], capture: bool = True
    ) -> tuple[np.ndarray, list[dict[str, np.ndarray]], list[str | None]]:
        """(images uint8 [B, size, size, 3]; per sample, heat float64 [K, P, r, r] by source
        (``dd.masks.from_heat.SOURCES``), nothing without ``capture``; per sample, what is wrong
        with its image or None, see :func:`faults`). Noise comes from each sample's own seed."""
        given = self.settings
        spans = [self.spans(s) for s in samples]
        recorder = self._recorder(samples, given.capture_every) if capture else None

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
            if recorder is not None and step == 0:
                recorder.check()
            return tensors

        # None and not "": XL's own setting for an empty prompt is zeros, not the states of an empty
        # text
        negative = [given.negative_prompt] * len(samples) if given.negative_prompt else None
        with recorder or nullcontext():
            made = self.pipe(
                prompt=[s.prompt for s in samples],
                negative_prompt=negative,
                generator=[torch.Generator("cpu").manual_seed(s.seed) for s in samples],
                num_inference_steps=self.steps,
                guidance_scale=given.guidance,
                height=self.size,
                width=self.size,
                output_type="pt",
                callback_on_step_end=after_step,
            )
        heat = self._heat(recorder, spans) if recorder is not None else []
        pixels, finite, constant = eight_bit(made.images, given.truncate)
        flagged = getattr(made, "nsfw_content_detected", None)
        return pixels, heat, faults(finite, constant, heat, flagged)

    @torch.no_grad()
    def read_real(
        self, images: np.ndarray, samples: Sequence[Sample], timesteps: list[int], seed: int = 0
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
            times = [[self.size, self.size, 0, 0, self.size, self.size]] * len(samples)
            added = {"text_embeds": pooled, "time_ids": torch.tensor(times).to(pooled)}
        generator = torch.Generator().manual_seed(seed)
        with self._recorder(samples) as recorder:
            for t in timesteps:
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                step = torch.full((len(samples),), t, device=self.device)
                noised = noiser.add_noise(latents, noise, step)
                self.unet(noised, step, states, added_cond_kwargs=added)
        return self._heat(recorder, spans)

    def _latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scaled latents of images uint8 [B, 3, H, W]; in float32 where the VAE overflows in
        half precision."""
        half = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if half:
            self.vae.to(torch.float32)
        try:
            found = self.vae.encode(pixels.to(self.vae.dtype) / 127.5 - 1).latent_dist.mean
            return (found * self.vae.config.scaling_factor).to(self.unet.dtype)
        finally:
            if half:
                self.vae.to(torch.float16)


def eight_bit(
    images_BCHW: torch.Tensor, truncate: bool = False
) -> tuple[np.ndarray, list[bool], list[bool]]:
    """(uint8 [B, H, W, C] of images in [0, 1], rounded or with ``truncate`` cut off; whether each
    is finite [bool]; whether each is of one colour [bool]); on the images' device, which then sends
    a byte for each value."""
    finite = images_BCHW.isfinite().flatten(1).all(1)
    values = images_BCHW.float().nan_to_num(0, 1, 0) * 255
    pixels = (values if truncate else values.round()).to(torch.uint8)
    constant = (pixels == pixels[:, :, :1, :1]).flatten(1).all(1)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), finite.tolist(), constant.tolist()


def faults(
    finite: list[bool],
    constant: list[bool],
    heat: Sequence[Mapping[str, np.ndarray]],
    flagged: Sequence[bool] | None,
) -> list[str | None]:
    """What is wrong with each image (or None): ``safety checker`` blacked it out, ``not finite``
    (a pixel or a heat value, overflow in half precision), ``constant`` (one colour), ``empty
    mask`` (the maps of all its classes are flat at a power and source, whose mask would be
    background)."""

    def fault(i: int) -> str | None:
        maps = heat[i].values() if heat else ()
        if flagged is not None and flagged[i]:
            return "safety checker"
        if not finite[i] or not all(np.isfinite(m).all() for m in maps):
            return "not finite"
        if constant[i]:
            return "constant"
        empty = any(flat(torch.from_numpy(m)).all(0).any() for m in maps)
        return "empty mask" if empty else None

    return [fault(i) for i in range(len(finite))]
