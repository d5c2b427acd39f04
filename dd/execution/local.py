"""This process, or worker processes of this machine."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

from dd.execution.base import (
    EXIT,
    Build,
    Draw,
    State,
    Task,
    Unit,
    UnitsFailed,
    Write,
    answer,
    ends_run,
    stopped_by_signal,
)
from dd.execution.settings import LocalSettings
from dd.execution.writes import PendingWrites
from dd.store.locks import Lock
from dd.store.progress import Progress


class Local:
    """Worker processes on this machine: one for each device of ``devices`` (None: every GPU, or the
    CPU), or ``workers`` spread over them. A single worker is this process itself unless ``spawn``.
    A worker that dies is started again. An :class:`dd.execution.base.Executor`; the settings are
    those of :class:`dd.execution.settings.LocalSettings`.
    """

    Settings: type[LocalSettings] = LocalSettings
    settings: LocalSettings
    shard: tuple[int, int] | None = None

    def __init__(self, **settings: Any) -> None:
        self.settings = self.Settings(**settings)
        self.threads = self.settings.threads

    def places(self, device: str) -> list[str]:
        """The device of each worker; ``device`` is the run's own (``cuda`` = every GPU)."""
        devices = self.settings.devices or [device]
        if devices == ["cuda"]:
            import torch  # here, because workers of other generators work without it

            if torch.cuda.device_count() > 1:
                devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        return [devices[i % len(devices)] for i in range(self.settings.workers or len(devices))]

    def share(self, units: list[Unit]) -> list[Unit]:
        return units

    def name(self, worker: int) -> str:
        return str(worker)

    def run(
        self,
        units: Sequence[Unit],
        total: int,
        task: Task,
        progress: Progress,
        device: str = "cpu",
        lock: Lock | None = None,
    ) -> dict[int, str]:
        places, state = self.places(device), State(units, self.settings, total, progress)
        with stopped_by_signal():
            if len(places) == 1 and not self.settings.spawn:
                self._run_here(state, task)
            elif units:
                if task.build is None:
                    raise ValueError(
                        "several workers need a way to build the generator in each of them: give "
                        "build"
                    )
                _ProcessPool(state, places[: len(units)], self.name, task, lock).run()
        return state.failed

    def _run_here(self, state: State, task: Task) -> None:
        written = None  # the unit that is being written
        with PendingWrites() as writes:
            while state.queue or written is not None:
                drawn = state.queue.popleft() if state.queue else None
                write, error = None, None
                if drawn is not None:
                    write, error = _draw(task, state.units[drawn], self.name(0))
                if written is not None:
                    _count(state, written, writes.end())
                written = drawn if write is not None else None
                if write is not None:
                    writes.begin(write)
                elif drawn is not None:
                    _count(state, drawn, error)


def _draw(task: Task, unit: Unit, worker: str) -> tuple[Write | None, Exception | None]:
    """(what is still to be written or None, error or None)."""
    try:
        return task.draw(task.tools, unit, worker), None
    except Exception as error:
        return None, error


def _count(state: State, number: int, error: BaseException | None) -> None:
    if error is None:
        state.made(number)
    elif ends_run(error):
        raise error
    else:
        state.lost(number, f"{type(error).__name__}: {error}", error)


class _Member(NamedTuple):
    """A worker process: its place, and the units it was given, in order."""

    process: SpawnProcess
    slot: int
    numbers: list[int]


