"""PixArt-Sigma: a transformer whose cross-attention reads T5's states, as UNets read CLIP's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dd.attention.sites import Layout
from dd.generators.families.base import STATES, Diffusing, Stream, Text, without_variance

MASK = "encoder_attention_mask"


class PixArtSigma(Diffusing):
    pipelines = ("PixArtSigmaPipeline",)
    network = ("transformer", "PixArtTransformer2DModel")
    former = ("Transformer2DModel",)
    tokens = 300

    def layout(self, size: int) -> Layout:
        if self.side(size) ** 2 == self.length:
            raise ValueError(
                f"diffusion.max_tokens={self.length}: the network has as many pixels for this "
                "image, so words and pixels could not be told apart; give another number"
            )
        return Layout("apart")

    def streams(self) -> list[Stream]:
        return [Stream([self.pipe.tokenizer], self.length, template=lambda t: t.lower().strip())]

    def text(self, prompts: Sequence[str]) -> Text:
        states, mask, _, _ = self.pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.length,
        )
        return {STATES: states, MASK: mask}

    def class_states(self, text: Text) -> tuple[torch.Tensor, torch.Tensor | None]:
        projection, states = self.net.caption_projection, text[STATES]
        weights = next(projection.parameters()).device
        if weights.type != "meta":  # with offload=model they may be elsewhere
            states = states.to(weights)
        return projection(states).to(self.device), text[MASK]

    def forward(self, latents: torch.Tensor, timestep: int, text: Text, size: int) -> Any:
        nothing = {"resolution": None, "aspect_ratio": None}
        times = self.times(timestep, len(latents)).long()
        return self.net(latents, timestep=times, added_cond_kwargs=nothing, **text)

    def predicted(self, output: Any) -> torch.Tensor:
        return without_variance(output[0], self.net)

    def call(self, batch: int, size: int) -> dict[str, Any]:
        given = super().call(batch, size)
        # captions are used as they are, at the requested size
        given |= {"clean_caption": False, "use_resolution_binning": False}
        return given | {"negative_prompt": given["negative_prompt"] or ""}

    def last_latents(self, keep: Callable[[torch.Tensor], None]) -> dict[str, Any]:
        return {"callback": lambda _, __, latents: keep(latents), "callback_steps": 1}
