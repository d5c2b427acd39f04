"""Sections of the page that compares runs: results, classes, confusions, pictures."""

from statistics import mean

import numpy as np

from dd.datasets import SegmentationFolder, read_image, read_mask, stored_heat, synthetic_image
from dd.provenance import read_json
from dd.report import charts, pictures
from dd.report.compare import image_miou
from dd.report.explore import Matrix
from dd.report.page import Chart, Gallery, Table
from dd.report.summary import ARMS, cell, values
from dd.samples import read_plan
from dd.taxonomy import voc_palette

LARGEST = 30  # classes of a confusion matrix that is shown whole
BARS = 4  # arms of the chart of classes


def _place(entry) -> tuple:
    """Where an arm stands among others: origin of its real images, their number, order of ARMS."""
    shots = -1 if entry["shots"] is None else 10**9 if entry["shots"] == "all" else int(entry["shots"])
    return entry["shots_from"] or "", shots, list(ARMS).index(entry["arm"])


def headline(entries, domains):
    """One row per (segmenter, arm, shots, origin of the shots), several seeds as mean and standard deviation."""
    groups = {}
    for e in (e for e in entries if not e["ablation"]):
        groups.setdefault((e["segmenter"], *_place(e)), []).append(e)
    several, rows = len({key[0] for key in groups}) > 1, []
    for (segmenter, origin, _, _), found in sorted(groups.items()):
        name = ARMS[found[0]["arm"]].format(k=found[0]["shots"])
        cells = (cell(values(found, d)) for d in domains)
        rows.append([f"{segmenter}: {name}" if several else name, origin or "–", found[0]["supervision"], *cells])
    columns = ["trained on", "real images from", "supervision", *(f"mIoU on {d}" for d in domains)]
    note = (
        "mIoU in percent on the held-out test split, single scale, background counted. Supervision: what made the synthetic "
        "images (A: no real label, not for a setting either; B: real labels chose settings, or a few were trained on), real: "
        "no synthetic image, or whole real splits."
    )
    seeds = sorted({e["seed"] for e in entries})
    if len(seeds) > 1:
        note += f" Mean ± standard deviation over seeds {seeds}."
    return Table("Results", columns, rows, note=note, bars=tuple(columns[3:]))


def measured(entries, data) -> list[dict]:
    """Results of full data (no shots) as the reproduction table takes them."""
    arms = {"synthetic_only": "synthetic", "real_only": "real"}
    return [
        {"segmenter": e["segmenter"], "arm": arms.get(e["arm"], e["arm"]), "tta": tta, "seed": e["seed"],
         "miou": results[data]["miou"], "supervision": e["supervision"]}
        for e in entries
        for tta, results in ((False, e["metrics"]), (True, e["augmented"]))
        if not e["ablation"] and data in results and e["shots"] in (None, "all")
    ]  # fmt: skip


def learning_curves(summary, domains):
    for origin, part in [(summary["shots_from"], summary)] + [
        (k.removeprefix("shots_from_"), v) for k, v in summary.items() if k.startswith("shots_from_")
    ]:
        shots = [k for k in part["real_only"] if k in part["finetuned"]]
        if len(shots) < 2:
            continue
        series = {}
        for arm, name in (("finetuned", "synthetic, then real"), ("real_only", "real only")):
            cells = [cell(part[arm][k][origin]) for k in shots]
            pairs = [c if isinstance(c, tuple) else (c, 0.0) for c in cells]
            series[name] = (shots, [m for m, _ in pairs], [s for _, s in pairs])
        svg = charts.line_chart_svg(series, f"real images from {origin}", f"mIoU on {origin}")
        yield Chart(f"Label budget: {origin}", svg, "Same total steps in both arms; the band is one standard deviation.")


def class_tables(entries, domains):
    """IoU of each class: a table of all arms, and bars of a few."""
    arms, bar_charts = {}, []
    for e in sorted(entries, key=_place):
        if not e["ablation"]:
            origin = f" ({e['shots_from']})" if e["shots_from"] not in (None, domains[0]) else ""
            arms.setdefault(ARMS[e["arm"]].format(k=e["shots"]) + origin, []).append(e)
    for domain in domains:
        columns, rows = list(arms), []
        for name in _classes(entries, domain):
            cells = []
            for group in arms.values():
                found = [e["metrics"][domain]["iou"][name] for e in group if domain in e["metrics"]]
                found = [v for v in found if v is not None]
                cells.append(mean(found) if found else None)
            rows.append([name, *cells])
        shown = [i for i in range(len(columns)) if any(row[i + 1] is not None for row in rows)][:BARS]
        bars = {columns[i]: [(row[0], row[i + 1], None) for row in rows] for i in shown}
        if shown:
            yield Table(f"IoU per class on {domain}", ["class", *columns], rows, note="Percent; mean over seeds.")
            note = f"The first {BARS} of the table's columns." if len(columns) > BARS else ""
            bar_charts.append(Chart(f"IoU bars on {domain}", charts.bar_chart_svg(bars, f"IoU on {domain} (%)"), note))
    yield from bar_charts  # neighbouring charts share a row


def ablation_table(summary, domains):
    if "ablations" in summary:
        shipped = {**summary["synthetic_only"], **{k: summary.get(k) for k in ("mask_miou", "mask_agreement")}}
        rows = [
            [name, cell(v.get("mask_miou")), cell(v.get("mask_agreement")), *(cell(v[d]) for d in domains)]
            for name, v in {"as shipped": shipped, **summary["ablations"]}.items()
        ]
        columns = ["synthetic only, with", "mask mIoU", "mask agreement", *(f"mIoU on {d}" for d in domains)]
        note = (
            "The masks on noised real test scenes (uncertain pixels as background), their agreement with segmenters of all "
            "real images, and the segmenter trained on them."
        )
        yield Table("Ablations", columns, rows, note=note)


