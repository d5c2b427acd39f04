"""Whose masks, which student: labelers and segmenters on one data set, in one table."""

from collections.abc import Iterator, Sequence
from typing import Any

from dd.report.html import Cell, Section, Table
from dd.report.recipes import Entry
from dd.report.summary import cell, values

LICENCES = {  # of the published weights (docs/labelers.md); other labelers need none of their own
    "sam2_refine": "Apache-2.0",
    "sam3": "SAM License",
}
REAL = "labels of all real images"


def source_of(entry: Entry) -> tuple[str, str] | None:
    """(whose masks a run was trained on, the licence of the labeler's weights), None for a run that
    this table is not about: fine-tuned, mixed, or on some real images only."""
    data, arm = entry["run"]["trained_on"], entry["recipe"].arm
    if arm == "real_only" and entry["recipe"].shots == "all":
        return REAL, ""
    if data["source"] != "synthetic" or data.get("after") is not None:
        return None
    made: dict[str, Any] = data.get("mask_settings") or {}
    labeler = (made.get("labeler") or {}).get("name")
    labeler = labeler or ("a run" if "teacher" in made else "attention")
    return f"{data['masks']} ({labeler})", LICENCES.get(labeler, "")


def whose_masks(entries: Sequence[Entry], data: str) -> Iterator[Section]:
    """A row for each mask set, a column for each segmenter and number of steps; nothing where all
    runs have the same masks."""
    rows: dict[tuple[str, str, str], dict[tuple[str, Any], list[Entry]]] = {}
    for entry in entries:
        source = source_of(entry)
        if source is not None and data in entry["metrics"]:
            key = (source[0], entry["supervision"], source[1])
            student = (entry["recipe"].segmenter, entry["recipe"].steps)
            rows.setdefault(key, {}).setdefault(student, []).append(entry)
    students = sorted({s for found in rows.values() for s in found}, key=str)
    if len({name for name, *_ in rows if name != REAL}) < 2:
        return
    table: list[list[Cell]] = []
    for (name, supervision, licence), found in sorted(rows.items(), key=_place):
        cells = (cell(values(found[s], data)) if s in found else None for s in students)
        table.append([name, *cells, supervision, licence or "\u2013"])
    columns = [f"{name}, {steps:,} steps" if steps else name for name, steps in students]
    note = (
        f"mIoU on the test split of {data}, in percent. A column holds trainings of the same "
        "segmenter and as many optimiser steps, on the masks that the row names (docs/labelers.md "
        "and docs/sweeps.md say what the classes of supervision are). Mean \u00b1 standard "
        "deviation over seeds. Licence: of the labeler's published weights."
    )
    columns = ["masks", *columns, "supervision", "licence"]
    yield Table("Whose masks, which student", columns, table, note, best=tuple(columns[1:-2]))


def _place(row: tuple[tuple[str, str, str], Any]) -> tuple[bool, str, str]:
    """Real labels last, class A first."""
    (name, supervision, _), _ = row
    return name == REAL, supervision, name
