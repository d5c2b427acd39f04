"""Segmentation data sets on disk in PASCAL VOC layout: read, check, write, choose shots."""

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from unicodedata import normalize

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dd.data.mask_values import Renamed, by_colour, by_value, check_colours
from dd.store.names import folder_name, is_text
from dd.store.provenance import (
    fault,
    fingerprint,
    read_json,
    read_lines,
    read_own,
    read_text,
    sha256,
    write_atomic,
)
from dd.store.samples import recorded, unfinished
from dd.store.schemas import DATASET, MASKS, READ
from dd.taxonomy import IGNORE, Taxonomy, voc_palette

IMAGE_SUFFIXES = (".jpg", ".png")  # what we write
_LOWER = (*IMAGE_SUFFIXES, ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
READ_SUFFIXES = (*_LOWER, *(suffix.upper() for suffix in _LOWER))
# of a prepared data set, written last: where its images are, what its masks were made from
RECORD = "dataset.json"
JPEG_QUALITY = 95
ORIENTATION = 0x0112  # EXIF
MEAN = ".mean"  # suffix of the tensor with the means of a source's maps in a heat file
NAME_LIMIT = 200  # bytes of a file's name; leaves room for suffixes and a temporary name
UNDECODED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    MemoryError,
)
File = str | Path | BinaryIO


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
def opened(path: File, header: bool = False) -> Iterator[Image.Image]:
    """Pillow's image of a file or a binary stream. Any error of Pillow's becomes a ValueError with
    the file's name. So does a PNG with wrong checksums (Pillow would decode it to other pixels),
    unless only the ``header`` is read. Images of more than 179 million pixels are refused (Pillow's
    limit against decompression bombs)."""
    try:
        if not header:
            _check_png(path)
        with Image.open(path) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is refused: {error}") from None
    except UNDECODED as error:
        ours = type(error) is ValueError and str(path) in str(error)
        if ours or getattr(error, "errno", None) is not None:  # an error of the file system
            raise
        # Pillow names the file again, or the stream that it was given
        why = "" if isinstance(error, UnidentifiedImageError) else f": {error!s:.200}"
        raise ValueError(
            f"{path} is damaged, or not an image{why}. Restore it from a copy or make it again"
        ) from None


PNG = b"\x89PNG\r\n\x1a\n"


def _check_png(path: File) -> None:
    """SyntaxError, as Pillow's, for a PNG with a part whose checksum is wrong; other errors are
    left to Pillow."""
    with open(path, "rb") if isinstance(path, str | Path) else nullcontext(path) as file:
        if file.read(len(PNG)) == PNG:
            _check_parts(file)
        file.seek(0)


def _check_parts(file: BinaryIO) -> None:
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        checksum, left = zlib.crc32(kind), length
        while left and (data := file.read(min(left, 1 << 20))):
            checksum, left = zlib.crc32(data, checksum), left - len(data)
        told = file.read(4)
        if len(told) == 4 and struct.unpack(">I", told)[0] != checksum:
            raise SyntaxError(f"the checksum of its part {kind!r} is wrong")
        if kind == b"IEND":
            return


def rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image in RGB: 16-bit grey by its high byte (Pillow would turn every value from 255
    on into white), transparent pixels on white, CMYK without a profile."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


DARK = 1 << 14  # 16-bit values below this leave next to nothing in the high byte


def is_dark(image: Image.Image) -> bool:
    """Whether 16-bit grey uses only its low bits, as cameras of 10 to 14 bits do: its high byte is
    then nearly black."""
    return image.mode.startswith("I;16") and 0 < np.asarray(image).max() < DARK


def dark_note(number: int) -> str:
    return (
        f"{number} images of 16 bits use less than a quarter of the range "
        "(cameras of 10 to 14 bits write so) and come out nearly black: "
        "stretch their values to 0..65535"
    )


def read_image(path: str | Path | io.BytesIO) -> np.ndarray:
    """Image uint8 [H, W, 3]; ValueError for a file that cannot be decoded."""
    with opened(path) as image:
        return np.asarray(rgb(image))


def squared(image: np.ndarray, side: int, crop: bool = False) -> np.ndarray:
    """Image uint8 [side, side, 3]: the whole image squashed, or its middle with ``crop``; an image
    of that size is returned as it is."""
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    box = (0, 0, width, height)
    if crop:
        left, top = max(0, width - height) // 2, max(0, height - width) // 2
        box = (left, top, left + min(width, height), top + min(width, height))
    resized = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, box)
    return np.asarray(resized)


