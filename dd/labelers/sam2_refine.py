"""Segment Anything 2 on points from heat: attention says where a class is, SAM 2 where it ends
(recipe of T2S and others; Ravi et al., 2024, arXiv:2408.00714). Supervision D.

Shape letters: K classes, N points, H W image size.
"""

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import model_validator

from dd.labelers.base import Asked, Images, Labelled, ModelSettings, Ready, in_parts
from dd.labelers.loading import SAM2, load
from dd.labelers.pixels import SAM2 as LOOK
from dd.labelers.pixels import Look, at_size, seen
from dd.masks.from_heat import Source
from dd.masks.overlaps import resolve
from dd.masks.points import Points, centres, points
from dd.store.settings import Count, Hint, Natural, Share

INSIDE, OUTSIDE = 1, 0  # labels of points, as Sam2Model reads them


class Sam2Settings(ModelSettings):
    """``power`` and ``source`` of the heat; ``inside``, ``outside``, ``peak``, ``cold`` and
    ``distance`` select the points (:func:`dd.masks.points.points`)."""

    power: Natural = 4
    source: Source = "class_prompt"
    inside: Count = 3
    outside: Natural = 3
    peak: Annotated[Share, Hint("of a class's strongest cell")] = 0.8
    cold: Annotated[Share, Hint("of a class's strongest cell")] = 0.2
    distance: Count = 2

    @model_validator(mode="after")
    def _colder_than_peaks(self) -> "Sam2Settings":
        if self.cold >= self.peak:
            raise ValueError(f"labeler.cold={self.cold}: expected less than {self.peak} (peak)")
        return self


class Sam2Refine:
    """Prompts SAM 2 with the points of each class of a sample, and gets one mask for each. Where
    masks overlap, the one with the highest predicted IoU wins. A class whose heat is flat has no
    point and no pixel. ``settings``: :class:`Sam2Settings`."""

    Settings: ClassVar[type[Sam2Settings]] = Sam2Settings
    name = "sam2_refine"

    def __init__(self, device: str = "cpu", **settings: Any) -> None:
        self.settings, self.device = Sam2Settings(**settings), device
        self.loaded = load(SAM2, self.settings, device)
        self.batch_size = self.settings.batch_size
        self.reads = (self.settings.power, self.settings.source)

    @property
    def look(self) -> Look:
        """The published models' side is 1024; smaller ones give theirs in the configuration."""
        side = self.loaded.model.config.prompt_encoder_config.image_size
        return Look(int(side), LOOK.mean, LOOK.std)

    def ready(self, images: Images) -> Ready:
        return Ready(
            lambda batch: in_parts(self.label, batch),
            "D",
            {"weights_sha256": self.loaded.weights_sha256},
            self.settings.identity(),
            made=self.loaded.made,
        )

    def points(self, asked: Asked) -> list[Points]:
        """Points of each class of a sample. ValueError without heat."""
        if asked.heat is None:
            raise ValueError(
                f"sam2_refine needs the heat of sample {asked.sample.id}, but there is none"
            )
        s = self.settings
        heat_Krr = torch.from_numpy(asked.heat)
        return points(heat_Krr, s.inside, s.outside, s.peak, s.cold, s.distance)

    @torch.inference_mode()
    def label(self, batch: list[Asked]) -> list[Labelled]:
        """Masks of a batch; torch's OutOfMemoryError if memory is not enough."""
        model, look = self.loaded.model, self.look
        found = [self.points(asked) for asked in batch]
        shown = seen([asked.image for asked in batch], look, self.device).to(model.dtype)
        whole = model.get_image_embeddings(shown)
        made = []
        for i, (asked, own) in enumerate(zip(batch, found, strict=True)):
            image = [level[i : i + 1] for level in whole]
            cells = 0 if asked.heat is None else asked.heat.shape[-1]
            masks = [self._asked(image, p, cells) for p in own if p.inside]
            made.append(_mask(asked, own, masks))
        return made

    def _asked(
        self, image: list[torch.Tensor], p: Points, cells: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [h, w], predicted IoU) of a class with points on a map of ``cells`` cells.
        Classes are prompted one by one: SAM 2's decoder also attends to the padding of a shorter
        list of points, so a mask would depend on the other classes and images."""
        model = self.loaded.model
        xy_11N2, labels_11N = prompt(p, cells, self.look.side)
        out = model(
            image_embeddings=image,
            input_points=xy_11N2.to(self.device, model.dtype),
            input_labels=labels_11N.to(self.device),
            multimask_output=False,  # with several points the model needs no alternatives
        )
        return out.pred_masks[0, 0, 0], out.iou_scores[0, 0, 0]


def prompt(p: Points, cells: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(points float [1, 1, N, 2], labels [1, 1, N]) for :class:`transformers.Sam2Model`, for a
    class with points on a map of ``cells`` cells. The model adds half a pixel to (x, y), so half a
    pixel is subtracted here."""
    xy_N2 = centres([*p.inside, *p.outside], cells) * side - 0.5
    labels = [INSIDE] * len(p.inside) + [OUTSIDE] * len(p.outside)
    return xy_N2[None, None], torch.tensor(labels, dtype=torch.long)[None, None]


def _mask(
    asked: Asked, found: list[Points], masks: list[tuple[torch.Tensor, torch.Tensor]]
) -> Labelled:
    if not masks:
        return Labelled(np.zeros(asked.size, np.uint8), {"overlaps": 0, "ties": 0})
    logits_Khw, iou_K = (torch.stack(part) for part in zip(*masks, strict=True))
    logits_KHW = at_size(logits_Khw, asked.size)
    # a claimed pixel gets a score above 0, however low the predicted IoU of its mask
    scores_KHW = (logits_KHW > 0) * iou_K.float().clamp(min=1e-6)[:, None, None]
    ids = [c for c, p in zip(asked.sample.class_ids, found, strict=True) if p.inside]
    resolved = resolve(scores_KHW.cpu().numpy(), ids, asked.size)
    return Labelled(resolved.mask, {"overlaps": resolved.overlaps, "ties": resolved.ties})
