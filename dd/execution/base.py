"""What executors share: what is still to do, how a unit is tried, and how a run ends."""

import errno
import os
import signal
import sys
import threading
import traceback
from collections import deque
from contextlib import contextmanager

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
EXIT = {
    "units failed": 3,
    "cannot write": 4,
    "busy": 5,
    "terminated": 143,
    "stopped": 130,
}  # beside 0, 2 (wrong input)
SHOWN = 3


class UnitsFailed(RuntimeError):
    """More units failed than the run may lose."""


class State:
    """What is still to do and what has gone wrong."""

    def __init__(self, units, settings, total, progress):
        self.units, self.settings, self.total, self.progress = units, settings, total, progress
        self.queue, self.tries, self.failed = deque(range(len(units))), {}, {}

    def made(self, number):
        self.progress.advance(len(self.units[number]))

    def again(self, number):
        """Try a unit once more though nothing is known against it: it was beside one whose
        worker died."""
        self.tries.setdefault(number, 0)
        self.queue.append(number)

    def alone(self, number) -> bool:
        """Whether a unit is made with no other in the same process: it was there when something
        went wrong."""
        return number in self.tries

    def lost(self, number, error, cause=None, final=False):
        """A unit failed once more: again later, or quarantined (if ``final``, at once)."""
        self.tries[number] = self.tries.get(number, 0) + 1
        again = self.tries[number] < self.settings.attempts and not final
        self.progress.fail(
            f"unit {self.units[number][0].unit}, attempt {self.tries[number]}: {error}"
        )
        if again:
            return self.queue.append(number)
        self.failed[number] = error
        if len(self.failed) > self.settings.max_failed * self.total:
            shown = [
                f"unit {self.units[n][0].unit}: {text[:500]}"
                for n, text in list(self.failed.items())[:SHOWN]
            ]
            raise UnitsFailed(
                f"{len(self.failed)} of {self.total} units failed {self.settings.attempts} times, "
                "more than "
                f"executor.max_failed={self.settings.max_failed} allows:\n  "
                + "\n  ".join(shown)
                + "\nEverything else is kept; the same command tries them again"
            ) from cause


def ends_run(error: BaseException) -> bool:
    """Whether no further unit is tried after ``error``: the disk takes no more, or it is no
    error of a unit at all."""
    return not isinstance(error, Exception) or (
        isinstance(error, OSError) and error.errno in CANNOT_WRITE
    )


def answer(call) -> tuple:
    """Of a call: ("done", what it returns), ("failed", error), or ("cannot write", arguments of
    an OSError)."""
    try:
        return "done", call()
    except Exception as error:
        if ends_run(error):
            return "cannot write", (error.errno, error.strerror, error.filename)
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "failed",
            f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})",
        )


def attempt(work, tools, unit, worker: str) -> tuple:
    """:func:`answer` for a whole unit: drawn, and then its rest."""

    def whole():
        rest = work(tools, unit, worker)
        if rest is not None:
            rest()

    return answer(whole)


@contextmanager
def stopped_by_signal():
    """SIGTERM (a batch system's end of time) drops the unit under way like Ctrl-C does, with
    exit code 143."""

    def stop(*_):
        print(
            "terminated: what is finished is kept. The same command goes on from here.",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(EXIT["terminated"])

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
