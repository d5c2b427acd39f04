"""Z-Image: joint attention of pixels and the rows of a chat.

Like its text encoder, its context refiner lets the words of a prompt attend to one another before
the joint layers: a key row depends mostly on its own word, but not on it alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dd.attention.recorder import Half
from dd.attention.sites import Layout
from dd.generators.families.base import STATES, Family, Stream, Text, chat

MULTIPLE = 32  # rows of pixels and of words are padded to a multiple of it


class ZImage(Family):
    pipelines = ("ZImagePipeline",)
    network = ("transformer", "ZImageTransformer2DModel")
    ignored = ("noise_refiner", "context_refiner")
    refined = True
    unguided = 0.0
    tokens = 512

    def own_size(self) -> int:
        return 1024

    def layout(self, size: int) -> Layout:
        pixels = self.side(size) ** 2
        return Layout("last", pixels, -(-pixels // MULTIPLE) * MULTIPLE)

    def streams(self) -> list[Stream]:
        words = self.pipe.tokenizer
        return [Stream([words], self.length, template=chat(words, thinking=True))]

    def text(self, prompts: Sequence[str]) -> Text:
        rows, _ = self.pipe.encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.length,
        )
        return {STATES: rows}

    def perturbed(self, text: Text, row: int | None) -> Text:
        if row is None:
            return text
        changed = [rows.clone() for rows in text[STATES]]
        for rows in changed:
            rows[row].neg_()
        return {STATES: changed}

    def with_text(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: slice, text: Text
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        images, times, _ = args
        return (images[rows], times[rows], text[STATES]), kwargs

    def forward(self, latents: torch.Tensor, timestep: int, text: Text, size: int) -> Any:
        dtype = self.net.dtype
        images = list(latents.to(dtype)[:, :, None].unbind(0))
        return self.net(images, self.times(1 - timestep / 1000, len(images)), text[STATES])

    def predicted(self, output: Any) -> torch.Tensor:
        return -torch.stack([image.float() for image in output[0]]).squeeze(2)

    def latent_shape(self, size: int) -> tuple[int, ...]:
        side = size // self.pipe.vae_scale_factor
        return self.net.in_channels, side, side

    def half(self, text: Callable[[], Text], batch: int) -> Half:
        return lambda *_: slice(0, batch)