class _ProcessPool:
    """Worker processes, each with a pipe; a broken pipe means a dead worker.

    A worker that has drawn a unit gets the next one, which it draws while the first is written. So
    it has at most two units, and answers for them in order.
    """

    def __init__(
        self,
        state: State,
        places: list[str],
        name: Callable[[int], str],
        task: Task,
        lock: Lock | None,
    ) -> None:
        self.state, self.places, self.name, self.task, self.lock = state, places, name, task, lock
        self.workers: dict[Connection, _Member] = {}
        self.starts = [0] * len(places)

    def run(self) -> None:
        try:
            for slot in range(len(self.places)):
                self._start(slot)
            while self.workers:
                for channel in wait(list(self.workers)):
                    if channel in self.workers:
                        self._hear(channel)
        finally:
            self._stop()

    def _start(self, slot: int) -> None:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        sent = self.task.draw, self.task.build, self.lock, self.places[slot], self.name(slot)
        process = context.Process(target=_worker, args=(*sent, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the pipe breaks when the worker dies
        self.workers[ours] = _Member(process, slot, [])

    def _hear(self, channel: Connection) -> None:
        _, slot, numbers = self.workers[channel]
        try:
            kind, content = channel.recv()
        except (EOFError, OSError):
            self._bury(channel)
            return
        if kind == "cannot write":
            raise OSError(*content)
        if kind == "cannot start":
            raise ValueError(f"a worker on {self.places[slot]} could not start: {content}")
        if kind == "ready":
            self.starts[slot] = 0
        elif kind == "done":
            self.state.made(numbers.pop(0))
        elif kind == "failed":
            self.state.lost(numbers.pop(0), content)
        if not numbers or (kind == "drawn" and self._beside(numbers[0])):
            self._next(channel)

    def _beside(self, number: int) -> bool:
        """Whether the next unit can be drawn while this one is written."""
        queue = self.state.queue
        return bool(queue) and not any(map(self.state.alone, (number, queue[0])))

    def _busy(self) -> bool:
        return any(member.numbers for member in self.workers.values())

    def _next(self, channel: Connection) -> None:
        if self.state.queue:
            number = self.state.queue.popleft()
            self.workers[channel].numbers.append(number)
            with suppress(OSError):  # it is dead; the pipe will show that too
                channel.send(self.state.units[number])
        elif not self._busy():
            for idle in list(self.workers):
                process = self.workers.pop(idle).process
                idle.close()
                process.join(10)

    def _bury(self, channel: Connection) -> None:
        process, slot, numbers = self.workers.pop(channel)
        channel.close()
        process.join()
        self.starts[slot] += 1
        name, code = self.name(slot), process.exitcode or 0
        how = f"worker {name} died (exit code {code}: {_how(code)})"
        if not numbers:
            self.state.progress.fail(how)
            if self.starts[slot] >= self.state.settings.attempts:
                raise UnitsFailed(f"{how} {self.starts[slot]} times before its first unit")
        for number in numbers:
            if self.task.died(self.state.units[number], name, process.pid or 0):
                self.state.made(number)
            elif number == numbers[-1]:
                self.state.lost(number, how)
            else:  # it was being written; drawing the other unit is what killed the process
                self.state.again(number)
        if self.state.queue:
            self._start(slot)
        elif self.workers and not self._busy():
            self._next(next(iter(self.workers)))  # no unit is running: start the idle workers

    def _stop(self) -> None:
        for member in self.workers.values():
            member.process.terminate()
        for channel, (process, *_) in self.workers.items():
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            channel.close()


def _how(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else "out of memory, or a crash in a library?"
    except ValueError:
        return "a signal"


def _worker(
    draw: Draw,
    build: Build,
    lock: Lock | None,  # the worker holds it too
    place: str,
    name: str,
    channel: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT["terminated"]))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        tools = build(place)
    except Exception as error:
        channel.send(("cannot start", f"{type(error).__name__}: {error}"))
        return
    channel.send(("ready", None))
    with PendingWrites() as writes:
        while _make_one(partial(draw, tools), name, channel, writes):
            pass


def _make_one(
    draw: Callable[[Unit, str], Write | None],
    name: str,
    channel: Connection,
    writes: PendingWrites,
) -> bool:
    """Draw a unit and start its write, whose thread reports how it ended. Returns whether the
    worker continues."""
    try:
        unit = channel.recv()
    except EOFError:
        return False
    kind, write = answer(partial(draw, unit, name))
    error = writes.end()  # from here on nobody else sends
    if error is not None:
        raise error
    if kind != "done" or write is None:
        channel.send((kind, write))
        return kind != "cannot write"
    channel.send(("drawn", None))
    writes.begin(lambda: channel.send(answer(write)))
    return True


def _end_with_parent() -> None:
    """A killed driver cannot stop its workers. They stop themselves, so that the next driver is
    alone."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)
