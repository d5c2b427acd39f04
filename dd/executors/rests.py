"""The rest of a unit (its files and records), done in a thread of its own while the next unit is drawn."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Rests:
    """At most one rest is under way: :meth:`end` comes before the next :meth:`begin`, so that one unit that is drawn is held
    beside the one that is being drawn.

    ``with`` ends only when the rest under way has, whatever ends the block: also Ctrl-C and SIGTERM, however often they come.
    """

    def __init__(self):
        self.pool, self.under_way = ThreadPoolExecutor(1, "rest of a unit"), None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        stopped = None
        while True:
            try:
                self.pool.shutdown()
                break
            except (KeyboardInterrupt, SystemExit) as error:
                stopped = error
        if stopped is not None:
            raise stopped

    def begin(self, rest: Callable[[], None]) -> None:
        if self.under_way is not None:
            raise RuntimeError("the rest of a unit is still under way")
        self.under_way = self.pool.submit(rest)

    def end(self) -> BaseException | None:
        """Wait for the rest under way, if there is one; its error, or None."""
        error = self.under_way and self.under_way.exception()
        self.under_way = None
        return error
