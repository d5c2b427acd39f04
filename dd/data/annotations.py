"""Labels as CVAT ("Segmentation mask 1.1") and Label Studio (JSON) export them: for each image
what draws its mask."""

import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dd.data import label_studio
from dd.data.coco import category_values, class_of
from dd.data.datasets import image_size, opened
from dd.data.folders import HIDDEN, Finder, walk, without_suffix
from dd.data.mask_values import by_value
from dd.store.provenance import decode, fingerprint, read_json, sha256
from dd.taxonomy import Taxonomy

LABELMAP, MASKS, LISTS = "labelmap.txt", "SegmentationClass/", "ImageSets/Segmentation/"
MAX_BYTES = 1 << 28  # of one file in a zip, whose header may claim any size
MAX_TEXT = 1 << 24  # of a list or labelmap.txt


@dataclass(frozen=True)
class Drawn:
    """A mask that is not drawn yet: where it comes from (for messages), what draws it, and its
    (height, width) before."""

    where: str
    draw: Callable[[], np.ndarray]
    size: Callable[[], tuple[int, int]] | None = None


def label_values(
    labels: list[str], classes: Taxonomy, mapping: dict[str, str] | None
) -> dict[str, int]:
    """{label: class id or 255}: found by name, synonym or ``mapping``; ``ignored`` is 255, as in
    our own exports. ValueError lists the labels that are no class."""
    given = {label_studio.IGNORED: "ignore"} if label_studio.IGNORED in labels else {}
    return category_values([{"id": n, "name": n} for n in labels], classes, given | (mapping or {}))


def label_studio_masks(
    path: Path, found: dict[str, Path], classes: Taxonomy, mapping=None, brushes_only: bool = False
) -> tuple[dict, list[str], dict]:
    """({image id: :class:`Drawn`}, notes, identity) of a JSON export. ValueError for unknown
    labels and for images that are not among ``found`` {id: file}. ``brushes_only``: other
    regions are left out, with a count."""
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
            _claimed(image),
        )
        for name, image in zip(ids, images, strict=True)
    }
    identity = {"label_studio_sha256": sha256(path), "map": mapping or {}}
    return jobs, notes, identity | ({"brushes_only": True} if brushes_only else {})


def _claimed(image) -> Callable[[], tuple[int, int]] | None:
    return partial(tuple, image.size) if image.size else None


def _brushes(image, values: dict[str, int], file: Path) -> np.ndarray:
    return label_studio.draw(image, values, image_size(file, upright=True))


def cvat_masks(
    path: Path, found: dict[str, Path], classes: Taxonomy, mapping=None
) -> tuple[dict, list[str], dict]:
    """As :func:`label_studio_masks`, of a zip or an unpacked folder of "Segmentation mask 1.1",
    with a folder on top or without. Colours are those of its ``labelmap.txt``, whatever the
    taxonomy's; labels that no mask shows need no class; an image that its lists hold without a
    mask is background."""
    files = _files(path)
    tops = [
        name.removesuffix(LABELMAP)
        for name in files
        if name.count("/") < 2 and f"/{name}".endswith(f"/{LABELMAP}")
    ]
    if not tops or ("" not in tops and len(tops) > 1):
        what = (
            f"holds several {LABELMAP} ({', '.join(tops)}): give one of the folders"
            if tops
            else f"has no {LABELMAP}"
        )
        raise ValueError(
            f'{path} {what}: export the task or project from CVAT as "Segmentation mask '
            f'1.1"{_instead(files)}'
        )
    top = min(tops, key=len)
    files = {
        name.removeprefix(top): member for name, member in files.items() if name.startswith(top)
    }
    labels = _labelmap(f"{path}, {LABELMAP}", _text(path, files[LABELMAP]))
    colours = _colours(f"{path}, {LABELMAP}", labels, classes, mapping)
    masks = {
        name[len(MASKS) : -len(".png")]: name
        for name in files
        if name.startswith(MASKS) and name.endswith(".png")
    }
    lists = [name for name in files if name.startswith(LISTS) and name.endswith(".txt")]
    lines = {
        line.strip()
        for name in lists
        for line in _text(path, files[name]).splitlines()
        if line.strip()
    }
    empty = sorted(
        line for line in lines if line not in masks and without_suffix(line) not in masks
    )
    if not masks:
        raise ValueError(f"{path} holds no mask in {MASKS}: nothing in it is labelled")
    names = [*masks, *empty]
    jobs = {}
    ids = _ids(path, names, found)
    _each_once(path, ids[: len(masks)])
    empty = [name for name in empty if ids[names.index(name)] not in ids[: len(masks)]]
    for written, name in zip(names, ids, strict=True):
        member = files[masks[written]] if written in masks else None
        if member is None and name in jobs:
            continue  # listed under another path than its mask
        draw = (
            partial(_coloured, path, member, colours)
            if member
            else partial(_background, found[name])
        )
        size = partial(_size, path, member) if member else None
        jobs[name] = Drawn(f"{path.name}, {member or written}", draw, size)
    notes = [f"{len(empty)} listed images have no mask: background"] if empty else []
    texts = [
        (n, sha256(path / m)) for n, m in files.items() if path.is_dir() and not _is_picture(n)
    ]
    return (
        jobs,
        notes,
        {"cvat": sha256(path) if path.is_file() else fingerprint(texts), "map": mapping or {}},
    )


