"""What reading the attention costs: the plain pipeline, the same with capture, and one that keeps
every map.

    python -m benchmarks.capture [--models embedded sd15] [--batch 1 4] [--device cuda] [--dtype
    float16]

On a GPU whole generations of the models at their true sizes, without VAE slicing; on a CPU whole
generations of the embedded model, and single guided steps of the large UNets. The variants take
turns, ``--rounds`` times; a ratio is the median over the rounds of the ratio within a round; on a
CPU in processor time of one thread, which other work on the machine disturbs less. ``unfused``: on
a GPU, without dd.attention.fused. ``naive``: softmax written out in every layer, the mean over
heads of each map up to 64x64 kept for each step. Peak memory, weights included: of the GPU's
allocator, or all that the process held. The last line is JSON.
"""

import argparse
import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0

from benchmarks.full_size import build_unet, save
from benchmarks.machine import machine
from benchmarks.reading import reading_of, words_of
from benchmarks.sweep import make_plan
from dd.attention import maths as attention
from dd.attention.observer import Observer
from dd.attention.recorder import AttentionRecorder, Reading, Words
from dd.attention.sites import Layout, find_sites
from dd.generators import TextToImage
from dd.generators.memory import peak_bytes, reset_peak

LARGEST = 64  # side of the maps that the naive variant keeps
SIDES = {"sd15": (16, 32), "sd21": (16, 32), "sdxl": (32, 64)}
MMDIT = {  # a small Stable Diffusion 3 at 512 px
    "sample_size": 64,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 8,
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "caption_projection_dim": 512,
    "joint_attention_dim": 1024,
    "pooled_projection_dim": 512,
    "pos_embed_max_size": 96,
}
ROWS = 77 + 256  # of its text


class KeepEveryMap:
    """An attention processor that writes the softmax out and keeps the mean over heads of each
    map, step by step."""

    def __init__(self, kept: list):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(x)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        probabilities = attn.get_attention_scores(q, k, attention_mask)
        if hidden_states.shape[1] <= LARGEST**2:
            self.kept.append(probabilities.unflatten(0, (-1, attn.heads)).mean(1))
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, v)))


@contextmanager
def naive(unet):
    kept = []
    before = unet.attn_processors
    if not all(isinstance(p, AttnProcessor2_0) for p in before.values()):
        raise ValueError(
            "the plain pipeline is expected to use torch's fused attention in every layer"
        )
    unet.set_attn_processor(KeepEveryMap(kept))
    try:
        yield
    finally:
        unet.set_attn_processor(before)


@contextmanager
def unfused():
    """Attention is read without the fused kernel."""
    fused, attention._fused = attention._fused, lambda *_: None
    try:
        yield
    finally:
        attention._fused = fused


def build(model: str, device: str, dtype: str, steps: int) -> TextToImage:
    if model == "embedded":
        return TextToImage(
            steps=steps,
            guidance=3.0,
            device=device,
            dtype=dtype,
            cross_resolution=16,
            self_resolution=32,
        )
    with tempfile.TemporaryDirectory() as folder:
        return TextToImage(
            model=str(save(model, Path(folder), device)), steps=steps, device=device, dtype=dtype
        )


def generations(generator: TextToImage, batch: int) -> dict:
    """{variant: a function that makes a batch}; whole generations."""
    plan = make_plan(batch)

    def run(context, capture):
        with context:
            generator.generate(plan, capture=capture)

    return {
        "plain": lambda: run(nullcontext(), False),
        "capture": lambda: run(nullcontext(), True),
        **({"unfused": lambda: run(unfused(), True)} if generator.device != "cpu" else {}),
        "naive": lambda: run(naive(generator.network), False),
    }


def single_steps(unet, model: str, batch: int, device: str) -> dict:
    """{variant: a function that does one guided step of a UNet}."""
    latent, width = unet.config.sample_size, unet.config.cross_attention_dim
    random = torch.Generator(device).manual_seed(0)
    noise = torch.randn(
        2 * batch, 4, latent, latent, generator=random, device=device, dtype=unet.dtype
    )
    states = torch.randn(2 * batch, 77, width, generator=random, device=device, dtype=unet.dtype)
    reading, words, added = reading_of(unet, *SIDES[model]), words_of(states[:batch]), None
    if model == "sdxl":
        added = {
            "text_embeds": torch.zeros(2 * batch, 1280).to(states),
            "time_ids": torch.ones(2 * batch, 6).to(states),
        }

    def step(context):
        with torch.no_grad(), context:
            unet(
                noise, torch.full((2 * batch,), 500, device=device), states, added_cond_kwargs=added
            )

    return {
        "plain": lambda: step(nullcontext()),
        "capture": lambda: step(AttentionRecorder(unet, reading, words)),
        "naive": lambda: step(naive(unet)),
    }


