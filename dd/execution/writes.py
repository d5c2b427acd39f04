"""The pending write of a unit (its files and records), done in a separate thread while the next
unit is drawn."""

import threading
import time
from queue import SimpleQueue
from typing import Self

from dd.execution.base import Write

LOOK = 0.005  # seconds between checks whether the thread has ended


class PendingWrites:
    """At most one write runs at a time: :meth:`end` comes before the next :meth:`begin`, so that
    one drawn unit is held beside the one that is being drawn.

    ``with`` ends only when the current write has ended, whatever ends the block: also Ctrl-C and
    SIGTERM, however often they come. A signal may interrupt the main thread between any two steps,
    so it shares no lock with the other thread: joining a thread, or waiting for a future, can hang
    afterwards.
    """

    def __init__(self) -> None:
        self.given: SimpleQueue[Write | None] = SimpleQueue()
        self.ended: SimpleQueue[BaseException | None] = SimpleQueue()
        self.under_way = self.finished = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._work, name="write of a unit", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        stopped: BaseException | None = None
        while not self.finished:
            try:
                self.given.put(None)
                time.sleep(LOOK)
            except (KeyboardInterrupt, SystemExit) as error:
                stopped = error
        if stopped is not None:
            raise stopped

    def begin(self, write: Write) -> None:
        if self.under_way:
            raise RuntimeError("the write of a unit is still under way")
        self.under_way = True
        self.given.put(write)

    def end(self) -> BaseException | None:
        """Wait for the current write, if there is one; its error, or None."""
        error, self.under_way = self.ended.get() if self.under_way else None, False
        return error

    def _work(self) -> None:
        while (write := self.given.get()) is not None:
            try:
                write()
            except BaseException as error:  # the main thread decides
                self.ended.put(error)
            else:
                self.ended.put(None)
            write = None  # release the unit that it holds
        self.finished = True
