"""This process, or worker processes of this machine."""

import os
import signal
import sys
import threading
from contextlib import suppress
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

from dd.execution.base import EXIT, State, UnitsFailed, answer, ends_run, stopped_by_signal
from dd.execution.rests import Rests
from dd.store.provenance import quoted

MOST = 1024  # workers of a machine, threads of a worker, attempts at a unit


class Local:
    """Worker processes on this machine: one for each device of ``devices`` (None: every GPU, or the
    CPU), or ``workers`` spread over them; a single one is this process itself unless ``spawn``.

    A worker that dies is started again; a unit is tried ``attempts`` times in all, then
    quarantined. UnitsFailed as soon as more than ``max_failed`` (a share) of the units are.
    ``threads``: CPU threads of each worker, None for the process's own.
    """

    def __init__(
        self,
        workers: int | None = None,
        devices: list[str] | None = None,
        attempts: int = 3,
        max_failed: float = 0.01,
        threads: int | None = None,
        spawn: bool = False,
    ):
        for name, value in (("workers", workers), ("threads", threads), ("attempts", attempts)):
            if (value is not None or name == "attempts") and (
                type(value) is not int or not 1 <= value <= MOST
            ):
                raise ValueError(
                    f"executor.{name}={quoted(value)}: expected a whole number from 1 to {MOST}"
                )
        if type(max_failed) not in (int, float) or not 0 <= max_failed <= 1:
            raise ValueError(
                f"executor.max_failed={max_failed!r}: expected a share of the units from 0 to 1"
            )
        if devices is not None and (not devices or isinstance(devices, str)):
            raise ValueError(
                f"executor.devices={devices!r}: expected a list such as [cuda:0, cuda:1], or null"
            )
        self.workers, self.devices, self.attempts, self.max_failed = (
            workers,
            devices,
            attempts,
            max_failed,
        )
        self.threads, self.spawn, self.shard = threads, spawn, None

    def places(self, device: str) -> list[str]:
        """The device of each worker; ``device`` is what the run was given (``cuda`` = every
        GPU)."""
        devices = self.devices or [device]
        if devices == ["cuda"]:
            import torch  # here, since workers of other generators do without it

            devices = (
                [f"cuda:{i}" for i in range(torch.cuda.device_count())]
                if torch.cuda.device_count() > 1
                else ["cuda"]
            )
        return [devices[i % len(devices)] for i in range(self.workers or len(devices))]

    def share(self, units: list) -> list:
        """The units that this driver makes."""
        return units

    def name(self, worker: int) -> str:
        """Of a worker, and of its file of records."""
        return str(worker)

    def run(
        self, units, total: int, work, tools, build, died, progress, device: str = "cpu", lock=None
    ) -> dict:
        """Make ``units`` of ``total``; returns {position in ``units``: error} of those that are
        quarantined.

        ``tools``: this process's own, ``build(device)`` those of a worker process; ``died(unit,
        worker, pid)`` tidies up after a worker that died and says whether the unit is done all the
        same. OSError for a disk that takes no more.
        """
        places, state = self.places(device), State(units, self, total, progress)
        with stopped_by_signal():
            if len(places) == 1 and not self.spawn:
                self._run_here(state, work, tools)
            elif units:
                if build is None:
                    raise ValueError(
                        "several workers need a way to build the generator in each of them: give "
                        "build"
                    )
                _Pool(state, places[: len(units)], self, work, build, died, lock).run()
        return state.failed

    def _run_here(self, state, work, tools):
        written = None  # the unit whose rest is under way
        with Rests() as rests:
            while state.queue or written is not None:
                drawn, rest, error = state.queue.popleft() if state.queue else None, None, None
                if drawn is not None:
                    rest, error = _draw(work, tools, state.units[drawn], self.name(0))
                if written is not None:
                    _count(state, written, rests.end())
                written = drawn if rest is not None else None
                if rest is not None:
                    rests.begin(rest)
                elif drawn is not None:
                    _count(state, drawn, error)


def _draw(work, tools, unit, worker):
    """(rest of the unit or None, error or None)."""
    try:
        return work(tools, unit, worker), None
    except Exception as error:
        return None, error


def _count(state, number, error):
    if error is None:
        state.made(number)
    elif ends_run(error):
        raise error
    else:
        state.lost(number, f"{type(error).__name__}: {error}", error)


