"""Models that hold latents as rows of 2x2 patches after the text rows, and are called once for each
half of a guided batch: FLUX.1, FLUX.2 [klein] and Qwen-Image."""

from collections.abc import Callable
from typing import Any

import torch

from dd.attention.recorder import Half
from dd.attention.sites import Layout
from dd.generators.families.base import STATES, Family, Text


class Packed(Family):
    tokens = 512

    def own_size(self) -> int:
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def layout(self, size: int) -> Layout:
        pixels = self.side(size) ** 2
        return Layout("first", pixels, pixels)

    def latent_shape(self, size: int) -> tuple[int, ...]:
        return self.side(size) ** 2, self.net.config.in_channels

    def half(self, text: Callable[[], Text], batch: int) -> Half:
        """The call whose states are those of the drawn prompts."""
        own: list[torch.Tensor] = []

        def half(args: tuple[Any, ...], kwargs: dict[str, Any]) -> slice | None:
            if not own:
                own.append(text()[STATES])
            given = kwargs[STATES]
            # states that are encoded again may differ by rounding
            near = {"rtol": 1e-2, "atol": 1e-3}
            same = given.shape == own[0].shape and torch.allclose(given, own[0], **near)
            return slice(0, batch) if same else None

        return half


def packed(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Patches of 2x2 as rows: [B, H/2 * W/2, 4 C]."""
    patches = latents_BCHW.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
