"""Do intervals from a few labelled images hold the truth as often as they say, and what does the
agreement of two readings add? On the embedded world, whose masks are known.

    python -m benchmarks.few_labels [--images 768] [--draws 2000] [--root data]

Real scenes of ``train`` are noised and shown to the embedded generator, read as while drawing and
after it; masks of both by ``masks=refined``. The first reading's masks are what is judged, their
agreement with the second's predicts. ``--draws`` times k scenes are drawn as labelled ones: share
of the 95 % intervals that hold the mIoU of all scenes (with and without predictions), length of the
interval beside the plain one, correlation, and how often the predictions were used. Then the
reliability of the agreement over all scenes, in tenths. The last line is JSON.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.read_after import NOISED
from dd import config
from dd.data.datasets import SegmentationFolder
from dd.evaluation import few_labels
from dd.masks.from_heat import to_mask
from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.probe import real_heat
from dd.taxonomy import taxonomy

LABELLED = (50, 100, 200)


def compared(data: SegmentationFolder, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(sums [N, C, 2] of the masks against exact ones, against those of the second reading)."""
    given = ["experiment=shapes", "masks=refined", "diffusion.reading=both", "device=cpu"]
    cfg = config.compose("generate", [*given, "diffusion.full_prompt=false"])
    generator, masks = config.instantiate(cfg.diffusion), config.instantiate(cfg.masks)
    other = masks.model_copy(update={"source": "after"})
    true, predicted = [], []
    for i, (sample, maps) in enumerate(real_heat(generator, data, NOISED, limit=limit)):
        image, truth = data[i]
        pair = [to_mask(maps, sample.class_ids, truth.shape, s, image) for s in (masks, other)]
        true.append(few_labels.sums(pair[0], truth, len(data.taxonomy)))
        predicted.append(few_labels.sums(*pair, len(data.taxonomy)))
    return np.stack(true), np.stack(predicted)


def drawn(
    true: np.ndarray, predicted: np.ndarray, number: int, draws: int, seed: int = 0
) -> dict[str, Any]:
    rng, rows = np.random.default_rng(seed), []
    for _ in range(draws):
        chosen = rng.choice(len(true), number, replace=False)
        found = few_labels.estimate(true[chosen], chosen, predicted)
        total = true[:, list(found.classes)].sum(0)
        target = 100 * float((total[:, 0] / total[:, 1]).mean())
        held = found.low <= target <= found.high, found.plain_low <= target <= found.plain_high
        plain = found.plain_high - found.plain_low
        length = (found.high - found.low) / plain
        rows.append([*held, length, plain / 2, found.correlation, found.used])
    names = "held", "held_plain", "length_over_plain", "plain_half", "correlation", "used"
    means = np.nanmean(np.array(rows, float), 0).tolist()
    return {"labelled": number, "draws": draws, **dict(zip(names, means, strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--root", help="where shapes is prepared (default: a temporary folder)")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    with TemporaryDirectory() as temporary:
        root = Path(options.root or temporary)
        prepare_shapes(root)
        data = SegmentationFolder(root / "shapes", "train", taxonomy("shapes"))
        true, predicted = compared(data, options.images)
    rows = [
        drawn(true, predicted, number, options.draws)
        for number in LABELLED
        if number < options.images
    ]
    for row in rows:
        print(
            f"{row['labelled']:4} labelled of {len(true)}: held {100 * row['held']:.1f} % (plain "
            f"{100 * row['held_plain']:.1f} %), length {row['length_over_plain']:.2f} of the plain "
            f"one's ± {row['plain_half']:.1f}, correlation {row['correlation']:.2f}, used in "
            f"{100 * row['used']:.0f} %"
        )
    agreement, quality = few_labels.image_miou(predicted), few_labels.image_miou(true)
    order = np.argsort(agreement, kind="stable")
    curve = [
        {"agreement": float(agreement[part].mean()), "miou": float(quality[part].mean())}
        for part in np.array_split(order, 10)
    ]
    for point in curve:
        print(f"images that agree by {point['agreement']:5.1f}: mIoU {point['miou']:5.1f}")
    print(json.dumps({"few_labels": rows, "reliability": curve, **machine("cpu")}))


if __name__ == "__main__":
    main()
