"""Who makes the units of a plan: this process, worker processes of this machine, one of several
shards, or a Ray cluster.

An executor knows nothing of images. ``work(tools, unit, worker)`` draws one unit and returns its
rest: a callable without arguments that writes and records it while the next unit is drawn (None:
nothing is left to do). A unit is made when its rest is done. ``build(device)`` gives a worker
process its ``tools`` (both picklable; rests never leave their process). The same plan and the same
records serve every executor.
"""

from dd.execution.base import CANNOT_WRITE, EXIT, UnitsFailed, stopped_by_signal
from dd.execution.local import Local
from dd.execution.ray import Ray
from dd.execution.shard import Shard

__all__ = ["CANNOT_WRITE", "EXIT", "Local", "Ray", "Shard", "UnitsFailed", "stopped_by_signal"]
