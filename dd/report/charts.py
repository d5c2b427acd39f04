"""Charts for reports as inline SVG: numbers in, one self-contained ``<svg>`` element out."""

import io
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

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


Bars = Mapping[str, Sequence[tuple[str, float | None, float | None]]]
Line = tuple[Sequence[Any], Sequence[float | None], Sequence[float | None] | None]
TICKS = [1, 2, 2.5, 5, 10]  # steps between the ticks of an axis


def bar_chart_svg(groups: Bars, value_label: str, digits: int = 1) -> Markup:
    """Horizontal bars as inline SVG: ``{series: [(label, mean, sd or None), ...]}``; rows in order
    of first appearance.

    A label that a series lacks, or whose mean is None, leaves a gap. The mean (± sd) stands at the
    end of each bar.
    """
    bars = [bar for each in groups.values() for bar in each]
    labels = list(dict.fromkeys(label for label, _, _ in bars))
    known = [(mean, sd or 0) for _, mean, sd in bars if mean is not None]
    if not known:
        raise ValueError(f"a bar chart needs at least one mean, got {groups!r}")
    low = min(mean - sd if mean < 0 else 0 for mean, sd in known)
    high = max(mean + sd if mean >= 0 else 0 for mean, sd in known)
    # for the numbers at the ends of the bars
    room = (0.5 if low < 0 < high else 0.35) * ((high - low) or 1)
    thickness, space = 0.165, 0.12  # inches
    pitch = len(groups) * thickness + space
    with matplotlib.rc_context(CHART_STYLE):
        figure, axes = _figure(height=len(labels) * pitch + 0.75, names=groups)
        handles = []
        colours = _cycle(SERIES_COLOURS, len(groups))
        for s, (each, colour) in enumerate(zip(groups.values(), colours, strict=True)):
            # a second round of colours is paler
            style: dict[str, Any] = {
                "color": colour,
                "alpha": 1 if s < len(SERIES_COLOURS) else 0.5,
            }
            for label, mean, sd in each:
                if mean is not None:
                    y = labels.index(label) + (s - (len(groups) - 1) / 2) * thickness / pitch
                    axes.barh(y, mean, height=0.86 * thickness / pitch, **style)
                    _end_of_bar(axes, y, mean, sd, digits)
            handles.append(Patch(**style))
        axes.set_xlim(low - room * (low < 0), high + room)
        ticks = MaxNLocator(4).tick_values(low, high)
        axes.set_xticks([t for t in ticks if low * 1.15 <= t <= high * 1.15])
        axes.set_yticks(range(len(labels)), [textwrap.fill(label, 18) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(value_label)
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.axvline(0, color=INK, linewidth=0.8)
        return _svg(figure, handles, groups, f"Bar chart: {value_label}")


def _end_of_bar(axes: Axes, y: float, mean: float, sd: float | None, digits: int) -> None:
    """The standard deviation and the number, at the end of a bar."""
    text, beyond = f"{mean:.{digits}f}", 0.0
    if sd is not None:
        axes.errorbar(mean, y, xerr=sd, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2)
        text, beyond = f"{text} ± {sd:.{digits}f}", sd
    sign, side = (1, "left") if mean >= 0 else (-1, "right")
    axes.annotate(
        text.replace("-", "−"),
        (mean + sign * beyond, y),
        (4 * sign, 0),
        textcoords="offset points",
        ha=side,
        va="center_baseline",
        fontsize=8,
    )


def line_chart_svg(series: Mapping[str, Line], xlabel: str, ylabel: str) -> Markup:
    """Lines with error bars as inline SVG: ``{name: (x labels, means, sds or None)}``.

    The x axis is categorical: the labels of all series at equal distances, sorted if all are
    numbers. A mean or sd may be None.
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
            rows = zip(xs, means, sds or [None] * len(xs), strict=True)
            points = sorted((labels.index(x), m, s or 0) for x, m, s in rows if m is not None)
            x, mean, sd = np.array(points, float).reshape(-1, 3).T
            style: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "markersize": 4.5,
                "linewidth": 1.8,
            }
            handles += axes.plot(x, mean, **style)
            shown = sd > 0
            bar: dict[str, Any] = {
                "fmt": "none",
                "ecolor": colour,
                "elinewidth": 1.2,
                "capsize": 2.5,
            }
            axes.errorbar(x[shown], mean[shown], sd[shown], **bar)
        every = -(-len(labels) // 8)  # at most eight tick labels
        axes.set_xticks(range(0, len(labels), every), [str(x) for x in labels[::every]])
        axes.margins(x=0.06, y=0.12)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
        _frame(axes, xlabel, ylabel)
        return _svg(figure, handles, series, f"Line chart: {ylabel} by {xlabel}")


def curves_svg(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    points: bool = False,
) -> Markup:
    """Curves over a numeric axis as inline SVG: ``{name: (xs, ys)}``; long ones are thinned to
    about 300 points.

    ``points``: few measured points, shown with markers. ValueError if there is nothing to draw.
    """
    if not any(xs for xs, _ in series.values()):
        raise ValueError(f"curves need at least one point, got {series!r}")
    with matplotlib.rc_context(CHART_STYLE):
        figure, axes = _figure(height=3.0, names=series)
        handles = []
        colours, markers = _cycle(SERIES_COLOURS, len(series)), _cycle(MARKERS, len(series))
        for i, (xs, ys) in enumerate(series.values()):
            every = max(1, len(xs) // 300)
            style: dict[str, Any] = {"color": colours[i], "linewidth": 1.6, "markersize": 4.5}
            style["marker"] = markers[i] if points else None
            # a second round of colours has other dashes
            style["linestyle"] = ("-", "--", ":", "-.")[i // len(SERIES_COLOURS) % 4]
            handles += axes.plot(xs[::every], ys[::every], **style)
        for axis in (axes.yaxis, axes.xaxis):
            axis.set_major_locator(MaxNLocator(5, steps=TICKS))
        axes.margins(x=0.03, y=0.08)
        _frame(axes, xlabel, ylabel)
        return _svg(figure, handles, series, f"Line chart: {ylabel} by {xlabel}")


def histogram_svg(
    values: Iterable[float],
    xlabel: str,
    ylabel: str = "samples",
    bins: int = 20,
    limits: tuple[float, float] | None = None,
) -> Markup:
    """A histogram of at least one finite number as inline SVG, with a line at the median.
    ``limits``: of the bins, None = those of the values. ValueError for no value, or one that is
    not finite."""
    found = np.asarray(values, float)
    if not found.size or not np.isfinite(found).all():
        raise ValueError(
            f"a histogram of {xlabel!r} needs finite numbers, got {found[:5].tolist()} (n = "
            f"{found.size})"
        )
    counts, edges = np.histogram(found, bins, limits)
    median = float(np.median(found))
    with matplotlib.rc_context(CHART_STYLE):
        figure, axes = _figure(height=2.1, names=["one"])
        axes.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=SERIES_COLOURS[0])
        axes.axvline(median, color=SERIES_COLOURS[1], linewidth=1.4, linestyle="--")
        title = f"median {median:.3g}".replace("-", "\N{MINUS SIGN}")
        axes.set_title(title, fontsize=9, color=INK, loc="right")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _frame(axes, xlabel, ylabel)
        axes.set_axisbelow(True)
        description = (
            f"Histogram of {xlabel}: {found.size} values, median {median:.3g}, "
            f"{found.min():.3g} to {found.max():.3g}"
        )
        return _svg(figure, [], [], description)


def _frame(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Labels, and horizontal lines in place of the left axis."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.8)
    axes.spines["left"].set_visible(False)


def _cycle(values: Sequence[str], n: int) -> list[str]:
    return [values[i % len(values)] for i in range(n)]


def _legend_columns(names: Collection[str]) -> int:
    return max(1, min(3, len(names), 52 // (max(map(len, names)) + 5)))


def _figure(height: float, names: Collection[str]) -> tuple[Figure, Axes]:
    legend_rows = -(-len(names) // _legend_columns(names)) if len(names) > 1 else 0
    figure = Figure(figsize=(CHART_WIDTH, height + 0.18 * legend_rows), layout="constrained")
    return figure, figure.subplots()


def _svg(
    figure: Figure, handles: Sequence[Artist], names: Collection[str], description: str
) -> Markup:
    """The figure as one ``<svg>`` element: no prolog, metadata, page-wide style or ids that two
    charts would share."""
    if len(names) > 1:
        style = {"ncols": _legend_columns(names), "fontsize": 9, "handlelength": 1.4}
        figure.legend(handles, list(names), loc="outside upper left", **style)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    opening = (
        f'<svg role="img" aria-label="{escape(description)}" style="stroke-linejoin: round; '
        'stroke-linecap: butt"'
    )
    svg = svg.replace("<svg", opening, 1).replace(INK, f"var(--chart-ink, {INK})")
    return Markup(svg.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'").strip())
