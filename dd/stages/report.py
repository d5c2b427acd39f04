"""Stage: gather finished runs into summary.json and one self-contained page that compares them."""

from collections import Counter
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from safetensors.numpy import load_file

from dd.datasets import read_image, read_mask
from dd.provenance import read_json, write_json
from dd.report import page, pictures
from dd.report.published import reproduction
from dd.samples import read_plan, read_records
from dd.taxonomy import Taxonomy, voc_palette

ARMS = {
    "synthetic_only": "synthetic only",
    "self_training": "synthetic, self-training",
    "finetuned": "synthetic, then {k} real",
    "mixed": "synthetic and {k} real",
    "real_only": "{k} real only",
}


def arm_of(trained_on: dict) -> str:
    """A key of ARMS: what a run was trained on, in which order."""
    if trained_on["source"] == "mixed":
        return "mixed"
    if trained_on["source"] == "synthetic":
        return "self_training" if "teacher" in trained_on["mask_settings"] else "synthetic_only"
    return "finetuned" if trained_on["after"] else "real_only"


def collect(folders) -> list[dict]:
    """One entry per finished run: folder, arm, shots, seed, where the shots came from, and its metrics by eval folder."""
    entries = []
    for folder in map(Path, folders):
        if not (folder / "run.json").is_file() or "trained_on" not in (run := read_json(folder / "run.json")):
            continue
        trained_on = run["trained_on"]
        metrics = {p.parent.name: read_json(p) for p in sorted(folder.glob("eval/*/metrics.json"))}
        augmented = {p.parts[-3]: read_json(p) for p in sorted(folder.glob("eval/*/ms_flip/metrics.json"))}
        audits = {p.parent.name: read_json(p) for p in sorted(folder.glob("audit/*/*/metrics.json"))}
        ablation = folder.parts[folder.parts.index("ablation") + 1] if "ablation" in folder.parts else None
        entries.append(
            {"folder": folder, "arm": arm_of(trained_on), "shots": trained_on["shots"] and str(trained_on["shots"]),
             "shots_from": trained_on.get("real", trained_on).get("root") if trained_on["shots"] else None,
             "seed": trained_on["seed"], "segmenter": segmenter_name(run["segmenter"]), "ablation": ablation,
             "supervision": run["supervision"], "metrics": metrics, "augmented": augmented, "audits": audits,
             "seconds": run["seconds"]}
        )  # fmt: skip
    return sorted(entries, key=lambda e: e["seed"])


def segmenter_name(settings: dict) -> str:
    """A run's segmenter as tables name it: "DeepLabV3 R101", "Mask2Former R50", "SegFormer B0"."""
    kind = settings["_target_"].rsplit(".", 1)[1]
    if kind == "Mask2Former":
        return "Mask2Former R50"
    if "depth" in settings:
        return f"{kind} R{settings['depth']}"
    parts = [str(settings[k]).upper() if k == "size" else settings[k] for k in ("size", "config") if k in settings]
    return " ".join([kind, *parts])


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


def report(folder, runs, tests: dict, synthetic, taxonomy: Taxonomy, domains: list[str], title: str) -> Path:
    """Write ``folder/summary.json`` and ``folder/report.html`` about the finished ``runs`` (folders); returns the page.

    ``tests``: the test images of each domain that is at hand, for the galleries.

    ValueError if none of them is finished and evaluated.
    """
    folder, synthetic = Path(folder), Path(synthetic)
    entries = [e for e in collect(runs) if e["metrics"]]
    if not entries:
        raise ValueError(f"report: none of {[str(r) for r in runs][:5]} is a finished run with an evaluation")
    main = Counter(e["segmenter"] for e in entries).most_common(1)[0][0]
    alike = [e for e in entries if e["segmenter"] == main]  # curves and class tables are about one segmenter
    summary = summarise(alike, folder, domains, synthetic)
    write_json(folder / "summary.json", summary)
    sections = [
        _headline(entries, domains),
        *(section for d in domains for section in reproduction(d, _measured(entries, d))),
        *_learning_curves(summary, domains),
        *_class_tables(alike, domains, taxonomy),
        *_ablation_table(summary, domains),
        *_synthetic_gallery(synthetic, taxonomy),
        *_real_galleries(alike, tests, taxonomy),
    ]
    facts = {
        "Runs": str(len(entries)),
        "Seeds": ", ".join(map(str, summary["seeds"])),
        "Mask mIoU on noised real test scenes": "–" if summary["mask_miou"] is None else f"{summary['mask_miou']:.1f}",
        "Seconds per stage": ", ".join(f"{k} {v:.0f}" for k, v in summary["seconds"].items()),
    }
    subtitle = "Masks read from a text-to-image model's attention, the segmenter trained on them, and what real labels add."
    return page.write(folder / "report.html", page.render(title, subtitle, sections, facts))


def _headline(entries, domains):
    """One row per (segmenter, arm, shots, origin of the shots), several seeds as mean and standard deviation."""
    groups = {}
    for e in (e for e in entries if not e["ablation"]):
        shots = -1 if e["shots"] is None else 10**9 if e["shots"] == "all" else int(e["shots"])
        key = (e["segmenter"], e["shots_from"] or "", shots, list(ARMS).index(e["arm"]))
        groups.setdefault(key, []).append(e)
    several, rows = len({key[0] for key in groups}) > 1, []
    for (segmenter, origin, _, _), found in sorted(groups.items()):
        name = ARMS[found[0]["arm"]].format(k=found[0]["shots"])
        cells = (_cell(_values(found, d)) for d in domains)
        rows.append([f"{segmenter}: {name}" if several else name, origin or "–", found[0]["supervision"], *cells])
    columns = ["trained on", "real images from", "supervision", *(f"mIoU on {d}" for d in domains)]
    note = (
        "mIoU in percent on the held-out test split, single scale, background counted. Supervision: what made the synthetic "
        "images (A: image-text pairs only, B: a few real masks), real: no synthetic image, or whole real splits."
    )
    seeds = sorted({e["seed"] for e in entries})
    if len(seeds) > 1:
        note += f" Mean ± standard deviation over seeds {seeds}."
    return page.Table("Results", columns, rows, note=note, bars=tuple(columns[3:]))


def _measured(entries, data) -> list[dict]:
    """Results of full data (no shots) as the reproduction table takes them."""
    arms = {"synthetic_only": "synthetic", "real_only": "real"}
    return [
        {"segmenter": e["segmenter"], "arm": arms.get(e["arm"], e["arm"]), "tta": tta, "seed": e["seed"],
         "miou": results[data]["miou"], "supervision": e["supervision"]}
        for e in entries
        for tta, results in ((False, e["metrics"]), (True, e["augmented"]))
        if not e["ablation"] and data in results and e["shots"] in (None, "all")
    ]  # fmt: skip


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


def _real_galleries(entries, tests, taxonomy, count=8):
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
            image, truth = data[i]
            shown = [image, pictures.colour_mask(truth, palette)]
            shown += [pictures.colour_mask(read_mask(f / f"{name}.png"), palette) for f in folders.values()]
            rows.append((name, [pictures.png_data_uri(p) for p in shown]))
        columns = ["image", "truth", *folders]
        yield page.Gallery(f"Predictions on {domain}", columns, rows, "Held-out test images.", legend)
