"""FLUX.1: joint attention of T5's rows and pixels; CLIP gives a pooled vector only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dd.attention.recorder import Half
from dd.attention.sites import Layout
from dd.generators.families.base import STATES, Family, Stream, Text, two_calls


class Flux(Family):
    pipelines = ("FluxPipeline",)
    network = ("transformer", "FluxTransformer2DModel")

    @property
    def length(self) -> int:
        return self.max_tokens or 512  # the pipeline's own; FLUX.1-schnell was made for 256

    def own_size(self) -> int:
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def layout(self, size: int) -> Layout:
        pixels = self.side(size) ** 2
        return Layout("first", pixels, pixels)

    def streams(self) -> list[Stream]:
        return [Stream([self.pipe.tokenizer_2], self.length)]

    def text(self, prompts: Sequence[str]) -> Text:
        states, pooled, ids = self.pipe.encode_prompt(
            list(prompts), None, device=self.device, max_sequence_length=self.length
        )
        return {STATES: states, "pooled_projections": pooled, "txt_ids": ids}

    def forward(self, latents: torch.Tensor, timestep: int, text: Text, size: int) -> Any:
        side = self.side(size)
        ids = self.pipe._prepare_latent_image_ids(1, side, side, self.device, latents.dtype)
        # the pipeline's own; the reading of a finished image is not to be guided further
        guidance = self.times(1.0, len(latents)) if self.net.config.guidance_embeds else None
        times = self.times(timestep / 1000, len(latents)).to(latents.dtype)
        return self.net(
            hidden_states=latents, timestep=times, img_ids=ids, guidance=guidance, **text
        )

    def latent_shape(self, size: int) -> tuple[int, ...]:
        return self.side(size) ** 2, self.net.config.in_channels

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return packed(super().encode(pixels_BCHW))

    def call(self, batch: int, size: int) -> dict[str, Any]:
        given = super().call(batch, size) | {"max_sequence_length": self.length}
        if self.settings.true_guidance <= 1:
            return given | {"negative_prompt": None}
        # without a negative prompt the pipeline would not guide
        negative = given["negative_prompt"] or [""] * batch
        return given | {"negative_prompt": negative, "true_cfg_scale": self.settings.true_guidance}

    def half(self, text: Callable[[], Text], batch: int) -> Half:
        return two_calls(text, batch)


def packed(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Patches of 2x2 as rows: [B, H/2 * W/2, 4 C]."""
    patches = latents_BCHW.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
