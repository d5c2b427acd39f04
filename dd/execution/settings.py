"""The settings of executors."""

from typing import Annotated, Self
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import model_validator

from dd.store.settings import Count, Hint, Natural, Settings, Share

# workers of a machine, threads of a worker, attempts at a unit
Few = Annotated[int, Ge(1), Le(1024)]
Positive = Annotated[float, Gt(0)]


class WorkerSettings(Settings):
    """Settings of every executor. A unit is tried ``attempts`` times in all, then quarantined. If
    more than ``max_failed`` (a share) of the units fail, the run ends. ``threads``: CPU threads of
    each worker, None for the process's own."""

    noun = "executor"

    workers: Few | None = None
    attempts: Few = 3
    max_failed: Share = 0.01
    threads: Few | None = None


class LocalSettings(WorkerSettings):
    """``devices``: of the workers, None = the run's own; ``spawn``: run even a single worker as a
    separate process."""

    devices: Annotated[Annotated[list[str], MinLen(1)] | None, Hint("such as [cuda:0, cuda:1]")] = (
        None
    )
    spawn: bool = False


class ShardSettings(LocalSettings):
    """Every ``count``-th unit from ``index`` on; None: taken from the environment."""

    index: Natural | None = None
    count: Count | None = None


class RaySettings(WorkerSettings):
    """``address``: of a cluster; "auto" for the one that this machine is a node of; None to start a
    Ray for this run. ``timeout``: seconds for the first worker to get a place, and for a lost
    machine to release the data set."""

    address: str | None = None
    cpus_per_worker: Positive = 1
    gpus_per_worker: Annotated[float, Ge(0)] | None = None
    timeout: Annotated[Positive, Hint("in seconds")] = 300

    @model_validator(mode="after")
    def _host_and_port(self) -> Self:
        if self.address not in (None, "auto") and host_and_port(self.address) is None:
            raise ValueError(
                f"executor.address={self.address!r}: expected null, auto or host:port, such as "
                "10.0.0.1:6379"
            )
        return self


def host_and_port(address: str) -> tuple[str, int] | None:
    """("10.0.0.1", 6379) of "10.0.0.1:6379"; None for anything else."""
    try:
        parts = urlsplit("" if "/" in address else f"//{address}")
        return (parts.hostname, parts.port) if parts.hostname and parts.port else None
    except ValueError:
        return None
