"""One driver for one data set, run or study: locks that vanish with their process, however it ended."""

import fcntl
import json
import os
import socket
import time
from multiprocessing import reduction
from pathlib import Path

NAME = ".lock"
WAIT = 15  # seconds that workers of a driver that died have to notice it
SHARDS = "Several drivers share the work with executor=shard, each with another executor.index"


class Busy(Exception):
    """Another process works on the folder."""


class Lock:
    """Held from ``with`` on; copies that are sent to worker processes hold it too, so orphans keep others out.

    Alone on ``folder``, or with ``shard=(index, count)`` beside other shards of the same count. Busy names the holder. A
    file left by a process that died holds nothing. Where the file system knows no locks, a line says so and nothing is held.
    ``hint``: what Busy advises.
    """

    def __init__(self, folder: str | Path, shard: tuple[int, int] | None = None, hint: str = SHARDS):
        self.folder, self.shard, self.hint, self.files = Path(folder), shard, hint, []

    def __enter__(self):
        try:
            if self.shard is None:
                self._take(NAME, fcntl.LOCK_EX)
            else:
                self._beside_others()
                self._take("{}-{}of{}".format(NAME, *self.shard), fcntl.LOCK_EX)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        while self.files:
            name, file = self.files.pop()
            if self._try(file, fcntl.LOCK_EX):  # the last one takes the file away
                (self.folder / name).unlink(missing_ok=True)
            file.close()

    def alone(self) -> bool:
        """Whether no other driver works on the folder; if so, none begins while this one goes on."""
        if self.shard is None or not self.files or self._try(self.files[0][1], fcntl.LOCK_EX):
            return True
        self._try(self.files[0][1], fcntl.LOCK_SH)  # a refused exchange has lost the shared lock
        return False

    def __reduce__(self):
        return _held, tuple(reduction.DupFd(file.fileno()) for _, file in self.files)

    def _beside_others(self):
        if not self._take(NAME, fcntl.LOCK_SH):
            return
        file, count = self.files[0][1], self.shard[1]
        theirs = _holder(file).get("count")
        if theirs not in (None, count):
            raise Busy(f"{self.folder}: shards of executor.count={theirs} are at work; count={count} would make units twice")

    def _take(self, name, kind) -> bool:
        """False where there are no locks."""
        start = time.monotonic()
        while True:
            file = open(self.folder / name, "a+")  # noqa: SIM115
            try:
                got = self._try(file, fcntl.LOCK_EX)
                if got:
                    file.truncate(0)
                    count = self.shard and self.shard[1]
                    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "count": count}))
                    file.flush()
                if kind == fcntl.LOCK_SH:
                    got = self._try(file, fcntl.LOCK_SH)
            except OSError as error:
                file.close()
                print(f"warning: {self.folder}: no locks on this file system ({error.strerror}); start no second run there")
                return False
            if got and _same(file, self.folder / name):
                self.files.append((name, file))
                return True
            holder = _holder(file)
            file.close()
            passing = kind == fcntl.LOCK_SH and holder.get("count")  # a shard that is just arriving
            if not got and (not (passing or _died(holder)) or time.monotonic() - start > WAIT):
                raise Busy(
                    f"{self.folder} is being written by process {holder.get('pid')} on {holder.get('host')}: wait until it "
                    f"ends, or stop it. {self.hint}"
                )
            time.sleep(0.05)

    @staticmethod
    def _try(file, kind) -> bool:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False


def _held(*descriptors):
    return [d.detach() for d in descriptors]


def _same(file, path) -> bool:
    """Whether the locked file is still the one in the folder: its holder may have taken it away in between."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(file) -> dict:
    try:
        file.seek(0)
        found = json.loads(file.read())
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}


def _died(holder) -> bool:
    """Whether the driver is gone while its orphaned workers still hold the lock (or has not written its name yet)."""
    if not holder:
        return True
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
        return False
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
