"""One driver for one data set, run or study: locks that vanish with their process, however it
ended."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import reduction
from pathlib import Path
from typing import Any, Self, TextIO
from uuid import uuid4

from dd.store.provenance import alive, sweep, write_atomic

NAME = ".lock"
WORKERS = ".lock-workers"
WAIT = 15  # seconds in which workers notice that their driver has died
SHARDS = "Several drivers share the work with executor=shard, each with another executor.index"


class Busy(Exception):
    """Another process works on the folder."""


class Lock:
    """Held from ``with`` on. Copies that are sent to worker processes hold it too, so orphaned
    workers keep others out.

    Exclusive on ``folder``, or with ``shard=(index, count)`` shared with other shards of the same
    count. Busy names the holder. A file left by a dead process holds nothing. A sole holder removes
    half-written files of killed writers below the folder (:func:`dd.store.provenance.sweep`). If
    the file system has no locks, a line says so and nothing is held. ``hint``: the advice in Busy.
    """

    def __init__(
        self, folder: str | Path, shard: tuple[int, int] | None = None, hint: str = SHARDS
    ) -> None:
        self.folder, self.shard, self.hint = Path(folder), shard, hint
        self.files: list[tuple[str, TextIO]] = []

    def __enter__(self) -> Self:
        try:
            if self.shard is None:
                self._take(NAME, fcntl.LOCK_EX)
            else:
                index, count = self.shard
                self._beside_others(count)
                self._take(f"{NAME}-{index}of{count}", fcntl.LOCK_EX)
            self._await_workers()
            if self.shard is None:
                sweep(self.folder)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self.files:
            name, file = self.files.pop()
            if self._try(file, fcntl.LOCK_EX):  # the last holder removes the file
                (self.folder / name).unlink(missing_ok=True)
            file.close()

    def alone(self) -> bool:
        """Whether no other driver works on the folder. If so, none can begin while this one
        continues."""
        if self.shard is None or not self.files or self._try(self.files[0][1], fcntl.LOCK_EX):
            return True
        self._try(self.files[0][1], fcntl.LOCK_SH)  # a refused exchange has lost the shared lock
        return False

    def share(self) -> None:
        """Let other shards begin again after :meth:`alone`."""
        if self.shard is not None and self.files:
            self._try(self.files[0][1], fcntl.LOCK_SH)

    def __reduce__(self) -> tuple[Callable[..., list[int]], tuple[Any, ...]]:
        return _held, tuple(reduction.DupFd(file.fileno()) for _, file in self.files)

    def _beside_others(self, count: int) -> None:
        if not self._take(NAME, fcntl.LOCK_SH):
            return
        theirs = _holder(self.files[0][1]).get("count")
        if theirs not in (None, count):
            raise Busy(
                f"{self.folder}: shards of executor.count={theirs} are at work; count={count} "
                "would make units twice"
            )

    def _take(self, name: str, kind: int) -> bool:
        """False if there are no locks."""
        start = time.monotonic()
        while True:
            file = open(self.folder / name, "a+")  # noqa: SIM115
            try:
                got = self._try(file, fcntl.LOCK_EX)
                if got:
                    file.truncate(0)
                    file.write(_myself(count=self.shard and self.shard[1]))
                    file.flush()
                if kind == fcntl.LOCK_SH:
                    got = self._try(file, fcntl.LOCK_SH)
            except OSError as error:
                file.close()
                print(
                    f"warning: {self.folder}: no locks on this file system "
                    f"({error.strerror}); start no second run there"
                )
                return False
            if got and _same(file, self.folder / name):
                self.files.append((name, file))
                return True
            holder = _holder(file)
            file.close()
            passing = kind == fcntl.LOCK_SH and holder.get("count")  # another shard is starting
            if not got and (not (passing or _died(holder)) or time.monotonic() - start > WAIT):
                raise Busy(
                    f"{self.folder} is being written by process {holder.get('pid')} on "
                    f"{holder.get('host')}: wait until it ends, or stop it. {self.hint}"
                )
            time.sleep(0.05)

    def _await_workers(self) -> None:
        """Wait until workers of a dead driver, on this machine or another, have stopped writing:
        see :class:`Fence`."""
        start, path = time.monotonic(), self.folder / WORKERS
        while path.exists():
            with open(path, "r+") as file:
                if _take_bytes(file):
                    path.unlink(missing_ok=True)
                    return
                holder = _holder(file)
            if time.monotonic() - start > WAIT:
                raise Busy(
                    f"{self.folder}: workers of process {holder.get('pid')} on "
                    f"{holder.get('host')}, which has ended, still write there. "
                    "Ray ends them within about a minute: then run the same command again"
                )
            time.sleep(0.1)

    @staticmethod
    def _try(file: TextIO, kind: int) -> bool:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False


class Fence:
    """Tracks which workers on other machines may still write to ``folder``: each holds a byte of
    one file as long as it lives.

    The driver, which has the folder's :class:`Lock`, makes the file with a ``token`` (``with``).
    Before it gives a lost worker's unit to another, it asks ``free(number)``, because a machine
    that cannot be reached may still be working. The file of a dead driver makes the next one wait.
    If the file system has no locks, every lost worker counts as dead.
    """

    file: TextIO

    def __init__(self, folder: str | Path) -> None:
        self.path, self.token = Path(folder).resolve() / WORKERS, uuid4().hex

    def __enter__(self) -> Self:
        write_atomic(self.path, _myself(token=self.token))
        self.file = open(self.path, "r+")
        return self

    def __exit__(self, *_: object) -> None:
        start = time.monotonic()
        while not (alone := _take_bytes(self.file)) and time.monotonic() - start < WAIT:
            time.sleep(0.05)
        if alone:
            self.path.unlink(missing_ok=True)
        self.file.close()

    def free(self, number: int) -> bool:
        """Whether worker ``number`` has stopped writing."""
        free = _take_bytes(self.file, number, 1)
        if free:
            with suppress(OSError):
                fcntl.lockf(self.file, fcntl.LOCK_UN, 1, number)
        return free

    @staticmethod
    def hold(folder: str | Path, number: int, token: str) -> TextIO:
        """In the worker: hold byte ``number``. Returns the open file, which must be kept; the path
        must not be opened again meanwhile. ValueError unless ``folder`` is the driver's and the
        driver is still the same."""
        path = Path(folder) / WORKERS
        if not path.is_file():
            raise ValueError(
                f"{folder} is not there, or is not the driver's folder: "
                "a data set must be in a folder that every machine of the cluster sees "
                "under the same path (data_root=...)"
            )
        file = open(path, "r+")  # noqa: SIM115
        held = _take_bytes(file, number, 1) and _same(file, path)
        if not held or _holder(file).get("token") != token:
            file.close()
            raise ValueError(f"{folder} is not the driver's folder, or now belongs to another run")
        return file


def _myself(**more: Any) -> str:
    """The content of a lock's file: who holds it."""
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **more})


def _take_bytes(file: TextIO, start: int = 0, length: int = 0) -> bool:
    """Take these bytes (length 0: up to any end) for this process; False if another process holds
    one of them."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _held(*descriptors: Any) -> list[int]:
    return [d.detach() for d in descriptors]


def _same(file: TextIO, path: Path) -> bool:
    """Whether the locked file is still the one in the folder: its holder may have removed it in the
    meantime."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(file: TextIO) -> dict[str, Any]:
    try:
        file.seek(0)
        found = json.loads(file.read())
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}


def _died(holder: dict[str, Any]) -> bool:
    """Whether the driver is gone while its orphaned workers still hold the lock (or it has not
    written its name yet)."""
    here = not holder or holder["host"] == socket.gethostname()
    return here and not (holder and alive(holder["pid"]))
