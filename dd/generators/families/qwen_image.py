"""Qwen-Image: joint attention of the rows of a chat and pixels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dd.attention.recorder import Half
from dd.attention.sites import Layout
from dd.generators.families.base import STATES, Family, Stream, Text, two_calls
from dd.generators.families.flux import packed

MASK = "encoder_hidden_states_mask"


class QwenImage(Family):
    pipelines = ("QwenImagePipeline",)
    network = ("transformer", "QwenImageTransformer2DModel")
    guided = "true_cfg_scale"

    @property
    def length(self) -> int:
        return self.max_tokens or 512  # the pipeline's own

    def own_size(self) -> int:
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def layout(self, size: int) -> Layout:
        pixels = self.side(size) ** 2
        return Layout("first", pixels, pixels)

    def streams(self) -> list[Stream]:
        pipe = self.pipe
        template, dropped = pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
        return [Stream([pipe.tokenizer], self.length, template=template.format, dropped=dropped)]

    def text(self, prompts: Sequence[str]) -> Text:
        states, mask = self.pipe.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.length
        )
        return {STATES: states, MASK: mask}

    def forward(self, latents: torch.Tensor, timestep: int, text: Text, size: int) -> Any:
        side, batch = self.side(size), len(latents)
        times = self.times(timestep / 1000, batch).to(latents.dtype)
        shapes = [[(1, side, side)]] * batch
        return self.net(hidden_states=latents, timestep=times, img_shapes=shapes, **text)

    def latent_shape(self, size: int) -> tuple[int, ...]:
        return self.side(size) ** 2, self.net.config.in_channels

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        latents = self.pipe.vae.encode(pixels_BCHW[:, :, None]).latent_dist.mean
        mean, std = (
            torch.tensor(x).to(latents).view(1, -1, 1, 1, 1)
            for x in (config.latents_mean, config.latents_std)
        )
        return packed(((latents - mean) / std)[:, :, 0])

    def call(self, batch: int, size: int) -> dict[str, Any]:
        given = super().call(batch, size)
        # without a negative prompt it is not guided at all
        given["negative_prompt"] = given["negative_prompt"] or [" "] * batch
        return given

    def half(self, text: Callable[[], Text], batch: int) -> Half:
        return two_calls(text, batch)
