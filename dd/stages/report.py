"""Stage: gather finished runs into summary.json and one self-contained page that compares them."""

from pathlib import Path
from statistics import mean, stdev

import numpy as np
from safetensors.numpy import load_file

from dd.datasets import SegmentationFolder, read_image, read_mask
from dd.provenance import read_json, write_json
from dd.report import page, pictures
from dd.samples import read_plan, read_records
from dd.taxonomy import Taxonomy, voc_palette

ARMS = {"synthetic_only": "synthetic only", "finetuned": "synthetic, then {k} real", "real_only": "{k} real only"}


def arm_of(trained_on: dict) -> str:
    """``synthetic_only``, ``finetuned`` (synthetic, then real images) or ``real_only``."""
    if trained_on["source"] == "synthetic":
        return "synthetic_only"
    return "finetuned" if trained_on["after"] else "real_only"


def collect(folders) -> list[dict]:
    """One entry per finished run: folder, arm, shots, seed, where the shots came from, and its metrics by eval folder."""
    entries = []
    for folder in map(Path, folders):
        if not (folder / "run.json").is_file() or "trained_on" not in (run := read_json(folder / "run.json")):
            continue
        trained_on = run["trained_on"]
        metrics = {p.parent.name: read_json(p) for p in sorted(folder.glob("eval/*/metrics.json"))}
        audits = {p.parent.name: read_json(p) for p in sorted(folder.glob("audit/*/*/metrics.json"))}
        ablation = folder.parts[folder.parts.index("ablation") + 1] if "ablation" in folder.parts else None
        entries.append(
            {"folder": folder, "arm": arm_of(trained_on), "shots": trained_on["shots"] and str(trained_on["shots"]),
             "shots_from": trained_on["root"] if trained_on["source"] == "real" else None, "seed": trained_on["seed"],
             "ablation": ablation, "metrics": metrics, "audits": audits, "seconds": run["seconds"]}
        )  # fmt: skip
    return sorted(entries, key=lambda e: e["seed"])


def _values(entries, data: str) -> float | list[float] | None:
    """mIoU on ``data``: a number for one run, a list over seeds for several."""
    found = [e["metrics"][data]["miou"] for e in entries if data in e["metrics"]]
    return found[0] if len(found) == 1 else found or None


def _by_shots(entries, arm, shots_from, domains) -> dict:
    chosen = [e for e in entries if e["arm"] == arm and e["shots_from"] == shots_from and not e["ablation"]]
    order = sorted({e["shots"] for e in chosen}, key=lambda k: (k == "all", int(k) if k != "all" else 0))
    return {k: {d: _values([e for e in chosen if e["shots"] == k], d) for d in domains} for k in order}


def summarise(entries, folder: Path, domains: list[str], synthetic: Path) -> dict:
    """The content of summary.json; mIoU in percent, lists over seeds where several were run."""
    first, *others = domains
    plain = [e for e in entries if e["arm"] == "synthetic_only" and not e["ablation"]]
    summary = {
        "mask_miou": _probe(folder / f"probe_{first}_test.json"),
        "synthetic_only": {d: _values(plain, d) for d in domains},
        "finetuned": _by_shots(entries, "finetuned", first, domains),
        "real_only": _by_shots(entries, "real_only", first, domains),
        "shots_from": first,
    }
    for other in others:
        arms = {arm: _by_shots(entries, arm, other, domains) for arm in ("finetuned", "real_only")}
        if any(arms.values()):
            summary[f"shots_from_{other}"] = arms
    audits = [a["miou"] for e in entries for name, a in e["audits"].items() if name == "SegmentationClass"]
    if audits:
        summary["mask_agreement"] = audits[0] if len(audits) == 1 else audits
    ablations = {}
    for name in sorted({e["ablation"] for e in entries if e["ablation"]}):
        runs = [e for e in entries if e["ablation"] == name]
        ablations[name] = {d: _values(runs, d) for d in domains}
    raw = {d: _values(plain, f"{d}-raw") for d in domains}
    if any(v is not None for v in raw.values()):
        ablations["ema=off"] = raw
    if ablations:
        summary["ablations"] = ablations
    generation = sum(r["seconds"] for r in read_records(synthetic).values())
    train = {arm: sum(e["seconds"] for e in entries if e["arm"] == arm) for arm in ARMS}
    summary["seconds"] = {"generate": round(generation, 1), **{f"train_{k}": round(v, 1) for k, v in train.items()}}
    summary["seeds"] = sorted({e["seed"] for e in entries})
    return summary


