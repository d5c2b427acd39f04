"""What the number of steps, the scheduler and reading fewer steps do to images and masks, on the
embedded benchmark.

    python -m benchmarks.quality --run outputs/shapes/real_shapes/shots=all,seed=0 [--images 96]

The judge is ``--run``, a segmenter trained on real images only; no test image is touched.
``agreement``: mIoU between masks (settings of experiment=shapes) and what the judge sees in the
images, uncertain pixels as background; ``found``: share of the classes asked for that the judge
sees at all, in percent; both are means of ``--repeats`` draws, with half their range. ``seconds``:
processor time of one thread for an image, beside the first row's. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import yaml

from benchmarks.machine import machine
from benchmarks.synthesis import synthesize
from dd import config
from dd.data.datasets import read_mask
from dd.generators import TextToImage
from dd.prompts.templates import TemplatePrompts
from dd.stages.predict_set import predict_set
from dd.stages.sweep import SweepSettings, sweep
from dd.store.samples import make_plan, read_plan
from dd.taxonomy import taxonomy

CONF = Path(__file__).parents[1] / "conf"
DEFAULT = "DPMSolverMultistepScheduler"
SETTINGS = [
    {"steps": 20},
    *({"steps": steps} for steps in (10, 15, 25, 50, 100)),
    *(
        {"steps": 20, "scheduler": name}
        for name in ("DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler")
    ),
    *({"steps": 20, "capture_every": every} for every in (2, 5, 10)),
]
SEEN = 9  # pixels of a class, so that a stray one is none


def judge(
    folder: Path, settings: dict, images: int, seed: int, run: tuple
) -> tuple[float, float, float]:
    """(agreement, share of classes found, both in percent; seconds an image) of a set that is
    made in ``folder``."""
    wanted = yaml.safe_load((CONF / "prompts/shapes.yaml").read_text())
    prompts = TemplatePrompts(**{k: v for k, v in wanted.items() if k != "_target_"})
    masks = yaml.safe_load((CONF / "masks/shapes.yaml").read_text())
    generator = TextToImage(guidance=3.0, cross_resolution=16, self_resolution=32, **settings)
    generator.generate(
        make_plan(prompts(taxonomy("shapes"), 1, seed), taxonomy("shapes"), seed, 1)
    )  # the first call is slower
    started = time.process_time()
    synthesize(folder, generator, prompts, taxonomy("shapes"), images, seed, 32, "png")
    seconds = (time.process_time() - started) / images
    seen = predict_set(folder, *run)
    found = [
        np.sum(read_mask(seen / f"{s.id}.png") == value) >= SEEN
        for s in read_plan(folder)
        for value in s.class_ids
    ]
    grid = {
        "power": [masks["power"]],
        "threshold": [masks["threshold"]],
        "band": [masks["band"]],
        "source": None,
        "limit": None,
        "workers": 1,
    }
    tried = sweep(folder, seen, SweepSettings(name="judge", **grid))
    (row,) = tried["sweep"]["table"]
    return row["miou"], 100 * float(np.mean(found)), seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", required=True, help="the judge: the folder of a training on real images"
    )
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    run, rows = config.trained_run(options.run), []
    print(f"{'':42} agreement       found  seconds an image")
    for settings in SETTINGS:
        draws = []
        for seed in range(options.repeats):
            with TemporaryDirectory() as folder:
                draws.append(judge(Path(folder) / "set", settings, options.images, seed, run))
        agreement, found, seconds = (np.array(column) for column in zip(*draws, strict=True))
        row = {
            **settings,
            "agreement": round(agreement.mean(), 2),
            "agreement_spread": round(np.ptp(agreement) / 2, 2),
            "found": round(found.mean(), 2),
            "found_spread": round(np.ptp(found) / 2, 2),
            "seconds": round(seconds.min(), 3),
        }
        rows.append(row)
        what = f"{settings.get('scheduler', DEFAULT)}, {settings['steps']} steps"
        what += f", each {settings['capture_every']}th" if "capture_every" in settings else ""
        spreads = row["agreement_spread"], row["found_spread"]
        print(
            f"{what:42} {row['agreement']:5.1f} ± {spreads[0]:.1f}  {row['found']:5.1f} ± "
            f"{spreads[1]:.1f}",
            end="  ",
        )
        print(f"{row['seconds']:6.2f} ({row['seconds'] / rows[0]['seconds']:.2f}x)", flush=True)
    command = f"python -m benchmarks.quality --images {options.images} --repeats {options.repeats}"
    print(json.dumps({"quality": rows, "images": options.images, "command": command, **machine()}))


if __name__ == "__main__":
    main()