def joint_steps(network, batch: int, device: str) -> dict:
    """{variant: a function that does one guided step of a network of joint attention}; three
    classes of two tokens are read. The naive variant keeps each head's whole softmax."""
    side, random = MMDIT["sample_size"], torch.Generator(device).manual_seed(0)

    def noise(*shape):
        return torch.randn(2 * batch, *shape, generator=random, device=device, dtype=network.dtype)

    given = {
        "hidden_states": noise(16, side, side),
        "encoder_hidden_states": noise(ROWS, MMDIT["joint_attention_dim"]),
        "pooled_projections": noise(MMDIT["pooled_projection_dim"]),
        "timestep": torch.full((2 * batch,), 500, device=device),
    }
    pixels = (side // MMDIT["patch_size"]) ** 2
    layout = Layout("last", pixels, pixels)
    sites = find_sites(network, layout, lambda: network(**given))
    words = Words([{"full_prompt_appended": [[1, 2], [3, 4], [5, 6]]}] * batch)
    reading = Reading(layout, sites, sites)

    def step(context):
        with torch.no_grad(), context:
            network(**given)

    kept: list = []

    def keep(_, seen):
        logits = seen.q[batch:] @ seen.k[batch:].mT * seen.scale
        kept.append(logits.softmax(-1).mean(1))

    def naive_step():
        kept.clear()
        step(Observer(network, keep))

    return {
        "plain": lambda: step(nullcontext()),
        "capture": lambda: step(AttentionRecorder(network, reading, words)),
        "naive": naive_step,
    }


def give_back(device: str) -> None:
    """What is no longer used goes back to the system, or the next variant would be charged with
    it."""
    if device == "cpu" and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def measure(variants: dict, rounds: int, device: str) -> dict:
    """Seconds and peak bytes of each variant; the variants take turns."""
    seconds, peaks = {name: [] for name in variants}, {}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for repeat in range(rounds + 1):  # the first is slower and not counted
        for name, run in list(variants.items()):
            gc.collect()
            give_back(device)
            reset_peak(device)
            started = clock()
            try:
                run()
            except torch.OutOfMemoryError:
                del variants[name]
                print(f"  {name}: out of memory")
                continue
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(clock() - started)
                peaks[name] = max(peaks.get(name, 0), peak_bytes(device))
    found = {}
    for name in variants:
        ratio = statistics.median(
            a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)
        )
        found[name] = {
            "seconds": round(statistics.median(seconds[name]), 4),
            "time_over_plain": round(ratio, 4),
            "peak_gb": round(peaks[name] / 1e9, 3),
            "peak_over_plain": round(peaks[name] / peaks["plain"], 4),
        }
    return found


def profile(run, device: str) -> None:
    """The operations that take most of the time of ``run()``."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[kind.CPU] if device == "cpu" else [kind.CPU, kind.CUDA]
    ) as found:
        run()
    key = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows)
    print(
        "  of the time with capture: "
        + ", ".join(f"{row.key} {100 * getattr(row, key) / total:.1f} %" for row in rows[:10])
    )


def _built(model: str, whole: bool, device: str, dtype: str, steps: int):
    """The generator, or the network alone."""
    if model == "mmdit":
        torch.manual_seed(0)
        return SD3Transformer2DModel(**MMDIT).to(device, getattr(torch, dtype)).eval()
    if whole:
        return build(model, device, dtype, steps)
    return build_unet(model, getattr(torch, dtype))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=["embedded", "mmdit", *SIDES])
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--steps", type=int, help="of a whole generation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--profile", action="store_true", help="print which operations take the time"
    )
    options = parser.parse_args()
    gpu = options.device != "cpu"
    models = options.models or (list(SIDES) if gpu else ["embedded", "sd15", "mmdit"])
    dtype = options.dtype or ("float16" if gpu else "float32")
    torch.set_flush_denormal(True)
    if not gpu:
        torch.set_num_threads(1)
    results = []
    for model in models:
        whole, steps = gpu or model == "embedded", options.steps or (25 if gpu else 20)
        whole = whole and model != "mmdit"
        built = _built(model, whole, options.device, dtype, steps)
        for batch in options.batch or (
            [1, 4, 16] if gpu else [1, 16] if model == "embedded" else [1]
        ):
            print(
                f"{model}, batch {batch}, {dtype}, "
                f"{f'{steps} steps and decoding' if whole else 'one guided step'}"
            )
            if model == "mmdit":
                variants = joint_steps(built, batch, options.device)
            elif whole:
                variants = generations(built, batch)
            else:
                variants = single_steps(built, model, batch, options.device)
            found = measure(variants, options.rounds, options.device)
            if options.profile:
                profile(variants["capture"], options.device)
            for name, row in found.items():
                print(
                    f"  {name:8} {row['seconds']:9.3f} s {row['time_over_plain']:7.3f}x   peak "
                    f"{row['peak_gb']:7.3f} GB "
                    f"{row['peak_over_plain']:6.3f}x"
                )
            results.append(
                {
                    "model": model,
                    "batch": batch,
                    "dtype": dtype,
                    "whole": whole,
                    "steps": steps,
                    **found,
                }
            )
        del built, variants
    print(json.dumps({"capture": results, **machine(options.device)}))


if __name__ == "__main__":
    main()
