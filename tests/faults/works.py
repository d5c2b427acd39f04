"""What worker processes do in tests of the writing of a unit: no torch, so that a start takes
little time. ``folder`` holds what happened, a file for each event."""

import os
import time
from pathlib import Path


def build(device):
    return None


def happened(folder, name, seconds=60):
    """Wait for an event of another process."""
    end = time.monotonic() + seconds
    while not (Path(folder) / name).exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{name} did not happen")
        time.sleep(0.01)


def wait_for_next(folder, tools, unit, worker):
    """The write of a unit ends only when the drawing of the next one has begun; the last unit has
    no next."""
    number, last = unit[0].unit, unit[-1].id == "last"
    (folder / f"drawing{number}").touch()

    def write():
        if not last:
            happened(folder, f"drawing{number + 1}")
        (folder / f"written{number}").touch()

    return write


def die_beside(folder, tools, unit, worker):
    """Drawing unit 1 kills the process while unit 0 is written; and again, if
    there is a file ``always``."""
    number = unit[0].unit
    with open(folder / f"drawings{number}", "a") as file:
        file.write("x")
    first = (folder / f"drawings{number}").read_text() == "x"
    if number == 1 and first:
        happened(folder, "writing0")
    if number == 1 and (first or (folder / "always").exists()):
        os._exit(9)

    def write():
        (folder / f"writing{number}").touch()
        if number == 0 and first:
            happened(folder, "the end of its process")

    return write


def broken_write(folder, tools, unit, worker):
    """The write of unit 1 fails."""

    def write():
        if unit[0].unit == 1:
            raise RuntimeError("no good")

    return write
