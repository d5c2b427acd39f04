"""A data set in PASCAL VOC layout and of VOC's sizes, made of noise: what a loader reads costs
what photographs cost."""

from pathlib import Path

import cv2
import numpy as np

from dd.data.datasets import encode_image, encode_mask, write_split

SIZES = (
    (375, 500),
    (333, 500),
    (500, 375),
    (375, 500),
)  # height, width: most of VOC's images are of one of these
CLASSES = 21


def labels(rng, size) -> np.ndarray:
    """Mask uint8 of background and up to three objects, each with a border of 255, as VOC draws
    them."""
    mask = np.zeros(size, np.uint8)
    for class_id in rng.integers(1, CLASSES, rng.integers(1, 4)):
        centre = [int(rng.integers(0, n)) for n in size[::-1]]
        axes = [int(rng.integers(20, 160)) for _ in range(2)]
        angle = float(rng.integers(0, 180))
        cv2.ellipse(mask, centre, axes, angle, 0, 360, int(class_id), -1)
        cv2.ellipse(mask, centre, axes, angle, 0, 360, 255, 5)
    return mask


def photograph(rng, size) -> np.ndarray:
    """Smooth noise of several scales, uint8 [H, W, 3]: a JPEG of some 100 kB, as in VOC."""
    image = np.full((*size, 3), 128, np.float32)
    for cells, strength in ((4, 60), (16, 40), (64, 25), (200, 10)):
        noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC)
    return image.clip(0, 255).astype(np.uint8)


def write_voc(folder, number: int, split: str = "train", seed: int = 0) -> Path:
    """Write ``number`` images and masks and the list ``split``; returns ``folder``."""
    folder, ids = Path(folder), [f"{split}_{i:06d}" for i in range(number)]
    for part in ("JPEGImages", "SegmentationClass"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(ids):
        rng = np.random.default_rng([seed, i])
        size = SIZES[i % len(SIZES)]
        (folder / "JPEGImages" / f"{name}.jpg").write_bytes(
            encode_image(photograph(rng, size), ".jpg")
        )
        (folder / "SegmentationClass" / f"{name}.png").write_bytes(encode_mask(labels(rng, size)))
    write_split(folder, split, ids)
    return folder
