"""Pictures and charts for reports, README and data cards: arrays in, arrays or self-contained strings out.

Pictures are uint8 RGB [H, W, 3]; a mask is uint8 [H, W] of class ids, 0 = background, 255 = uncertain; a palette is a
flat list ``[r, g, b] * n`` in class order (:func:`dd.taxonomy.voc_palette`).
"""

import base64
import io
import re
import textwrap

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from dd.taxonomy import IGNORE

BACKGROUND_RGB = (30, 33, 40)
UNCERTAIN_RGB = (206, 208, 212)
HATCH_RGB = (120, 124, 130)  # second colour of the stripes over uncertain pixels

# Okabe & Ito's colour-blind-safe hues, in an order that keeps contrast on white and on near-black.
SERIES_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#7b818a"  # mid-grey: legible on light and dark; a page may set --chart-ink instead
CHART_WIDTH = 4.0  # inches, small: text stays legible when a phone shows the chart at 310 px
CHART_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dd",
    "text.parse_math": False,  # a "$" in a class name is a dollar
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


# ------------------------------------------------------------------------------------------------------------ pictures


def _lookup(mask, palette: list[int]) -> np.ndarray:
    """Colours [256, 3] of every pixel value; ValueError if the mask is not a mask or holds a class without a colour."""
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"a mask is uint8 [H, W], got {mask.dtype} {list(mask.shape)}")
    colours = np.asarray(palette, np.uint8).reshape(-1, 3)[:IGNORE]
    highest = int(mask.max(where=mask != IGNORE, initial=0))
    if highest >= len(colours):
        raise ValueError(f"the mask holds class {highest}, the palette ends at class {len(colours) - 1}")
    lookup = np.zeros((256, 3), np.uint8)
    lookup[: len(colours)] = colours
    lookup[0], lookup[IGNORE] = BACKGROUND_RGB, UNCERTAIN_RGB
    return lookup


def colour_mask(mask: np.ndarray, palette: list[int]) -> np.ndarray:
    """The mask as RGB: classes in palette colours, background dark, uncertain light grey."""
    return _lookup(mask, palette)[mask]


def overlay(image: np.ndarray, mask: np.ndarray, palette: list[int], alpha: float = 0.55) -> np.ndarray:
    """The mask over its image: classes at opacity ``alpha``, uncertain as grey stripes, background pixels unchanged."""
    _check_image(image)
    if image.shape[:2] != mask.shape:
        raise ValueError(f"image and mask differ in size: {list(image.shape[:2])} and {list(mask.shape)}")
    colours = _lookup(mask, palette)[mask]
    y, x = np.indices(mask.shape)
    stripe = (x + y) // max(2, max(mask.shape) // 96) % 2 == 1
    colours[(mask == IGNORE) & stripe] = HATCH_RGB
    mixed = np.rint((1 - alpha) * image + alpha * colours).astype(np.uint8)
    return np.where((mask == 0)[..., None], image, mixed)


def heat(image: np.ndarray, heat: np.ndarray, alpha: float = 0.7) -> np.ndarray:
    """A heat map [h, w] over the greyed image: min-max scaled (a constant map is cold), bicubic to the image size."""
    _check_image(image)
    heat = np.asarray(heat, np.float32)
    if heat.ndim != 2 or not np.isfinite(heat).all():
        finite = "finite" if np.isfinite(heat).all() else "not finite"
        raise ValueError(f"a heat map is [h, w] of finite numbers, got {list(heat.shape)}, {finite}")
    span = heat.max() - heat.min()
    scaled = (heat - heat.min()) / (span if span > 0 else 1)
    size = image.shape[1], image.shape[0]
    scaled = np.asarray(Image.fromarray(scaled).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    colours = matplotlib.colormaps["inferno"](scaled)[..., :3] * 255
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None]
    return np.rint((1 - alpha) * grey + alpha * colours).astype(np.uint8)


