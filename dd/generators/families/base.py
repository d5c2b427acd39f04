"""What differs between families of text-to-image models: the network's inputs, where the words are,
how latents are made. Nothing here or in the families knows how attention is read."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import DDPMScheduler, DiffusionPipeline

from dd.attention.recorder import Half
from dd.attention.sites import Layout
from dd.generators.settings import GeneratorSettings

Text: TypeAlias = dict[str, Any]  # arguments of the network that hold prompts
Offsets: TypeAlias = list[tuple[int, int]]
STATES = "encoder_hidden_states"
PER_SAMPLE = ("hidden_states", "timestep", "guidance", "img_shapes")  # network arguments


@dataclass(frozen=True)
class Stream:
    """Text rows that come from one tokenizer, or from several that must agree because their states
    are joined by position. ``first``: the text row of the first kept token; ``limit``: number of
    tokens kept, special ones included; ``template``: makes the tokenizer's input from a prompt, of
    which the first ``dropped`` tokens are cut off."""

    tokenizers: Sequence[Any]
    limit: int
    first: int = 0
    template: Callable[[str], str] = field(default=lambda text: text)
    dropped: int = 0

    def count(self, text: str) -> int:
        """Number of tokens of a prompt, without cutting its end."""
        given = self.template(text)
        return max(len(t(given).input_ids) for t in self.tokenizers) - self.dropped

    def offsets(self, text: str) -> Offsets:
        """Character span in ``text`` of each kept token; (0, 0) for the tokens around the text.

        ValueError if two tokenizers differ, and for a text that the template does not contain.
        """
        given = self.template(text)
        # compare two filled templates, because the text may be a word of the template itself
        place = len(os.path.commonprefix([self.template("0"), self.template("1")]))
        if not given[place:].lower().startswith(text.strip().lower()):
            raise ValueError(f"{text!r} is lost in the template of the text encoder: {given!r}")
        limit = {"truncation": True, "max_length": self.limit + self.dropped}
        each = [t(given, return_offsets_mapping=True, **limit) for t in self.tokenizers]
        spans = [[tuple(pair) for pair in e.offset_mapping] for e in each]
        if any(other != spans[0] for other in spans):
            raise ValueError(
                f"the two tokenizers of this model split {text!r} differently: no token belongs to "
                "one word"
            )
        end = place + len(text)
        kept = spans[0][self.dropped :]
        return [
            (max(a - place, 0), min(b, end) - place) if a < end and b > place else (0, 0)
            for a, b in kept
        ]


def chat(tokenizer: Any, thinking: bool) -> Callable[[str], str]:
    """A chat template with the prompt as the only message of a user."""

    def template(text: str) -> str:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )

    return template


class Family(ABC):
    """A family of models. ``pipelines``: their class names in diffusers; ``network``: (name of the
    part that denoises, its class); ``former``: earlier names of that class. ``guided``: the
    pipeline's argument for ``diffusion.guidance``; ``unguided``: guidance up to this value has no
    effect; ``ignored``: attention that is never read, by the beginning of its names; ``refined``:
    layers of the network mix the words before they are read; ``linear``: the attention among pixels
    is linear and has no matrix; ``tokens``: number that the pipeline reads of a prompt, 0 = the
    tokenizer's own limit; ``takes``: the settings that not every family has."""

    pipelines: ClassVar[tuple[str, ...]]
    network: ClassVar[tuple[str, str]] = ("transformer", "")
    former: ClassVar[tuple[str, ...]] = ()
    guided: ClassVar[str] = "guidance_scale"
    unguided: ClassVar[float] = 1.0
    ignored: ClassVar[tuple[str, ...]] = ()
    refined: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    tokens: ClassVar[int] = 0
    takes: ClassVar[tuple[str, ...]] = ("max_tokens", "negative_prompt")

    def __init__(self, pipe: DiffusionPipeline, device: str, settings: GeneratorSettings) -> None:
        self.pipe, self.device, self.settings = pipe, device, settings
        self.check_guidance()

    def check_guidance(self) -> None:
        """ValueError for a negative prompt without effect."""
        given = self.settings
        if given.negative_prompt and given.guidance <= self.unguided:
            raise ValueError(
                f"diffusion.negative_prompt={given.negative_prompt!r} has no effect with "
                f"diffusion.guidance={given.guidance}, which does not guide: give more than "
                f"{self.unguided:g}, or leave the prompt empty"
            )

    def check_distilled(self, distilled: bool) -> None:
        """ValueError for guidance of a model that was distilled to work without."""
        if distilled and self.settings.guidance > 1:
            raise ValueError(
                f"diffusion.guidance={self.settings.guidance} has no effect on this "
                f"{type(self.pipe).__name__}, which was distilled to work without; give 0"
            )

    @property
    def net(self) -> Any:
        return getattr(self.pipe, self.network[0])

    @property
    def patch(self) -> int:
        """Side of the latent patch that makes one pixel of the network."""
        return 2

    def unread(self) -> Sequence[str]:
        """Attention that is never read, by the beginning of its names."""
        return self.ignored

    @property
    def length(self) -> int:
        """Number of tokens that are read of a prompt."""
        return self.settings.max_tokens or self.tokens

    def own_size(self) -> int:
        """Side of the images that the checkpoint was made for, in pixels."""
        return self.net.config.sample_size * self.pipe.vae_scale_factor

    def side(self, size: int) -> int:
        """Side of the network's pixel grid, for images of side ``size``."""
        return size // (self.pipe.vae_scale_factor * self.patch)

    @abstractmethod
    def layout(self, size: int) -> Layout:
        """Layout of the network's keys, for images of side ``size``."""

    @abstractmethod
    def streams(self) -> list[Stream]:
        """Where the text rows come from."""

    @abstractmethod
    def text(self, prompts: Sequence[str]) -> Text:
        """The network's inputs for prompts, as its pipeline makes them."""

    def class_states(self, text: Text) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(states [B, T, C] as cross-attention layers get them, mask [B, T] or None)."""
        return text[STATES], None

    def perturbed(self, text: Text, row: int | None) -> Text:
        """The same with text row ``row`` changed."""
        if row is None:
            return text
        states = text[STATES].clone()
        states[:, row].neg_()  # a different row in any precision, of the same size
        return {**text, STATES: states}

    def with_text(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: slice, text: Text
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the network: those of the samples ``rows`` of a batch, with another text."""
        cut = {k: v[rows] for k, v in kwargs.items() if k in PER_SAMPLE and v is not None}
        return args, {**kwargs, **cut, **text}

    @abstractmethod
    def forward(self, latents: torch.Tensor, timestep: int, text: Text, size: int) -> Any:
        """One call of the network at ``timestep`` of 1,000; latents as its pipeline holds them."""

    def predicted(self, output: Any) -> torch.Tensor:
        """What its pipeline hands to the scheduler, of an output of :meth:`forward`; of the form
        of the latents."""
        return output[0]

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """What :meth:`predicted` should be: the direction of the straight line to the noise."""
        return noise - latents

    def latent_shape(self, size: int) -> tuple[int, ...]:
        """Shape of one sample's latent, as the pipeline holds it."""
        side = size // self.pipe.vae_scale_factor
        return self.net.config.in_channels, side, side

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Latents of images in [-1, 1], as the pipeline holds them."""
        config = self.pipe.vae.config
        mean = self.pipe.vae.encode(pixels_BCHW).latent_dist.mean
        return (mean - (config.shift_factor or 0)) * config.scaling_factor

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """Latents at ``timestep`` of 1,000 by flow matching: a straight line to the noise."""
        return torch.lerp(latents, noise, timestep / 1000)

    def call(self, batch: int, size: int) -> dict[str, Any]:
        """Arguments of the pipeline for ``batch`` images."""
        given: dict[str, Any] = {self.guided: self.settings.guidance}
        given |= {"height": size, "width": size}
        # None instead of "": for an empty prompt XL uses zeros, not the states of an empty
        # text
        negative = self.settings.negative_prompt
        given["negative_prompt"] = [negative] * batch if negative else None
        if self.tokens:
            given["max_sequence_length"] = self.length
        return given

    def last_latents(self, keep: Callable[[torch.Tensor], None]) -> dict[str, Any]:
        """Arguments of the pipeline that pass the latents of each step to ``keep``."""

        def after_step(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> Any:
            keep(given["latents"])
            return given

        return {"callback_on_step_end": after_step}

    def half(self, text: Callable[[], Text], batch: int) -> Half:
        """The conditional half of a batch of the network; ``text()`` gives the batch's prompts."""
        return lambda *_: slice(-batch, None)

    def times(self, timestep: float, batch: int) -> torch.Tensor:
        return torch.full((batch,), timestep, device=self.device)


class Diffusing(Family):
    """Models that learned to remove noise of Stable Diffusion's schedule."""

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        mean = self.pipe.vae.encode(pixels_BCHW).latent_dist.mean
        return mean * self.pipe.vae.config.scaling_factor

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        schedule = DDPMScheduler.from_config(self.pipe.scheduler.config)
        return schedule.add_noise(latents, noise, _steps(latents, timestep))

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        schedule = DDPMScheduler.from_config(self.pipe.scheduler.config)
        kind = schedule.config.prediction_type
        if kind == "v_prediction":
            return schedule.get_velocity(latents, noise, _steps(latents, timestep))
        return {"epsilon": noise, "sample": latents}[kind]


def without_variance(output_BCHW: torch.Tensor, net: Any) -> torch.Tensor:
    """A prediction without the variance that some networks learned beside it."""
    channels = net.config.in_channels
    return output_BCHW[:, :channels] if net.config.out_channels == 2 * channels else output_BCHW


def _steps(latents: torch.Tensor, timestep: int) -> torch.Tensor:
    return torch.full((len(latents),), timestep, device=latents.device)
