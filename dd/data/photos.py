"""Photographs and videos as users have them -> uint8 RGB [H, W, 3], upright. Errors say why a file
cannot be read.

A photograph is turned by its EXIF orientation, as viewers show it; its mask has that size too.
16-bit grey keeps its high byte (the whole range 0..65535 becomes 0..255), transparent pixels are
laid on white, CMYK becomes RGB without a profile, and of several pages the first one counts.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from dd.data.datasets import File, dark_note, image_size, is_dark, opened, rgb
from dd.data.folders import IMAGES, Files, Finder, index, walk
from dd.store.provenance import fingerprint, read_lines, sha256

# photographs that are not read
OTHERS = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".gif"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw"),
)
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
T = TypeVar("T")
MAX_PIXELS = 50_000_000
PILLOWS_LIMIT = 2 * 89_478_485  # above it Pillow itself refuses: a small file may claim any size
# advice for commands with this setting
RAISE = ", or raise max_pixels (memory: 4 bytes a pixel and class)"
NO_BRIGHTNESS = {"I": "whole numbers with a sign or of 32 bits", "F": "numbers with a point"}
MAX_RATIO = 1000  # of the sides: the shorter one must keep a pixel when the image is made smaller


@dataclass(frozen=True)
class Picture:
    """A photograph or a frame of a video: ``id`` (a path without suffix, also used for its
    results), ``file`` as the user knows it, ``digest``: SHA-256 of its file."""

    id: str
    file: str
    digest: str


def read_photo(
    path: File,
    max_pixels: int = MAX_PIXELS,
    cure: str = "",
    told: Callable[[], object] | None = None,
) -> np.ndarray:
    """uint8 RGB [H, W, 3], upright, of a file or a binary stream; ``told`` is called for an image
    that comes out nearly black (:func:`dd.data.datasets.is_dark`). ValueError for a file that is
    damaged, not an image, too large (by its header, before anything is decoded; ``cure``: further
    advice), too thin, or of floats."""
    with warnings.catch_warnings():
        # the limit here is lower, or was chosen
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with opened(path) as image:
            _check_size(path, image.width, image.height, max_pixels, cure)
            if kind := NO_BRIGHTNESS.get(image.mode):
                raise ValueError(
                    f"{path} holds {kind} (mode {image.mode}), which do not encode brightness; "
                    "save it with 8 or with 16 bits without a sign"
                )
            if told is not None and is_dark(image):
                told()
            return np.asarray(rgb(ImageOps.exif_transpose(image)))


def _check_size(path: object, width: int, height: int, max_pixels: int, cure: str = "") -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"{path} has {width}x{height} = {width * height / 1e6:.1f} million pixels, "
            f"the limit is {max_pixels / 1e6:g}: make it smaller or crop it{cure}"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"{path} is {width}x{height}: "
            f"one side may be at most {MAX_RATIO} times the other; crop it"
        )


def spread(values: Sequence[T], limit: int | None) -> list[T]:
    """At most ``limit`` of the values, evenly spread."""
    if limit is None or len(values) <= limit:
        return list(values)
    return [values[i * len(values) // limit] for i in range(limit)]


class Photos:
    """The photographs of a folder and its subfolders: ``items``, and :meth:`read`. ``limit``: that
    many of them, evenly spread. A note counts photographs in formats that are not read.
    FileNotFoundError for no folder or one without images, ValueError for two images of one
    stem."""

    dark: frozenset[str] = frozenset()  # ids of read images that came out nearly black

    def __init__(
        self, folder: str | Path, max_pixels: int = MAX_PIXELS, limit: int | None = None
    ) -> None:
        self.folder, self.max_pixels, self.files = Path(folder), max_pixels, index(folder, IMAGES)
        self.items: list[Picture] = []
        self.unreadable: dict[str, str] = {}
        self.notes = list(self.files.notes)
        left = sorted(p.suffix.lower() for p in walk(folder)[0] if p.suffix.lower() in OTHERS)
        if left:
            self.notes.append(
                f"{len(left)} photographs are left out, as {', '.join(dict.fromkeys(left))} "
                "is not read: convert them to JPEG or PNG"
            )
        for name, path in spread(list(self.files.items()), limit):
            file = path.relative_to(self.folder).as_posix()
            try:
                self.items.append(Picture(name, file, sha256(path)))
            except OSError as error:
                self.unreadable[file] = str(error)

    def read(self, wanted: list[Picture]) -> Iterator[tuple[Picture, np.ndarray | Exception]]:
        """(item, its pixels or the error), one after the other."""
        for item in wanted:
            try:
                told = partial(self._count_dark, item.id)
                yield item, read_photo(self.files[item.id], self.max_pixels, RAISE, told)
            except (ValueError, OSError) as error:
                yield item, error

    def _count_dark(self, name: str) -> None:
        """Note how many photographs come out nearly black, each once."""
        before, self.dark = dark_note(len(self.dark)), self.dark | {name}
        self.notes = [n for n in self.notes if n != before] + [dark_note(len(self.dark))]


class Gathered(Photos):
    """The photographs of several folders as one; if two folders have the same name, the first
    folder's photograph counts."""

    def __init__(
        self,
        folders: Sequence[str | Path],
        max_pixels: int = MAX_PIXELS,
        limit: int | None = None,
    ) -> None:
        super().__init__(folders[0], max_pixels, limit=0)
        for folder in folders[1:]:
            self.files = Files({**index(folder, IMAGES), **self.files})
        for name, path in spread(sorted(self.files.items()), limit):
            self.items.append(Picture(name, str(path), sha256(path)))


