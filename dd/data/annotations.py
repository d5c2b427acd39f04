"""Labels as CVAT ("Segmentation mask 1.1") and Label Studio (JSON) export them: for each image, a
function that draws its mask."""

import io
import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dd.data import label_studio
from dd.data.coco_json import category_values, class_of
from dd.data.datasets import image_size, opened
from dd.data.folders import HIDDEN, Finder, walk, without_suffix
from dd.data.mask_values import by_value, colours_of
from dd.store.provenance import decode, fingerprint, read_json, sha256
from dd.taxonomy import Colour, Taxonomy, nth_colour

LABELMAP, MASKS, LISTS = "labelmap.txt", "SegmentationClass/", "ImageSets/Segmentation/"
MAX_BYTES = 1 << 28  # of one file in a zip, whose header may claim any size
MAX_TEXT = 1 << 24  # of a list or labelmap.txt
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    KeyError,
)
Meanings = Mapping[Colour, int | str]  # by colour: class ids, or labels without a class


@dataclass(frozen=True)
class Drawn:
    """A mask that is not drawn yet: its source (for messages), the function that draws it, and its
    (height, width), known before."""

    where: str
    draw: Callable[[], np.ndarray]
    size: Callable[[], tuple[int, int]] | None = None


def label_values(
    labels: list[str], classes: Taxonomy, mapping: Mapping[str, str] | None
) -> dict[str, int]:
    """{label: class id or 255}: matched by name, synonym or ``mapping``; ``ignored`` is 255, as in
    our own exports. ValueError lists the labels without a class."""
    given = {label_studio.IGNORED: "ignore"} if label_studio.IGNORED in labels else {}
    rows = [{"id": n, "name": n} for n in labels]
    return category_values(rows, classes, {**given, **(mapping or {})})


def label_studio_masks(
    path: Path,
    found: Mapping[str, Path],
    classes: Taxonomy,
    mapping: Mapping[str, str] | None = None,
    brushes_only: bool = False,
) -> tuple[dict[str, Drawn], list[str], dict[str, Any]]:
    """({image id: :class:`Drawn`}, notes, identity) of a JSON export. ValueError for unknown labels
    and for images that are not among ``found`` {id: file}. ``brushes_only``: leave out other
    regions, and count them."""
    images, notes = label_studio.read_export(path, read_json(path), brushes_only)
    labels = sorted({label for image in images for label, _ in image.brushes})
    try:
        values = label_values(labels, classes, mapping)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    ids = _ids(path, [image.file for image in images], found)
    _each_once(path, ids)
    empty = sum(not image.brushes for image in images)
    notes += [f"{empty} annotations have no brush: background"] if empty else []
    jobs = {
        name: Drawn(
            f"{path.name}, {image.file}",
            partial(_brushes, image, values, found[name]),
            partial(_claimed, image.size) if image.size else None,
        )
        for name, image in zip(ids, images, strict=True)
    }
    identity: dict[str, Any] = {"label_studio_sha256": sha256(path), "map": mapping or {}}
    return jobs, notes, identity | ({"brushes_only": True} if brushes_only else {})


def _claimed(size: tuple[int, int]) -> tuple[int, int]:
    return size


def _brushes(image: label_studio.Labelled, values: dict[str, int], file: Path) -> np.ndarray:
    return label_studio.draw(image, values, image_size(file, upright=True))


def cvat_masks(
    path: Path,
    found: Mapping[str, Path],
    classes: Taxonomy,
    mapping: Mapping[str, str] | None = None,
) -> tuple[dict[str, Drawn], list[str], dict[str, Any]]:
    """Like :func:`label_studio_masks`, for a zip or an unpacked folder of "Segmentation mask 1.1",
    with or without a folder on top. Colours are those of its ``labelmap.txt``, whatever the
    taxonomy's. Labels that no mask shows need no class. A listed image without a mask is
    background."""
    files = _below_labelmap(path, _files(path))
    labels = _labelmap(f"{path}, {LABELMAP}", _text(path, files[LABELMAP]))
    colours = _colours(f"{path}, {LABELMAP}", labels, classes, mapping)
    masks = {name[len(MASKS) : -len(".png")]: files[name] for name in _inside(files, MASKS, ".png")}
    if not masks:
        raise ValueError(f"{path} holds no mask in {MASKS}: nothing in it is labelled")
    texts = [_text(path, files[name]) for name in _inside(files, LISTS, ".txt")]
    lines = {line.strip() for text in texts for line in text.splitlines()} - {""}
    left = sorted(n for n in lines if n not in masks and without_suffix(n) not in masks)
    ids = _ids(path, [*masks, *left], found)
    _each_once(path, ids[: len(masks)])
    jobs = {
        name: Drawn(
            f"{path.name}, {member}",
            partial(_coloured, path, member, colours),
            partial(_mask_size, path, member),
        )
        for name, member in zip(ids[: len(masks)], masks.values(), strict=True)
    }
    # an image that is listed under another path than its mask is not background
    listed = zip(ids[len(masks) :], left, strict=True)
    empty = [(name, written) for name, written in listed if name not in jobs]
    for name, written in empty:
        jobs.setdefault(name, Drawn(f"{path.name}, {written}", partial(_background, found[name])))
    notes = [f"{len(empty)} listed images have no mask: background"] if empty else []
    return jobs, notes, {"cvat": _content(path, files), "map": mapping or {}}


