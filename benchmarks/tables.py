"""Rewrite the result tables of README.md and docs/ from the files of benchmarks/results/.

- README.md and docs/results.md, the present embedded world: embedded_masks.json (of
  benchmarks.embedded_masks), presence.json (of benchmarks.presence), demo.json (of runs/demo.sh)
- docs/first-world.md, the first one: first_world_shapes.json (of runs/shapes.sh),
  first_world_budget.json (of train.py experiment=shapes_budget), first_world_site.json (of
  runs/site.sh)

python -m benchmarks.tables    # rewrites the pages between their markers, draws the curve
python -m benchmarks.tables --check    # exit 1 if a page does not hold the numbers of the files
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

from dd.evaluation.savings import bounds_text
from dd.evaluation.statistics import Score, holm, interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "first-world.md"
GENERATORS = {"embedded": "UNet", "embedded_mmdit": "MM-DiT"}
CHAINS = {"paper": "plain", "Otsu": "plain, Otsu's threshold", "refined": "refined (the default)"}
WORDS = {
    "while drawing": "class prompt",
    "after": "class prompt",
    "full_prompt_appended": "appended words",
    "full_prompt_caption": "caption's own words",
}
# Of all rows with synthetic images but one. B: masks and rates were chosen on labelled tune scenes.
SUPERVISION = "B"
ALPHA = 0.05  # of p-values after Holm
COMPARED = {  # column of the differences: (arm, the arm that it is compared with)
    "fine-tuned less real only": ("finetune", "real"),
    "mixed less real only": ("mixed", "real"),
    "mixed less fine-tuned": ("mixed", "finetune"),
    "fine-tuned less k = 0": ("finetune", "finetune"),
    "mixed less k = 0": ("mixed", "mixed"),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind readers too
BEGIN, END = "<!-- {}: made by benchmarks/tables.py -->", "<!-- /{} -->"


def cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    if isinstance(value, list):
        return f"{mean(value):.1f} ± {stdev(value):.1f}"
    return f"{value:.1f}"


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def of_seeds(values, seeds) -> dict:
    """{seed: Score} of a list of mIoUs, in the order of ``seeds``, or of {seed: mIoU}."""
    pairs = values.items() if isinstance(values, dict) else zip(seeds, values, strict=True)
    return {str(seed): Score(value) for seed, value in pairs}


def paired(rows: dict) -> dict[object, str]:
    """{name: mean difference and interval in words} of {name: (scores, scores of the other)}.

    A dagger marks what is still shown after Holm's correction for all of ``rows``.
    """
    found = {name: interval(*both) for name, both in rows.items()}
    adjusted = holm({name: at.p for name, at in found.items() if at.p is not None})
    most = max((at.seeds for at in found.values()), default=0)
    words = {}
    for name, at in found.items():
        words[name] = difference(vars(at) | {"p_holm": adjusted.get(name)})
        if at.seeds < most:
            words[name] += f" ({at.seeds} seed{'s' * (at.seeds > 1)})"
    return words


def difference(row: dict) -> str:
    """``+2.7 [−0.9, 6.4]`` of an interval; a dagger where its p-value after Holm is small."""
    text = f"{row['value']:+.1f}"
    if row["low"] is not None:
        text += f" [{row['low']:.1f}, {row['high']:.1f}]"
    mark = " †" if row["p_holm"] is not None and row["p_holm"] < ALPHA else ""
    return text.replace("-0.0", "0.0").replace("-", "−") + mark


def tables(summary: dict) -> str:
    """The markdown of the main table and, if there are any, of the ablations."""
    domains, seeds = list(summary["synthetic_only"]), summary["seeds"]
    parts = [(summary["shots_from"], summary)]
    parts += [
        (k.removeprefix("shots_from_"), v)
        for k, v in summary.items()
        if k.startswith("shots_from_")
    ]
    both = ("finetuned", "real_only")
    pairs = {
        (origin, k, d): tuple(of_seeds(part[arm][k][d], seeds) for arm in both)
        for origin, part in parts
        for k in part["real_only"]
        for d in domains
        if k in part["finetuned"]
    }
    less = paired(pairs)
    rows = [["trained on", "real images from", "supervision", *(f"mIoU on {d}" for d in domains)]]
    rows[0] += [f"less real only, on {d}" for d in domains]
    nothing = ["-"] * len(domains)
    alone = [cell(summary["synthetic_only"][d]) for d in domains]
    rows.append(["synthetic only", "-", SUPERVISION, *alone, *nothing])
    for row in without_labels(summary):
        mious = [cell([run["miou"][d] for run in row["runs"]]) for d in domains]
        rows.append(
            ["synthetic only, no label chose anything", "-", row["supervision"], *mious, *nothing]
        )
    for origin, part in parts:
        for k in part["real_only"]:
            gains = [less.get((origin, k, d), "-") for d in domains]
            for arm, name, supervision, last in (
                ("finetuned", f"synthetic, then {k} real", SUPERVISION, gains),
                ("real_only", f"{k} real only", "real", nothing),
            ):
                if k in part[arm]:
                    mious = [cell(part[arm][k][d]) for d in domains]
                    rows.append([name, origin, supervision, *mious, *last])
    lines = [
        table(rows),
        "",
        f"Seeds {summary['seeds']}. Mask mIoU on noised real test scenes: "
        f"{cell(summary['mask_miou'])}.",
    ]
    if "mask_agreement" in summary:
        lines[-1] += (
            " Agreement of the synthetic masks with the all-real segmenter: "
            f"{cell(summary['mask_agreement'])}."
        )
    if "ablations" in summary:
        lines += ["", table(ablations(summary, domains))]
    return "\n".join(lines)


def without_labels(summary: dict) -> list[dict]:
    """Recipes of synthetic images alone for which no real label chose anything."""
    found = summary.get("recipes", ())
    return [r for r in found if (r["arm"], r["supervision"]) == ("synthetic_only", "A")]


def ablations(summary: dict, domains: list[str]) -> list[list[str]]:
    """Rows of what is switched off or set otherwise, paired over seeds with the run as shipped."""
    seeds, shipped = summary["seeds"], summary["synthetic_only"]
    own = {d: of_seeds(shipped[d], seeds) for d in domains}
    pairs = {
        (name, d): (of_seeds(found[d], seeds), own[d])
        for name, found in summary["ablations"].items()
        for d in domains
    }
    less = paired(pairs)
    masks = ("mask_miou", "mask_agreement")
    rows = [["synthetic only, with", "mask mIoU", "mask agreement"]]
    rows[0] += [f"mIoU on {d}" for d in domains]
    rows[0] += [f"less as shipped, on {d}" for d in domains]
    for name, found in {"as shipped": {**summary, **shipped}, **summary["ablations"]}.items():
        row = [name, *(cell(found.get(m)) for m in masks), *(cell(found[d]) for d in domains)]
        rows.append([*row, *(less.get((name, d), "-") for d in domains)])
    return rows


def budget_tables(study: dict) -> str:
    """The markdown of a label-budget study: mIoU of each arm by the number of real images, the
    differences of the arms, and the images that are skipped."""
    arms, labels = study["arms"], study["labels"]
    rows = [["scored on, real images from", "k real images", *labels.values()]]
    names = [(d, k) for d in study["domains"] for k in arms["finetune"]]
    for domain, k in names:
        shown = f"all {study['domains'][domain]}" if k == "all" else k
        rows.append([domain, shown, *(cell(arms[a].get(k, {}).get(domain)) for a in labels)])
    there = {(r["domain"], r["k"], r["arm"], r["against"]): r for r in study["differences"]}
    gains = [["scored on, real images from", "k", *COMPARED]]
    for domain, k in names:
        images = study["domains"][domain] if k == "all" else int(k)
        found = [there.get((domain, images, *pair)) for pair in COMPARED.values()]
        cells = ["-" if row is None else difference(row) for row in found]
        if images == 0 and found[0]:
            cells[0] += f" (real: {found[0]['against_k']})"
        gains.append([domain, k, *cells])
    skips = [["real images skipped, against real only", "k", *study["domains"]]]
    for arm, controls in study["skipped"].items():
        for k in arms[arm]:
            sizes = {d: str(n) if k == "all" else k for d, n in study["domains"].items()}
            cells = [skip(controls["real"][d].get(n)) for d, n in sizes.items()]
            skips.append([labels[arm], k, *cells])
    return "\n\n".join(map(table, (rows, gains, skips)))


def skip(found: dict | None) -> str:
    """``57 [50, 64] (55, 57, 61)``: the median, or that nothing is shown, the interval over seeds
    where each was read exactly, and each seed."""
    if found is None:
        return "-"
    each = ", ".join(bounds_text(run["low"], run["high"]) for run in found["runs"])
    text = bounds_text(**found["median"]) if found["shown"] else "not shown"
    if found["shown"] and found["interval"]:
        ends = found["interval"]["low"], found["interval"]["high"]
        if text.startswith("costs"):
            ends = -ends[1], -ends[0]
        text += f" [{ends[0]:.0f}, {ends[1]:.0f}]".replace("-", "−")
    return f"{text} ({each})"


def site_table(results: dict) -> str:
    """The markdown of the example site: mIoU of each arm, paired with synthetic images alone, and
    how much of the gap between these and all labels it closes, seed by seed."""
    arms = results["arms"]
    first, last = "synthetic only", "all labels only"
    low, high = arms[first]["miou"], arms[last]["miou"]
    scores = {name: of_seeds(arm["miou"], None) for name, arm in arms.items()}
    less = paired({name: (scores[name], scores[first]) for name in arms if name != first})
    rows = [["trained on", "labels", f"mIoU on {results['site']}"]]
    rows[0] += [f"less {first}", "of the gap, %"]
    for name, arm in arms.items():
        closed = {s: Score(100 * (m - low[s]) / (high[s] - low[s])) for s, m in arm["miou"].items()}
        share = interval(closed)
        gap = f"{share.value:.0f}"
        if share.low is not None and name not in (first, last):
            gap += f" [{share.low:.0f}, {share.high:.0f}]"
        mious = cell(list(arm["miou"].values()))
        rows.append([name, arm["labels"], mious, less.get(name, "-"), gap.replace("-", "−")])
    return table(rows)


def draw(study: dict, path: Path) -> None:
    """mIoU against the number of real images, a panel for each domain, as a picture for the
    page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (domain, size) in zip(
        figure.subplots(1, len(study["domains"]), sharey=True),
        study["domains"].items(),
        strict=True,
    ):
        curves = [c for c in study["curves"] if c["domain"] == domain]
        ticks = sorted({k for c in curves for k in c["k"]})
        for curve, marker, colour in zip(curves, "os^D", COLOURS, strict=False):
            x = [ticks.index(k) for k in curve["k"]]
            axes.errorbar(
                x,
                curve["mean"],
                [sd or 0 for sd in curve["sd"]],
                label=curve["label"],
                marker=marker,
                color=colour,
                capsize=3,
            )
        axes.set_xticks(range(len(ticks)), [f"all ({k})" if k == size else str(k) for k in ticks])
        axes.set(title=domain, xlabel="real images with hand-made masks")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mIoU on test (%)")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        frameon=False,
        loc="outside lower center",
        ncols=4,
    )
    figure.savefig(path, dpi=110)


