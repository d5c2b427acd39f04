"""Masks per second from stored heat at 512x512, with one thread and with one for each core, for few
and for many classes.

    python -m benchmarks.label [--samples 400]

The whole stage: heat read, masks made, PNG files written and synced. Heat of 9 powers at 32x32, one
to three classes an image of a taxonomy of 8 or of 80 classes; the rows take turns. ``naive``:
bicubic interpolation of the maps by torch, argmax and np.unique, one mask after the other. The last
line is JSON.
"""

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from benchmarks.machine import machine, seconds
from dd.data.datasets import encode_image, encode_mask, stored_heat
from dd.masks.chain import CHAINS
from dd.masks.from_heat import MaskSettings
from dd.masks.normalise import min_max
from dd.stages.label import label
from dd.store.provenance import read_yaml, sha256, write_atomic, write_json
from dd.store.samples import Sample, append_records, plan_lines, plan_sha256, read_plan

POWERS, SIDE, SIZE = 9, 32, 512
SETTINGS = MaskSettings()
REFINED = MaskSettings(steps=read_yaml(CHAINS)["refined, band"])


def write_set(folder: Path, number: int, classes: int, in_image: tuple[int, ...]) -> Path:
    """A synthetic set of ``number`` samples with ``classes`` in all and one of ``in_image`` in
    each; smooth random heat."""
    rng, plan = np.random.default_rng(0), []
    names = [f"class {i}" for i in range(1, classes + 1)]
    for part in ("heat", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)  # patches, as edges to follow
    picture = encode_image(np.kron(coarse, np.ones((43, 43, 1), np.uint8))[:SIZE, :SIZE], ".png")
    for i in range(number):
        ids = tuple(int(v) for v in 1 + rng.permutation(classes)[: rng.choice(in_image)])
        chosen = tuple(names[v - 1] for v in ids)
        plan.append(
            Sample(f"{i:06d}", "; ".join(chosen), " ".join(chosen), chosen, ids, seed=i, unit=i)
        )
        coarse = torch.from_numpy(rng.random((len(ids) * POWERS, 1, 6, 6), np.float32))
        heat = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").view(
            len(ids), POWERS, SIDE, SIDE
        )
        save_file({"class_prompt": heat.numpy()}, folder / "heat" / f"{i:06d}.safetensors")
        (folder / "JPEGImages" / f"{i:06d}.png").write_bytes(picture)
    heat = lambda s: sha256(folder / "heat" / f"{s.id}.safetensors")  # noqa: E731
    append_records(
        folder,
        "0",
        [{"id": s.id, "heat_sha256": heat(s), "image_sha256": sha256(picture)} for s in plan],
    )
    (folder / "plan.jsonl").write_text("".join(plan_lines(plan)))
    generator = {
        "model": "benchmark",
        "revision": None,
        "weights_sha256": "0" * 64,
        "scheduler": None,
        "steps": 1,
        "guidance": 1.0,
    }
    identity = {
        "taxonomy": {"name": "benchmark", "names": names},
        "generator": generator,
        "image_format": ".png",
    }
    write_json(
        folder / "run.json",
        {
            "identity": identity | {"plan_sha256": plan_sha256(plan)},
            "command": "",
            "git_commit": "",
        },
    )
    return folder


def naive(folder: Path, target: Path) -> None:
    """The same files, as one would write it down."""
    for sample in read_plan(folder):
        maps = torch.from_numpy(
            stored_heat(folder, sample.id)["class_prompt"][:, SETTINGS.power].astype(np.float32)
        )
        scores = F.interpolate(
            min_max(maps)[None], size=(SIZE, SIZE), mode="bicubic", align_corners=False
        )[0]
        best, which = scores.max(0)
        mask = torch.tensor(sample.class_ids, dtype=torch.uint8)[which]
        mask[best < SETTINGS.threshold] = 255
        mask[best < SETTINGS.threshold - SETTINGS.band] = 0
        data = encode_mask(mask.numpy())
        write_atomic(target / f"{sample.id}.png", data)
        sha256(data), np.unique(mask.numpy(), return_counts=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    sets = {"few": (8, (1, 2, 3)), "many": (80, (1, 2, 3)), "crowded": (80, (8,))}
    with TemporaryDirectory() as root:
        folders = {
            name: write_set(Path(root) / name, options.samples, *what)
            for name, what in sets.items()
        }

        def stage(name, workers, settings=SETTINGS):
            shutil.rmtree(folders[name] / "masks", ignore_errors=True)
            return seconds(lambda: label(folders[name], settings, "set", workers=workers))

        rows = {
            "naive, 1 thread": lambda: seconds(lambda: naive(folders["few"], Path(root) / "naive")),
            "8 classes, 1 thread": lambda: stage("few", 1),
            f"8 classes, {cores} threads": lambda: stage("few", cores),
            f"refined, 8 classes, {cores} threads": lambda: stage("few", cores, REFINED),
            f"80 classes, {cores} threads": lambda: stage("many", cores),
            f"80 classes, 8 in each image, {cores} threads": lambda: stage("crowded", cores),
        }
        torch.set_num_threads(1)
        each = {name: [] for name in rows}
        for _ in range(options.rounds):
            for name, run in rows.items():
                each[name].append(run())
    speed = {
        name: round(options.samples / statistics.median(found), 1) for name, found in each.items()
    }
    for name, found in speed.items():
        print(f"{name:40} {found:8.1f} masks/s")
    one, all_cores, many = (list(speed.values())[i] for i in (1, 2, 3))
    result = {
        "masks_per_second": speed,
        "over_naive": round(one / speed["naive, 1 thread"], 2),
        "cores_over_one": round(all_cores / one, 2),
        "many_over_few_classes": round(many / all_cores, 2),
        "samples": options.samples,
        "command": f"python -m benchmarks.label --samples {options.samples}",
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
