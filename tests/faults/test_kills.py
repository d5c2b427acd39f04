"""A run that is killed, stopped or starved ends as one that nothing happened to: the same bytes,
the same records."""

import json
import random
import resource
import signal
from pathlib import Path

import pytest

from tests.faults.runs import contents, finish, kill_sometime, start, wait_for, workers_of

SLOW = {"pause": 0.03, "bad_share": 0.2}
IMAGES = {"images": 36, "unit_size": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "set"
    done = finish(folder, generator={"bad_share": 0.2}, **IMAGES)
    assert done["complete"] and done["drawn_again"] > 2
    return contents(folder)


def survive(folder, rng, kills, workers, whom=("worker", "driver")):
    """Kill again and again, going on each time; the number of kills."""
    done = 0
    while done < kills:
        executor = {"workers": workers, "spawn": True, "attempts": 50}
        process = start(folder, executor=executor, generator=SLOW, **IMAGES)
        victim = rng.choice(whom)
        while process.poll() is None and done < kills:
            done += kill_sometime(process, rng, victim)
            if victim == "driver":
                break
        out, err = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), err
        if process.returncode == 0:
            return done
    return done


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_run_whose_processes_are_killed_ends_like_one_that_was_left_alone(
    tmp_path, whole, workers
):
    kills = survive(tmp_path / "set", random.Random(workers), 2, workers, ("driver",))
    kills += survive(tmp_path / "set", random.Random(workers), 1, workers, ("worker",))
    finish(tmp_path / "set", executor={"workers": workers}, generator=SLOW, **IMAGES)
    assert contents(tmp_path / "set") == whole
    assert kills


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_fifty_kills(tmp_path, whole, workers):
    rng, kills, number = random.Random(50 + workers), 0, 0
    while kills < 17:  # of 50 in all, spread over 1, 2 and 3 workers
        folder = tmp_path / f"set{number}"
        kills += survive(folder, rng, rng.randint(1, 5), workers)
        finish(folder, executor={"workers": workers}, generator=SLOW, **IMAGES)
        assert contents(folder) == whole
        number += 1


def test_a_run_that_is_started_with_one_executor_is_finished_with_another(tmp_path, whole):
    folder = tmp_path / "set"
    survive(folder, random.Random(4), 1, 2, ("driver",))
    done = finish(folder, executor={"index": 0, "count": 2}, generator=SLOW, **IMAGES)
    assert done["planned"] == 36
    process = start(
        folder, executor={"index": 1, "count": 2}, generator={**SLOW, "pause": 0.3}, **IMAGES
    )
    kill_sometime(process, random.Random(1), "driver", 1.0)
    process.communicate(timeout=60)
    done = finish(folder, executor={"index": 1, "count": 2, "workers": 2}, generator=SLOW, **IMAGES)
    assert done["complete"]
    assert contents(folder) == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_drops_what_is_under_way_and_leaves_nothing_half_written(tmp_path, whole, workers):
    folder = tmp_path / "set"
    process = start(
        folder, executor={"workers": workers}, generator={**SLOW, "pause": 0.2}, **IMAGES
    )
    wait_for(lambda: list(folder.glob("records/*.jsonl")))
    children = workers_of(process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "The same command resumes from here" in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not list(folder.rglob(".*"))
    finish(folder, generator=SLOW, **IMAGES)
    assert contents(folder) == whole


def test_workers_of_a_killed_driver_end_with_it(tmp_path):
    process = start(tmp_path / "set", executor={"workers": 2}, generator={"pause": 30}, **IMAGES)
    wait_for(lambda: len(workers_of(process)) == 2)
    children = workers_of(process)
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not any(_alive(pid) for pid in children))


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_second_driver_on_the_same_folder_is_refused_and_names_the_first(tmp_path, whole):
    folder = tmp_path / "set"
    process = start(folder, executor={"workers": 2}, generator={**SLOW, "pause": 0.25}, **IMAGES)
    wait_for(lambda: list(folder.glob("records/*.jsonl")))
    for executor in ({}, {"index": 0, "count": 2}):
        second = start(folder, executor=executor, generator=SLOW, **IMAGES)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 5 and f"process {process.pid} on " in err
    process.communicate(timeout=120)
    assert contents(folder) == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_with_its_own_code_and_the_next_run_heals(
    tmp_path, whole, workers, monkeypatch
):
    folder, before = tmp_path / "set", resource.getrlimit(resource.RLIMIT_FSIZE)
    finish(folder, executor={"index": 0, "count": 2}, generator=SLOW, **IMAGES)
    size = (folder / "records" / "0of2.jsonl").stat().st_size
    limit = (
        1000 if workers == 1 else size // 3
    )  # an image does not fit; or, later, the records do not
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit if workers == 1 else max(limit, 1500), before[1])
    )
    try:
        process = start(folder, executor={"workers": workers}, generator=SLOW, **IMAGES)
        _, err = process.communicate(timeout=60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert process.returncode == 4 and "File too large" in err and "Traceback" not in err
    assert not [p for p in folder.rglob(".*") if p.name.endswith(".tmp")]
    for path in folder.glob("records/*.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())
    finish(folder, executor={"workers": workers}, generator=SLOW, **IMAGES)
    assert contents(folder) == whole
