"""From prompts to files: the whole stage against the plain diffusers pipeline that only saves its
images.

    python -m benchmarks.generate [--model embedded sd15] [--device cuda] [--dtype float16]
    [--images 64] [--batch 16]

``plain``: the pipeline called batch by batch, each image saved. ``ours``: the stage synthesize,
with attention, heat, hashes, records and syncs; then the same with each option that makes the
pixels no different beyond rounding, and with all of them. ``in turns``: no unit is drawn while the
one before is written. The rows take turns, ``--rounds`` times; on a CPU in processor time of one
thread, and in wall time, which other work on the machine disturbs. ``writing alone``: how fast the
stage is with 512-px images that are already there (heat of up to three classes at 32x32, JPEG).
``played GPU``, on a CPU: the same images, but each batch comes only after the time that a GPU of
``--rate`` images a second takes, in which the processor is free; ``plain`` waits and saves. Joules
are those that the driver counted for the GPU (pynvml, where installed). The last line is JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.full_size import save
from benchmarks.machine import machine
from benchmarks.machine import seconds as wall
from benchmarks.sweep import make_plan
from benchmarks.synthesis import synthesize
from dd.execution import Local
from dd.generators import TextToImage
from dd.prompts.prompt import make_prompt
from dd.store.samples import read_plan
from dd.taxonomy import taxonomy

OPTIONS = ("channels_last", "fused_projections", "compile")


class Wanted(list):
    """Prompts as the stage takes them."""

    dropped = ()


def prompts(classes, number, seed):
    return Wanted(make_prompt(s.prompt.partition(";")[0], s.classes) for s in make_plan(number))


class InTurns(Local):
    """Draws a unit, writes it, draws the next."""

    def run(self, units, total, task, *rest):
        at_once = replace(task, draw=lambda *given: task.draw(*given)())
        return super().run(units, total, at_once, *rest)


def plain(generator: TextToImage, number: int, batch: int, folder: Path, suffix: str) -> None:
    folder.mkdir()
    plan = make_plan(number)
    for first in range(0, number, batch):
        part = plan[first : first + batch]
        made = generator.pipe(
            prompt=[s.prompt for s in part],
            generator=[torch.Generator("cpu").manual_seed(s.seed) for s in part],
            num_inference_steps=generator.steps,
            guidance_scale=generator.settings.guidance,
            height=generator.size,
            width=generator.size,
        )
        for sample, image in zip(part, made.images, strict=True):
            image.save(folder / f"{sample.id}{suffix}", quality=95)


class AlreadyThere:
    """A generator that gives the same smooth 512-px images and heat of three classes again and
    again."""

    terms, token_limit, device = {}, 77, "cpu"

    def where_read(self):
        return []

    def __init__(self, batch: int):
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (batch, 32, 32, 3), np.uint8)
        self.images = np.stack(
            [
                np.asarray(Image.fromarray(c).resize((512, 512), Image.Resampling.BICUBIC))
                for c in coarse
            ]
        )
        self.heat = rng.random((3, 9, 32, 32)).astype(np.float32)

    def identity(self):
        return {"model": "none"}

    def token_count(self, text):
        return len(text.split())

    def spans(self, sample):
        return {"class_prompt": [[1]] * len(sample.classes)}

    def generate(self, samples):
        heat = [{"class_prompt": self.heat[: len(s.classes)]} for s in samples]
        return self.images[: len(samples)], heat, [None] * len(samples)


def writing(folder: Path, batch: int, images: int = 512) -> float:
    """Images a second of the stage when generating takes no time."""
    generator = AlreadyThere(batch)
    started = time.perf_counter()
    synthesize(folder, generator, prompts, taxonomy("shapes"), images, 0, batch, "jpg")
    return images / (time.perf_counter() - started)


class PlayedGPU(AlreadyThere):
    """Each batch takes as long as on a GPU that makes ``rate`` images a second."""

    def __init__(self, batch: int, rate: float):
        super().__init__(batch)
        self.rate = rate

    def generate(self, samples):
        time.sleep(len(samples) / self.rate)
        return super().generate(samples)


def beside_gpu(folder: Path, batch: int, rate: float, rounds: int, images: int = 64) -> dict:
    """Images a second of plain, ours and ours in turns with :class:`PlayedGPU`, and their
    medians over plain."""
    generator, classes = PlayedGPU(batch, rate), taxonomy("shapes")

    def save_only():
        folder.mkdir()
        plan = make_plan(images)
        for first in range(0, images, batch):
            part = plan[first : first + batch]
            for sample, image in zip(part, generator.generate(part)[0], strict=True):
                Image.fromarray(image).save(folder / f"{sample.id}.jpg", quality=95)

    rows = {"plain": save_only} | {
        row: partial(
            synthesize,
            folder,
            generator,
            prompts,
            classes,
            images,
            0,
            batch,
            "jpg",
            executor=executor,
        )
        for row, executor in (("ours", Local()), ("in turns", InTurns()))
    }
    taken = {row: [] for row in rows}
    for _ in range(rounds):
        for row, run in rows.items():
            taken[row].append(wall(run))
            shutil.rmtree(folder)
    return {row: over_plain(taken["plain"], found, images) for row, found in taken.items()}


def over_plain(plain: list[float], found: list[float], images: int) -> dict:
    ratio = statistics.median(p / s for p, s in zip(plain, found, strict=True))
    return {"images_per_second": images / statistics.median(found), "over_plain": round(ratio, 4)}


def joules(device: str) -> float | None:
    """What the GPU has used since its driver was loaded, where that is known."""
    with suppress(Exception):  # no GPU, no pynvml, a GPU that does not count
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.device(device).index or 0)
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    return None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=["embedded", "sd15", "sd21", "sdxl"])
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=10, help="images a second of the played GPU")
    parser.add_argument("--options", nargs="*", default=list(OPTIONS), choices=OPTIONS)
    options = parser.parse_args()
    gpu = options.device != "cpu"
    model, dtype = (
        options.model or ("sd15" if gpu else "embedded"),
        options.dtype or ("float16" if gpu else "float32"),
    )
    steps, clock = (
        options.steps or (25 if gpu else 20),
        time.perf_counter if gpu else time.process_time,
    )
    torch.set_flush_denormal(True)
    if not gpu:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        root, suffix = Path(root), "png" if model == "embedded" else "jpg"
        embedded = (
            {"guidance": 3.0, "cross_resolution": 16, "self_resolution": 32}
            if model == "embedded"
            else {}
        )
        name = (
            model if model == "embedded" else str(save(model, root / "checkpoint", options.device))
        )
        build = partial(
            TextToImage, model=name, steps=steps, device=options.device, dtype=dtype, **embedded
        )
        generators = {"ours": build()} | {
            option: build(**{option: True}) for option in options.options
        }
        if len(options.options) > 1:
            generators["all of them"] = build(**dict.fromkeys(options.options, True))

        def stage(generator, executor=None):
            given = prompts, taxonomy("shapes"), options.images, 0, options.batch, suffix
            synthesize(root / "set", generator, *given, executor=executor)
            assert len(read_plan(root / "set")) == options.images

        rows = {
            "plain": lambda: plain(
                generators["ours"], options.images, options.batch, root / "set", f".{suffix}"
            )
        }
        rows |= {row: lambda g=generator: stage(g) for row, generator in generators.items()}
        rows["in turns"] = lambda: stage(generators["ours"], InTurns())
        seconds, walls, energy = ({row: [] for row in rows} for _ in range(3))
        for repeat in range(options.rounds + 1):  # the first compiles and is not counted
            for row, run in rows.items():
                before, started, wall_started = joules(options.device), clock(), time.perf_counter()
                run()
                if gpu:
                    torch.cuda.synchronize()
                if repeat:
                    seconds[row].append(clock() - started)
                    walls[row].append(time.perf_counter() - wall_started)
                    energy[row] += [] if before is None else [joules(options.device) - before]
                shutil.rmtree(root / "set")
        alone = round(writing(root / "set", options.batch))
        shutil.rmtree(root / "set")
        played = (
            {} if gpu else beside_gpu(root / "set", options.batch, options.rate, options.rounds)
        )
    found = {}
    for row in rows:
        found[row] = over_plain(seconds["plain"], seconds[row], options.images)
        found[row]["wall"] = over_plain(walls["plain"], walls[row], options.images)
        if energy[row]:
            found[row]["images_per_kwh"] = round(
                options.images / (statistics.median(energy[row]) / 3.6e6)
            )
        text = f"{found[row]['images_per_kwh']:8} images/kWh" if energy[row] else ""
        for what, clocked in (("", found[row]), ("wall", found[row]["wall"])):
            print(
                f"{row:18} {what:4} {clocked['images_per_second']:8.3f} images/s "
                f"{clocked['over_plain']:7.3f}x {text}"
            )
    print(f"writing alone      {alone:8} images/s of 512 px")
    for row, made in played.items():
        print(
            f"played GPU, {row:8} {made['images_per_second']:8.3f} images/s "
            f"{made['over_plain']:7.3f}x"
        )
    result = {
        "played_gpu": {"rate": options.rate, **played},
        "load": [round(load, 1) for load in os.getloadavg()],
        "writing_images_per_second": alone,
        "model": model,
        "dtype": dtype,
        "steps": steps,
        "batch": options.batch,
        "images": options.images,
        "generate": found,
        **machine(options.device),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
