"""What every segmenter here shares: the colours it expects, the checks of a batch, its groups of
parameters, batch norm."""

import torch
from torch import nn

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet in RGB, 0..255
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class Segmenter(nn.Module):
    """Images [B, 3, H, W], RGB, 0..255, uint8 or float -> ``forward``: logits [B, num_classes, H,
    W]; ``loss(images, labels)``: a dictionary with ``loss`` and its named parts;
    ``parameter_groups(...)`` for a torch optimiser.

    ``num_classes``: background included. ``ignore_index``: the label without a loss. ``files``:
    {what: SHA-256} of what was read beside the arguments: ``pretrained`` weights, a ``config``.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, mean=MEAN, std=STD):
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"num_classes={num_classes}: at least 2 are needed, background included"
            )
        if 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index={ignore_index} is also one of the {num_classes} classes "
                f"(0..{num_classes - 1}); "
                f"choose a value outside them, as 255, and at most 255 classes for 8-bit masks"
            )
        self.num_classes, self.ignore_index, self.files = num_classes, ignore_index, {}
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
                "GPU, also where it is "
                "synchronised; use a larger batch (with drop_last) or fewer GPUs, or model.eval()"
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
        if (
            wrong.any()
        ):  # on a GPU an unchecked label is an assertion in the device, after which nothing works
            raise ValueError(
                f"labels hold the values {labels[wrong].unique()[:8].tolist()}; allowed: "
                f"0..{self.num_classes - 1}, "
                f"and {self.ignore_index} to ignore a pixel. Do the masks belong to this model's "
                "classes?"
            )


def synchronise(module: nn.Module, sync_bn: bool | str) -> nn.Module:
    """Batch norm over all GPUs of a training, unless ``sync_bn`` is False.

    ``auto`` (True is the same): torch's SyncBatchNorm, which is plain batch norm where there is one
    process only.
    """
    if sync_bn not in (True, False, "auto"):
        raise ValueError(
            f"sync_bn={sync_bn!r}; allowed: auto (synchronised when there is more than one GPU), "
            "false"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if sync_bn else module


def parameter_groups(
    model: nn.Module,
    backbone: nn.Module,
    learning_rate: float,
    weight_decay: float,
    backbone_multiplier: float,
    undecayed: tuple = (),
    undecayed_names: tuple[str, ...] = (),
) -> list[dict]:
    """Groups for a torch optimiser: the backbone learns at ``backbone_multiplier`` times the
    rate of the heads; parameters of modules of the types ``undecayed``, or whose names end with
    one of ``undecayed_names``, have no weight decay."""
    inside = {id(p) for p in backbone.parameters()}
    light = {
        id(p)
        for m in model.modules()
        if isinstance(m, undecayed)
        for p in m.parameters(recurse=False)
    }
    light |= {
        id(p)
        for name, p in model.named_parameters()
        if undecayed_names and name.endswith(undecayed_names)
    }
    groups = []
    for name, rate in (("backbone", learning_rate * backbone_multiplier), ("heads", learning_rate)):
        mine = [
            p
            for p in model.parameters()
            if p.requires_grad and (id(p) in inside) == (name == "backbone")
        ]
        parts = {
            name: [p for p in mine if id(p) not in light],
            f"{name}_no_decay": [p for p in mine if id(p) in light],
        }
        for part, params in parts.items():
            decay = 0.0 if part.endswith("_no_decay") else weight_decay
            groups += (
                [{"name": part, "params": params, "lr": rate, "weight_decay": decay}]
                if params
                else []
            )
    return groups
