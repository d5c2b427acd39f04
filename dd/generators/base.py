"""The interface of generators that the stages use."""

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
        """Number of tokens that a prompt may have, special ones included."""

    def token_count(self, text: str) -> int:
        """Number of tokens of a prompt, special ones included, without cutting."""

    def spans(self, sample: Sample) -> dict[str, list[list[int]]]:
        """Token positions of each class by source (``dd.masks.from_heat.SOURCES``); ValueError for
        a class word that is missing or cut off."""

    def generate(
        self, samples: Sequence[Sample], capture: bool = True
    ) -> tuple[np.ndarray, list[dict[str, np.ndarray]], list[str | None]]:
        """(images uint8 [B, size, size, 3]; for each sample, heat float64 [K, P, r, r] by source,
        empty without ``capture``; for each sample, what is wrong with its image, or None). The
        noise of a sample comes from its own seed and does not depend on the rest of the batch."""

    def read_real(
        self, images: np.ndarray, samples: Sequence[Sample], timesteps: list[int], seed: int = 0
    ) -> list[dict[str, np.ndarray]]:
        """Heat of given images uint8 [B, size, size, 3] of any origin, by the sources of
        :meth:`spans`. For the reading while drawing, the image is noised to each timestep
        (0 ... 999) and shown with its prompt. For the reading after drawing, it is read as a
        finished image."""

    def where_read(self) -> list[dict[str, Any]]:
        """Where attention is read, in plain values for the record: name, kind (``cross``, ``self``
        or ``joint``), heads and side of each site."""

    def largest_batch(self, sample: Sample) -> int:
        """The largest batch that fits into memory, measured on copies of ``sample``; ValueError if
        not even one image fits."""

    def identity(self) -> dict[str, Any]:
        """What decides a pixel or a heat value, in plain values: equal identities make equal data
        sets."""
