"""Sections of the page that compares runs: results, classes, confusions, pictures."""

from statistics import mean

import numpy as np

from dd.data.datasets import SegmentationFolder, read_image, read_mask, stored_heat, synthetic_image
from dd.evaluation.statistics import LEAST_IMAGES, LEAST_SEEDS
from dd.report import charts, pictures
from dd.report.compare import image_miou, number_of_runs, signed
from dd.report.explore import Matrix
from dd.report.page import Chart, Gallery, Table
from dd.report.recipes import ARMS
from dd.report.rows import number_of_images
from dd.report.summary import cell, images_of, values
from dd.store.provenance import read_own
from dd.store.samples import read_plan
from dd.store.schemas import DRAWN
from dd.taxonomy import voc_palette

LARGEST = 30  # classes of a confusion matrix that is shown whole
BARS = 4  # arms of the chart of classes


def headline(rows, domains):
    """One row per recipe; the main one of each arm first, the others named by what differs from
    it."""
    several, table = len({r.recipe.segmenter for r in rows}) > 1, []
    for row in rows:
        name = f"{row.recipe.segmenter}: {row.name}" if several else row.name
        keys = [(e["seed"], e["draw"]) for e in row.runs]
        cells = (cell(values(row.runs, d)) for d in domains)
        known = [
            row.supervision,
            number_of_runs(keys),
            row.recipe.steps,
            row.recipe.shots_from or "\u2013",
        ]
        table.append([name, *cells, *known])
    images = images_of(rows, domains)
    scored = [f"mIoU on {d}" + (f" ({images[d]:,} images)" if images[d] else "") for d in domains]
    columns = ["trained on", *scored, "supervision", "seeds", "steps", "real images from"]
    note = (
        "mIoU in percent on the held-out test split, single scale, background counted. "
        "Supervision: what made the synthetic "
        "images (A: no real label, not for a setting either; B: real labels chose settings, or a "
        "few were trained on), real: "
        "no synthetic image, or whole real splits. "
        "Steps: optimiser steps in total, those of the run before counted; a dash: it is not at "
        "hand."
    )
    if any(len(r.runs) > 1 for r in rows):
        note += (
            " Mean \u00b1 standard deviation over runs: how they spread, not how sure a "
            "difference is."
        )
    note += _unscored(rows, domains)
    few = [f"{d} has {n}" for d, n in images.items() if n is not None and n < LEAST_IMAGES]
    if few:
        note += f" Fewer than {LEAST_IMAGES} test images decide nothing: {', '.join(few)}."
    if all(len(r.seeds) < LEAST_SEEDS for r in rows):
        most = max(len(r.seeds) for r in rows)
        note += f" Fewer than {LEAST_SEEDS} seeds decide nothing: no row has more than {most}."
    return Table("Results", columns, table, note=note, bars=tuple(scored))


def _unscored(rows, domains) -> str:
    """A sentence that names the cells that fewer runs stand behind than behind their row."""
    found = []
    for row in rows:
        for domain in domains:
            scored = sum(domain in e["metrics"] for e in row.runs)
            found += [f"{row.label} on {domain} ({scored} of {len(row.runs)})"] * (
                0 < scored < len(row.runs)
            )
    return f" Not of all its runs: {'; '.join(found)}." if found else ""


def measured(rows, data) -> list[dict]:
    """Results of full data (no shots) as the reproduction table takes them."""
    arms = {"synthetic_only": "synthetic", "real_only": "real"}
    return [
        {
            "segmenter": r.recipe.segmenter,
            "arm": arms.get(r.recipe.arm, r.recipe.arm),
            "tta": tta,
            "seed": e["seed"],
            "miou": results[data]["miou"],
            "supervision": e["supervision"],
            "variant": r.variant or "",
            "recipe": r.recipe.key,
            "origin": r.recipe.shots_from or "",
            "images": r.images,
            "number": number_of_images(e["run"]["trained_on"]),
            "steps": r.recipe.steps,
        }
        for r in rows
        for e in r.runs
        for tta, results in ((False, e["metrics"]), (True, e["augmented"]))
        if data in results and r.recipe.shots in (None, "all") and r.recipe.arm != "other"
    ]


def learning_curves(rows, domains):
    """mIoU by the number of real images, with and without synthetic ones before them, where both
    took as many steps."""
    for origin in domains:
        pairs = _equal_steps([r for r in rows if r.recipe.shots_from == origin], origin)
        if len(pairs) < 2:
            continue
        series = {}
        for place, name in enumerate(("synthetic, then real", "real only")):
            cells = [cell(values(pair[place].runs, origin)) for pair in pairs.values()]
            known = [c if isinstance(c, tuple) else (c, 0.0) for c in cells]
            series[name] = (list(pairs), [m for m, _ in known], [s for _, s in known])
        svg = charts.line_chart_svg(series, f"real images from {origin}", f"mIoU on {origin}")
        steps = next(iter(pairs.values()))[0].recipe.steps
        seeds = sorted({len(r.seeds) for pair in pairs.values() for r in pair})
        seeds = "\u2013".join(map(str, sorted({seeds[0], seeds[-1]})))
        note = (
            f"Same total steps in both arms ({steps:,}); mean and one standard deviation of "
            f"{seeds} "
            f"seed{'s' * (seeds != '1')} on {images_of(rows, [origin])[origin]:,} test images."
        )
        yield Chart(f"Label budget: {origin}", svg, note)


