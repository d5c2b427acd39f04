"""COCO annotation files (COCO 2017, and what labelme, CVAT and Label Studio export) as semantic
masks.

Our rule: objects are painted from large to small so that small ones stay visible; crowd regions are
255 where no object covers them; images without objects are background. Polygons and run lengths are
rasterised by pycocotools.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as rle

from dd.store.provenance import read_json
from dd.taxonomy import BACKGROUND, IGNORE, Taxonomy

FAR = 1e12  # pixels; beyond this the exact coordinate no longer matters
PARTS = {  # lists of a file, and the keys of their entries
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id"),
    "categories": ("id", "name"),
}
SIDES = ("height", "width")


@dataclass(frozen=True)
class Shape:
    """One annotation: the class id (0 to 254, or 255) it paints, its segmentation as in the file,
    and whether it is a crowd."""

    id: int | str
    value: int
    segmentation: list[Any] | dict[str, Any]
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


def read_coco(path: str | Path) -> dict[str, Any]:
    """A COCO JSON with ``images``, ``annotations`` and ``categories``, whole numbers as int;
    ValueError if one of them is missing or ambiguous."""
    content = read_json(path)
    if not isinstance(content, dict) or any(not isinstance(content.get(p), list) for p in PARTS):
        raise ValueError(
            f"{path}: a COCO annotation file holds the lists {', '.join(PARTS)} "
            f"(an instances file, not captions){_instead(content)}"
        )
    if not content["images"]:
        raise ValueError(f"{path} lists no images")
    for part, needed in PARTS.items():
        for row in content[part]:
            if wrong := _wrong_entry(row, part, needed, content):
                raise ValueError(f"{path}: {wrong}")
    for image in content["images"]:
        if any(type(image[k]) is not int or not 0 < image[k] < 2**16 for k in SIDES):
            raise ValueError(
                f"{path}: height and width of an image must be whole numbers of pixels: "
                f"{str(image)[:100]}"
            )
    for part, key in (("images", "id"), ("images", "file_name"), ("categories", "id")):
        number = Counter(row[key] for row in content[part])
        if twice := [k for k, n in number.items() if n > 1]:
            raise ValueError(
                f"{path}: {part} must have different {key}s, "
                f"got {str(twice[:5])[:200]} more than once"
            )
    return content


def _wrong_entry(
    row: Any, part: str, needed: tuple[str, ...], content: dict[str, Any]
) -> str | None:
    """What is wrong with an entry of a list, None if nothing is. Makes its whole numbers int."""
    if not isinstance(row, dict):
        return f"an entry of {part} is not an object: {str(row)[:100]}"
    if missing := [k for k in needed if k not in row]:
        return f"an entry of {part} has no {missing[0]!r}: {str(row)[:100]}{_instead(content)}"
    row |= {k: _whole(row[k]) for k in needed}
    if odd := [k for k in needed if k not in SIDES and type(row[k]) not in (int, str)]:
        return f"{odd[0]} of an entry of {part} must be a number or a text: {str(row)[:100]}"
    return None


def _whole(value: Any) -> Any:
    """3 for 3.0, as some programs write whole numbers; anything else unchanged."""
    return int(value) if type(value) is float and value.is_integer() else value


def _instead(content: Any) -> str:
    """What a JSON is instead of an instances file, if that can be told."""
    rows = content.get("annotations") if isinstance(content, dict) else None
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    if "segments_info" in first:
        same = "give the instances file of the same images"
        return f". This is a panoptic file, which is not read: {same}"
    if "caption" in first:
        return ". This is a file of captions"
    if isinstance(content, dict) and isinstance(content.get("image"), dict) and rows is not None:
        return ". This is SA-1B's form, one file an image and without classes, which is not read"
    if isinstance(content, dict) and "shapes" in content:
        return ". This is a file of labelme: labelme2coco makes one COCO file of all of them"
    if isinstance(content, list):
        return ". A list of tasks comes from Label Studio: --label-studio"
    return ""


def category_values(
    categories: list[dict[str, Any]],
    taxonomy: Taxonomy,
    mapping: Mapping[str, str] | None = None,
    used: Collection[Any] | None = None,
) -> dict[Any, int]:
    """{category id: class id}: categories are matched by name (or synonym), not by id, since ids
    have gaps.

    ``mapping``: {category name: class name, "background" or "ignore"}; ``used``: ids of the
    categories that need a class, None = all. ValueError lists categories without a class, and names
    in the mapping that no category has.
    """
    mapping = mapping or {}
    targets = {BACKGROUND: 0, "ignore": IGNORE}
    targets |= {name: i for i, name in enumerate(taxonomy.names, 1)}
    names = [str(c["name"]) for c in categories]
    if strange := sorted(mapping.keys() - set(names)):
        what = f"category {strange[0]!r} is not in the file"
        raise ValueError(f"map: {what}; allowed: {', '.join(names)}")
    if wrong := sorted(set(mapping.values()) - targets.keys()):
        what = f"class {wrong[0]!r} is not in the taxonomy"
        raise ValueError(f"map: {what}; allowed: {', '.join(targets)}")
    found = {
        c["id"]: mapping.get(str(c["name"])) or class_of(c["name"], taxonomy) for c in categories
    }
    needed = [c for c in categories if used is None or c["id"] in used]
    unknown = [f"{c['name']} (id {c['id']})" for c in needed if found[c["id"]] is None]
    if unknown:
        raise ValueError(
            f"{len(unknown)} categories are not a class of taxonomy {taxonomy.name!r}: "
            f"{', '.join(unknown[:20])}. "
            "Map each to a class, to ignore (255) or to background, as in --map NAME=ignore"
        )
    return {i: targets[name] for i, name in found.items() if name is not None}


def _in_order(name: int | str) -> tuple[bool, int | str]:
    return isinstance(name, str), name


def used_categories(content: dict[str, Any]) -> set[Any]:
    """Ids of the categories that an annotation has; exports also list unused ones."""
    return {row["category_id"] for row in content["annotations"]}


def class_of(label: object, taxonomy: Taxonomy) -> str | None:
    """The class that a label names, "background" or "ignore"; None if it names none."""
    own = {BACKGROUND: BACKGROUND, "_background_": BACKGROUND, "__ignore__": "ignore"}  # labelme's
    return own.get(str(label).strip().lower()) or taxonomy.find(label)


def images_of(
    content: dict[str, Any], values: Mapping[Any, int], crowds: bool = True
) -> tuple[list[CocoImage], list[str]]:
    """(images with their shapes in the order of the file, warnings with counts); ``crowds=False``
    paints crowds as objects.

    ValueError for annotations of an unknown image or category, and if no annotation has a mask.
    """
    known = {image["id"] for image in content["images"]}
    lost = [a["image_id"] for a in content["annotations"] if a["image_id"] not in known]
    strange = Counter(
        a["category_id"] for a in content["annotations"] if a["category_id"] not in values
    )
    if lost:
        raise ValueError(
            f"{len(lost)} annotations belong to images that the file does not list, "
            f"such as image_id {sorted(set(lost), key=_in_order)[:5]}"
        )
    if strange:
        raise ValueError(
            f"{sum(strange.values())} annotations have category ids that the file does not define: "
            f"{sorted(strange, key=_in_order)[:20]}; defined: {sorted(values, key=_in_order)}"
        )
    shapes: dict[Any, list[Shape]] = {i: [] for i in known}
    empty, crowd = 0, 0
    for number, row in enumerate(content["annotations"]):
        if not row.get("segmentation"):
            empty += 1
            continue
        name = row.get("id", number)
        is_crowd = _crowd(row, name) and crowds
        crowd += is_crowd
        shape = Shape(name, values[row["category_id"]], row["segmentation"], is_crowd)
        shapes[row["image_id"]].append(shape)
    if empty and empty == len(content["annotations"]):
        raise ValueError(
            f"none of the {empty} annotations has a segmentation: boxes alone make no masks"
        )
    notes = [f"{empty} annotations have no segmentation (boxes?): left out"] if empty else []
    if crowd:
        notes.append(f"{crowd} crowd annotations (iscrowd=1) are 255 where no object covers them")
    images = [
        CocoImage(i["file_name"], i["height"], i["width"], tuple(shapes[i["id"]]))
        for i in content["images"]
    ]
    return images, notes


def _crowd(row: dict[str, Any], name: int | str) -> bool:
    """``iscrowd`` in any form: a number, true or false, or text of them. ValueError names the
    annotation."""
    written = row.get("iscrowd")
    found = {"0": False, "1": True, "false": False, "true": True, "none": False}.get(
        str(_whole(written)).strip().lower()
    )
    if found is None:
        raise ValueError(f"annotation {name!s:.50}: iscrowd is {written!r:.100}; expected 0 or 1")
    return found


def draw(image: CocoImage) -> np.ndarray:
    """Class ids uint8 [H, W] by the rule above; ValueError names the annotation that cannot be
    drawn."""
    mask, objects = np.zeros((image.height, image.width), np.uint8), []
    for shape in image.shapes:
        code = _encode(shape, image.height, image.width)
        if code is None:
            continue
        if shape.crowd:
            mask[rle.decode(code) > 0] = IGNORE
        else:
            objects.append((int(rle.area(code)), shape.value, code))
    objects.sort(key=lambda item: -item[0])  # stable: equal areas in the order of the file
    for _, value, code in objects:
        mask[rle.decode(code) > 0] = value
    return mask


def lost(image: CocoImage) -> int:
    """How many of its annotations cover no pixel: polygons without an area or outside the image,
    empty run lengths."""
    codes = (_encode(shape, image.height, image.width) for shape in image.shapes)
    return sum(code is None or not rle.area(code) for code in codes)


def _encode(shape: Shape, height: int, width: int) -> dict[str, Any] | None:
    """Run lengths of a segmentation; None for polygons without an area."""
    try:
        polygons, codes = _parts(shape.segmentation)
        if any(len(p) % 2 for p in polygons):
            raise ValueError("a polygon has an odd number of coordinates")
        # pycocotools would read four numbers as a box, and needs memory for each pixel of an edge
        polygons = [_cut(p, height, width) for p in polygons if len(p) >= 6]
        polygons = [p for p in polygons if len(p) >= 6]
        codes = [_run_lengths(code, height, width) for code in codes]
        codes += rle.frPyObjects(polygons, height, width) if polygons else []
        return (codes[0] if len(codes) == 1 else rle.merge(codes)) if codes else None
    except KeyError as error:
        raise ValueError(f"annotation {shape.id!s:.50}: its segmentation has no {error}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"annotation {shape.id!s:.50}: {error!s:.300}") from None


def _parts(segmentation: Any) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """(polygons [x, y, x, y, ...], run lengths) of a segmentation: one of either, a list of both,
    or points as pairs [x, y]. ValueError names a part that is none of these."""
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    if len(parts) > 2 and _pairs(parts):
        parts = [parts]  # one polygon as pairs: a polygon has more than one point
    polygons, codes = [], []
    for part in parts:
        if isinstance(part, dict) and {"size", "counts"} & part.keys():
            codes.append(part)
        else:
            polygons.append(_polygon(part))
    return polygons, codes


def _pairs(part: Any) -> bool:
    return (
        isinstance(part, list)
        and bool(part)
        and all(isinstance(p, list) and len(p) == 2 for p in part)
    )


def _polygon(part: Any) -> list[float]:
    """[x, y, x, y, ...] of a polygon of numbers or of pairs."""
    numbers = [x for pair in part for x in pair] if _pairs(part) else part
    if not isinstance(numbers, list) or not all(type(x) in (int, float) for x in numbers):
        raise ValueError(
            f"its segmentation holds {part!r:.100}; "
            "expected polygons [[x, y, x, y, ...], ...], or run lengths with size and counts"
        )
    found = [_float(x) for x in numbers]
    if odd := [x for x in found if not math.isfinite(x)]:
        raise ValueError(f"a coordinate of its segmentation is {odd[0]}")
    return found


def _float(number: int | float) -> float:
    """A number of a JSON, which may be a whole number of any size."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _cut(polygon: list[float], height: int, width: int) -> list[float]:
    """A polygon without the parts that lie further from the image than the image's size (Sutherland
    and Hodgman, 1974)."""
    far = max(height, width)
    near = [min(max(x, -FAR), FAR) for x in polygon]  # so that differences stay finite
    points = list(zip(near[::2], near[1::2], strict=True))
    for axis, bound, sign in ((0, -far, 1), (0, 2 * far, -1), (1, -far, 1), (1, 2 * far, -1)):
        inside = [sign * (p[axis] - bound) >= 0 for p in points]
        if all(inside):
            continue
        kept: list[tuple[float, float]] = []
        for i, (p, q) in enumerate(zip(points[-1:] + points[:-1], points, strict=True)):
            if inside[i - 1] != inside[i]:
                share = (bound - p[axis]) / (q[axis] - p[axis])
                other = p[1 - axis] + share * (q[1 - axis] - p[1 - axis])
                kept.append((bound, other) if axis == 0 else (other, bound))
            if inside[i]:
                kept.append(q)
        points = kept
    return [float(x) for p in points for x in p]


def _run_lengths(code: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Checked run lengths of an image of this size, in pycocotools' form."""
    size, counts = [_whole(n) for n in code["size"]], code["counts"]
    if size != [height, width]:
        raise ValueError(
            f"its run lengths are for [height, width] {size!r:.100}, the image is {[height, width]}"
        )
    if isinstance(counts, list):
        counts = [_whole(n) for n in counts]
        if any(type(n) is not int or n < 0 for n in counts) or sum(counts) != height * width:
            raise ValueError("its run lengths do not add up to the image")
        return rle.frPyObjects({"size": size, "counts": counts}, height, width)
    if not isinstance(counts, str) or not counts.isascii():
        raise ValueError(
            f"its run lengths are {counts!r:.100}; expected a list of numbers, or text"
        )
    rle.decode({"size": size, "counts": counts})  # raises for damaged text
    return {"size": size, "counts": counts.encode()}