class SinglePhoto(Photos):
    """One photograph, as :class:`Photos` of it alone."""

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        path = Path(path)
        self.folder, self.max_pixels, self.files = path.parent, max_pixels, Files({path.stem: path})
        self.items = [Picture(path.stem, path.name, sha256(path))]
        self.unreadable, self.notes = {}, []


class Video:
    """Every ``every``-th frame of a video file: ``items`` (``frame_000000``, ...), and
    :meth:`read`. The frames are those that can be decoded; a note says if its header promises
    more. ValueError for a file without any."""

    def __init__(
        self,
        path: str | Path,
        every: int = 1,
        max_pixels: int = MAX_PIXELS,
        limit: int | None = None,
    ) -> None:
        self.path, self.every = Path(path), every
        self.unreadable: dict[str, str] = {}
        self.notes: list[str] = []
        import cv2  # here: needed only for a video

        video = self._open()
        width, height = video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)
        _check_size(path, int(width), int(height), max_pixels, RAISE)
        promised, count = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0
        while video.grab():
            count += 1
        video.release()
        if not count:
            raise ValueError(
                f"{path}: no frame of it can be decoded; "
                "it is damaged, or not a video that OpenCV reads"
            )
        if count < promised:
            self.notes.append(
                f"{path} ends after {count} of the {promised} frames that its header promises"
            )
        digest = sha256(self.path)
        self.items = [
            Picture(f"frame_{n:06d}", f"{self.path.name}#{n}", digest)
            for n in spread(list(range(0, count, every)), limit)
        ]

    def read(self, wanted: list[Picture]) -> Iterator[tuple[Picture, np.ndarray | Exception]]:
        """(item, its pixels or the error), in the order of the frames."""
        by_frame = {int(item.file.rpartition("#")[2]): item for item in wanted}
        video = self._open()
        for number in range(max(by_frame, default=-1) + 1):
            good = video.grab()
            if number in by_frame:
                frame = video.retrieve()[1] if good else None
                wrong = ValueError(f"frame {number} cannot be decoded")
                yield by_frame[number], wrong if frame is None else frame[..., ::-1]
        video.release()

    def _open(self) -> Any:
        import cv2

        video = cv2.VideoCapture(str(self.path))
        if not video.isOpened():
            raise ValueError(
                f"{self.path} is damaged, or not a video that OpenCV reads: convert it to H.264 MP4"
            )
        return video


