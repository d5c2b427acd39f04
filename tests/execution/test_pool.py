"""What the pool does when workers are refused, lost or out of reach, played on a Ray of answers
written before."""

import io
import itertools
from types import SimpleNamespace

import pytest

from dd.execution import Ray, Task, UnitsFailed
from dd.execution.base import State
from dd.execution.pool import WorkerPool
from dd.store.progress import Progress
from dd.store.samples import Sample

PLACED, READY, DONE = ("placed", ("a node", 1)), ("ready", None), ("done", None)
REFUSED = ("refused", ("bad node", "other versions"))
UNITS = [[Sample(f"{n:06d}", "a cat", "cat", ("cat",), (1,), n, n)] for n in range(4)]


class Lost(Exception):
    """Stands for RayError."""


class Answer:
    """``content`` None: it never comes. Those that were asked for first come first."""

    asked = itertools.count()

    def __init__(self, content):
        self.content, self.turn = content, next(self.asked)


class PlayedRay:
    """Each worker that is started gets the next of ``workers``: its answers in order, an
    exception for its loss; after the last one it does not answer any more. Workers beyond those
    get no place."""

    exceptions = SimpleNamespace(RayError=Lost)

    def __init__(self, *workers, cpus=8):
        self.scripts, self.cpus, self.killed, self.units = [list(w) for w in workers], cpus, [], []

    def remote(self, _):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._actor))

    def _actor(self, *arguments):
        actor = SimpleNamespace(
            script=self.scripts.pop(0) if self.scripts else [], name=arguments[-1]
        )
        for method in ("start", "build", "make"):
            setattr(
                actor,
                method,
                SimpleNamespace(remote=lambda *unit, actor=actor: self._ask(actor, unit)),
            )
        return actor

    def _ask(self, actor, unit):
        self.units += [(actor.name, unit[0][0].unit)] if unit else []
        return Answer(actor.script.pop(0) if actor.script else None)

    def wait(self, asked, timeout):
        return sorted((a for a in asked if a.content is not None), key=lambda a: a.turn)[:1], []

    def get(self, asked):
        if isinstance(asked.content, Exception):
            raise asked.content
        return asked.content

    def kill(self, actor, no_restart):
        self.killed.append(actor.name)

    def nodes(self):
        return [{"Alive": True, "Resources": self.cluster_resources()}]

    def cluster_resources(self):
        return {"CPU": self.cpus}

    available_resources = cluster_resources


class PlayedFence:
    """``held``: numbers of the workers that never let go."""

    token = "a token"

    def __init__(self, path, held=()):
        self.path, self.held = path / ".lock-workers", held

    def free(self, number):
        return number not in self.held


@pytest.fixture
def play(tmp_path, monkeypatch):
    """``play(ray, held=(), died=..., **settings)``: {quarantined unit: error}, and what progress
    said."""
    monkeypatch.setattr("dd.execution.pool.TICK", 0.0)
    monkeypatch.setattr("dd.execution.pool.LET_GO", 0.1)

    def run(ray, held=(), died=lambda unit, name, pid: False, **settings):
        executor = Ray(**{"address": "auto", "timeout": 0.3, "max_failed": 1, **settings})
        said = io.StringIO()
        with Progress("generate", len(UNITS), stream=said) as progress:
            state = State(UNITS, executor.settings, len(UNITS), progress)
            task, fence = Task(print, None, print, died), PlayedFence(tmp_path, held)
            WorkerPool(ray, executor, state, executor.needs("cpu"), task, "cpu", fence).run()
        return state.failed, said.getvalue()

    return run


def test_a_lost_unit_goes_to_another_worker_under_the_name_that_is_free_again(play):
    ray = PlayedRay(
        [PLACED, READY, DONE, Lost("boom\n\nno more")], [PLACED, READY, DONE, DONE, DONE]
    )
    failed, said = play(ray, workers=1)
    assert (
        failed == {} and "unit 1, attempt 1: worker ray1 on a node died: boom ... no more" in said
    )
    assert ray.units == [("ray1", 0), ("ray1", 1), ("ray1", 2), ("ray1", 3), ("ray1", 1)]


