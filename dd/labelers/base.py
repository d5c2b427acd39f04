"""What turns an image into a mask: a contract that every labeler keeps, so that several can label
the same images and their mask sets lie side by side.

Two labelers stand elsewhere, as stages of their own: ``attention`` (:mod:`dd.stages.label`, which
needs nothing but stored heat) and ``run`` (:mod:`dd.stages.label_by_run`, a trained segmenter).
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
    ``heat`` float64 [K, r, r] of the sample's classes where the labeler reads it, else None."""

    image: np.ndarray
    sample: Sample
    heat: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True)
class Labelled:
    """``mask`` uint8 [H, W] of class ids and 255; ``counts`` of what is worth telling, in pixels,
    as {"ties": 3}."""

    mask: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)


Label: TypeAlias = Callable[[list[Asked]], list[Labelled]]


@dataclass(frozen=True)
class Ready:
    """A labeler that has seen which images it is asked for.

    ``label`` of a batch; ``identity``: what decides a mask beside the image, ``supervision`` (the
    class of the masks, told with it) left out; ``settings``: those that decide; ``chosen_on``: the
    real labels behind the masks (:mod:`dd.evaluation.supervision`); ``made``: where it comes from,
    which decides nothing by itself (a model's name, its commit).
    """

    label: Label
    supervision: str
    identity: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    chosen_on: list[dict[str, Any]] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)


class Labeler(Protocol):
    """``name``: of the labeler, and of its mask set where the command gives none. ``batch_size``:
    images that it is shown at a time. ``reads``: (power, source) of the stored heat that it wants,
    or None.

    ``ready(images)`` says of a data set what its masks depend on; ValueError or FileNotFoundError
    before anything is written if it cannot label these images.
    """

    name: str
    batch_size: int
    reads: tuple[int, str] | None

    def ready(self, images: Images) -> Ready: ...


class ModelSettings(Settings):
    """Of a labeler that is a model of transformers. ``model``: a hub id with the ``revision`` (a
    commit), or a local folder; ``batch_size``: images at a time, fewer where they do not fit."""

    noun = "labeler"

    model: Annotated[str | None, NoResult("its weights are hashed")] = None
    revision: Annotated[str | None, NoResult("its weights are hashed")] = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    batch_size: Annotated[Count, NoResult("another one changes masks by rounding alone")] = 4


def in_parts(call: Callable[[list[Item]], list[Result]], batch: Sequence[Item]) -> list[Result]:
    """``call(batch)``, or one after the other where they do not fit into the device's memory
    together. ValueError if one alone does not."""
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
