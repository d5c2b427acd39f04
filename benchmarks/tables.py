"""Rewrite the result tables of README.md from benchmarks/results/: shapes.json (made by runs/shapes.sh) and
shapes_budget.json (outputs/shapes_budget/budget.json of train.py experiment=shapes_budget), site.json (runs/site.sh).

python benchmarks/tables.py            # rewrites README.md between its markers, draws docs/label_budget.png
python benchmarks/tables.py --check    # exit 1 if README.md does not hold the numbers of the files
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
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


def tables(summary: dict) -> str:
    """The markdown of the main table and, if there are any, of the ablations."""
    domains = list(summary["synthetic_only"])
    rows = [["trained on", "real images from", "supervision", *(f"mIoU on {d}" for d in domains)]]
    rows.append(["synthetic only", "-", "A", *(cell(summary["synthetic_only"][d]) for d in domains)])
    parts = [(summary["shots_from"], summary)]
    parts += [(k.removeprefix("shots_from_"), v) for k, v in summary.items() if k.startswith("shots_from_")]
    for origin, part in parts:
        for k in part["real_only"]:
            arms = (("finetuned", f"synthetic, then {k} real", "A"), ("real_only", f"{k} real only", "real"))
            for arm, name, supervision in arms:
                if k in part[arm]:
                    rows.append([name, origin, supervision, *(cell(part[arm][k][d]) for d in domains)])
    lines = [table(rows), "", f"Seeds {summary['seeds']}. Mask mIoU on noised real test scenes: {cell(summary['mask_miou'])}."]
    if "mask_agreement" in summary:
        lines[-1] += f" Agreement of the synthetic masks with the all-real segmenter: {cell(summary['mask_agreement'])}."
    if "ablations" in summary:
        shipped = {**summary["synthetic_only"], **{k: summary.get(k) for k in ("mask_miou", "mask_agreement")}}
        rows = [["synthetic only, with", "mask mIoU", "mask agreement", *(f"mIoU on {d}" for d in domains)]]
        rows += [
            [name, cell(v.get("mask_miou")), cell(v.get("mask_agreement")), *(cell(v[d]) for d in domains)]
            for name, v in {"as shipped": shipped, **summary["ablations"]}.items()
        ]
        lines += ["", table(rows)]
    return "\n".join(lines)


def budget_tables(study: dict) -> str:
    """The markdown of a label-budget study: mIoU of each arm by the number of real images, and the images it skips."""
    arms, rows = study["arms"], [["scored on, real images from", "k real images", *study["labels"].values()]]
    for domain, size in study["domains"].items():
        for k in study["arms"]["finetune"]:
            shown = f"all {size}" if k == "all" else k
            rows.append([domain, shown, *(cell(arms[a].get(k, {}).get(domain)) for a in study["labels"])])
    skipped = [["real images skipped, against real only", "k", *study["domains"]]]
    for arm, controls in study["skipped"].items():
        for k in study["arms"][arm]:
            found = [_skipped(controls["real"][d].get(str(n) if k == "all" else k)) for d, n in study["domains"].items()]
            skipped.append([study["labels"][arm], k, *found])
    return f"{table(rows)}\n\n{table(skipped)}"


def _skipped(found: dict | None) -> str:
    if found is None:
        return "-"
    if found["skipped"] is None:
        return f"at least {found['at_least']}"
    return f"{found['skipped']:.0f}".replace("-", "−")


def site_table(results: dict) -> str:
    """The markdown of the example site: mIoU of each arm, and how much of the gap between synthetic images alone and all
    labels it closes."""
    arms = {name: (arm["labels"], list(arm["miou"].values())) for name, arm in results["arms"].items()}
    low, high = (mean(arms[name][1]) for name in ("synthetic only", "all labels only"))
    rows = [["trained on", "labels", f"mIoU on {results['site']}", "of the gap"]]
    for name, (labels, found) in arms.items():
        rows.append([name, labels, cell(found), f"{100 * (mean(found) - low) / (high - low):.0f} %".replace("-", "−")])
    return table(rows)


def draw(study: dict, path: Path) -> None:
    """mIoU against the number of real images, a panel for each domain, as a picture for the README."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (domain, size) in zip(
        figure.subplots(1, len(study["domains"]), sharey=True), study["domains"].items(), strict=True
    ):
        curves = [c for c in study["curves"] if c["domain"] == domain]
        ticks = sorted({k for c in curves for k in c["k"]})
        for curve, marker, colour in zip(curves, "os^D", COLOURS, strict=False):
            x = [ticks.index(k) for k in curve["k"]]
            axes.errorbar(
                x, curve["mean"], [sd or 0 for sd in curve["sd"]], label=curve["label"], marker=marker, color=colour, capsize=3
            )
        axes.set_xticks(range(len(ticks)), [f"all ({k})" if k == size else str(k) for k in ticks])
        axes.set(title=domain, xlabel="real images with hand-made masks")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mIoU on test (%)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def between(text: str, name: str, content: str) -> str:
    begin, end = BEGIN.format(name), END.format(name)
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main() -> int:
    results, readme = ROOT / "benchmarks" / "results", ROOT / "README.md"
    study = json.loads((results / "shapes_budget.json").read_text())
    text = readme.read_text()
    new = between(text, "results", tables(json.loads((results / "shapes.json").read_text())))
    new = between(new, "label budget", budget_tables(study))
    new = between(new, "site", site_table(json.loads((results / "site.json").read_text())))
    if "--check" in sys.argv:
        return int(new != text)
    readme.write_text(new)
    draw(study, ROOT / "docs" / "label_budget.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
