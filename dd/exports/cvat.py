"""CVAT's "Segmentation mask 1.1": one zip in PASCAL VOC layout with coloured masks and
``labelmap.txt``, and ``labels.json``.

``SegmentationClass`` holds the classes' colours. ``SegmentationObject`` numbers the regions that
CVAT draws: one for each class of an image, and none for background, which would otherwise become a
mask over the whole image.
"""

import json
import zipfile
from functools import partial
from pathlib import Path

import numpy as np

from dd.exports.source import ExportItem, Source, png, read_ids
from dd.exports.target import Target
from dd.taxonomy import IGNORE, voc_palette

IGNORED = "ignored"  # the label of 255, as in CVAT's own map of VOC
ARCHIVE = "cvat.zip"


def check(source: Source, link: bool) -> list[str]:
    """ValueError for a class name that labelmap.txt cannot hold."""
    for name in source.taxonomy.names:
        marked = ":" in name or name.startswith("#")
        if marked or name != name.strip() or len(name.splitlines()) != 1:
            raise ValueError(
                f"class {name!r}: a name in CVAT's labelmap.txt has no colon, line break, # at "
                "its start or blank at an end; rename the class in a taxonomy file, or choose "
                "another format"
            )
        if name.lower() == IGNORED:
            raise ValueError(
                f"class {name!r}: CVAT's label {IGNORED!r} is that of uncertain pixels here; "
                "rename the class"
            )
    return ["--link changes nothing: a zip file holds copies"] if link else []


def write(source: Source, target: Target) -> None:
    labels = _labels(source)
    if target.missing(ARCHIVE):
        with target.whole(ARCHIVE) as path:
            _zip(source, labels, path, target)
    target.write("labels.json", partial(_project, labels))


def _labels(source: Source) -> dict[str, list[int]]:
    """{label: colour}, including background and, last, uncertain pixels."""
    names = {name: source.colour(i) for i, name in enumerate(source.taxonomy.all_names)}
    return names | {IGNORED: source.colour(IGNORE)}


def _zip(source: Source, labels: dict[str, list[int]], path: Path, target: Target) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        lines = [f"{name}:{','.join(map(str, colour))}::\n" for name, colour in labels.items()]
        _add(archive, "labelmap.txt", "# label:color_rgb:parts:actions\n" + "".join(lines))
        for split, names in source.splits.items():
            listed = "".join(f"{name}\n" for name in names)
            _add(archive, f"ImageSets/Segmentation/{split}.txt", listed)
        for item in source.items.values():
            classes, regions = _coloured(source, item)
            _add(archive, f"JPEGImages/{item.id}{item.suffix}", item.image.read_bytes())
            _add(archive, f"SegmentationClass/{item.id}.png", classes)
            _add(archive, f"SegmentationObject/{item.id}.png", regions)
            target.done(item)


def _coloured(source: Source, item: ExportItem) -> tuple[bytes, bytes]:
    """(classes in their colours, regions in VOC's colours of 1, 2, ...) as PNGs."""
    ids, numbers = read_ids(item), np.zeros(256, np.uint8)
    present = [value for value in item.values if value != 0]
    numbers[present] = range(1, len(present) + 1)
    palettes = source.taxonomy.palette, voc_palette()
    classes, regions = (np.array(palette, np.uint8).reshape(256, 3) for palette in palettes)
    return png(classes[ids]), png(regions[numbers[ids]])


def _add(archive: zipfile.ZipFile, name: str, data: bytes | str) -> None:
    member = zipfile.ZipInfo(name)  # 1980, no permissions: the bytes depend on the content alone
    member.external_attr, member.create_system = 0o644 << 16, 3
    archive.writestr(member, data)


def _project(labels: dict[str, list[int]]) -> str:
    """The labels of a new project or task in CVAT's form (Raw)."""
    rows = [
        {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*colour), "attributes": []}
        for name, colour in labels.items()
        if name != "background"
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