def legend(names, palette: list[int], uncertain: bool = False) -> list[tuple[str, str]]:
    """(name, "#rrggbb") of every class as :func:`colour_mask` paints it; ``names`` in mask order, background first."""
    colours = _lookup(np.array([[len(names) - 1]], np.uint8), palette)
    entries = [(name, _hex(colours[i])) for i, name in enumerate(names)]
    return [*entries, ("uncertain", _hex(UNCERTAIN_RGB))] if uncertain else entries


def png_data_uri(array: np.ndarray, scale: int = 1) -> str:
    """A uint8 picture, RGB [H, W, 3] or grey [H, W], as a ``data:`` URI; every pixel becomes ``scale`` x ``scale``."""
    stream = io.BytesIO()
    Image.fromarray(_enlarged(array, scale)).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def contact_sheet(
    rows: list[list[np.ndarray]],
    scale: int = 1,
    gap: int = 4,
    row_labels: list[str] | None = None,
    column_labels: list[str] | None = None,
) -> np.ndarray:
    """Pictures in a white grid, uint8 RGB [H, W, 3]: a row may be short, a cell is as large as its column and row need.

    ``gap`` pixels lie around and between the cells; labels (wrapped, one per row or column) stand left and above.
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
    heads = [_wrapped(text, font, width) for text, width in zip(column_labels or [], widths, strict=False)]
    sides = [_wrapped(text, font, 150) for text in row_labels or []]
    widths = [max(w, *_text_size(heads[j], font)[:1]) if heads else w for j, w in enumerate(widths)]
    heights = [max((p.shape[0] for p in row), default=0) for row in cells]
    heights = [max(h, *_text_size(sides[i], font)[1:]) if sides else h for i, h in enumerate(heights)]
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


def _check_image(image):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")


def _enlarged(picture, scale: int):
    if picture.dtype != np.uint8:
        raise ValueError(f"a picture is uint8, got {picture.dtype}")
    return np.ascontiguousarray(picture.repeat(scale, 0).repeat(scale, 1))


def _hex(rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _wrapped(text: str, font, width: float) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if not lines[-1] or font.getlength(longer) <= width else [lines[-1], word]
    return "\n".join(lines)


def _text_size(text: str, font) -> tuple[int, int]:
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font, anchor="la")
    return int(np.ceil(box[2])), int(np.ceil(box[3])) + 3


# -------------------------------------------------------------------------------------------------------------- charts


def bar_chart_svg(groups: dict[str, list[tuple[str, float | None, float | None]]], value_label: str) -> Markup:
    """Horizontal bars as inline SVG: ``{series: [(label, mean, sd or None), ...]}``; rows in order of first appearance.

    A label that a series lacks, or whose mean is None, leaves a gap. The mean (± sd) stands at the end of each bar.
    """
    labels = list(dict.fromkeys(label for bars in groups.values() for label, _, _ in bars))
    known = [(mean, sd or 0) for bars in groups.values() for _, mean, sd in bars if mean is not None]
    if not known:
        raise ValueError(f"a bar chart needs at least one mean, got {groups!r}")
    low = min(mean - sd if mean < 0 else 0 for mean, sd in known)
    high = max(mean + sd if mean >= 0 else 0 for mean, sd in known)
    room = (0.5 if low < 0 < high else 0.35) * ((high - low) or 1)  # for the numbers at the ends of the bars
    thickness, space = 0.165, 0.12  # inches
    pitch = len(groups) * thickness + space
    with matplotlib.rc_context(CHART_STYLE):
        figure, axes = _figure(height=len(labels) * pitch + 0.75, names=groups)
        handles = []
        for s, (bars, colour) in enumerate(zip(groups.values(), _cycle(SERIES_COLOURS, len(groups)), strict=True)):
            alpha = 1 if s < len(SERIES_COLOURS) else 0.5  # a second round of colours, paler
            for label, mean, sd in bars:
                if mean is None:
                    continue
                y = labels.index(label) + (s - (len(groups) - 1) / 2) * thickness / pitch
                axes.barh(y, mean, height=0.86 * thickness / pitch, color=colour, alpha=alpha)
                if sd is not None:
                    axes.errorbar(mean, y, xerr=sd, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2)
                text = (f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}").replace("-", "−")
                sign, side = (1, "left") if mean >= 0 else (-1, "right")
                axes.annotate(
                    text, (mean + sign * (sd or 0), y), (4 * sign, 0),
                    textcoords="offset points", ha=side, va="center_baseline", fontsize=8,
                )  # fmt: skip
            handles.append(Patch(color=colour, alpha=alpha))
        axes.set_xlim(low - room * (low < 0), high + room)
        axes.set_xticks([t for t in MaxNLocator(4).tick_values(low, high) if low * 1.15 <= t <= high * 1.15])
        axes.set_yticks(range(len(labels)), [textwrap.fill(label, 18) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(value_label)
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.axvline(0, color=INK, linewidth=0.8)
        return _svg(figure, handles, groups, f"Bar chart: {value_label}")


def line_chart_svg(series: dict[str, tuple[list, list, list | None]], xlabel: str, ylabel: str) -> Markup:
    """Lines with error bars as inline SVG: ``{name: (x labels, means, sds or None)}``.

    The x axis is categorical: the labels of all series at equal distances, sorted if all are numbers. A mean or sd may
    be None.
    """
    labels = list(dict.fromkeys(x for xs, _, _ in series.values() for x in xs))
    if not labels:
        raise ValueError(f"a line chart needs at least one point, got {series!r}")
    if all(isinstance(x, int | float) for x in labels):
        labels.sort()
    with matplotlib.rc_context(CHART_STYLE):
        figure, axes = _figure(height=3.0, names=series)
        handles = []
        colours, markers = _cycle(SERIES_COLOURS, len(series)), _cycle(MARKERS, len(series))
        for (xs, means, sds), colour, marker in zip(series.values(), colours, markers, strict=True):
            points = zip(xs, means, sds or [None] * len(xs), strict=True)
            points = sorted((labels.index(x), m, s or 0) for x, m, s in points if m is not None)
            x, mean, sd = np.array(points, float).reshape(-1, 3).T
            style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.8}
            handles += axes.plot(x, mean, **style)
            shown = sd > 0
            axes.errorbar(x[shown], mean[shown], sd[shown], fmt="none", ecolor=colour, elinewidth=1.2, capsize=2.5)
        every = -(-len(labels) // 8)  # at most eight tick labels
        axes.set_xticks(range(0, len(labels), every), [str(x) for x in labels[::every]])
        axes.margins(x=0.06, y=0.12)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.8)
        axes.spines["left"].set_visible(False)
        return _svg(figure, handles, series, f"Line chart: {ylabel} by {xlabel}")


def _cycle(values, n: int) -> list:
    return [values[i % len(values)] for i in range(n)]


def _legend_columns(names) -> int:
    return max(1, min(3, len(names), 52 // (max(map(len, names)) + 5)))


def _figure(height: float, names):
    legend_rows = -(-len(names) // _legend_columns(names)) if len(names) > 1 else 0
    figure = Figure(figsize=(CHART_WIDTH, height + 0.18 * legend_rows), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, handles, names, description: str) -> Markup:
    """The figure as one ``<svg>`` element: no prolog, metadata, page-wide style or ids that two charts would share."""
    if len(names) > 1:
        columns = _legend_columns(names)
        figure.legend(handles, list(names), loc="outside upper left", ncols=columns, fontsize=9, handlelength=1.4)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    opening = f'<svg role="img" aria-label="{escape(description)}" style="stroke-linejoin: round; stroke-linecap: butt"'
    svg = svg.replace("<svg", opening, 1)
    svg = svg.replace(INK, f"var(--chart-ink, {INK})").replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    return Markup(svg.strip())
