"""Stage: a few labelled real images choose the mask settings. They are noised and shown to the
generator, its attention is read as in generation, and the settings win whose masks fit best.
These labels count as used (docs/sweeps.md)."""

from copy import deepcopy  # YAML writes a list that stands in two places as a reference
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from dd.data.datasets import SegmentationFolder, choose_source, read_captions, read_split
from dd.evaluation import metrics
from dd.evaluation.supervision import declared, label_set
from dd.masks.threshold import READING, MaskSettings, count_grid, scores, settings_grid
from dd.prompts.prompt import make_prompt
from dd.store.provenance import sweep_beside, write_atomic, write_json
from dd.store.samples import Sample
from dd.taxonomy import IGNORE

FOLDS = 5


def calibrate(
    path,
    make_generator,
    readings: list[dict],
    data: SegmentationFolder,
    test_split: str | None,
    timesteps,
    seed: int = 0,
    powers=None,
    thresholds=(0.4, 0.5, 0.6),
    sources=None,
    band: float = 0.1,
    append: bool = True,
    batch_size: int = 8,
    name: str | None = None,
) -> dict:
    """Choose power, threshold, source and, of ``readings``, how the attention is read. Writes the
    choice to ``path`` (YAML in the shape of conf/generate.yaml, for ``masks_from``) and all that
    was tried to ``.json`` beside it; returns the choice.

    ``data``: the labelled images; ``make_generator(**reading)`` makes the generator of a reading
    (such as ``{"cross_resolution": 16}``). The highest mIoU wins, uncertain pixels counted as
    background; the width of the band does not change it, so ``band`` stays as given. ``powers`` and
    ``sources``: None = all there are. ``name``: what the data are called in records, None = their
    folder's name. ValueError if an image belongs to ``test_split``, where nothing is chosen, or if
    no image holds an object.
    """
    sweep_beside(path, Path(path).with_suffix(".json"))
    _refuse_test(data, test_split)
    shown, tried, counts = _shown(data, append), [], []
    for reading in readings:
        generator = make_generator(**reading)
        heat = _read(generator, data, shown, timesteps, seed, batch_size)
        settings = _settings(heat[0], powers, thresholds, band, sources)
        identity = generator.identity()
        tried += [
            ({k: identity.get(k) for k in READING}, s) for s in settings
        ]  # a generator names what is not its default
        counts.append(_count(heat, data, shown, settings))
    counts_FTCU = np.concatenate(counts, 1)  # F folds, T tries: readings and settings
    rows = [
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
        "seed": seed,
        "ids": list(data.ids),
        "without_object": len(data) - len(shown),
        "timesteps": list(timesteps),
        "miou": rows[best]["miou"],
        "miou_cross_validated": _cross_validated(counts_FTCU),
        "miou_paper_settings": _paper(rows),
        "generator": {"weights_sha256": identity["weights_sha256"], **deepcopy(reading)},
    }
    labels = label_set(f"{name or data.root.name}/{data.split}", len(data), seed)
    content = {
        "masks": chosen.identity(),
        "diffusion": reading,
        "chosen_on": declared([labels]),
        "calibration": calibration,
    }
    table = sorted(rows, key=lambda row: -row["miou"])
    write_json(Path(path).with_suffix(".json"), {**content, "table": table})
    head = (
        f"# Mask settings chosen by {len(data)} labelled images. Use: python generate.py ... "
        f"masks_from={path}\n"
    )
    write_atomic(path, head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return content


def _refuse_test(data, test_split):
    if test_split is None:
        return
    known = (data.root / "ImageSets" / "Segmentation" / f"{test_split}.txt").is_file()
    tested = (
        data.ids
        if data.split == test_split
        else set(read_split(data.root, test_split))
        if known
        else ()
    )
    shared = [name for name in data.ids if name in tested]
    if shared:
        raise ValueError(
            f"calibrate.split={data.split}: {len(shared)} of the {len(data)} images belong to the "
            f"test split {test_split!r}, "
            f"such as {shared[0]}. Nothing is chosen on images that are reported; take another "
            "split"
        )


def _shown(data, append) -> list[tuple[int, Sample]]:
    """(index, sample) of the images with an object: their classes are those of their masks,
    their captions, if there are none, "a photo of" these."""
    captions, shown = (
        read_captions(data.root) if (data.root / "captions.jsonl").is_file() else {},
        [],
    )
    for i, name in enumerate(data.ids):
        ids = [int(v) for v in np.unique(data[i][1]) if v not in (0, IGNORE)]
        if ids:
            classes = [data.taxonomy.all_names[v] for v in ids]
            caption = (
                captions[name]["caption"]
                if name in captions
                else f"a photo of {' and '.join(classes)}"
            )
            prompt = make_prompt(caption, classes, append)
            shown.append(
                (
                    i,
                    Sample(
                        name,
                        prompt.text,
                        prompt.class_prompt,
                        prompt.classes,
                        tuple(ids),
                        seed=i,
                        unit=0,
                    ),
                )
            )
    if not shown:
        raise ValueError(
            f"none of the {len(data)} images of {data.root}/{data.split} holds an object; take "
            "more images"
        )
    return shown


def _read(generator, data, shown, timesteps, seed, batch_size) -> list[dict[str, np.ndarray]]:
    """Heat of the images by source. They are resized to the generator's square; their maps are
    later resized back."""
    heat, square = [], (generator.size, generator.size)
    for first in range(0, len(shown), batch_size):
        batch = shown[first : first + batch_size]
        images = [
            Image.fromarray(data[i][0]).resize(square, Image.Resampling.BICUBIC) for i, _ in batch
        ]
        heat += generator.read_real(
            np.stack([np.asarray(i) for i in images]), [s for _, s in batch], timesteps, seed
        )
    return heat


def _settings(heat, powers, thresholds, band, sources) -> list[MaskSettings]:
    """The grid, once the first image's heat has shown that its sources and powers can be read."""
    there = list(range(next(iter(heat.values())).shape[1]))
    powers, sources = (
        there if powers is None else powers,
        list(heat) if sources is None else sources,
    )
    settings, _ = settings_grid(powers, thresholds, [band], sources)
    for s in settings:
        scores(choose_source(heat, s.source, "this reading"), s.power, (1, 1))
    return settings


def _count(heat, data, shown, settings) -> np.ndarray:
    """Pixels [F, S, C, C + 1] (:func:`dd.masks.threshold.count_grid`) of each fold of the
    images."""
    classes, folds = len(data.taxonomy), min(FOLDS, len(shown))
    total = np.zeros((folds, len(settings), classes, classes + 1), np.int64)
    for n, ((i, sample), maps) in enumerate(zip(shown, heat, strict=True)):
        total[n % folds] += count_grid(maps, sample.class_ids, data[i][1], settings, classes)
    return total


def _miou(counts_CU) -> float:
    return metrics.with_uncertain(torch.from_numpy(counts_CU))["miou"]


def _cross_validated(counts_FTCU) -> float | None:
    """mIoU when each fold is scored with the choice of the others: what the choice is worth on
    images it has not seen."""
    if len(counts_FTCU) < 2:
        return None
    total, unseen = counts_FTCU.sum(0), 0
    for fold in counts_FTCU:
        others = [_miou(c) for c in total - fold]
        unseen = unseen + fold[int(np.argmax(others))]
    return _miou(unseen)


def _paper(rows) -> float | None:
    """mIoU of the paper's fixed settings in the first reading, if the grid holds them."""
    paper = {k: v for k, v in MaskSettings().identity().items() if k != "band"}
    return next((row["miou"] for row in rows if {k: row[k] for k in paper} == paper), None)
