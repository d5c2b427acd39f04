"""Stage: choose the mask settings by a few labelled real images. The images are noised and shown to
the generator, and its attention is read as in generation. The settings whose masks fit best win.
These labels count as used (docs/sweeps.md)."""

from collections.abc import Callable, Sequence
from copy import deepcopy  # YAML writes a list that occurs in two places as a reference
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import yaml

from dd.data.datasets import (
    SegmentationFolder,
    choose_source,
    read_captions,
    read_split,
    squared,
)
from dd.evaluation import metrics
from dd.evaluation.supervision import declared, label_set
from dd.masks.from_heat import MaskSettings, check_stored, count_grid, how_read, stored_grid
from dd.prompts.prompt import make_prompt
from dd.store.commands import spelled
from dd.store.provenance import sweep_beside, write_atomic, write_json
from dd.store.samples import Sample
from dd.store.settings import Count, Natural, Settings
from dd.taxonomy import IGNORE

if TYPE_CHECKING:  # loads heavy libraries
    from dd.generators.base import Generator

FOLDS = 5
Heat: TypeAlias = dict[str, np.ndarray]  # by source
Shown: TypeAlias = tuple[int, Sample]  # (index of an image in the data, its sample)


class CalibrationSettings(Settings):
    """``power`` and ``source``: None = all available. The width of the ``band`` decides nothing
    here, because uncertain pixels count as background. ``chains``: {name: steps} to choose from,
    None = the paper's."""

    noun = "calibrate"

    timesteps: list[Natural]
    seed: Natural
    power: Sequence[Natural] | None
    threshold: Sequence[float]
    source: Sequence[str] | None
    band: float
    append: bool
    batch_size: Count = 8
    chains: dict[str, list[dict[str, Any]]] | None = None