def _equal_steps(rows, data: str) -> dict[str, tuple]:
    """{shots: (fine-tuned row, control)} of one number of steps in total: the one for which there
    are most pairs. Of several recipes of as many steps the main one counts, else the first in
    the order of ranks."""
    found = {}
    for row in sorted(rows, key=lambda r: r.variant is not None):
        if (
            row.recipe.arm in ("finetuned", "real_only")
            and row.recipe.steps
            and values(row.runs, data) is not None
        ):
            at = found.setdefault(row.recipe.steps, {}).setdefault(row.recipe.shots, {})
            at.setdefault(row.recipe.arm, row)
    pairs = {
        steps: {k: (at["finetuned"], at["real_only"]) for k, at in by_shots.items() if len(at) == 2}
        for steps, by_shots in found.items()
    }
    best = max(pairs, key=lambda steps: (len(pairs[steps]), steps), default=None)
    chosen = pairs.get(best, {})
    return {k: chosen[k] for k in sorted(chosen, key=lambda k: 10**9 if k == "all" else int(k))}


def class_tables(rows, domains):
    """IoU of each class: a table of all arms, and bars of a few."""
    arms, bar_charts = {r.label: r.runs for r in rows if r.variant is None}, []
    entries = [e for runs in arms.values() for e in runs]
    for domain in domains:
        columns, table = list(arms), []
        for name in _classes(entries, domain):
            cells = []
            for group in arms.values():
                found = [e["metrics"][domain]["iou"][name] for e in group if domain in e["metrics"]]
                found = [v for v in found if v is not None]
                cells.append(mean(found) if found else None)
            table.append([name, *cells])
        shown = [i for i in range(len(columns)) if any(row[i + 1] is not None for row in table)][
            :BARS
        ]
        bars = {columns[i]: [(row[0], row[i + 1], None) for row in table] for i in shown}
        if shown:
            images = images_of(rows, [domain])[domain]
            note = f"Percent on {images:,} test images; mean over seeds."
            note += _unscored([r for r in rows if r.variant is None], [domain])
            yield Table(f"IoU per class on {domain}", ["class", *columns], table, note=note)
            note = f"The first {BARS} of the table's columns." if len(columns) > BARS else ""
            bar_charts.append(
                Chart(
                    f"IoU bars on {domain}",
                    charts.bar_chart_svg(bars, f"IoU on {domain} (%)"),
                    note,
                )
            )
    yield from bar_charts  # neighbouring charts share a row


def ablation_table(summary, domains):
    """Recipes of synthetic images alone beside the main one."""
    own = {
        n: v for n, v in summary.get("ablations", {}).items() if v["of"] == ARMS["synthetic_only"]
    }
    if own:
        shipped = {
            **summary["synthetic_only"],
            **{k: summary.get(k) for k in ("mask_miou", "mask_agreement")},
        }
        rows = [
            [
                name,
                cell(v.get("mask_miou")),
                cell(v.get("mask_agreement")),
                *(cell(v[d]) for d in domains),
                *(_difference(v.get("less", {}).get(d)) for d in domains),
            ]
            for name, v in {"as in the first table": shipped, **own}.items()
        ]
        images = summary["test_images"]
        columns = [
            "synthetic only, with",
            "mask mIoU",
            "mask agreement",
            *(f"mIoU on {d}" for d in domains),
        ]
        columns += [f"less the first, on {d}" for d in domains]
        note = (
            "The masks on noised real test scenes (uncertain pixels as background), their "
            "agreement with segmenters of all "
            "real images, and the segmenter trained on them. mIoU: mean \u00b1 standard deviation "
            "over "
            f"seeds, on {', '.join(f'{n:,} test images of {d}' for d, n in images.items() if n)}. "
            "Less the first: the mean "
            "difference of runs of one seed, its 95 % interval, and the number of pairs."
        )
        yield Table("Ablations", columns, rows, note=note)


def _difference(found: dict | None) -> str | None:
    """``−0.9 [−1.2, −0.6] (3)``; None without a pair."""
    if found is None:
        return None
    within = "" if found["low"] is None else f" [{signed(found['low'])}, {signed(found['high'])}]"
    return f"{signed(found['value'])}{within} ({found['seeds']})"


