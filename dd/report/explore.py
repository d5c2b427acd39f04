"""Sections to look around in: a shaded matrix, and samples that can be filtered by class and
searched by text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

Legend = Sequence[tuple[str, str]]  # (name, "#rrggbb")

SCRIPT = Path(__file__).parent / "filter.js"  # shows and hides samples; without it all are shown
PICTURES = ("data:image/png;base64,", "data:image/jpeg;base64,")


def check_picture(uri: str, where: str) -> None:
    """ValueError for anything that a browser would have to fetch or run."""
    if not uri.startswith(PICTURES):
        raise ValueError(
            f"{where}: pictures are PNG or JPEG data URIs (png_data_uri, small_data_uri), got "
            f"{uri[:40]!r}"
        )


def check_legend(legend: Legend, where: str) -> None:
    for name, colour in legend:
        if not re.fullmatch("#[0-9a-fA-F]{6}", colour):
            raise ValueError(f"{where}: the colour of {name!r} must be #rrggbb, got {colour!r}")


@dataclass(frozen=True)
class Matrix:
    """A table of numbers whose cells are shaded from the lowest to the highest: ``values``
    [rows][columns], None = empty.

    ``corner`` says what rows and columns are; ``limits``: (unshaded, fully shaded), None = lowest
    and highest value.
    """

    kind: ClassVar[str] = "matrix"
    title: str
    corner: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    note: str = ""
    digits: int = 0
    limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.values}
        if len(self.values) != len(self.rows) or widths - {len(self.columns)}:
            raise ValueError(
                f"matrix {self.title!r}: {len(self.rows)} rows and {len(self.columns)} columns "
                f"are named, the values have {len(self.values)} rows of {sorted(widths)} columns"
            )

    def cells(self) -> list[list[dict[str, Any]]]:
        """What the template shows: text and shade (0 to 100) of each cell."""
        known = [v for row in self.values for v in row if v is not None]
        low, high = self.limits or (min(known, default=0), max(known, default=0))
        return [[self._cell(v, low, (high - low) or 1) for v in row] for row in self.values]

    def _cell(self, value: float | None, low: float, span: float) -> dict[str, Any]:
        if value is None:
            return {"text": "", "shade": 0}
        shade = round(100 * min(1, max(0, (value - low) / span)))
        return {"text": f"{value:.{self.digits}f}", "shade": shade}


@dataclass(frozen=True)
class Shown:
    """One sample: ``text`` is searched and shown, ``facts`` are shown, ``classes`` and
    ``missing`` (of them) are filtered by; ``pictures`` of (caption, data URI)."""

    id: str
    text: str
    classes: list[str]
    pictures: list[tuple[str, str]]
    missing: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def searched(self) -> str:
        return " ".join([self.id, self.text, *self.facts.values()]).lower()


@dataclass(frozen=True)
class SampleBrowser:
    """Samples with a filter by class, a search in their text, and a switch for those with a
    class that is missing."""

    kind: ClassVar[str] = "samples"
    title: str
    samples: list[Shown]
    note: str = ""
    legend: Legend = ()

    def __post_init__(self) -> None:
        for sample in self.samples:
            for _, picture in sample.pictures:
                check_picture(picture, f"samples {self.title!r}, {sample.id!r}")
        check_legend(self.legend, f"samples {self.title!r}")

    def classes(self) -> dict[str, int]:
        """{class: samples that have it}, by name."""
        names = sorted({name for s in self.samples for name in s.classes})
        return {name: sum(name in s.classes for s in self.samples) for name in names}
