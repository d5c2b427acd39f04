"""Which classes of a prompt does an image show? Tests that need no label, on scenes with masks.

    python -m benchmarks.presence [--split tune] [--scenes 128] [--root data]
                                  [--generators embedded,embedded_mmdit]

Each real scene is read twice: with the classes of its caption, and with one more that it does not
show, at a random place. Of every class the table has signals of the heat (contrast of its map,
agreement of the masks of two readings) and of its word (``evidence``, ``evidence_alone``:
dd/masks/presence.py): the area under the ROC curve, 0.5 is chance, with a 95 % interval over the
scenes; precision and recall of "not there" at the threshold that no label chose (evidence 0). Then
masks: the refined chain, the same with the presence test, with the right answer in its place, and
with powers by class (``elbo``). The last line is JSON.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from benchmarks.embedded_masks import NOISED, composed, confusions
from benchmarks.machine import machine
from dd import config
from dd.data.datasets import SegmentationFolder, read_captions
from dd.evaluation.statistics import Score, interval, miou
from dd.masks.from_heat import MaskSettings, to_mask
from dd.masks.presence import NUMBERS
from dd.prompts.prompt import make_prompt
from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.probe import Read
from dd.store.samples import Sample
from dd.taxonomy import taxonomy

TIMES = [200, 400, 600, 800, 900]
BATCH = 32
DRAWS = 1000


def asked(data: SegmentationFolder, scenes: int, more: int) -> list[Sample]:
    """Each scene with the classes of its caption, and ``more`` that it does not show."""
    captions, rng = read_captions(data.root), np.random.default_rng(0)
    samples = []
    for i, name in enumerate(data.ids[:scenes]):
        caption, classes = captions[name]["caption"], list(captions[name]["classes"])
        others = [c for c in data.taxonomy.names if c not in classes]
        for extra in rng.choice(others, more, replace=False):
            classes.insert(rng.integers(len(classes) + 1), str(extra))
        p = make_prompt(caption, tuple(classes))
        ids = tuple(data.taxonomy.ids(p.classes))
        samples.append(Sample(name, p.text, p.class_prompt, p.classes, ids, seed=i, unit=0))
    return samples


def read(generator: Any, data: SegmentationFolder, samples: list[Sample]) -> list[Read]:
    heat: list[Read] = []
    for first in range(0, len(samples), BATCH):
        part = samples[first : first + BATCH]
        images = np.stack([data[first + i][0] for i in range(len(part))])
        heat += zip(part, generator.read_real(images, part, NOISED), strict=True)
    return heat


def signals(
    heat: list[Read], data: SegmentationFolder, refined: MaskSettings
) -> dict[str, np.ndarray]:
    """Of every class of every scene: each signal, ``there`` (whether it has a pixel) and
    ``scene``."""
    rows: dict[str, list[Any]] = {}
    for i, (sample, maps) in enumerate(heat):
        image, truth = data[i]
        each = [
            to_mask(maps, sample.class_ids, truth.shape, s, image)
            for s in (refined, refined.model_copy(update={"source": "after"}))
        ]
        for k, value in enumerate(sample.class_ids):
            one, other = (m == value for m in each)
            own = {
                "contrast while drawing": np.ptp(maps["class_prompt"][k, 0]),
                "contrast after": np.ptp(maps["after"][k, 0]),
                "agreement of the readings": (one & other).sum() / max(1, (one | other).sum()),
                **{source: maps[source][k].item() for source in NUMBERS},
                "there": bool((truth == value).any()),
                "scene": i,
            }
            for name, number in own.items():
                rows.setdefault(name, []).append(number)
    return {name: np.array(values) for name, values in rows.items()}


def area(values: np.ndarray, there: np.ndarray) -> float:
    """Under the ROC curve."""
    ranks, positive = rankdata(values), there.sum()
    above = ranks[there].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (~there).sum()))


def area_interval(found: dict[str, np.ndarray], name: str, scenes: int) -> list[float]:
    """The area and its 95 % interval over the scenes."""
    rng = np.random.default_rng(0)
    rows = [np.flatnonzero(found["scene"] == i) for i in range(scenes)]
    drawn = []
    for _ in range(DRAWS):
        chosen = np.concatenate([rows[i] for i in rng.integers(scenes, size=scenes)])
        drawn.append(area(found[name][chosen], found["there"][chosen]))
    whole = area(found[name], found["there"])
    return [whole, *map(float, np.percentile(drawn, [2.5, 97.5]))]


def chains(refined: MaskSettings) -> dict[str, MaskSettings]:
    steps = [step.plain() for step in refined.steps]
    by_class = [{"normalise": "elbo"} if "normalise" in s else s for s in steps]
    return {
        "refined": refined,
        "refined, presence": MaskSettings(steps=[{"presence": "evidence"}, *steps], band=0.0),
        "refined, powers by class": MaskSettings(steps=by_class, band=0.0),
    }


def known(heat: list[Read], data: SegmentationFolder) -> list[Read]:
    """The same heat without the classes that a scene does not show."""
    found = []
    for i, (sample, maps) in enumerate(heat):
        truth = data[i][1]
        there = [k for k, value in enumerate(sample.class_ids) if (truth == value).any()]
        ids = tuple(sample.class_ids[k] for k in there)
        own = replace(sample, classes=tuple(sample.classes[k] for k in there), class_ids=ids)
        found.append((own, {source: m[there] for source, m in maps.items()}))
    return found


def measure(name: str, data: SegmentationFolder, scenes: int) -> dict[str, Any]:
    given = [f"diffusion={name}", "diffusion.reading=both", f"diffusion.word_errors={TIMES}"]
    cfg = composed(*given, "diffusion.full_prompt=false")
    torch.manual_seed(0)
    generator = config.instantiate(cfg.diffusion)
    refined = config.instantiate(cfg.masks).certain()
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"generator": name, "scenes": scenes, "masks": rows}
    print(f"{name}, {scenes} scenes of {data.split}", flush=True)
    for more, what in ((1, "one class too many"), (0, "as captioned")):
        heat = read(generator, data, asked(data, scenes, more))
        if more:
            found = signals(heat, data, refined)
            kinds = [n for n in found if n not in ("there", "scene")]
            result["area"] = {n: area_interval(found, n, scenes) for n in kinds}
            absent, called = ~found["there"], found["evidence"] <= 0
            result["precision"] = float((absent & called).sum() / max(1, called.sum()))
            result["recall"] = float((absent & called).sum() / absent.sum())
            result["classes"] = {"there": int((~absent).sum()), "not there": int(absent.sum())}
            for n, (value, low, high) in result["area"].items():
                print(f"  area {value:.3f} [{low:.3f}, {high:.3f}]  {n}", flush=True)
            print(
                f"  evidence <= 0: precision {result['precision']:.2f}, recall "
                f"{result['recall']:.2f}, {result['classes']}",
                flush=True,
            )
        tried = {n: (heat, s) for n, s in chains(refined).items()}
        tried["refined, told what is there"] = (known(heat, data), refined)
        first = None
        for chain, (seen, settings) in tried.items():
            counts = confusions(seen, data, settings)
            score = {0: Score(float(miou(counts.sum(0))), counts)}
            first = first or score
            row = {"asked": what, "chain": chain, "miou": score[0].miou}
            pair = interval(score, first)
            row["less_refined"] = [pair.value, pair.low, pair.high]
            print(
                f"  {what:20} {chain:30} {score[0].miou:5.1f}  {pair.value:+.1f} "
                f"[{pair.low:+.1f}, {pair.high:+.1f}]",
                flush=True,
            )
            rows.append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", default="tune")
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--root", help="where shapes is prepared (default: a temporary folder)")
    parser.add_argument("--generators", default="embedded,embedded_mmdit")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    with TemporaryDirectory() as temporary:
        root = Path(options.root or temporary)
        prepare_shapes(root)
        data = SegmentationFolder(root / "shapes", options.split, taxonomy("shapes"))
        scenes = min(options.scenes, len(data.ids))
        rows = [measure(name, data, scenes) for name in options.generators.split(",")]
    print(json.dumps({"split": options.split, "rows": rows, **machine("cpu")}))


if __name__ == "__main__":
    main()
