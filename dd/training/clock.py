"""How long a training of several parts took, and on which hardware."""

import os
import time
from pathlib import Path

import torch

from dd.generators import memory
from dd.store.provenance import read_own, write_json

FILE = "seconds.json"


def hardware() -> str:
    """The GPU's name, or the number of CPU cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, no GPU"


def peak_memory() -> int | None:
    """Bytes: the most that the GPU's allocator, or without a GPU this process, has held; None
    where that is not known (a CPU on another system than Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return memory.peak_bytes() if memory.STATUS.is_file() else None


def seconds(folder: str | Path) -> dict[str, float]:
    """Seconds by part."""
    path = Path(folder, FILE)
    return read_own(path, {"*": float}) if path.exists() else {}


class timed:
    """Adds the seconds of a part to those of ``folder``; an interrupted part counts the time it
    used."""

    def __init__(self, folder: str | Path, part: str) -> None:
        self.folder, self.part = Path(folder), part

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        known = seconds(self.folder)
        known[self.part] = known.get(self.part, 0) + time.perf_counter() - self.started
        write_json(self.folder / FILE, known)
