"""Sections that say where results come from: what differs between runs, versions, commands, what
was left out and why."""

from collections.abc import Mapping, Sequence
from typing import Any

from dd.evaluation.supervision import behind, told
from dd.report.html import Section, Table, Text
from dd.store.commands import spelled

NAMED = 3  # runs listed beside a value; more are counted
MADE = ("command", "git_commit", "weights_sha256")  # of a run.json


def flatten(settings: Any, prefix: str = "") -> dict[str, str]:
    """{"a.b": text} of every leaf of nested dictionaries."""
    if not isinstance(settings, dict):
        return {prefix.rstrip("."): str(settings)}
    return {
        k: v
        for key, value in settings.items()
        for k, v in flatten(value, f"{prefix}{key}.").items()
    }


def some_of(names: list[str], total: int | None = None) -> str:
    """The first names, and how many more; "all" for all of ``total``."""
    if len(names) == total:
        return "all"
    shown = ", ".join(names[:NAMED])
    return f"{shown} and {len(names) - NAMED} more" if len(names) > NAMED else shown


def differing(settings: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """[key, value, runs with it] for every key on which ``settings`` {run: nested dictionary} do
    not all agree."""
    flat, rows = {name: flatten(s) for name, s in settings.items()}, []
    for key in sorted({k for found in flat.values() for k in found}):
        values: dict[str, list[str]] = {}
        for name, found in flat.items():
            values.setdefault(found.get(key, "(absent)"), []).append(name)
        if len(values) > 1:
            rows += [[key, value, some_of(names, len(flat))] for value, names in values.items()]
    return rows


def run_sections(entries: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Differing settings, versions and the commands of runs."""
    runs = {e["name"]: e["run"] for e in entries}
    rows = differing({name: run.get("identity", {}) for name, run in runs.items()})
    note = "Keys of settings.json on which the runs do not agree; all others are the same."
    found: list[Section] = []
    if rows:
        found.append(Table("Settings that differ", ["setting", "value", "runs"], rows, note))
    versions: dict[tuple[str, str], list[str]] = {}
    for name, run in runs.items():
        for package, version in run.get("versions", {}).items():
            versions.setdefault((package, version), []).append(name)
    rows = [
        [package, version, some_of(names, len(runs))]
        for (package, version), names in sorted(versions.items())
    ]
    found.append(Table("Versions", ["package", "version", "runs"], rows))
    made = {name: [run.get(k, "") for k in MADE] for name, run in runs.items()}
    rows = [[name, command, *(t[:12] for t in hashes)] for name, (command, *hashes) in made.items()]
    note = "A + behind a commit: files of the checkout differed from it."
    found.append(Table("Commands", ["run", "command", "commit", "checkpoint"], rows, note))
    return found


def left_out_section(left_out: list[tuple[str, str]]) -> list[Section]:
    """What is not compared with the rest, and why."""
    if not left_out:
        return []
    note = "These results are in no table, chart or number of this page."
    rows = [(result, spelled(why)) for result, why in left_out]
    return [Table("Not compared", ["result", "why"], rows, note)]


def made_section(run: Mapping[str, Any], masks: Mapping[str, Any]) -> list[Section]:
    """How a synthetic set was made, from its run.json and masks.json."""
    images = {k: v for k, v in flatten(run["identity"]).items() if "scheduler_config." not in k}
    drawn = flatten(masks["identity"])
    if "chosen_on" in masks:
        drawn["real labels behind them"] = told(behind(masks)) or "none"
    made = {"images": images, "masks": drawn, "versions": flatten(run.get("versions", {}))}
    rows = [[of, k, v] for of, found in made.items() for k, v in found.items()]
    command = [
        f"Command: {run.get('command', '')}",
        f"Commit: {run.get('git_commit', '') or 'not in a checkout'}",
    ]
    return [Table("How it was made", ["of", "setting", "value"], rows), Text("Command", command)]
