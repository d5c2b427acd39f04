"""Training DeepLabV3 by this package against mmsegmentation's Runner: images per second, side by
side in one run.

    python -m benchmarks.train [--steps 3] [--batch 2] [--depth 50] [--size 512] [--device cuda]

Five trainings, each in a process of its own, take turns of ``--turn`` steps on the same images: in
32 bits, ours and the Runner; with mixed precision (bfloat16), ours, the Runner, and ours with
everything that helps (``--with``). Ours is what train.py builds (AdamW, clipped gradient, average
of the weights), theirs mmsegmentation's own configuration (SGD). A training's seconds are the
median of its turns; the first turn is not counted. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.machine import machine
from benchmarks.train_sides import Setup, Side, child
from benchmarks.voc import write_voc
from dd.store.provenance import write_json

FASTER = {
    "channels_last": "optimizer.channels_last=true",
    "fused": "optimizer.fused=true",
    "compile": "optimizer.compile=true",
    "benchmark": "trainer.benchmark=true",
}
DEFAULT = {
    "cpu": ["channels_last", "fused"],
    "cuda": ["channels_last", "fused", "compile", "benchmark"],
}
IMAGES = 64  # of the data set


def measure(sides: list[Side], setup: Setup) -> dict[str, dict]:
    """What each side took: seconds and seconds waited of each counted turn, peak memory, loss of
    the last step."""
    context, connections, processes, found = (
        multiprocessing.get_context("spawn"),
        [],
        [],
        {s.name: [] for s in sides},
    )
    for side in sides:
        mine, its = context.Pipe()
        processes.append(context.Process(target=child, args=(its, side, setup)))
        processes[-1].start()
        its.close()  # so that recv ends when the process does
        connections.append(mine)
        _expect(mine, side)
    try:
        for turn in range(setup.turns):
            for side, connection in zip(sides, connections, strict=True):
                connection.send("go")
                found[side.name].append(_expect(connection, side))
                if turn + 1 < setup.turns:
                    _expect(connection, side)
                print(
                    f"turn {turn}: {side.name} {found[side.name][-1]['seconds']:.2f} s", flush=True
                )
        ends = [
            _expect(connection, side) for side, connection in zip(sides, connections, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()  # Lightning only makes a note of a polite signal
            process.join()
    counted = {name: turns[1:] for name, turns in found.items()}
    return {
        side.name: {
            "seconds": [t["seconds"] for t in counted[side.name]],
            "waited": sum(t["waited"] for t in counted[side.name]),
            "peak_bytes": found[side.name][-1]["peak_bytes"],
            "loss": found[side.name][-1]["loss"],
            **end,
        }
        for side, end in zip(sides, ends, strict=True)
    }


def _expect(connection, side):
    try:
        return connection.recv()
    except EOFError:
        raise RuntimeError(
            f"the training {side.name} ended before its time; its own message stands above"
        ) from None


def summary(taken: dict, setup: Setup) -> dict:
    """Images a second, share of the time spent waiting for data, peak memory, and the ratios."""
    images, rows = setup.batch * setup.turn, {}
    for name, side in taken.items():
        rows[name] = {
            "images_per_second": round(images / median(side["seconds"]), 4),
            "seconds_of_each_turn": [round(s, 3) for s in side["seconds"]],
            "waiting_percent": round(100 * side["waited"] / sum(side["seconds"]), 2),
            "peak_gib": round(side["peak_bytes"] / 2**30, 2),
            "last_loss": round(side["loss"], 4),
        }
    rate = {name: row["images_per_second"] for name, row in rows.items()}
    return {
        "ours_over_runner_fp32": round(rate["ours_fp32"] / rate["runner_fp32"], 3),
        "ours_over_runner_bf16": round(rate["ours_bf16"] / rate["runner_bf16"], 3),
        "everything_over_runner_bf16": round(rate["everything"] / rate["runner_bf16"], 3),
        "trainings": rows,
    }


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument(
        "--steps", type=int, help="turns that are counted, 1 or more (CPU: 3, GPU: 5)"
    )
    parser.add_argument(
        "--turn",
        type=int,
        help="steps of a turn (CPU: 1, GPU: 40, more than the loader holds ready)",
    )
    parser.add_argument("--batch", type=int, help="images of a step, 2 or more (CPU: 2, GPU: 16)")
    parser.add_argument("--workers", type=int, help="processes that load data (CPU: 0, GPU: 8)")
    parser.add_argument("--depth", type=int, default=50, choices=(18, 50, 101))
    parser.add_argument("--size", type=int, default=512, help="side of the square crops in pixels")
    parser.add_argument(
        "--with",
        dest="faster",
        nargs="*",
        choices=FASTER,
        help="what the fifth training has switched on",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="one more step of the fifth training under torch's profiler",
    )
    parser.add_argument("--output", help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    usual = dict(
        zip(
            ("steps", "turn", "batch", "workers"),
            (3, 1, 2, 0) if options.device == "cpu" else (5, 40, 16, 8),
            strict=True,
        )
    )
    for key, value in usual.items():
        least = {"batch": 2, "workers": 0}.get(key, 1)
        if getattr(options, key) is None:
            setattr(options, key, value)
        if getattr(options, key) < least:
            parser.error(f"--{key} {getattr(options, key)}: use {least} or more")
    options.faster = DEFAULT[options.device] if options.faster is None else options.faster
    return options


def main(arguments=None) -> dict:
    options = parse(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # mmengine takes a GPU where it sees one
    with TemporaryDirectory() as work:
        data = str(write_voc(Path(work) / "VOC2012", max(IMAGES, options.batch)))
        setup = Setup(
            data,
            work,
            options.device,
            options.depth,
            options.size,
            options.batch,
            options.workers,
            options.steps + 1,
            options.turn,
        )
        everything = [FASTER[key] for key in options.faster]
        sides = [
            Side("ours_fp32", False, False),
            Side("runner_fp32", True, False),
            Side("ours_bf16", False, True),
            Side("runner_bf16", True, True),
            Side("everything", False, True, everything, options.profile),
        ]
        taken = measure(sides, setup)
    what = {k: getattr(options, k) for k in ("depth", "size", "batch", "workers", "turn", "steps")}
    result = {
        **what,
        "with": options.faster,
        **summary(taken, setup),
        "load": round(os.getloadavg()[0], 2),
    }
    if options.profile:
        result["operations_percent"] = taken["everything"]["operations"]
    result |= machine(options.device)
    for name, row in result["trainings"].items():
        print(
            f"{name}: {row['images_per_second']:.3f} images/s, {row['waiting_percent']:.1f} % "
            "waiting for data, "
            f"{row['peak_gib']:.1f} GiB"
        )
    if options.output:
        write_json(Path(options.output), result)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