def calibrate(
    path: str | Path,
    make_generator: Callable[..., "Generator"],
    readings: Sequence[dict[str, Any]],
    data: SegmentationFolder,
    test_split: str | None,
    settings: CalibrationSettings,
    name: str | None = None,
) -> dict[str, Any]:
    """Choose power, threshold, source and, from ``readings``, how the attention is read. Writes the
    choice to ``path`` (YAML in the shape of conf/generate.yaml, for ``masks_from``) and everything
    that was tried to ``.json`` beside it; returns the choice.

    ``data``: the labelled images; ``make_generator(**reading)`` makes the generator of a reading
    (such as ``{"cross_resolution": 16}``). The highest mIoU wins. ``name``: name of the data in
    records, None = that of their folder. ValueError if an image belongs to ``test_split``, where
    nothing may be chosen, or if no image holds an object.
    """
    path, beside = Path(path), Path(path).with_suffix(".json")
    sweep_beside(path, beside)
    _refuse_test(data, test_split)
    shown, tried, counts = _shown(data, settings.append), [], []
    ranges = settings.power, settings.threshold, [settings.band], settings.source
    for reading in readings:
        generator = make_generator(**reading)
        heat = _read(generator, data, shown, settings)
        grid = [s for _, s in stored_grid(heat[0], *ranges, settings.chains)[0]]
        for s in grid:  # refuse impossible settings before counting
            choose_source(heat[0], s.source, "this reading")
            check_stored(heat[0], s)
        identity = generator.identity()
        tried += [(how_read(identity), s) for s in grid]
        counts.append(_count(heat, data, shown, grid))
    counts_FTCU = np.concatenate(counts, 1)  # F folds, T tries: readings and settings
    rows: list[dict[str, Any]] = [
        {**reading, **s.identity(), **metrics.with_uncertain(torch.from_numpy(c))}
        for (reading, s), c in zip(tried, counts_FTCU.sum(0), strict=True)
    ]
    best = max(range(len(rows)), key=lambda i: rows[i]["miou"])
    reading, chosen = tried[best]
    calibration = {
        "by": "calibrate",
        "data": data.root.name,
        "split": data.split,
        "masks": data.masks,
        "shots": len(data),
        "seed": settings.seed,
        "ids": list(data.ids),
        "without_object": len(data) - len(shown),
        "timesteps": list(settings.timesteps),
        "miou": rows[best]["miou"],
        "miou_cross_validated": _cross_validated(counts_FTCU),
        "miou_paper_settings": _paper(rows),
        "generator": {"weights_sha256": identity["weights_sha256"], **deepcopy(reading)},
    }
    labels = label_set(f"{name or data.root.name}/{data.split}", len(data), settings.seed)
    content = {
        "masks": chosen.identity(),
        "diffusion": reading,
        "chosen_on": declared([labels]),
        "calibration": calibration,
    }
    write_json(beside, {**content, "table": sorted(rows, key=lambda row: -row["miou"])})
    head = (
        f"# Mask settings chosen by {len(data)} labelled images. Use: python generate.py ... "
        f"masks_from={path}\n"
    )
    write_atomic(path, spelled(head) + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return content


def _refuse_test(data: SegmentationFolder, test_split: str | None) -> None:
    if test_split is None:
        return
    listed = data.root / "ImageSets" / "Segmentation" / f"{test_split}.txt"
    tested = set(read_split(data.root, test_split)) if listed.is_file() else set()
    shared = [name for name in data.ids if data.split == test_split or name in tested]
    if shared:
        raise ValueError(
            f"calibrate.split={data.split}: {len(shared)} of the {len(data)} images belong to the "
            f"test split {test_split!r}, such as {shared[0]}. Nothing is chosen on images that are "
            "reported; take another split"
        )


def _shown(data: SegmentationFolder, append: bool) -> list[Shown]:
    """The images with an object. Their classes are those of their masks; without a caption, it is
    "a photo of" these."""
    captioned = (data.root / "captions.jsonl").is_file()
    captions, shown = read_captions(data.root) if captioned else {}, []
    for i, name in enumerate(data.ids):
        ids = tuple(int(v) for v in np.unique(data[i][1]) if v not in (0, IGNORE))
        if ids:
            classes = [data.taxonomy.all_names[v] for v in ids]
            photo = {"caption": f"a photo of {' and '.join(classes)}"}
            p = make_prompt(captions.get(name, photo)["caption"], classes, append)
            shown.append((i, Sample(name, p.text, p.class_prompt, p.classes, ids, i, 0)))
    if not shown:
        raise ValueError(
            f"none of the {len(data)} images of {data.root}/{data.split} holds an object; take "
            "more images"
        )
    return shown


def _read(
    generator: "Generator",
    data: SegmentationFolder,
    shown: list[Shown],
    settings: CalibrationSettings,
) -> list[Heat]:
    """Heat of the images by source. Images are resized to the generator's square; their maps are
    resized back later."""
    heat, side = [], generator.size
    for first in range(0, len(shown), settings.batch_size):
        batch = shown[first : first + settings.batch_size]
        images = np.stack([squared(data[i][0], side) for i, _ in batch])
        samples = [s for _, s in batch]
        heat += generator.read_real(images, samples, settings.timesteps, settings.seed)
    return heat


def _count(
    heat: list[Heat], data: SegmentationFolder, shown: list[Shown], grid: list[MaskSettings]
) -> np.ndarray:
    """Pixels [F, S, C, C + 1] (:func:`dd.masks.from_heat.count_grid`) of each fold of the
    images."""
    classes, folds = len(data.taxonomy), min(FOLDS, len(shown))
    total = np.zeros((folds, len(grid), classes, classes + 1), np.int64)
    for n, ((i, sample), maps) in enumerate(zip(shown, heat, strict=True)):
        image, truth = data[i]
        total[n % folds] += count_grid(maps, sample.class_ids, truth, grid, classes, image)
    return total


def _miou(counts_CU: np.ndarray) -> Any:
    return metrics.with_uncertain(torch.from_numpy(counts_CU))["miou"]


def _cross_validated(counts_FTCU: np.ndarray) -> float | None:
    """mIoU when each fold is scored with the choice made on the others: an estimate for unseen
    images."""
    if len(counts_FTCU) < 2:
        return None
    total = counts_FTCU.sum(0)
    unseen = [fold[int(np.argmax([_miou(c) for c in total - fold]))] for fold in counts_FTCU]
    return _miou(np.sum(unseen, 0))


def _paper(rows: list[dict[str, Any]]) -> float | None:
    """mIoU of the paper's fixed settings in the first reading, if the grid holds them."""
    paper = {k: v for k, v in MaskSettings().identity().items() if k != "band"}
    plain = (row for row in rows if "steps" not in row)
    return next((row["miou"] for row in plain if {k: row[k] for k in paper} == paper), None)
