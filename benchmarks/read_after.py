"""Attention read while drawing against attention read after drawing, on the embedded benchmark.

    python -m benchmarks.read_after [--tune 128] [--test 512] [--images 8] [--root data]
                                    [--judge outputs/a_run --drawn 128]

Real scenes with exact masks are noised and shown to the generator: ``sampling`` with their caption
at the four timesteps of ``evaluate.py stage=probe``; ``after`` with their class prompt in one
forward at each of several choices of timesteps. Timesteps, power and threshold of each are chosen
on ``tune``; mask mIoU on ``test`` is only reported, with 95 % intervals of the paired difference
over its images (percentile bootstrap, 2,000 draws). The words of the drawn prompt, read after
drawing in a second forward, are a row of their own. ``cost``: processor time of one thread for
drawing images with their attention, and for reading the finished ones. ``both``: the mean of the
two readings' heat, each map min-max normalised. ``weights``: the best reading after drawing with
GoCA's weights of heads and layers. With ``--judge``, a segmenter trained on real images,
``--drawn`` images are generated and read in all ways at once: mIoU of the masks, with the settings
chosen on ``tune``, against the judge's predictions. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.sweep import make_plan
from dd import config
from dd.data.datasets import SegmentationFolder
from dd.evaluation import metrics
from dd.generators import TextToImage
from dd.masks.from_heat import count_grid, settings_grid
from dd.masks.normalise import min_max
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
    "self_resolution": 32,
    "max_power": max(POWERS),
    "full_prompt": "appended",
}


def counts(
    generator: TextToImage, data: SegmentationFolder, source: str, limit: int, noised: list[int]
) -> np.ndarray:
    """Pixels [N, S, C, C + 1] of each image and mask setting; of the source "both" from the heat
    of both readings."""
    heat = real_heat(generator, data, noised, limit=limit)
    truth = (data[i][1] for i in range(len(heat)))
    return count(heat, truth, source, len(data.taxonomy))


def count(heat: list, truth: Iterable[np.ndarray], source: str, classes: int) -> np.ndarray:
    grid, _ = settings_grid(POWERS, THRESHOLDS, [0.0], ["class_prompt"])
    each = ({"class_prompt": source_of(maps, source)} for _, maps in heat)
    return np.stack(
        [
            count_grid(maps, sample.class_ids, mask, grid, classes)
            for (sample, _), maps, mask in zip(heat, each, truth, strict=True)
        ]
    )


def source_of(maps: dict[str, np.ndarray], source: str) -> np.ndarray:
    if source != "both":
        return maps[source]
    pair = [torch.from_numpy(maps[name]) for name in ("class_prompt", "after")]
    mean = sum(min_max(each.flatten(0, 1)) for each in pair) / 2
    return mean.view_as(pair[0]).numpy()


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


def joined(times: list[int]) -> dict[str, tuple[dict, str]]:
    """What is tried once the timesteps are chosen: both readings, and weights in place of plain
    means."""
    after = {"reading": "after", "read_at": times, "full_prompt": False}
    reference = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    return {
        "sampling, drawn prompt": ({}, "full_prompt_appended"),
        "both": ({"reading": "both", "read_at": times}, "both"),
        "after, weights of heads": (after | {"head_weights": True}, "class_prompt"),
        "after, weights of layers": (after | {"layer_weights": reference}, "class_prompt"),
        "after, both weights": (
            after | {"head_weights": True, "layer_weights": reference},
            "class_prompt",
        ),
    }


def agreement(
    run: str, number: int, times: list[int], chosen: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """mIoU of the masks of generated images against a judge's predictions, of each reading with
    its setting of the grid (``chosen``), and the paired difference to ``sampling``."""
    generator = TextToImage(**SETTINGS | {"reading": "both", "read_at": times})
    _, judge, views = config.trained_run(run)
    judge.eval()
    plan, heat, predicted = make_plan(number), [], []
    for first in range(0, number, 16):
        samples = plan[first : first + 16]
        images, maps, _ = generator.generate(samples)
        heat += zip(samples, maps, strict=True)
        shown = [views(image) for image in images]
        with torch.no_grad():
            predicted += views.predict(judge, shown, [image.shape[:2] for image in images])
        print(f"drawn {first + len(samples)} of {number}", flush=True)
    masks = [np.asarray(p, np.uint8) for p in predicted]
    sources = {
        "sampling": "class_prompt",
        "sampling, drawn prompt": "full_prompt_appended",
        "after": "after",
        "both": "both",
    }
    found: dict[str, dict[str, Any]] = {}
    per_image = {
        kind: count(heat, masks, source, len(taxonomy("shapes")))[:, chosen[kind]]
        for kind, source in sources.items()
    }
    for kind, one in per_image.items():
        found[kind] = {"agreement": miou(one.sum(0)), "images": number}
        if kind != "sampling":
            first = found["sampling"]["agreement"]
            found[kind]["less_sampling"] = found[kind]["agreement"] - first
            found[kind]["interval"] = interval(one, per_image["sampling"])
        print("agreement,", kind, found[kind], flush=True)
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
    parser.add_argument("--judge", help="a run trained on real images, for generated ones")
    parser.add_argument("--drawn", type=int, default=128, help="images for the judge")
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
        tried = variants()

        def choose(name: str) -> None:
            settings, source = tried[name]
            generator = TextToImage(**SETTINGS | settings)
            total = counts(generator, tune, source, options.tune, NOISED).sum(0)
            scores = [miou(c) for c in total]
            best = int(np.argmax(scores))
            power, threshold = grid[best].power, grid[best].threshold
            chosen[name] = {"tune": scores[best], "power": power, "threshold": threshold}
            chosen[name]["setting"] = best
            print(
                f"{name:34} tune {scores[best]:.2f} (power {power}, threshold {threshold})",
                flush=True,
            )

        grid, _ = settings_grid(POWERS, THRESHOLDS, [0.0], ["class_prompt"])
        for name in tried:
            choose(name)
        kinds = {
            "sampling": ["sampling"],
            "after": [n for n in chosen if n.startswith("after, t=")],
            "after, drawn prompt": [n for n in chosen if n.startswith("after, drawn")],
        }
        best_of = {k: max(names, key=lambda n: chosen[n]["tune"]) for k, names in kinds.items()}
        times = tried[best_of["after"]][0]["read_at"]
        further = joined(times)
        tried |= further
        for name in further:
            choose(name)
        best_of |= {name: name for name in further}
        per_image = {}
        for kind, name in best_of.items():
            settings, source = tried[name]
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
        agreed = None
        if options.judge:
            settings = {kind: chosen[name]["setting"] for kind, name in best_of.items()}
            agreed = agreement(options.judge, options.drawn, times, settings)
    seconds = cost(options.images)
    drawn = seconds["drawn and read"]
    for name, value in seconds.items():
        print(f"{name:28} {value:.3f} s an image, {value / drawn:.3f} of drawing and reading")
    found = {"read_after": result, "tune": chosen, "agreement": agreed, "seconds": seconds}
    print(json.dumps({**found, **machine("cpu")}))


if __name__ == "__main__":
    main()
