"""Shows the progress of a long run: one bar on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Callable
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text


class _State(ProgressColumn):
    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__()
        self.text = text

    def render(self, task: Task) -> Text:
        return Text(self.text())


class Progress:
    """``with Progress("generate", total, done) as progress: progress.advance(n)``: images (or
    another ``unit``) done, images/s, time left, failures, and the text of ``note()``.

    On a terminal it is a bar (unless ``bar=False``). Elsewhere (a log file, a batch system) it
    prints at most one line in ``every`` seconds, and one at the end. Rates are those of this run:
    ``done`` items from before do not count. A clock that is set back has no effect.
    """

    def __init__(
        self,
        description: str,
        total: int,
        done: int = 0,
        every: float = 30.0,
        stream: TextIO | None = None,
        unit: str = "images",
        note: Callable[[], str] = lambda: "",
        bar: bool = True,
    ) -> None:
        self.description, self.total, self.every = description, total, every
        self.done = self.before = done
        self.failures, self.stream, self.unit, self.note = 0, stream or sys.stdout, unit, note
        self.start = self.last = time.monotonic()
        self.bar: Bar | None = None
        console = Console(file=self.stream)
        if bar and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _State(self.state),
            )
            self.bar = Bar(*columns, console=console)
            self.task = self.bar.add_task(description, total=total, completed=done)

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        elif self.done > self.before or self.failures:
            self.line()

    def advance(self, number: int = 1) -> None:
        """``number`` more are done; 0 for work that takes time but finishes none."""
        self.done += number
        if self.bar:
            self.bar.update(self.task, completed=self.done)
        elif self.done < self.total and time.monotonic() - self.last >= self.every:
            self.line()

    def fail(self, what: str) -> None:
        """Count a failed attempt, and print what happened."""
        self.failures += 1
        (self.bar.console.print if self.bar else self._print)(f"{self.description}: {what}")

    def state(self) -> str:
        seconds, made = time.monotonic() - self.start, self.done - self.before
        rate = made / seconds if seconds > 0 else 0.0
        left = "?" if not made else _clock((self.total - self.done) / rate)
        parts = [f"{rate:.2f} {self.unit}/s", f"{left} left"]
        if self.failures:
            parts.append(f"{self.failures} failed attempt{'s' * (self.failures > 1)}")
        return ", ".join(filter(None, [*parts, self.note()]))

    def line(self) -> None:
        self.last = time.monotonic()
        self._print(f"{self.description}: {self.done} of {self.total} {self.unit}, {self.state()}")

    def _print(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def left_in_all(seconds: float) -> str:
    """``38 min left in all``, for the runs of a study."""
    left = f"{round(seconds / 60)} min" if seconds >= 90 else f"{round(seconds)} s"
    return f"{left} left in all"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
