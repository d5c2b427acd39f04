"""Sections that say where results come from: what differs between runs, versions, commands, what
was left out and why."""

from dd.evaluation.supervision import behind, told
from dd.report.page import Section, Table, Text

NAMED = 3  # runs listed beside a value; more are counted


def flatten(settings, prefix: str = "") -> dict[str, str]:
    """{"a.b": text} of every leaf of nested dictionaries."""
    if not isinstance(settings, dict):
        return {prefix.rstrip("."): str(settings)}
    return {
        k: v
        for key, value in settings.items()
        for k, v in flatten(value, f"{prefix}{key}.").items()
    }


def _who(names: list[str], total: int) -> str:
    if len(names) == total:
        return "all"
    shown = ", ".join(names[:NAMED])
    return f"{shown} and {len(names) - NAMED} more" if len(names) > NAMED else shown


def differing(settings: dict[str, dict]) -> list[list[str]]:
    """[key, value, runs with it] for every key on which ``settings`` {run: nested dictionary} do
    not all agree."""
    flat, rows = {name: flatten(s) for name, s in settings.items()}, []
    for key in sorted({k for found in flat.values() for k in found}):
        values = {}
        for name, found in flat.items():
            values.setdefault(found.get(key, "(absent)"), []).append(name)
        if len(values) > 1:
            rows += [[key, value, _who(names, len(flat))] for value, names in values.items()]
    return rows


def run_sections(entries) -> list[Section]:
    """Differing settings, versions and the commands of runs."""
    runs = {e["name"]: e["run"] for e in entries}
    rows = differing({name: run.get("identity", {}) for name, run in runs.items()})
    note = "Keys of settings.json on which the runs do not agree; all others are the same."
    found = (
        [Table("Settings that differ", ["setting", "value", "runs"], rows, note)] if rows else []
    )
    versions = {}
    for name, run in runs.items():
        for package, version in run.get("versions", {}).items():
            versions.setdefault((package, version), []).append(name)
    rows = [
        [package, version, _who(names, len(runs))]
        for (package, version), names in sorted(versions.items())
    ]
    found.append(Table("Versions", ["package", "version", "runs"], rows))
    rows = [
        [
            name,
            run.get("command", ""),
            run.get("git_commit", "")[:12],
            run.get("weights_sha256", "")[:12],
        ]
        for name, run in runs.items()
    ]
    note = "A + behind a commit: files of the checkout differed from it."
    found.append(Table("Commands", ["run", "command", "commit", "checkpoint"], rows, note))
    return found


def left_out_section(left_out: list[tuple[str, str]]) -> list[Section]:
    """What is not compared with the rest, and why."""
    if not left_out:
        return []
    rows = [[what, why] for what, why in left_out]
    note = "These results are in no table, chart or number of this page."
    return [Table("Not compared", ["result", "why"], rows, note)]


def made_section(run: dict, masks: dict) -> list[Section]:
    """How a synthetic set was made, from its run.json and masks.json."""
    rows = [
        ["images", k, v]
        for k, v in flatten(run["identity"]).items()
        if "scheduler_config." not in k
    ]
    rows += [["masks", k, v] for k, v in flatten(masks["identity"]).items()]
    rows += (
        [["masks", "real labels behind them", told(behind(masks)) or "none"]]
        if "chosen_on" in masks
        else []
    )
    rows += [["versions", k, v] for k, v in flatten(run.get("versions", {})).items()]
    command = [
        f"Command: {run.get('command', '')}",
        f"Commit: {run.get('git_commit', '') or 'not in a checkout'}",
    ]
    return [Table("How it was made", ["of", "setting", "value"], rows), Text("Command", command)]
