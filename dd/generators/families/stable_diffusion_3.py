"""Stable Diffusion 3 and 3.5: joint attention of pixels, CLIP's rows and T5's."""

from collections.abc import Sequence
from typing import Any

import torch

from dd.attention.sites import Layout
from dd.generators.families.base import STATES, Family, Stream, Text


class StableDiffusion3(Family):
    pipelines = ("StableDiffusion3Pipeline",)
    network = ("transformer", "SD3Transformer2DModel")
    tokens = 256  # of T5; rows of zeros if the model has no T5
    takes = ("max_tokens", "t5", "negative_prompt")

    @property
    def patch(self) -> int:
        return self.net.config.patch_size

    def layout(self, size: int) -> Layout:
        pixels = self.side(size) ** 2
        return Layout("last", pixels, pixels)

    def streams(self) -> list[Stream]:
        clip = self.pipe.tokenizer_max_length
        found = [Stream([self.pipe.tokenizer, self.pipe.tokenizer_2], clip)]
        if self.pipe.text_encoder_3 is not None:
            found.append(Stream([self.pipe.tokenizer_3], self.length, first=clip))
        return found

    def text(self, prompts: Sequence[str]) -> Text:
        states, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.length,
        )
        return {STATES: states, "pooled_projections": pooled}

    def forward(self, latents: torch.Tensor, timestep: int, text: Text, size: int) -> Any:
        return self.net(hidden_states=latents, timestep=self.times(timestep, len(latents)), **text)
