"""Charts for reports as inline SVG: numbers in, one self-contained ``<svg>`` element out."""

import io
import re
import textwrap

import matplotlib
import numpy as np
from markupsafe import Markup, escape
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


def bar_chart_svg(
    groups: dict[str, list[tuple[str, float | None, float | None]]],
    value_label: str,
    digits: int = 1,
) -> Markup:
    """Horizontal bars as inline SVG: ``{series: [(label, mean, sd or None), ...]}``; rows in order
    of first appearance.

    A label that a series lacks, or whose mean is None, leaves a gap. The mean (± sd) stands at the
    end of each bar.
    """
    labels = list(dict.fromkeys(label for bars in groups.values() for label, _, _ in bars))
    known = [
        (mean, sd or 0) for bars in groups.values() for _, mean, sd in bars if mean is not None
    ]
    if not known:
        raise ValueError(f"a bar chart needs at least one mean, got {groups!r}")
    low = min(mean - sd if mean < 0 else 0 for mean, sd in known)
    high = max(mean + sd if mean >= 0 else 0 for mean, sd in known)
    room = (0.5 if low < 0 < high else 0.35) * (
        (high - low) or 1
    )  # for the numbers at the ends of the bars
    thickness, space = 0.165, 0.12  # inches
    pitch = len(groups) * thickness + space
    with matplotlib.rc_context(CHART_STYLE):
        figure, axes = _figure(height=len(labels) * pitch + 0.75, names=groups)
        handles = []
        for s, (bars, colour) in enumerate(
            zip(groups.values(), _cycle(SERIES_COLOURS, len(groups)), strict=True)
        ):
            alpha = 1 if s < len(SERIES_COLOURS) else 0.5  # a second round of colours, paler
            for label, mean, sd in bars:
                if mean is None:
                    continue
                y = labels.index(label) + (s - (len(groups) - 1) / 2) * thickness / pitch
                axes.barh(y, mean, height=0.86 * thickness / pitch, color=colour, alpha=alpha)
                if sd is not None:
                    axes.errorbar(
                        mean, y, xerr=sd, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2
                    )
                text = (
                    f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"
                )
                sign, side = (1, "left") if mean >= 0 else (-1, "right")
                axes.annotate(
                    text.replace("-", "−"),
                    (mean + sign * (sd or 0), y),
                    (4 * sign, 0),
                    textcoords="offset points",
                    ha=side,
                    va="center_baseline",
                    fontsize=8,
                )
            handles.append(Patch(color=colour, alpha=alpha))
        axes.set_xlim(low - room * (low < 0), high + room)
        axes.set_xticks(
            [t for t in MaxNLocator(4).tick_values(low, high) if low * 1.15 <= t <= high * 1.15]
        )
        axes.set_yticks(range(len(labels)), [textwrap.fill(label, 18) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(value_label)
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.axvline(0, color=INK, linewidth=0.8)
        return _svg(figure, handles, groups, f"Bar chart: {value_label}")


def line_chart_svg(
    series: dict[str, tuple[list, list, list | None]], xlabel: str, ylabel: str
) -> Markup:
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
            points = zip(xs, means, sds or [None] * len(xs), strict=True)
            points = sorted((labels.index(x), m, s or 0) for x, m, s in points if m is not None)
            x, mean, sd = np.array(points, float).reshape(-1, 3).T
            style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.8}
            handles += axes.plot(x, mean, **style)
            shown = sd > 0
            axes.errorbar(
                x[shown],
                mean[shown],
                sd[shown],
                fmt="none",
                ecolor=colour,
                elinewidth=1.2,
                capsize=2.5,
            )
        every = -(-len(labels) // 8)  # at most eight tick labels
        axes.set_xticks(range(0, len(labels), every), [str(x) for x in labels[::every]])
        axes.margins(x=0.06, y=0.12)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.8)
        axes.spines["left"].set_visible(False)
        return _svg(figure, handles, series, f"Line chart: {ylabel} by {xlabel}")


def curves_svg(
    series: dict[str, tuple[list, list]], xlabel: str, ylabel: str, points: bool = False
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
        for i, (xs, ys) in enumerate(series.values()):
            every = max(1, len(xs) // 300)
            marker = _cycle(MARKERS, len(series))[i] if points else None
            colour = _cycle(SERIES_COLOURS, len(series))[i]
            dashes = ("-", "--", ":", "-.")[
                i // len(SERIES_COLOURS) % 4
            ]  # a second round of colours looks different
            style = {
                "color": colour,
                "linewidth": 1.6,
                "marker": marker,
                "markersize": 4.5,
                "linestyle": dashes,
            }
            handles += axes.plot(xs[::every], ys[::every], **style)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.margins(x=0.03, y=0.08)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.8)
        axes.spines["left"].set_visible(False)
        return _svg(figure, handles, series, f"Line chart: {ylabel} by {xlabel}")


def histogram_svg(
    values, xlabel: str, ylabel: str = "samples", bins: int = 20, limits: tuple | None = None
) -> Markup:
    """A histogram of at least one finite number as inline SVG, with a line at the median.
    ``limits``: of the bins, None = those of the values. ValueError for no value, or one that is
    not finite."""
    values = np.asarray(values, float)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"a histogram of {xlabel!r} needs finite numbers, got {values[:5].tolist()} (n = "
            f"{values.size})"
        )
    counts, edges = np.histogram(values, bins, limits)
    median = float(np.median(values))
    with matplotlib.rc_context(CHART_STYLE):
        figure, axes = _figure(height=2.1, names=["one"])
        axes.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=SERIES_COLOURS[0])
        axes.axvline(median, color=SERIES_COLOURS[1], linewidth=1.4, linestyle="--")
        axes.set_title(
            f"median {median:.3g}".replace("-", "\N{MINUS SIGN}"),
            fontsize=9,
            color=INK,
            loc="right",
        )
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        description = (
            f"Histogram of {xlabel}: {values.size} values, median {median:.3g}, "
            f"{values.min():.3g} to {values.max():.3g}"
        )
        return _svg(figure, [], [], description)


def _cycle(values, n: int) -> list:
    return [values[i % len(values)] for i in range(n)]


def _legend_columns(names) -> int:
    return max(1, min(3, len(names), 52 // (max(map(len, names)) + 5)))


def _figure(height: float, names):
    legend_rows = -(-len(names) // _legend_columns(names)) if len(names) > 1 else 0
    figure = Figure(figsize=(CHART_WIDTH, height + 0.18 * legend_rows), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, handles, names, description: str) -> Markup:
    """The figure as one ``<svg>`` element: no prolog, metadata, page-wide style or ids that two
    charts would share."""
    if len(names) > 1:
        columns = _legend_columns(names)
        figure.legend(
            handles,
            list(names),
            loc="outside upper left",
            ncols=columns,
            fontsize=9,
            handlelength=1.4,
        )
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
    svg = svg.replace("<svg", opening, 1)
    svg = svg.replace(INK, f"var(--chart-ink, {INK})").replace(
        "'DejaVu Sans'", "system-ui, 'DejaVu Sans'"
    )
    return Markup(svg.strip())
