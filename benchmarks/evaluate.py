"""What counting costs in an evaluation: the confusion matrix of a set of VOC val's size, counted by
three in one run.

    python -m benchmarks.evaluate [--images 1449] [--network 4] [--device cuda]

Predictions and labels of 21 classes at original size, some 500x375 pixels, labels partly 255, lie
ready. They are counted, in turns of ``--batch`` images, by dd.stages.score (each image's own
matrix is kept), by torchmetrics' MulticlassConfusionMatrix (the batch at once) and by
mmsegmentation's IoUMetric. The matrices must be equal. Then DeepLabV3 R50 evaluates ``--network``
images read from disk: the share of each part of the work. The last line is JSON.
"""

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from benchmarks.machine import machine
from benchmarks.voc import CLASSES, labels, write_voc
from dd.data.datasets import SegmentationFolder
from dd.evaluation import metrics
from dd.segmenters.deeplabv3 import DeepLabV3
from dd.stages.score import PerImage
from dd.store.provenance import write_json
from dd.taxonomy import taxonomy
from dd.training.datamodule import whole_loader
from dd.training.segmentation import Views, to_device

SIZE = (375, 500)
DRAWN = 64  # masks; the images of the set repeat them


class Clock:
    """Seconds spent in named parts, the device's work included."""

    def __init__(self, device: str):
        self.device, self.seconds = device, {}

    def __call__(self, name: str, run):
        started = time.perf_counter()
        found = run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        return found


def draw(number: int, device: str) -> tuple[list, list]:
    """``number`` predictions and labels, int64 as argmax and the loader give them: one image's
    mask and another's."""
    masks = [
        torch.from_numpy(labels(np.random.default_rng([1, i]), SIZE).astype(np.int64))
        for i in range(number)
    ]
    predictions = [masks[i - 1].where(masks[i - 1] != 255, 0) for i in range(number)]
    return [p.to(device) for p in predictions], [m.to(device) for m in masks]


def count(images: int, batch: int, device: str) -> dict[str, float]:
    """Seconds that each of the three took for ``images``; RuntimeError if they do not agree."""
    from mmseg.evaluation.metrics import IoUMetric  # after the placeholder for compiled operations

    predictions, masks = draw(min(images, DRAWN), device)
    ours, theirs = (
        PerImage(CLASSES),
        MulticlassConfusionMatrix(CLASSES, ignore_index=255, validate_args=False).to(device),
    )
    runner, clock = IoUMetric(), Clock(device)
    runner.dataset_meta = {"classes": [str(c) for c in range(CLASSES)]}
    for first in range(0, images, batch):
        chosen = [i % len(masks) for i in range(first, min(first + batch, images))]
        shown, truth = [predictions[i] for i in chosen], [masks[i] for i in chosen]
        samples = [
            {"pred_sem_seg": {"data": p[None]}, "gt_sem_seg": {"data": m[None]}}
            for p, m in zip(shown, truth, strict=True)
        ]
        stacked = torch.stack(shown), torch.stack(truth)
        clock("ours", lambda shown=shown, truth=truth: ours.update(shown, truth))
        clock("torchmetrics", lambda stacked=stacked: theirs.update(*stacked))
        clock(
            "mmsegmentation",
            lambda samples=samples: [runner.process({}, [sample]) for sample in samples],
        )
    whole, hits = theirs.compute().cpu(), sum(row[0].long() for row in runner.results)
    if (
        not torch.equal(ours.compute(), whole)
        or not torch.equal(hits, whole.diag())
        or len(ours.images) != images
    ):
        raise RuntimeError("the three counts differ")
    return clock.seconds


def parts(images: int, batch: int, device: str, depth: int, short_side: int) -> dict[str, float]:
    """Seconds of the parts of an evaluation of ``images`` images from disk, one process, as
    dd.stages.score does it."""
    clock, confusion, views = Clock(device), PerImage(CLASSES), Views(short_side)
    network = DeepLabV3(CLASSES, depth=depth).to(device).eval()

    def forward(shown):
        return clock("network", lambda: network(shown))

    with TemporaryDirectory() as folder, torch.no_grad():
        data = SegmentationFolder(write_voc(folder, images, "val"), "val", taxonomy("voc"))
        loader = iter(whole_loader(data, views, batch))
        for _ in range(-(-images // batch)):
            shown, masks = clock("reading", lambda: next(loader))
            shown, sizes = to_device(shown, device), [tuple(m.shape) for m in masks]
            found = clock(
                "predicting", lambda shown=shown, sizes=sizes: views.predict(forward, shown, sizes)
            )
            clock(
                "counting",
                lambda found=found, masks=masks: confusion.update(found, to_device(masks, device)),
            )
    metrics.miou(confusion.compute())
    seconds = clock.seconds
    seconds["resizing and argmax"] = seconds.pop("predicting") - seconds["network"]
    return seconds


def main(arguments=None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--images", type=int, default=1449, help="images that are counted")
    parser.add_argument("--network", type=int, default=4, help="images that go through the network")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--depth", type=int, default=50, choices=(18, 50, 101))
    parser.add_argument(
        "--size", type=int, default=512, help="short side of the images that the network sees"
    )
    parser.add_argument("--output", help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    for key in ("images", "network", "batch", "size"):
        if getattr(options, key) < 1:
            parser.error(f"--{key} {getattr(options, key)}: use 1 or more")
    seconds = count(options.images, options.batch, options.device)
    each = parts(options.network, options.batch, options.device, options.depth, options.size)
    whole = sum(each.values())
    result = {
        "images": options.images,
        "classes": CLASSES,
        "batch": options.batch,
        "milliseconds_an_image": {
            k: round(1000 * s / options.images, 3) for k, s in seconds.items()
        },
        "torchmetrics_over_ours": round(seconds["torchmetrics"] / seconds["ours"], 2),
        "mmsegmentation_over_ours": round(seconds["mmsegmentation"] / seconds["ours"], 2),
        "network": {"depth": options.depth, "short_side": options.size, "images": options.network},
        "share_percent": {k: round(100 * s / whole, 2) for k, s in each.items()},
        "outside_the_network_percent": round(100 * (1 - each["network"] / whole), 2),
        "load": round(os.getloadavg()[0], 2),
        **machine(options.device),
    }
    print(f"counting an image, in milliseconds: {result['milliseconds_an_image']}")
    print(f"an evaluation's parts, in percent: {result['share_percent']}")
    if options.output:
        write_json(Path(options.output), result)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