def labelmap_colours(folder: Path, classes: Taxonomy, mapping=None) -> dict | None:
    """What the colours of masks mean by a ``labelmap.txt`` beside their folder; None where there
    is none."""
    if not (folder / LABELMAP).is_file():
        return None
    where = str(folder / LABELMAP)
    return _colours(where, _labelmap(where, _text(folder, LABELMAP)), classes, mapping)


def read_by_labelmap(file: Path, colours: dict) -> np.ndarray:
    """Class ids uint8 [H, W] of a mask beside a ``labelmap.txt``: a palette counts by its
    colours, grey values are ids."""
    with opened(file) as image:
        return (
            _by_labels(image, colours)
            if image.mode in ("P", "RGB", "RGBA")
            else by_value(image, file)
        )


def _instead(files: dict[str, str]) -> str:
    """What an archive without labelmap.txt holds instead, where that can be told."""
    names = [name.rpartition("/")[2] for name in files]
    if "annotations.xml" in names:
        return ". This is CVAT's own format (annotations.xml: CVAT for images), which is not read"
    if any(name.startswith("instances_") and name.endswith(".json") for name in names):
        return '. This is an export as "COCO 1.0": unpack it and give its JSON as --coco'
    return ""


def _colours(
    where: str, labels: dict[tuple, str], classes: Taxonomy, mapping
) -> dict[tuple, int | str]:
    """{colour: class id, or the label that is no class, which no mask may show}."""
    names = [label for label in labels.values() if label.lower() != "background"]
    known = {label: class_of(label, classes) for label in names}
    given = {label_studio.IGNORED: "ignore"} | (mapping or {})
    used = [label for label in names if label in given or known[label] is not None]
    try:
        values = category_values(
            [{"id": n, "name": n} for n in used],
            classes,
            {k: v for k, v in given.items() if k in used},
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if strange := sorted((mapping or {}).keys() - set(names)):
        raise ValueError(
            f"{where}: map: label {strange[0]!r} is not in the file; allowed: {', '.join(names)}"
        )
    if not values:
        raise ValueError(
            f"{where}: none of the labels {', '.join(names[:20])} is a class of taxonomy "
            f"{classes.name!r}; map each to a "
            "class, to ignore (255) or to background, as in --map NAME=ignore"
        )
    return {
        colour: values.get(label, label if label in names else 0)
        for colour, label in labels.items()
    }


def _ids(path: Path, written: list[str], found: dict[str, Path]) -> list[str]:
    """Ids of the images that ``written`` names; ValueError for those that are not there, or are
    labelled twice."""
    find = Finder(found)
    ids = [find(name) or find.upload(name) for name in written]
    missing = [find.near(name) for name, one in zip(written, ids, strict=True) if one is None]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of its {len(written)} images are not in --images, such as "
            f"{', '.join(missing[:5])}"
        )
    return ids


def _each_once(path: Path, ids: list[str]) -> None:
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(
            f"{path} labels {len(twice)} images twice, such as {twice[:5]}: export each from one "
            "task"
        )


