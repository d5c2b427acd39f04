"""Sections about studies: learning curves, the label-budget study with its costs, mask sweeps."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from markupsafe import Markup

from dd.evaluation.budget import ARMS, CONTROLS, Prices, cost
from dd.evaluation.savings import bounds_text, price_text, range_text
from dd.evaluation.statistics import LEAST_IMAGES, LEAST_SEEDS
from dd.report import charts
from dd.report.compare import signed
from dd.report.explore import Matrix
from dd.report.html import Cell, Chart, Section, Table
from dd.report.recipes import Entry
from dd.store.provenance import read_own
from dd.store.schemas import SWEPT

CURVES = {"train/loss": "training loss", "tune/miou": "mIoU on tune (%)"}  # columns of metrics.csv
SERIES = 6  # curves in one chart
ALPHA = 0.05  # of p-values after Holm

Study = Mapping[str, Any]  # budget.json, dd.store.schemas.STUDY
Points = Mapping[str, list[float]]  # {shots: values of the runs}, see _points


def read_curve(path: Path, column: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a column of metrics.csv; rows that a broken-off write left unreadable
    are skipped."""
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


def learning_curves(
    entries: Iterable[Entry], arm_name: Callable[[Entry], str]
) -> Iterator[Section]:
    """Training loss and validation mIoU by step, one run for each arm; ``arm_name(entry)`` names
    them."""
    chosen: dict[str, Path] = {}
    for entry in entries:
        if (entry["folder"] / "metrics.csv").is_file() and not entry["ablation"]:
            chosen.setdefault(arm_name(entry), entry["folder"] / "metrics.csv")
    left = len(chosen) - SERIES
    note = "One seed of each arm." + (f" {left} more runs are not shown." if left > 0 else "")
    for column, label in CURVES.items():
        series = {name: read_curve(path, column) for name, path in chosen.items()}
        series = dict([(n, c) for n, c in series.items() if c[0]][:SERIES])
        if series:
            svg = charts.curves_svg(series, "step", label)
            yield Chart(f"Learning curves: {label}", svg, note)


# ------------------------------------------------------------------------------------- label budget


def _order(shots: Iterable[str]) -> list[str]:
    """From few to all."""
    return sorted(shots, key=lambda k: (k == "all", 0 if k == "all" else int(k)))


def _points(values: Mapping[str, Mapping[str, list[float | None]]], domain: str) -> Points:
    """Of one arm, those that there are, from few shots to all."""
    found = {k: [v for v in values[k].get(domain, []) if v is not None] for k in _order(values)}
    return {k: v for k, v in found.items() if v}


def _shots_label(k: str, size: int | None) -> int | str:
    """A place on the axis of label budgets; ``size``: how many images "all" are, if that is
    known."""
    if k != "all":
        return int(k)
    return f"all ({size})" if size else k


def budget_sections(study: Study, name: str) -> Iterator[Section]:
    """Curves of a label-budget study, differences, what labels it saves and what they cost, from
    budget.json (:mod:`dd.stages.study`). The short control is shown only where there is no fair
    one."""
    study = _without_short_control(study)
    arms = study["arms"]
    names = {a: study.get("labels", {}).get(a) or ARMS.get(a, a) for a in arms}
    domains = dict.fromkeys(d for values in arms.values() for at in values.values() for d in at)
    for domain in domains:
        found = {names[a]: _points(values, domain) for a, values in arms.items()}
        points = {label: at for label, at in found.items() if at}
        if points:
            size = (study.get("domains") or {}).get(domain)
            svg = _curves(points, domain, size)
            yield Chart(f"{name}: how much labelling on {domain}", svg, _note(study, names, domain))
            yield from _prices(study, names, domain, name)
            yield from _differences(study, names, domain, name)
            yield from _skipped(study, names, domain, name)
            yield from _targets(study, names, domain, name)


def _without_short_control(study: Study) -> Study:
    """The study as it is shown: a control of the fine-tuning steps alone says less than that of
    equal total steps, and stays in budget.json where both are there."""
    fair, short = CONTROLS
    if not {fair, short} <= study["arms"].keys():
        return study
    arms = {arm: at for arm, at in study["arms"].items() if arm != short}
    skips = {
        arm: {control: at for control, at in found.items() if control != short}
        for arm, found in (study.get("skipped") or {}).items()
    }
    cost, targets = study.get("cost", {}), {}
    for domain, rows in cost.get("targets", {}).items():
        kept = [{a: p for a, p in row["arms"].items() if a != short} for row in rows]
        targets[domain] = [{**row, "arms": at} for row, at in zip(rows, kept, strict=True)]
    return {**study, "arms": arms, "skipped": skips, "cost": {**cost, "targets": targets}}


def _curves(points: Mapping[str, Points], domain: str, size: int | None) -> Markup:
    shots = _order({k for at in points.values() for k in at})
    places = [_shots_label(k, size) for k in shots]
    series: dict[str, charts.Line] = {}
    for name, at in points.items():
        means = [mean(at[k]) if k in at else None for k in shots]
        series[name] = (
            places,
            means,
            [stdev(at[k]) if len(at.get(k, ())) > 1 else None for k in shots],
        )
    return charts.line_chart_svg(
        series, f"real images labelled ({domain})", f"mIoU on {domain} (%)"
    )


