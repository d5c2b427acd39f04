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
import os
import re
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from dd.report.explore import SCRIPT, Matrix, Samples, check_legend, check_picture

# CSS pixels, the widest a gallery shows a picture: smaller ones are enlarged, with hard pixel edges
PIXEL_ART = 168
MISSING = "–"

Number = int | float | None
Cell = (
    str | Number | tuple[Number, Number]
)  # text, a number, or (mean, sd); None is shown as a dash


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
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""
    bars: tuple[str, ...] = ()
    best: tuple[str, ...] = ()
    highlight: frozenset[tuple[int, int]] = frozenset()
    digits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
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

    def cells(self) -> list[list[dict]]:
        """What the template shows: text, numeric (set right), strong, bar (percent or None) of
        each cell."""
        columns = list(zip(*self.rows, strict=True))
        numeric = [
            any(map(_is_number, column)) and not any(isinstance(c, str) for c in column)
            for column in columns
        ]
        largest = [max(map(_mean, filter(_is_number, column)), default=None) for column in columns]
        return [
            [
                {
                    "text": self._text(cell, name),
                    "numeric": numeric[j],
                    "strong": (i, j) in self.highlight
                    or (name in self.best and _is_number(cell) and _mean(cell) == largest[j]),
                    "bar": min(100.0, max(0.0, _mean(cell)))
                    if name in self.bars and _is_number(cell)
                    else None,
                }
                for j, (name, cell) in enumerate(zip(self.columns, row, strict=True))
            ]
            for i, row in enumerate(self.rows)
        ]

    def _text(self, cell: Cell, column: str) -> str:
        if isinstance(cell, tuple):
            mean, sd = cell
            return self._text(mean, column) + (
                f" ± {self._text(sd, column)}" if None not in cell else ""
            )
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

    def __post_init__(self):
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
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    note: str = ""
    legend: list[tuple[str, str]] = ()

    def __post_init__(self):
        for label, pictures in self.rows:
            if len(pictures) != len(self.columns):
                raise ValueError(
                    f"gallery {self.title!r}: {len(self.columns)} columns, but {len(pictures)} "
                    f"pictures in {label!r}"
                )
            for picture in pictures:
                check_picture(picture, f"gallery {self.title!r}, row {label!r}")
        check_legend(self.legend, f"gallery {self.title!r}")


Section = Text | Table | Chart | Gallery | Matrix | Samples


def render(
    title: str, subtitle: str, sections: list[Section], facts: dict[str, str] | None = None
) -> str:
    """The page as HTML. ``facts`` are short name-value pairs under the title; the titles make
    the navigation."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["picture_size"] = picture_size
    script = (
        Markup(SCRIPT.read_text(encoding="utf-8"))
        if any(isinstance(s, Samples) for s in sections)
        else None
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=subtitle,
        sections=list(zip(_anchors(sections), sections, _widths(sections), strict=True)),
        facts=facts or {},
        pixel_art=PIXEL_ART,
        script=script,
        script_hash=script and base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write(path: str | Path, html: str) -> Path:
    """Write the page in one step: a reader sees the old page or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(html, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def picture_size(uri: str) -> tuple[int, int]:
    """(width, height) of a picture's data URI, from its header."""
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return image.size


def _is_number(cell: Cell) -> bool:
    return _mean(cell) is not None


def _mean(cell: Cell) -> Number:
    value = cell[0] if isinstance(cell, tuple) else cell
    return None if isinstance(value, str) else value


def _anchors(sections) -> list[str]:
    """One id per section, from its title; repeated titles get a number."""
    anchors = []
    for number, section in enumerate(sections, 1):
        slug = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
        anchors.append(slug if slug not in anchors else f"{slug}-{number}")
    return anchors


def _widths(sections) -> list[str]:
    """Neighbouring charts share a row in pairs ("half"); everything else, and a chart left over,
    is "full"."""
    widths = []
    for i, section in enumerate(sections):
        second = i > 0 and isinstance(sections[i - 1], Chart) and widths[-1] == "open"
        if not isinstance(section, Chart):
            widths.append("full")
        elif second:
            widths[-1:] = ["half", "half"]
        else:
            widths.append("open")
    return ["full" if w == "open" else w for w in widths]
