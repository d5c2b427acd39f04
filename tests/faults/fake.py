"""A generator of tiny images for processes that are killed: starts without torch, so that a
start takes little time."""

import errno
import os
import pickle
import sys
import time
import types

if (
    "torch" not in sys.modules
):  # the signals of heat are not what is tested, and their module imports torch
    light = types.ModuleType("dd.data.quality")
    light.sample_signals = lambda sample, maps, clip, image: {
        "peak": float(next(iter(maps.values())).max())
    }
    sys.modules.setdefault("dd.data.quality", light)

from dd.prompts.prompt import Prompts, make_prompt
from tests.fakes import RandomGenerator


class FakeGenerator(RandomGenerator):
    """Random images and heat. ``bad_share``: of images that are bad, by their seeds; ``broken``:
    units that always fail; ``deadly``: units that kill their process while ``trap`` exists
    (without a trap: always); ``full``: units for which the disk is full."""

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
        return {**super().identity(), "guidance": self.guidance}

    def generate(self, samples, capture=True):
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
        images, heat, _ = super().generate(samples, capture)
        bad = ["constant" if s.seed % 1000 < 1000 * self.bad_share else None for s in samples]
        return images, heat, bad


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
