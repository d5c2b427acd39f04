"""What all segmenters share: the interface, the expected colours, the checks of a batch, parameter
groups, batch norm."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from dd.store.settings import Hint, Settings

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet in RGB, 0..255
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
SYNC_BN = Hint("which is synchronised when there is more than one GPU")


@runtime_checkable
class Segmenter(Protocol):
    """What training and prediction need from a network, a ``torch.nn.Module``.

    ``images`` are [B, 3, H, W], RGB, 0..255 (not normalised), uint8 or float, of any H and W.
    ``labels`` are int64 [B, H, W]: 0 (background) to the number of classes minus one, or the label
    without a loss (255).

    ``files``: {what: SHA-256} of files that were read, such as ``pretrained``.
    """

    files: dict[str, str]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float logits [B, classes, H, W] at the size of ``images``: a softmax over the classes
        makes them probabilities. In ``eval()`` an image's logits do not depend on its batch."""

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """``loss``, a scalar to minimise that depends on every parameter, and its named parts.
        ValueError for labels with other values, types or sizes."""

    def parameter_groups(
        self, learning_rate: float, weight_decay: float, backbone_multiplier: float = 0.1
    ) -> list[dict[str, Any]]:
        """Groups for a torch optimiser that hold every trained parameter once, each with its
        ``name``, ``lr`` (for the backbone, ``backbone_multiplier`` times that of the rest) and
        ``weight_decay``."""

    # methods of torch.nn.Module
    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...
    def eval(self) -> Self: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def buffers(self) -> Iterator[torch.Tensor]: ...


@runtime_checkable
class Annealed(Protocol):
    """A segmenter whose training changes as it progresses."""

    def anneal(self, share: float) -> None:
        """Called before each step with the finished share of the steps, in [0, 1). It depends on
        the step alone, so a resumed training needs no saved state."""


class SegmenterSettings(Settings):
    """``pretrained``: source of the weights, None for random weights. ``sync_bn``: batch norm over
    all GPUs of a training, see :func:`synchronise`."""

    noun: ClassVar[str] = "segmenter"
    pretrained: str | None = None
    sync_bn: Annotated[bool | Literal["auto"], SYNC_BN] = "auto"


class SegmenterModule(nn.Module):
    """A :class:`Segmenter` except for ``forward``, ``loss`` and ``backbone``, the module with a
    learning rate of its own.

    ``num_classes``: background included. ``ignore_index``: the label without a loss. Parameters of
    modules of the types ``undecayed``, or whose names end with one of ``undecayed_names``, have no
    weight decay.
    """

    undecayed: ClassVar[tuple[type[nn.Module], ...]] = ()
    undecayed_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"num_classes={num_classes}: at least 2 are needed, background included"
            )
        if 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index={ignore_index} is also one of the {num_classes} classes "
                f"(0..{num_classes - 1}); choose a value outside, such as 255, and at most 255 "
                "classes for 8-bit masks"
            )
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.files: dict[str, str] = {}
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(images - mean) / std. ValueError for another shape, and for a single image in
        training mode."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected [B, 3, H, W], RGB, 0..255"
            )
        if self.training and len(images) == 1:
            raise ValueError(
                "got a batch of one image in training mode: batch norm needs two or more on each "
                "GPU, also where it is synchronised; use a larger batch (with drop_last) or fewer "
                "GPUs, or model.eval()"
            )
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def check_labels(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """ValueError unless ``labels`` is int64 [B, H, W] of classes and ``ignore_index``."""
        expected = (len(images), *images.shape[2:])
        if labels.dtype != torch.int64 or tuple(labels.shape) != expected:
            raise ValueError(
                f"labels: expected int64 {expected}, got {labels.dtype} {tuple(labels.shape)}"
            )
        wrong = ((labels < 0) | (labels >= self.num_classes)) & (labels != self.ignore_index)
        # on a GPU an unchecked label triggers a device assertion, after which nothing works
        if wrong.any():
            raise ValueError(
                f"labels hold the values {labels[wrong].unique()[:8].tolist()}; allowed: "
                f"0..{self.num_classes - 1}, and {self.ignore_index} to ignore a pixel. Do the "
                "masks belong to this model's classes?"
            )

    def pixel_loss(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross-entropy of the logits of ``images``, the mean over the pixels that are not ignored
        (0 if all are): ``decode.loss_ce`` and ``loss``."""
        self.check_labels(images, labels)
        total = F.cross_entropy(
            self(images).float(), labels, ignore_index=self.ignore_index, reduction="sum"
        )
        loss = total / (labels != self.ignore_index).sum().clamp(min=1)
        return {"decode.loss_ce": loss, "loss": loss}

    def parameter_groups(
        self, learning_rate: float, weight_decay: float, backbone_multiplier: float = 0.1
    ) -> list[dict[str, Any]]:
        """Groups for a torch optimiser: the backbone learns at ``backbone_multiplier`` times the
        rate of the heads, and ``undecayed`` parameters have no weight decay."""
        inside = {id(p) for p in self.backbone.parameters()}
        light = {
            id(p)
            for m in self.modules()
            if isinstance(m, self.undecayed)
            for p in m.parameters(recurse=False)
        }
        light |= {id(p) for n, p in self.named_parameters() if n.endswith(self.undecayed_names)}
        rates = {"backbone": learning_rate * backbone_multiplier, "heads": learning_rate}
        groups: dict[str, dict[str, Any]] = {
            part + suffix: {"name": part + suffix, "params": [], "lr": rate, "weight_decay": decay}
            for part, rate in rates.items()
            for suffix, decay in (("", weight_decay), ("_no_decay", 0.0))
        }
        for p in self.parameters():
            if p.requires_grad:
                part = "backbone" if id(p) in inside else "heads"
                groups[part + "_no_decay" * (id(p) in light)]["params"].append(p)
        return [group for group in groups.values() if group["params"]]


def padded(images: torch.Tensor, multiple: int) -> torch.Tensor:
    """Normalised images [B, 3, H, W], padded on the right and bottom to multiples of ``multiple``
    with zeros, the mean colour."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def synchronise(module: nn.Module, sync_bn: bool | str) -> nn.Module:
    """Batch norm over all GPUs of a training, unless ``sync_bn`` is False.

    ``auto`` (same as True): torch's SyncBatchNorm, which acts as plain batch norm if there is only
    one process.
    """
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if sync_bn else module
