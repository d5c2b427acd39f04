"""Segmentation data sets on disk in PASCAL VOC layout: read, check, write, choose shots."""

import io
import json
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dd.provenance import write_atomic
from dd.taxonomy import IGNORE, voc_palette

IMAGE_SUFFIXES = (".jpg", ".png")
JPEG_QUALITY = 95


def encode_image(pixels: np.ndarray, suffix: str) -> bytes:
    """Image uint8 [H, W, 3] as PNG or as JPEG of quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    if suffix == ".jpg":
        Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    elif suffix == ".png":
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    else:
        raise ValueError(f"image format {suffix!r}; allowed: {', '.join(IMAGE_SUFFIXES)}")
    return buffer.getvalue()


def encode_mask(mask: np.ndarray) -> bytes:
    """Mask uint8 [H, W] as a palette PNG with VOC's colours."""
    image = Image.fromarray(mask)
    image.putpalette(voc_palette())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def read_image(path: str | Path) -> np.ndarray:
    """Image uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def read_mask(path: str | Path) -> np.ndarray:
    """Class ids uint8 [H, W] of a palette or grey PNG; ValueError for a colour image, whose ids are lost."""
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"mask {path} has mode {image.mode}; a mask holds one class id per pixel (mode P or L)")
        return np.asarray(image)


def read_split(root: str | Path, split: str) -> list[str]:
    """Ids of a split in ``ImageSets/Segmentation``. Errors name the splits there are; no id leaves the folder."""
    folder = Path(root) / "ImageSets" / "Segmentation"
    path = folder / f"{split}.txt"
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"no data set at {root}. The embedded ones are made by: python -m dd prepare shapes. "
            "Synthetic ones are made by generate.py; for your own, set data.root"
        )
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"data set {root} has no split {split!r} ({path}); splits there: {known}")
    ids = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    bad = [i for i in ids if PurePosixPath(i).is_absolute() or ".." in PurePosixPath(i).parts or "\\" in i]
    if bad:
        raise ValueError(f"{path}: id {bad[0]!r} would leave the data set's folder")
    if not ids:
        raise ValueError(f"{path} is empty")
    return ids


def choose_shots(ids: list[str], shots: int | None, seed: int) -> list[str]:
    """``shots`` ids chosen by seed, nested: fewer shots are the first of more. None = all of them."""
    if shots is None:
        return list(ids)
    if not 1 <= shots <= len(ids):
        raise ValueError(f"shots={shots}, but the split holds {len(ids)} images; choose 1 to {len(ids)}, or null for all")
    order = np.random.default_rng([seed, 3]).permutation(len(ids))
    return [ids[i] for i in order[:shots]]


class SegmentationFolder:
    """Images and masks of one split of a VOC-layout folder.

    ``data[i]`` is (image uint8 [H, W, 3], mask uint8 [H, W]); mask values are class ids of ``taxonomy`` or 255. ``masks``
    names the mask folder (``SegmentationClass``, or ``masks/<set>`` of a synthetic set). FileNotFoundError for missing parts,
    ValueError for a mask of another size than its image or with values outside the classes.
    """

    def __init__(self, root, split: str, taxonomy, masks: str = "SegmentationClass", shots: int | None = None, seed: int = 0):
        self.root, self.split, self.taxonomy, self.masks = Path(root), split, taxonomy, masks
        self.ids = choose_shots(read_split(root, split), shots, seed)
        if not (self.root / masks).is_dir():
            raise FileNotFoundError(
                f"data set {root} has no masks in {masks}. For a synthetic set run generate.py with stage=label; for real "
                "data check data.root and data.masks"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def image_path(self, name: str) -> Path:
        for suffix in IMAGE_SUFFIXES:
            path = self.root / "JPEGImages" / (name + suffix)
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"no image {name} (.jpg or .png) in {self.root / 'JPEGImages'}, listed in split {self.split!r}"
        )

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        name = self.ids[index]
        image, path = read_image(self.image_path(name)), self.root / self.masks / f"{name}.png"
        if not path.is_file():
            raise FileNotFoundError(f"no mask {path}, listed in split {self.split!r}")
        mask = read_mask(path)
        if mask.shape != image.shape[:2]:
            raise ValueError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, its image {image.shape[1]}x{image.shape[0]}")
        outside = sorted(set(np.unique(mask).tolist()) - set(range(len(self.taxonomy))) - {IGNORE})
        if outside:
            raise ValueError(
                f"{path} holds values {outside[:10]} outside the {len(self.taxonomy)} classes of taxonomy "
                f"{self.taxonomy.name!r} (0 to {len(self.taxonomy) - 1}, {IGNORE} = ignored). Is it made for other classes?"
            )
        return image, mask

    def fingerprint(self) -> dict:
        """What a run records of its data: folder name, split, masks and number of images."""
        return {"root": self.root.name, "split": self.split, "masks": self.masks, "images": len(self)}


def write_split(root: str | Path, split: str, ids: list[str]) -> None:
    write_atomic(Path(root) / "ImageSets" / "Segmentation" / f"{split}.txt", "".join(f"{i}\n" for i in ids))


def read_captions(root: str | Path) -> dict[str, dict]:
    """``captions.jsonl`` of a data set by id: {"id", "caption", "classes"}."""
    path = Path(root) / "captions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"data set {root} has no captions.jsonl: its images cannot be shown to the generator")
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
