"""What a generator promises to the stages."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dd.store.samples import Sample


class Generator(Protocol):
    """Makes the images of samples and the heat maps of their classes.

    ``device``: where it works; ``size``: side of its square images in pixels; ``terms``: licence
    and link of its weights.
    """

    device: str
    size: int
    terms: Mapping[str, str | None]

    @property
    def token_limit(self) -> int:
        """Tokens that a prompt may have, special ones included."""

    def token_count(self, text: str) -> int:
        """Tokens of a prompt, special ones included, nothing cut off."""

    def spans(self, sample: Sample) -> dict[str, list[list[int]]]:
        """Token positions of each class by source (``dd.masks.from_heat.SOURCES``); ValueError for
        a class word that is missing or cut off."""

    def generate(
        self, samples: Sequence[Sample], capture: bool = True
    ) -> tuple[np.ndarray, list[dict[str, np.ndarray]], list[str | None]]:
        """(images uint8 [B, size, size, 3]; per sample, heat float64 [K, P, r, r] by source,
        nothing without ``capture``; per sample, what is wrong with its image, or None). A sample's
        noise comes from its own seed: no other sample of the batch changes it."""

    def read_real(
        self, images: np.ndarray, samples: Sequence[Sample], timesteps: list[int], seed: int = 0
    ) -> list[dict[str, np.ndarray]]:
        """Heat of given images uint8 [B, size, size, 3] of any origin, by the sources of
        :meth:`spans`: what a drawing reads, noised to each timestep (0 ... 999) and shown with
        their prompt; what is read after drawing as it is there."""

    def where_read(self) -> list[dict[str, Any]]:
        """Where attention is read, in plain values for the record: name, kind (``cross``, ``self``
        or ``joint``), heads and side of each site."""

    def largest_batch(self, sample: Sample) -> int:
        """The largest batch that fits into memory, measured on copies of ``sample``; ValueError if
        not one does."""

    def identity(self) -> dict[str, Any]:
        """What decides a pixel or a heat value, in plain values: equal identities make equal sets
        of data."""