def ends(at: list[float], sign: str = "") -> str:
    """``35.6 [32.7, 38.5]`` of a value and its interval."""
    value, low, high = at
    return f"{value:{sign}.1f} [{low:.1f}, {high:.1f}]".replace("-0.0", "0.0").replace("-", "−")


def mask_rows(found: list[dict], whole: bool) -> list[list[str]]:
    """Of each chain, choice of words and power both generators' mask mIoU, and what it gains on
    power 0; not ``whole``: of the class prompt while drawing alone."""
    rows: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in found:
        rows.setdefault((row["chain"], row["read"], row["power"]), {})[row["generator"]] = row
    head = ["masks", *(["words", "read"] if whole else [])]
    for name in GENERATORS.values():
        head += [name, "on power 0"]
    body = []
    for (chain, read, power), each in rows.items():
        if not whole and (read != "while drawing" or chain == "Otsu"):
            continue
        line = [CHAINS[chain] + ("" if power == "-" else f", power {power}")]
        if (chain, power) == ("paper", "4"):
            line[0] += " (the paper's)"
        if whole:
            line += [WORDS[read], "after drawing" if read == "after" else "while drawing"]
        for name in GENERATORS:
            row = each[name]
            line.append(ends([row["miou"], *row["interval"]]))
            # a row against itself, and one whose words or chain have no power 0 beside it
            gained = row.get("less_power_0") if power != "0" else None
            line.append(ends(gained, "+") if gained else "-")
        body.append(line)
    return [head, *body]