def _below_labelmap(path: Path, files: dict[str, str]) -> dict[str, str]:
    """``files`` by their names below the folder of labelmap.txt, at the top or one level down."""
    named = [name for name in files if f"/{name}".endswith(f"/{LABELMAP}") and name.count("/") < 2]
    tops = [name.removesuffix(LABELMAP) for name in named]
    if not tops or ("" not in tops and len(tops) > 1):
        several = f"holds several {LABELMAP} ({', '.join(tops)}): give one of the folders"
        raise ValueError(
            f"{path} {several if tops else f'has no {LABELMAP}'}: export the task or project "
            f'from CVAT as "Segmentation mask 1.1"{_instead(files)}'
        )
    top = min(tops, key=len)
    return {n.removeprefix(top): member for n, member in files.items() if n.startswith(top)}


def _inside(files: Iterable[str], folder: str, suffix: str) -> list[str]:
    return [name for name in files if name.startswith(folder) and name.endswith(suffix)]


def _content(path: Path, files: dict[str, str]) -> str:
    """Hash of an export: of the zip, or of the lists and masks in a folder."""
    if path.is_file():
        return sha256(path)
    pictures = ("JPEGImages/", "SegmentationObject/")
    return fingerprint(
        [(n, sha256(path / m)) for n, m in files.items() if not n.startswith(pictures)]
    )


def labelmap_colours(
    folder: Path, classes: Taxonomy, mapping: Mapping[str, str] | None = None
) -> Meanings | None:
    """The meaning of mask colours by a ``labelmap.txt`` beside their folder; None if there is
    none."""
    if not (folder / LABELMAP).is_file():
        return None
    where = str(folder / LABELMAP)
    return _colours(where, _labelmap(where, _text(folder, LABELMAP)), classes, mapping)


def read_by_labelmap(file: Path, colours: Meanings) -> np.ndarray:
    """Class ids uint8 [H, W] of a mask beside a ``labelmap.txt``: palettes are read by their
    colours, grey values are ids."""
    with opened(file) as image:
        coloured = image.mode in ("P", "RGB", "RGBA")
        return _by_labels(image, colours) if coloured else by_value(image, file)


def _instead(files: dict[str, str]) -> str:
    """What an archive without labelmap.txt holds instead, if that can be told."""
    names = [name.rpartition("/")[2] for name in files]
    if "annotations.xml" in names:
        return ". This is CVAT's own format (annotations.xml: CVAT for images), which is not read"
    if any(name.startswith("instances_") and name.endswith(".json") for name in names):
        return '. This is an export as "COCO 1.0": unpack it and give its JSON as --coco'
    return ""


def _colours(
    where: str,
    labels: Mapping[Colour, str],
    classes: Taxonomy,
    mapping: Mapping[str, str] | None,
) -> Meanings:
    """{colour: class id, or the label if it has no class and so may not occur in a mask}."""
    names = [label for label in labels.values() if label.lower() != "background"]
    given = {label_studio.IGNORED: "ignore", **(mapping or {})}
    used = [label for label in names if label in given or class_of(label, classes) is not None]
    try:
        values = label_values(used, classes, {k: v for k, v in given.items() if k in used})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if strange := sorted((mapping or {}).keys() - set(names)):
        raise ValueError(
            f"{where}: map: label {strange[0]!r} is not in the file; allowed: {', '.join(names)}"
        )
    if not values:
        raise ValueError(
            f"{where}: none of the labels {', '.join(names[:20])} is a class of taxonomy "
            f"{classes.name!r}; map each to a class, to ignore (255) or to background, "
            "as in --map NAME=ignore"
        )
    meanings: dict[str, int | str] = {name: name for name in names} | values
    return {colour: meanings.get(label, 0) for colour, label in labels.items()}


