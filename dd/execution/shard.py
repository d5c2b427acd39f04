"""One of several drivers that share a plan."""

import os
from typing import Any

from dd.execution.base import Unit
from dd.execution.local import Local
from dd.execution.settings import ShardSettings


class Shard(Local):
    """Every ``count``-th unit, from ``index`` on: one of several drivers that share the plan, on
    one machine or many.

    Without ``index`` and ``count`` they are those of a SLURM array task or of a process started by
    torchrun. With ``count`` alone, the SLURM task's own number is the index (to run some tasks of
    an array again).
    """

    Settings = ShardSettings
    settings: ShardSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        index, count = self.settings.index, self.settings.count
        found = _place(count)
        index, count = found[0] if index is None else index, found[1] if count is None else count
        if index is None or count is None or not 0 <= index < count:
            raise ValueError(
                f"executor.index={index}, executor.count={count}: expected 0 <= index < count. "
                "Give both, or start it as a SLURM array task (SLURM_ARRAY_TASK_ID) or with "
                "torchrun (RANK, WORLD_SIZE)"
            )
        self.shard = index, count

    def places(self, device: str) -> list[str]:
        rank = None if "SLURM_ARRAY_TASK_ID" in os.environ else os.environ.get("LOCAL_RANK")
        own_gpu = device == "cuda" and rank is not None and self.settings.devices is None
        return super().places(f"cuda:{rank}" if own_gpu else device)  # of torchrun

    def share(self, units: list[Unit]) -> list[Unit]:
        index, count = self.shard or (0, 1)
        return units[index::count]

    def name(self, worker: int) -> str:
        return "{}of{}".format(*self.shard or (0, 1)) + (f"-{worker}" if worker else "")


def _number(key: str) -> int | None:
    """Of the environment."""
    value = os.environ.get(key, "")
    return int(value) if value.isdecimal() else None


def _place(count: int | None) -> tuple[int | None, int | None]:
    """(index, count) from the environment, or Nones."""
    task = _number("SLURM_ARRAY_TASK_ID")
    if task is None:
        return _number("RANK"), _number("WORLD_SIZE")
    if count is not None:
        return task, count
    first, step = _number("SLURM_ARRAY_TASK_MIN") or 0, _number("SLURM_ARRAY_TASK_STEP") or 1
    return (task - first) // step, _number("SLURM_ARRAY_TASK_COUNT")
