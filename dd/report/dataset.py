"""What one synthetic data set holds: balance of the classes, sizes, uncertainty, quality
signals, samples to look at."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from dd.data.datasets import check_mask, read_image, read_mask, stored_heat, synthetic_image
from dd.report import charts, pictures
from dd.report.explore import Samples, Shown
from dd.report.page import Chart, Table
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
    asked: dict = field(default_factory=dict)
    present: dict = field(default_factory=dict)
    areas: dict = field(default_factory=dict)
    uncertain: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)

    def add(self, sample: Sample, mask: np.ndarray) -> None:
        counts = np.bincount(mask.ravel(), minlength=256)
        self.pixels += counts
        self.uncertain[sample.id] = 100 * counts[IGNORE] / mask.size
        for name, i in zip(sample.classes, sample.class_ids, strict=True):
            self.asked[name] = self.asked.get(name, 0) + 1
            if counts[i]:
                self.present[name] = self.present.get(name, 0) + 1
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


def balance(found: Statistics, names):
    """Images and pixels of each class, as a chart and a table; ``names`` in mask order,
    background first."""
    share = 100 * found.pixels / max(1, found.pixels.sum())
    classes = [n for n in names[1:] if n in found.asked]
    images = {
        "asked for in the prompt": [(n, float(found.asked[n]), None) for n in classes],
        "in the mask": [(n, float(found.present.get(n, 0)), None) for n in classes],
    }
    yield Chart("Class balance: images", charts.bar_chart_svg(images, "images", digits=0))
    pixels = {
        "pixels": [
            (n, float(share[i]), None) for i, n in enumerate(names) if i == 0 or n in found.asked
        ]
    }
    pixels["pixels"].append(("uncertain", float(share[IGNORE]), None))
    yield Chart("Class balance: pixels", charts.bar_chart_svg(pixels, "share of all pixels (%)"))
    rows = []
    for n in classes:
        asked, present = found.asked[n], found.present.get(n, 0)
        area = median(found.areas[n]) if n in found.areas else None
        rows.append(
            [n, asked, present, 100 * (1 - present / asked), float(share[names.index(n)]), area]
        )
    columns = [
        "class",
        "asked for",
        "in the mask",
        "missing (%)",
        "share of pixels (%)",
        "median area (%)",
    ]
    note = (
        "Missing: the prompt asks for the class and its mask has no pixel of it. Area: of an "
        "image in which the class is."
    )
    never = [n for n in names[1:] if n not in found.asked]
    note += f" No prompt asks for {', '.join(never)}." if never else ""
    yield Table("Classes", columns, rows, note)


def histograms(found: Statistics, signals: list[dict], power: int | None, source: str):
    """Areas, uncertainty, and the quality signals of the records (:mod:`dd.data.quality`) as far
    as they are there."""
    areas = [a for values in found.areas.values() for a in values]
    if areas:
        svg = charts.histogram_svg(areas, "area of a class in an image (%)", "classes in images")
        yield Chart("Mask areas", svg)
    svg = charts.histogram_svg(
        list(found.uncertain.values()), "uncertain pixels of an image (%)", "images"
    )
    yield Chart("Uncertainty", svg)
    for name, values in signal_values(signals, power, source).items():
        yield Chart(
            f"Quality: {name}",
            charts.histogram_svg(
                values, name, "images" if name == "CLIP score" else "classes in images"
            ),
        )


def signal_values(signals: list[dict], power: int | None, source: str) -> dict[str, list[float]]:
    """{what: finite numbers} of the samples that have signals: those of the heat at the masks'
    power, and CLIP scores."""
    found = {label: [] for label in (*SIGNALS.values(), "CLIP score", "CLIP score of a class")}
    for signal in signals:
        heat = signal.get("heat", {}).get(source, {})
        for key, label in SIGNALS.items():
            found[label] += [
                row[power] for row in heat.get(key, []) if power is not None and power < len(row)
            ]
        clip = signal.get("clip", {})
        found["CLIP score"] += [clip["prompt"]] if "prompt" in clip else []
        found["CLIP score of a class"] += clip.get("classes", [])
    found = {
        k: [v for v in values if v is not None and np.isfinite(v)] for k, values in found.items()
    }
    return {k: v for k, v in found.items() if v}


def choose(plan: list[Sample], count: int) -> list[Sample]:
    """``count`` samples in plan order, so that each class gets its turn: rare classes are seen
    too."""
    waiting, chosen = {}, {}
    for sample in plan:
        for name in sample.classes:
            waiting.setdefault(name, []).append(sample)
    while len(chosen) < min(count, len(plan)):
        before = len(chosen)
        for queue in waiting.values():
            while queue and queue[0].id in chosen:
                queue.pop(0)
            if queue and len(chosen) < count:
                sample = queue.pop(0)
                chosen[sample.id] = sample
        if len(chosen) == before:
            break
    return sorted(chosen.values(), key=lambda s: plan.index(s))


def gallery(
    folder: Path,
    masks: Path,
    samples: list[Sample],
    found: Statistics,
    names,
    power: int | None,
    source: str,
) -> Samples:
    """Image, heat of each class, mask and overlay of some samples; heat at the masks' power, or
    the highest that is stored."""
    palette, shown = voc_palette(), []
    for sample in samples:
        image, mask = (
            read_image(synthetic_image(folder, sample.id)),
            read_mask(masks / f"{sample.id}.png"),
        )
        heat = stored_heat(folder, sample.id)
        maps = heat.get(source, heat["class_prompt"])
        k = min(maps.shape[1] - 1, maps.shape[1] - 1 if power is None else power)
        parts = [("image", pictures.small_data_uri(image))]
        parts += [
            (f"heat: {name}", pictures.small_data_uri(pictures.heat(image, maps[i, k])))
            for i, name in enumerate(sample.classes)
        ]
        drawn = {
            "mask": pictures.colour_mask(mask, palette),
            "overlay": pictures.overlay(image, mask, palette),
        }
        parts += [
            (name, pictures.small_data_uri(picture, photo=False)) for name, picture in drawn.items()
        ]
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
    return Samples("Samples", shown, note, pictures.legend(names, palette, uncertain=True))
