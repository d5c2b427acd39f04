"""Archives from the web: resumed, checked, unpacked safely. pooch checks and moves them; the class
below resumes downloads."""

import gzip
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pooch
import requests
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dd.store.provenance import read_own, sha256, write_json

GB = 10**9
TIMEOUT = (20, 60)  # seconds to connect, and between two pieces
DIGITS = {"md5": 32, "sha256": 64}
BROKEN = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
)
DAMAGED = (
    tarfile.ReadError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    RuntimeError,
)


@dataclass(frozen=True)
class Archive:
    """A file on the web. ``checksum`` is ``md5:...`` or ``sha256:...``, or None: then it is
    recorded at the first download and compared later. It may unpack to at most ``max_bytes``."""

    url: str
    checksum: str | None
    max_bytes: int

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not self.file_name:
            raise ValueError(
                f"url {self.url!r}: expected http:// or https:// and a file name at the end"
            )
        algorithm, _, digest = (self.checksum or "").partition(":")
        right = len(digest) == DIGITS.get(algorithm) and set(digest) <= set("0123456789abcdef")
        if self.checksum and not right:
            raise ValueError(
                f"checksum {self.checksum!r}: "
                "expected md5: and 32 or sha256: and 64 small hexadecimal digits"
            )

    @property
    def file_name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name


class Resuming:
    """A downloader for pooch that keeps a partial file in ``part`` and resumes it, in this run or a
    later one.

    A partial file is only resumed if the server still has the same file (its ETag or date). A
    connection may break any number of times as long as bytes arrive, but only ``retries`` times at
    the same place. OSError if the disk is too small; ConnectionError if the server ends before the
    file does.
    """

    def __init__(self, part: Path, retries: int = 5, pause: float = 2.0) -> None:
        self.part, self.retries, self.pause = part, retries, pause

    def __call__(
        self, url: str, output_file: Any, _pooch: pooch.Pooch | None, check_only: bool = False
    ) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(self.part.name.removesuffix(".part"), total=None)
            tries, have = 0, self._have()
            while True:
                try:
                    self._go_on(
                        url, lambda done, total: bar.update(task, completed=done, total=total)
                    )
                    break
                except BROKEN as error:
                    tries, have = (tries + 1 if self._have() <= have else 1), self._have()
                    if tries > self.retries:
                        raise ConnectionError(
                            f"{url}: the connection broke {tries} times at the same place "
                            f"({error}). {have} bytes are kept in {self.part}: "
                            "run the command again to resume, or give another address with --url"
                        ) from None
                    time.sleep(self.pause * 2 ** (tries - 1))
        shutil.move(self.part, output_file)
        self._state.unlink(missing_ok=True)

    @property
    def _state(self) -> Path:
        return self.part.with_name(self.part.name + ".json")

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() and self._state.exists() else 0

    def _go_on(self, url: str, progress: Callable[[int, int | None], object]) -> None:
        have, headers = self._have(), {"Accept-Encoding": "identity"}  # bytes as they are stored
        if have and (version := read_own(self._state, {"version": (str, None)})["version"]):
            headers |= {"Range": f"bytes={have}-", "If-Range": version}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416:  # the part is as long as the file, or longer
                if response.headers.get("Content-Range") == f"bytes */{have}":
                    return
                self.part.unlink()
                return self._go_on(url, progress)
            _check_status(url, response)
            begins = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have = have if response.status_code == 206 and begins else 0
            length = int(response.headers.get("Content-Length") or 0)
            free = shutil.disk_usage(self.part.parent).free
            if length > free:
                raise OSError(
                    f"{url}: {length / GB:.1f} GB to download, {free / GB:.1f} GB free in "
                    f"{self.part.parent}"
                )
            total = have + length if length else None
            write_json(self._state, {"url": url, "version": _version(response)})
            with open(self.part, "ab" if have else "wb") as file:
                for piece in response.iter_content(1 << 20):
                    have += file.write(piece)
                    progress(have, total)
        if total is not None and have != total:
            raise requests.ConnectionError(f"got {have} of {total} bytes")


def _check_status(url: str, response: requests.Response) -> None:
    said = f"the server answers {response.status_code} {response.reason}"
    if response.status_code >= 500:
        raise requests.ConnectionError(said)
    if not response.ok:
        raise FileNotFoundError(f"{url}: {said}. Give another address with --url")


def _version(response: requests.Response) -> str | None:
    """What shows whether the server still has the same file; If-Range accepts no weak tags."""
    tag = response.headers.get("ETag", "")
    strong = tag if not tag.startswith("W/") else ""
    return strong or response.headers.get("Last-Modified")


