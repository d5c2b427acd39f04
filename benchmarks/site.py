"""What each step without labels gains on the embedded example site: the runs of runs/site.sh ->
benchmarks/results/site.json.

    python -m benchmarks.site [--outputs outputs] [--data-root data] [--figure docs/site.png]

mIoU on the test images of shapes_shift for each arm and seed; arms whose runs are not there are
left out. ``--figure``: photographs, images of the plain and of the adapted generator for the same
prompts, and what two segmenters see in photographs.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.machine import machine
from dd.config import trained_run
from dd.data.datasets import SegmentationFolder, encode_image
from dd.report.pictures import contact_sheet, overlay
from dd.store.provenance import read_json, write_json
from dd.taxonomy import taxonomy
from dd.training.segmentation import Predictor

SITE, COLUMNS = "shapes_shift", 8
RESULT = Path(__file__).parent / "results" / "site.json"
ARMS = {  # name: (real labels, folder below outputs, runs of all seeds)
    "synthetic only": ("0", "shapes/synthetic/seed=*"),
    "adapted generator": ("0", "site/generator/seed=*"),
    "adapted generator, self-training, a third of the steps": (
        "0",
        "site/generator_segmenter/seed=*",
    ),
    "self-training on photographs": ("0", "site/segmenter/seed=*"),
    "as many steps more without photographs": ("0", "site/synthetic_longer/seed=*"),
    "self-training, a third of the steps": ("0", "site/segmenter_300/seed=*"),
    "self-training, as many steps more as with labels": ("0", "site/segmenter_longer/seed=*"),
    "self-training, 16 labels at random": ("16", "site/labels_16/seed=*"),
    "self-training, 16 labels of the queue": ("16", "site/labels_queue/seed=*"),
    "self-training, 64 labels at random": ("64", "site/labels_64/seed=*"),
    "16 labels only": ("16", "shapes/real_shapes_shift/shots=16,seed=*"),
    "64 labels only": ("64", "shapes/real_shapes_shift/shots=64,seed=*"),
    "all labels only": ("768", "shapes/real_shapes_shift/shots=all,seed=*"),
    "all labels only, as many steps as self-training": ("768", "site/real_longer/seed=*"),
}


def collect(outputs: Path) -> dict:
    """{arm: {"labels", "miou": {seed: mIoU}, "seconds": of training, by seed}}."""
    found = {}
    for arm, (labels, pattern) in ARMS.items():
        runs = {}
        for folder in sorted(outputs.glob(pattern)):
            path = folder / "eval" / SITE / "metrics.json"
            if path.is_file():
                measured, run = read_json(path), read_json(folder / "run.json")
                assert measured["weights_sha256"] == run["weights_sha256"], (
                    f"{path} is of another training"
                )
                runs[str(run["trained_on"]["seed"])] = (measured["miou"], run["seconds"])
        if runs:
            miou, seconds = (
                {seed: round(r[i], 2) for seed, r in sorted(runs.items())} for i in (0, 1)
            )
            found[arm] = {"labels": labels, "miou": miou, "seconds": seconds}
    return found


def figure(outputs: Path, data_root: Path) -> np.ndarray:
    """uint8 RGB [H, W, 3]."""
    classes, shown = (
        taxonomy("shapes"),
        SegmentationFolder(data_root / SITE, "tune", taxonomy("shapes")),
    )
    photos = [shown[i] for i in range(COLUMNS)]
    rows = {"photographs": [image for image, _ in photos]}
    for name, folder in (
        ("generator", "shapes"),
        ("adapted generator, the same prompts", "shapes_adapted"),
    ):
        images = SegmentationFolder(data_root / "synthetic" / folder, "train", classes)
        rows[name] = [images[i][0] for i in range(COLUMNS)]
    for name in ("synthetic only", "self-training on photographs"):
        predictor = Predictor(*trained_run(next(iter(sorted(outputs.glob(ARMS[name][1]))))))
        masks = predictor([image for image, _ in photos])
        rows[name] = [
            overlay(image, mask, classes.palette)
            for (image, _), mask in zip(photos, masks, strict=True)
        ]
    rows["exact masks"] = [overlay(image, mask, classes.palette) for image, mask in photos]
    return contact_sheet(list(rows.values()), 2, row_labels=list(rows))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.figure:
        options.figure.write_bytes(encode_image(figure(options.outputs, options.data_root), ".png"))
    arms = collect(options.outputs)
    write_json(RESULT, {"site": SITE, "arms": arms, **machine()})
    print(json.dumps(arms, indent=1))


if __name__ == "__main__":
    main()
