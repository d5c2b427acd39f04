"""The workers of one run on a Ray cluster: they get units, are lost, replaced and released. Ray is
passed as an argument."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from dd.execution.base import Answer, Build, Draw, State, Task, Unit, UnitsFailed, attempt
from dd.execution.settings import RaySettings
from dd.store.locks import Fence
from dd.store.provenance import differences, versions

TICK = 1.0  # seconds between checks of the cluster's nodes
LET_GO = 10.0  # seconds that workers have to end with the run
READY = ("idle", "busy")


@dataclass(eq=False)
class Member:
    """A worker as the driver sees it. ``state``: placing, building, idle, busy, or refused (it
    keeps its place, so that no other is tried there); ``answer``: its last request."""

    actor: Any
    number: int  # counts all workers ever started: its byte of the fence
    slot: int
    name: str
    since: float  # when it was started, or lost
    answer: Any = None
    state: str = "placing"
    unit: int | None = None
    where: str = "no node yet"
    pid: int = 0
    how: str = ""  # how it was lost


class Named(Protocol):
    """The part of an executor that its pool needs: the settings, and the names of workers."""

    settings: RaySettings

    def name(self, worker: int) -> str: ...


class WorkerPool:
    """``run()`` makes the units of ``state`` by ``task``. ``needs``: {"CPU", "GPU"} of a worker."""

    def __init__(
        self,
        ray: Any,
        executor: Named,
        state: State,
        needs: dict[str, float],
        task: Task,
        device: str,
        fence: Fence,
    ) -> None:
        self.ray, self.state, self.needs, self.died, self.fence = (
            ray,
            state,
            needs,
            task.died,
            fence,
        )
        self.settings, self.name = executor.settings, executor.name
        self.members: list[Member] = []
        self.gone: list[Member] = []
        self.started, self.bad_starts, self.wait_until = 0, 0, 0.0
        self.was_ready, self.looked = False, 0.0
        self.actor = ray.remote(Worker).options(
            num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_restarts=0, max_task_retries=0
        )
        own_gpu = "cuda" if device.startswith("cuda") else device  # Ray shows a worker only its own
        driver = Driver(os.getcwd(), str(fence.path.parent), fence.token, versions())
        self.arguments = task.draw, task.build, own_gpu, driver

    def run(self) -> None:
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

    def _takes_part(self) -> bool:
        """Whether any worker has finished its start."""
        return any(m.state in READY for m in self.members)

    def _look(self) -> None:
        """Start workers where there is room; do not wait for ever for a place."""
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
        never = self.settings.address is None and not room  # this machine alone cannot grow
        if waiting and (never or max(waiting) > self.settings.timeout):
            kind = UnitsFailed if self.was_ready else ValueError
            raise kind(self._no_place(max(waiting)))

    def _room(self, resources: Mapping[str, float]) -> int:
        asked = {key: need for key, need in self.needs.items() if need}
        return min(int(resources.get(key, 0) / need + 1e-9) for key, need in asked.items())

    def _no_place(self, seconds: float) -> str:
        def amount(resources: Mapping[str, float]) -> str:
            return ", ".join(f"{resources.get(key, 0):g} {key}" for key in ("CPU", "GPU"))

        nodes = sum(node["Alive"] for node in self.ray.nodes())
        return (
            f"no worker got a place in {seconds:.0f} s. Each asks for {amount(self.needs)} on one "
            "node (executor.cpus_per_worker, executor.gpus_per_worker); the cluster's "
            f"{nodes} nodes have {amount(self.ray.cluster_resources())} together, of which "
            f"{amount(self.ray.available_resources())} are free. Ask for less, add nodes, wait "
            "until others have ended, or give it more time with executor.timeout"
        )

    def _start(self) -> None:
        taken = {m.slot for m in (*self.members, *self.gone)}
        slot = next(i for i in range(1, len(taken) + 2) if i not in taken)
        name, number = self.name(slot), self.started
        actor = self.actor.remote(*self.arguments, number, name)
        answer = actor.start.remote()
        self.members.append(Member(actor, number, slot, name, time.monotonic(), answer))
        self.started += 1

    def _give(self, member: Member) -> None:
        number = self.state.queue.popleft()
        member.unit, member.state = number, "busy"
        member.answer = member.actor.make.remote(self.state.units[number])

    def _hear(self, member: Member) -> None:
        answer, member.answer = member.answer, None
        try:
            kind, content = self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            self._lose(member, error)
            return
        if kind == "cannot write":
            raise OSError(*content)
        if kind == "refused":
            self._refuse(member, *content)
            return
        if kind == "placed":
            (member.where, member.pid), member.state = content, "building"
            member.answer = member.actor.build.remote()
            return
        number, member.unit, member.state = member.unit, None, "idle"
        if number is None:  # it is ready for its first unit
            self.was_ready, self.bad_starts = True, 0
        elif kind == "done":
            self.state.made(number)
        else:
            self.state.lost(number, content)

    def _refuse(self, member: Member, where: str, why: str) -> None:
        """A node that cannot take part ends a run that is just beginning; one that joins later is
        left out."""
        member.where, text = where, f"the worker on {where} could not start: {why}"
        if not self._takes_part():
            raise ValueError(text)
        member.state = "refused"
        self.state.progress.fail(text)

    def _lose(self, member: Member, error: Exception) -> None:
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
        if self.bad_starts >= self.settings.attempts and not self._takes_part():
            raise UnitsFailed(
                f"{self.bad_starts} workers in a row were lost before their first unit: "
                f"{member.how}"
            )

    def _bury(self) -> None:
        """Give a lost worker's unit to another once the lost one can no longer write; the unit may
        have been recorded anyway."""
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
                member.unit = None  # its name stays in use
                held = f"it still holds the data set after {self.settings.timeout:g} s"
                self.state.lost(number, f"{member.how}; {held}", final=True)

    def _kill(self, member: Member) -> None:
        with suppress(Exception):  # the cluster may be gone
            self.ray.kill(member.actor, no_restart=True)

    def _stop(self) -> None:
        """End all workers, and clean up after those that had a unit."""
        for member in self.members:
            self._kill(member)
        end = time.monotonic() + LET_GO
        for member in (*self.members, *self.gone):
            while not (free := self.fence.free(member.number)) and time.monotonic() < end:
                time.sleep(0.02)
            if member.unit is not None and free:
                self.died(self.state.units[member.unit], member.name, member.pid)


@dataclass(frozen=True)
class Driver:
    """What a worker must share with its driver: working directory, folder of the data set, token of
    the fence, versions of the software."""

    directory: str
    folder: str
    token: str
    versions: dict[str, str]


class Worker:
    """The actor. Its answers are (kind, content); it writes only while it holds its byte of the
    fence."""

    def __init__(
        self,
        draw: Draw,
        build: Build,
        device: str,
        driver: Driver,
        number: int,
        name: str,
    ) -> None:
        self.draw, self.make_tools, self.device, self.name = draw, build, device, name
        self.driver, self.number = driver, number

    def start(self) -> Answer:
        """Check that this is the driver's file system and software."""
        where, driver = os.uname().nodename, self.driver
        try:
            os.chdir(driver.directory)  # relative paths of the configuration start there
        except OSError:
            return "refused", (
                where,
                f"no folder {driver.directory}: start the run in a folder that every machine sees",
            )
        try:
            self.held = Fence.hold(driver.folder, self.number, driver.token)
        except (ValueError, OSError) as error:
            return "refused", (where, str(error))
        lines = differences(driver.versions, versions())
        if lines:
            return "refused", (where, "other versions than the driver's:\n  " + "\n  ".join(lines))
        return "placed", (where, os.getpid())

    def build(self) -> Answer:
        try:
            self.tools = self.make_tools(self.device)
        except Exception as error:
            return "refused", (os.uname().nodename, f"{type(error).__name__}: {error}")
        return "ready", None

    def make(self, unit: Unit) -> Answer:
        return attempt(self.draw, self.tools, unit, self.name)


def _short(error: Exception) -> str:
    """The first and the last line of Ray's message, on one line."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = said or [type(error).__name__]
    return " ... ".join(dict.fromkeys((lines[0][:300], lines[-1][:300])))