def test_what_a_lost_worker_has_recorded_is_not_made_again(play):
    ray = PlayedRay([PLACED, READY, Lost("boom")], [PLACED, READY, DONE, DONE, DONE])
    failed, said = play(ray, workers=1, died=lambda unit, name, pid: True)
    assert failed == {} and "attempt" not in said.replace("failed attempts", "")
    assert [unit for _, unit in ray.units] == [0, 1, 2, 3] and "4 of 4 images" in said


def test_a_worker_out_of_reach_keeps_its_unit_and_its_name(play):
    ray = PlayedRay([PLACED, READY, Lost("cut off")], [PLACED, READY, DONE, DONE, DONE])
    failed, _ = play(ray, held=[0], workers=1)
    assert list(failed) == [0] and "it still holds the data set after 0.3 s" in failed[0]
    assert ray.units == [("ray1", 0), ("ray2", 1), ("ray2", 2), ("ray2", 3)]


def test_a_unit_that_kills_every_worker_is_given_up(play):
    lost = [PLACED, READY, Lost("boom")]
    failed, _ = play(PlayedRay(*[list(lost) for _ in range(8)]), workers=1, attempts=2)
    assert sorted(failed) == [0, 1, 2, 3]


def test_a_first_worker_that_is_refused_ends_the_run(play):
    ray = PlayedRay([REFUSED])
    with pytest.raises(ValueError, match="the worker on bad node could not start: other versions"):
        play(ray, workers=1)
    assert ray.killed == ["ray1"]


def test_a_later_one_is_left_where_it_is_and_another_place_is_tried(play):
    ray = PlayedRay([PLACED, READY, DONE, DONE, DONE, DONE], [PLACED, REFUSED])
    failed, said = play(ray, workers=2)
    assert failed == {} and said.count("could not start") == 1
    assert {name for name, _ in ray.units} == {"ray1"} and sorted(ray.killed) == [
        "ray1",
        "ray2",
        "ray3",
    ]


def test_workers_that_die_before_their_first_unit_end_the_run(play, monkeypatch):
    ray = PlayedRay(*[[PLACED, Lost("no memory")] for _ in range(9)])
    with pytest.raises(
        UnitsFailed, match="2 workers in a row were lost before their first unit: .* no memory"
    ):
        play(ray, workers=1, attempts=2, timeout=30)
    assert len(ray.killed) == 2


def test_a_ray_of_its_own_that_is_too_small_is_refused_at_once(play):
    with pytest.raises(
        ValueError, match="in 0 s. Each asks for 9 CPU, 0 GPU .* have 8 CPU, 0 GPU together"
    ):
        play(PlayedRay(), address=None, cpus_per_worker=9, timeout=300)


def test_nobody_left_and_no_place(play):
    with pytest.raises(UnitsFailed, match="no worker got a place"):
        play(PlayedRay([PLACED, READY, DONE, Lost("gone")]), workers=1)


def test_as_many_workers_as_there_is_room_or_work_for(play):
    for cpus, cpus_per_worker, number in ((8, 1, 4), (3, 1, 3), (1, 0.5, 2), (5, 2, 2)):
        ray = PlayedRay(*[[PLACED, READY, DONE, DONE, DONE, DONE] for _ in range(9)], cpus=cpus)
        assert play(ray, cpus_per_worker=cpus_per_worker)[0] == {}
        assert len(ray.killed) == number


def test_a_full_disk_is_an_error_of_the_driver(play):
    ray = PlayedRay([PLACED, READY, ("cannot write", (28, "No space left on device", "a.jpg"))])
    with pytest.raises(OSError, match="No space left on device") as caught:
        play(ray, workers=1)
    assert caught.value.errno == 28
