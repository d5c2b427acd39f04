"""Segmentation data sets on disk in PASCAL VOC layout: read, check, write, choose shots."""

import io
import json
import os
import struct
import zlib
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dd.provenance import fingerprint, read_json, read_own, sha256, write_atomic
from dd.samples import recorded
from dd.schemas import DATASET, MASKS
from dd.taxonomy import IGNORE, Taxonomy, voc_palette

IMAGE_SUFFIXES = (".jpg", ".png")  # what we write
READ_SUFFIXES = (*IMAGE_SUFFIXES, ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
READ_SUFFIXES += tuple(suffix.upper() for suffix in READ_SUFFIXES)
RECORD = "dataset.json"  # of a prepared data set, written last: where its images lie, what its masks were made from
JPEG_QUALITY = 95
ORIENTATION = 0x0112  # EXIF
NAME_LIMIT = 200  # bytes of a file's name, suffixes and a temporary name left room for


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


VOC_COLOURS = bytes(voc_palette())


def encode_mask(mask: np.ndarray, palette: list[int] | None = None) -> bytes:
    """Mask uint8 [H, W] as a palette PNG, with VOC's colours unless others are given."""
    image = Image.fromarray(mask)
    image.putpalette(palette or VOC_COLOURS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


@contextmanager
def opened(path: str | Path):
    """Pillow's image of a file; whatever it says of one that it cannot decode becomes a ValueError with the file's name.
    Images of more than 179 million pixels are refused (Pillow's limit against decompression bombs)."""
    try:
        with Image.open(path) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is refused: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, MemoryError) as error:
        if getattr(error, "errno", None) is not None or (type(error) is ValueError and str(path) in str(error)):
            raise  # of the file system, or ours
        raise ValueError(f"{path} is damaged, or no image: {error!s:.200}. Restore it from a copy or make it again") from None


def rgb(image: Image.Image) -> Image.Image:
    """Any image of Pillow's in RGB: of 16-bit grey the high byte (Pillow would make all of it from 255 on white), transparent
    pixels on white, CMYK without a profile."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(path: str | Path) -> np.ndarray:
    """Image uint8 [H, W, 3]; ValueError for a file that cannot be decoded."""
    with opened(path) as image:
        return np.asarray(rgb(image))


def image_size(path: str | Path, upright: bool = False) -> tuple[int, int]:
    """(height, width) of an image, from its header: of the pixels as they are stored, or ``upright`` by EXIF."""
    with opened(path) as image:
        size = image.height, image.width
        return size[::-1] if upright and orientation(image) >= 5 else size


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an open image: 1 is upright, with 5 and more the sides change places; 1 where it says none."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error, OSError):  # EXIF data that cannot be read say nothing
        return 1
    return found if found in range(1, 9) else 1


def read_labelled(path: str | Path, size: tuple[int, int], upright: bool) -> np.ndarray:
    """Image uint8 [H, W, 3] as its mask of ``size`` (height, width) was drawn on it: upright by EXIF if only then the sizes
    agree; where they agree both ways (square, mirrored or upside down), as ``upright`` says."""
    with opened(path) as image:
        turn, stored = orientation(image), (image.height, image.width)
        turned = stored[::-1] if turn >= 5 else stored
        if turn > 1 and tuple(size) == turned and (upright or turned != stored):
            image = ImageOps.exif_transpose(image)
        return np.asarray(rgb(image))


def read_mask(path: str | Path) -> np.ndarray:
    """Class ids uint8 [H, W] of a palette or grey PNG; ValueError for a colour image, whose ids are lost."""
    with opened(path) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"mask {path} has mode {image.mode}; a mask holds one class id per pixel (mode P or L)")
        return np.asarray(image)


def read_coloured_mask(path: str | Path, taxonomy: Taxonomy) -> np.ndarray:
    """Class ids uint8 [H, W] of a mask: palette and grey PNGs hold them, colours are those of the taxonomy.

    ValueError names the colours that no class, background or 255 has.
    """
    with opened(path) as image:
        if image.mode not in ("RGB", "RGBA"):
            return read_mask(path)
        pixels = np.asarray(image).astype(np.int32)
    if pixels.shape[2] == 4 and (pixels[..., 3] != 255).any():
        raise ValueError(f"mask {path} is transparent in places; a colour mask must be opaque")
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    ids = {tuple(taxonomy.palette[3 * i : 3 * i + 3]): i for i in (*range(len(taxonomy)), IGNORE)}
    found, inverse = np.unique(codes, return_inverse=True)
    colours = [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in found]
    unknown = [list(c) for c in colours if c not in ids]
    if unknown:
        raise ValueError(
            f"mask {path} has {len(unknown)} colours that no class of taxonomy {taxonomy.name!r} has, such as {unknown[:5]}; "
            "give the classes their colours in the taxonomy file"
        )
    return np.array([ids[c] for c in colours], np.uint8)[inverse].reshape(codes.shape)


def check_values(mask: np.ndarray, taxonomy: Taxonomy, path) -> None:
    """ValueError names the file and its values that are neither a class nor 255."""
    outside = sorted(set(np.unique(mask).tolist()) - set(range(len(taxonomy))) - {IGNORE})
    if outside:
        raise ValueError(
            f"{path} holds values {outside[:10]} outside the {len(taxonomy)} classes of taxonomy "
            f"{taxonomy.name!r} (0 to {len(taxonomy) - 1}, {IGNORE} = ignored). Is it made for other classes?"
        )


def read_split(root: str | Path, split: str) -> list[str]:
    """Ids of a split in ``ImageSets/Segmentation``. Errors name the splits there are; no id leaves the folder."""
    folder = Path(root) / "ImageSets" / "Segmentation"
    path = folder / f"{split}.txt"
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"no data set at {root}. Real ones are made by: python -m dd prepare shapes (or voc, voc_aug, coco, own; see "
            "docs/data.md), synthetic ones by generate.py; another folder in VOC layout: set data.root"
        )
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"data set {root} has no split {split!r} ({path}); splits there: {known}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None
    whole = (Path(root) / RECORD).is_file()  # our own lists hold one id a line, blanks included; the devkit's may go on
    ids = lines if whole else [line.split()[0] for line in lines]
    bad = [i for i in ids if PurePosixPath(i).is_absolute() or ".." in PurePosixPath(i).parts or "\\" in i]
    if bad:
        raise ValueError(f"{path}: id {bad[0]!r:.100} would leave the data set's folder")
    bad = [i for i in ids if "\0" in i or len(i) > 1000 or max(map(len, i.encode().split(b"/"))) > NAME_LIMIT]
    if bad:
        raise ValueError(f"{path}: {bad[0]!r:.100} cannot be the name of a file")
    if not ids:
        raise ValueError(f"{path} is empty; a split lists one image id a line. Write the list, or name another split")
    return ids


def choose_shots(ids: list[str], shots: int | None, seed: int) -> list[str]:
    """``shots`` ids chosen by seed, nested: fewer shots are the first of more. None = all of them."""
    if shots is None:
        return list(ids)
    if type(shots) is not int or not 1 <= shots <= len(ids):
        raise ValueError(f"shots={shots!r}, but the split holds {len(ids)} images; choose 1 to {len(ids)}, or null for all")
    order = np.random.default_rng([seed, 3]).permutation(len(ids))
    return [ids[i] for i in order[:shots]]


def image_folders(root: str | Path) -> list[Path]:
    """Where the images of a data set lie: ``JPEGImages``, then the folders of its record, which are never written to."""
    path, own = Path(root) / RECORD, Path(root) / "JPEGImages"
    recorded = [Path(root) / folder for folder in read_own(path, DATASET)["images"]] if path.is_file() else []
    return [own, *recorded] if own.is_dir() or not recorded else recorded


def check_recorded(folder: str | Path, key: str, name: str, path: Path) -> None:
    """ValueError if the file of sample ``name`` is not the one that the records of a synthetic set tell of. ``key``:
    ``image_sha256`` or ``heat_sha256``. A file that no record tells of passes: real images have none."""
    known = _recorded(Path(folder), key, _state(Path(folder) / "records")).get(name)
    if known is not None and sha256(path) != known:
        raise ValueError(
            f"{path} is not what its record says: it was damaged or changed. python -m dd verify {folder} names all that is, "
            "and how it heals"
        )


def check_mask(path: str | Path) -> None:
    """ValueError if a mask is not the one that masks.json beside it tells of; without a masks.json it passes."""
    path = Path(path)
    done = path.parent / "masks.json"
    known = _mask_hashes(done, _state(done)).get(path.stem) if done.is_file() else None
    if known is not None and sha256(path) != known:
        raise ValueError(
            f"{path} is not what masks.json beside it says: it was damaged or changed. Remove masks.json, and the command "
            "that made the masks (generate.py stage=label) makes them again"
        )


def _state(place: Path) -> tuple:
    """Of a file or the files of a folder: another one when they change, so that what was read of them is read again."""
    paths = [Path(entry.path) for entry in os.scandir(place)] if place.is_dir() else [place] * place.exists()
    return tuple((p.name, s.st_mtime_ns, s.st_size) for p in sorted(paths) if (s := p.stat()))


@lru_cache(maxsize=4)
def _recorded(folder: Path, key: str, _state) -> dict[str, str]:
    return recorded(folder, key)


@lru_cache(maxsize=4)
def _mask_hashes(done: Path, _state) -> dict[str, str]:
    return read_own(done, MASKS).get("sha256", {})


class SegmentationFolder:
    """Images and masks of one split of a VOC-layout folder.

    ``data[i]`` is (image uint8 [H, W, 3], mask uint8 [H, W]); mask values are class ids of ``taxonomy`` or 255. ``masks``
    names the mask folder (``SegmentationClass``, or ``masks/<set>`` of a synthetic set), ``images`` the folder or folders of
    the images (None = :func:`image_folders`). FileNotFoundError for missing parts, ValueError for a mask of another size than
    its image or with values outside the classes.

    An image with an EXIF orientation is turned upright if its mask has that size (:func:`read_labelled`), as tools show it to
    those who label. Where sizes cannot tell it is upright too, but for prepared data sets (with a dataset.json): they hold
    upright copies of what is to be turned, and masks of stored pixels for the rest.
    """

    def __init__(
        self, root, split: str, taxonomy, masks: str = "SegmentationClass", shots: int | None = None, seed: int = 0,
        images: str | Path | list | None = None,
    ):  # fmt: skip
        self.root, self.split, self.taxonomy, self.masks = Path(root), split, taxonomy, masks
        self.ids = choose_shots(read_split(root, split), shots, seed)
        given = [images] if isinstance(images, str | Path) else images
        self.images = image_folders(root) if given is None else [Path(f) for f in given]
        self.prepared, self._seen = (self.root / RECORD).is_file(), set()
        _check_classes(self.root, taxonomy)
        if not (self.root / masks).is_dir():
            raise FileNotFoundError(
                f"data set {root} has no masks in {masks}. For a synthetic set run generate.py with stage=label (masks of "
                "self-training: evaluate.py stage=self_train); for real data check data.root and data.masks"
            )
        self._check_list()

    def __len__(self) -> int:
        return len(self.ids)

    def _check_list(self) -> None:
        """ValueError if ``train`` of a synthetic set is not the list of all its masks: a part of it would train on less."""
        done = self.root / self.masks / "masks.json"
        if self.split != "train" or not done.is_file() or not (self.root / "plan.jsonl").is_file():
            return
        known, listed = _mask_hashes(done, _state(done)), read_split(self.root, self.split)
        if known and listed != list(known):
            raise ValueError(
                f"{self.root}: ImageSets/Segmentation/train.txt lists {len(listed)} samples, {self.masks}/masks.json tells of "
                f"{len(known)}, or of others. The same generate.py command makes list and masks anew; a part of a set is a "
                "list of another name"
            )

    def unchecked(self) -> int:
        """How many of the images have no recorded hash, so that nobody can tell whether they are as they were; the others
        are looked at, as all masks of finished mask sets, when they are read for the first time in a process."""
        known = _recorded(self.root, "image_sha256", _state(self.root / "records"))
        return sum(name not in known for name in self.ids)

    def _first(self, *what) -> bool:
        """Whether a file is read for the first time in this process."""
        first = what not in self._seen
        self._seen.add(what)
        return first

    def image_path(self, name: str) -> Path:
        for folder in self.images:
            for suffix in READ_SUFFIXES:
                path = folder / (name + suffix)
                if path.is_file():
                    if folder == self.root / "JPEGImages" and self._first("image", name):
                        check_recorded(self.root, "image_sha256", name, path)
                    return path
        raise FileNotFoundError(
            f"no image {name} (.jpg, .png, ...) in {' or '.join(map(str, self.images))}, but split {self.split!r} lists "
            "it: add the file, or take the id out of the list"
        )

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        name = self.ids[index]
        path, mask = self.image_path(name), self._stored_mask(name)
        image = read_labelled(path, mask.shape, upright=not self.prepared)
        return image, self._checked(mask, name, image.shape[:2])

    def mask_path(self, name: str) -> Path:
        return self.root / self.masks / f"{name}.png"

    def mask(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """The checked mask of an image of ``size`` (height, width)."""
        return self._checked(self._stored_mask(name), name, size)

    def _stored_mask(self, name: str) -> np.ndarray:
        path = self.mask_path(name)
        if not path.is_file():
            raise FileNotFoundError(
                f"no mask {path}, but split {self.split!r} lists it: add it, or take the id out of the list"
            )
        if self._first("mask", name):
            check_mask(path)
        return read_mask(path)

    def _checked(self, mask: np.ndarray, name: str, size: tuple[int, int]) -> np.ndarray:
        path = self.mask_path(name)
        if mask.shape != tuple(size):
            height, width = image_size(self.image_path(name), upright=True)
            turned = (
                f" ({width}x{height} upright by EXIF; prepare own writes upright copies)"
                if (height, width) != tuple(size)
                else ""
            )
            raise ValueError(
                f"{path} is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]}{turned}: a mask has the size of "
                "its image. Is it the mask of another image? Else resize it with nearest neighbour"
            )
        check_values(mask, self.taxonomy, path)
        return mask

    def fingerprint(self) -> dict:
        """What a run records of its data: folder name, split, masks, number of images, and a hash of ids and masks."""
        names = {"root": self.root.name, "split": self.split, "masks": self.masks, "images": len(self)}
        return {**names, "content": self.content()}

    def content(self) -> str:
        """SHA-256 over the ids and the bytes of their masks: corrected masks are other data."""
        done = self.root / self.masks / "masks.json"
        known = read_own(done, MASKS).get("sha256", {}) if done.is_file() else {}
        files = {name: self.mask_path(name) for name in self.ids}
        hashes = [known.get(n) or (sha256(f) if f.is_file() else "missing") for n, f in files.items()]
        return fingerprint([self.ids, hashes])


def _check_classes(root: Path, taxonomy) -> None:
    """ValueError if the data set says that it was made for other classes: its mask values would mean something else."""
    made = [(root / "run.json", ("identity", "taxonomy", "names")), (root / RECORD, ("taxonomy", "names"))]
    for path, keys in made:
        names = read_json(path) if path.is_file() else {}
        for key in keys:
            names = names.get(key, {}) if isinstance(names, dict) else None
        if not isinstance(names, list | dict):
            raise ValueError(f"{path} is damaged: {'.'.join(keys)} is no list of class names. Restore it from a copy")
        if names and list(names) != list(taxonomy.names):
            raise ValueError(
                f"data set {root} was made for the classes {list(names)}, these are {list(taxonomy.names)} (taxonomy "
                f"{taxonomy.name!r}). Choose its own data group, or make it anew"
            )


def write_split(root: str | Path, split: str, ids: list[str]) -> None:
    write_atomic(Path(root) / "ImageSets" / "Segmentation" / f"{split}.txt", "".join(f"{i}\n" for i in ids))


def read_captions(root: str | Path) -> dict[str, dict]:
    """``captions.jsonl`` of a data set by id: {"id", "caption", "classes"}."""
    path = Path(root) / "captions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"data set {root} has no captions.jsonl: its images cannot be shown to the generator")
    kinds, rows = {"id": str, "caption": str, "classes": list}, {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in kinds.items()):
            raise ValueError(f"{path}, line {number}: expected an object with id, caption and classes, got {line!r:.100}")
        rows[row["id"]] = row
    return rows


def synthetic_image(folder: str | Path, name: str) -> Path:
    """The image of a sample of a synthetic set, whichever format it was written in, as its record tells of it
    (:func:`check_recorded`)."""
    for suffix in IMAGE_SUFFIXES:
        path = Path(folder) / "JPEGImages" / (name + suffix)
        if path.is_file():
            check_recorded(folder, "image_sha256", name, path)
            return path
    raise FileNotFoundError(f"no image {name} in {folder}; run generate.py again to make what is missing")


def stored_heat(folder: str | Path, name: str) -> dict[str, np.ndarray]:
    """Stored heat of a sample by source, float16 [classes, powers, r, r]; errors name the file and the way out."""
    path = Path(folder) / "heat" / f"{name}.safetensors"
    if path.is_file():
        check_recorded(folder, "heat_sha256", name, path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no heat {path}; run generate.py again to make what is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and its record, and run generate.py again") from None


def choose_source(heat: dict[str, np.ndarray], source: str, folder) -> np.ndarray:
    """The maps of one source (``class_prompt``, ``full_prompt``). ValueError names those that are stored."""
    if source not in heat:
        raise ValueError(
            f"masks.source={source} is not stored in {folder}: it holds {', '.join(heat)}. "
            "Generate with diffusion.full_prompt=true"
        )
    return heat[source]
