"""Who makes the units of a plan: this process, worker processes of this machine, one of several
shards, or a Ray cluster.

An executor knows nothing of images. A :class:`Task` draws a unit and returns its pending write. The
write runs while the next unit is drawn, and never leaves its process. The same plan and the same
records serve every :class:`Executor`.
"""

from dd.execution.base import CANNOT_WRITE, EXIT, Executor, Task, UnitsFailed, stopped_by_signal
from dd.execution.local import Local
from dd.execution.ray import Ray
from dd.execution.shard import Shard

__all__ = [
    "CANNOT_WRITE",
    "EXIT",
    "Executor",
    "Local",
    "Ray",
    "Shard",
    "Task",
    "UnitsFailed",
    "stopped_by_signal",
]