def _ids(path: Path, written: list[str], found: Mapping[str, Path]) -> list[str]:
    """Ids of the images that ``written`` names; ValueError for images that are missing or labelled
    twice."""
    find = Finder(found)
    ids = [find(name) or find.upload(name) for name in written]
    missing = [find.near(name) for name, one in zip(written, ids, strict=True) if one is None]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of its {len(written)} images are not in --images, "
            f"such as {', '.join(missing[:5])}"
        )
    return [one for one in ids if one is not None]


def _each_once(path: Path, ids: list[str]) -> None:
    if twice := sorted(i for i, number in Counter(ids).items() if number > 1):
        raise ValueError(
            f"{path} labels {len(twice)} images twice, such as {twice[:5]}: "
            "export each from one task"
        )


def _files(path: Path) -> dict[str, str]:
    """{name of a file: its member in the zip, or path below the folder} without hidden ones."""
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in walk(path)[0])
        return dict(zip(names, names, strict=True))
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {path}")
    if path.suffix.lower() == ".xml":
        raise ValueError(
            f"{path} is an XML file: export the task or project from CVAT "
            'as "Segmentation mask 1.1", a zip'
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a zip file, or damaged: {error}") from None
    files = {_member_name(info): info.filename for info in members}
    shown = [n for n in sorted(files) if not any(p.startswith(HIDDEN) for p in n.split("/"))]
    return {name: files[name] for name in shown}


def _member_name(info: zipfile.ZipInfo) -> str:
    """A member's name. Some programs write it in UTF-8 without setting the flag for that."""
    name = info.filename.replace("\\", "/")
    if not info.flag_bits & 0x800:
        with suppress(UnicodeError):
            return name.encode("cp437").decode("utf-8")
    return name


def _read(path: Path, name: str, limit: int = MAX_BYTES) -> bytes:
    try:
        with nullcontext() if path.is_dir() else zipfile.ZipFile(path) as archive:
            file = path / name
            size = archive.getinfo(name).file_size if archive else file.stat().st_size
            if size > limit:
                raise ValueError(f"{path}, {name} is larger than {limit >> 20} MiB unpacked")
            return archive.read(name) if archive else file.read_bytes()
    except DAMAGED as error:
        raise ValueError(
            f"{path}, {name} is damaged, or packed in a way that cannot be read: {error}"
        ) from None


def _text(path: Path, name: str) -> str:
    return decode(_read(path, name, MAX_TEXT), f"{path}, {name}")


def _labelmap(where: str, text: str) -> dict[Colour, str]:
    """{colour: label} of lines ``label:red,green,blue:parts:actions``."""
    found: dict[Colour, str] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.strip().split(":")
        numbers = fields[1].split(",") if len(fields) > 1 else []
        if len(numbers) != 3 or not all(n.strip().isdecimal() and int(n) < 256 for n in numbers):
            raise ValueError(
                f"{where}: {line!r:.100}; expected label:red,green,blue:parts:actions, "
                "colours from 0 to 255"
            )
        colour = nth_colour([int(n) for n in numbers], 0)
        if found.setdefault(colour, fields[0]) != fields[0]:
            raise ValueError(
                f"{where}: {found[colour]!r} and {fields[0]!r} have the same colour {colour}; "
                "change one in CVAT"
            )
    return found


def _coloured(path: Path, name: str, colours: Meanings) -> np.ndarray:
    with opened(io.BytesIO(_read(path, name))) as image:
        return _by_labels(image, colours)


def _by_labels(image: Image.Image, colours: Meanings) -> np.ndarray:
    """Class ids uint8 [H, W]; palettes are read by their colours. ValueError names colours without
    a label, and labels without a class."""
    seen, inverse = colours_of(np.asarray(image.convert("RGB")))
    if labels := sorted({label for c in seen if isinstance(label := colours.get(c), str)}):
        raise ValueError(
            f"{len(labels)} labels in it are not a class of the taxonomy: "
            f"{', '.join(labels[:20])}. "
            "Map each to a class, to ignore (255) or to background, as in --map NAME=ignore"
        )
    if unknown := [c for c in seen if c not in colours]:
        raise ValueError(
            f"{len(unknown)} colours that no label in {LABELMAP} has, such as {unknown[:5]}"
        )
    return np.array([colours[c] for c in seen], np.uint8)[inverse]


def _mask_size(path: Path, name: str) -> tuple[int, int]:
    with opened(io.BytesIO(_read(path, name))) as image:
        return image.height, image.width


def _background(file: Path) -> np.ndarray:
    return np.zeros(image_size(file, upright=True), np.uint8)
