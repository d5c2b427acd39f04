"""The generator: prompts in, images and the heat maps of their classes out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch

from dd.attention.recorder import (
    BACKGROUND,
    BY_CLASS,
    CLASS_PROMPT,
    AttentionRecorder,
    Reading,
    Words,
    projection_of,
)
from dd.attention.sites import Site, check_layout, choose_side, choose_sites, find_sites
from dd.generators import loading, memory, speed
from dd.generators.adapter import find_adapter, merge
from dd.generators.class_forward import ClassForward
from dd.generators.families import BY_PIPELINE
from dd.generators.families.base import STATES
from dd.generators.settings import GeneratorSettings
from dd.masks.normalise import flat
from dd.masks.presence import ALONE, EVIDENCE, NUMBERS
from dd.prompts.prompt import class_words, token_spans, word_places
from dd.store.samples import Sample, sample_seed

Recorders: TypeAlias = list[AttentionRecorder]
Terms: TypeAlias = dict[str, str | None]
OPENRAIL_M: Terms = {
    "licence": "CreativeML OpenRAIL-M",
    "link": "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
}
# for models given by their hub id, in any configuration
TERMS: dict[str, Terms] = {
    "CompVis/stable-diffusion-v1-4": OPENRAIL_M,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": OPENRAIL_M,
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "licence": "CreativeML OpenRAIL++-M",
        "link": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0",
    },
}

AFTER = "after"  # source of the class prompt read after drawing, if it is read while drawing too


class TextToImage:
    """A text-to-image model of a known family (:mod:`dd.generators.families`), from a checkpoint in
    diffusers format or the embedded one. It makes images and the heat maps of their classes.

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
            given.model,
            given.revision,
            given.variant,
            given.checked,
            given.require_revision,
            given.t5,
        )
        self.pipe = loading.load(self.checkpoint, given)
        self.pipe.set_progress_bar_config(disable=True)
        self.adapted: dict[str, Any] = {}
        if adapter is not None:
            merge(self.pipe, adapter, given.adapter_weight, self.checkpoint.sha256())
            self.adapted["adapter_sha256"] = adapter.sha256()
            self.adapted["adapter_weight"] = given.adapter_weight
        if given.scheduler is not None:
            self.pipe.scheduler = loading.choose_scheduler(given.scheduler, self.pipe.scheduler)
        self.family = BY_PIPELINE[self.checkpoint.pipeline](self.pipe, device, given)
        self.network, self.vae = self.family.net, self.pipe.vae
        self._choose_size()
        self._place()
        self._choose_sites()

    def _choose_size(self) -> None:
        family, given = self.family, self.settings
        factor = self.pipe.vae_scale_factor * family.patch
        self.size = given.size or family.own_size()
        if self.size % max(8, factor):
            raise ValueError(f"diffusion.size={self.size}: must be a multiple of {max(8, factor)}")
        self.layout = family.layout(self.size)

    def _place(self) -> None:
        """Move everything to the device, and apply the options for memory and speed."""
        given = self.settings
        if given.quantize is not None:
            wide = self.network.dtype
            self.network.enable_layerwise_casting(torch.float8_e4m3fn, wide)
        if given.vae_slicing:
            self.vae.enable_slicing()
        if given.offload == "model":
            self.pipe.enable_model_cpu_offload(device=self.device)
        elif given.offload == "sequential":
            if torch.device(self.device).type == "cpu":
                raise ValueError(
                    "diffusion.offload=sequential moves each layer to a GPU while it works; it has "
                    "no effect with device=cpu: leave it none"
                )
            self.pipe.enable_sequential_cpu_offload(device=self.device)
        else:
            self.pipe.to(self.device)
        for wanted, apply in (
            (given.channels_last, speed.channels_last),
            (given.fused_projections, speed.fuse_projections),
            (given.compile, speed.compile_blocks),
        ):
            if wanted:
                apply(self.network, self.vae)

    @torch.no_grad()
    def _choose_sites(self) -> None:
        """Choose where attention is read, among all sites that one forward pass shows. ValueError
        if there is none, and for keys in another order than the family expects."""
        given, family, layout = self.settings, self.family, self.layout
        if given.class_forward and not layout.joint:
            raise ValueError(
                "diffusion.class_forward=true: this model's layers make keys of the class prompt "
                "beside those of the prompt; no second forward is needed"
            )
        unread = given.reading == "sampling" and not given.class_forward
        if given.background_words and layout.joint and unread:
            raise ValueError(
                f"diffusion.background_words={list(given.background_words)} stand in the class "
                "prompt, which joint attention reads after drawing: give diffusion.reading=after, "
                "or leave them out"
            )
        latents = self._noise([0])
        text = family.text(["a"])

        def forward(row: int | None = None) -> None:
            family.forward(latents, 500, family.perturbed(text, row), self.size)

        self.sites = find_sites(self.network, layout, forward, family.unread())
        latent = self.size // self.pipe.vae_scale_factor
        if family.linear:
            self._check_without_powers()
        chosen: dict[str, list[Site]] = {"self": []}
        for kind, wanted, layers in (
            ("cross", given.cross_resolution, given.cross_layers),
            ("self", given.self_resolution, given.self_layers),
        ):
            if kind == "self" and family.linear:
                continue
            sides = {s.side for s in self.sites if s.kind in (kind, "joint")}
            side = choose_side(kind, wanted, sides, latent)
            chosen[kind] = choose_sites(kind, self.sites, side, layers)
        self.cross_resolution = chosen["cross"][0].side
        groups = self._groups(chosen["cross"], latent)
        self.self_resolution = (chosen["self"] or chosen["cross"])[0].side
        if self.self_resolution % given.pool:
            raise ValueError(
                f"diffusion.pool={given.pool}: expected a divisor of {self.self_resolution}, the "
                "side of the self-attention"
            )
        self.reading = Reading(
            layout,
            [*chosen["cross"], *(site for site in groups if site not in chosen["cross"])],
            chosen["self"],
            given.cross_heads,
            given.capture_every,
            given.pool,
            head_weights=given.head_weights,
            reference=self._reference(),
            apart=tuple(given.cross_groups or ()),
        )
        if self.reading.weighed:
            for site in chosen["cross"]:
                projection_of(site.name, self.network.get_submodule(site.name))
        # the first site of all: before later layers see the words, earlier ones have mixed them
        first = next(s.name for s in self.sites if s.kind in ("cross", "joint"))
        check_layout(self.network, layout, first, forward, 1, family.refined)
        self.pipe.maybe_free_model_hooks()

    def _groups(self, main: Sequence[Site], latent: int) -> list[Site]:
        """The layers of further sides whose heat is stored separately. ValueError for a side that
        the model does not have, and for joint attention, which has only one side."""
        given = self.settings
        if given.cross_groups is None:
            return []
        if self.layout.joint:
            raise ValueError(
                f"diffusion.cross_groups={list(given.cross_groups)}: a {self.checkpoint.pipeline} "
                f"attends at one side, {main[0].side}; leave it null"
            )
        sides = {s.side for s in self.sites if s.kind == "cross"}
        found: list[Site] = []
        for side in given.cross_groups:
            choose_side("cross", side, sides, latent)
            found += choose_sites("cross", self.sites, side, None)
        return found

    def _check_without_powers(self) -> None:
        """ValueError for settings that need a matrix of linear attention among the pixels."""
        given = self.settings
        asked = {
            "max_power": given.max_power or None,
            "self_resolution": given.self_resolution,
            "self_layers": given.self_layers,
            "pool": given.pool if given.pool > 1 else None,
        }
        for name, value in asked.items():
            if value is not None:
                raise ValueError(
                    f"diffusion.{name}={value}: attention among the pixels of a "
                    f"{self.checkpoint.pipeline} is linear and has no matrix. Give "
                    "diffusion.max_power=0 and masks.power=0, and leave the others out"
                )

    def _reference(self) -> Site | None:
        """The layer that others are compared with; ValueError for a name that no layer has."""
        wanted = self.settings.layer_weights
        if wanted is None:
            return None
        known = {s.name: s for s in self.sites if s.kind in ("cross", "joint")}
        if wanted not in known:
            names = "\n  ".join(known)
            raise ValueError(
                f"diffusion.layer_weights={wanted}: no layer that attends to words has this name. "
                f"Layers:\n  {names}"
            )
        return known[wanted]

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

    def where_read(self) -> list[dict[str, Any]]:
        """The sites that are read, for run.json."""
        read = {s.name for s in (*self.reading.cross, *self.reading.self)}
        return [asdict(site) for site in self.sites if site.name in read]

    def parts(self) -> tuple[Any, Any, Any, Any]:
        """(VAE, tokenizer, network, text encoder), for a training that starts from them."""
        return self.vae, self.pipe.tokenizer, self.network, self.pipe.text_encoder

    # -------------------------------------------------------------------------------------- prompts

    @property
    def token_limit(self) -> int:
        """Tokens that a prompt may have, special ones included."""
        return min(stream.limit for stream in self.family.streams())

    def token_count(self, text: str) -> int:
        """Tokens of a prompt, special ones included, without cutting; of several encoders, the
        count of the one that is closest to its limit."""
        over = max(stream.count(text) - stream.limit for stream in self.family.streams())
        return self.token_limit + over

    @torch.no_grad()
    def text_states(self, prompts: Sequence[str]) -> torch.Tensor:
        """States [B, T, C] of the text encoders as the pipeline computes them for its own prompts
        (XL: those of both, joined along C)."""
        return self.family.text(prompts)[STATES]

    def _positions(
        self, text: str, words: Sequence[str], place: tuple[int, int] | None = None
    ) -> list[list[int]]:
        """Text rows of each class in a prompt, for all encoders; ValueError for a class word that
        is missing or cut off."""
        found: list[list[int]] = []
        for stream in self.family.streams():
            spans = token_spans(text, words, stream.offsets(text), *(place or ()))
            rows = [[stream.first + at for at in span] for span in spans]
            found = [a + b for a, b in zip(found, rows, strict=True)] if found else rows
        names = list(dict.fromkeys(words))
        for k, rows_k in enumerate(found):
            if rows_k in found[:k]:
                raise ValueError(
                    f"classes {names[found.index(rows_k)]!r} and {names[k]!r} are read at the same "
                    f"words of {text!r}, so they would have the same map. Name both in the "
                    "caption, or rename one in the taxonomy"
                )
        return found

    def _class_text(self, sample: Sample) -> str:
        """The text shown to read a sample's class words: its class prompt, followed by the
        background words."""
        return " ".join([sample.class_prompt, *(self.settings.background_words or [])])

    def _class_spans(self, sample: Sample) -> dict[str, list[list[int]]]:
        """Spans of the class prompt, and of the background's words if there are any."""
        text, end = self._class_text(sample), len(sample.class_prompt)
        words = class_words(sample.class_prompt, sample.classes)
        spans = {CLASS_PROMPT: self._positions(text, words, (0, end))}
        if self.settings.background_words:
            behind = self.settings.background_words
            spans[BACKGROUND] = self._positions(text, behind, (end, len(text)))
        return spans

    def _drawn_spans(self, sample: Sample) -> dict[str, list[list[int]]]:
        """The spans that are read while a sample is drawn. Joint attention has no keys of the class
        prompt then, so the appended words are read, or the caption's own if none are appended."""
        spans: dict[str, list[list[int]]] = {}
        if not self.layout.joint:
            spans |= self._class_spans(sample)
        full: Any = self.settings.full_prompt
        places = word_places(sample.prompt, sample.class_prompt)
        if self.layout.joint and not full:
            full = next(iter(places))
        if not full:
            return spans
        words = class_words(sample.class_prompt, sample.classes)
        for where in places if full is True else [full]:
            if where not in places:
                raise ValueError(
                    f"no class words are appended to {sample.prompt!r}: prompts.append=true "
                    "appends them, diffusion.full_prompt=caption reads the caption's own"
                )
            read = words if where == "appended" else sample.classes
            try:
                found = self._positions(sample.prompt, read, places[where])
            except ValueError as error:
                raise ValueError(f"full_prompt_{where}: {error}") from None
            spans[f"full_prompt_{where}"] = found
        return spans

    def spans(self, sample: Sample) -> dict[str, list[list[int]]]:
        """Token positions of each class of a sample, for each source that is stored
        (``dd.masks.from_heat.SOURCES``). If a class is appended more than once, the positions of
        all its words.

        ValueError for a class word that is missing or cut off by the token limit.
        """
        reading = self.settings.reading
        spans = {} if reading == "after" else self._drawn_spans(sample)
        if self.settings.class_forward:
            spans = {**self._class_spans(sample), **spans}
        if reading == "after":
            spans |= self._class_spans(sample)
            if self.settings.full_prompt:
                spans |= self._drawn_spans(sample)
        elif reading == "both":
            own = self._class_spans(sample)
            spans |= {AFTER if k == CLASS_PROMPT else f"{AFTER} {k}": v for k, v in own.items()}
        for side in self.reading.apart:
            spans |= {f"{s}@{side}": rows for s, rows in spans.items() if "@" not in s}
        return spans

    # ------------------------------------------------------------------------------------ attention

    @contextmanager
    def _recorded(
        self, samples: Sequence[Sample], reading: Reading, wanted: bool = True
    ) -> Iterator[Recorders]:
        """Context that records the attention to the words of the prompts while samples are drawn
        and, if asked for, to their class prompts in further forward passes. Records nothing unless
        ``wanted``."""
        if not wanted:
            yield []
            return
        family, spans = self.family, [self._drawn_spans(s) for s in samples]
        half = family.half(lambda: family.text([s.prompt for s in samples]), len(samples))
        states = mask = further = None
        with torch.no_grad():
            if not self.layout.joint or self.settings.class_forward:
                text = family.text([self._class_text(s) for s in samples])
            if not self.layout.joint:
                states, mask = family.class_states(text)
            elif self.settings.class_forward:
                own = [self._class_spans(s) for s in samples]
                further = ClassForward(family, text, own, reading, half)
                half = further.drawing
        words = Words(spans, states, mask)
        recorder = AttentionRecorder(self.network, reading, words, half)
        with recorder, further or nullcontext():
            yield [recorder, *([further.recorder] if further else [])]

    def _heat(self, recorders: Recorders, number: int) -> list[dict[str, np.ndarray]]:
        found: list[dict[str, np.ndarray]] = [{} for _ in range(number)]
        for recorder in recorders:
            for maps, own in zip(found, self._heat_of(recorder, number), strict=True):
                maps |= own
        return found

    def _heat_of(self, recorder: AttentionRecorder, number: int) -> list[dict[str, np.ndarray]]:
        recorder.check()
        power = self.settings.max_power
        each = (recorder.heat(i, power) for i in range(number))
        return [{source: maps.numpy() for source, maps in heat.items()} for heat in each]

    def _noise(self, seeds: Sequence[int]) -> torch.Tensor:
        """Noise of one latent for each seed."""
        shape = self.family.latent_shape(self.size)
        each = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(each).to(self.device, self.network.dtype)

    @torch.no_grad()
    def _read_after(
        self, latents: torch.Tensor, samples: Sequence[Sample], images: np.ndarray
    ) -> list[dict[str, np.ndarray]]:
        """Heat by source of finished latents; with ``mirror``, the mean with the heat of the
        mirrored ``images``, turned back."""
        heat = self._read_latents(latents, samples)
        if self.settings.mirror:
            other = self._read_latents(self._latents(images[:, :, ::-1]), samples)
            for maps, turned in zip(heat, other, strict=True):
                for source, own in maps.items():
                    maps[source] = (own + turned[source][..., ::-1]) / 2
        if self.settings.reading == "both":
            heat = [{_afterwards(key): own for key, own in maps.items()} for maps in heat]
        if self.settings.word_errors is not None:
            for maps, numbers in zip(heat, self._explained(latents, samples), strict=True):
                maps |= numbers
        return heat

    @torch.no_grad()
    def _read_latents(
        self, latents: torch.Tensor, samples: Sequence[Sample]
    ) -> list[dict[str, np.ndarray]]:
        """Heat of finished latents by source, at the timesteps of the settings. They are shown with
        their class prompts and, for the words of full prompts, with these. The noise comes from
        each sample's own seed."""
        family, given = self.family, self.settings
        reading = replace(self.reading, every=1, as_operator=True)
        shown = [[self._class_spans(s) for s in samples]]
        if given.reading == "after" and given.full_prompt:
            drawn = [self._drawn_spans(s) for s in samples]
            shown.append([{k: v for k, v in d.items() if k not in BY_CLASS} for d in drawn])
        heat: list[dict[str, np.ndarray]] = [{} for _ in samples]
        for spans in shown:
            by_class = CLASS_PROMPT in spans[0]
            text = family.text([self._class_text(s) if by_class else s.prompt for s in samples])
            apart = not self.layout.joint and by_class
            words = Words(spans, *(family.class_states(text) if apart else (None, None)))
            half = family.half(partial(dict, text), len(samples))
            with AttentionRecorder(self.network, reading, words, half) as recorder:
                for t, draw in product(given.read_at, range(given.read_draws)):
                    which = f"after {draw}" if draw else "after"
                    noise = self._noise([sample_seed(s.seed, which, t) for s in samples])
                    noised = family.noised(latents, noise.to(latents), t)
                    family.forward(noised.to(self.network.dtype), t, text, self.size)
            for maps, found in zip(heat, self._heat_of(recorder, len(samples)), strict=True):
                maps |= found
        self.pipe.maybe_free_model_hooks()  # with offload=model the network would stay loaded
        return heat

    @torch.no_grad()
    def _explained(
        self, latents: torch.Tensor, samples: Sequence[Sample]
    ) -> list[dict[str, np.ndarray]]:
        """What each class word explains of finished latents (:mod:`dd.masks.presence`), means over
        ``word_errors``. The noise comes from each sample's own seed and is the same for all texts
        of a sample; as many texts as there are samples are shown at once."""
        family, times = self.family, self.settings.word_errors or []
        texts = [_variants(s) for s in samples]
        rows = [(i, text) for i, each in enumerate(texts) for text in each]
        share = [torch.zeros(len(each), dtype=torch.float64) for each in texts]
        for t in times:
            noise = self._noise([sample_seed(s.seed, "words", t) for s in samples]).to(latents)
            noised, target = (f(latents, noise, t) for f in (family.noised, family.target))
            errors: list[float] = []
            for first in range(0, len(rows), len(samples)):
                part = rows[first : first + len(samples)]
                of = torch.tensor([i for i, _ in part], device=latents.device)
                shown = family.text([text for _, text in part])
                output = family.forward(noised[of].to(self.network.dtype), t, shown, self.size)
                wrong = family.predicted(output).double() - target[of].double()
                errors += wrong.square().flatten(1).mean(1).tolist()
            each = torch.tensor(errors, dtype=torch.float64).split([len(e) for e in texts])
            for total, own in zip(share, each, strict=True):
                total += own / own[-1] / len(times)  # of the error without text
        self.pipe.maybe_free_model_hooks()
        found = []
        for total in share:
            classes = (len(total) - 2) // 2
            numbers = {
                EVIDENCE: total[1 : 1 + classes] - total[0],
                ALONE: total[-1] - total[1 + classes : -1],
            }
            found.append({n: v.numpy().reshape(-1, 1, 1, 1) for n, v in numbers.items()})
        return found

    # ----------------------------------------------------------------------------------- generation

    def largest_batch(self, sample: Sample) -> int:
        """The largest batch that fits into memory while attention is recorded
        (:func:`dd.generators.memory.largest_batch`). Measured on copies of ``sample``, with as few
        steps as need the memory of a whole generation."""
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
        """(images uint8 [B, size, size, 3]; for each sample, heat float64 [K, P, r, r] by source
        (``dd.masks.from_heat.SOURCES``), empty without ``capture``; for each sample, what is wrong
        with its image or None, see :func:`faults`). Noise comes from each sample's own seed."""
        given, family, number = self.settings, self.family, len(samples)
        drawing = capture and given.reading != "after"
        finished: list[torch.Tensor] = []

        def keep(latents: torch.Tensor) -> None:
            for recorder in recorders if not finished else ():
                recorder.check()
            finished[:] = [latents]

        with self._recorded(samples, self.reading, drawing) as recorders:
            made = self.pipe(
                prompt=[s.prompt for s in samples],
                generator=[torch.Generator("cpu").manual_seed(s.seed) for s in samples],
                num_inference_steps=self.steps,
                output_type="pt",
                **family.call(number, self.size),
                **family.last_latents(keep),
            )
        heat: list[dict[str, np.ndarray]] = [{} for _ in samples] if capture else []
        if drawing:
            heat = self._heat(recorders, number)
        pixels, finite, constant = eight_bit(made.images, given.truncate)
        if capture and given.reading != "sampling":
            after = self._read_after(finished[0], samples, pixels)
            for maps, found in zip(heat, after, strict=True):
                maps |= found
        flagged = getattr(made, "nsfw_content_detected", None)
        return pixels, heat, faults(finite, constant, heat, flagged)

    @torch.no_grad()
    def read_real(
        self, images: np.ndarray, samples: Sequence[Sample], timesteps: list[int], seed: int = 0
    ) -> list[dict[str, np.ndarray]]:
        """Heat of given images uint8 [B, size, size, 3] of any origin, by the sources of
        :meth:`spans`. For the reading while drawing, the image is noised to each of ``timesteps``
        (0 ... 999) and shown with its prompt. For the reading after drawing, it is read as a
        finished image. With exact masks this measures a generator's attention."""
        family, given, latents = self.family, self.settings, self._latents(images)
        heat: list[dict[str, np.ndarray]] = [{} for _ in samples]
        if given.reading != "after":
            text, generator = family.text([s.prompt for s in samples]), torch.Generator()
            generator.manual_seed(seed)
            with self._recorded(samples, replace(self.reading, every=1)) as recorders:
                for t in timesteps:
                    noise = torch.randn(latents.shape, generator=generator).to(latents)
                    family.forward(family.noised(latents, noise, t), t, text, self.size)
            heat = self._heat(recorders, len(samples))
        if given.reading != "sampling":
            for maps, found in zip(heat, self._read_after(latents, samples, images), strict=True):
                maps |= found
        return heat

    def _latents(self, images: np.ndarray) -> torch.Tensor:
        """Latents of images uint8 [B, H, W, 3]; computed in float32 if the VAE overflows in half
        precision."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(self.device)
        upcast = getattr(self.vae.config, "force_upcast", False)
        half = self.vae.dtype == torch.float16 and upcast
        if half:
            self.vae.to(torch.float32)
        try:
            # scaled in float32: bfloat16 has too few digits between 1 and 2
            scaled = (pixels.float() / 127.5 - 1).to(self.vae.dtype)
            found = self.family.encode(scaled)
            return found.to(self.network.dtype)
        finally:
            if half:
                self.vae.to(torch.float16)


def _variants(sample: Sample) -> list[str]:
    """The class prompt, the same without each of its classes, each class alone, and no text."""
    words = class_words(sample.class_prompt, sample.classes)
    without = [" ".join(w for w in words if w != name) for name in sample.classes]
    return [sample.class_prompt, *without, *sample.classes, ""]


def _afterwards(source: str) -> str:
    """Name of a source of a reading after drawing, beside the reading while drawing."""
    own = source.startswith(CLASS_PROMPT)
    return source.replace(CLASS_PROMPT, AFTER) if own else f"{AFTER} {source}"


def eight_bit(
    images_BCHW: torch.Tensor, truncate: bool = False
) -> tuple[np.ndarray, list[bool], list[bool]]:
    """(uint8 [B, H, W, C] of images in [0, 1], rounded or with ``truncate`` cut off; whether each
    image is finite [bool]; whether each has a single colour [bool]). Computed on the images'
    device, which then transfers one byte for each value."""
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
    """What is wrong with each image (or None): ``safety checker`` blacked it out; ``not finite``: a
    pixel or a heat value (overflow in half precision); ``constant``: one colour; ``empty mask``:
    the maps of all its classes are flat at a power and source, so its mask would be background."""

    def fault(i: int) -> str | None:
        maps = [m for source, m in heat[i].items() if source not in NUMBERS] if heat else []
        if flagged is not None and flagged[i]:
            return "safety checker"
        if not finite[i] or not all(np.isfinite(m).all() for m in maps):
            return "not finite"
        if constant[i]:
            return "constant"
        empty = any(flat(torch.from_numpy(m)).all(0).any() for m in maps)
        return "empty mask" if empty else None

    return [fault(i) for i in range(len(finite))]