def synthetic_gallery(synthetic, taxonomy, count=8):
    if not (synthetic / "SegmentationClass" / "masks.json").is_file():
        return
    palette, rows = voc_palette(), []
    made = read_own(synthetic / "SegmentationClass" / "masks.json", DRAWN)["identity"]["settings"]
    for sample in read_plan(synthetic)[:count]:
        image = read_image(synthetic_image(synthetic, sample.id))
        mask = read_mask(synthetic / "SegmentationClass" / f"{sample.id}.png")
        maps = stored_heat(synthetic, sample.id)[made["source"]]
        photos = [image, pictures.heat(image, maps[0, made["power"]])]
        drawn = [pictures.colour_mask(mask, palette), pictures.overlay(image, mask, palette)]
        shown = [pictures.small_data_uri(p) for p in photos] + [
            pictures.small_data_uri(p, photo=False) for p in drawn
        ]
        rows.append((sample.prompt, shown))
    columns = ["image", "heat of the first class", "mask", "overlay"]
    legend = pictures.legend(taxonomy.all_names, palette, uncertain=True)
    yield Gallery(
        "Synthetic images", columns, rows, "Made by the generator; no human label.", legend
    )


def real_galleries(rows, tests, taxonomy, count=8):
    palette = voc_palette()
    legend = pictures.legend(taxonomy.all_names, palette)
    chosen = {}
    for row in rows:
        if row.variant is None and row.recipe.shots_from in (None, next(iter(tests), None)):
            chosen[row.recipe.words] = row.runs[0]["folder"]
    for domain, data in tests.items():
        folders = {
            n: f / "eval" / domain / "examples"
            for n, f in chosen.items()
            if (f / "eval" / domain / "examples").is_dir()
        }
        if not folders:
            continue
        shown = []
        for i, name in enumerate(data.ids[:count]):
            shown.append(
                (name, _row(data, i, [f / f"{name}.png" for f in folders.values()], palette))
            )
        columns = ["image", "truth", *folders]
        note = (
            f"The first {len(shown)} of {len(data):,} held-out test images; one seed of each arm."
        )
        yield Gallery(f"Predictions on {domain}", columns, shown, note, legend)


def _classes(entries, domain) -> list[str]:
    return next((list(e["metrics"][domain]["iou"]) for e in entries if domain in e["metrics"]), [])


def best_run(entries, domain) -> dict | None:
    """The entry with the highest mIoU on ``domain``."""
    found = [e for e in entries if domain in e["metrics"]]
    return max(found, key=lambda e: e["metrics"][domain]["miou"], default=None)


def confusions(entry: dict, domain: str):
    """The confusion matrix of a run, each row in percent of the pixels of its class; its largest
    errors where it is large."""
    result = entry["metrics"][domain]
    names, counts = list(result["iou"]), np.array(result["confusion"], float)
    total = counts.sum(1, keepdims=True)
    share = np.divide(100 * counts, total, out=np.zeros_like(counts), where=total > 0)
    title, what = f"Confusions on {domain}", f"Run {entry['name']}"
    if len(names) <= LARGEST:
        rows = [
            row.tolist() if n else [None] * len(names)
            for row, n in zip(share, total[:, 0], strict=True)
        ]
        note = (
            f"{what}: percent of the pixels of each true class (row) by predicted class "
            "(column); rows add up to 100."
        )
        note += f" {result['num_images']:,} test images."
        yield Matrix(title, "true \\ predicted", names, names, rows, note, limits=(0, 100))
        return
    wrong = np.where(np.eye(len(names), dtype=bool), -1, share)
    order = np.argsort(-wrong, axis=None, kind="stable")[:25]
    rows = [
        [names[i], names[j], float(share[i, j])]
        for i, j in zip(*np.unravel_index(order, share.shape), strict=True)
    ]
    note = (
        f"{what}: the largest of {len(names)} x {len(names)} entries, in percent of the true "
        "class's pixels."
    )
    note += f" {result['num_images']:,} test images."
    yield Table(title, ["true class", "predicted as", "share of its pixels"], rows, note)


def _row(data: SegmentationFolder, index: int, predictions, palette) -> list[str]:
    """Pictures of one test image: itself, truth, predictions."""
    image, truth = data[index]
    masks = [truth, *map(read_mask, predictions)]
    drawn = [pictures.small_data_uri(pictures.colour_mask(m, palette), photo=False) for m in masks]
    return [pictures.small_data_uri(image), *drawn]


def extremes(entry: dict, domain: str, data: SegmentationFolder, names, count: int = 4):
    """The best and the worst predictions of a run by the mIoU of the image alone, of those whose
    prediction is stored."""
    images = entry["metrics"][domain].get("images")
    folder, palette = entry["folder"] / "eval" / domain / "examples", voc_palette()
    if not images or set(images["ids"]) != set(data.ids):
        return
    ranked = sorted(image_miou(images).items(), key=lambda pair: pair[1])
    ranked = [(i, v) for i, v in ranked if (folder / f"{i}.png").is_file()]
    count = min(count, len(ranked) // 2)
    for title, chosen in (("Worst", ranked[:count]), ("Best", ranked[::-1][:count])):
        rows = [
            (f"{i}: mIoU {v:.1f}", _row(data, data.ids.index(i), [folder / f"{i}.png"], palette))
            for i, v in chosen
        ]
        if rows:
            note = (
                f"Run {entry['name']}; mIoU of the image alone, over the classes that occur in it."
            )
            columns = ["image", "truth", "prediction"]
            yield Gallery(
                f"{title} predictions on {domain}",
                columns,
                rows,
                note,
                pictures.legend(names, palette, uncertain=True),
            )
