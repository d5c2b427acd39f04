"""FLUX.1: joint attention of T5's rows and pixels; CLIP gives a pooled vector only."""

from collections.abc import Sequence
from typing import Any

import torch

from dd.generators.families.base import STATES, Stream, Text
from dd.generators.families.packed import Packed, packed


class Flux(Packed):
    pipelines = ("FluxPipeline",)
    network = ("transformer", "FluxTransformer2DModel")
    takes = ("max_tokens", "true_guidance", "negative_prompt")

    def check_guidance(self) -> None:
        settings = self.settings
        self.check_distilled(not self.net.config.guidance_embeds)
        if settings.negative_prompt and settings.true_guidance <= 1:
            raise ValueError(
                f"diffusion.negative_prompt={settings.negative_prompt!r} has no effect on FLUX.1 "
                f"with diffusion.true_guidance={settings.true_guidance}: its own guidance is "
                "distilled into it. Give a true_guidance above 1, or leave the prompt empty"
            )

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
        # the pipeline's own embedding: the reading of a finished image is not guided further
        guidance = self.times(1.0, len(latents)) if self.net.config.guidance_embeds else None
        times = self.times(timestep / 1000, len(latents)).to(latents.dtype)
        return self.net(
            hidden_states=latents, timestep=times, img_ids=ids, guidance=guidance, **text
        )

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return packed(super().encode(pixels_BCHW))

    def call(self, batch: int, size: int) -> dict[str, Any]:
        given = super().call(batch, size)
        if self.settings.true_guidance <= 1:
            return given | {"negative_prompt": None}
        # without a negative prompt the pipeline would not guide
        negative = given["negative_prompt"] or [""] * batch
        return given | {"negative_prompt": negative, "true_cfg_scale": self.settings.true_guidance}
