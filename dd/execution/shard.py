"""One of several drivers that share a plan."""

import os

from dd.execution.local import Local


class Shard(Local):
    """Every ``count``-th unit, from ``index`` on: one of several drivers that share the plan, on
    one machine or many.

    Without ``index`` and ``count`` they are those of a SLURM array task or of a process started by
    torchrun; with ``count`` alone the SLURM task's own number is the index (some tasks of an array
    again).
    """

    def __init__(self, index: int | None = None, count: int | None = None, **settings):
        super().__init__(**settings)
        found, self.local_rank = _place(count), None
        index, count = found[0] if index is None else index, found[1] if count is None else count
        if type(index) is not int or type(count) is not int or not 0 <= index < count:
            raise ValueError(
                f"executor.index={index}, executor.count={count}: expected 0 <= index < count. "
                "Give both, or start it as a "
                "SLURM array task (SLURM_ARRAY_TASK_ID) or with torchrun (RANK, WORLD_SIZE)"
            )
        self.shard = index, count
        if "SLURM_ARRAY_TASK_ID" not in os.environ:
            self.local_rank = os.environ.get("LOCAL_RANK")

    def places(self, device: str) -> list[str]:
        if (
            device == "cuda" and self.local_rank is not None and self.devices is None
        ):  # torchrun: a process for each GPU
            device = f"cuda:{self.local_rank}"
        return super().places(device)

    def share(self, units: list) -> list:
        return units[self.shard[0] :: self.shard[1]]

    def name(self, worker: int) -> str:
        return "{}of{}".format(*self.shard) + (f"-{worker}" if worker else "")


def _place(count) -> tuple:
    """(index, count) that the environment names, or Nones."""

    def get(key, default=None):
        return int(os.environ[key]) if os.environ.get(key, "").isdecimal() else default

    task = get("SLURM_ARRAY_TASK_ID")
    if task is None:
        return get("RANK"), get("WORLD_SIZE")
    if count is not None:
        return task, count
    return (task - get("SLURM_ARRAY_TASK_MIN", 0)) // get("SLURM_ARRAY_TASK_STEP", 1), get(
        "SLURM_ARRAY_TASK_COUNT"
    )
