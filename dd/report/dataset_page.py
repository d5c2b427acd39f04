"""What one synthetic data set holds: balance of the classes, sizes, uncertainty, quality
signals, samples to look at."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dd.data.datasets import check_mask, read_image, read_mask, stored_heat, synthetic_image
from dd.report import charts, pictures
from dd.report.explore import SampleBrowser, Shown
from dd.report.html import Cell, Chart, Section, Table
from dd.store.samples import Sample
from dd.taxonomy import IGNORE, voc_palette

SIGNALS = {
    "peak": "peak of the heat",
    "spread": "spread of the heat (max - min)",
    "entropy": "entropy of the heat",
    "area": "share of the heat map above half of its peak",
}


@dataclass
class Statistics:
    """Counts over the masks of a set. ``pixels`` int [256] by value; ``asked`` and ``present``
    {class: images}; ``areas`` {class: percent of each image in which it is}; ``uncertain``
    {sample id: percent}; ``missing`` {sample id: classes}."""

    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    asked: Counter[str] = field(default_factory=Counter)
    present: Counter[str] = field(default_factory=Counter)
    areas: dict[str, list[float]] = field(default_factory=dict)
    uncertain: dict[str, float] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def add(self, sample: Sample, mask: np.ndarray) -> None:
        counts = np.bincount(mask.ravel(), minlength=256)
        self.pixels += counts
        self.uncertain[sample.id] = 100 * counts[IGNORE] / mask.size
        for name, i in zip(sample.classes, sample.class_ids, strict=True):
            self.asked[name] += 1
            if counts[i]:
                self.present[name] += 1
                self.areas.setdefault(name, []).append(100 * counts[i] / mask.size)
            else:
                self.missing.setdefault(sample.id, []).append(name)


def statistics(plan: list[Sample], masks: Path) -> Statistics:
    """Of the masks ``<masks>/<id>.png``; FileNotFoundError names one that is not there."""
    found = Statistics()
    for sample in plan:
        path = masks / f"{sample.id}.png"
        if not path.is_file():
            raise FileNotFoundError(
                f"no mask {path}; run generate.py with stage=label to make this mask set whole"
            )
        check_mask(path)
        found.add(sample, read_mask(path))
    return found


def balance(found: Statistics, names: Sequence[str]) -> Iterator[Section]:
    """Images and pixels of each class, as a chart and a table; ``names`` in mask order,
    background first."""
    share = 100 * found.pixels / max(1, found.pixels.sum())
    classes = [n for n in names[1:] if n in found.asked]
    images: charts.Bars = {
        "asked for in the prompt": [(n, float(found.asked[n]), None) for n in classes],
        "in the mask": [(n, float(found.present[n]), None) for n in classes],
    }
    yield Chart("Class balance: images", charts.bar_chart_svg(images, "images", digits=0))
    shares = {n: float(share[i]) for i, n in enumerate(names)}
    shown = [(n, v, None) for n, v in shares.items() if n == names[0] or n in found.asked]
    pixels: charts.Bars = {"pixels": [*shown, ("uncertain", float(share[IGNORE]), None)]}
    yield Chart("Class balance: pixels", charts.bar_chart_svg(pixels, "share of all pixels (%)"))
    rows: list[list[Cell]] = []
    for n in classes:
        asked, present = found.asked[n], found.present[n]
        area = median(found.areas[n]) if n in found.areas else None
        rows.append([n, asked, present, 100 * (1 - present / asked), shares[n], area])
    columns = ["class", "asked for", "in the mask", "missing (%)", "share of pixels (%)"]
    columns.append("median area (%)")
    note = (
        "Missing: the prompt asks for the class and its mask has no pixel of it. Area: of an "
        "image in which the class is."
    )
    never = [n for n in names[1:] if n not in found.asked]
    note += f" No prompt asks for {', '.join(never)}." if never else ""
    yield Table("Classes", columns, rows, note)


def histograms(
    found: Statistics, signals: list[dict[str, Any]], power: int | None, source: str
) -> Iterator[Section]:
    """Areas, uncertainty, and the quality signals of the records (:mod:`dd.data.quality`) as far
    as they are there."""
    areas = [a for values in found.areas.values() for a in values]
    if areas:
        svg = charts.histogram_svg(areas, "area of a class in an image (%)", "classes in images")
        yield Chart("Mask areas", svg)
    uncertain = list(found.uncertain.values())
    svg = charts.histogram_svg(uncertain, "uncertain pixels of an image (%)", "images")
    yield Chart("Uncertainty", svg)
    for name, values in signal_values(signals, power, source).items():
        counted = "images" if name == "CLIP score" else "classes in images"
        yield Chart(f"Quality: {name}", charts.histogram_svg(values, name, counted))


def signal_values(
    signals: list[dict[str, Any]], power: int | None, source: str
) -> dict[str, list[float]]:
    """{what: finite numbers} of the samples that have signals: those of the heat at the masks'
    power, and CLIP scores."""
    labels = (*SIGNALS.values(), "CLIP score", "CLIP score of a class")
    found: dict[str, list[float | None]] = {label: [] for label in labels}
    for signal in signals:
        heat = signal.get("heat", {}).get(source, {})
        for key, label in SIGNALS.items():
            if power is not None:
                found[label] += [row[power] for row in heat.get(key, []) if power < len(row)]
        clip = signal.get("clip", {})
        found["CLIP score"] += [clip["prompt"]] if "prompt" in clip else []
        found["CLIP score of a class"] += clip.get("classes", [])
    known = {k: [v for v in vs if v is not None and np.isfinite(v)] for k, vs in found.items()}
    return {k: vs for k, vs in known.items() if vs}


def choose(plan: list[Sample], count: int) -> list[Sample]:
    """``count`` samples in plan order, so that each class gets its turn: rare classes are seen
    too."""
    waiting: dict[str, list[Sample]] = {}
    for sample in plan:
        for name in sample.classes:
            waiting.setdefault(name, []).append(sample)
    chosen: set[str] = set()
    while len(chosen) < count and any(waiting.values()):
        for name, queue in waiting.items():
            waiting[name] = queue = [s for s in queue if s.id not in chosen]
            if queue and len(chosen) < count:
                chosen.add(queue.pop(0).id)
    return [s for s in plan if s.id in chosen]


def gallery(
    folder: Path,
    masks: Path,
    samples: list[Sample],
    found: Statistics,
    names: Sequence[str],
    power: int | None,
    source: str,
    reading: str | None = None,
) -> SampleBrowser:
    """Image, heat of each class, mask and overlay of some samples; heat of the masks' reading at
    their power, or the highest that is stored."""
    palette, shown = voc_palette(), []
    for sample in samples:
        image = read_image(synthetic_image(folder, sample.id))
        mask = read_mask(masks / f"{sample.id}.png")
        heat = stored_heat(folder, sample.id, reading)
        maps = heat.get(source, next(iter(heat.values())))
        k = pictures.shown_power(maps, power)
        photos = {"image": image}
        for i, name in enumerate(sample.classes):
            photos[f"heat: {name}"] = pictures.heat(image, maps[i, k])
        parts = [(name, pictures.small_data_uri(photo)) for name, photo in photos.items()]
        for name, drawn in pictures.drawn(image, mask, palette).items():
            parts.append((name, pictures.small_data_uri(drawn, photo=False)))
        facts = {
            "classes": ", ".join(sample.classes),
            "seed": str(sample.seed),
            "uncertain": f"{found.uncertain[sample.id]:.1f} %",
        }
        missing = found.missing.get(sample.id, [])
        shown.append(Shown(sample.id, sample.prompt, list(sample.classes), parts, missing, facts))
    note = (
        f"{len(samples)} of {len(found.uncertain)} samples, so chosen that each class has its turn."
    )
    return SampleBrowser("Samples", shown, note, pictures.legend(names, palette, uncertain=True))