def image_size(path: str | Path, upright: bool = False) -> tuple[int, int]:
    """(height, width) of an image, from its header: of the stored pixels, or ``upright`` by
    EXIF."""
    with opened(path, header=True) as image:
        size = image.height, image.width
        return size[::-1] if upright and orientation(image) >= 5 else size


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an open image: 1 is upright; from 5 on the sides change places; 1 if
    there is none."""
    if image.format == "PNG" and "exif" not in image.info:
        # EXIF may follow the pixels, so they are read; keep Pillow's errors about these
        image.load()
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error, OSError):
        return 1  # unreadable EXIF data count as none
    return found if found in range(1, 9) else 1


def read_labelled(
    path: str | Path, size: tuple[int, int], upright: Callable[[], bool]
) -> np.ndarray:
    """Image uint8 [H, W, 3] in the orientation in which its mask of ``size`` (height, width) was
    drawn: upright by EXIF if the sizes agree only then. If they agree both ways (square, mirrored
    or upside down), ``upright`` decides."""
    with opened(path) as image:
        turn, stored = orientation(image), (image.height, image.width)
        turned = stored[::-1] if turn >= 5 else stored
        if turn > 1 and tuple(size) == turned and (turned != stored or upright()):
            image = ImageOps.exif_transpose(image)
        return np.asarray(rgb(image))


def read_mask(path: str | Path, taxonomy: Taxonomy | None = None) -> np.ndarray:
    """Class ids uint8 [H, W] of a palette or grey PNG; ValueError for a colour image, which holds
    no ids.

    ``taxonomy``: given for masks from elsewhere, whose colours must match the classes of their
    values.
    """
    with opened(path) as image:
        mask = by_value(image, path)
        if taxonomy is not None:
            check_colours(image, mask, taxonomy, path)
        return mask


def read_coloured_mask(
    path: str | Path, taxonomy: Taxonomy, renamed: Renamed | None = None
) -> np.ndarray:
    """Class ids uint8 [H, W] of a mask from elsewhere. Palette and grey images hold ids
    (``renamed``: values that mean another class); colour images are read by the taxonomy's
    colours. ValueError if neither is possible.
    """
    with opened(path) as image:
        coloured = image.mode in ("RGB", "RGBA")
        if renamed is None:
            return by_colour(image, taxonomy, path) if coloured else read_mask(path, taxonomy)
        if coloured:
            raise ValueError(
                f"mask {path} has colours, which --map does not change: "
                "give them in the taxonomy file"
            )
        return renamed(by_value(image, path), path)


def check_values(mask: np.ndarray, taxonomy: Taxonomy, path: object) -> None:
    """ValueError names the file and its values that are neither a class nor 255."""
    outside = sorted(set(np.unique(mask).tolist()) - set(range(len(taxonomy))) - {IGNORE})
    if outside:
        raise ValueError(
            f"{path} holds values {outside[:10]} outside the {len(taxonomy)} classes of taxonomy "
            f"{taxonomy.name!r} (0 to {len(taxonomy) - 1}, {IGNORE} = ignored). "
            "Is it made for other classes? python -m dd prepare own takes the meaning of values: "
            f"--map {outside[0]}=ignore, or =background, or a class"
        )


def read_split(root: str | Path, split: str) -> list[str]:
    """Ids of a split in ``ImageSets/Segmentation``. Errors list the available splits; an id cannot
    leave the folder."""
    folder = Path(root) / "ImageSets" / "Segmentation"
    path = folder / f"{split}.txt"
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"no data set at {root}. Real ones are made by: python -m dd prepare shapes "
            "(or voc, voc_aug, coco, own; see docs/data.md), synthetic ones by generate.py; "
            "another folder in VOC layout: set data.root"
        )
    if not path.is_file():
        if why := unfinished(root):
            raise FileNotFoundError(why)
        known = ", ".join(sorted(p.stem for p in folder.glob("*.txt"))) or "none"
        raise FileNotFoundError(
            f"data set {root} has no split {split!r} ({path}); splits there: {known}"
        )
    lines = read_lines(path)
    # our own lists hold one id a line, which may contain blanks; lines of the devkit hold more
    ids = lines if (Path(root) / RECORD).is_file() else [line.split()[0] for line in lines]
    if bad := [i for i in ids if _leaves(PurePosixPath(i))]:
        raise ValueError(f"{path}: id {bad[0]!r:.100} would leave the data set's folder")
    if bad := [i for i in ids if not _is_name(i)]:
        raise ValueError(f"{path}: {bad[0]!r:.100} cannot be the name of a file")
    if not ids:
        raise ValueError(
            f"{path} is empty; a split lists one image id a line. "
            "Write the list, or name another split"
        )
    return ids


def _leaves(path: PurePosixPath) -> bool:
    return path.is_absolute() or ".." in path.parts or "\\" in str(path)


def _is_name(text: str) -> bool:
    """Whether a text can be the path of a file."""
    longest = max(map(len, text.encode().split(b"/")))
    return "\0" not in text and len(text) <= 1000 and longest <= NAME_LIMIT


def read_list(path: str | Path, ids: Sequence[str], split: str) -> tuple[list[str], dict[str, Any]]:
    """(the ids that a list names, in its order; its record: file name, number of images, hash of
    the ids). A line is one of ``ids``, those of ``split``, or begins with the path of its image
    ("JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png", as in published lists).

    FileNotFoundError, or ValueError for an empty list, an image named twice, or one that is not in
    the split.
    """
    path, known, strange = Path(path), set(ids), []
    found: dict[str, int] = {}
    if not path.is_file():
        raise FileNotFoundError(
            f"shots_list={path}: no such file; expected one image a line, such as 2007_000032 or "
            "JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png"
        )
    lines = [line.strip() for line in read_text(path).split("\n")]
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        name = next((name for name in _meant(line) if name in known), None)
        if name is None:
            strange.append(line)
        elif name in found:
            raise ValueError(f"{path}: line {number} names {name} again (line {found[name]} did)")
        else:
            found[name] = number
    if strange:
        raise ValueError(
            f"{path}: {len(strange)} of its {len(strange) + len(found)} lines "
            f"name no image of split {split!r}, such as {strange[0]!r:.100}. "
            "Choose the data, or data.train_split, that the list was made for"
        )
    if not found:
        raise ValueError(f"{path} names no image; expected one a line")
    return list(found), {"file": path.name, "images": len(found), "ids": fingerprint(list(found))}


def _meant(line: str) -> Iterator[str]:
    """The ids that a line may mean, the likeliest first: all of it, its first word, ends of a
    path."""
    yield line
    name = line.split()[0]
    yield name
    name = next((name.removesuffix(s) for s in READ_SUFFIXES if name.endswith(s)), name)
    parts = PurePosixPath(name).parts
    yield from ("/".join(parts[i:]) for i in range(len(parts)))


def choose_shots(
    ids: Sequence[str], shots: int | None, seed: int, of: str = "the split holds"
) -> list[str]:
    """``shots`` ids chosen by seed, nested: fewer shots are the first of more. None = all of
    them."""
    if shots is None:
        return list(ids)
    if type(shots) is not int or not 1 <= shots <= len(ids):
        raise ValueError(
            f"shots={shots!r}, but {of} {len(ids)} images; choose 1 to {len(ids)}, or null for all"
        )
    order = np.random.default_rng([seed, 3]).permutation(len(ids))
    return [ids[i] for i in order[:shots]]


def image_folders(root: str | Path) -> list[Path]:
    """The folders of a data set's images: ``JPEGImages``, then the folders of its record, which are
    never written to."""
    path, own = Path(root) / RECORD, Path(root) / "JPEGImages"
    told = read_own(path, DATASET)["images"] if path.is_file() else []
    folders = [Path(root) / folder for folder in told]
    return [own, *folders] if own.is_dir() or not folders else folders


def check_recorded(folder: str | Path, key: str, name: str, path: Path) -> None:
    """ValueError if the file of sample ``name`` does not match the records of a synthetic set.
    ``key``: ``image_sha256`` or ``heat_sha256``. A file without a record passes: real images have
    none."""
    known = _recorded(Path(folder), key, _state(Path(folder) / "records")).get(name)
    if known is not None and sha256(path) != known:
        raise ValueError(
            f"{path} does not match its record: it was damaged or changed. "
            f"python -m dd verify {folder} lists all such files, and how to repair them"
        )


def check_mask(path: str | Path) -> None:
    """ValueError if a mask does not match masks.json beside it, FileNotFoundError if it is missing;
    without a masks.json any mask passes."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing from its mask set. Remove masks.json beside it, and the command "
            "that made the masks (generate.py stage=label) makes them again"
        )
    done = path.parent / "masks.json"
    known = _mask_hashes(done, _state(done)).get(path.stem) if done.is_file() else None
    if known is not None and sha256(path) != known:
        raise ValueError(
            f"{path} does not match masks.json beside it: it was damaged or changed. "
            "Remove masks.json, and the command that made the masks (generate.py stage=label) "
            "makes them again"
        )


