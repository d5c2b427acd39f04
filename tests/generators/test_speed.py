"""The faster ways against the plain one, and the batch that fits into memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dd.attention import maths as attention
from dd.generators import TextToImage, memory
from dd.generators.memory import largest_batch
from dd.masks.from_heat import MaskSettings, to_mask
from dd.masks.normalise import min_max
from tests.generators.conftest import settings_of

GB, ROOT = 10**9, Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton has builds for Linux alone")


def masks_of(made):
    return [
        to_mask(
            heat["class_prompt"],
            [i + 1 for i in range(len(heat["class_prompt"]))],
            (64, 64),
            SETTING,
        )
        for heat in made[1]
    ]


SETTING = MaskSettings(power=1, threshold=0.5, band=0.1)


def compare(made, plain):
    """A level of 255 of the image; heat before it is stored in half precision; 99.9 % of masks.
    1e-5 of heat after min-max but for high powers: these random models then spread it so evenly
    that min-max shows nothing but rounding."""
    assert np.abs(made[0][0].astype(int) - plain[0][0].astype(int)).max() <= 1
    for ours, theirs in zip(made[1], plain[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-4)
        torch.testing.assert_close(
            *(min_max(maps[:, :2].flatten(0, 1)) for maps in (ours, theirs)), atol=1e-5, rtol=0
        )
    equal = np.mean(
        [np.mean(a == b) for a, b in zip(masks_of(made[0]), masks_of(plain[0]), strict=True)]
    )
    assert equal >= 0.999


@pytest.fixture
def exact(samples, monkeypatch):
    """``exact(model)``: what it makes of the samples, and their heat float32 [K, P, r, r]."""

    def run(model):
        with monkeypatch.context() as patch:
            kept, refine = [], attention.refine
            patch.setattr(
                attention, "refine", lambda *given: kept.append(refine(*given)) or kept[-1]
            )
            return model.generate(samples), kept

    return run


@pytest.mark.parametrize(
    "option",
    ["channels_last", "fused_projections", pytest.param("compile", marks=pytest.mark.full)],
)
def test_a_faster_way_makes_the_same_images_and_masks(folder, kind, model, samples, exact, option):
    faster = TextToImage(model=str(folder), **settings_of(kind), full_prompt=True, **{option: True})
    compare(exact(faster), exact(model))
    images, _, _ = faster.generate(samples, capture=False)
    assert images.tobytes() == faster.generate(samples)[0].tobytes()
    assert faster.identity()[option] is True


@linux
def test_the_kernels_read_what_the_slow_path_reads(folder, kind, samples, exact, monkeypatch):
    """In half precision, on a GPU where there is one, else in Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TextToImage(
        model=str(folder), **settings_of(kind), full_prompt=True, device=device, dtype="float16"
    )
    monkeypatch.setattr(attention, "FUSED_ON", {})
    slow = exact(model)
    monkeypatch.setattr(attention, "FUSED_ON", {device})
    fast = exact(model)
    assert attention._fused.cache_info().currsize
    compare(fast, slow)
    assert (
        fast[0][0].tobytes()
        == slow[0][0].tobytes()
        == model.generate(samples, capture=False)[0].tobytes()
    )


def test_plain_ways_are_not_named(model):
    assert (
        not {"channels_last", "fused_projections", "compile", "capture_every"}
        & model.identity().keys()
    )


def test_the_options_change_how_it_is_computed(folder, kind):
    fused = TextToImage(
        model=str(folder),
        **settings_of(kind),
        fused_projections=True,
        channels_last=True,
        compile=True,
    )
    attentions = [m for name, m in fused.network.named_modules() if name.endswith("attn1")]
    assert attentions and all(m.fused_projections for m in attentions)
    convolution = next(
        m
        for m in fused.network.modules()
        if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)
    )
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    compiled = [m for m in fused.network.modules() if m._compiled_call_impl is not None]
    assert compiled and not any(
        "attn" in name for name, m in fused.network.named_modules() if m in compiled
    )


@pytest.mark.parametrize("every", [0, 3, True, "2", 1.5])
def test_steps_that_cannot_be_read(folder, kind, every):
    message = "diffusion.capture_every=.*expected a whole number (of 1 or more|from 1 to steps=2)"
    with pytest.raises(ValueError, match=message):
        TextToImage(model=str(folder), **settings_of(kind), capture_every=every)


@pytest.mark.parametrize(
    ("each", "base", "budget", "expected"),
    [
        (1, 4, 12.5, 8),
        (1, 4, 12, 8),
        (1, 4, 11.9, 4),
        (1, 4, 5, 1),
        (0.001, 4, 5, 64),
        (0, 4, 4, 64),
        (3, 0, 30, 8),
        (0.5, 3, 36, 64),
    ],
)
def test_the_largest_batch_within_the_budget(each, base, budget, expected):
    asked = []

    def peak(batch):
        asked.append(batch)
        return int((base + each * batch) * GB)

    assert largest_batch(peak, int(base * GB), int(budget * GB)) == expected
    assert asked == [2**i for i in range(len(asked))]
    assert all(
        base + each * batch <= budget for batch in asked
    )  # memory that grows as it did is never run out of


def test_not_even_one_image_fits():
    with pytest.raises(
        ValueError, match=r"needs 5.0 GB, but only 4.0 GB are available: diffusion.vae_slicing=true"
    ):
        largest_batch(lambda batch: 5 * GB, 3 * GB, 4 * GB)


def test_memory_that_grows_faster_than_it_did():
    assert largest_batch(lambda batch: batch**3 * GB, 0, 100 * GB) == 4


def test_the_batch_of_a_model_is_measured(changed, samples, monkeypatch):
    model, sizes, held = changed(), [], iter([90, 100, 110, 130, 170])
    generate = model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda samples: (sizes.append((len(samples), model.steps)), generate(samples)),
    )
    monkeypatch.setattr(memory, "budget_bytes", lambda device: 180)
    monkeypatch.setattr(memory, "peak_bytes", lambda device: next(held))
    assert model.largest_batch(samples[0]) == 8
    assert sizes == [(1, 2), (2, 2), (4, 2), (8, 2)] and model.steps == 2


def test_memory_of_a_process_is_measured():
    """In a process of its own: in this one others have freed memory that is used again."""
    program = """
import torch
from dd.generators import memory
memory.reset_peak()
before, budget = memory.peak_bytes(), memory.budget_bytes()
block = torch.ones(100_000_000)
grown = memory.peak_bytes() - before
del block
memory.reset_peak()
print(grown / 1e9, (memory.peak_bytes() - before) / 1e9, budget > before)
"""
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert 0.35 < float(said[0]) < 0.5 and float(said[1]) < 0.1 and said[2] == "True"


def test_a_device_whose_memory_is_not_known():
    with pytest.raises(
        ValueError,
        match="unit_size=auto measures memory on CUDA devices and on the CPU of Linux; give a "
        "number",
    ):
        memory.budget_bytes("mps")
