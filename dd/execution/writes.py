"""The pending write of a unit (its files and records), done in a thread of its own while the next
unit is drawn."""

import threading
import time
from queue import SimpleQueue
from typing import Self

from dd.execution.base import Write

LOOK = 0.005  # seconds between looks whether the thread has ended


class PendingWrites:
    """At most one write is under way: :meth:`end` comes before the next :meth:`begin`, so that one
    unit that is drawn is held beside the one that is being drawn.

    ``with`` ends only when the write under way has, whatever ends the block: also Ctrl-C and
    SIGTERM, however often they come. A signal may strike between any two steps of the main thread,
    so that it shares no lock with the other: joining a thread, or waiting for a future, can hang
    after that.
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
        """Wait for the write under way, if there is one; its error, or None."""
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
            write = None  # it holds a unit
        self.finished = True
