"""Workers of a Ray cluster: Ray Core actors, nothing of Ray Data or the Jobs API. The only
importer of ray."""

import os
import socket
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

from dd.execution.base import State, UnitsFailed, stopped_by_signal
from dd.execution.crew import Crew
from dd.execution.local import Local
from dd.store.locks import Fence

START = (
    "Start one with `ray start --head` (other machines: `ray start --address=<host>:6379`), "
    "or give executor.address=null"
)
BEFORE_IMPORT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"
}  # Ray's own switch for a cluster of one machine, on 127.0.0.1 only
STORE = 100 * 2**20  # bytes of Ray's object store on this machine; units and answers are a few KiB


class Ray(Local):
    """Workers on a Ray cluster: ``workers`` of them, or (None) as many as there is room for. Those
    of nodes that join are used, and lost ones are done without.

    ``address``: None starts a Ray for this run that listens on the loopback interface only; "auto"
    or "host:port" joins the cluster that this machine is a node of. Each worker takes
    ``cpus_per_worker`` and ``gpus_per_worker`` (parts are allowed; None: one GPU if the run's
    device is cuda, else none). ``timeout``: seconds for the first worker to get a place, and for a
    machine that is lost to let go of the data set. ``attempts``, ``max_failed``, ``threads``: as
    with Local.

    ValueError if no cluster answers, if there is no room, or if a node does not see the data set or
    has other versions.
    """

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        cpus_per_worker: float = 1,
        gpus_per_worker: float | None = None,
        timeout: float = 300,
        attempts: int = 3,
        max_failed: float = 0.01,
        threads: int | None = None,
    ):
        super().__init__(workers, None, attempts, max_failed, threads)
        for name, value, allowed in (
            ("cpus_per_worker", cpus_per_worker, "above 0"),
            ("timeout", timeout, "of seconds above 0"),
            ("gpus_per_worker", gpus_per_worker, "from 0 on, or null"),
        ):
            gpus = name == "gpus_per_worker"
            if not (gpus and value is None) and (
                type(value) not in (int, float) or value < 0 or (not gpus and value == 0)
            ):
                raise ValueError(f"executor.{name}={value!r}: expected a number {allowed}")
        if address is not None and address != "auto" and _host_and_port(address) is None:
            raise ValueError(
                f"executor.address={address!r}: expected null, auto or host:port, such as "
                "10.0.0.1:6379"
            )
        self.address, self.timeout = address, timeout
        self.cpus_per_worker, self.gpus_per_worker = cpus_per_worker, gpus_per_worker

    def places(self, device: str) -> list[str]:
        """The device of the driver's own generator, which says what the run is."""
        return [device]

    def name(self, worker: int) -> str:
        """Workers count from 1; 0 is the driver, which records what is quarantined."""
        return f"ray{worker}"

    def needs(self, device: str) -> dict[str, float]:
        """What Ray reserves for each worker."""
        gpus = self.gpus_per_worker
        if gpus == 0 and device.startswith("cuda"):
            raise ValueError(
                "executor.gpus_per_worker=0 with device=cuda: expected a number above 0 (0.5: two "
                "share a GPU)"
            )
        return {
            "CPU": self.cpus_per_worker,
            "GPU": float(device.startswith("cuda")) if gpus is None else gpus,
        }

    def run(
        self, units, total: int, work, tools, build, died, progress, device: str = "cpu", lock=None
    ) -> dict:
        if build is None or lock is None:
            raise ValueError(
                "workers of a cluster need a way to build the generator in each of them, and the "
                "folder's lock"
            )
        state, needs = State(units, self, total, progress), self.needs(device)
        if not units:
            return {}
        task = (
            work,
            build,
            "cuda" if device.startswith("cuda") else device,
        )  # Ray shows a worker its own GPUs only
        # Ray takes the signal in init: it is ours again inside. The fence goes last, when Ray has
        # ended what was still there.
        with (
            stopped_by_signal(),
            Fence(lock.folder) as fence,
            cluster(self) as ray,
            stopped_by_signal(),
        ):
            try:
                Crew(ray, state, self, needs, task, died, fence).run()
            except (ray.exceptions.RayError, ConnectionError) as error:
                what = f"the Ray cluster was lost ({type(error).__name__}: {str(error)[:500]})"
                raise UnitsFailed(
                    f"{what}. Everything finished is kept; the same command goes on"
                ) from error
        return state.failed


def _host_and_port(address):
    try:
        parts = (
            urlsplit(f"//{address}") if isinstance(address, str) and "/" not in address else None
        )
        return (parts.hostname, parts.port) if parts and parts.hostname and parts.port else None
    except ValueError:
        return None


@contextmanager
def cluster(settings: Ray):
    """The module ray, connected as ``settings`` say; a Ray that this process already uses is
    taken, and left, as it is."""
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
        _init(
            ray,
            "Ray did not start",
            address="local",
            include_dashboard=False,
            object_store_memory=STORE,
            **quiet,
        )
        print(f"started Ray for this run in {time.monotonic() - started:.0f} s", flush=True)
    else:
        where = (
            f"executor.address={settings.address}: no Ray cluster that this machine is a node of"
        )
        _knock(settings, where)
        _init(ray, where, address=settings.address, **quiet)
    try:
        if settings.address is None and any(
            node["NodeManagerAddress"] != "127.0.0.1" for node in ray.nodes()
        ):
            raise ValueError(
                "Ray was imported before executor=ray could keep it off the network: import it "
                "later, or set "
                f"{', '.join('='.join(item) for item in LOOPBACK.items())}"
            )
        yield ray
    finally:
        ray.shutdown()


def _knock(settings, where):
    """Ray itself knocks for minutes at an address where nobody is."""
    if settings.address == "auto":
        return
    try:
        socket.create_connection(
            _host_and_port(settings.address), min(settings.timeout, 10)
        ).close()
    except OSError as error:
        raise ValueError(f"{where} ({error}). {START}") from None


def _init(ray, what, **settings):
    try:
        ray.init(**settings)
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {str(error)[:500]}). {START}") from error
