"""The workers of one run on a Ray cluster: given units, lost, replaced, let go. Ray comes as an
argument."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dd.execution.base import UnitsFailed, attempt
from dd.store.locks import Fence
from dd.store.provenance import differences, versions

TICK = 1.0  # seconds between looks at the cluster's nodes
LET_GO = 10.0  # seconds that workers have to end when the run does
READY = ("idle", "busy")


@dataclass(eq=False)
class Member:
    """A worker as the driver sees it. ``state``: placing, building, idle, busy, or refused (it
    keeps its place, so that none is tried there again); ``answer``: what it was last asked for."""

    actor: Any
    number: int  # of all that were started: its byte of the fence
    slot: int
    name: str
    since: float  # when it was started; when it was lost
    answer: Any = None
    state: str = "placing"
    unit: int | None = None
    where: str = "no node yet"
    pid: int = 0
    how: str = ""  # it was lost


class Crew:
    """``run()`` makes the units of ``state``. ``needs``: {"CPU", "GPU"} of a worker; ``task``:
    (work, build, device)."""

    def __init__(self, ray, state, settings, needs, task, died, fence):
        self.ray, self.state, self.settings, self.needs, self.died, self.fence = (
            ray,
            state,
            settings,
            needs,
            died,
            fence,
        )
        self.members, self.gone, self.started, self.bad_starts, self.wait_until = [], [], 0, 0, 0.0
        self.was_ready, self.looked = False, 0.0
        shared = os.getcwd(), str(fence.path.parent), fence.token, versions()
        work, build, device = task
        options = {
            "num_cpus": needs["CPU"],
            "num_gpus": needs["GPU"],
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        self.actor = ray.remote(Worker).options(**options)
        self.arguments = build, work, device, *shared

    def run(self):
        try:
            while self.state.queue or self._busy():
                if time.monotonic() - self.looked >= TICK:
                    self._look()
                for member in self.members:
                    if member.state == "idle" and self.state.queue:
                        self._give(member)
                asked = {m.answer: m for m in self.members if m.answer is not None}
                if asked:
                    for answer in self.ray.wait(list(asked), timeout=TICK)[0]:
                        self._hear(asked[answer])
                else:
                    time.sleep(TICK / 10)
                self._bury()
        finally:
            self._stop()

    def _busy(self) -> int:
        return sum(m.unit is not None for m in (*self.members, *self.gone))

    def _look(self):
        """Start workers where there is room by now; refuse to wait for ever for a place."""
        self.looked = time.monotonic()
        refused = sum(m.state == "refused" for m in self.members)
        room = sum(self._room(node["Resources"]) for node in self.ray.nodes() if node["Alive"])
        wanted = min(
            self.settings.workers or max(1, room - refused), len(self.state.queue) + self._busy()
        )
        if self.looked >= self.wait_until:
            for _ in range(wanted - (len(self.members) - refused)):
                self._start()
        if any(m.state not in ("placing", "refused") for m in self.members):
            return
        waiting = [time.monotonic() - m.since for m in self.members if m.state == "placing"]
        never = self.settings.address is None and not room  # this machine alone does not grow
        if waiting and (never or max(waiting) > self.settings.timeout):
            kind = UnitsFailed if self.was_ready else ValueError
            raise kind(self._no_place(max(waiting)))

    def _room(self, resources) -> int:
        return min(
            int(resources.get(key, 0) / need + 1e-9) for key, need in self.needs.items() if need
        )

    def _no_place(self, seconds) -> str:
        def amount(resources):
            return ", ".join(f"{resources.get(key, 0):g} {key}" for key in ("CPU", "GPU"))

        nodes = sum(node["Alive"] for node in self.ray.nodes())
        return (
            f"no worker got a place in {seconds:.0f} s. Each asks for {amount(self.needs)} on one "
            "node "
            f"(executor.cpus_per_worker, executor.gpus_per_worker); the cluster's {nodes} nodes "
            "have "
            f"{amount(self.ray.cluster_resources())} together, of which "
            f"{amount(self.ray.available_resources())} are free. "
            "Ask for less, add nodes, wait until others have ended, or give it more time with "
            "executor.timeout"
        )

    def _start(self):
        taken = {m.slot for m in (*self.members, *self.gone)}
        slot = next(i for i in range(1, len(taken) + 2) if i not in taken)
        name, number = self.settings.name(slot), self.started
        member = Member(
            self.actor.remote(*self.arguments, number, name), number, slot, name, time.monotonic()
        )
        member.answer, self.started = member.actor.start.remote(), self.started + 1
        self.members.append(member)

    def _give(self, member):
        member.unit, member.state = self.state.queue.popleft(), "busy"
        member.answer = member.actor.make.remote(self.state.units[member.unit])

    def _hear(self, member):
        answer, member.answer = member.answer, None
        try:
            kind, content = self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            return self._lose(member, error)
        if kind == "cannot write":
            raise OSError(*content)
        if kind == "refused":
            return self._refuse(member, content)
        if kind == "placed":
            (member.where, member.pid), member.state = content, "building"
            member.answer = member.actor.build.remote()
            return
        number, member.unit, member.state = member.unit, None, "idle"
        if kind == "ready":
            self.was_ready, self.bad_starts = True, 0
        elif kind == "done":
            self.state.made(number)
        else:
            self.state.lost(number, content)

    def _refuse(self, member, why):
        """A node that cannot take part ends a run that is beginning; one that joins later is
        left alone."""
        member.where, text = why[0], f"the worker on {why[0]} could not start: {why[1]}"
        if not any(m.state in READY for m in self.members):
            raise ValueError(text)
        member.state = "refused"
        self.state.progress.fail(text)

    def _lose(self, member, error):
        self._kill(member)
        self.members.remove(member)
        member.how = f"worker {member.name} on {member.where} died: {_short(error)}"
        member.since, self.looked = time.monotonic(), 0.0
        self.gone.append(member)
        if member.unit is not None:
            return
        self.state.progress.fail(member.how)
        if member.state == "idle":
            return
        self.bad_starts += 1
        self.wait_until = time.monotonic() + min(60, 2 ** (self.bad_starts - 1))
        if self.bad_starts >= self.settings.attempts and not any(
            m.state in READY for m in self.members
        ):
            raise UnitsFailed(
                f"{self.bad_starts} workers in a row were lost before their first unit: "
                f"{member.how}"
            )

    def _bury(self):
        """What a lost worker was at goes to another once it cannot write any more; it may have
        been recorded all the same."""
        for member in list(self.gone):
            number, late = member.unit, time.monotonic() - member.since > self.settings.timeout
            if self.fence.free(member.number):
                self.gone.remove(member)
                if number is None:
                    continue
                if self.died(self.state.units[number], member.name, member.pid):
                    self.state.made(number)
                else:
                    self.state.lost(number, member.how)
            elif late and number is not None:
                member.unit = None  # its name stays taken
                held = (
                    f"{member.how}; it still holds the data set after {self.settings.timeout:g} s"
                )
                self.state.lost(number, held, final=True)

    def _kill(self, member):
        with suppress(Exception):  # of a cluster that is gone
            self.ray.kill(member.actor, no_restart=True)

    def _stop(self):
        """End all workers, and tidy up after those that were at a unit."""
        for member in self.members:
            self._kill(member)
        end = time.monotonic() + LET_GO
        for member in (*self.members, *self.gone):
            while not (free := self.fence.free(member.number)) and time.monotonic() < end:
                time.sleep(0.02)
            if member.unit is not None and free:
                self.died(self.state.units[member.unit], member.name, member.pid)


class Worker:
    """The actor. Its answers are (kind, content); it writes only while it holds its byte of the
    fence."""

    def __init__(
        self, build, work, device, directory, folder, token, driver_versions, number, name
    ):
        self.make_tools, self.work, self.device, self.name = build, work, device, name
        self.directory, self.fence, self.versions = (
            directory,
            (folder, number, token),
            driver_versions,
        )

    def start(self):
        """Is this the driver's file system and software?"""
        where = os.uname().nodename
        try:
            os.chdir(self.directory)  # relative paths of the configuration
        except OSError:
            return "refused", (
                where,
                f"no folder {self.directory}: start the run in a folder that every machine sees",
            )
        try:
            self.held = Fence.hold(*self.fence)
        except (ValueError, OSError) as error:
            return "refused", (where, str(error))
        lines = differences(self.versions, versions())
        if lines:
            return "refused", (where, "other versions than the driver's:\n  " + "\n  ".join(lines))
        return "placed", (where, os.getpid())

    def build(self):
        try:
            self.tools = self.make_tools(self.device)
        except Exception as error:
            return "refused", (os.uname().nodename, f"{type(error).__name__}: {error}")
        return "ready", None

    def make(self, unit):
        return attempt(self.work, self.tools, unit, self.name)


def _short(error) -> str:
    """The first and the last line of what Ray says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    return " ... ".join(dict.fromkeys((lines[0][:300], lines[-1][:300])))
