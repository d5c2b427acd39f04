"""Sections about studies: learning curves, the label-budget study with its costs, mask sweeps."""

import csv
from math import isfinite
from pathlib import Path
from statistics import mean, stdev

from dd.evaluation.budget import ARMS, Prices, cost
from dd.evaluation.savings import bounds_text, price_text, range_text
from dd.evaluation.statistics import LEAST_IMAGES, LEAST_SEEDS
from dd.report import charts
from dd.report.compare import signed
from dd.report.explore import Matrix
from dd.report.page import Chart, Table
from dd.store.provenance import read_own
from dd.store.schemas import SWEPT

CURVES = {"train/loss": "training loss", "tune/miou": "mIoU on tune (%)"}  # columns of metrics.csv
SERIES = 6  # curves in one chart
ALPHA = 0.05  # of p-values after Holm


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


def learning_curves(entries, arm_name):
    """Training loss and validation mIoU by step, one run for each arm; ``arm_name(entry)`` names
    them."""
    chosen = {}
    for entry in entries:
        if (entry["folder"] / "metrics.csv").is_file() and not entry["ablation"]:
            chosen.setdefault(arm_name(entry), entry["folder"] / "metrics.csv")
    for column, label in CURVES.items():
        series = {name: read_curve(path, column) for name, path in chosen.items()}
        series = dict([(n, c) for n, c in series.items() if c[0]][:SERIES])
        if series:
            more = (
                f" {len(chosen) - SERIES} more runs are not shown." if len(chosen) > SERIES else ""
            )
            yield Chart(
                f"Learning curves: {label}",
                charts.curves_svg(series, "step", label),
                f"One seed of each arm.{more}",
            )


# ------------------------------------------------------------------------------------- label budget


def _points(values: dict, domain: str) -> dict[str, list[float]]:
    """{shots: values of the seeds} of an arm, those that there are, from few shots to all."""
    order = sorted(values, key=lambda k: (k == "all", int(k) if k != "all" else 0))
    found = {k: [v for v in values[k].get(domain, []) if v is not None] for k in order}
    return {k: v for k, v in found.items() if v}


def _shots_label(k: str, size: int | None) -> int | str:
    """A place on the axis of label budgets; ``size``: how many images "all" are, if that is
    known."""
    if k != "all":
        return int(k)
    return f"all ({size})" if size else k


def budget_sections(study: dict, name: str):
    """Curves of a label-budget study, differences, what labels it saves and what they cost, from
    budget.json (:mod:`dd.stages.study`)."""
    arms = study["arms"]
    names = {a: study.get("labels", {}).get(a) or ARMS.get(a, a) for a in arms}
    domains = list(
        dict.fromkeys(d for values in arms.values() for at in values.values() for d in at)
    )
    prices, spent = study.get("cost", {}).get("prices"), study.get("cost", {}).get("seconds", {})
    for domain in domains:
        points = {a: _points(values, domain) for a, values in arms.items()}
        if not any(points.values()):
            continue
        size = (study.get("domains") or {}).get(domain)
        shots = {k for p in points.values() for k in p}
        order = sorted(shots, key=lambda k: (k == "all", int(k) if k != "all" else 0))
        series = {
            names[a]: (
                [_shots_label(k, size) for k in order],
                [mean(p[k]) if k in p else None for k in order],
                [stdev(p[k]) if len(p.get(k, ())) > 1 else None for k in order],
            )
            for a, p in points.items()
            if p
        }
        svg = charts.line_chart_svg(
            series, f"real images labelled ({domain})", f"mIoU on {domain} (%)"
        )
        yield Chart(f"{name}: how much labelling on {domain}", svg, _note(study, names, domain))
        paid = study.get("cost", {}).get("labels", {})
        if (
            prices
            and size
            and (priced := _priced(points, spent, domain, size, Prices(**prices), paid))
        ):
            svg = charts.curves_svg(
                {names[a]: c for a, c in priced.items()},
                "price in all",
                f"mIoU on {domain} (%)",
                points=True,
            )
            note = (
                "{minutes_per_image:g} minutes an image at {per_hour:g} an hour, "
                "{per_gpu_hour:g} a GPU hour."
            ).format(**prices)
            note += " Labels that settings were chosen on are paid for, each once." if paid else ""
            yield Chart(f"{name}: what it costs on {domain}", svg, note)
        if "differences" in study:
            yield from _differences(study, names, domain, name)
            yield from _skipped(study, names, domain, name)
            yield from _targets(study, names, domain, name)


