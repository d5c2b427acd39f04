"""What plan, records, hashes and syncs cost beside generating: the stage synthesize against the
bare generator, in one run.

    python -m benchmarks.overhead [--samples 128]

The embedded generator, attention recorded, with the settings of experiment=shapes. The seconds
inside the generator are counted while the stage runs; all that is left of its wall time is
overhead. Encoding images and heat and their quality signals, which any program that keeps its
images pays, are measured once more by themselves. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import yaml

from benchmarks.sweep import make_plan
from benchmarks.synthesis import synthesize
from dd.data.datasets import encode_image, heat_bytes, stored_heat
from dd.data.quality import sample_signals
from dd.generators import TextToImage
from dd.prompts.templates import TemplatePrompts
from dd.store.samples import read_plan
from dd.taxonomy import taxonomy

UNIT = 32


class Timed:
    """A generator whose seconds are counted."""

    def __init__(self, generator):
        self.generator, self.seconds, self.images = generator, 0.0, {}

    def __getattr__(self, name):
        return getattr(self.generator, name)

    def generate(self, samples):
        start = time.perf_counter()
        found = self.generator.generate(samples)
        self.seconds += time.perf_counter() - start
        self.images |= {s.id: image for s, image in zip(samples, found[0], strict=True)}
        return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=128)
    number = parser.parse_args().samples
    torch.set_flush_denormal(True)
    read_at = {"cross_resolution": 16, "self_resolution": 16}
    generator, shapes = (
        Timed(TextToImage(steps=20, guidance=3.0, full_prompt=True, **read_at)),
        taxonomy("shapes"),
    )
    generator.generator.generate(make_plan(1))  # the first call is slower
    wanted = yaml.safe_load((Path(__file__).parents[1] / "conf/prompts/shapes.yaml").read_text())
    prompts = TemplatePrompts(**{k: v for k, v in wanted.items() if k != "_target_"})
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        synthesize(Path(root) / "set", generator, prompts, shapes, number, 0, UNIT, "png")
        whole = time.perf_counter() - start
        plan = read_plan(Path(root) / "set")
        heat = {s.id: stored_heat(Path(root) / "set", s.id) for s in plan}
        start = time.perf_counter()
        for sample in plan:
            encode_image(generator.images[sample.id], ".png")
            heat_bytes(heat[sample.id], {})
            sample_signals(sample, heat[sample.id], None, None)
        encoding = time.perf_counter() - start
    made = generator.seconds
    found = {
        "samples": number,
        "seconds_generator": round(made, 2),
        "seconds_stage": round(whole, 2),
        "overhead_percent": round(100 * (whole - made) / made, 2),
        "of_which_encoding_and_signals_percent": round(100 * encoding / made, 2),
        "plan_records_hashes_syncs_percent": round(100 * (whole - made - encoding) / made, 2),
    }
    print(
        f"{number} images: {made:.1f} s in the generator, {whole:.1f} s in the stage, "
        f"{encoding:.2f} s of it encoding"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
