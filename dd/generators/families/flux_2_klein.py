"""FLUX.2 [klein]: joint attention of the rows of a chat (Qwen3) and pixels, all padded to one
length."""

from collections.abc import Sequence
from typing import Any

import torch

from dd.generators.families.base import STATES, Stream, Text, chat
from dd.generators.families.packed import Packed, packed


class Flux2Klein(Packed):
    pipelines = ("Flux2KleinPipeline",)
    network = ("transformer", "Flux2Transformer2DModel")
    takes = ("max_tokens",)  # it is guided by an empty prompt only

    def check_guidance(self) -> None:
        self.check_distilled(self.pipe.config.is_distilled)

    def streams(self) -> list[Stream]:
        words = self.pipe.tokenizer
        return [Stream([words], self.length, template=chat(words, thinking=False))]

    def text(self, prompts: Sequence[str]) -> Text:
        states, ids = self.pipe.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.length
        )
        return {STATES: states, "txt_ids": ids}

    def forward(self, latents: torch.Tensor, timestep: int, text: Text, size: int) -> Any:
        side = self.side(size)
        grid = latents.new_zeros(len(latents), 1, side, side)
        ids = self.pipe._prepare_latent_ids(grid).to(self.device)
        times = self.times(timestep / 1000, len(latents)).to(latents.dtype)
        return self.net(hidden_states=latents, timestep=times, img_ids=ids, guidance=None, **text)

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Patches of 2x2, normalised channel by channel by the VAE's statistics."""
        vae = self.pipe.vae
        rows = packed(vae.encode(pixels_BCHW).latent_dist.mean).mT
        mean, variance = (x.to(rows)[:, None] for x in (vae.bn.running_mean, vae.bn.running_var))
        return ((rows - mean) / (variance + vae.config.batch_norm_eps).sqrt()).mT

    def call(self, batch: int, size: int) -> dict[str, Any]:
        given = super().call(batch, size)
        del given["negative_prompt"]
        return given
