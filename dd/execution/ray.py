"""Workers of a Ray cluster, as Ray Core actors; Ray Data and the Jobs API are not used. The only
importer of ray."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dd.execution.base import State, Task, Unit, UnitsFailed, stopped_by_signal
from dd.execution.pool import WorkerPool
from dd.execution.settings import RaySettings, host_and_port
from dd.store.locks import Fence, Lock
from dd.store.progress import Progress

START = (
    "Start one with `ray start --head` (other machines: `ray start --address=<host>:6379`), "
    "or give executor.address=null"
)
BEFORE_IMPORT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Ray's own switch for a cluster of one machine, on 127.0.0.1 only
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
STORE = 100 * 2**20  # bytes of Ray's object store on this machine; units and answers are a few KiB


class Ray:
    """Workers on a Ray cluster: ``workers`` of them, or (None) as many as there is room for. Nodes
    that join are used; the run continues without lost ones. Each worker takes ``cpus_per_worker``
    and ``gpus_per_worker`` (fractions are allowed; None: one GPU if the run's device is cuda, else
    none). An :class:`dd.execution.base.Executor`; the settings are those of
    :class:`dd.execution.settings.RaySettings`. A Ray started for this run listens on the loopback
    interface only.

    ValueError if no cluster answers, if there is no room, or if a node does not see the data set or
    has other versions.
    """

    Settings = RaySettings
    shard: tuple[int, int] | None = None

    def __init__(self, **settings: Any) -> None:
        self.settings = RaySettings(**settings)
        self.threads = self.settings.threads

    def places(self, device: str) -> list[str]:
        return [device]

    def share(self, units: list[Unit]) -> list[Unit]:
        return units

    def name(self, worker: int) -> str:
        """Workers count from 1; 0 is the driver, which records quarantined units."""
        return f"ray{worker}"

    def needs(self, device: str) -> dict[str, float]:
        """What Ray reserves for each worker."""
        gpus, wanted = self.settings.gpus_per_worker, device.startswith("cuda")
        if gpus == 0 and wanted:
            raise ValueError(
                "executor.gpus_per_worker=0 with device=cuda: expected a number above 0 (0.5: two "
                "share a GPU)"
            )
        return {
            "CPU": self.settings.cpus_per_worker,
            "GPU": float(wanted) if gpus is None else gpus,
        }

    def run(
        self,
        units: Sequence[Unit],
        total: int,
        task: Task,
        progress: Progress,
        device: str = "cpu",
        lock: Lock | None = None,
    ) -> dict[int, str]:
        if task.build is None or lock is None:
            raise ValueError(
                "workers of a cluster need a way to build the generator in each of them, and the "
                "folder's lock"
            )
        state, needs = State(units, self.settings, total, progress), self.needs(device)
        if not units:
            return {}
        # Ray installs its own signal handler in init, so ours is set again inside. The fence is
        # released last, after Ray has ended all remaining workers.
        with (
            stopped_by_signal(),
            Fence(lock.folder) as fence,
            cluster(self.settings) as ray,
            stopped_by_signal(),
        ):
            try:
                WorkerPool(ray, self, state, needs, task, device, fence).run()
            except (ray.exceptions.RayError, ConnectionError) as error:
                raise UnitsFailed(
                    f"the Ray cluster was lost ({type(error).__name__}: {str(error)[:500]}). "
                    "Everything finished is kept; the same command resumes"
                ) from error
        return state.failed


@contextmanager
def cluster(settings: RaySettings) -> Iterator[Any]:
    """The module ray, connected according to ``settings``. If this process already uses Ray, that
    one is used and left running."""
    for key, value in (BEFORE_IMPORT | ({} if settings.address else LOOPBACK)).items():
        os.environ.setdefault(key, value)
    try:
        import ray
    except ImportError as error:
        raise ValueError(f'executor=ray needs Ray ({error}): pip install -e ".[ray]"') from None
    if ray.is_initialized():
        yield ray
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if settings.address is None:
        started = time.monotonic()
        own = {"include_dashboard": False, "object_store_memory": STORE}
        _init(ray, "Ray did not start", address="local", **own, **quiet)
        print(f"started Ray for this run in {time.monotonic() - started:.0f} s", flush=True)
    else:
        address = f"executor.address={settings.address}"
        where = f"{address}: no Ray cluster that this machine is a node of"
        _knock(settings, where)
        _init(ray, where, address=settings.address, **quiet)
    try:
        others = (node["NodeManagerAddress"] != "127.0.0.1" for node in ray.nodes())
        if settings.address is None and any(others):
            raise ValueError(
                "Ray was imported before executor=ray could keep it off the network: import it "
                f"later, or set {', '.join('='.join(item) for item in LOOPBACK.items())}"
            )
        yield ray
    finally:
        ray.shutdown()


def _knock(settings: RaySettings, where: str) -> None:
    """Test the address first, since Ray itself tries for minutes if nobody answers."""
    address = host_and_port(settings.address or "")
    if address is None:
        return
    try:
        socket.create_connection(address, min(settings.timeout, 10)).close()
    except OSError as error:
        raise ValueError(f"{where} ({error}). {START}") from None


def _init(ray: Any, what: str, **settings: Any) -> None:
    try:
        ray.init(**settings)
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {str(error)[:500]}). {START}") from error
