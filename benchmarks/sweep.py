"""A hundred mask settings on stored heat against generating the images a hundred times, measured
side by side.

    python -m benchmarks.sweep [--samples 500] [--generated 16]

Generation is timed on ``--generated`` images of the embedded generator, attention recorded, and
scaled to ``--samples``. The sweep is timed whole, in one process: reading files, masks, confusion,
on ``--samples`` samples of the sizes that generator stores (random heat of 9 powers, random
reference masks). A few samples also go through whole masks, one setting at a time. The last line is
JSON.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.numpy import save_file

from benchmarks.machine import seconds
from dd.data.datasets import encode_image, encode_mask, read_mask, stored_heat
from dd.evaluation import metrics
from dd.generators import TextToImage
from dd.masks.from_heat import MaskSettings, to_mask
from dd.stages.sweep import SweepSettings, sweep
from dd.store.provenance import sha256, write_json
from dd.store.samples import Sample, append_records, plan_lines
from dd.taxonomy import taxonomy

SHAPES, POWERS, HEAT, SIZE = taxonomy("shapes"), 9, 16, 64
GRID = {
    "power": [0, 1, 2, 4, 8],
    "threshold": [0.3 + 0.05 * i for i in range(10)],
    "band": [0.0, 0.1],
}
ONE_BY_ONE = 5  # samples


def make_plan(number: int) -> list[Sample]:
    rng, plan = np.random.default_rng(0), []
    for i in range(number):
        ids = tuple(
            int(v)
            for v in 1
            + rng.permutation(len(SHAPES.names))[: rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])]
        )
        names = tuple(SHAPES.all_names[v] for v in ids)
        words = " ".join(names)
        plan.append(
            Sample(
                f"{i:06d}",
                f"a photo of {' and '.join(names)}; {words}",
                words,
                names,
                ids,
                seed=i,
                unit=0,
            )
        )
    return plan


def write_set(folder: Path, plan: list[Sample]) -> Path:
    """A synthetic set of random images and heat; returns the folder of its random reference
    masks."""
    rng, reference = np.random.default_rng(1), folder / "reference"
    for part in (reference, folder / "heat", folder / "JPEGImages"):
        part.mkdir(parents=True)
    for s in plan:
        heat = rng.random((len(s.classes), POWERS, HEAT, HEAT)).astype(np.float32)
        save_file({"class_prompt": heat}, folder / "heat" / f"{s.id}.safetensors")
        image = encode_image(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8), ".png")
        (folder / "JPEGImages" / f"{s.id}.png").write_bytes(image)
        mask = (
            rng.choice([0, *s.class_ids], (8, 8))
            .astype(np.uint8)
            .repeat(SIZE // 8, 0)
            .repeat(SIZE // 8, 1)
        )
        (reference / f"{s.id}.png").write_bytes(encode_mask(mask))
        made = sha256(folder / "heat" / f"{s.id}.safetensors")
        append_records(
            folder, "0", [{"id": s.id, "heat_sha256": made, "image_sha256": sha256(image)}]
        )
    (folder / "plan.jsonl").write_text("".join(plan_lines(plan)))
    identity = {
        "taxonomy": {"name": SHAPES.name, "names": list(SHAPES.names)},
        "generator": {"weights_sha256": "0" * 64},
    }
    write_json(folder / "run.json", {"identity": identity})
    return reference


def one_by_one(folder: Path, reference: Path, plan: list[Sample]) -> None:
    for power, threshold, band in product(*GRID.values()):
        confusion, settings = (
            metrics.confusion_matrix(len(SHAPES)),
            MaskSettings(power=power, threshold=threshold, band=band),
        )
        for s in plan:
            truth = read_mask(reference / f"{s.id}.png").astype(np.int64)
            mask = to_mask(
                stored_heat(folder, s.id)["class_prompt"], s.class_ids, truth.shape, settings
            ).astype(np.int64)
            confusion.update(
                torch.from_numpy(np.where(mask == 255, 0, mask)), torch.from_numpy(truth)
            )
        metrics.miou(confusion.compute())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument(
        "--generated", type=int, default=16, help="images that are really generated"
    )
    options = parser.parse_args()
    plan, settings = make_plan(options.samples), len(list(product(*GRID.values())))
    generator = TextToImage(
        steps=20, guidance=3.0, cross_resolution=16, self_resolution=HEAT, max_power=POWERS - 1
    )
    generator.generate(plan[:1])  # warm
    each = seconds(lambda: generator.generate(plan[: options.generated])) / options.generated
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "set"
        reference = write_set(folder, plan)
        settings_of_grid = SweepSettings(name="sweep", **GRID, source=None, limit=None, workers=1)
        swept = seconds(lambda: sweep(folder, reference, settings_of_grid))
        slow = (
            seconds(lambda: one_by_one(folder, reference, plan[:ONE_BY_ONE]))
            / ONE_BY_ONE
            * len(plan)
        )
    generated = settings * each * len(plan)
    print(
        f"generate: {each:.2f} s an image; {len(plan)} images {settings} times: {generated:.0f} s"
    )
    print(
        f"sweep: {settings} settings on {len(plan)} samples in {swept:.2f} s, "
        f"{100 * swept / generated:.4f} % of that"
    )
    print(
        f"one setting after the other, whole masks: {slow:.0f} s, {slow / swept:.0f} times the "
        "sweep"
    )
    result = {
        "samples": len(plan),
        "settings": settings,
        "seconds_an_image": each,
        "sweep_seconds": swept,
        "sweep_share_of_generation": swept / generated,
        "one_by_one_over_sweep": slow / swept,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
