"""Augmentation and resizing with mmsegmentation's own transforms: RGB in and out (BGR inside, as
they expect)."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Gt, Le, Len
from PIL import Image, ImageFilter
from pydantic import field_validator

from dd.segmenters._compiled_ops import install_placeholder

install_placeholder()  # before the first import of mmseg

from mmcv.transforms import RandomResize  # noqa: E402
from mmseg.datasets.transforms import PhotoMetricDistortion, RandomCrop  # noqa: E402
from mmseg.datasets.transforms.transforms import RandomFlip, Resize  # noqa: E402

from dd.segmenters.base import MEAN  # noqa: E402
from dd.store.settings import Count, Settings, Share  # noqa: E402

SIGMA = (0.15, 1.15)  # pixels, of a student's blur


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed numpy's and Python's global generators, which the transforms use, and restore both at
    the end."""
    before = np.random.get_state(), random.getstate()
    np.random.seed(np.random.SeedSequence(seed).generate_state(4))  # accepts seeds of any length
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before[0])
        random.setstate(before[1])


def _bgr(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image: expected uint8 RGB [H, W, 3], got {image.dtype} {image.shape}; "
            "convert('RGB') first"
        )
    return np.ascontiguousarray(image[:, :, ::-1])


def _rgb_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)))


class CutSettings(Settings):
    """How an image becomes a square.

    ``scale``: the short side in pixels before the random ratio; the long side is limited to four
    times as much, as in mmsegmentation's (2048, 512). ``ratio_range``: of the random size.
    ``crop_size``: side of the square result. ``flip``: probability of a mirror image.
    """

    noun: ClassVar[str] = "transform"
    scale: Count
    ratio_range: Annotated[Sequence[Annotated[float, Gt(0)]], Len(2, 2)] = (0.5, 2.0)
    crop_size: Count = 512
    flip: Share = 0.5

    @field_validator("ratio_range")
    @classmethod
    def _ordered(cls, value: Sequence[float]) -> Sequence[float]:
        if value[0] > value[1]:
            raise ValueError(f"{tuple(value)}: expected the smaller number first")
        return value


class TrainSettings(CutSettings):
    """``cat_max_ratio``: a crop in which one class fills more than this share is drawn again, up to
    ten times (1 = never). ``photometric``: vary brightness, contrast, saturation and hue.
    ``ignore_index``: the label of padding."""

    cat_max_ratio: Annotated[float, Gt(0), Le(1)] = 0.75
    photometric: bool = True
    ignore_index: int = 255


class TrainTransform:
    """mmsegmentation's training pipeline: RandomResize, RandomCrop, RandomFlip,
    PhotoMetricDistortion, padding. ``settings``: :class:`TrainSettings`."""

    Settings = TrainSettings

    def __init__(self, **settings: Any) -> None:
        chosen = TrainSettings(**settings)
        self.crop_size, self.ignore_index = chosen.crop_size, chosen.ignore_index
        self.transforms = [
            RandomResize(
                (4 * chosen.scale, chosen.scale),
                ratio_range=tuple(chosen.ratio_range),
                resize_type=Resize,
                keep_ratio=True,
            ),
            RandomCrop(
                chosen.crop_size,
                cat_max_ratio=chosen.cat_max_ratio,
                ignore_index=chosen.ignore_index,
            ),
            RandomFlip(prob=chosen.flip),
            *([PhotoMetricDistortion()] if chosen.photometric else []),
        ]

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 RGB [H, W, 3] and uint8 [H, W] -> float32 RGB [3, crop, crop] in 0..255 and int64
        [crop, crop].

        The result depends on the arguments alone. The global random states are restored (not
        thread-safe: use worker processes). If the image is smaller than the crop, the crop is
        padded on the right and bottom: the mask with ``ignore_index``, the image with the mean
        colour, which normalisation turns into 0, mmsegmentation's padding.
        """
        if mask.dtype != np.uint8 or mask.shape != image.shape[:2]:
            raise ValueError(
                f"mask: expected uint8 {image.shape[:2]}, like the image, "
                f"got {mask.dtype} {mask.shape}"
            )
        results: dict[str, Any]
        results = {"img": _bgr(image), "gt_seg_map": mask, "seg_fields": ["gt_seg_map"]}
        with _seeded(seed):
            for transform in self.transforms:
                results = transform(results)
        side, labels = self.crop_size, np.ascontiguousarray(results["gt_seg_map"])
        height, width = labels.shape
        padded_image = torch.tensor(MEAN).view(3, 1, 1).repeat(1, side, side)
        padded_mask = torch.full((side, side), self.ignore_index, dtype=torch.int64)
        padded_image[:, :height, :width] = _rgb_tensor(results["img"])
        padded_mask[:height, :width] = torch.from_numpy(labels)
        return padded_image, padded_mask


class TwoViewsSettings(CutSettings):
    """``blur``: probability of a blurred student's view (sigma 0.15 to 1.15 pixels). ``grey``:
    probability of a grey one."""

    noun: ClassVar[str] = "self_training.transform"
    blur: Share = 0.5
    grey: Share = 0.2


class TwoViews:
    """Two views of a photograph. The teacher's is resized, cropped and mirrored like
    :class:`TrainTransform`. The student's has in addition other brightness, contrast, saturation
    and hue, and is at times blurred or grey, following DACS (Tranheden et al. 2021,
    arXiv:2007.08702). ``settings``: :class:`TwoViewsSettings`."""

    Settings = TwoViewsSettings

    def __init__(self, **settings: Any) -> None:
        chosen = TwoViewsSettings(**settings)
        cut = {name: getattr(chosen, name) for name in CutSettings.model_fields}
        self.cut = TrainTransform(**cut, cat_max_ratio=1.0, photometric=False)
        self.blur, self.grey, self.change = chosen.blur, chosen.grey, PhotoMetricDistortion()

    def __call__(
        self, photo: np.ndarray, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """uint8 RGB [H, W, 3] -> the teacher's view and the student's, float32 RGB [3, crop, crop]
        in 0..255, and bool [crop, crop]: false where the crop exceeds the photograph. Depends on
        the arguments alone."""
        shown, mask = self.cut(photo, np.zeros(photo.shape[:2], np.uint8), seed)
        known, rng = mask == 0, np.random.default_rng([seed, 8])
        pixels = np.ascontiguousarray(shown.numpy().transpose(1, 2, 0).astype(np.uint8)[:, :, ::-1])
        with _seeded(seed + 1):
            pixels = self.change({"img": pixels})["img"][:, :, ::-1]
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        if rng.random() < self.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*SIGMA)))
        if rng.random() < self.grey:
            picture = picture.convert("L").convert("RGB")
        changed = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
        return shown, torch.where(known, changed, shown), known


class EvalTransform:
    """mmsegmentation's test pipeline, Resize((max_long, short_side), keep_ratio=True), for the
    image only.

    The short side becomes ``short_side`` pixels, or fewer if the long side would exceed
    ``max_long``. Masks are not resized; predictions are resized back to the original size instead.
    """

    def __init__(self, short_side: int, max_long: int = 2048) -> None:
        if not 1 <= short_side <= max_long:
            raise ValueError(f"{short_side=}, {max_long=}: expected 1 <= short_side <= max_long")
        self.short_side = short_side
        self.resize = Resize(scale=(max_long, short_side), keep_ratio=True)

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        """uint8 RGB [H, W, 3] -> uint8 RGB [3, h, w]."""
        return _rgb_tensor(self.resize({"img": _bgr(image)})["img"])
