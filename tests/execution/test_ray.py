"""Units on Ray: drivers in processes of their own (tests/faults) on a Ray of this session; what
they refuse and why."""

import contextlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dd.execution import Ray, Task
from dd.execution.pool import Driver, Worker
from dd.store.locks import WORKERS, Busy, Fence, Lock
from dd.store.progress import Progress
from dd.store.provenance import versions
from dd.store.samples import Sample, read_records
from tests.faults.runs import contents, finish, start, wait_for, workers_of

IMAGES = {"images": 16, "unit_size": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "set"
    finish(folder, **IMAGES)
    return contents(folder)


@pytest.fixture
def on_ray(ray_cluster):
    """Settings of an executor that joins the session's Ray."""
    return lambda **more: {"kind": "ray", "address": ray_cluster.address, "timeout": 60, **more}


def ended(process, code):
    """What a driver said that ended with ``code``."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out + err


def nothing_left(folder):
    return not list(folder.rglob(".*"))


def test_workers_make_what_one_process_makes_and_a_dead_one_is_replaced(tmp_path, whole, on_ray):
    folder, trap = tmp_path / "set", tmp_path / "trap"
    trap.touch()
    process = start(
        folder, executor=on_ray(workers=2), generator={"deadly": [5], "trap": str(trap)}, **IMAGES
    )
    said = ended(process, 0)
    assert re.search("unit 5, attempt 1: worker ray[12] on .* died: ", said) and not trap.exists()
    assert contents(folder) == whole and nothing_left(folder)
    assert {p.stem for p in folder.glob("records/*")} <= {"ray1", "ray2"}


def test_sigterm_drops_what_is_under_way_and_another_executor_goes_on(tmp_path, whole, on_ray):
    folder = tmp_path / "set"
    process = start(folder, executor=on_ray(workers=1), generator={"pause": 1.5}, **IMAGES)
    wait_for(lambda: list(folder.glob("records/*.jsonl")), process)
    busy = start(folder, executor={"workers": 1}, **IMAGES)
    assert f"process {process.pid} on " in ended(busy, 5)
    workers = workers_of(process)
    process.send_signal(signal.SIGTERM)
    assert "The same command resumes from here" in ended(process, 143)
    assert workers and not any(
        Path(f"/proc/{pid}/fd").exists() and list_fds(pid) for pid in workers
    )
    assert nothing_left(folder)
    before = len(read_records(folder))
    assert 0 < finish(folder, **IMAGES)["made_now"] == 16 - before
    assert contents(folder) == whole


def list_fds(pid):
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())  # a zombie has none
    except OSError:
        return []


@pytest.mark.full
def test_workers_of_a_killed_driver_keep_the_next_one_waiting_until_they_are_dead(
    tmp_path, whole, on_ray
):
    folder = tmp_path / "set"
    process = start(folder, executor=on_ray(), generator={"pause": 0.3}, **IMAGES)
    wait_for(lambda: list(folder.glob("records/*.jsonl")), process)
    process.kill()
    process.communicate(timeout=60)
    assert (folder / WORKERS).exists()
    finish(folder, executor=on_ray(), **IMAGES)
    assert contents(folder) == whole and nothing_left(folder)


@pytest.mark.full
def test_a_unit_that_kills_its_workers_is_quarantined(tmp_path, whole, on_ray):
    folder = tmp_path / "set"
    executor = on_ray(workers=1, attempts=2, max_failed=0.2)
    done = finish(folder, executor=executor, generator={"deadly": [3]}, **IMAGES)
    assert (done["quarantined"], done["images"], done["complete"]) == (2, 14, True)
    assert "died" in read_records(folder)["000006"]["error"]
    finish(folder, **IMAGES)
    assert contents(folder) == whole


@pytest.mark.full
@pytest.mark.parametrize(
    ("generator", "code", "said"),
    [
        ({"broken": [0, 1, 2]}, 3, "more than executor.max_failed=0.01 allows"),
        ({"full": [2]}, 4, "No space left on device"),
    ],
)
def test_exit_codes(tmp_path, on_ray, generator, code, said):
    process = start(
        tmp_path / "set", executor=on_ray(workers=2, attempts=1), generator=generator, **IMAGES
    )
    assert said in ended(process, code)
    assert nothing_left(tmp_path / "set")


def test_a_run_that_is_whole_starts_no_ray(tmp_path):
    run = {"units": [], "total": 0, "task": Task(print, build=print), "progress": None}
    assert Ray(address="127.0.0.1:9").run(**run, lock=Lock(tmp_path)) == {}


def test_a_ray_of_its_own_listens_on_the_loopback_interface_only(tmp_path, whole):
    folder = tmp_path / "set"
    process = start(folder, executor={"kind": "ray"}, generator={"pause": 0.5}, **IMAGES)
    wait_for(lambda: workers_of(process), process)
    wait_for(
        lambda: len(listening(process.pid)) > 3, process
    )  # one that is being started has the driver's files
    assert {a for a in listening(process.pid) if not a.startswith("127.")} == set()
    assert "started Ray for this run" in ended(process, 0)
    assert contents(folder) == whole


def listening(session):
    """Addresses on which the processes of a session listen (IPv4, also when written as IPv6)."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                octets = bytes.fromhex(fields[1].partition(":")[0][-8:])[::-1]
                sockets[f"socket:[{fields[9]}]"] = ".".join(map(str, octets))
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that has ended by now
            if int(path.read_text().rpartition(")")[2].split()[3]) == session:
                found += [
                    sockets[t] for t in map(_target, (path.parent / "fd").iterdir()) if t in sockets
                ]
    return found


def _target(descriptor) -> str:
    """What a descriptor of a process is; "" for one that was closed in between."""
    try:
        return str(descriptor.readlink())
    except OSError:
        return ""


@pytest.mark.full
def test_the_embedded_generator_makes_the_same_on_ray(tmp_path, run, ray_cluster):
    for name, executor in (
        ("one", ["local"]),
        ("two", ["ray", f"address={ray_cluster.address}", "workers=2"]),
    ):
        chosen = [f"executor{'.' if '=' in e else '='}{e}" for e in (*executor, "threads=1")]
        size = [
            "num_images=4",
            "unit_size=2",
            "diffusion.steps=2",
            "device=cpu",
            f"data_root={tmp_path / name}",
        ]
        run("generate", "experiment=shapes", "stage=synthesize", *size, *chosen)
    one, two = (
        contents(next((tmp_path / name / "synthetic").iterdir())) for name in ("one", "two")
    )
    assert one == two and len(one["records"]) == 4


# What is refused


def run_in_this_process(folder, executor, device="cpu"):
    unit = [Sample("000000", "a cat", "cat", ("cat",), (1,), 1, 0)]
    with Lock(folder) as lock, Progress("generate", 1) as progress:
        return executor.run([unit], 1, Task(print, build=print), progress, device, lock)


def test_a_request_that_no_node_can_meet_says_what_was_asked_and_what_there_is(
    tmp_path, ray_cluster
):
    executor = Ray(
        address=ray_cluster.address, cpus_per_worker=64, gpus_per_worker=0.5, timeout=1.5
    )
    with pytest.raises(
        ValueError,
        match=r"(?s)no worker got a place in . s. .*64 CPU, 0.5 GPU.*have 2 CPU, 0 GPU together",
    ):
        run_in_this_process(tmp_path, executor)
    assert nothing_left(tmp_path)


def test_no_cluster_at_the_address(tmp_path):
    with pytest.raises(
        ValueError, match="executor.address=127.0.0.1:9: no Ray cluster .* `ray start --head`"
    ):
        run_in_this_process(tmp_path, Ray(address="127.0.0.1:9"))


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[ray\]"'):
        run_in_this_process(tmp_path, Ray())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"workers": 0}, "workers"),
        ({"timeout": 0}, "timeout"),
        ({"cpus_per_worker": 0}, "cpus_per_worker"),
        ({"gpus_per_worker": -1}, "gpus_per_worker"),
        ({"address": "ray://a:1"}, "address"),
        ({"address": "head"}, "address"),
    ],
)
def test_settings_that_make_no_sense(settings, named):
    with pytest.raises(ValueError, match=f"executor.{named}="):
        Ray(**settings)


