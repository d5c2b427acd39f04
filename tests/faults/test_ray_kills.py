"""Ray: workers, drivers and nodes that are killed; the data set ends as one that nothing
happened to."""

import random
import signal

import pytest

from dd.store.locks import WORKERS
from tests.faults.runs import contents, finish, kill_sometime, start, wait_for, workers_of

SLOW = {"pause": 0.1, "bad_share": 0.2}
IMAGES = {"images": 36, "unit_size": 2}
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "set"
    finish(folder, generator={"bad_share": 0.2}, **IMAGES)
    return contents(folder)


def same(folder, whole):
    """Bytes and records, once worker, attempt and seconds are left out; no temporary file, no
    lock."""
    return contents(folder) == whole and not list(folder.rglob(".*"))


def survive(folder, rng, kills, executor):
    """Kill a worker or the driver again and again, going on each time; the number of kills."""
    done = 0
    while done < kills:
        process = start(folder, executor={**executor, "attempts": 50}, generator=SLOW, **IMAGES)
        victim = rng.choice(("worker", "worker", "driver"))
        if victim == "worker" or rng.random() < 0.8:  # else: while Ray is joined
            wait_for(
                lambda process=process: process.poll() is not None or len(workers_of(process)) > 0
            )
        while process.poll() is None and done < kills:
            done += kill_sometime(process, rng, victim, 1.5)
            if victim == "driver":
                break
        out, err = process.communicate(timeout=180)
        assert process.returncode in (0, -signal.SIGKILL), out + err
        if process.returncode == 0:
            return done
    return done


@pytest.mark.parametrize(("workers", "kills"), [(1, 17), (2, 17), (3, 16)])
def test_fifty_kills(tmp_path, whole, ray_cluster, workers, kills):
    rng, done, number = random.Random(90 + workers), 0, 0
    executor = {
        "kind": "ray",
        "address": ray_cluster.address,
        "workers": workers,
        "cpus_per_worker": 0.5,
    }
    while done < kills:
        folder = tmp_path / f"set{number}"
        done += survive(folder, rng, min(kills - done, rng.randint(2, 6)), executor)
        finish(folder, executor=executor, generator=SLOW, **IMAGES)
        assert same(folder, whole)
        number += 1


def test_a_killed_driver_with_a_ray_of_its_own(tmp_path, whole):
    folder = tmp_path / "set"
    process = start(folder, executor={"kind": "ray"}, generator={**SLOW, "pause": 0.3}, **IMAGES)
    wait_for(lambda: list(folder.glob("records/*.jsonl")), process)
    process.kill()
    process.communicate(timeout=60)
    finish(folder, executor={"workers": 2}, generator=SLOW, **IMAGES)
    assert same(folder, whole)


@pytest.fixture
def nodes(ray_cluster):
    """``add()``: a node with more CPUs than the head, so that workers which ask for all of them
    lie on such nodes only."""
    added = []

    def add():
        added.append(ray_cluster.add_node(num_cpus=4, object_store_memory=100 * 2**20))
        return added[-1]

    yield add
    for node in added:
        if node in ray_cluster.worker_nodes:
            ray_cluster.remove_node(node)


def test_a_node_that_dies_is_done_without_and_one_that_joins_is_used(
    tmp_path, whole, ray_cluster, nodes
):
    folder, big = (
        tmp_path / "set",
        {"cpus_per_worker": 4},
    )  # more than the head has: a worker for each added node
    first, _ = nodes(), nodes()
    executor = {"kind": "ray", "address": ray_cluster.address, **big, "timeout": 60}
    process = start(folder, executor=executor, generator={**SLOW, "pause": 1.0}, **IMAGES)
    wait_for(
        lambda: len(workers_of(process)) == 2 and len(list(folder.glob("records/*.jsonl"))) == 2,
        process,
    )
    before = set(workers_of(process))
    ray_cluster.remove_node(first, allow_graceful=False)
    wait_for(lambda: len(workers_of(process)) == 1, process)
    nodes()
    wait_for(
        lambda: len(workers_of(process)) == 2 and not set(workers_of(process)) <= before, process
    )
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    assert "died: " in out
    assert same(folder, whole)


def test_a_run_outlives_all_nodes_but_says_so_when_none_comes_back(
    tmp_path, whole, ray_cluster, nodes
):
    folder, node = tmp_path / "set", nodes()
    executor = {"kind": "ray", "address": ray_cluster.address, "cpus_per_worker": 4, "timeout": 8}
    process = start(folder, executor=executor, generator={**SLOW, "pause": 0.5}, **IMAGES)
    wait_for(lambda: list(folder.glob("records/*.jsonl")), process)
    ray_cluster.remove_node(node, allow_graceful=False)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3 and "no worker got a place in" in err, out + err
    assert not (folder / WORKERS).exists()
    finish(folder, generator=SLOW, **IMAGES)
    assert same(folder, whole)
