"""What executors share: their interface, what is still to do, how a unit is tried, and how a run
ends."""

import errno
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from dd.execution.settings import WorkerSettings
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.samples import Sample

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# beside 0 and 2 (wrong input)
EXIT = {"units failed": 3, "cannot write": 4, "busy": 5, "terminated": 143, "stopped": 130}
SHOWN = 3

Unit: TypeAlias = list[Sample]
Write: TypeAlias = Callable[[], object]
Draw: TypeAlias = Callable[[Any, Unit, str], Write | None]
Build: TypeAlias = Callable[[str], Any]
Answer: TypeAlias = tuple[str, Any]  # (kind, content)


@dataclass(frozen=True)
class Task:
    """The work on units. ``draw(tools, unit, worker)`` draws one and returns its pending write: a
    callable that writes and records it (None: nothing is left to do). ``tools``: those of this
    process; ``build(device)`` makes them in a worker process (None: there are no workers).
    ``died(unit, worker, pid)`` cleans up after a dead worker and returns whether the unit is done
    anyway. ``draw`` and ``build`` are sent to workers, so they are picklable."""

    draw: Draw
    tools: Any = None
    build: Build | None = None
    died: Callable[[Unit, str, int], bool] = lambda unit, worker, pid: False


class Executor(Protocol):
    """Who makes the units of a plan. The same plan and records serve every executor, so one can
    continue what another has begun.

    ``shard``: (index, count) of a driver that shares the plan with others, else None; ``threads``:
    CPU threads of each worker, None for the process's own.
    """

    shard: tuple[int, int] | None
    threads: int | None

    def places(self, device: str) -> list[str]:
        """The devices of the workers, for a run with ``device``. The first is that of the driver's
        own generator, which defines the run's identity."""

    def share(self, units: list[Unit]) -> list[Unit]:
        """The units that this driver makes."""

    def name(self, worker: int) -> str:
        """The name of a worker, and of its file of records; 0 is the driver."""

    def run(
        self,
        units: Sequence[Unit],
        total: int,
        task: Task,
        progress: Progress,
        device: str = "cpu",
        lock: Lock | None = None,
    ) -> dict[int, str]:
        """Make ``units`` of ``total``. Returns {position in ``units``: error} of quarantined units.
        A unit is made when its pending write is done.

        UnitsFailed as soon as more units failed than the run may lose; OSError if the disk accepts
        no more.
        """


class UnitsFailed(RuntimeError):
    """More units failed than the run may lose."""


class State:
    """What is still to do, and what has gone wrong."""

    def __init__(
        self, units: Sequence[Unit], settings: WorkerSettings, total: int, progress: Progress
    ) -> None:
        self.units, self.settings, self.total, self.progress = units, settings, total, progress
        self.queue = deque(range(len(units)))
        self.tries: dict[int, int] = {}
        self.failed: dict[int, str] = {}

    def made(self, number: int) -> None:
        self.progress.advance(len(self.units[number]))

    def again(self, number: int) -> None:
        """Requeue a unit that only shared a worker with the one that crashed."""
        self.tries.setdefault(number, 0)
        self.queue.append(number)

    def alone(self, number: int) -> bool:
        """Whether a unit is made with no other in the same process, because it was there when
        something went wrong."""
        return number in self.tries

    def lost(
        self, number: int, error: str, cause: BaseException | None = None, final: bool = False
    ) -> None:
        """A unit failed again: retry it later, or quarantine it (at once if ``final``)."""
        self.tries[number] = self.tries.get(number, 0) + 1
        name = self.units[number][0].unit
        self.progress.fail(f"unit {name}, attempt {self.tries[number]}: {error}")
        if self.tries[number] < self.settings.attempts and not final:
            self.queue.append(number)
            return
        self.failed[number] = error
        if len(self.failed) > self.settings.max_failed * self.total:
            first = list(self.failed.items())[:SHOWN]
            shown = [f"unit {self.units[n][0].unit}: {text[:500]}" for n, text in first]
            raise UnitsFailed(
                f"{len(self.failed)} of {self.total} units failed {self.settings.attempts} times, "
                f"more than executor.max_failed={self.settings.max_failed} allows:\n  "
                + "\n  ".join(shown)
                + "\nEverything else is kept; the same command tries them again"
            ) from cause


def ends_run(error: BaseException) -> bool:
    """Whether no further unit is tried after ``error``: the disk accepts no more, or the error is
    not one of a unit."""
    full = isinstance(error, OSError) and error.errno in CANNOT_WRITE
    return full or not isinstance(error, Exception)


def answer(call: Callable[[], object]) -> Answer:
    """The outcome of a call: ("done", its result), ("failed", error), or ("cannot write", arguments
    of an OSError)."""
    try:
        return "done", call()
    except Exception as error:
        if isinstance(error, OSError) and ends_run(error):
            return "cannot write", (error.errno, error.strerror, error.filename)
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(where.filename)}:{where.lineno}"
        return "failed", f"{type(error).__name__}: {error} ({place})"


def attempt(draw: Draw, tools: Any, unit: Unit, worker: str) -> Answer:
    """:func:`answer` for a whole unit: drawn, and then written."""

    def whole() -> None:
        write = draw(tools, unit, worker)
        if write is not None:
            write()

    return answer(whole)


@contextmanager
def stopped_by_signal() -> Iterator[None]:
    """SIGTERM (a batch system's time limit) drops the current unit, as Ctrl-C does, with exit code
    143. This also holds if a library handles the exit differently: Ray exits with 1 at every
    exit."""
    heard = False

    def stop(*_: object) -> None:
        nonlocal heard
        heard = True
        text = "terminated: what is finished is kept. The same command resumes from here."
        print(text, file=sys.stderr, flush=True)
        sys.exit(EXIT["terminated"])

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit:
        if heard:
            sys.exit(EXIT["terminated"])
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
