"""Stage: measure a generator's attention. Real scenes with exact masks are noised and shown to it,
the attention is read as in generation, and the masks are compared. This is the quickest honest
measure, since no image is generated."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from dd.data.datasets import SegmentationFolder, read_captions
from dd.evaluation import metrics
from dd.masks.from_heat import SOURCES, MaskSettings, to_mask
from dd.prompts.prompt import make_prompt
from dd.store.provenance import read_own, write_json
from dd.store.samples import Sample

if TYPE_CHECKING:  # loads heavy libraries
    from dd.generators.base import Generator

Read: TypeAlias = tuple[Sample, dict[str, np.ndarray]]  # its heat by source


def real_heat(
    generator: "Generator",
    data: SegmentationFolder,
    timesteps: list[int],
    batch_size: int = 32,
    append: bool = True,
    limit: int | None = None,
) -> list[Read]:
    """Heat of the real images of ``data`` (by source), noised to ``timesteps``, with their own
    captions as prompts."""
    captions, names = read_captions(data.root), data.ids[:limit]
    heat: list[Read] = []
    for first in range(0, len(names), batch_size):
        samples, images = [], []
        for i, name in enumerate(names[first : first + batch_size], first):
            p = make_prompt(captions[name]["caption"], captions[name]["classes"], append)
            ids = tuple(data.taxonomy.ids(p.classes))
            samples.append(Sample(name, p.text, p.class_prompt, p.classes, ids, seed=i, unit=0))
            images.append(data[i][0])
        maps = generator.read_real(np.stack(images), samples, timesteps)
        heat += zip(samples, maps, strict=True)
    return heat


def score(heat: list[Read], data: SegmentationFolder, settings: MaskSettings) -> torch.Tensor:
    """Confusion of masks read from ``heat`` with the exact ones. Pixels that would be left
    uncertain are decided (:meth:`dd.masks.from_heat.MaskSettings.certain`), so that nothing is
    hidden."""
    certain = settings.certain()
    confusion = metrics.confusion_matrix(len(data.taxonomy))
    for i, (sample, maps) in enumerate(heat):
        image, truth = data[i]
        height, width = truth.shape
        mask = to_mask(maps, sample.class_ids, (height, width), certain, image)
        pair = (torch.from_numpy(m.astype(np.int64))[None] for m in (mask, truth))
        confusion.update(*pair)
    return confusion.compute()


def probe(
    path: str | Path,
    generator: "Generator",
    data: SegmentationFolder,
    settings: MaskSettings,
    timesteps: list[int],
    append: bool = True,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure ``settings`` on ``data``, and the effect of another power or other words
    (``ablations``: mask mIoU of each available power and source, at the same threshold). On a tune
    split, also a grid of powers and thresholds to choose from.

    Writes ``path`` (JSON) with the mask mIoU and returns its content; a file of the same
    measurement is kept.
    """
    head = {
        "data": data.root.name,
        "split": data.split,
        "content": data.content(),
        "num_images": len(data.ids[:limit]),
        "timesteps": list(timesteps),
        "append": append,
        "masks": {k: v for k, v in settings.identity().items() if k != "band"},
        "generator": generator.identity(),
    }
    if Path(path).is_file():
        there = read_own(path, {})
        if {k: there.get(k) for k in head} == head:
            return there
    heat = real_heat(generator, data, timesteps, append=append, limit=limit)

    def miou(**changed: Any) -> float:
        return metrics.miou(score(heat, data, settings.model_copy(update=changed)))

    powers, sources = range(heat[0][1][settings.source].shape[1]), heat[0][1]
    result = {**head, **metrics.summarise(score(heat, data, settings), data.taxonomy.all_names)}
    result["ablations"] = {
        **{
            f"power={p}": miou(power=p)
            for p in powers
            if settings.one_power and p != settings.power
        },
        **{
            f"attention={s}": miou(source=s)
            for s in sources
            if s in SOURCES and s != settings.source
        },
    }
    if data.split == "tune" and settings.one_power and settings.on_edges:
        result["grid"] = {
            f"power={power},threshold={threshold}": miou(power=power, threshold=threshold, band=0.0)
            for power in powers
            for threshold in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
        }
    write_json(path, result)
    return result
