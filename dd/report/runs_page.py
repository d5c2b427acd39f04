"""Sections of the page that compares runs: results, classes, confusions, pictures."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from dd.data.datasets import SegmentationFolder, read_image, read_mask, stored_heat, synthetic_image
from dd.evaluation.statistics import LEAST_IMAGES, LEAST_SEEDS
from dd.report import charts, pictures
from dd.report.compare import image_miou, number_of_runs, signed
from dd.report.explore import Matrix
from dd.report.html import Cell, Chart, Gallery, Pictures, Section, Table
from dd.report.recipes import ARMS, Entry
from dd.report.rows import Row, equal_steps, number_of_images
from dd.report.summary import cell, images_of, values
from dd.store.provenance import read_own
from dd.store.samples import read_plan
from dd.store.schemas import DRAWN
from dd.taxonomy import Taxonomy, voc_palette

LARGEST = 30  # classes of a confusion matrix that is shown whole
LARGE = 512  # pixels, the long side of the pictures at the head of the page
BARS = 4  # arms of the chart of classes


def headline(rows: Sequence[Row], domains: Sequence[str]) -> Table:
    """One row per recipe; the main one of each arm first, the others named by what differs from
    it."""
    several = len({r.recipe.segmenter for r in rows}) > 1
    table: list[list[Cell]] = []
    for row in rows:
        name = f"{row.recipe.segmenter}: {row.name}" if several else row.name
        cells = (cell(values(row.runs, d)) for d in domains)
        runs = number_of_runs([(e["seed"], e["draw"]) for e in row.runs])
        origin = row.recipe.shots_from or "\u2013"
        table.append([name, *cells, row.supervision, runs, row.recipe.steps, origin])
    images = images_of(rows, domains)
    scored = [f"mIoU on {d}" + (f" ({images[d]:,} images)" if images[d] else "") for d in domains]
    columns = ["trained on", *scored, "supervision", "seeds", "steps", "real images from"]
    note = (
        "mIoU in percent on the held-out test split, single scale, background counted. "
        "Supervision: what made the synthetic images (A: no real label, not for a setting either; "
        "B: real labels chose settings, or a few were trained on), real: no synthetic image, or "
        "whole real splits. Steps: optimiser steps in total, those of the run before counted; a "
        "dash: it is not at hand."
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


def _unscored(rows: Sequence[Row], domains: Sequence[str]) -> str:
    """A sentence that names the cells that fewer runs stand behind than behind their row."""
    found = []
    for row in rows:
        for domain in domains:
            scored = sum(domain in e["metrics"] for e in row.runs)
            if 0 < scored < len(row.runs):
                found.append(f"{row.label} on {domain} ({scored} of {len(row.runs)})")
    return f" Not of all its runs: {'; '.join(found)}." if found else ""


def measured(rows: Sequence[Row], data: str) -> list[dict[str, Any]]:
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


def learning_curves(rows: Sequence[Row], domains: Sequence[str]) -> Iterator[Section]:
    """mIoU by the number of real images, with and without synthetic ones before them, where both
    took as many steps."""
    for origin in domains:
        pairs = equal_steps([r for r in rows if r.recipe.shots_from == origin], origin)
        if len(pairs) < 2:
            continue
        series: dict[str, charts.Line] = {}
        for place, name in enumerate(("synthetic, then real", "real only")):
            cells = [cell(values(pair[place].runs, origin)) for pair in pairs.values()]
            known = [c if isinstance(c, tuple) else (c, 0.0) for c in cells]
            series[name] = (list(pairs), [m for m, _ in known], [s for _, s in known])
        svg = charts.line_chart_svg(series, f"real images from {origin}", f"mIoU on {origin}")
        steps = next(iter(pairs.values()))[0].recipe.steps
        numbers = {len(r.seeds) for pair in pairs.values() for r in pair}
        seeds = "\u2013".join(map(str, sorted({min(numbers), max(numbers)})))
        images = images_of(rows, [origin])[origin]
        note = (
            f"Same total steps in both arms ({steps:,}); mean and one standard deviation of "
            f"{seeds} seed{'s' * (seeds != '1')} on {images:,} test images."
        )
        yield Chart(f"Label budget: {origin}", svg, note)


def class_tables(rows: Sequence[Row], domains: Sequence[str]) -> Iterator[Section]:
    """IoU of each class: a table of all arms, and bars of a few."""
    arms, bar_charts = {r.label: r.runs for r in rows if r.variant is None}, []
    entries = [e for runs in arms.values() for e in runs]
    for domain in domains:
        classes = _classes(entries, domain)
        ious = {arm: [_mean_iou(runs, domain, c) for c in classes] for arm, runs in arms.items()}
        known = [arm for arm, found in ious.items() if any(iou is not None for iou in found)]
        bars: charts.Bars = {
            arm: [(c, iou, None) for c, iou in zip(classes, ious[arm], strict=True)]
            for arm in known[:BARS]
        }
        if known:
            table = [[c, *cells] for c, *cells in zip(classes, *ious.values(), strict=True)]
            images = images_of(rows, [domain])[domain]
            note = f"Percent on {images:,} test images; mean over seeds."
            note += _unscored([r for r in rows if r.variant is None], [domain])
            yield Table(f"IoU per class on {domain}", ["class", *arms], table, note=note)
            note = f"The first {BARS} of the table's columns." if len(arms) > BARS else ""
            svg = charts.bar_chart_svg(bars, f"IoU on {domain} (%)")
            bar_charts.append(Chart(f"IoU bars on {domain}", svg, note))
    yield from bar_charts  # neighbouring charts share a row


def _mean_iou(runs: Iterable[Entry], domain: str, name: str) -> float | None:
    """Over the runs in which the class occurs."""
    found = [e["metrics"][domain]["iou"][name] for e in runs if domain in e["metrics"]]
    known = [v for v in found if v is not None]
    return mean(known) if known else None


def ablation_table(summary: Mapping[str, Any], domains: Sequence[str]) -> Iterator[Section]:
    """Recipes of synthetic images alone beside the main one."""
    found = summary.get("ablations", {}).items()
    own = {name: v for name, v in found if v["of"] == ARMS["synthetic_only"]}
    if not own:
        return
    masks = {k: summary.get(k) for k in ("mask_miou", "mask_agreement")}
    rows: list[list[Cell]] = []
    for name, v in {"as in the first table": summary["synthetic_only"] | masks, **own}.items():
        scores = (cell(v.get(key)) for key in ("mask_miou", "mask_agreement", *domains))
        rows.append([name, *scores, *(_difference(v.get("less", {}).get(d)) for d in domains)])
    columns = ["synthetic only, with", "mask mIoU", "mask agreement"]
    columns += [f"mIoU on {d}" for d in domains] + [f"less the first, on {d}" for d in domains]
    images = (f"{n:,} test images of {d}" for d, n in summary["test_images"].items() if n)
    note = (
        "The masks on noised real test scenes (uncertain pixels as background), their agreement "
        "with segmenters of all real images, and the segmenter trained on them. mIoU: mean \u00b1 "
        f"standard deviation over seeds, on {', '.join(images)}. Less the first: the mean "
        "difference of runs of one seed, its 95 % interval, and the number of pairs."
    )
    yield Table("Ablations", columns, rows, note=note)


def _difference(found: Mapping[str, Any] | None) -> str | None:
    """``−0.9 [−1.2, −0.6] (3)``; None without a pair."""
    if found is None:
        return None
    within = "" if found["low"] is None else f" [{signed(found['low'])}, {signed(found['high'])}]"
    return f"{signed(found['value'])}{within} ({found['seeds']})"


def synthetic_gallery(synthetic: Path, taxonomy: Taxonomy, count: int = 8) -> Iterator[Section]:
    if not (synthetic / "SegmentationClass" / "masks.json").is_file():
        return
    palette, rows = voc_palette(), []
    made = read_own(synthetic / "SegmentationClass" / "masks.json", DRAWN)["identity"]
    power, source = made["settings"].get("power"), made["settings"]["source"]
    for sample in read_plan(synthetic)[:count]:
        image = read_image(synthetic_image(synthetic, sample.id))
        mask = read_mask(synthetic / "SegmentationClass" / f"{sample.id}.png")
        maps = stored_heat(synthetic, sample.id, made.get("reading"))[source]
        photos = [image, pictures.heat(image, maps[0, pictures.shown_power(maps, power)])]
        drawn = pictures.drawn(image, mask, palette).values()
        shown = [*map(pictures.small_data_uri, photos)]
        rows.append(
            (sample.prompt, shown + [pictures.small_data_uri(p, photo=False) for p in drawn])
        )
    columns = ["image", "heat of the first class", "mask", "overlay"]
    note = "Made by the generator; no human label."
    legend = pictures.legend(taxonomy.all_names, palette, uncertain=True)
    yield Gallery("Synthetic images", columns, rows, note, legend)


def real_galleries(
    rows: Sequence[Row],
    tests: Mapping[str, SegmentationFolder],
    taxonomy: Taxonomy,
    count: int = 8,
) -> Iterator[Section]:
    palette = voc_palette()
    legend = pictures.legend(taxonomy.all_names, palette)
    chosen = {}
    for row in rows:
        if row.variant is None and row.recipe.shots_from in (None, next(iter(tests), None)):
            chosen[row.recipe.words] = row.runs[0]["folder"]
    for domain, data in tests.items():
        examples = {name: f / "eval" / domain / "examples" for name, f in chosen.items()}
        folders = {name: f for name, f in examples.items() if f.is_dir()}
        if not folders:
            continue
        shown = []
        for i, name in enumerate(data.ids[:count]):
            predictions = [f / f"{name}.png" for f in folders.values()]
            shown.append((name, _row(data, i, predictions, palette)))
        columns = ["image", "truth", *folders]
        note = (
            f"The first {len(shown)} of {len(data):,} held-out test images; one seed of each arm."
        )
        yield Gallery(f"Predictions on {domain}", columns, shown, note, legend)


def _classes(entries: Iterable[Entry], domain: str) -> list[str]:
    return next((list(e["metrics"][domain]["iou"]) for e in entries if domain in e["metrics"]), [])


def best_run(entries: Iterable[Entry], domain: str) -> Entry | None:
    """The entry with the highest mIoU on ``domain``."""
    found = [e for e in entries if domain in e["metrics"]]
    return max(found, key=lambda e: e["metrics"][domain]["miou"], default=None)


def confusions(entry: Entry, domain: str) -> Iterator[Section]:
    """The confusion matrix of a run, each row in percent of the pixels of its class; its largest
    errors where it is large."""
    result = entry["metrics"][domain]
    names, counts = list(result["iou"]), np.array(result["confusion"], float)
    total = counts.sum(1, keepdims=True)
    share = np.divide(100 * counts, total, out=np.zeros_like(counts), where=total > 0)
    title, what = f"Confusions on {domain}", f"Run {entry['name']}"
    if len(names) <= LARGEST:
        empty: list[float | None] = [None] * len(names)
        shares = zip(share.tolist(), total[:, 0], strict=True)
        rows = [row if n else empty for row, n in shares]
        note = (
            f"{what}: percent of the pixels of each true class (row) by predicted class "
            f"(column); rows add up to 100. {result['num_images']:,} test images."
        )
        yield Matrix(title, "true \\ predicted", names, names, rows, note, limits=(0, 100))
        return
    wrong = np.where(np.eye(len(names), dtype=bool), -1, share)
    order = np.argsort(-wrong, axis=None, kind="stable")[:25]
    places = zip(*np.unravel_index(order, share.shape), strict=True)
    errors: list[list[Cell]] = [[names[i], names[j], float(share[i, j])] for i, j in places]
    note = (
        f"{what}: the largest of {len(names)} x {len(names)} entries, in percent of the true "
        f"class's pixels. {result['num_images']:,} test images."
    )
    yield Table(title, ["true class", "predicted as", "share of its pixels"], errors, note)


def large_pictures(
    rows: Sequence[Row],
    synthetic: Path,
    tests: Mapping[str, SegmentationFolder],
    taxonomy: Taxonomy,
) -> Iterator[Section]:
    """Six pictures: image, heat and mask of the first synthetic sample whose mask has a class;
    photograph, truth and prediction of the test image in the middle by its own mIoU, seen by the
    first run of synthetic images alone (else of the first row)."""
    palette, shown = voc_palette(), []
    if (synthetic / "SegmentationClass" / "masks.json").is_file():
        shown += _large_sample(synthetic, palette)
    found = _large_prediction(rows, tests, palette)
    shown += [found] if found else []
    if shown:
        legend = pictures.legend(taxonomy.all_names, palette, uncertain=True)
        note = (
            "None is chosen by its looks: the first synthetic image whose mask has a class, and of "
            "the test images whose prediction is stored the one in the middle by its own mIoU."
        )
        yield Pictures("What it looks like", shown, note, legend)


def _large_sample(synthetic: Path, palette: list[int]) -> list[list[tuple[str, str]]]:
    made = read_own(synthetic / "SegmentationClass" / "masks.json", DRAWN)["identity"]
    power, source = made["settings"].get("power"), made["settings"]["source"]
    for sample in read_plan(synthetic):
        mask = read_mask(synthetic / "SegmentationClass" / f"{sample.id}.png")
        held = [i for i in sample.class_ids if (mask == i).any()]
        if held:
            image = read_image(synthetic_image(synthetic, sample.id))
            maps = stored_heat(synthetic, sample.id, made.get("reading"))[source]
            place = sample.class_ids.index(held[0])
            heat = pictures.heat(image, maps[place, pictures.shown_power(maps, power)])
            captions = (
                f"Synthetic image: {sample.prompt}",
                f"Heat of {sample.classes[place]}, read from the generator's attention",
                "Mask made of the heat, no human label",
            )
            drawn = [image, heat, pictures.colour_mask(mask, palette)]
            return [_captioned(captions, drawn)]
    return []


def _large_prediction(
    rows: Sequence[Row], tests: Mapping[str, SegmentationFolder], palette: list[int]
) -> list[tuple[str, str]] | None:
    mains = [row for row in rows if row.variant is None]
    mains.sort(key=lambda row: row.recipe.arm != "synthetic_only")
    for row, (domain, data) in ((row, pair) for row in mains for pair in tests.items()):
        result = row.runs[0]["metrics"].get(domain) or {}
        folder = row.runs[0]["folder"] / "eval" / domain / "examples"
        mious = image_miou(result["images"]) if result.get("images") else {}
        ids = [i for i in data.ids if i in mious and (folder / f"{i}.png").is_file()]
        if not ids:
            continue
        middle = sorted(ids, key=lambda i: mious[i])[len(ids) // 2]
        image, truth = data[data.ids.index(middle)]
        masks = [truth, read_mask(folder / f"{middle}.png")]
        captions = (
            f"Photograph {middle} of {domain}, a test image",
            "Truth, labelled by hand",
            f"Prediction: {row.name}, mIoU of this image {mious[middle]:.1f}",
        )
        return _captioned(captions, [image, *(pictures.colour_mask(m, palette) for m in masks)])
    return None


def _captioned(captions: Sequence[str], drawn: Sequence[np.ndarray]) -> list[tuple[str, str]]:
    """The first one is a photograph, or as good as one."""
    uris = [pictures.small_data_uri(p, LARGE, photo=i == 0) for i, p in enumerate(drawn)]
    return list(zip(captions, uris, strict=True))


def _row(
    data: SegmentationFolder, index: int, predictions: Iterable[Path], palette: list[int]
) -> list[str]:
    """Pictures of one test image: itself, truth, predictions."""
    image, truth = data[index]
    masks = [truth, *map(read_mask, predictions)]
    drawn = [pictures.small_data_uri(pictures.colour_mask(m, palette), photo=False) for m in masks]
    return [pictures.small_data_uri(image), *drawn]


def extremes(
    entry: Entry, domain: str, data: SegmentationFolder, names: Sequence[str], count: int = 4
) -> Iterator[Section]:
    """The best and the worst predictions of a run by the mIoU of the image alone, of those whose
    prediction is stored."""
    images = entry["metrics"][domain].get("images")
    folder, palette = entry["folder"] / "eval" / domain / "examples", voc_palette()
    if not images or set(images["ids"]) != set(data.ids):
        return
    ranked = sorted(image_miou(images).items(), key=lambda pair: pair[1])
    ranked = [(i, v) for i, v in ranked if (folder / f"{i}.png").is_file()]
    count = min(count, len(ranked) // 2)
    legend = pictures.legend(names, palette, uncertain=True)
    note = f"Run {entry['name']}; mIoU of the image alone, over the classes that occur in it."
    for title, chosen in (("Worst", ranked[:count]), ("Best", ranked[::-1][:count])):
        rows = []
        for i, v in chosen:
            shown = _row(data, data.ids.index(i), [folder / f"{i}.png"], palette)
            rows.append((f"{i}: mIoU {v:.1f}", shown))
        if rows:
            columns = ["image", "truth", "prediction"]
            yield Gallery(f"{title} predictions on {domain}", columns, rows, note, legend)
