"""A unit is written while the next one is drawn, and counts only when it is written. No clock
decides."""

import errno
import io
import json
import os
import signal
import threading
from dataclasses import replace
from functools import partial

import pytest

from benchmarks.synthesis import synthesize
from dd.execution import Local, Task, UnitsFailed
from dd.execution.base import attempt
from dd.execution.writes import PendingWrites
from dd.store.progress import Progress
from dd.store.samples import Sample
from dd.taxonomy import Taxonomy
from tests.faults import fake, works
from tests.faults.runs import contents

LONG = 60  # seconds after which an event that must come fails the test
PETS = Taxonomy("pets", ["cat", "dog", "cow"])


def units_of(number):
    ids = [f"{n:06d}" for n in range(number - 1)] + ["last"]
    return [[Sample(name, "a cat", "cat", ("cat",), (1,), n, n)] for n, name in enumerate(ids)]


def run(work, number=4, executor=None, died=None):
    """(what is quarantined, images that count)."""
    progress = Progress("generate", number, stream=io.StringIO())
    executor = executor or Local(attempts=2, max_failed=1)
    task = Task(work, None, works.build, died)
    failed = executor.run(units_of(number), number, task, progress)
    return failed, progress.done


# This process


def test_a_unit_is_drawn_while_the_one_before_is_written(tmp_path):
    assert run(partial(works.wait_for_next, tmp_path)) == ({}, 4)


def test_one_write_at_a_time_and_two_units_at_most():
    events, lock, held, most = [], threading.Lock(), set(), []

    def work(tools, unit, worker):
        number = unit[0].unit
        with lock:
            held.add(number)
            most.append(len(held))
            events.append(("draw", number))

        def write():
            with lock:
                events.append(("begin", number))
            with lock:
                held.discard(number)
                events.append(("end", number))

        return write

    assert run(work, 20) == ({}, 20)
    assert max(most) <= 2
    writes = [e for e in events if e[0] != "draw"]
    assert writes == [(what, n) for n in range(20) for what in ("begin", "end")]
    assert all(events.index(("draw", n + 2)) > events.index(("end", n)) for n in range(18))
    with PendingWrites() as two, pytest.raises(RuntimeError, match="still under way"):
        two.begin(print)
        two.begin(print)


def test_a_unit_counts_only_when_it_is_written():
    progress, seen = Progress("generate", 3, stream=io.StringIO()), []

    def work(tools, unit, worker):
        seen.append(progress.done)
        return lambda: seen.append(progress.done)

    Local().run(units_of(3), 3, Task(work), progress)
    assert sorted(seen) == [0, 0, 0, 1, 1, 2] and progress.done == 3


def test_a_unit_with_nothing_to_write_is_done_at_once():
    assert run(lambda *_: None) == ({}, 4)


def test_a_write_that_fails_is_tried_again_and_quarantined():
    tried = []

    def work(tools, unit, worker):
        def write():
            tried.append(unit[0].unit)
            if unit[0].unit in (1, 3):
                raise RuntimeError(f"no good {tried.count(unit[0].unit)}")

        return write

    assert run(work) == ({1: "RuntimeError: no good 2", 3: "RuntimeError: no good 2"}, 2)
    assert sorted(tried) == [0, 1, 1, 2, 3, 3]
    with pytest.raises(UnitsFailed, match="no good"):
        run(work, executor=Local(attempts=1, max_failed=0))


def test_a_full_disk_in_a_write_ends_the_run():
    drawn = []

    def work(tools, unit, worker):
        drawn.append(unit[0].unit)

        def write():
            raise OSError(errno.ENOSPC, "No space left on device")

        return write

    with pytest.raises(OSError, match="No space left"):
        run(work)
    assert drawn == [0, 1]
    assert attempt(work, None, units_of(1)[0], "0") == (
        "cannot write",
        (errno.ENOSPC, "No space left on device", None),
    )


def test_an_error_of_drawing_does_not_hide_the_unit_before():
    def work(tools, unit, worker):
        if unit[0].unit == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return lambda: done.append(unit[0].unit)

    done, progress = [], Progress("generate", 2, stream=io.StringIO())
    with pytest.raises(OSError, match="No space left"):
        Local().run(units_of(2), 2, Task(work), progress)
    assert (done, progress.done) == ([0], 1)


def test_the_write_under_way_is_finished_however_often_the_run_is_stopped():
    stopped, done = threading.Event(), []

    def work(tools, unit, worker):
        if unit[0].unit == 1:
            stopped.set()
            raise KeyboardInterrupt

        def write():
            assert stopped.wait(LONG)
            os.kill(os.getpid(), signal.SIGINT)  # once more
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(unit[0].unit)

        return write

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(work)
    assert done == [0]


class InTurns(Local):
    """Draws a unit, writes it, draws the next."""

    def run(self, units, total, task, *rest):
        at_once = replace(task, draw=lambda *given: task.draw(*given)())
        return super().run(units, total, at_once, *rest)


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_overlap_changes_no_byte(tmp_path, image_format):
    for executor in (Local(), InTurns()):
        folder = tmp_path / type(executor).__name__
        generator = fake.FakeGenerator(bad_share=0.3)
        synthesize(folder, generator, fake.prompts, PETS, 12, 1, 2, image_format, executor=executor)
    written = contents(tmp_path / "Local")
    assert written == contents(tmp_path / "InTurns") and len(written["records"]) == 12
    order = [[r["id"] for r in _records(tmp_path / name)] for name in ("Local", "InTurns")]
    assert order[0] == order[1] == sorted(order[0])


def _records(folder):
    return [json.loads(line) for line in (folder / "records/0.jsonl").read_text().splitlines()]


# Worker processes


def test_worker_processes_overlap_too(tmp_path):
    assert run(partial(works.wait_for_next, tmp_path), executor=Local(workers=1, spawn=True)) == (
        {},
        4,
    )


def test_a_write_that_fails_in_a_worker(tmp_path):
    failed, done = run(
        partial(works.broken_write, tmp_path),
        executor=Local(workers=1, spawn=True, attempts=2, max_failed=1),
    )
    assert done == 3 and failed.keys() == {1} and "RuntimeError: no good (works.py:" in failed[1]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("attempts", [1, 3])
def test_a_worker_that_dies_with_two_units(tmp_path, recorded, attempts):
    """The one that was being written is asked about, and made again alone without a word against
    it."""
    asked = []

    def died(unit, worker, pid):
        asked.append(unit[0].unit)
        return recorded and unit[0].unit == 0

    (tmp_path / "always").touch()
    executor = Local(workers=1, spawn=True, attempts=attempts, max_failed=1)
    failed, done = run(partial(works.die_beside, tmp_path), 3, executor, died)
    assert failed.keys() == {1} and "worker 0 died (exit code 9" in failed[1] and done == 2
    assert asked == [0, *[1] * attempts]
    drawings = [(tmp_path / f"drawings{n}").read_text() for n in range(3)]
    assert drawings == ["x" if recorded else "xx", "x" * attempts, "x"]
