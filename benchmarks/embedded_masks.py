"""Masks of both embedded generators: powers, words, readings and chains, on real scenes.

    python -m benchmarks.embedded_masks [--split tune] [--scenes 128] [--root data]
                                        [--generators embedded,embedded_mmdit]

Real scenes of the embedded world with exact masks are noised to the timesteps of ``evaluate.py
stage=probe``, shown to a generator with their caption, and masks are read from its attention: no
image is generated. Rows: the paper's plain chain (min-max, threshold 0.6) at the powers 0 to 8,
read ``while drawing`` and in one forward ``after`` it (t = 100); the same with Otsu's threshold;
the words of the prompt in place of those of the class prompt; the refined chain
(``masks=refined``). Uncertain pixels are decided, nothing is hidden. Mask mIoU in percent with a
95 % interval over the scenes, and what a row gains on power 0 of its own chain and reading, paired
over the scenes. ``share``: pixels that are of a class in the masks, in percent of those that are in
truth. The last line is JSON.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
import numpy as np
import torch

from benchmarks.machine import machine
from dd import config
from dd.data.datasets import SegmentationFolder
from dd.evaluation.statistics import Score, interval, miou
from dd.masks.from_heat import MaskSettings, count_mask, to_mask
from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.probe import Read, real_heat
from dd.taxonomy import taxonomy

CONF = Path(__file__).parents[1] / "conf"
NOISED = [50, 150, 250, 350]
POWERS = (0, 1, 2, 4, 8)
READINGS = {"while drawing": "class_prompt", "after": "after"}
WORDS = ("full_prompt_appended", "full_prompt_caption")
POWER = {"propagate": "power"}
MIN_MAX = {"normalise": "min_max"}
OTSU = [POWER, MIN_MAX, {"threshold": "otsu"}]


def composed(*overrides: str) -> Any:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("generate", overrides=["experiment=shapes", *overrides])


def generator_of(name: str) -> Any:
    """With all of its readings and words stored."""
    return config.instantiate(composed(f"diffusion={name}", "diffusion.reading=both").diffusion)


def settings() -> dict[tuple[str, str, str], MaskSettings]:
    """{(chain, reading or words, power): settings}; the powers of a chain begin with 0."""
    refined = config.instantiate(composed().masks).certain()
    found = {}
    for reading, source in READINGS.items():
        for power in POWERS:
            paper = MaskSettings(power=power, source=source).certain()
            found["paper", reading, str(power)] = paper
        for power in POWERS:
            found["Otsu", reading, str(power)] = MaskSettings(
                power=power, source=source, steps=OTSU, band=0.0
            )
        found["refined", reading, "-"] = refined.model_copy(update={"source": source})
    for source in WORDS:
        paper = MaskSettings(power=4, source=source).certain()
        found["paper", source, "4"] = paper
        found["refined", source, "-"] = refined.model_copy(update={"source": source})
    return found


def confusions(heat: list[Read], data: SegmentationFolder, chosen: MaskSettings) -> np.ndarray:
    """[N, C, C] of each scene."""
    found, classes = [], len(data.taxonomy)
    for i, (sample, maps) in enumerate(heat):
        image, truth = data[i]
        mask = to_mask(maps, sample.class_ids, truth.shape, chosen, image)
        found.append(count_mask(truth, mask, classes)[:, :classes])
    return np.stack(found)


def measure(name: str, data: SegmentationFolder, scenes: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    heat = real_heat(generator_of(name), data, NOISED, limit=scenes)
    rows, first = [], None
    print(f"{name}, {len(heat)} scenes of {data.split}", flush=True)
    for (chain, read, power), chosen in settings().items():
        counts = confusions(heat, data, chosen)
        score = {0: Score(float(miou(counts.sum(0))), counts)}
        around = interval(score)
        row = {"generator": name, "chain": chain, "read": read, "power": power}
        row |= {"miou": around.value, "interval": [around.low, around.high], "scenes": len(heat)}
        total = counts.sum(0)
        row["share"] = 100 * float(total[:, 1:].sum() / total[1:].sum())
        if power == "0":
            first = score
        elif power in map(str, POWERS) and read in READINGS:
            pair = interval(score, first)
            row["less_power_0"] = [pair.value, pair.low, pair.high]
        gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*row.get("less_power_0", [0, 0, 0]))
        print(
            f"{chain:8} {read:22} {power:>2} {around.value:5.1f} "
            f"[{around.low:.1f}, {around.high:.1f}]  {gain if 'less_power_0' in row else '':22} "
            f"{row['share']:4.0f} %",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", default="tune")
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--root", help="where shapes is prepared (default: a temporary folder)")
    parser.add_argument("--generators", default="embedded,embedded_mmdit")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    rows = []
    with TemporaryDirectory() as temporary:
        root = Path(options.root or temporary)
        prepare_shapes(root)
        data = SegmentationFolder(root / "shapes", options.split, taxonomy("shapes"))
        for name in options.generators.split(","):
            rows += measure(name, data, options.scenes)
    print(json.dumps({"split": options.split, "rows": rows, **machine("cpu")}))


if __name__ == "__main__":
    main()
