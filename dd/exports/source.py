"""What is exported, in any format: samples that were checked before, and what is known of them."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dd.taxonomy import IGNORE, Taxonomy


@dataclass(frozen=True, slots=True)
class ExportItem:
    """One image file and its mask, a PNG of class ids in mode P or L.

    ``size``: (height, width) in pixels. ``values``: the pixel values in the mask, ascending,
    including 255. ``facts``: prompt, classes asked for and seed of a synthetic sample, {} for a
    real one.
    """

    id: str
    image: Path
    mask: Path
    size: tuple[int, int]
    values: tuple[int, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        return self.image.suffix


@dataclass(frozen=True)
class Source:
    """A data set to export. ``splits``: {split: sample ids in order}; a sample may be in several.
    ``items``: {id: ExportItem}.

    ``pixels`` and ``images``: {pixel value: count} over all items. ``about``: information for the
    data card (``synthetic``, ``generator``, ``command``, ``licence``, ``link``, ``masks``,
    ``groups`` that splits keep together; None if unknown).
    """

    name: str
    taxonomy: Taxonomy
    splits: dict[str, list[str]]
    items: dict[str, ExportItem]
    pixels: dict[int, int]
    images: dict[int, int]
    about: dict[str, Any]

    def each(self, split: str) -> Iterator[ExportItem]:
        return (self.items[name] for name in self.splits[split])

    def colour(self, value: int) -> list[int]:
        """[red, green, blue] of a pixel value."""
        return self.taxonomy.palette[3 * value : 3 * value + 3]

    def main_splits(self) -> tuple[str | None, str | None, str | None]:
        """The splits for a trainer's configuration: (to train on, to choose by, to report); None if
        missing."""
        rest = [s for s in self.splits if s not in ("train", "val", "tune", "test")]
        train = "train" if "train" in self.splits else next(iter(rest), None)
        val = next((s for s in ("val", "tune") if s in self.splits), None)
        return train, val, "test" if "test" in self.splits else None


def read_ids(item: ExportItem) -> np.ndarray:
    """Class ids uint8 [H, W] of the mask, 255 = uncertain."""
    with Image.open(item.mask) as image:
        return np.asarray(image)


def png(pixels: np.ndarray) -> bytes:
    """Grey [H, W] or colour [H, W, 3] pixels uint8 as a PNG without a palette, because some readers
    take palette colours for ids."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def record(source: Source, item: ExportItem) -> dict[str, Any]:
    """A sample's row in a table: id, facts, and the names of the classes in its mask."""
    return {
        "id": item.id,
        **item.facts,
        "present": [source.taxonomy.all_names[v] for v in item.values if v != IGNORE],
    }
