"""The interface of labelers, which turn images into masks. Several can label the same images, and
their mask sets lie side by side.

Two labelers are stages of their own: ``attention`` (:mod:`dd.stages.label`, which needs only stored
heat) and ``run`` (:mod:`dd.stages.label_by_run`, a trained segmenter).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from dd.store.samples import Sample
from dd.store.settings import Count, NoResult, Settings
from dd.taxonomy import Taxonomy

Class = Literal["A", "B", "C", "D"]  # of supervision (docs/sweeps.md)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Images:
    """The images of a synthetic set: its ``folder``, its classes, its samples in order, and the
    ``content``, a hash of the images."""

    folder: Path
    taxonomy: Taxonomy
    plan: list[Sample]
    content: str = ""


@dataclass(frozen=True)
class Asked:
    """An image to label: ``image`` uint8 [H, W, 3]; ``sample`` with its prompt and classes;
    ``heat`` float64 [K, r, r] of the sample's classes if the labeler reads it, else None."""

    image: np.ndarray
    sample: Sample
    heat: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True)
class Labelled:
    """``mask`` uint8 [H, W] of class ids and 255; ``counts``: pixel counts to report, such as
    {"ties": 3}."""

    mask: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)


Label: TypeAlias = Callable[[list[Asked]], list[Labelled]]


@dataclass(frozen=True)
class Ready:
    """A labeler that knows which images it will label.

    ``label``: labels a batch; ``identity``: what decides a mask beside the image (``supervision``,
    the class of the masks, is separate); ``settings``: those that decide; ``chosen_on``: the real
    labels behind the masks (:mod:`dd.evaluation.supervision`); ``made``: the origin, which decides
    nothing by itself (a model's name, its commit).
    """

    label: Label
    supervision: str
    identity: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    chosen_on: list[dict[str, Any]] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)


class Labeler(Protocol):
    """``name``: of the labeler, and of its mask set if the command gives none. ``batch_size``:
    images in a batch. ``reads``: (power, source) of the stored heat that it needs, or None.

    ``ready(images)`` returns what the masks of a data set depend on. If it cannot label these
    images, ValueError or FileNotFoundError come before anything is written.
    """

    name: str
    batch_size: int
    reads: tuple[int, str] | None

    def ready(self, images: Images) -> Ready: ...


class ModelSettings(Settings):
    """Settings of a labeler that is a transformers model. ``model``: a hub id with the ``revision``
    (a commit), or a local folder; ``batch_size``: images at a time, fewer if they do not fit."""

    noun = "labeler"

    model: Annotated[str | None, NoResult("its weights are hashed")] = None
    revision: Annotated[str | None, NoResult("its weights are hashed")] = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    batch_size: Annotated[Count, NoResult("another one changes masks by rounding alone")] = 4


def in_parts(call: Callable[[list[Item]], list[Result]], batch: Sequence[Item]) -> list[Result]:
    """``call(batch)``; one item after the other if the batch does not fit into the device's memory.
    ValueError if a single item does not fit."""
    try:
        return call(list(batch))
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise ValueError(
                "one image does not fit into the memory of the device with this labeler.model; "
                "labeler.dtype=bfloat16, a smaller model or device=cpu needs less"
            ) from None
    torch.cuda.empty_cache()
    return [found for one in batch for found in in_parts(call, [one])]
