"""The contract of generators, for tiny checkpoints and for every fake one of the tests."""

import numpy as np
import pytest

from dd.data.datasets import SegmentationFolder
from dd.generators import memory
from dd.prompts.prompt import make_prompt
from dd.stages.calibrate import _shown
from dd.stages.prepare_shapes import prepare_shapes
from dd.store.samples import make_plan
from dd.taxonomy import taxonomy
from tests.faults import fake
from tests.generators import contract
from tests.stages import test_calibrate, test_filter, test_probe, test_read_heat
from tests.stages import test_synthesize_label as drawn

SHAPES = taxonomy("shapes")


@pytest.mark.parametrize("reading", ["sampling", "after", "both"])
@pytest.mark.parametrize("full_prompt", [False, True])
def test_checkpoints(changed, samples, monkeypatch, reading, full_prompt):
    monkeypatch.setattr(memory, "CEILING", 2)
    contract.check(changed(reading=reading, full_prompt=full_prompt), samples)


def some(number=3):
    classes = [["apple"], ["leaf", "pine tree"], ["brick", "heart"]]
    prompts = [make_prompt(f"a photo of {' and '.join(c)}", c) for c in classes[:number]]
    return make_plan(prompts, SHAPES, 1, number)


FAKES = {
    "of killed processes": fake.FakeGenerator,
    "of sets": drawn.FakeGenerator,
    "of two sources": lambda: drawn.FakeGenerator(sources=("class_prompt", "full_prompt_caption")),
    "that reads": test_read_heat.FakeReader,
    "of quality": test_filter.Peaks,
}


@pytest.mark.parametrize("name", FAKES)
def test_fakes(name):
    plan, read_at = some(), () if name == "that reads" else (50, 150)
    if name == "of quality":  # it knows the classes of its own samples
        plan = make_plan(test_filter.Eight()(SHAPES, None, 0), SHAPES, 1, 8)
    contract.check(FAKES[name](), plan, timesteps=read_at)


@pytest.mark.parametrize("kind", [test_calibrate.Knowing, test_probe.Knowing])
def test_fakes_that_know_the_masks(kind, tmp_path):
    root = prepare_shapes(tmp_path, {"train": 1, "tune": 3, "test": 1})[0]
    data = SegmentationFolder(root, "tune", SHAPES)
    shown = _shown(data, append=True)
    images = np.stack([data[i][0] for i, _ in shown])
    contract.check(kind(data), [sample for _, sample in shown], images)