def _probe(path: Path) -> float | None:
    return read_json(path)["miou"] if path.is_file() else None


def _cell(value):
    """A table cell: a number, or (mean, standard deviation) of a list."""
    if isinstance(value, list):
        return (mean(value), stdev(value))
    return value


def report(folder, runs, data_root, synthetic, taxonomy: Taxonomy, domains: list[str], title: str) -> Path:
    """Write ``folder/summary.json`` and ``folder/report.html`` about the finished ``runs`` (folders); returns the page.

    ValueError if none of them is finished and evaluated.
    """
    folder, synthetic = Path(folder), Path(synthetic)
    entries = [e for e in collect(runs) if e["metrics"]]
    if not entries:
        raise ValueError(f"report: none of {[str(r) for r in runs][:5]} is a finished run with an evaluation")
    summary = summarise(entries, folder, domains, synthetic)
    write_json(folder / "summary.json", summary)
    sections = [
        _headline(summary, domains),
        *_learning_curves(summary, domains),
        *_class_tables(entries, domains, taxonomy),
        *_ablation_table(summary, domains),
        *_synthetic_gallery(synthetic, taxonomy),
        *_real_galleries(entries, Path(data_root), domains, taxonomy),
    ]
    facts = {
        "Runs": str(len(entries)),
        "Seeds": ", ".join(map(str, summary["seeds"])),
        "Mask mIoU on noised real test scenes": "–" if summary["mask_miou"] is None else f"{summary['mask_miou']:.1f}",
        "Seconds per stage": ", ".join(f"{k} {v:.0f}" for k, v in summary["seconds"].items()),
    }
    subtitle = "Masks read from a text-to-image model's attention, the segmenter trained on them, and what real labels add."
    return page.write(folder / "report.html", page.render(title, subtitle, sections, facts))


def _arm_rows(summary) -> list[tuple[str, str, dict]]:
    rows = [(ARMS["synthetic_only"], "–", summary["synthetic_only"])]
    origins = [(summary["shots_from"], summary)]
    origins += [(k.removeprefix("shots_from_"), v) for k, v in summary.items() if k.startswith("shots_from_")]
    for origin, part in origins:
        for k in part["real_only"] | part["finetuned"]:
            rows += [(ARMS[a].format(k=k), origin, part[a][k]) for a in ("finetuned", "real_only") if k in part[a]]
    return rows


def _headline(summary, domains):
    rows = [[name, origin, *(_cell(values[d]) for d in domains)] for name, origin, values in _arm_rows(summary)]
    columns = ["trained on", "real images from", *(f"mIoU on {d}" for d in domains)]
    note = "mIoU in percent on the held-out test split, background counted. Controls have the same total number of steps."
    if len(summary["seeds"]) > 1:
        note += f" Mean ± standard deviation over seeds {summary['seeds']}."
    return page.Table("Results", columns, rows, note=note, bars=tuple(columns[2:]))


def _learning_curves(summary, domains):
    for origin, part in [(summary["shots_from"], summary)] + [
        (k.removeprefix("shots_from_"), v) for k, v in summary.items() if k.startswith("shots_from_")
    ]:
        shots = [k for k in part["real_only"] if k in part["finetuned"]]
        if len(shots) < 2:
            continue
        series = {}
        for arm, name in (("finetuned", "synthetic, then real"), ("real_only", "real only")):
            cells = [_cell(part[arm][k][origin]) for k in shots]
            pairs = [c if isinstance(c, tuple) else (c, 0.0) for c in cells]
            series[name] = (shots, [m for m, _ in pairs], [s for _, s in pairs])
        svg = pictures.line_chart_svg(series, f"real images from {origin}", f"mIoU on {origin}")
        yield page.Chart(f"Label budget: {origin}", svg, "Same total steps in both arms; the band is one standard deviation.")