def _is_picture(name: str) -> bool:
    return name.startswith(("JPEGImages/", "SegmentationObject/"))


def _files(path: Path) -> dict[str, str]:
    """{name of a file: its member in the zip, or path below the folder} without hidden ones."""
    if path.is_dir():
        files = {
            p.relative_to(path).as_posix(): p.relative_to(path).as_posix() for p in walk(path)[0]
        }
        return dict(sorted(files.items()))
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {path}")
    if path.suffix.lower() == ".xml":
        raise ValueError(
            f'{path} is an XML file: export the task or project from CVAT as "Segmentation mask '
            '1.1", a zip'
        )
    try:
        with zipfile.ZipFile(path) as archive:
            files = {
                _member_name(info): info.filename
                for info in archive.infolist()
                if not info.is_dir()
            }
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no zip file, or damaged: {error}") from None
    return {
        name: files[name]
        for name in sorted(files)
        if not any(p.startswith(HIDDEN) for p in name.split("/"))
    }


def _member_name(info: zipfile.ZipInfo) -> str:
    """A member's name, whose UTF-8 some programs write without the flag that says so."""
    name = info.filename.replace("\\", "/")
    if not info.flag_bits & 0x800:
        with suppress(UnicodeError):
            return name.encode("cp437").decode("utf-8")
    return name


def _read(path: Path, name: str, limit: int = MAX_BYTES) -> bytes:
    try:
        if path.is_dir():
            size, read = (path / name).stat().st_size, (path / name).read_bytes
        else:
            with zipfile.ZipFile(path) as archive:
                size = archive.getinfo(name).file_size
            read = partial(_unpacked, path, name)
        if size > limit:
            raise ValueError(f"{path}, {name} is larger than {limit >> 20} MiB unpacked")
        return read()
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        KeyError,
    ) as error:
        raise ValueError(
            f"{path}, {name} is damaged, or packed in a way that is not read: {error}"
        ) from None


def _unpacked(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def _text(path: Path, name: str) -> str:
    return decode(_read(path, name, MAX_TEXT), f"{path}, {name}")


def _labelmap(where: str, text: str) -> dict[tuple[int, int, int], str]:
    """{colour: label} of lines ``label:red,green,blue:parts:actions``."""
    found = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.strip().split(":")
        numbers = fields[1].split(",") if len(fields) > 1 else []
        if len(numbers) != 3 or not all(n.strip().isdecimal() and int(n) < 256 for n in numbers):
            raise ValueError(
                f"{where}: {line!r:.100}; expected label:red,green,blue:parts:actions, colours "
                "from 0 to 255"
            )
        colour = tuple(int(n) for n in numbers)
        if found.setdefault(colour, fields[0]) != fields[0]:
            raise ValueError(
                f"{where}: {found[colour]!r} and {fields[0]!r} have the same colour {colour}; "
                "change one in CVAT"
            )
    return found


def _coloured(path: Path, name: str, colours: dict) -> np.ndarray:
    with opened(io.BytesIO(_read(path, name))) as image:
        return _by_labels(image, colours)


def _by_labels(image, colours: dict) -> np.ndarray:
    """Class ids uint8 [H, W]; a palette counts by its colours. ValueError names colours that no
    label has, and labels that are no class."""
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    codes, inverse = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]), return_inverse=True)
    seen = [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in codes]
    unknown = [c for c in seen if c not in colours]
    labels = sorted({colours[c] for c in seen if isinstance(colours.get(c), str)})
    if labels:
        raise ValueError(
            f"{len(labels)} labels in it are no class of the taxonomy: {', '.join(labels[:20])}. "
            "Map each to a class, to "
            "ignore (255) or to background, as in --map NAME=ignore"
        )
    if unknown:
        raise ValueError(
            f"{len(unknown)} colours that no label in {LABELMAP} has, such as {unknown[:5]}"
        )
    return np.array([colours[c] for c in seen], np.uint8)[inverse].reshape(pixels.shape[:2])


def _size(path: Path, name: str) -> tuple[int, int]:
    with opened(io.BytesIO(_read(path, name))) as image:
        return image.height, image.width


def _background(file: Path) -> np.ndarray:
    return np.zeros(image_size(file, upright=True), np.uint8)
