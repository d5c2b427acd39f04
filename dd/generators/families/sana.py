"""SANA: a transformer with cross-attention to Gemma's words. Its attention among pixels is linear
and has no matrix, so heat is read without powers."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from dd.attention.sites import Layout
from dd.generators.families.base import STATES, Family, Stream, Text, without_variance

MASK = "encoder_attention_mask"


class Sana(Family):
    pipelines = ("SanaPipeline",)
    network = ("transformer", "SanaTransformer2DModel")
    tokens = 300
    linear = True

    @property
    def patch(self) -> int:
        return self.net.config.patch_size

    def layout(self, size: int) -> Layout:
        return Layout("apart")

    def unread(self) -> list[str]:
        return [name for name, _ in self.net.named_modules() if name.endswith(".attn1")]

    @property
    def instruction(self) -> list[str]:
        """What its pipeline puts before each drawn prompt."""
        call = inspect.signature(self.pipe.__call__).parameters
        return call["complex_human_instruction"].default

    def streams(self) -> list[Stream]:
        """Of the instruction, the first token stays; if a prompt is short, its last ones too."""
        before = "\n".join(self.instruction)
        dropped = len(self.pipe.tokenizer.encode(before)) - 1

        def template(text: str) -> str:
            return before + text.lower().strip()

        tokenizer, kept = [self.pipe.tokenizer], self.length - 1
        return [Stream(tokenizer, kept, first=1, template=template, dropped=dropped)]

    def text(self, prompts: Sequence[str]) -> Text:
        states, mask, _, _ = self.pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.length,
            complex_human_instruction=self.instruction,
        )
        return {STATES: states.to(self.net.dtype), MASK: mask}

    def class_states(self, text: Text) -> tuple[torch.Tensor, torch.Tensor | None]:
        states = text[STATES]
        for layer in (self.net.caption_projection, self.net.caption_norm):
            weights = next(layer.parameters()).device
            if weights.type != "meta":  # with offload=model they may be elsewhere
                states = states.to(weights)
            states = layer(states)
        return states.to(self.device), text[MASK]

    def forward(self, latents: torch.Tensor, timestep: int, text: Text, size: int) -> Any:
        times = self.times(timestep, len(latents)) * self.net.config.timestep_scale
        return self.net(latents, timestep=times, **text)

    def predicted(self, output: Any) -> torch.Tensor:
        return without_variance(output[0], self.net)

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.pipe.vae.encode(pixels_BCHW).latent * self.pipe.vae.config.scaling_factor

    def call(self, batch: int, size: int) -> dict[str, Any]:
        given = super().call(batch, size)
        # captions are used as they are, at the requested size
        given |= {"clean_caption": False, "use_resolution_binning": False}
        return given | {"negative_prompt": given["negative_prompt"] or ""}