class _Pool:
    """Worker processes, each with a pipe; a pipe that breaks is a worker that died.

    A worker that has drawn a unit is given the next one, which it draws while the rest of the first
    is done. So it has two units at most, and answers for them in their order.
    """

    def __init__(self, state, places, executor, work, build, died, lock):
        self.state, self.places, self.died, self.executor = state, places, died, executor
        self.task, self.workers, self.starts, self.context = (
            (work, build, lock),
            {},
            {},
            get_context("spawn"),
        )

    def run(self):
        try:
            for slot in range(len(self.places)):
                self._start(slot)
            while self.workers:
                for channel in wait(list(self.workers)):
                    if channel in self.workers:
                        self._hear(channel)
        finally:
            self._stop()

    def _start(self, slot):
        ours, theirs = self.context.Pipe()
        name = self.executor.name(slot)
        process = self.context.Process(
            target=_worker, args=(*self.task, self.places[slot], name, theirs), daemon=True
        )
        process.start()
        theirs.close()  # so that the pipe breaks when the worker dies
        self.workers[ours] = process, slot, []

    def _hear(self, channel):
        process, slot, numbers = self.workers[channel]
        try:
            kind, content = channel.recv()
        except (EOFError, OSError):
            return self._bury(channel)
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

    def _beside(self, number) -> bool:
        """Whether the next unit can be drawn while the rest of this one is done."""
        return bool(self.state.queue) and not any(
            map(self.state.alone, (number, self.state.queue[0]))
        )

    def _next(self, channel):
        if self.state.queue:
            number = self.state.queue.popleft()
            self.workers[channel][2].append(number)
            with suppress(OSError):  # it is dead, which the pipe will say too
                channel.send(self.state.units[number])
        elif not any(numbers for _, _, numbers in self.workers.values()):
            for idle in list(self.workers):
                process = self.workers.pop(idle)[0]
                idle.close()
                process.join(10)

    def _bury(self, channel):
        process, slot, numbers = self.workers.pop(channel)
        channel.close()
        process.join()
        self.starts[slot] = self.starts.get(slot, 0) + 1
        how = (
            f"worker {self.executor.name(slot)} died (exit code {process.exitcode}: "
            f"{_how(process.exitcode)})"
        )
        if not numbers:
            self.state.progress.fail(how)
            if self.starts[slot] >= self.executor.attempts:
                raise UnitsFailed(f"{how} {self.starts[slot]} times before its first unit")
        for number in numbers:
            if self.died(self.state.units[number], self.executor.name(slot), process.pid):
                self.state.made(number)
            elif number == numbers[-1]:
                self.state.lost(number, how)
            else:  # it was being written while the other was drawn, which is what kills a process
                self.state.again(number)
        if self.state.queue:
            self._start(slot)
        elif self.workers and not any(numbers for _, _, numbers in self.workers.values()):
            self._next(next(iter(self.workers)))  # nothing is under way: let the idle ones go

    def _stop(self):
        for process, *_ in self.workers.values():
            process.terminate()
        for channel, (process, *_) in self.workers.items():
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            channel.close()


def _how(code) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else "out of memory, or a crash in a library?"
    except ValueError:
        return "a signal"


def _worker(work, build, lock, place, name, channel):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT["terminated"]))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        tools = build(place)
    except Exception as error:
        return channel.send(("cannot start", f"{type(error).__name__}: {error}"))
    channel.send(("ready", None))
    with Rests() as rests:
        while _make_one(work, tools, name, channel, rests):
            pass


def _make_one(work, tools, name, channel, rests) -> bool:
    """Draw a unit and begin its rest, whose thread says how it ended; whether the worker goes
    on."""
    try:
        unit = channel.recv()
    except EOFError:
        return False
    kind, rest = answer(partial(work, tools, unit, name))
    error = rests.end()  # after this nobody else sends
    if error is not None:
        raise error
    if kind != "done" or rest is None:
        channel.send((kind, rest))
        return kind != "cannot write"
    channel.send(("drawn", None))
    rests.begin(lambda: channel.send(answer(rest)))
    return True


def _end_with_parent():
    """A driver that was killed cannot stop its workers: they stop themselves, so that the next
    driver is alone."""
    wait([parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
