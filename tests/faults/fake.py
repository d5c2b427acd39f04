"""A generator of tiny images for processes that are killed: starts without torch, so that a
start takes little time."""

import errno
import os
import pickle
import sys
import time
import types

import numpy as np

if (
    "torch" not in sys.modules
):  # the signals of heat are not what is tested, and their module imports torch
    light = types.ModuleType("dd.data.quality")
    light.sample_signals = lambda sample, maps, clip, image: {
        "peak": float(next(iter(maps.values())).max())
    }
    sys.modules.setdefault("dd.data.quality", light)

from dd.prompts.prompt import Prompts, make_prompt


class FakeGenerator:
    """Random images and heat; as with a real one, what a sample gets depends on those it is made
    together with. ``bad``: seeds whose image is bad; ``broken``: units that always fail;
    ``deadly``: units that kill their process while ``trap`` exists (without a trap: always);
    ``full``: units for which the disk is full."""

    token_limit, device = 77, "cpu"
    terms = {"licence": "Apache-2.0", "link": None}

    def __init__(
        self,
        pause=0.0,
        bad_share=0.0,
        broken=(),
        deadly=(),
        trap=None,
        full=(),
        guidance=3.0,
        device="cpu",
    ):
        self.pause, self.bad_share, self.broken, self.deadly, self.trap = (
            pause,
            bad_share,
            broken,
            deadly,
            trap,
        )
        self.full, self.guidance = full, guidance

    def identity(self):
        return {
            "model": "fake",
            "guidance": self.guidance,
            "revision": None,
            "weights_sha256": "0" * 64,
            "scheduler": None,
            "steps": 1,
        }

    def token_count(self, text):
        return len(text.split()) + 2

    def spans(self, sample):
        return {"class_prompt": [[1]] * len(sample.classes)}

    def generate(self, samples):
        unit = samples[0].unit
        if unit in self.deadly and (self.trap is None or self.trap.exists()):
            if self.trap is not None:
                self.trap.unlink()
            os._exit(9)
        if unit in self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        if unit in self.broken:
            raise RuntimeError(f"unit {unit} is poisoned")
        time.sleep(self.pause)
        together = sum(s.seed for s in samples) % 2**32
        images, heat = [], []
        for sample in samples:
            rng = np.random.default_rng([sample.seed, together])
            images.append(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8))
            heat.append(
                {"class_prompt": rng.random((len(sample.classes), 2, 4, 4)).astype(np.float32)}
            )
        bad = ["constant" if s.seed % 1000 < 1000 * self.bad_share else None for s in samples]
        return np.stack(images), heat, bad


class Light:
    """A callable that is sent behind this module, and so finds the light modules instead of
    torch."""

    def __init__(self, call):
        self.call = pickle.loads(call) if isinstance(call, bytes) else call

    def __call__(self, *args):
        return self.call(*args)

    def __reduce__(self):
        return Light, (pickle.dumps(self.call),)


def build(device="cpu", **settings):
    """(generator, no CLIP model) of a worker process."""
    return FakeGenerator(**settings), None


def prompts(taxonomy, number, seed):
    return Prompts(
        [
            make_prompt(f"a photo {i}", [taxonomy.names[i % len(taxonomy.names)]])
            for i in range(number)
        ]
    )