def presence_rows(found: list[dict]) -> list[list[str]]:
    """How well a signal tells the classes that a scene shows, and what the masks gain."""
    by_name = {row["generator"]: row for row in found}
    head = ["", *(GENERATORS[name] for name in by_name)]
    body = []
    for signal in next(iter(by_name.values()))["area"]:
        areas = [row["area"][signal] for row in by_name.values()]
        body.append([signal, *("{:.2f} [{:.2f}, {:.2f}]".format(*at) for at in areas)])
    for name in ("precision", "recall"):
        shares = (f"{100 * row[name]:.0f} %" for row in by_name.values())
        body.append([f"{name} of *not there* at evidence ≤ 0", *shares])
    masks = {n: {(m["asked"], m["chain"]): m for m in r["masks"]} for n, r in by_name.items()}
    for key in next(iter(masks.values())):
        cells = [f"{own[key]['miou']:.1f}" for own in masks.values()]
        if key[1] != "refined":
            gains = [ends(own[key]["less_refined"], "+") for own in masks.values()]
            cells = [f"{c}, {g}" for c, g in zip(cells, gains, strict=True)]
        body.append([f"mask mIoU, {key[0]}: {key[1]}", *cells])
    return [head, *body]


def demo_rows(summary: dict) -> list[list[str]]:
    """mIoU of the demo's three trainings, of one seed."""
    domains = list(summary["synthetic_only"])
    arms = {"synthetic only": summary["synthetic_only"]}
    for k in summary["finetuned"]:
        arms[f"synthetic, then {k} real"] = summary["finetuned"][k]
        arms[f"{k} real only"] = summary["real_only"][k]
    head = ["trained on", *(f"mIoU on {d}" for d in domains)]
    return [head, *([name, *(cell(found[d]) for d in domains)] for name, found in arms.items())]


def between(text: str, name: str, content: str) -> str:
    begin, end = BEGIN.format(name), END.format(name)
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def contents() -> dict[Path, dict[str, str]]:
    """{page: {marker: what stands there}}."""
    masks = result("embedded_masks")["rows"]
    return {
        ROOT / "README.md": {"masks": table(mask_rows(masks, whole=False))},
        ROOT / "docs" / "results.md": {
            "masks": table(mask_rows(masks, whole=True)),
            "presence": table(presence_rows(result("presence")["rows"])),
            "demo": table(demo_rows(result("demo"))),
        },
        PAGE: {
            "results": tables(result("first_world_shapes")),
            "label budget": budget_tables(result("first_world_budget")),
            "site": site_table(result("first_world_site")),
        },
    }


def main() -> int:
    wrong = 0
    for page, parts in contents().items():
        text = new = page.read_text()
        for name, content in parts.items():
            new = between(new, name, content)
        wrong += new != text
        if "--check" not in sys.argv:
            page.write_text(new)
    if "--check" in sys.argv:
        return int(wrong > 0)
    draw(result("first_world_budget"), PAGE.parent / "first-world-label-budget.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