def _class_tables(entries, domains, taxonomy):
    arms = {}
    for e in entries:
        if not e["ablation"]:
            origin = f" ({e['shots_from']})" if e["shots_from"] not in (None, domains[0]) else ""
            arms.setdefault(ARMS[e["arm"]].format(k=e["shots"]) + origin, []).append(e)
    for domain in domains:
        columns, rows = list(arms), []
        for name in taxonomy.all_names:
            cells = []
            for group in arms.values():
                found = [e["metrics"][domain]["iou"][name] for e in group if domain in e["metrics"]]
                found = [v for v in found if v is not None]
                cells.append(mean(found) if found else None)
            rows.append([name, *cells])
        yield page.Table(f"IoU per class on {domain}", ["class", *columns], rows, note="Percent; mean over seeds.")


def _ablation_table(summary, domains):
    if "ablations" in summary:
        rows = [["as shipped", *(_cell(summary["synthetic_only"][d]) for d in domains)]]
        rows += [[name, *(_cell(v[d]) for d in domains)] for name, v in summary["ablations"].items()]
        columns = ["synthetic only, with", *(f"mIoU on {d}" for d in domains)]
        yield page.Table("Ablations", columns, rows, note="The segmenter trained on the masks of each variant.")


def _synthetic_gallery(synthetic, taxonomy, count=8):
    if not (synthetic / "SegmentationClass" / "masks.json").is_file():
        return
    palette, rows = voc_palette(), []
    power = read_json(synthetic / "SegmentationClass" / "masks.json")["identity"]["settings"]["power"]
    for sample in read_plan(synthetic)[:count]:
        image = read_image(next((synthetic / "JPEGImages").glob(f"{sample.id}.*")))
        mask = read_mask(synthetic / "SegmentationClass" / f"{sample.id}.png")
        maps = load_file(synthetic / "heat" / f"{sample.id}.safetensors")["class_prompt"].astype(np.float32)
        shown = [image, pictures.heat(image, maps[0, power]), pictures.colour_mask(mask, palette)]
        shown.append(pictures.overlay(image, mask, palette))
        rows.append((sample.prompt, [pictures.png_data_uri(p) for p in shown]))
    columns = ["image", "heat of the first class", "mask", "overlay"]
    legend = pictures.legend(taxonomy.all_names, palette, uncertain=True)
    yield page.Gallery("Synthetic images", columns, rows, "Made by the generator; no human label.", legend)


def _real_galleries(entries, data_root, domains, taxonomy, count=8):
    palette = voc_palette()
    legend = pictures.legend(taxonomy.all_names, palette)
    chosen = {}
    for e in entries:
        if not e["ablation"] and e["shots_from"] in (None, domains[0]):
            chosen.setdefault(ARMS[e["arm"]].format(k=e["shots"]), e["folder"])
    for domain in domains:
        folders = {
            n: f / "eval" / domain / "examples" for n, f in chosen.items() if (f / "eval" / domain / "examples").is_dir()
        }
        if not folders or not (data_root / domain).is_dir():
            continue
        data, rows = SegmentationFolder(data_root / domain, "test", taxonomy), []
        for i, name in enumerate(data.ids[:count]):
            image, truth = data[i]
            shown = [image, pictures.colour_mask(truth, palette)]
            shown += [pictures.colour_mask(read_mask(f / f"{name}.png"), palette) for f in folders.values()]
            rows.append((name, [pictures.png_data_uri(p) for p in shown]))
        columns = ["image", "truth", *folders]
        yield page.Gallery(f"Predictions on {domain}", columns, rows, "Held-out test images.", legend)