def find_photos(
    folder: str | Path | None, listed: str | Path | None = None, setting: str = "unlabelled"
) -> list[Path]:
    """Photographs below ``folder`` in the order of their names; if a list ``listed`` is given, only
    those in it (each line is a path below the folder, a name or a stem). Errors name the settings
    ``<setting>.images`` and ``<setting>.list``.

    FileNotFoundError for no folder, no image or no list; ValueError for two images of one stem, for
    listed images that are missing or ambiguous, and for files that cannot be read.
    """
    if not folder or not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{setting}.images={folder}: no such folder; give the folder of unlabelled photographs"
        )
    found = index(folder, IMAGES)
    files = dict(found)
    if listed is not None:
        if not Path(listed).is_file():
            raise FileNotFoundError(
                f"{setting}.list={listed}: no such file; one image a line, or null for all images"
            )
        if not (named := _named(listed, files)):
            raise ValueError(
                f"{setting}.list={listed} names no image; one a line, or null for all images"
            )
        if missing := sorted(line for line, name in named.items() if name is None):
            shown = ", ".join(map(Finder(files).near, missing[:3]))
            raise ValueError(
                f"{setting}.list={listed}: {len(missing)} images are not in {folder}, "
                f"such as {shown}"
            )
        chosen = set(named.values())
        files = {name: file for name, file in files.items() if name in chosen}
    for note in found.notes:
        _warn(note)
    _try(list(files.values()), _check_header, setting)
    return list(files.values())


def _check_header(path: Path) -> None:
    height, width = image_size(path)
    _check_size(path, width, height, MAX_PIXELS)


def _named(listed: str | Path, ids: Iterable[str]) -> dict[str, str | None]:
    """{line of a list: the id that it names, or None}."""
    find = Finder(ids)
    return {line: find(line) for line in read_lines(listed)}


def _try(files: list[Path], read: Callable[[Path], object], setting: str) -> None:
    """ValueError with the first ten files that ``read`` refuses, and their number."""
    if bad := [text for text in _problems(files, read) if text]:
        raise ValueError(
            f"{len(bad)} of {len(files)} images cannot be read; "
            f"remove them, or give {setting}.list:{_first_ten(bad)}"
        )


def check_readable(files: Sequence[Path], listed: str) -> None:
    """ValueError with the first ten photographs that cannot be decoded, and their number.
    ``listed``: the option of the file that names them."""
    if bad := [text for text in _problems(list(files), read_photo) if text]:
        raise ValueError(
            f"{len(bad)} of {len(files)} images cannot be read; repair them, or leave them out of "
            f"{listed}:{_first_ten(bad)}"
        )


def _first_ten(lines: list[str]) -> str:
    more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
    return "".join(f"\n  {line}" for line in lines[:10] + more)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _problems(files: list[Path], read: Callable[[Path], object]) -> list[str | None]:
    """The error of ``read`` for each file that it refuses, None for the others."""

    def problem(file: Path) -> str | None:
        try:
            read(file)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:  # decoding releases the GIL
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return list(pool.map(problem, files))


