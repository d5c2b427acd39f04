"""Workers, samples and classes: what grows with them.

    python -m benchmarks.scaling [--workers 1 2] [--samples 1000 10000 100000] [--classes 8 80 254]

``workers``: images per second of the embedded generator with 1, 2, ... worker processes of one
thread each. ``samples``: a generator that makes nothing (8x8 images, no model) shows what plan,
records and files cost: seconds and peak memory of a run, of finding out that it is complete, and of
its masks. ``classes``: the same with taxonomies of other sizes. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.generate import Wanted
from benchmarks.generate import prompts as shapes_prompts
from benchmarks.machine import machine
from benchmarks.synthesis import synthesize
from dd.execution import Local
from dd.generators import TextToImage
from dd.generators.memory import peak_bytes, reset_peak
from dd.masks.from_heat import MaskSettings
from dd.prompts.prompt import make_prompt
from dd.stages.label import label
from dd.taxonomy import Taxonomy, taxonomy

SETTINGS = {"steps": 20, "guidance": 3.0, "cross_resolution": 16, "self_resolution": 32}
UNIT = 32


class Nothing:
    """A generator that takes no time: all that is left is the rest."""

    terms, token_limit, device = {}, 77, "cpu"

    def where_read(self):
        return []

    def identity(self):
        return dict.fromkeys(
            ("model", "revision", "weights_sha256", "scheduler", "steps", "guidance"), "none"
        )

    def token_count(self, text):
        return len(text.split())

    def spans(self, sample):
        return {"class_prompt": [[k + 1] for k in range(len(sample.classes))]}

    def generate(self, samples):
        images = np.zeros((len(samples), 8, 8, 3), np.uint8)
        heat = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8) / 64
        return (
            images,
            [{"class_prompt": heat.repeat(len(s.classes), 0)} for s in samples],
            [None] * len(samples),
        )


def embedded(device):
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    return TextToImage(**SETTINGS), None


def workers(counts: list[int], images: int, root: Path) -> list[dict]:
    rows, generator = [], embedded("cpu")[0]
    for count in counts:
        started = time.perf_counter()
        how = {"executor": Local(workers=count, spawn=True), "build": embedded}
        made = synthesize(
            root / "set", generator, shapes_prompts, taxonomy("shapes"), images, 0, 4, "png", **how
        )
        rows.append(
            {
                "workers": count,
                "seconds": round(time.perf_counter() - started, 1),
                "made": made["made_now"],
            }
        )
        shutil.rmtree(root / "set")
        rows[-1]["over_one"] = round(rows[0]["seconds"] / rows[-1]["seconds"], 2)
        print(
            f"{count} workers: {rows[-1]['seconds']:.1f} s for {images} images, start included; "
            f"{rows[-1]['over_one']:.2f}x"
        )
    return rows


def simulate(number: int, classes: Taxonomy, root: Path) -> dict:
    """Seconds and peak memory of a run of ``number`` samples that takes no time to generate."""

    def prompts(classes, number, seed):
        names = classes.names
        return Wanted(make_prompt(f"a photo {i}", [names[i % len(names)]]) for i in range(number))

    def run():
        return synthesize(root / "set", Nothing(), prompts, classes, number, 0, UNIT, "png")

    row = {"samples": number, "classes": len(classes.names)}
    for what, work in (
        ("make", run),
        ("find complete", run),
        ("masks", lambda: label(root / "set", MaskSettings(power=0))),
    ):
        reset_peak()
        before, started = peak_bytes(), time.perf_counter()
        work()
        row[what] = {
            "seconds": round(time.perf_counter() - started, 2),
            "peak_mb_above_start": round((peak_bytes() - before) / 1e6),
        }
    shutil.rmtree(root / "set")
    text = ", ".join(
        f"{what} {1e6 * row[what]['seconds'] / number:.0f} us a sample and "
        f"{row[what]['peak_mb_above_start']} MB"
        for what in ("make", "find complete", "masks")
    )
    print(f"{number} samples, {row['classes']} classes: {text}", flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", nargs="*", type=int, default=[1, os.cpu_count()])
    parser.add_argument("--images", type=int, default=64, help="for the rows of workers")
    parser.add_argument("--samples", nargs="*", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--classes", nargs="*", type=int, default=[8, 80, 254])
    options = parser.parse_args()
    few = Taxonomy("few", tuple(f"class{i}" for i in range(8)))
    with tempfile.TemporaryDirectory() as root:
        result = {"workers": workers(options.workers, options.images, Path(root))}
        result["samples"] = [simulate(number, few, Path(root)) for number in options.samples]
        result["classes"] = [
            simulate(2000, Taxonomy("many", tuple(f"class{i}" for i in range(n))), Path(root))
            for n in options.classes
        ]
    print(json.dumps({**result, **machine()}))


if __name__ == "__main__":
    main()
