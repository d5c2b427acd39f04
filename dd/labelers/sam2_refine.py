"""Segment Anything 2 on points from heat: attention says where a class is, SAM 2 where it ends
(recipe of T2S and others; Ravi et al., 2024, arXiv:2408.00714). Supervision D.

Shape letters: B images, K classes, N points, H W image size.
"""

from typing import Annotated, Any, ClassVar

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

INSIDE, OUTSIDE, NO_POINT = 1, 0, -10  # labels of points, as Sam2Model reads them


class Sam2Settings(ModelSettings):
    """``power`` and ``source`` of the heat; ``inside``, ``outside``, ``peak``, ``cold`` and
    ``distance``: which points (:func:`dd.masks.points.points`)."""

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
    """Each class of a sample is asked for by its points; one mask each, and of overlapping ones the
    mask whose predicted IoU is highest. A class whose heat is flat has no point and no pixel.
    ``settings``: :class:`Sam2Settings`."""

    Settings: ClassVar[type[Sam2Settings]] = Sam2Settings
    name = "sam2_refine"

    def __init__(self, device: str = "cpu", **settings: Any) -> None:
        self.settings, self.device = Sam2Settings(**settings), device
        self.loaded = load(SAM2, self.settings, device)
        self.batch_size = self.settings.batch_size
        self.reads = (self.settings.power, self.settings.source)

    @property
    def look(self) -> Look:
        """The published models' side is 1024; a smaller one says so in its configuration."""
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
                f"sam2_refine needs the heat of sample {asked.sample.id}, and it has none"
            )
        s = self.settings
        heat_Krr = torch.from_numpy(asked.heat)
        return points(heat_Krr, s.inside, s.outside, s.peak, s.cold, s.distance)

    @torch.inference_mode()
    def label(self, batch: list[Asked]) -> list[Labelled]:
        """Masks of a batch; memory that is not enough is an OutOfMemoryError of torch."""
        model, look = self.loaded.model, self.look
        found = [self.points(asked) for asked in batch]
        xy_BKN2, labels_BKN = prompts(
            [(p, asked.heat.shape[-1]) for p, asked in zip(found, batch, strict=True)],  # type: ignore[union-attr]
            look.side,
        )
        shown = seen([asked.image for asked in batch], look, self.device).to(model.dtype)
        out = model(
            pixel_values=shown,
            input_points=xy_BKN2.to(self.device, model.dtype),
            input_labels=labels_BKN.to(self.device),
            multimask_output=False,  # several points say which of its three masks is meant
        )
        rows = zip(batch, found, out.pred_masks[:, :, 0], out.iou_scores[:, :, 0], strict=True)
        return [_mask(*row) for row in rows]


def prompts(each: list[tuple[list[Points], int]], side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(points float [B, K, N, 2], labels [B, K, N]) for :class:`transformers.Sam2Model` of images
    whose classes have :class:`Points` on maps of so many cells; what an image has fewer of is
    padded. The model adds half a pixel to (x, y), so that the middle of a cell is half less."""
    classes = max(1, max(len(found) for found, _ in each))
    number = max([1, *(len(p.inside) + len(p.outside) for found, _ in each for p in found)])
    xy_BKN2 = torch.zeros(len(each), classes, number, 2)
    labels_BKN = torch.full((len(each), classes, number), NO_POINT)
    for b, (found, cells) in enumerate(each):
        for k, p in enumerate(found):
            here = centres([*p.inside, *p.outside], cells) * side - 0.5
            xy_BKN2[b, k, : len(here)] = here
            labels = [INSIDE] * len(p.inside) + [OUTSIDE] * len(p.outside)
            labels_BKN[b, k, : len(here)] = torch.tensor(labels, dtype=torch.long)
    return xy_BKN2, labels_BKN


def _mask(
    asked: Asked, found: list[Points], logits_Khw: torch.Tensor, iou_K: torch.Tensor
) -> Labelled:
    kept = [k for k, p in enumerate(found) if p.inside]
    logits_KHW = at_size(logits_Khw[kept], asked.size)
    # a claimed pixel has a score above 0, however low the model thinks of its mask
    scores_KHW = (logits_KHW > 0) * iou_K[kept].float().clamp(min=1e-6)[:, None, None]
    ids = [asked.sample.class_ids[k] for k in kept]
    resolved = resolve(scores_KHW.cpu().numpy(), ids, asked.size)
    return Labelled(resolved.mask, {"overlaps": resolved.overlaps, "ties": resolved.ties})
