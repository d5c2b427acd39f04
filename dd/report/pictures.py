"""Pictures for reports, README and data cards: arrays in, arrays or self-contained strings out.

Pictures are uint8 RGB [H, W, 3]; a mask is uint8 [H, W] of class ids, 0 = background, 255 =
uncertain; a palette is a flat list ``[r, g, b] * n`` in class order
(:func:`dd.taxonomy.voc_palette`).
"""

import base64
import io
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dd.taxonomy import IGNORE

SMALL = 224  # pixels, the long side of a picture in a report
BACKGROUND_RGB = (30, 33, 40)
UNCERTAIN_RGB = (206, 208, 212)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
HATCH_RGB = (120, 124, 130)  # second colour of the stripes over uncertain pixels


# ----------------------------------------------------------------------------------------- pictures


def _lookup(mask: np.ndarray, palette: list[int]) -> np.ndarray:
    """Colours [256, 3] of every pixel value; ValueError if the mask is not a mask or holds a
    class without a colour."""
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"a mask is uint8 [H, W], got {mask.dtype} {list(mask.shape)}")
    colours = np.asarray(palette, np.uint8).reshape(-1, 3)[:IGNORE]
    highest = int(mask.max(where=mask != IGNORE, initial=0))
    if highest >= len(colours):
        raise ValueError(
            f"the mask holds class {highest}, the palette ends at class {len(colours) - 1}"
        )
    lookup = np.zeros((256, 3), np.uint8)
    lookup[: len(colours)] = colours
    lookup[0], lookup[IGNORE] = BACKGROUND_RGB, UNCERTAIN_RGB
    return lookup


def colour_mask(mask: np.ndarray, palette: list[int]) -> np.ndarray:
    """The mask as RGB: classes in palette colours, background dark, uncertain light grey."""
    return _lookup(mask, palette)[mask]


def overlay(
    image: np.ndarray, mask: np.ndarray, palette: list[int], alpha: float = 0.55
) -> np.ndarray:
    """The mask over its image: classes at opacity ``alpha``, uncertain as grey stripes,
    background pixels unchanged."""
    _check_image(image)
    if image.shape[:2] != mask.shape:
        raise ValueError(
            f"image and mask differ in size: {list(image.shape[:2])} and {list(mask.shape)}"
        )
    colours = _lookup(mask, palette)[mask]
    y, x = np.indices(mask.shape)
    stripe = (x + y) // max(2, max(mask.shape) // 96) % 2 == 1
    colours[(mask == IGNORE) & stripe] = HATCH_RGB
    mixed = np.rint((1 - alpha) * image + alpha * colours).astype(np.uint8)
    return np.where((mask == 0)[..., None], image, mixed)


def drawn(image: np.ndarray, mask: np.ndarray, palette: list[int]) -> dict[str, np.ndarray]:
    """{"mask", "overlay": pictures} of one sample."""
    return {"mask": colour_mask(mask, palette), "overlay": overlay(image, mask, palette)}


def shown_power(maps_KPrr: np.ndarray, power: int | None) -> int:
    """The power whose heat is shown: that of the masks, or the highest that is stored where there
    is none (None: masks of a mixture of powers) or it is not stored."""
    highest = maps_KPrr.shape[1] - 1
    return highest if power is None else min(power, highest)


def heat(image: np.ndarray, heat: np.ndarray, alpha: float = 0.7) -> np.ndarray:
    """A heat map [h, w] over the greyed image: min-max scaled (a constant map is cold), bicubic
    to the image size."""
    _check_image(image)
    heat = np.asarray(heat, np.float64)
    if heat.ndim != 2 or not np.isfinite(heat).all():
        finite = "finite" if np.isfinite(heat).all() else "not finite"
        raise ValueError(
            f"a heat map is [h, w] of finite numbers, got {list(heat.shape)}, {finite}"
        )
    span = heat.max() - heat.min()
    scaled = ((heat - heat.min()) / (span if span > 0 else 1)).astype(np.float32)
    size = image.shape[1], image.shape[0]
    scaled = np.asarray(Image.fromarray(scaled).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    colours = matplotlib.colormaps["inferno"](scaled)[..., :3] * 255
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None]
    return np.rint((1 - alpha) * grey + alpha * colours).astype(np.uint8)


