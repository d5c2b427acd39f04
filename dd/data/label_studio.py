"""Label Studio: its run lengths of brushes, tasks with predictions, the labelling configuration,
and its JSON export.

A brush is an RGBA picture of the image's size, row by row; only alpha counts. Its run lengths are
bits, most significant first, in a list of bytes. First 32 bits for the number of values, 5 bits for
the word size - 1, 4 x 4 bits for (sizes of a count) - 1. Then blocks: 1 bit (1 = one value
repeated, 0 = values listed one by one), 2 bits that select one of the four sizes, count - 1 in that
many bits, and the value or values.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

import numpy as np

from dd.data.folders import IMAGES

# Bits of a value, and of the four kinds of counts, as Label Studio's own tools write them.
WORD, SIZES = 8, (3, 4, 8, 16)
# Alpha from which a pixel belongs to the brush: the edge of a stroke is half transparent.
OPAQUE = 128
DRAWN = ("labels", "brush", "mask")  # ends of the types of regions
IGNORED = "ignored"  # the label of 255, as in the export for CVAT
FROM, TO = "label", "image"  # names of the tags in the labelling configuration


def encode(mask: np.ndarray) -> list[int]:
    """The run lengths of a mask bool [H, W]: 255 in all four channels where it is true."""
    values = mask.ravel()
    ends = np.append(np.flatnonzero(values[1:] != values[:-1]) + 1, values.size)
    bits = [f"{4 * values.size:032b}", f"{WORD - 1:05b}", *(f"{size - 1:04b}" for size in SIZES)]
    start = 0
    for end in ends.tolist():
        word, left = ("1" if values[start] else "0") * WORD, 4 * (end - start)
        while left:
            run = min(left, 1 << SIZES[-1])
            kind = next(i for i, size in enumerate(SIZES) if run <= 1 << size)
            bits.append(f"1{kind:02b}{run - 1:0{SIZES[kind]}b}{word}")
            left -= run
        start = end
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def decode(rle: list[int], height: int, width: int) -> np.ndarray:
    """The mask bool [height, width] of run lengths. ValueError if they are damaged or of another
    size."""
    if not isinstance(rle, list) or any(type(b) is not int or not 0 <= b <= 255 for b in rle):
        raise ValueError("damaged run lengths: expected a list of bytes, 0 to 255")
    text, at, number = bin(int.from_bytes(bytes([1, *rle]), "big"))[3:], 53, 4 * height * width
    if len(text) < at:
        raise ValueError(f"damaged run lengths: {len(rle)} bytes, which do not hold the head")
    claimed, word = int(text[:32], 2), int(text[32:37], 2) + 1
    if claimed != number:
        raise ValueError(
            f"run lengths of {claimed} values; {width}x{height} pixels of 4 channels are {number}"
        )
    sizes = [int(text[i : i + 4], 2) + 1 for i in range(37, 53, 4)]
    values, done = np.zeros(number, np.uint8), 0
    while done < number:
        size = sizes[int(text[at + 1 : at + 3] or "0", 2)]
        repeated, head = text[at : at + 1] == "1", at + 3 + size
        run = int(text[at + 3 : head] or "0", 2) + 1
        stop = head + word * (1 if repeated else run)
        if stop > len(text) or done + run > number:
            raise ValueError(
                f"damaged run lengths: they end or overflow after {done} of {number} values"
            )
        words = [int(text[i : i + word], 2) for i in range(head, stop, word)]
        values[done : done + run] = np.minimum(words, 255)
        done, at = done + run, stop
    return values.reshape(height, width, 4)[..., 3] >= OPAQUE


def task(
    file: str,
    mask: np.ndarray,
    labels: dict[int, str],
    version: str,
    facts: dict[str, Any],
    folder: str,
) -> dict[str, Any]:
    """One task with a prediction: a brush for each of ``labels`` {pixel value: label} in ``mask``
    uint8 [H, W].

    ``file``: the image's path, kept as ``data.file``; ``folder``: the prefix of the image's quoted
    address.
    """
    height, width = mask.shape
    result = [
        {
            "id": f"class{value}",
            "type": "brushlabels",
            "from_name": FROM,
            "to_name": TO,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {"format": "rle", "rle": encode(mask == value), "brushlabels": [label]},
        }
        for value in np.unique(mask).tolist()
        if (label := labels.get(value)) is not None
    ]
    data = {"image": folder + quote(file), "file": file, **facts}
    return {"data": data, "predictions": [{"model_version": version, "result": result}]}


def configuration(labels: dict[str, tuple[int, int, int]]) -> str:
    """The labelling configuration (XML) of a project with these labels and colours."""
    rows = [
        f"    <Label value={quoteattr(n)} "
        f"background={quoteattr('#{:02x}{:02x}{:02x}'.format(*c))}/>"
        for n, c in labels.items()
    ]
    head = (
        f'<View>\n  <Image name="{TO}" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="{FROM}" toName="{TO}">\n'
    )
    return head + "\n".join(rows) + "\n  </BrushLabels>\n</View>\n"


@dataclass(frozen=True)
class Labelled:
    """One image as it came back: its ``file``, ``size`` (height, width; None without a brush), and
    ``brushes``: (label, run lengths) in drawing order."""

    file: str
    size: tuple[int, int] | None
    brushes: tuple[tuple[str, list[int]], ...]


def read_export(
    path: str | Path, content: Any, brushes_only: bool = False
) -> tuple[list[Labelled], list[str]]:
    """(labelled images, notes) of Label Studio's JSON export ``content`` (the parsed file
    ``path``). If an image has several annotations, the one changed last counts. ValueError for
    another file, and for regions that are not brushes, unless ``brushes_only`` leaves them out."""
    if not isinstance(content, list) or not all(
        isinstance(t, dict) and isinstance(t.get("annotations"), list) for t in content
    ):
        raise ValueError(
            f"{path} is not a list of tasks with annotations: "
            'export the project as "JSON" (not JSON-MIN or CSV)'
        )
    found, empty, several, others = [], 0, 0, 0
    for number, one in enumerate(content, 1):
        annotations = [a for a in one["annotations"] if isinstance(a, dict)]
        finished = [a for a in annotations if not a.get("was_cancelled")]
        if not finished:
            empty += 1
            continue
        several += len(finished) > 1
        last = max(finished, key=_changed)
        where = f"{path}, task {one.get('id', number)}"
        image, left = _labelled(where, one.get("data"), last.get("result"), brushes_only)
        found.append(image)
        others += left
    if not found:
        raise ValueError(
            f"{path}: none of its {len(content)} tasks has an annotation; "
            "predictions alone are not labels"
        )
    notes = {
        "tasks have no annotation and are left out": empty,
        "tasks have several annotations: the one changed last counts": several,
        "regions are not a brush and are left out": others,
    }
    return found, [f"{number} {what}" for what, number in notes.items() if number]


def _changed(annotation: dict[str, Any]) -> tuple[str, str]:
    """Sort key of an image's annotations: when they were changed."""
    return str(annotation.get("updated_at", "")), str(annotation.get("id", "")).zfill(20)