def test_what_ray_reserves_for_a_worker():
    assert Ray().needs("cpu") == {"CPU": 1, "GPU": 0} and Ray().needs("cuda:1") == {
        "CPU": 1,
        "GPU": 1,
    }
    assert Ray(gpus_per_worker=0.5).needs("cuda")["GPU"] == 0.5
    with pytest.raises(ValueError, match="executor.gpus_per_worker=0 with device=cuda"):
        Ray(gpus_per_worker=0).needs("cuda")


# The fence, and what a worker looks at before it takes part

HOLD = (
    "import sys; from dd.store.locks import Fence; f = Fence.hold(sys.argv[1], 3, "
    "sys.argv[2]); print(flush=True); sys.stdin.read()"
)


def holder(folder, token):
    """A process that holds byte 3 of the fence until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder), token]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def test_a_fence_tells_who_may_still_write(tmp_path):
    with Fence(tmp_path) as fence:
        worker = holder(tmp_path, fence.token)
        assert not fence.free(3) and fence.free(2) and fence.free(4)
        worker.kill()
        worker.communicate()
        assert fence.free(3)
    assert nothing_left(tmp_path)


def test_a_lock_waits_for_the_workers_of_a_driver_that_died(tmp_path, monkeypatch):
    fence = Fence(tmp_path).__enter__()  # of a driver that dies before it leaves
    worker = holder(tmp_path, fence.token)
    fence.file.close()
    monkeypatch.setattr("dd.store.locks.WAIT", 0.3)
    for shard in (None, (0, 2)):
        with pytest.raises(Busy, match="which has ended, still write"), Lock(tmp_path, shard):
            pass
    worker.communicate()
    with Lock(tmp_path):
        assert not (tmp_path / WORKERS).exists()
        with pytest.raises(ValueError, match="is not there, or is not the driver's folder"):
            Fence.hold(tmp_path, 3, fence.token)
        with Fence(tmp_path), pytest.raises(ValueError, match="now belongs to another run"):
            Fence.hold(tmp_path, 3, fence.token)
    assert nothing_left(tmp_path)


def test_a_worker_looks_whether_it_is_in_the_right_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def answer(directory, folder, token, found):
        return Worker(None, None, "cpu", Driver(directory, folder, token, found), 0, "ray1").start()

    assert (
        "no folder /nowhere: start the run in a folder that every"
        in answer("/nowhere", tmp_path, "", versions())[1][1]
    )
    kind, (_, why) = answer(str(tmp_path), tmp_path / "elsewhere", "", versions())
    assert kind == "refused" and "every machine of the cluster sees under the same path" in why
    (tmp_path / WORKERS).write_text('{"token": "mine"}')
    kind, (_, why) = answer(str(tmp_path), tmp_path, "mine", versions() | {"torch": "1.0"})
    assert kind == "refused" and "torch: 1.0 -> " in why
    assert answer(str(tmp_path), tmp_path, "mine", versions())[0] == "placed"
