"""Attention read while drawing against attention read after drawing, on the embedded benchmark.

    python -m benchmarks.read_after [--tune 128] [--test 512] [--images 8] [--root data]

Real scenes with exact masks are noised and shown to the generator: ``sampling`` with their caption
at the four timesteps of ``evaluate.py stage=probe``; ``after`` with their class prompt in one
forward at each of several choices of timesteps. Timesteps, power and threshold of each are chosen
on ``tune``; mask mIoU on ``test`` is only reported, with 95 % intervals of the paired difference
over its images (percentile bootstrap, 2,000 draws). The words of the drawn prompt, read after
drawing in a second forward, are a row of their own. ``cost``: processor time of one thread for
drawing images with their attention, and for reading the finished ones. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.sweep import make_plan
from dd.data.datasets import SegmentationFolder
from dd.evaluation import metrics
from dd.generators import TextToImage
from dd.masks.from_heat import count_grid, settings_grid
from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.probe import real_heat
from dd.taxonomy import taxonomy

NOISED = [50, 150, 250, 350]
TIMES = [[25], [50], [100], [150], [200], [250], [350], NOISED]
POWERS = [0, 1, 2, 4]
THRESHOLDS = [0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6]
SETTINGS = {
    "guidance": 3.0,
    "steps": 20,
    "cross_resolution": 16,
    "self_resolution": 16,
    "max_power": max(POWERS),
    "full_prompt": "appended",
}


def counts(
    generator: TextToImage, data: SegmentationFolder, source: str, limit: int, noised: list[int]
) -> np.ndarray:
    """Pixels [N, S, C, C + 1] of each image and mask setting."""
    grid, _ = settings_grid(POWERS, THRESHOLDS, [0.0], [source])
    heat = real_heat(generator, data, noised, limit=limit)
    classes = len(data.taxonomy)
    return np.stack(
        [
            count_grid(maps, sample.class_ids, data[i][1], grid, classes)
            for i, (sample, maps) in enumerate(heat)
        ]
    )


def miou(counts_CU: np.ndarray) -> float:
    return float(metrics.with_uncertain(torch.from_numpy(counts_CU))["miou"])


def interval(one: np.ndarray, other: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % of the difference of two mIoUs of the same images, [N, C, C + 1] each."""
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        chosen = rng.integers(0, len(one), len(one))
        weights = np.bincount(chosen, minlength=len(one))
        found.append(miou(np.tensordot(weights, one, 1)) - miou(np.tensordot(weights, other, 1)))
    return tuple(float(v) for v in np.percentile(found, [2.5, 97.5]))


def variants() -> dict[str, tuple[dict, str]]:
    """{name: (settings of the generator, source)}."""
    found: dict[str, tuple[dict, str]] = {"sampling": ({}, "class_prompt")}
    for times in TIMES:
        after = {"reading": "after", "read_at": times}
        found[f"after, t={'+'.join(map(str, times))}"] = (after, "class_prompt")
        found[f"after, drawn prompt, t={'+'.join(map(str, times))}"] = (
            after,
            "full_prompt_appended",
        )
    return found


def cost(images: int) -> dict[str, float]:
    """Seconds of one thread an image: drawn and read; read after, of the finished images."""
    plan = make_plan(images)
    drawing = TextToImage(**SETTINGS | {"full_prompt": False})
    after = TextToImage(**SETTINGS | {"full_prompt": False, "reading": "after", "read_at": [100]})
    drawing.generate(plan[:1])
    pixels, _, _ = drawing.generate(plan, capture=False)
    seconds = {}
    for name, run in (
        ("drawn, without attention", lambda: drawing.generate(plan, capture=False)),
        ("drawn and read", lambda: drawing.generate(plan)),
        ("read after", lambda: after.read_real(pixels, plan, [])),
    ):
        started = time.process_time()
        run()
        seconds[name] = (time.process_time() - started) / images
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tune", type=int, default=128)
    parser.add_argument("--test", type=int, default=512)
    parser.add_argument("--images", type=int, default=8, help="of the cost")
    parser.add_argument("--root", help="where shapes is prepared (default: a temporary folder)")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        root = Path(options.root or temporary)
        prepare_shapes(root)
        tune, test = (
            SegmentationFolder(root / "shapes", split, taxonomy("shapes"))
            for split in ("tune", "test")
        )
        chosen: dict[str, dict] = {}
        grid, _ = settings_grid(POWERS, THRESHOLDS, [0.0], ["class_prompt"])
        for name, (settings, source) in variants().items():
            generator = TextToImage(**SETTINGS | settings)
            total = counts(generator, tune, source, options.tune, NOISED).sum(0)
            scores = [miou(c) for c in total]
            best = int(np.argmax(scores))
            chosen[name] = {
                "tune": scores[best],
                "power": grid[best].power,
                "threshold": grid[best].threshold,
                "setting": best,
            }
            print(
                f"{name:34} tune {scores[best]:.2f} (power {grid[best].power}, threshold "
                f"{grid[best].threshold})",
                flush=True,
            )
        kinds = {
            "sampling": ["sampling"],
            "after": [n for n in chosen if n.startswith("after, t=")],
            "after, drawn prompt": [n for n in chosen if n.startswith("after, drawn")],
        }
        best_of = {k: max(names, key=lambda n: chosen[n]["tune"]) for k, names in kinds.items()}
        per_image = {}
        for kind, name in best_of.items():
            settings, source = variants()[name]
            generator = TextToImage(**SETTINGS | settings)
            found = counts(generator, test, source, options.test, NOISED)
            per_image[kind] = found[:, chosen[name]["setting"]]
        result = {}
        for kind, one in per_image.items():
            row = {"variant": best_of[kind], "test": miou(one.sum(0)), "images": len(one)}
            if kind != "sampling":
                row["less_sampling"] = row["test"] - result["sampling"]["test"]
                row["interval"] = interval(one, per_image["sampling"])
            result[kind] = row
            print(kind, row, flush=True)
    seconds = cost(options.images)
    drawn = seconds["drawn and read"]
    for name, value in seconds.items():
        print(f"{name:28} {value:.3f} s an image, {value / drawn:.3f} of drawing and reading")
    print(json.dumps({"read_after": result, "tune": chosen, "seconds": seconds, **machine("cpu")}))


if __name__ == "__main__":
    main()
