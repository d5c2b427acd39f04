"""Qwen-Image: joint attention of the rows of a chat and pixels."""

from collections.abc import Sequence
from typing import Any

import torch

from dd.generators.families.base import STATES, Stream, Text
from dd.generators.families.packed import Packed, packed

MASK = "encoder_hidden_states_mask"


class QwenImage(Packed):
    pipelines = ("QwenImagePipeline",)
    network = ("transformer", "QwenImageTransformer2DModel")
    guided = "true_cfg_scale"

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