def _note(study: dict, names: dict, domain: str) -> str:
    """What the curves rest on, what is missing, and which choices may have missed a better one."""
    note = f"Mean and standard deviation over runs; test split: {_basis(study, domain)}."
    if failed := len(study.get("failed") or ()):
        note += f" {failed} jobs failed."
    found = [choice for choice in _choices(study) if choice[2].get("edge")]
    edges = [f"{names.get(recipe, recipe)}{at} {c['chosen']:g}" for recipe, at, c in found]
    if edges:
        where = "at the edge of their candidates, where a better one may lie beyond"
        note += f" Learning rates {where}: {', '.join(edges)}."
    if "skipped" in study and "differences" not in study:
        note += " Of an earlier version, without intervals: the study's command writes it anew."
    return note + _undecided(study, domain)


def _choices(study: dict):
    """(recipe, " at k images" or "", choice) of each learning rate."""
    for recipe, choice in (study.get("learning_rates") or {}).items():
        for k, at in choice.get("by_shots", {"": choice}).items():
            yield recipe, f" at {k} images" if k else "", at


def _test_images(study: dict, domain: str) -> int | None:
    """Number of test images of a domain, if it was recorded."""
    runs = [r for r in study.get("runs") or () if r["domain"] == domain]
    return next((r["num_images"] for r in runs if r.get("num_images")), None)


def _basis(study: dict, domain: str) -> str:
    """``3 seeds, 2 synthetic draws, 512 test images``."""
    seeds, draws = (len(study.get(key) or ()) for key in ("seeds", "draws"))
    images = _test_images(study, domain)
    parts = [f"{seeds} seed{'s' * (seeds != 1)}"] * (seeds > 0)
    parts += [f"{draws} synthetic draws"] * (draws > 1)
    parts.append(f"{images:,} test images" if images else "number of test images not recorded")
    return ", ".join(parts)


def _undecided(study: dict, domain: str) -> str:
    """A sentence for a study of too few seeds or test images; "" for others."""
    images, seeds = _test_images(study, domain), len(study.get("seeds") or ())
    if seeds >= LEAST_SEEDS and (images or 0) >= LEAST_IMAGES:
        return ""
    return f" This decides nothing: it takes {LEAST_SEEDS} seeds and {LEAST_IMAGES} test images."


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
            for k, v in at.items()
            if k in seconds
        ]
        if pairs:
            found[arm] = tuple(map(list, zip(*sorted(pairs), strict=True)))
    return found


def _differences(study, names, domain, name):
    rows, bold = [], []
    for row in (r for r in study["differences"] if r["domain"] == domain):
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


def _skipped(study, names, domain, name):
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


def _targets(study, names, domain, name):
    rows = study.get("cost", {}).get("targets", {}).get(domain) or []
    arms = list(dict.fromkeys(a for row in rows for a in row["arms"]))
    if not arms:
        return
    text = lambda found: None if found is None else price_text(found)  # noqa: E731
    table = [
        [f"{row['target']:.1f} ({row['why']})", *(text(row["arms"].get(a)) for a in arms)]
        for row in rows
    ]
    columns = ["target mIoU", *(names.get(a, a) for a in arms)]
    note = (
        "Labelling and computing; images to label. Each run is read off its own curve: the median, "
        "and behind the semicolon the range of the runs. At most: the fewest images measured reach "
        "the target already; more than: none do."
    )
    title = f"{name}: price of a target on {domain}"
    yield Table(title, columns, table, note + _undecided(study, domain))


# -------------------------------------------------------------------------------------- mask sweeps


def sweep_section(sweep: dict, name: str) -> Matrix | None:
    """mIoU of the masks by power and threshold, at the band and the source of the best setting;
    None without settings."""
    table = sweep["sweep"]["table"]
    if not table:
        return None
    best = table[0]
    shown = [
        row for row in table if row["source"] == best["source"] and row["band"] == best["band"]
    ]
    powers, thresholds = (
        sorted({r["power"] for r in shown}),
        sorted({r["threshold"] for r in shown}),
    )
    at = {(r["power"], r["threshold"]): r["miou"] for r in shown}
    note = (
        f"mIoU in percent against {sweep['sweep']['against']}, uncertain pixels counted as "
        f"background; band {best['band']:g}, "
        f"source {best['source']}, those of the best of {len(table)} settings (power "
        f"{best['power']}, threshold "
        f"{best['threshold']:g}: {best['miou']:.1f})."
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
    found = [
        (path.stem, read_own(path, SWEPT))
        for path in sorted((Path(synthetic) / "sweeps").glob("*.json"))
    ]
    sections = [sweep_section(sweep, name) for name, sweep in found]
    return [s for s in sections if s is not None]