def _prices(study: Study, names: Mapping[str, str], domain: str, name: str) -> Iterator[Section]:
    """mIoU by what it costs, where prices and the number of images are known."""
    costs, size = study.get("cost", {}), (study.get("domains") or {}).get(domain)
    if not costs.get("prices") or not size:
        return
    points = {a: _points(values, domain) for a, values in study["arms"].items()}
    prices, paid = Prices(**costs["prices"]), costs.get("labels", {})
    priced = _priced(points, costs.get("seconds", {}), domain, size, prices, paid)
    if priced:
        curves = {names[a]: curve for a, curve in priced.items()}
        svg = charts.curves_svg(curves, "price in all", f"mIoU on {domain} (%)", points=True)
        note = (
            f"{prices.minutes_per_image:g} minutes an image at {prices.per_hour:g} an hour, "
            f"{prices.per_gpu_hour:g} a GPU hour."
        )
        note += " Labels that settings were chosen on are paid for, each once." if paid else ""
        yield Chart(f"{name}: what it costs on {domain}", svg, note)


def _note(study: Study, names: Mapping[str, str], domain: str) -> str:
    """What the curves rest on, what is missing, and which choices may have missed a better one."""
    note = f"Mean and standard deviation over runs; test split: {_basis(study, domain)}."
    if failed := len(study.get("failed") or ()):
        note += f" {failed} jobs failed."
    found = [choice for choice in _choices(study) if choice[2].get("edge")]
    edges = [f"{names.get(recipe, recipe)}{at} {c['chosen']:g}" for recipe, at, c in found]
    if edges:
        where = "at the edge of their candidates, where a better one may lie beyond"
        note += f" Learning rates {where}: {', '.join(edges)}."
    return note + _undecided(study, domain)