State = tuple[tuple[str, int, int], ...]


def _state(place: Path) -> State:
    """State of a file or of the files of a folder. It changes with them, so that cached content is
    read again."""
    paths = sorted(place.iterdir()) if place.is_dir() else [place] * place.exists()
    return tuple((p.name, s.st_mtime_ns, s.st_size) for p in paths if (s := p.stat()))


@lru_cache(maxsize=4)
def _recorded(folder: Path, key: str, _state: State) -> dict[str, str]:
    return recorded(folder, key)


@lru_cache(maxsize=4)
def _mask_hashes(done: Path, _state: State) -> dict[str, str]:
    return read_own(done, MASKS).get("sha256", {})


class SegmentationFolder:
    """Images and masks of one split of a VOC-layout folder.

    ``data[i]`` is (image uint8 [H, W, 3], mask uint8 [H, W]); mask values are class ids of
    ``taxonomy`` or 255. ``masks`` names the mask folder (``SegmentationClass``, or ``masks/<set>``
    of a synthetic set), ``images`` the folder or folders of the images (None =
    :func:`image_folders`). ``shots_list``: file that names the images from which the shots are
    chosen (:func:`read_list`; its record is ``listed``). FileNotFoundError for missing parts,
    ValueError for a mask of another size than its image or with values outside the classes.

    An image with an EXIF orientation is turned upright if its mask has that size
    (:func:`read_labelled`), as annotation tools show it. Where sizes do not tell, it follows the
    images of the split whose sizes do; it is turned upright if these disagree or there are none.
    Prepared data sets (with a dataset.json) are exempt: they hold upright copies where needed, and
    masks of stored pixels for the rest.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        taxonomy: Taxonomy,
        masks: str = "SegmentationClass",
        shots: int | None = None,
        seed: int = 0,
        images: str | Path | Sequence[str | Path] | None = None,
        shots_list: str | Path | None = None,
    ) -> None:
        self.root, self.split, self.taxonomy, self.masks = Path(root), split, taxonomy, masks
        self.listed: dict[str, Any] | None = None
        self._seen: set[tuple[str, str]] = set()
        ids, of = read_split(root, split), "the split holds"
        self.whole_split = ids
        if shots_list is not None:
            ids, self.listed = read_list(shots_list, ids, split)
            of = f"{self.listed['file']} names"
        self.ids = choose_shots(ids, shots, seed, of)
        given = [images] if isinstance(images, str | Path) else images
        self.images = image_folders(root) if given is None else [Path(f) for f in given]
        self.prepared = (self.root / RECORD).is_file()
        self.foreign = not self.prepared and not (self.root / "run.json").is_file()
        _check_classes(self.root, taxonomy)
        if not (self.root / masks).is_dir():
            raise FileNotFoundError(
                f"data set {root} has no masks in {masks}. For a synthetic set run generate.py "
                "with stage=label (masks of self-training: labeler.run=...); for real data check "
                "data.root and data.masks"
            )
        self._check_list()

    def __len__(self) -> int:
        return len(self.ids)

    def _check_list(self) -> None:
        """Check that a mask set of a synthetic set fits the list of the split. FileNotFoundError
        for a mask set made before the set grew; ValueError if ``train`` is not the list of all
        masks, because a part of it would train on less."""
        done = self.root / self.masks / "masks.json"
        if not done.is_file() or not (self.root / "run.json").is_file():
            return
        known = _mask_hashes(done, _state(done))
        left = [name for name in self.ids if name not in known]
        if left and known:
            raise FileNotFoundError(
                f"the masks in {self.root / self.masks} are those of fewer samples: {len(left)} of "
                f"the {len(self.ids)} of {self.split!r} have none, such as {left[0]}. Make the "
                "mask set again (generate.py stage=label; masks of self-training: labeler.run=...)"
            )
        if self.split != "train" or not known or not (self.root / "plan.jsonl").is_file():
            return
        if (listed := read_split(self.root, self.split)) != list(known):
            raise ValueError(
                f"{self.root}: ImageSets/Segmentation/train.txt lists {len(listed)} samples, "
                f"{self.masks}/masks.json holds {len(known)}, or others. "
                "The same generate.py command makes list and masks again; "
                "to use a part of a set, give its list another name"
            )

    @cached_property
    def drawn_upright(self) -> bool:
        """Whether masks belong to the upright image where sizes do not tell. Reads the headers of
        the split once."""
        votes = set()
        for name in self.ids if not self.prepared else []:
            try:
                with opened(self._found_image(name), header=True) as image:
                    turn, stored = orientation(image), (image.height, image.width)
                if turn >= 5 and stored[0] != stored[1]:
                    votes.add(image_size(self.mask_path(name)) == stored[::-1])
            except (OSError, ValueError):
                continue  # reported when the image is read
        return not self.prepared and votes != {False}

    def unchecked(self) -> int:
        """Number of images without a recorded hash, whose integrity cannot be checked. The other
        images, and all masks of finished mask sets, are checked when they are first read in a
        process."""
        known = _recorded(self.root, "image_sha256", _state(self.root / "records"))
        return sum(name not in known for name in self.ids)

    def _first(self, kind: str, name: str) -> bool:
        """Whether the image or the mask of an id is read for the first time in this process."""
        first = (kind, name) not in self._seen
        self._seen.add((kind, name))
        return first

    def image_path(self, name: str) -> Path:
        """The image of an id; ValueError if it does not match the records of a synthetic set."""
        path = self._found_image(name)
        if path.parent == self.root / "JPEGImages" and self._first("image", name):
            check_recorded(self.root, "image_sha256", name, path)
        return path

    def _found_image(self, name: str) -> Path:
        for folder in self.images:
            for suffix in READ_SUFFIXES:
                path = _stored(folder, name + suffix)
                if path.is_file():
                    return path
        raise FileNotFoundError(
            f"no image {name} (.jpg, .png, ...) in {' or '.join(map(str, self.images))}, "
            f"but split {self.split!r} lists it: add the file, or remove the id from the list"
        )

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        name = self.ids[index]
        path, mask = self.image_path(name), self._stored_mask(name)
        image = read_labelled(path, mask.shape, lambda: self.drawn_upright)
        return image, self._checked(mask, name, image.shape[:2])

    def mask_path(self, name: str) -> Path:
        return _stored(self.root / self.masks, f"{name}.png")

    def mask(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """The checked mask of an image of ``size`` (height, width)."""
        return self._checked(self._stored_mask(name), name, size)

    def _stored_mask(self, name: str) -> np.ndarray:
        path = self.mask_path(name)
        if not path.is_file():
            raise FileNotFoundError(
                f"no mask {path}, but split {self.split!r} lists it: "
                "add it, or remove the id from the list"
            )
        if self._first("mask", name):
            check_mask(path)
        return read_mask(path, self.taxonomy if self.foreign else None)

    def _checked(self, mask: np.ndarray, name: str, size: tuple[int, int]) -> np.ndarray:
        path = self.mask_path(name)
        if mask.shape != tuple(size):
            height, width = image_size(self.image_path(name), upright=True)
            turned = f" ({width}x{height} upright by EXIF; prepare own writes upright copies)"
            raise ValueError(
                f"{path} is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]}"
                f"{turned if (height, width) != tuple(size) else ''}: a mask has the size of "
                "its image. Is it the mask of another image? Else resize it with nearest neighbour"
            )
        check_values(mask, self.taxonomy, path)
        return mask

    def fingerprint(self) -> dict[str, Any]:
        """What a run records of its data: folder name, split, masks, number of images, and a hash
        of their content. For a part of a split also what it was drawn from: a hash of all ids and
        of the sizes in bytes of their masks."""
        found = {
            "root": self.root.name,
            "split": self.split,
            "masks": self.masks,
            "images": len(self),
            "content": self.content(),
        }
        if len(self) < len(self.whole_split):
            masks = [self.mask_path(name) for name in self.whole_split]
            sizes = [path.stat().st_size if path.is_file() else None for path in masks]
            found["drawn_from"] = fingerprint([self.whole_split, sizes])
        return found

    def content(self) -> str:
        """SHA-256 over the ids, the bytes of their masks and the sizes in bytes of their images (a
        hash of 100,000 images would take minutes). Corrected masks or other images thus count as
        other data."""
        done = self.root / self.masks / "masks.json"
        known = _mask_hashes(done, _state(done)) if done.is_file() else {}
        files = [self.mask_path(name) for name in self.ids]
        hashes = [
            known.get(name) or (sha256(file) if file.is_file() else "missing")
            for name, file in zip(self.ids, files, strict=True)
        ]
        return fingerprint([self.ids, hashes, [self._image_bytes(n) for n in self.ids]])

    def _image_bytes(self, name: str) -> int | None:
        """None for a missing image: training and evaluation report it when they read it."""
        try:
            return self._found_image(name).stat().st_size
        except FileNotFoundError:
            return None


def _stored(folder: Path, name: str) -> Path:
    """The file of a name that a list may write in another Unicode form: macOS stores letters and
    their marks separately (NFD), others as one (NFC)."""
    forms = [name] if name.isascii() else [name, normalize("NFC", name), normalize("NFD", name)]
    return next((folder / form for form in forms if (folder / form).is_file()), folder / name)


def _check_classes(root: Path, taxonomy: Taxonomy) -> None:
    """ValueError if the data set says that it was made for other classes, because its mask values
    would then mean something else."""
    made: dict[Path, tuple[str, ...]] = {
        root / "run.json": ("identity", "taxonomy", "names"),
        root / RECORD: ("taxonomy", "names"),
    }
    for path, keys in made.items():
        names = read_json(path) if path.is_file() else {}
        for key in keys:
            names = names.get(key, {}) if isinstance(names, dict) else None
        if not isinstance(names, list | dict):
            raise ValueError(
                f"{path} is damaged: {'.'.join(keys)} is not a list of class names. "
                "Restore it from a copy"
            )
        if names and list(names) != list(taxonomy.names):
            raise ValueError(
                f"data set {root} was made for the classes {list(names)}, "
                f"these are {list(taxonomy.names)} (taxonomy {taxonomy.name!r}). "
                "Choose its own data group, or make it again"
            )


def write_split(root: str | Path, split: str, ids: Sequence[str]) -> None:
    path = Path(root) / "ImageSets" / "Segmentation" / f"{split}.txt"
    write_atomic(path, "".join(f"{i}\n" for i in ids))


def read_captions(root: str | Path) -> dict[str, dict[str, Any]]:
    """``captions.jsonl`` of a data set by id: {"id", "caption", "classes"}."""
    path = Path(root) / "captions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"data set {root} has no captions.jsonl: its images cannot be shown to the generator"
        )
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if fault(row, {"id": str, "caption": str, "classes": list}):
            raise ValueError(
                f"{path}, line {number}: expected an object with id, caption and classes, "
                f"got {line!r:.100}"
            )
        if not is_text(row["caption"]):
            raise ValueError(
                f"{path}, line {number}: the caption holds a NUL or an unpaired surrogate: "
                f"{line!r:.100}"
            )
        rows[row["id"]] = row
    return rows


def synthetic_image(folder: str | Path, name: str) -> Path:
    """The image of a sample of a synthetic set, in whichever format it was written, checked against
    its record (:func:`check_recorded`)."""
    for suffix in IMAGE_SUFFIXES:
        path = Path(folder) / "JPEGImages" / (name + suffix)
        if path.is_file():
            check_recorded(folder, "image_sha256", name, path)
            return path
    raise FileNotFoundError(
        f"no image {name} in {folder}; run generate.py again to make the missing ones"
    )


class OtherDtype(ValueError):
    """Heat that was stored in another precision than float32."""


def _to_tensors(heat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {}
    for source, maps in heat.items():
        whole = np.asarray(maps, np.float64)
        mean_KP = whole.mean((2, 3)).astype(np.float32)
        tensors[source] = (whole - mean_KP[..., None, None]).astype(np.float32)
        tensors[source + MEAN] = mean_KP
    return tensors


def _from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    heat = {s: maps.astype(np.float64) for s, maps in tensors.items() if not s.endswith(MEAN)}
    for source, maps in heat.items():
        if source + MEAN in tensors:
            maps += tensors[source + MEAN][..., None, None]
    return heat


def as_stored(heat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Heat as :func:`stored_heat` would return it after writing."""
    return _from_tensors(_to_tensors(heat))


