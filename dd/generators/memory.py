"""How many images fit into memory at a time."""

from collections.abc import Callable
from pathlib import Path

import torch

# share of the free memory: other batches may need a little more, and a CPU's memory is shared
SHARE = {"cuda": 0.85, "cpu": 0.5}
CEILING = 64
STATUS = Path("/proc/self/status")


def reset_peak(device: str = "cpu") -> None:
    """Start a new count for :func:`peak_bytes`."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str = "cpu") -> int:
    """The most memory held since :func:`reset_peak`: reserved by the GPU's allocator, or by this
    process (Linux)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _kilobytes(STATUS, "VmHWM") * 1024


def budget_bytes(device: str = "cpu") -> int:
    """What a process may hold on ``device``: what it holds now plus a share (``SHARE``) of the free
    memory. ValueError if that cannot be determined."""
    kind = torch.device(device).type
    if kind == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return torch.cuda.memory_reserved(device) + int(SHARE[kind] * free)
    if kind != "cpu" or not STATUS.is_file():
        raise ValueError(
            "unit_size=auto measures memory on CUDA devices and on the CPU of Linux; give a "
            "number, such as unit_size=4"
        )
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024
    return _kilobytes(STATUS, "VmRSS") * 1024 + int(SHARE[kind] * free)


def _kilobytes(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def largest_batch(
    peak: Callable[[int], int], base: int, budget: int, ceiling: int = CEILING
) -> int:
    """The largest power of two up to ``ceiling`` whose ``peak(batch)`` bytes are within ``budget``;
    ``base`` bytes are held in any case.

    Calls ``peak`` for 1, 2, 4, ... and stops before a batch that, judging by the last two, would
    exceed the budget; memory thus never runs out. ValueError if not even one image fits.
    """
    batch, held = 1, [base, peak(1)]
    if held[-1] > budget:
        raise ValueError(
            f"one image needs {held[-1] / 1e9:.1f} GB, but only {budget / 1e9:.1f} GB are "
            "available: diffusion.vae_slicing=true, diffusion.offload=model or a smaller "
            "diffusion.size need less"
        )
    while batch * 2 <= ceiling:
        # base, 1, 2, 4, 8 images: steps of 1, 1, 2, 4
        growth = (held[-1] - held[-2]) * min(batch, 2)
        if held[-1] + growth > budget:
            break
        held.append(peak(batch * 2))
        if held[-1] > budget:
            break
        batch *= 2
    return batch