class Unlabelled:
    """Photographs of a folder to train with: item i is uint8 RGB [H, W, 3], upright
    (:func:`read_photo`). One that turns out to be damaged is replaced, with a warning, by the next
    sound one. Arguments and errors are those of :func:`find_photos`."""

    def __init__(
        self, images: str | Path, listed: str | Path | None = None, setting: str = "unlabelled"
    ) -> None:
        self.folder, self.setting = images, setting
        self.files = find_photos(images, listed, setting)
        self._told: set[Path] = set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        for further in range(len(self)):
            path = self.files[(index + further) % len(self)]
            try:
                return read_photo(path)
            except (ValueError, OSError) as error:
                if path not in self._told:
                    self._told.add(path)
                    _warn(f"{error}; the next photograph replaces it")
        raise ValueError(f"none of the {len(self)} photographs in {self.folder} can be read")

    def check(self) -> None:
        """Decode all of them, which takes a few seconds a hundred; ValueError if one cannot be."""
        print(f"decoding {len(self)} photographs once, to find damaged ones", flush=True)
        dark: list[Path] = []
        _try(self.files, lambda p: read_photo(p, told=lambda: dark.append(p)), self.setting)
        if dark:
            _warn(dark_note(len(dark)))

    def sound(self) -> list[int]:
        """Decode all of them, which takes a few seconds a hundred; the indices of the readable
        ones. A warning names the others; ValueError if none is readable."""
        print(f"decoding {len(self)} photographs once, to find damaged ones", flush=True)
        found = _problems(self.files, read_photo)
        bad = [text for text in found if text]
        if len(bad) == len(found):
            raise ValueError(
                f"none of the {len(self)} photographs in {self.folder} can be read: {bad[0]}"
            )
        if bad:
            said = f"{len(bad)} of {len(found)} photographs cannot be read and are left out:"
            _warn(said + _first_ten(bad))
        return [place for place, text in enumerate(found) if not text]

    def fingerprint(self) -> dict[str, Any]:
        """What a run records of them: their number, and a hash of their names and sizes in
        bytes."""
        names = [path.relative_to(self.folder).as_posix() for path in self.files]
        sizes = [f"{n} {p.stat().st_size}" for n, p in zip(names, self.files, strict=True)]
        return {"number": len(self.files), "sha256": fingerprint(sizes)}


def source(
    images: str | Path | None,
    every: int = 1,
    max_pixels: int = MAX_PIXELS,
    limit: int | None = None,
) -> Photos | Video:
    """The photographs of a folder, a single one, or the frames of a video file. Errors say what
    is allowed."""
    if not images or not Path(images).exists():
        given = f"images={images}: nothing is there" if images else "images is not given"
        raise FileNotFoundError(
            f"{given}; expected images=<a folder of images, an image, or a video file>"
        )
    if Path(images).is_dir():
        return Photos(images, max_pixels, limit)
    if Path(images).suffix.lower() in IMAGES:
        return SinglePhoto(images, max_pixels)
    if Path(images).suffix.lower() not in VIDEOS:
        raise ValueError(
            f"images={images}: expected an image or a folder of them ({', '.join(IMAGES)}) "
            f"or a video ({', '.join(VIDEOS)})"
        )
    return Video(images, every, max_pixels, limit)


def without(items: list[Picture], listed: str | Path) -> list[Picture]:
    """``items`` but for those that the file ``listed`` names, one (path, name or stem) a line;
    what it names beside them does not matter. FileNotFoundError for no file, ValueError if none
    of the items is left."""
    if not Path(listed).is_file():
        raise FileNotFoundError(
            f"leave_out={listed}: no such file; "
            "one image a line, such as the val.txt of your data set"
        )
    named = set(_named(listed, [item.id for item in items]).values())
    left = [item for item in items if item.id not in named]
    if not left:
        raise ValueError(
            f"leave_out={listed} names all {len(items)} images: none is left to choose from"
        )
    return left


def batches(
    pictures: Iterable[tuple[Picture, np.ndarray | Exception]],
    batch_size: int,
    pixels: int,
    unreadable: dict[str, str],
    fail: Callable[[str], object] = lambda what: None,
) -> Iterator[list[tuple[Picture, np.ndarray]]]:
    """Lists of (item, image) of what ``read`` yields, at most ``batch_size`` of them and
    ``pixels`` together (or one image); what is no image goes to ``unreadable`` {file: why}, and
    ``fail`` is told."""
    batch: list[tuple[Picture, np.ndarray]] = []
    size = 0
    for item, image in pictures:
        if isinstance(image, Exception):
            unreadable[item.file] = str(image)
            fail(f"{item.file} is left out")
            continue
        more = image.shape[0] * image.shape[1]
        if batch and (len(batch) == batch_size or size + more > pixels):
            yield batch
            batch, size = [], 0
        batch.append((item, np.ascontiguousarray(image)))
        size += more
    if batch:
        yield batch