def legend(
    names: Sequence[str], palette: list[int], uncertain: bool = False
) -> list[tuple[str, str]]:
    """(name, "#rrggbb") of every class as :func:`colour_mask` paints it; ``names`` in mask
    order, background first."""
    colours = _lookup(np.array([[len(names) - 1]], np.uint8), palette)
    entries = [(name, _hex(colours[i])) for i, name in enumerate(names)]
    return [*entries, ("uncertain", _hex(UNCERTAIN_RGB))] if uncertain else entries


def png_data_uri(array: np.ndarray, scale: int = 1) -> str:
    """A uint8 picture, RGB [H, W, 3] or grey [H, W], as a ``data:`` URI; every pixel becomes
    ``scale`` x ``scale``."""
    stream = io.BytesIO()
    Image.fromarray(_enlarged(array, scale)).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def small_data_uri(array: np.ndarray, side: int = SMALL, photo: bool = True) -> str:
    """A picture as a ``data:`` URI of at most ``side`` pixels a side, so that a page with many
    stays small: smaller ones as they are, larger ones shrunk. ``photo``: photographs and heat
    become JPEG where that is shrunk, masks stay PNG."""
    size = np.array(array.shape[1::-1])
    if max(size) <= side:
        return png_data_uri(array)
    small = Image.fromarray(array).resize(
        tuple(np.maximum(1, size * side // max(size)).tolist()),
        Image.Resampling.LANCZOS if photo else Image.Resampling.NEAREST,
    )
    if not photo:
        return png_data_uri(np.asarray(small))
    stream = io.BytesIO()
    small.convert("RGB").save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def contact_sheet(
    rows: list[list[np.ndarray]],
    scale: int = 1,
    gap: int = 4,
    row_labels: list[str] | None = None,
    column_labels: list[str] | None = None,
) -> np.ndarray:
    """Pictures in a white grid, uint8 RGB [H, W, 3]: a row may be short, a cell is as large as its
    column and row need.

    ``gap`` pixels lie around and between the cells; labels (wrapped, one per row or column) stand
    left and above.
    """
    if not rows or not any(rows):
        raise ValueError("a contact sheet needs at least one picture, got none")
    n_columns = max(map(len, rows))
    for kind, labels, n in (("row", row_labels, len(rows)), ("column", column_labels, n_columns)):
        if labels is not None and len(labels) != n:
            raise ValueError(f"got {len(labels)} {kind} labels for {n} {kind}s")
    cells = [[_enlarged(picture, scale) for picture in row] for row in rows]
    font = ImageFont.load_default(13)
    widths = [max(row[j].shape[1] for row in cells if j < len(row)) for j in range(n_columns)]
    heads = [_wrapped(t, font, w) for t, w in zip(column_labels or [], widths, strict=False)]
    sides = [_wrapped(text, font, 150) for text in row_labels or []]
    if heads:
        widths = [max(w, _text_size(t, font)[0]) for w, t in zip(widths, heads, strict=True)]
    heights = [max((p.shape[0] for p in row), default=0) for row in cells]
    if sides:
        heights = [max(h, _text_size(t, font)[1]) for h, t in zip(heights, sides, strict=True)]
    left = max((_text_size(t, font)[0] for t in sides), default=-gap) + 2 * gap
    top = max((_text_size(t, font)[1] for t in heads), default=-gap) + 2 * gap
    xs = left + np.concatenate([[0], np.cumsum(np.add(widths, gap))])
    ys = top + np.concatenate([[0], np.cumsum(np.add(heights, gap))])
    sheet = Image.new("RGB", (int(xs[-1]), int(ys[-1])), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(cells):
        for j, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture).convert("RGB"), (int(xs[j]), int(ys[i])))
    for i, text in enumerate(sides):
        draw.multiline_text((gap, ys[i] + heights[i] / 2), text, "#333", font, anchor="lm")
    for j, text in enumerate(heads):
        draw.multiline_text((xs[j], top - gap), text, "#333", font, anchor="ld")
    return np.asarray(sheet)


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")


def _enlarged(picture: np.ndarray, scale: int) -> np.ndarray:
    if picture.dtype != np.uint8:
        raise ValueError(f"a picture is uint8, got {picture.dtype}")
    return np.ascontiguousarray(picture.repeat(scale, 0).repeat(scale, 1))


def _hex(rgb: Iterable[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _wrapped(text: str, font: Font, width: float) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = not lines[-1] or font.getlength(longer) <= width
        lines[-1:] = [longer] if fits else [lines[-1], word]
    return "\n".join(lines)


def _text_size(text: str, font: Font) -> tuple[int, int]:
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font, anchor="la")
    return int(np.ceil(box[2])), int(np.ceil(box[3])) + 3
