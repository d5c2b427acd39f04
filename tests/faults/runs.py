"""Runs that are started, killed and compared."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dd.store.locks import WORKERS


def start(folder, **settings):
    """A driver in a process of its own; its session, so that nothing of it survives a test."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "tests.faults.driver", str(folder), json.dumps(settings)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(folder, **settings):
    """What an uninterrupted run answers."""
    process = start(folder, **settings)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def workers_of(process):
    """Ids of the worker processes of a driver: children whose command says so, and those that
    hold its fence (Ray's)."""
    found, fence = [], os.path.realpath(Path(process.args[3]) / WORKERS)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            child = (
                parent == process.pid and b"spawn_main" in (path.parent / "cmdline").read_bytes()
            )
            pid = int(path.parent.name)
            actor = pid != process.pid and any(
                os.path.realpath(f) == fence for f in (path.parent / "fd").iterdir()
            )
            if child or actor:
                found.append(pid)
        except (OSError, ValueError, IndexError):
            continue
    return found


def kill_sometime(process, rng, whom, longest=0.6):
    """kill -9 a worker, or the driver, after a random while; whether there was still one to
    kill."""
    time.sleep(rng.uniform(0.05, longest))
    victims = workers_of(process) if whom == "worker" else [process.pid]
    if process.poll() is not None or not victims:
        return False
    try:
        os.kill(rng.choice(victims), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition, process=None, seconds=60):
    """Until something holds; a driver that ends before that fails the test with what it said."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def contents(folder):
    """Bytes of every file, the command of run.json and the order and seconds of the records left
    out. A record twice shows."""
    found, records = {}, []
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.parent.name == "records":
            for line in path.read_text().splitlines():
                try:
                    records.append({**json.loads(line), "seconds": None, "sum": None})
                except json.JSONDecodeError:
                    continue  # torn
        else:
            found[name] = (
                json.loads(path.read_text())["identity"]
                if name == "run.json"
                else path.read_bytes()
            )
    return found | {"records": sorted(records, key=lambda r: r["id"])}
