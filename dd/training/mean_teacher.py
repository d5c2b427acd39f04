"""Self-training on unlabelled photographs: the average of a segmenter's weights makes the labels
that the segmenter is trained on."""

from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from torch import nn

from dd.segmenters.base import Segmenter
from dd.store.settings import Hint, Settings, Share
from dd.taxonomy import IGNORE


class MeanTeacherSettings(Settings):
    """``confidence``: pixels whose strongest class has a smaller probability get no label.
    ``per_class``: scale the threshold of each class by the mean probability of the pixels that the
    teacher assigns to it, over the largest such mean of all classes (running means with
    ``momentum``; the scaling of FreeMatch, Wang et al. 2023, arXiv:2205.07246), so that hard
    classes are not left out for ever. ``mix``: paste half of the classes of each labelled image,
    with their labels, onto a photograph (ClassMix, Olsson et al. 2021, arXiv:2007.07936).
    ``weight``: of the loss on photographs, relative to that on labelled images.
    """

    noun: ClassVar[str] = "self_training.teacher"
    confidence: Share = 0.9
    per_class: bool = True
    mix: bool = True
    weight: Annotated[float, Gt(0), Hint("or self_training=off for none")] = 1.0
    momentum: Share = 0.99


class MeanTeacher(nn.Module):
    """Pseudo-labels of a mean teacher (Tarvainen and Valpola 2017, arXiv:1703.01780) for semantic
    segmentation. ``settings``: :class:`MeanTeacherSettings`."""

    Settings = MeanTeacherSettings

    def __init__(self, num_classes: int, **settings: Any) -> None:
        super().__init__()
        self.settings = MeanTeacherSettings(**settings)
        # mean probability of the pixels assigned to each class
        self.register_buffer("certainty", torch.ones(num_classes))

    def thresholds(self) -> torch.Tensor:
        """The smallest probability [K] with which a pixel is assigned to each class."""
        certainty = self.certainty
        relative = certainty / certainty.max()
        share = relative if self.settings.per_class else torch.ones_like(certainty)
        return self.settings.confidence * share

    @torch.no_grad()
    def labels(self, teacher: Segmenter, photos: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Labels int64 [B, H, W] of ``photos`` [B, 3, H, W]: the teacher's class where ``teacher``
        is sure, else 255; 255 where ``known`` [B, H, W] is false (padding). Each call updates the
        running means."""
        teacher.eval()
        best, ids = teacher(photos).float().softmax(1).max(1)
        self._count(best[known], ids[known])
        return ids.masked_fill((best < self.thresholds()[ids]) | ~known, IGNORE)

    def _count(self, best: torch.Tensor, ids: torch.Tensor) -> None:
        sums = self.certainty.new_zeros(2, len(self.certainty))  # of probabilities, of pixels
        sums[0].index_add_(0, ids, best)
        sums[1].index_add_(0, ids, torch.ones_like(best))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        total, number = sums
        momentum = self.settings.momentum
        moved = momentum * self.certainty + (1 - momentum) * total / number.clamp(min=1)
        self.certainty.copy_(torch.where(number > 0, moved, self.certainty))


def class_mix(
    images: torch.Tensor, labels: torch.Tensor, photos: torch.Tensor, pseudo: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Photographs [B, 3, H, W] and their labels [B, H, W], with half (rounded up) of the classes of
    each labelled image pasted onto one photograph; background counts as a class. The choice comes
    from torch's random state."""
    pasted = torch.zeros_like(labels, dtype=torch.bool)
    for mask, label in zip(pasted, labels, strict=True):
        classes = label.unique()
        classes = classes[classes != IGNORE]
        chosen = classes[torch.randperm(len(classes))[: (len(classes) + 1) // 2].to(classes.device)]
        mask.copy_(torch.isin(label, chosen))
    return torch.where(pasted[:, None], images, photos), torch.where(pasted, labels, pseudo)
