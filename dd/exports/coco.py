"""COCO: semantic masks as run lengths (``semantic_<split>.json``) and panoptic PNGs with
``panoptic_<split>.json``.

A class of an image is one annotation or segment, because masks know classes, not objects. Category
ids are pixel values, background is category 0. Uncertain pixels are in no annotation, and 0 (void)
in the panoptic PNGs, whose segment id is category id + 1.
"""

import json
from functools import partial
from typing import Any

import numpy as np
from pycocotools import mask as rle

from dd.exports.source import ExportItem, Source, png, read_ids
from dd.exports.target import Target
from dd.taxonomy import IGNORE

NOTE = (
    "Masks of classes, not of objects: one annotation (or segment) is all that an image shows of "
    "a class, and instances are not real. Pixels in no annotation (panoptic: id 0) are uncertain "
    "and are to be ignored; category 0 is background."
)

Content = dict[str, Any]  # of a JSON file, or of an entry in it


def check(source: Source, link: bool) -> list[str]:
    return []


def write(source: Source, target: Target) -> None:
    numbers = {name: i for i, name in enumerate(source.items, 1)}
    for item in source.items.values():
        target.place(item.image, f"images/{item.id}{item.suffix}")
        target.write(f"panoptic/{item.id}.png", partial(_panoptic, item))
    for split in source.splits:
        names = f"semantic_{split}.json", f"panoptic_{split}.json"
        missing = [name for name in names if target.missing(name)]
        contents = dict(zip(names, _split(source, split, numbers), strict=True)) if missing else {}
        for name in missing:
            with target.whole(name) as path:
                path.write_text(json.dumps(contents[name], ensure_ascii=False), encoding="utf-8")
        for item in source.each(split):
            target.done(item)


def _panoptic(item: ExportItem) -> bytes:
    ids = read_ids(item)
    segments = np.where(ids == IGNORE, 0, ids.astype(np.int32) + 1)  # R + 256 G + 65536 B
    colours = [segments & 255, segments >> 8 & 255, segments >> 16]
    return png(np.stack(colours, axis=-1).astype(np.uint8))


def _split(source: Source, split: str, numbers: dict[str, int]) -> tuple[Content, Content]:
    """(semantic, panoptic) content of a split."""
    images, semantic, panoptic = (list[Content]() for _ in range(3))
    for item in source.each(split):
        number, (height, width) = numbers[item.id], item.size
        image = {"id": number, "file_name": f"{item.id}{item.suffix}"}
        images.append({**image, "height": height, "width": width, **item.facts})
        segments = []
        for value, region in _regions(item).items():
            plain = {"category_id": value, "iscrowd": 0}
            semantic.append({"id": len(semantic) + 1, "image_id": number, **plain, **region})
            place = {"area": region["area"], "bbox": region["bbox"]}
            segments.append({"id": value + 1, **plain, **place})
        file = f"{item.id}.png"
        panoptic.append({"image_id": number, "file_name": file, "segments_info": segments})
    info = {"description": NOTE, "data_set": source.name, "split": split}
    head, tail = {"info": info, "images": images}, {"categories": _categories(source)}
    return {**head, "annotations": semantic, **tail}, {**head, "annotations": panoptic, **tail}


def _regions(item: ExportItem) -> dict[int, Content]:
    """{class id: run lengths, area in pixels and box [x, y, width, height]} of the classes in a
    mask."""
    ids, found = read_ids(item), {}
    for value in item.values:
        if value != IGNORE:
            code = rle.encode(np.asfortranarray(ids == value, np.uint8))
            area, box = int(rle.area(code)), [float(x) for x in rle.toBbox(code)]
            counts = code["counts"].decode("ascii")
            text = {"size": [int(n) for n in code["size"]], "counts": counts}
            found[value] = {"segmentation": text, "area": area, "bbox": box}
    return found


def _categories(source: Source) -> list[Content]:
    return [
        {
            "id": i,
            "name": name,
            "supercategory": name if i == 0 else source.taxonomy.name,
            "isthing": 0,
            "color": source.colour(i),
        }
        for i, name in enumerate(source.taxonomy.all_names)
    ]
