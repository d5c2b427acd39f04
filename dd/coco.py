"""COCO annotation files (COCO 2017, and what labelme, CVAT and Label Studio export) as semantic masks.

The rule, ours: objects painted from large to small so that small ones stay visible; crowd regions are 255 where no object
covers them; images without objects are background. Polygons and run lengths are rasterised by pycocotools.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from pycocotools import mask as rle

from dd.provenance import read_json
from dd.taxonomy import BACKGROUND, IGNORE, Taxonomy


@dataclass(frozen=True)
class Shape:
    """One annotation: the class id (0 to 254, or 255) it paints, its segmentation as in the file, is it a crowd."""

    id: int
    value: int
    segmentation: list | dict
    crowd: bool = False


@dataclass(frozen=True)
class CocoImage:
    file_name: str
    height: int
    width: int
    shapes: tuple[Shape, ...]

    @property
    def stem(self) -> str:
        """File name without folders and suffix."""
        return PurePosixPath(self.file_name.replace("\\", "/")).stem


def read_coco(path: str | Path) -> dict:
    """A COCO JSON with ``images``, ``annotations`` and ``categories``; ValueError when one of them is missing or doubtful."""
    content = read_json(path)
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(p), list) for p in parts):
        raise ValueError(
            f"{path}: a COCO annotation file holds the lists {', '.join(parts)} (an instances file, not captions)"
        )
    if not content["images"]:
        raise ValueError(f"{path} lists no images")
    keys = {"images": ("id", "file_name", "height", "width"), "annotations": ("image_id", "category_id")}
    for part, needed in (*keys.items(), ("categories", ("id", "name"))):
        for row in content[part]:
            if not isinstance(row, dict):
                raise ValueError(f"{path}: an entry of {part} is no object: {str(row)[:100]}")
            missing = [k for k in needed if k not in row]
            if missing:
                raise ValueError(f"{path}: an entry of {part} has no {missing[0]!r}: {str(row)[:100]}")
            odd = [k for k in needed if k not in ("height", "width") and not isinstance(row[k], int | str)]
            if odd:
                raise ValueError(f"{path}: {odd[0]} of an entry of {part} must be a number or a text: {str(row)[:100]}")
    odd = [i for i in content["images"] if any(type(i[k]) is not int or not 0 < i[k] < 2**16 for k in ("height", "width"))]
    if odd:
        raise ValueError(f"{path}: height and width of an image must be whole numbers of pixels: {str(odd[0])[:100]}")
    for part, key in (("images", "id"), ("images", "file_name"), ("categories", "id"), ("categories", "name")):
        twice = [k for k, n in Counter(row[key] for row in content[part]).items() if n > 1]
        if twice:
            raise ValueError(f"{path}: {part} must have different {key}s, got {twice[:5]} more than once")
    return content


def category_values(categories: list[dict], taxonomy: Taxonomy, mapping: dict[str, str] | None = None) -> dict[int, int]:
    """{category id: class id}: categories are found by name (or synonym), not by id, whose gaps mean nothing.

    ``mapping``: {category name: class name, "background" or "ignore"}. ValueError lists categories that are no class, and
    names in the mapping that no category has.
    """
    mapping = mapping or {}
    targets = {BACKGROUND: 0, "ignore": IGNORE} | dict(zip(taxonomy.names, taxonomy.ids(taxonomy.names), strict=True))
    strange = sorted(mapping.keys() - {c["name"] for c in categories})
    wrong = sorted(set(mapping.values()) - targets.keys())
    if strange or wrong:
        what = f"category {strange[0]!r} is not in the file" if strange else f"class {wrong[0]!r} is not in the taxonomy"
        names = [c["name"] for c in categories] if strange else list(targets)
        raise ValueError(f"map: {what}; allowed: {', '.join(names)}")
    found = {c["id"]: mapping.get(c["name"]) or class_of(c["name"], taxonomy) for c in categories}
    unknown = [f"{c['name']} (id {c['id']})" for c in categories if found[c["id"]] is None]
    if unknown:
        raise ValueError(
            f"{len(unknown)} categories are no class of taxonomy {taxonomy.name!r}: {', '.join(unknown[:20])}. Map each to a "
            "class, to ignore (255) or to background, as in --map NAME=ignore"
        )
    return {i: targets[name] for i, name in found.items()}


def class_of(label, taxonomy: Taxonomy) -> str | None:
    """The class that a label names, "background" or "ignore"; None for none."""
    own = {BACKGROUND: BACKGROUND, "_background_": BACKGROUND, "__ignore__": "ignore"}  # labelme's
    return own.get(str(label).strip().lower()) or taxonomy.find(label)


def images_of(content: dict, values: dict[int, int], crowds: bool = True) -> tuple[list[CocoImage], list[str]]:
    """(images with their shapes in the order of the file, warnings with counts); ``crowds=False`` paints crowds as objects.

    ValueError for annotations of an unknown image or category, and when no annotation has a mask.
    """
    known = {image["id"] for image in content["images"]}
    lost = [a["image_id"] for a in content["annotations"] if a["image_id"] not in known]
    strange = Counter(a["category_id"] for a in content["annotations"] if a["category_id"] not in values)
    if lost:
        raise ValueError(
            f"{len(lost)} annotations belong to images that the file does not list, such as image_id {sorted(set(lost))[:5]}"
        )
    if strange:
        raise ValueError(
            f"{sum(strange.values())} annotations have category ids that the file does not define: {sorted(strange)[:20]}; "
            f"defined: {sorted(values)}"
        )
    shapes, empty, crowd = {i: [] for i in known}, 0, 0
    for number, row in enumerate(content["annotations"]):
        if not row.get("segmentation"):
            empty += 1
            continue
        crowd += bool(row.get("iscrowd")) and crowds
        shape = Shape(
            row.get("id", number), values[row["category_id"]], row["segmentation"], bool(row.get("iscrowd")) and crowds
        )
        shapes[row["image_id"]].append(shape)
    if empty and empty == len(content["annotations"]):
        raise ValueError(f"none of the {empty} annotations has a segmentation: boxes alone make no masks")
    notes = [f"{empty} annotations have no segmentation (boxes?): left out"] if empty else []
    notes += [f"{crowd} crowd annotations (iscrowd=1) are 255 where no object covers them"] if crowd else []
    images = [CocoImage(i["file_name"], i["height"], i["width"], tuple(shapes[i["id"]])) for i in content["images"]]
    return images, notes


def draw(image: CocoImage) -> np.ndarray:
    """Class ids uint8 [H, W] by the rule above; ValueError names the annotation that cannot be drawn."""
    mask, objects = np.zeros((image.height, image.width), np.uint8), []
    for shape in image.shapes:
        code = _encode(shape, image.height, image.width)
        if code is None:
            continue
        if shape.crowd:
            mask[rle.decode(code) > 0] = IGNORE
        else:
            objects.append((int(rle.area(code)), shape.value, code))
    for _, value, code in sorted(objects, key=lambda item: -item[0]):  # stable: equal areas in the order of the file
        mask[rle.decode(code) > 0] = value
    return mask


def lost(image: CocoImage) -> int:
    """How many of its annotations cover no pixel: polygons without an area or outside the image, empty run lengths."""
    codes = (_encode(shape, image.height, image.width) for shape in image.shapes)
    return sum(code is None or not rle.area(code) for code in codes)


def _encode(shape: Shape, height: int, width: int) -> dict | None:
    """Run lengths of a segmentation; None for polygons without an area."""
    segmentation = shape.segmentation
    try:
        if isinstance(segmentation, list):
            if any(len(p) % 2 for p in segmentation):
                raise ValueError("a polygon has an odd number of coordinates")
            # pycocotools would read four numbers as a box
            polygons = [[float(x) for x in p] for p in segmentation if len(p) >= 6]
            return rle.merge(rle.frPyObjects(polygons, height, width)) if polygons else None
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"its run lengths are for [height, width] {segmentation['size']}, the image is {[height, width]}")
        if isinstance(segmentation["counts"], list):
            if sum(segmentation["counts"]) != height * width or min(segmentation["counts"]) < 0:
                raise ValueError("its run lengths do not add up to the image")
            return rle.frPyObjects(segmentation, height, width)
        rle.decode(segmentation)  # raises for damaged text
        return segmentation
    except KeyError as error:
        raise ValueError(f"annotation {shape.id}: its segmentation has no {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"annotation {shape.id}: {error}") from None