def fetch(archive: Archive, folder: str | Path, retries: int = 5, pause: float = 2.0) -> Path:
    """The archive's file in ``folder``, downloaded unless it is there and intact.

    ValueError if its checksum differs from the known one, or from the one recorded in
    ``<file>.json`` at the first download.
    """
    path = Path(folder) / archive.file_name
    record, known = path.with_name(path.name + ".json"), archive.checksum
    if known is None and record.exists():
        known = f"sha256:{read_own(record, {'sha256': str})['sha256']}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if known is not None and path.is_file():
        algorithm, _, digest = known.rpartition(":")
        if pooch.file_hash(str(path), algorithm or "sha256") == digest.lower():
            return path
        Console(stderr=True, soft_wrap=True).print(
            f"warning: {path} has another checksum than {known}: "
            "it is incomplete, damaged or another version. "
            f"It is downloaded again from {archive.url} and replaced when that is complete",
            markup=False,
            highlight=False,
        )
    hook = Resuming(path.with_name(path.name + ".part"), retries, pause)
    pooch.get_logger().setLevel("WARNING")  # it announces every hash; the progress bar is enough
    try:
        pooch.retrieve(archive.url, known, fname=path.name, path=path.parent, downloader=hook)
    except ValueError as error:  # pooch's own message names a temporary file
        if "does not match the known hash" not in str(error):
            raise
        whose, cure = (
            ("known for this archive", "give its checksum with --checksum")
            if archive.checksum
            else (f"recorded at the first download in {record}", f"delete {record}")
        )
        raise ValueError(
            f"{archive.url}: the downloaded file has another checksum than {known} ({whose}). "
            "It was not kept. Try again, give another address with --url, or, "
            f"if the file is meant to have changed, {cure}"
        ) from error
    return path


def keep_checksum(path: Path, url: str) -> None:
    """Record the SHA-256 of a file beside it, unless that was done before. The file has been
    unpacked, so it is known to be complete."""
    record = path.with_name(path.name + ".json")
    if not record.exists():
        found = {"url": url, "sha256": sha256(path), "bytes": path.stat().st_size}
        write_json(record, found)


def unpack(path: str | Path, folder: str | Path, max_bytes: int) -> None:
    """Unpack all files of a .zip, .tar, .tar.gz or .tgz into ``folder``. Nothing leaves the folder,
    and links are refused.

    ValueError for a damaged archive, for an unsafe member and for more than ``max_bytes``; OSError
    if the disk is too small.
    """
    path, folder = Path(path), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (_unpack_zip if zipfile.is_zipfile(path) else _unpack_tar)(path, folder, max_bytes)
    except DAMAGED as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"archive {path} is damaged or incomplete ({why}). Delete it and run the command again"
        ) from None


def _unpack_zip(path: Path, folder: Path, max_bytes: int) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_space(path, folder, sum(m.file_size for m in members), max_bytes)
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)
            _check_member(path, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
        for member in members:  # reads at most the stated size of a member, and checks its CRC
            archive.extract(member, folder)


def _unpack_tar(path: Path, folder: Path, max_bytes: int) -> None:
    total = 0
    with tarfile.open(path) as archive:
        for member in archive:
            total += member.size
            _check_space(path, folder, total, max_bytes, member.size)
            _check_member(path, member.name, member.isreg() or member.isdir())
            archive.extract(member, folder, filter="data")
        # read to the end, because gzip's checksum is there
        while archive.fileobj is not None and archive.fileobj.read(1 << 20):
            pass


def _check_member(path: Path, name: str, plain: bool) -> None:
    pure = PurePosixPath(name.replace("\\", "/"))
    leaves = pure.is_absolute() or ".." in pure.parts or any(":" in p for p in pure.parts[:1])
    if leaves or not plain:
        raise ValueError(
            f"archive {path}: member {name!r} is a link or special file, "
            "or would leave the folder; not unpacked"
        )


def _check_space(
    path: Path, folder: Path, total: int, max_bytes: int, needed: int | None = None
) -> None:
    if total > max_bytes:
        raise ValueError(
            f"archive {path} unpacks to more than {max_bytes / GB:.3g} GB, "
            "the largest size that is expected"
        )
    needed, free = total if needed is None else needed, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"archive {path} needs {needed / GB:.1f} GB more, "
            f"{free / GB:.1f} GB are free in {folder}"
        )


def obtain(
    archive: Archive, downloads: str | Path, target: str | Path, folder: str, **how: Any
) -> Path:
    """Download the archive, unpack it and put its folder named ``folder`` in place as ``target``,
    in one step and complete.

    ValueError if the archive has no such folder. An existing target is never replaced.
    """
    target = Path(target)
    path = fetch(archive, downloads, **how)
    work = target.parent / f".{target.name}.unpacking"
    shutil.rmtree(work, ignore_errors=True)
    try:
        unpack(path, work, archive.max_bytes)
        found = min(
            (p for p in work.rglob(folder) if p.is_dir()), key=lambda p: len(p.parts), default=None
        )
        if found is None:
            raise ValueError(
                f"archive {path} from {archive.url} has no folder {folder!r} in it: "
                "is it another archive?"
            )
        keep_checksum(path, archive.url)
        found.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