def _labelled(where: str, data: Any, result: Any, brushes_only: bool) -> tuple[Labelled, int]:
    """(the image with its brushes, number of regions of another kind that are left out)."""
    file = _file(data) if isinstance(data, dict) else None
    if not file or not isinstance(result, list):
        raise ValueError(
            f"{where}: expected a list result, and data.file, data.image or "
            f"one other text in data that is the image's name; got {data!r:.200}"
        )
    where = f"{where} ({file})"
    regions = [r for r in result if isinstance(r, dict) and str(r.get("type")).endswith(DRAWN)]
    brushes = [r for r in regions if _is_brush(r)]
    if len(brushes) < len(regions) and not brushes_only:
        other = next(r["type"] for r in regions if not _is_brush(r))
        raise ValueError(
            f"{where}: a region of type {other!r}; only brushes (brushlabels, run lengths) "
            "are read. --brushes-only leaves the others out"
        )
    if any(region.get("image_rotation") for region in brushes):
        raise ValueError(
            f"{where}: the image was turned in Label Studio; turn it back and save it again"
        )
    drawn = tuple((_label(where, r), r["value"].get("rle")) for r in brushes)
    return Labelled(file, _size(where, brushes), drawn), len(regions) - len(brushes)


def _is_brush(region: dict[str, Any]) -> bool:
    value = region.get("value")
    return (
        region["type"] == "brushlabels"
        and isinstance(value, dict)
        and value.get("format", "rle") == "rle"
    )


def _label(where: str, brush: dict[str, Any]) -> str:
    """The one label of a brush."""
    names = brush["value"].get("brushlabels")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f"{where}: a brush with the labels {names!r:.200}; give it one label")
    return names[0]


def _size(where: str, brushes: list[dict[str, Any]]) -> tuple[int, int] | None:
    """(height, width) on which all brushes agree; None without brushes."""
    told: list[list[Any]] = [
        [brush.get("original_height"), brush.get("original_width")] for brush in brushes
    ]
    sizes = [size for i, size in enumerate(told) if size != [None, None] and size not in told[:i]]
    if len(sizes) > 1 or any(type(side) is not int or side < 1 for size in sizes for side in size):
        raise ValueError(f"{where}: original_height and original_width are {sizes!r:.200}")
    return (sizes[0][0], sizes[0][1]) if sizes else None


def _file(data: dict[str, Any]) -> str | None:
    """data.file, which our tasks have, data.image, or the one other text in data that names an
    image: a path or name."""
    if isinstance(data.get("file"), str):
        return data["file"]
    found = [_path(data["image"])] if isinstance(data.get("image"), str) else []
    texts = [_path(text) for text in data.values() if isinstance(text, str)]
    found = found or [path for path in texts if path.lower().endswith(IMAGES)]
    return found[0] if len(found) == 1 else None


def _path(address: str) -> str:
    """The path in an address; of a local file, its parameter ``d``. An uploaded name keeps the
    eight letters that were put before it."""
    try:
        parts = urlsplit(address)
    except ValueError:  # brackets in the place of a host
        return address
    return parse_qs(parts.query).get("d", [unquote(parts.path)])[0]


def draw(image: Labelled, values: dict[str, int], size: tuple[int, int]) -> np.ndarray:
    """Class ids uint8 [H, W]: brushes over one another in their order, the rest background.
    ``size``: for an image without brushes."""
    mask = np.zeros(image.size or size, np.uint8)
    for number, (label, rle) in enumerate(image.brushes, 1):
        try:
            mask[decode(rle, *mask.shape)] = values[label]
        except ValueError as error:
            raise ValueError(f"brush {number} ({label}): {error}") from None
    return mask


def tasks_text(tasks: list[dict[str, Any]]) -> str:
    """The file of tasks, one a line: run lengths are long."""
    return "[\n" + ",\n".join(json.dumps(t, ensure_ascii=False) for t in tasks) + "\n]\n"