def heat_bytes(heat: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> bytes:
    """The content of a heat file. For each source of ``heat`` ([K, P, r, r]): its maps without
    their means, float32, and the means as ``<source>.mean``, float32 [K, P]. The contrast of a map
    may be far below its level; float32 of the whole value would round it away."""
    # one key: safetensors writes several in a random order
    return save(_to_tensors(heat), {"description": json.dumps(description)})


def heat_root(folder: str | Path, reading: str | None = None) -> Path:
    """The folder whose records cover heat: the set's own, or ``heat/<reading>``, where another
    model has read its images. FileNotFoundError for a missing reading."""
    if reading is None:
        return Path(folder)
    root = Path(folder) / "heat" / folder_name(reading, "heat")
    if not (root / "run.json").is_file():
        there = sorted(p.parent.name for p in (Path(folder) / "heat").glob("*/run.json"))
        raise FileNotFoundError(
            f"heat={reading}: no such reading of {folder}; there is {', '.join(there) or 'none'}. "
            f"generate.py stage=read reader={reading} diffusion=<model> makes one"
        )
    return root


def heat_hashes(folder: str | Path, reading: str | None = None) -> dict[str, str]:
    """{id: hash of its heat} by the records of a reading, for images that have not changed since.
    ValueError for images that were given and not drawn, which have heat only from readings."""
    root = heat_root(folder, reading)
    if "given" in read_own(root / "run.json", READ)["identity"]["generator"]:
        raise ValueError(
            f"{folder}: its images were given, so there is no heat from drawing them. "
            "generate.py stage=read diffusion=<model> reads them, and heat=<reader> uses that"
        )
    heat = recorded(root, "heat_sha256")
    if reading is None:
        return heat
    read, now = recorded(root, "image_sha256"), recorded(folder, "image_sha256")
    return {name: digest for name, digest in heat.items() if read.get(name) == now.get(name)}


def heat_generator(folder: str | Path, reading: str | None = None) -> dict[str, Any]:
    """Identity of the generator that read the heat."""
    return read_own(heat_root(folder, reading) / "run.json", READ)["identity"]["generator"]


def heat_path(folder: str | Path, name: str, reading: str | None = None) -> Path:
    """The path of a sample's heat."""
    place = Path(folder) / "heat" if reading is None else heat_root(folder, reading)
    return place / f"{name}.safetensors"


def stored_heat(folder: str | Path, name: str, reading: str | None = None) -> dict[str, np.ndarray]:
    """Stored heat of a sample by source, float64 [classes, powers, r, r]: the sum of maps and means
    (:func:`heat_bytes`); maps without stored means are used as they are. ``reading``: see
    :func:`heat_root`.

    Errors name the file and what to do; OtherDtype for maps that are not float32.
    """
    path = heat_path(folder, name, reading)
    if path.is_file():
        check_recorded(heat_root(folder, reading), "heat_sha256", name, path)
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no heat {path}; run generate.py again to make the missing ones"
        ) from None
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it and its record, and run generate.py again"
        ) from None
    for key, values in tensors.items():
        maps = tensors.get(key.removesuffix(MEAN))
        if values.dtype != np.float32:
            raise OtherDtype(
                f"{path} holds {key} in {values.dtype}, expected float32: "
                "the rounding of such maps changes masks, "
                "a quarter of the pixels at high powers. Nothing is converted. "
                f"Draw the set again: another name=..., or remove {folder} first"
            )
        if maps is None or (key.endswith(MEAN) and values.shape != maps.shape[:2]):
            raise ValueError(
                f"{path} is damaged ({key} of shape {values.shape} fits no maps); "
                "remove it and its record, and run generate.py again"
            )
    return _from_tensors(tensors)


SOURCES_BY = {
    "class_prompt": "Joint attention has it only from a reading after drawing: diffusion.reading="
    "after, or generate.py stage=read and heat=<reader>",
    "after": "Generate with diffusion.reading=both",
    **{
        f"full_prompt_{words}": f"Generate with diffusion.full_prompt={words}, or true for all"
        for words in ("appended", "caption")
    },
}


def choose_source(heat: Mapping[str, np.ndarray], source: str, folder: str | Path) -> np.ndarray:
    """The maps of one source (``dd.masks.from_heat.SOURCES``). ValueError names the stored
    sources."""
    if source not in heat:
        raise ValueError(
            f"masks.source={source} is not stored in {folder}: it holds {', '.join(heat)}. "
            f"{SOURCES_BY.get(source, '')}"
        )
    return heat[source]
