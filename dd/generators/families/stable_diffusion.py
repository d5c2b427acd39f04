"""Stable Diffusion 1.x, 2.x and XL: a UNet whose cross-attention reads CLIP's states."""

from collections.abc import Sequence
from typing import Any

import torch

from dd.attention.sites import Layout
from dd.generators.families.base import STATES, Diffusing, Stream, Text


class StableDiffusion(Diffusing):
    pipelines = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    network = ("unet", "UNet2DConditionModel")
    takes = ("negative_prompt",)

    @property
    def patch(self) -> int:
        return 1

    def layout(self, size: int) -> Layout:
        return Layout("apart")

    def streams(self) -> list[Stream]:
        both = self.pipe.tokenizer, getattr(self.pipe, "tokenizer_2", None)
        tokenizers = [t for t in both if t is not None]
        return [Stream(tokenizers, min(t.model_max_length for t in tokenizers))]

    def text(self, prompts: Sequence[str]) -> Text:
        found = self.pipe.encode_prompt(
            list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        pooled = found[2] if len(found) > 2 else None
        return {STATES: found[0], "pooled": pooled}

    def forward(self, latents: torch.Tensor, timestep: int, text: Text, size: int) -> Any:
        added, pooled = None, text["pooled"]
        if pooled is not None:  # XL also gets the size of the picture and where it was cropped
            sizes = [[size, size, 0, 0, size, size]] * len(latents)
            added = {"text_embeds": pooled, "time_ids": torch.tensor(sizes).to(pooled)}
        return self.net(
            latents,
            self.times(timestep, len(latents)).long(),
            text[STATES],
            added_cond_kwargs=added,
        )
