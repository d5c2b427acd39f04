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
WAIT = 15  # seconds that workers of a driver that died have to notice it
SHARDS = "Several drivers share the work with executor=shard, each with another executor.index"


class Busy(Exception):
    """Another process works on the folder."""


class Lock:
    """Held from ``with`` on; copies that are sent to worker processes hold it too, so orphans keep
    others out.

    Alone on ``folder``, or with ``shard=(index, count)`` beside other shards of the same count.
    Busy names the holder. A file left by a process that died holds nothing; whoever is alone
    removes what killed writers have left half written below the folder
    (:func:`dd.store.provenance.sweep`). Where the file system knows no locks, a line says so and
    nothing is held. ``hint``: what Busy advises.
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
            if self._try(file, fcntl.LOCK_EX):  # the last one takes the file away
                (self.folder / name).unlink(missing_ok=True)
            file.close()

    def alone(self) -> bool:
        """Whether no other driver works on the folder; if so, none begins while this one goes
        on."""
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
        """False where there are no locks."""
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
            passing = kind == fcntl.LOCK_SH and holder.get("count")  # a shard that is just arriving
            if not got and (not (passing or _died(holder)) or time.monotonic() - start > WAIT):
                raise Busy(
                    f"{self.folder} is being written by process {holder.get('pid')} on "
                    f"{holder.get('host')}: wait until it ends, or stop it. {self.hint}"
                )
            time.sleep(0.05)

    def _await_workers(self) -> None:
        """Workers of a driver that died, on this machine or another, write no more: see
        :class:`Fence`."""
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
                    "Ray ends them within a minute or so: run the same command again then"
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
    """Which workers on other machines may still write to ``folder``: each holds a byte of one file
    for as long as it lives.

    The driver, which has the folder's :class:`Lock`, makes the file with a ``token`` (``with``). It
    asks ``free(number)`` before it gives what a lost worker was at to another: a machine that
    cannot be reached may still be at work. The file of a driver that died makes the next one wait.
    Where the file system knows no locks every worker is taken for dead.
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
        """Whether worker ``number`` writes no more."""
        free = _take_bytes(self.file, number, 1)
        if free:
            with suppress(OSError):
                fcntl.lockf(self.file, fcntl.LOCK_UN, 1, number)
        return free

    @staticmethod
    def hold(folder: str | Path, number: int, token: str) -> TextIO:
        """In the worker: hold byte ``number``; returns the open file, to be kept, and no other
        of its path opened meanwhile. ValueError unless ``folder`` is the driver's and the driver
        is still the same."""
        path = Path(folder) / WORKERS
        if not path.is_file():
            raise ValueError(
                f"{folder} is not there, or is not the driver's folder: "
                "a data set must lie in a folder that every machine of the cluster sees "
                "under the same path (data_root=...)"
            )
        file = open(path, "r+")  # noqa: SIM115
        held = _take_bytes(file, number, 1) and _same(file, path)
        if not held or _holder(file).get("token") != token:
            file.close()
            raise ValueError(
                f"{folder} is another folder than the driver's, or belongs to another run by now"
            )
        return file


def _myself(**more: Any) -> str:
    """What a lock's file says of its holder."""
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **more})


def _take_bytes(file: TextIO, start: int = 0, length: int = 0) -> bool:
    """Take these bytes (0: all there may ever be) for this process; False if another one holds
    any of them."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _held(*descriptors: Any) -> list[int]:
    return [d.detach() for d in descriptors]


def _same(file: TextIO, path: Path) -> bool:
    """Whether the locked file is still the one in the folder: its holder may have taken it away
    in between."""
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
    """Whether the driver is gone while its orphaned workers still hold the lock (or has not
    written its name yet)."""
    here = not holder or holder["host"] == socket.gethostname()
    return here and not (holder and alive(holder["pid"]))
