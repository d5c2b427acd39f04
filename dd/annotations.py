"""Labels as CVAT ("Segmentation mask 1.1") and Label Studio (JSON) export them: for each image what draws its mask."""

import io
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from dd import label_studio
from dd.coco import category_values
from dd.datasets import image_size, opened
from dd.folders import Finder, walk
from dd.provenance import decode, fingerprint, read_json, sha256
from dd.taxonomy import Taxonomy

LABELMAP, MASKS, LISTS = "labelmap.txt", "SegmentationClass/", "ImageSets/Segmentation/"
MAX_BYTES = 1 << 28  # of one file in a zip, whose header may claim any size


def label_values(labels: list[str], classes: Taxonomy, mapping: dict[str, str] | None) -> dict[str, int]:
    """{label: class id or 255}: found by name, synonym or ``mapping``; ``ignored`` is 255, as in our own exports. ValueError
    lists the labels that are no class."""
    given = {label_studio.IGNORED: "ignore"} if label_studio.IGNORED in labels else {}
    return category_values([{"id": n, "name": n} for n in labels], classes, given | (mapping or {}))


def label_studio_masks(path: Path, found: dict[str, Path], classes: Taxonomy, mapping=None) -> tuple[dict, list[str], dict]:
    """({image id: (where, function that draws its mask)}, notes, identity) of a JSON export. ValueError for unknown labels
    and for images that are not among ``found`` {id: file}."""
    images, notes = label_studio.read_export(path, read_json(path))
    labels = sorted({label for image in images for label, _ in image.brushes})
    try:
        values = label_values(labels, classes, mapping)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    ids = _ids(path, [image.file for image in images], found)
    empty = sum(not image.brushes for image in images)
    notes += [f"{empty} annotations have no brush: background"] if empty else []
    jobs = {
        name: (f"{path.name}, {image.file}", partial(_brushes, image, values, found[name]))
        for name, image in zip(ids, images, strict=True)
    }
    return jobs, notes, {"label_studio_sha256": sha256(path), "map": mapping or {}}


def _brushes(image, values: dict[str, int], file: Path) -> np.ndarray:
    return label_studio.draw(image, values, image_size(file, upright=True))


def cvat_masks(path: Path, found: dict[str, Path], classes: Taxonomy, mapping=None) -> tuple[dict, list[str], dict]:
    """As :func:`label_studio_masks`, of a zip or an unpacked folder of "Segmentation mask 1.1". Colours are those of its
    ``labelmap.txt``, whatever the taxonomy's; an image that its lists hold without a mask is background."""
    files = _files(path)
    if LABELMAP not in files:
        raise ValueError(f'{path} has no {LABELMAP}: export the task or project from CVAT as "Segmentation mask 1.1"')
    labels = _labelmap(f"{path}, {LABELMAP}", _text(path, LABELMAP))
    used = [label for label in labels.values() if label.lower() != "background"]
    try:
        values = label_values(used, classes, mapping)
    except ValueError as error:
        raise ValueError(f"{path}, {LABELMAP}: {error}") from None
    colours = {colour: values.get(label, 0) for colour, label in labels.items()}
    masks = {name[len(MASKS) : -len(".png")]: name for name in files if name.startswith(MASKS) and name.endswith(".png")}
    lists = [name for name in files if name.startswith(LISTS) and name.endswith(".txt")]
    listed = {line.strip() for name in lists for line in _text(path, name).splitlines() if line.strip()}
    empty = sorted(listed - masks.keys())
    if not masks:
        raise ValueError(f"{path} holds no mask in {MASKS}: nothing in it is labelled")
    names = [*masks, *empty]
    jobs = {}
    for written, name in zip(names, _ids(path, names, found), strict=True):
        member = masks.get(written)
        draw = partial(_coloured, path, member, colours) if member else partial(_background, found[name])
        jobs[name] = (f"{path.name}, {member or written}", draw)
    notes = [f"{len(empty)} listed images have no mask: background"] if empty else []
    state = sha256(path) if path.is_file() else fingerprint([(n, sha256(path / n)) for n in files if not _is_picture(n)])
    return jobs, notes, {"cvat": state, "map": mapping or {}}


def _ids(path: Path, written: list[str], found: dict[str, Path]) -> list[str]:
    find = Finder(found)
    ids = [find(name) for name in written]
    missing = [find.near(name) for name, one in zip(written, ids, strict=True) if one is None]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of its {len(written)} images are not in --images, such as {', '.join(missing[:5])}"
        )
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"{path} labels {len(twice)} images twice, such as {twice[:5]}: export each from one task")
    return ids


def _is_picture(name: str) -> bool:
    return name.startswith(("JPEGImages/", "SegmentationObject/"))


def _files(path: Path) -> list[str]:
    if path.is_dir():
        return [p.relative_to(path).as_posix() for p in walk(path)[0]]
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(name for name in archive.namelist() if not name.endswith("/"))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no zip file, or damaged: {error}") from None


def _read(path: Path, name: str) -> bytes:
    if path.is_dir():
        return (path / name).read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(name).file_size > MAX_BYTES:
                raise ValueError(f"{path}, {name} is larger than {MAX_BYTES >> 20} MiB unpacked")
            return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}, {name} is damaged, or packed in a way that is not read: {error}") from None


def _text(path: Path, name: str) -> str:
    return decode(_read(path, name), f"{path}, {name}")


def _labelmap(where: str, text: str) -> dict[tuple[int, int, int], str]:
    """{colour: label} of lines ``label:red,green,blue:parts:actions``."""
    found = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.strip().split(":")
        numbers = fields[1].split(",") if len(fields) > 1 else []
        if len(numbers) != 3 or not all(n.strip().isdecimal() and int(n) < 256 for n in numbers):
            raise ValueError(f"{where}: {line!r:.100}; expected label:red,green,blue:parts:actions, colours from 0 to 255")
        colour = tuple(int(n) for n in numbers)
        if found.setdefault(colour, fields[0]) != fields[0]:
            raise ValueError(f"{where}: {found[colour]!r} and {fields[0]!r} have the same colour {colour}; change one in CVAT")
    return found


def _coloured(path: Path, name: str, colours: dict) -> np.ndarray:
    """Class ids uint8 [H, W]; a palette counts by its colours. ValueError names colours that no label has."""
    with opened(io.BytesIO(_read(path, name))) as image:
        pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    codes, inverse = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]), return_inverse=True)
    seen = [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in codes]
    unknown = [c for c in seen if c not in colours]
    if unknown:
        raise ValueError(f"{len(unknown)} colours that no label in {LABELMAP} has, such as {unknown[:5]}")
    return np.array([colours[c] for c in seen], np.uint8)[inverse].reshape(pixels.shape[:2])


def _background(file: Path) -> np.ndarray:
    return np.zeros(image_size(file, upright=True), np.uint8)