def _choices(study: Study) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(recipe, " at k images" or "", choice) of each learning rate."""
    for recipe, choice in (study.get("learning_rates") or {}).items():
        for k, at in choice.get("by_shots", {"": choice}).items():
            yield recipe, f" at {k} images" if k else "", at


def _test_images(study: Study, domain: str) -> int | None:
    """Number of test images of a domain, if it was recorded."""
    runs = [r for r in study.get("runs") or () if r["domain"] == domain]
    return next((r["num_images"] for r in runs if r.get("num_images")), None)


def _basis(study: Study, domain: str) -> str:
    """``3 seeds, 2 synthetic draws, 512 test images``."""
    seeds, draws = (len(study.get(key) or ()) for key in ("seeds", "draws"))
    images = _test_images(study, domain)
    parts = [f"{seeds} seed{'s' * (seeds != 1)}"] * (seeds > 0)
    parts += [f"{draws} synthetic draws"] * (draws > 1)
    parts.append(f"{images:,} test images" if images else "number of test images not recorded")
    return ", ".join(parts)


def _undecided(study: Study, domain: str) -> str:
    """A sentence for a study of too few seeds or test images; "" for others."""
    images, seeds = _test_images(study, domain), len(study.get("seeds") or ())
    if seeds >= LEAST_SEEDS and (images or 0) >= LEAST_IMAGES:
        return ""
    return f" This decides nothing: it takes {LEAST_SEEDS} seeds and {LEAST_IMAGES} test images."


def _priced(
    points: Mapping[str, Points],
    spent: Mapping[str, Any],
    domain: str,
    size: int,
    prices: Prices,
    paid: Mapping[str, Any],
) -> dict[str, tuple[list[float], list[float]]]:
    """{arm: (prices, mIoUs)} of the points whose seconds are known. ``paid``: {arm: {shots:
    {domain: labels}}}, those that chose settings included."""
    found = {}
    for arm, at in points.items():
        seconds, pairs = _points(spent.get(arm, {}), domain), []
        for k in at.keys() & seconds.keys():
            images = size if k == "all" else int(k)
            labels = paid.get(arm, {}).get(k, {}).get(domain, images)
            pairs.append((cost(labels, mean(seconds[k]), prices)["total"], mean(at[k])))
        if pairs:
            pairs.sort()
            found[arm] = ([price for price, _ in pairs], [miou for _, miou in pairs])
    return found


def _differences(
    study: Study, names: Mapping[str, str], domain: str, name: str
) -> Iterator[Section]:
    rows: list[list[Cell]] = []
    bold: list[tuple[int, int]] = []
    for row in (r for r in study.get("differences", ()) if r["domain"] == domain):
        shown = row["low"] is not None
        enough = row["seeds"] >= LEAST_SEEDS and (row["images"] or 0) >= LEAST_IMAGES
        bold += [(len(rows), 4)] * (enough and row["p_holm"] is not None and row["p_holm"] < ALPHA)
        arm, against = (names.get(row[key], row[key]) for key in ("arm", "against"))
        within = f"{signed(row['low'])} to {signed(row['high'])}" if shown else "one run"
        outside = "yes" if shown and not row["low"] <= 0 <= row["high"] else "not shown"
        head = [arm, str(row["k"]), against, str(row["against_k"]), signed(row["value"])]
        rows.append([*head, within, outside, *(row[c] for c in ("p", "p_holm", "seeds", "images"))])
    if rows:
        note = (
            "The first arm less the second, paired over runs of one seed and over test images; a "
            "difference is shown where its 95 % interval leaves out 0. p after Holm: adjusted for "
            f"all {len(study['differences'])} differences of the study; bold: below {ALPHA:g}. "
            "Images: a dash where each image's own scores were not stored; the interval is over "
            "seeds alone then."
        )
        columns = ["arm", "real images", "less", "real images of it", "difference"]
        columns += ["95 % interval", "shown", "p", "p after Holm", "seeds", "images"]
        yield Table(
            f"{name}: differences on {domain}",
            columns,
            rows,
            note + _undecided(study, domain),
            digits={"p": 3, "p after Holm": 3},
            highlight=frozenset(bold),
        )


def _skipped(study: Study, names: Mapping[str, str], domain: str, name: str) -> Iterator[Section]:
    rows = []
    for arm, controls in (study.get("skipped") or {}).items():
        for control, by_domain in controls.items():
            for k, at in by_domain.get(domain, {}).items():
                skips = bounds_text(**at["median"]) if at["shown"] else "not shown"
                within = at["interval"] and range_text(**at["interval"])
                each = "; ".join(bounds_text(run["low"], run["high"]) for run in at["runs"])
                again = f"{at['falls_again']} of {len(at['runs'])}" if at["falls_again"] else ""
                head = [names.get(arm, arm), str(k), names.get(control, control)]
                rows.append([*head, skips, each, within, again])
    if rows:
        columns = ["arm", "real images labelled", "control", "images you can skip", "each run"]
        columns += ["95 % interval", "control dips"]
        note = (
            "Real images that the control needs for the same mIoU, less those labelled; "
            f"{_basis(study, domain)}. Each run is read off the curve of its own control, linear "
            "in log k between measured points; the median is given. At most: the control's fewest "
            "images reach it already; at least: its most do not. Not shown: the arm's mIoU less "
            "that of the control (with as many images, or the next more that were measured) or "
            "the skipped images have an interval that holds 0. The interval over seeds needs a "
            "reading, not a bound, of each. Control dips: runs whose control falls below the mIoU "
            "again with more images; the first crossing counts."
        )
        title = f"{name}: real images you can skip on {domain}"
        yield Table(title, columns, rows, note + _undecided(study, domain))


def _targets(study: Study, names: Mapping[str, str], domain: str, name: str) -> Iterator[Section]:
    rows = study.get("cost", {}).get("targets", {}).get(domain) or []
    arms = list(dict.fromkeys(a for row in rows for a in row["arms"]))
    if not arms:
        return
    table: list[list[Cell]] = []
    for row in rows:
        priced = [price_text(row["arms"][a]) if row["arms"].get(a) else None for a in arms]
        table.append([f"{row['target']:.1f} ({row['why']})", *priced])
    columns = ["target mIoU", *(names.get(a, a) for a in arms)]
    note = (
        "Labelling and computing; images to label. Each run is read off its own curve: the median, "
        "and behind the semicolon the range of the runs. At most: the fewest images measured reach "
        "the target already; more than: none do."
    )
    title = f"{name}: price of a target on {domain}"
    yield Table(title, columns, table, note + _undecided(study, domain))


# -------------------------------------------------------------------------------------- mask sweeps


def sweep_section(sweep: Mapping[str, Any], name: str) -> Matrix | None:
    """mIoU of the masks by power and threshold, at the band and the source of the best setting;
    None where no setting has all three."""
    keys = {"power", "threshold", "band"}  # some chains read none of them
    table = [row for row in sweep["sweep"]["table"] if keys <= row.keys()]
    if not table:
        return None
    best = table[0]
    same = ("chain", "source", "band")
    shown = [r for r in table if all(r.get(key) == best.get(key) for key in same)]
    powers, thresholds = (sorted({r[key] for r in shown}) for key in ("power", "threshold"))
    at = {(r["power"], r["threshold"]): r["miou"] for r in shown}
    note = (
        f"mIoU in percent against {sweep['sweep']['against']}, uncertain pixels counted as "
        f"background; band {best['band']:g}, source {best['source']}, those of the best of "
        f"{len(table)} settings (power {best['power']}, threshold {best['threshold']:g}: "
        f"{best['miou']:.1f})."
    )
    return Matrix(
        f"Mask sweep: {name}",
        "power \\ threshold",
        [str(p) for p in powers],
        [f"{t:g}" for t in thresholds],
        [[at.get((p, t)) for t in thresholds] for p in powers],
        note,
        digits=1,
    )


def sweep_sections(synthetic: Path) -> list[Matrix]:
    """The mask sweeps of a synthetic set, from the files of stage=sweep."""
    paths = sorted((synthetic / "sweeps").glob("*.json"))
    sections = (sweep_section(read_own(path, SWEPT), path.stem) for path in paths)
    return [s for s in sections if s is not None]
