"""What a measurement was made on."""

import os
import platform
import time
from datetime import date
from pathlib import Path

import torch

from dd.store.provenance import versions


def machine(device: str = "cpu") -> dict:
    """Device name, cores, threads, versions and date, for the JSON of a benchmark."""
    name = (
        torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()
    )
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": platform.machine(),
        "versions": versions(),
        "date": date.today().isoformat(),
    }


def processor() -> str:
    """The processor's own name, where the system tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def seconds(run) -> float:
    """Wall time of ``run()``."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
