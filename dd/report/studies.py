"""Sections about studies: learning curves, the label-budget study with its costs, mask sweeps."""

import csv
from math import isfinite
from pathlib import Path
from statistics import mean, stdev

from dd.budget import ARMS, Prices, cost
from dd.provenance import read_json
from dd.report import charts
from dd.report.explore import Matrix
from dd.report.page import Chart, Table

CURVES = {"train/loss": "training loss", "tune/miou": "mIoU on tune (%)"}  # columns of metrics.csv
SERIES = 6  # curves in one chart


def read_curve(path: Path, column: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a column of metrics.csv; rows that a broken-off write left unreadable are skipped."""
    steps, values = [], []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                step, value = int(row["step"]), float(row[column])
            except (KeyError, TypeError, ValueError):
                continue
            if isfinite(value):
                steps.append(step)
                values.append(value)
    return steps, values


def learning_curves(entries, arm_name):
    """Training loss and validation mIoU by step, one run for each arm; ``arm_name(entry)`` names them."""
    chosen = {}
    for entry in entries:
        if (entry["folder"] / "metrics.csv").is_file() and not entry["ablation"]:
            chosen.setdefault(arm_name(entry), entry["folder"] / "metrics.csv")
    for column, label in CURVES.items():
        series = {name: read_curve(path, column) for name, path in chosen.items()}
        series = dict([(n, c) for n, c in series.items() if c[0]][:SERIES])
        if series:
            more = f" {len(chosen) - SERIES} more runs are not shown." if len(chosen) > SERIES else ""
            yield Chart(f"Learning curves: {label}", charts.curves_svg(series, "step", label), f"One seed of each arm.{more}")


# ------------------------------------------------------------------------------------------------------------- label budget


def _points(values: dict, domain: str) -> dict[str, list[float]]:
    """{shots: values of the seeds} of an arm, those that there are, from few shots to all."""
    order = sorted(values, key=lambda k: (k == "all", int(k) if k != "all" else 0))
    found = {k: [v for v in values[k].get(domain, []) if v is not None] for k in order}
    return {k: v for k, v in found.items() if v}


def _shots_label(k: str, size: int | None) -> int | str:
    """A place on the axis of label budgets; ``size``: how many images "all" are, if that is known."""
    if k != "all":
        return int(k)
    return f"all ({size})" if size else k


def budget_sections(study: dict, name: str):
    """Curves of a label-budget study, what they save and what they cost, from budget.json (:mod:`dd.stages.budget`)."""
    arms = study["arms"]
    names = {a: study.get("labels", {}).get(a) or ARMS.get(a, a) for a in arms}
    domains = list(dict.fromkeys(d for values in arms.values() for at in values.values() for d in at))
    prices, spent = study.get("cost", {}).get("prices"), study.get("cost", {}).get("seconds", {})
    failed = len(study.get("failed") or ())
    for domain in domains:
        points = {a: _points(values, domain) for a, values in arms.items()}
        if not any(points.values()):
            continue
        size = (study.get("domains") or {}).get(domain)
        shots = {k for p in points.values() for k in p}
        order = sorted(shots, key=lambda k: (k == "all", int(k) if k != "all" else 0))
        series = {
            names[a]: ([_shots_label(k, size) for k in order], [mean(p[k]) if k in p else None for k in order],
                       [stdev(p[k]) if len(p.get(k, ())) > 1 else None for k in order])
            for a, p in points.items() if p
        }  # fmt: skip
        note = "Mean and standard deviation over training seeds; test split." + (f" {failed} jobs failed." if failed else "")
        svg = charts.line_chart_svg(series, f"real images labelled ({domain})", f"mIoU on {domain} (%)")
        yield Chart(f"{name}: how much labelling on {domain}", svg, note)
        paid = study.get("cost", {}).get("labels", {})
        if prices and size and (priced := _priced(points, spent, domain, size, Prices(**prices), paid)):
            svg = charts.curves_svg(
                {names[a]: c for a, c in priced.items()}, "price in all", f"mIoU on {domain} (%)", points=True
            )
            note = "{minutes_per_image:g} minutes an image at {per_hour:g} an hour, {per_gpu_hour:g} a GPU hour.".format(
                **prices
            )
            note += " Labels that settings were chosen on are paid for, each once." if paid else ""
            yield Chart(f"{name}: what it costs on {domain}", svg, note)
        yield from _skipped(study, names, domain, name)
        yield from _targets(study, names, domain, name)


def _priced(points, spent, domain, size, prices, paid=None) -> dict[str, tuple[list, list]]:
    """{arm: (prices, mIoUs)} of the points whose seconds are known. ``paid``: {arm: {shots:
    {domain: labels}}}, those that chose settings included; a study of an earlier version does not
    tell."""

    def labels(arm, k):
        images = size if k == "all" else int(k)
        return (paid or {}).get(arm, {}).get(k, {}).get(domain, images)

    found = {}
    for arm, at in points.items():
        seconds = _points(spent.get(arm, {}), domain)
        pairs = [
            (cost(labels(arm, k), mean(seconds[k]), prices)["total"], mean(v))
            for k, v in at.items() if k in seconds
        ]  # fmt: skip
        if pairs:
            found[arm] = tuple(map(list, zip(*sorted(pairs), strict=True)))
    return found


def _skipped(study, names, domain, name):
    rows = []
    for arm, controls in (study.get("skipped") or {}).items():
        for control, by_domain in controls.items():
            for k, at in by_domain.get(domain, {}).items():
                reached = at["skipped"] is not None
                needed = f"{at['needed']:.0f}" if reached else "more than measured"
                skips = f"{at['skipped']:.0f}" if reached else f"at least {at['at_least']}"
                rows.append([names.get(arm, arm), str(k), names.get(control, control), needed, skips])
    if rows:
        columns = ["arm", "real images labelled", "control", "images that the control needs", "images you can skip"]
        note = (
            "For the same mIoU, read off the control's mean curve (linear in log k between measured points). Negative: costs."
        )
        yield Table(f"{name}: real images you can skip on {domain}", columns, rows, note)


def _targets(study, names, domain, name):
    rows = study.get("cost", {}).get("targets", {}).get(domain) or []
    arms = list(dict.fromkeys(a for row in rows for a in row["arms"]))
    if not arms:
        return

    def text(found):
        if found is None:
            return None
        never = found["images"] is None
        if never:
            return f"more than {found['more_than']} images"
        more = found.get("labels", found["images"]) - found["images"]
        chose = f", {more} labels more chose settings" if more else ""
        return f"{found['total']:,.0f} ({found['images']} images{chose})"

    table = [[f"{row['target']:.1f} ({row['why']})", *(text(row["arms"].get(a)) for a in arms)] for row in rows]
    columns = ["target mIoU", *(names.get(a, a) for a in arms)]
    yield Table(f"{name}: price of a target on {domain}", columns, table, "Labelling and computing; images to label.")


# ------------------------------------------------------------------------------------------------------------- mask sweeps


def sweep_section(sweep: dict, name: str) -> Matrix | None:
    """mIoU of the masks by power and threshold, at the band and the source of the best setting; None without settings."""
    table = sweep["sweep"]["table"]
    if not table:
        return None
    best = table[0]
    shown = [row for row in table if row["source"] == best["source"] and row["band"] == best["band"]]
    powers, thresholds = sorted({r["power"] for r in shown}), sorted({r["threshold"] for r in shown})
    at = {(r["power"], r["threshold"]): r["miou"] for r in shown}
    note = (
        f"mIoU in percent against {sweep['sweep']['against']}, uncertain pixels counted as background; band {best['band']:g}, "
        f"source {best['source']}, those of the best of {len(table)} settings (power {best['power']}, threshold "
        f"{best['threshold']:g}: {best['miou']:.1f})."
    )
    return Matrix(
        f"Mask sweep: {name}", "power \\ threshold", [str(p) for p in powers], [f"{t:g}" for t in thresholds],
        [[at.get((p, t)) for t in thresholds] for p in powers], note, digits=1,
    )  # fmt: skip


def sweep_sections(synthetic: Path) -> list[Matrix]:
    """The mask sweeps of a synthetic set, from the files of stage=sweep."""
    found = [(path.stem, read_json(path)) for path in sorted((Path(synthetic) / "sweeps").glob("*.json"))]
    sections = [sweep_section(sweep, name) for name, sweep in found]
    return [s for s in sections if s is not None]
