"""A report as one HTML file that needs nothing else: no requests; for desktop, phone, dark mode and
paper.

Build sections (:class:`Text`, :class:`Table`, :class:`Chart`, :class:`Gallery`, and those of
:mod:`dd.report.explore`), :func:`render` them, :func:`write` the page. All text is escaped; only a
Markup chart is taken as it is. The page's own content security policy makes a browser refuse
whatever is not inline, and every script but ``filter.js``, which it knows by its hash.
"""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from dd.report.explore import SCRIPT, Legend, Matrix, SampleBrowser, check_legend, check_picture
from dd.store.provenance import write_atomic

# CSS pixels, the widest a gallery shows a picture: smaller ones are enlarged, with hard pixel edges
PIXEL_ART = 168
MISSING = "–"

Number = int | float | None
Cell = str | Number | tuple[Number, Number]  # the last is (mean, sd); None is shown as a dash


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text."""

    kind: ClassVar[str] = "text"
    title: str
    paragraphs: list[str]


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell names its row. A column of numbers is set right, floats with 1
    decimal.

    ``digits``: decimals of other columns. ``bars``: columns in percent whose cells get a bar from 0
    to 100. ``best``: columns whose largest number is bold. ``highlight``: further (row, column)
    indices to set bold.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    bars: tuple[str, ...] = ()
    best: tuple[str, ...] = ()
    highlight: frozenset[tuple[int, int]] = frozenset()
    digits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: {len(self.columns)} columns, but {len(row)} cells in "
                    f"{row!r}"
                )
        unknown = {*self.bars, *self.best, *self.digits} - set(self.columns)
        if unknown:
            raise ValueError(
                f"table {self.title!r}: no column {sorted(unknown)}; columns: {self.columns}"
            )

    def cells(self) -> list[list[dict[str, Any]]]:
        """What the template shows: text, numeric (set right), strong, bar (percent or None) of
        each cell."""
        columns = list(zip(*self.rows, strict=True))
        known = [[m for cell in column if (m := _mean(cell)) is not None] for column in columns]
        numeric = [
            bool(means) and not any(isinstance(cell, str) for cell in column)
            for means, column in zip(known, columns, strict=True)
        ]
        found: list[list[dict[str, Any]]] = []
        for i, row in enumerate(self.rows):
            found.append([])
            for j, (name, cell) in enumerate(zip(self.columns, row, strict=True)):
                mean, bold = _mean(cell), (i, j) in self.highlight
                if mean is not None and name in self.best:
                    bold = bold or mean == max(known[j])
                bar = None if mean is None or name not in self.bars else min(100.0, max(0.0, mean))
                shown = {"text": self._text(cell, name), "numeric": numeric[j]}
                found[-1].append({**shown, "strong": bold, "bar": bar})
        return found

    def _text(self, cell: Cell, column: str) -> str:
        if isinstance(cell, tuple):
            mean, sd = (self._text(number, column) for number in cell)
            return mean if None in cell else f"{mean} ± {sd}"
        if cell is None or isinstance(cell, str):
            return MISSING if cell is None else cell
        digits = 0 if isinstance(cell, Integral) else self.digits.get(column, 1)
        return f"{cell:,.{digits}f}".replace("-", "−")


@dataclass(frozen=True)
class Chart:
    """A chart from :mod:`dd.report.pictures`; ``svg`` must be Markup, the one thing that the
    page does not escape."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: Markup
    note: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.svg, Markup):
            got = type(self.svg).__name__
            raise TypeError(
                f"chart {self.title!r}: svg must be Markup, as bar_chart_svg returns it; got {got}"
            )


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures: ``rows`` of (label, one data URI per column), ``legend`` of (name,
    "#rrggbb")."""

    kind: ClassVar[str] = "gallery"
    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    note: str = ""
    legend: Legend = ()

    def __post_init__(self) -> None:
        for label, pictures in self.rows:
            if len(pictures) != len(self.columns):
                raise ValueError(
                    f"gallery {self.title!r}: {len(self.columns)} columns, but {len(pictures)} "
                    f"pictures in {label!r}"
                )
            for picture in pictures:
                check_picture(picture, f"gallery {self.title!r}, row {label!r}")
        check_legend(self.legend, f"gallery {self.title!r}")


@dataclass(frozen=True)
class VerdictSection:
    """What a page begins with: ``parts`` of (findings, verdict), each a sentence or some; the
    verdict is set strong."""

    kind: ClassVar[str] = "verdict"
    title: str
    parts: Sequence[tuple[str, str]]
    note: str = ""


@dataclass(frozen=True)
class Pictures:
    """A few large pictures: ``rows`` of (caption, data URI)."""

    kind: ClassVar[str] = "large"
    title: str
    rows: Sequence[Sequence[tuple[str, str]]]
    note: str = ""
    legend: Legend = ()

    def __post_init__(self) -> None:
        for caption, picture in (pair for row in self.rows for pair in row):
            check_picture(picture, f"pictures {self.title!r}, {caption!r}")
        check_legend(self.legend, f"pictures {self.title!r}")


Section = VerdictSection | Pictures | Text | Table | Chart | Gallery | Matrix | SampleBrowser


def render(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    facts: dict[str, str] | None = None,
    folded: Sequence[Section] = (),
) -> str:
    """The page as HTML. ``facts`` are short name-value pairs under the title; the titles make
    the navigation. ``folded``: further sections, of which the title alone is seen until a reader
    opens them; paper has those that are open."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["picture_size"] = picture_size
    script = None
    everything = [*sections, *folded]
    if any(isinstance(s, SampleBrowser) for s in everything):
        script = Markup(SCRIPT.read_text(encoding="utf-8"))
    anchors = _anchors(everything)
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=subtitle,
        sections=list(zip(anchors[: len(sections)], sections, _widths(sections), strict=True)),
        folded=list(zip(anchors[len(sections) :], folded, strict=True)),
        facts=facts or {},
        pixel_art=PIXEL_ART,
        script=script,
        script_hash=script and base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write(path: str | Path, html: str) -> Path:
    """Write the page in one step: a reader sees the old page or the new one, never half of one."""
    write_atomic(path, html)
    return Path(path)


def picture_size(uri: str) -> tuple[int, int]:
    """(width, height) of a picture's data URI, from its header."""
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return image.size


def _mean(cell: Cell) -> Number:
    value = cell[0] if isinstance(cell, tuple) else cell
    return None if isinstance(value, str) else value


def _anchors(sections: Sequence[Section]) -> list[str]:
    """One id per section, from its title; repeated titles get a number."""
    anchors: list[str] = []
    for number, section in enumerate(sections, 1):
        slug = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
        anchors.append(slug if slug not in anchors else f"{slug}-{number}")
    return anchors


def _widths(sections: Sequence[Section]) -> list[str]:
    """Neighbouring charts share a row in pairs ("half"); everything else, and a chart left over,
    is "full"."""
    widths: list[str] = []
    for chart, group in groupby(sections, lambda section: isinstance(section, Chart)):
        number = len(list(group))
        pairs = number // 2 if chart else 0
        widths += ["half"] * (2 * pairs) + ["full"] * (number - 2 * pairs)
    return widths
