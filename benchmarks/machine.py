"""What a measurement was made on."""

import os
import platform
from datetime import date
from pathlib import Path

import torch

from dd.provenance import versions


def machine(device: str = "cpu") -> dict:
    """Device name, cores, threads, versions and date, for the JSON of a benchmark."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()
    return {
        "device": name, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "system": platform.machine(),
        "versions": versions(), "date": date.today().isoformat(),
    }  # fmt: skip


def processor() -> str:
    """The processor's own name, where the system tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def reset_peak(device: str = "cpu") -> None:
    """Start counting :func:`peak_bytes` anew."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str = "cpu") -> int:
    """The most memory held since :func:`reset_peak`: of the GPU's allocator, or of this process (Linux)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
