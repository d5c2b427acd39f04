"""Rewrite the result tables of README.md from benchmarks/results/shapes.json (made by runs/shapes.sh).

python benchmarks/tables.py            # rewrites README.md between its markers
python benchmarks/tables.py --check    # exit 1 if README.md does not hold the numbers of the file
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: made by benchmarks/tables.py -->", "<!-- /results -->"


def cell(value) -> str:
    if value is None:
        return "-"
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


def main() -> int:
    summary = json.loads((ROOT / "benchmarks" / "results" / "shapes.json").read_text())
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n{tables(summary)}\n{END}{after}"
    if "--check" in sys.argv:
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
