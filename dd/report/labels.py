"""The real labels behind a run: those it was trained on, and those that decided its settings."""

from typing import Any

from dd.evaluation.supervision import distinct, told, trained_labels
from dd.report.html import Section, Table
from dd.report.origins import some_of
from dd.report.recipes import Entry, Run

UNKNOWN = "not recorded"  # by an earlier version


def labels_behind(run: Run) -> dict[str, Any]:
    """Of a run.json: ``number`` of different labelled images (None = unknown), and in words what
    was ``chosen`` on which and what was ``trained`` on; "" = none."""
    trained = trained_labels(run["trained_on"])
    if "chosen_on" not in run:
        return {"number": None, "chosen": UNKNOWN, "trained": told(trained)}
    chosen = run["chosen_on"]
    number = distinct([*trained, *chosen])
    return {"number": number, "chosen": told(chosen), "trained": told(trained)}


def labels_section(entries: list[Entry]) -> Section:
    """Which labels stand behind each run, runs with the same ones in one row; class A first."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for entry in entries:
        found = labels_behind(entry["run"])
        key = (entry["supervision"], *(found[k] for k in ("chosen", "trained", "number")))
        groups.setdefault(key, []).append(entry["name"])
    rows = [
        [some_of(names), supervision, number, chosen or "no label", trained or "no label"]
        for (supervision, chosen, trained, number), names in groups.items()
    ]
    columns = ["runs", "supervision", "labels in all", "settings chosen on", "trained on"]
    note = (
        "Labelled real images, each counted once. A: no label chose anything, settings are "
        "published constants or were chosen without one; B: labels of real images did, or a few "
        "were trained on; C, D: masks by labelers of that class (D: a foundation model); real: "
        "real images alone, or whole real splits. A fine-tuned run has the "
        "class of its synthetic start, or B if its own settings were chosen on labels."
    )
    rows.sort(key=lambda row: row[1])
    return Table("Labels behind the runs", columns, rows, note, digits={"labels in all": 0})