def synthetic_gallery(synthetic, taxonomy, count=8):
    if not (synthetic / "SegmentationClass" / "masks.json").is_file():
        return
    palette, rows = voc_palette(), []
    power = read_json(synthetic / "SegmentationClass" / "masks.json")["identity"]["settings"]["power"]
    for sample in read_plan(synthetic)[:count]:
        image = read_image(synthetic_image(synthetic, sample.id))
        mask = read_mask(synthetic / "SegmentationClass" / f"{sample.id}.png")
        maps = stored_heat(synthetic, sample.id)["class_prompt"].astype(np.float32)
        photos = [image, pictures.heat(image, maps[0, power])]
        drawn = [pictures.colour_mask(mask, palette), pictures.overlay(image, mask, palette)]
        shown = [pictures.small_data_uri(p) for p in photos] + [pictures.small_data_uri(p, photo=False) for p in drawn]
        rows.append((sample.prompt, shown))
    columns = ["image", "heat of the first class", "mask", "overlay"]
    legend = pictures.legend(taxonomy.all_names, palette, uncertain=True)
    yield Gallery("Synthetic images", columns, rows, "Made by the generator; no human label.", legend)


def real_galleries(entries, tests, taxonomy, count=8):
    palette = voc_palette()
    legend = pictures.legend(taxonomy.all_names, palette)
    chosen = {}
    for e in entries:
        if not e["ablation"] and e["shots_from"] in (None, next(iter(tests), None)):
            chosen.setdefault(ARMS[e["arm"]].format(k=e["shots"]), e["folder"])
    for domain, data in tests.items():
        folders = {
            n: f / "eval" / domain / "examples" for n, f in chosen.items() if (f / "eval" / domain / "examples").is_dir()
        }
        if not folders:
            continue
        rows = []
        for i, name in enumerate(data.ids[:count]):
            rows.append((name, _row(data, i, [f / f"{name}.png" for f in folders.values()], palette)))
        columns = ["image", "truth", *folders]
        yield Gallery(f"Predictions on {domain}", columns, rows, "Held-out test images.", legend)


def _classes(entries, domain) -> list[str]:
    return next((list(e["metrics"][domain]["iou"]) for e in entries if domain in e["metrics"]), [])


def best_run(entries, domain) -> dict | None:
    """The entry with the highest mIoU on ``domain``."""
    found = [e for e in entries if domain in e["metrics"]]
    return max(found, key=lambda e: e["metrics"][domain]["miou"], default=None)


def confusions(entry: dict, domain: str):
    """The confusion matrix of a run, each row in percent of the pixels of its class; its largest errors where it is large."""
    result = entry["metrics"][domain]
    names, counts = list(result["iou"]), np.array(result["confusion"], float)
    total = counts.sum(1, keepdims=True)
    share = np.divide(100 * counts, total, out=np.zeros_like(counts), where=total > 0)
    title, what = f"Confusions on {domain}", f"Run {entry['name']}"
    if len(names) <= LARGEST:
        rows = [row.tolist() if n else [None] * len(names) for row, n in zip(share, total[:, 0], strict=True)]
        note = f"{what}: percent of the pixels of each true class (row) by predicted class (column); rows add up to 100."
        yield Matrix(title, "true \\ predicted", names, names, rows, note, limits=(0, 100))
        return
    wrong = np.where(np.eye(len(names), dtype=bool), -1, share)
    order = np.argsort(-wrong, axis=None, kind="stable")[:25]
    rows = [[names[i], names[j], float(share[i, j])] for i, j in zip(*np.unravel_index(order, share.shape), strict=True)]
    note = f"{what}: the largest of {len(names)} x {len(names)} entries, in percent of the true class's pixels."
    yield Table(title, ["true class", "predicted as", "share of its pixels"], rows, note)


def _row(data: SegmentationFolder, index: int, predictions, palette) -> list[str]:
    """Pictures of one test image: itself, truth, predictions."""
    image, truth = data[index]
    masks = [truth, *map(read_mask, predictions)]
    drawn = [pictures.small_data_uri(pictures.colour_mask(m, palette), photo=False) for m in masks]
    return [pictures.small_data_uri(image), *drawn]


def extremes(entry: dict, domain: str, data: SegmentationFolder, names, count: int = 4):
    """The best and the worst predictions of a run by the mIoU of the image alone, of those whose prediction is stored."""
    images = entry["metrics"][domain].get("images")
    folder, palette = entry["folder"] / "eval" / domain / "examples", voc_palette()
    if not images or set(images["ids"]) != set(data.ids):
        return
    ranked = sorted(image_miou(images).items(), key=lambda pair: pair[1])
    ranked = [(i, v) for i, v in ranked if (folder / f"{i}.png").is_file()]
    count = min(count, len(ranked) // 2)
    for title, chosen in (("Worst", ranked[:count]), ("Best", ranked[::-1][:count])):
        rows = [(f"{i}: mIoU {v:.1f}", _row(data, data.ids.index(i), [folder / f"{i}.png"], palette)) for i, v in chosen]
        if rows:
            note = f"Run {entry['name']}; mIoU of the image alone, over the classes that occur in it."
            columns = ["image", "truth", "prediction"]
            yield Gallery(
                f"{title} predictions on {domain}", columns, rows, note, pictures.legend(names, palette, uncertain=True)
            )
