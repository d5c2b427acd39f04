"""Archives from the web: resumed, checked, unpacked safely. pooch checks and moves them, the
hook below resumes."""

import gzip
import hashlib
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
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

from dd.store.provenance import read_own, write_json

GB = 10**9
TIMEOUT = (20, 60)  # seconds to connect, and between two pieces


@dataclass(frozen=True)
class Archive:
    """A file on the web. ``checksum`` is ``md5:...`` or ``sha256:...``, or None: then it is
    recorded at the first download and compared later. It may unpack to at most ``max_bytes``."""

    url: str
    checksum: str | None
    max_bytes: int

    def __post_init__(self):
        if urlsplit(self.url).scheme not in ("http", "https") or not self.file_name:
            raise ValueError(
                f"url {self.url!r}: expected http:// or https:// and a file name at the end"
            )
        algorithm, _, digest = (self.checksum or "").partition(":")
        digits = {"md5": 32, "sha256": 64}
        if self.checksum and (
            len(digest) != digits.get(algorithm) or set(digest) - set("0123456789abcdef")
        ):
            raise ValueError(
                f"checksum {self.checksum!r}: expected md5: and 32 or sha256: and 64 small "
                "hexadecimal digits"
            )

    @property
    def file_name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name


class Resuming:
    """A downloader for pooch that keeps half a file in ``part`` and goes on from there, now or in a
    later run.

    A part is only continued if the server still has the same file (its ETag or date). A connection
    may break any number of times as long as bytes come, ``retries`` times at the same place.
    OSError when the disk is too small; ConnectionError when the server ends before the file does.
    """

    def __init__(self, part: Path, retries: int = 5, pause: float = 2.0):
        self.part, self.retries, self.pause = part, retries, pause

    def __call__(self, url, output_file, _pooch, check_only=False):
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
                except (
                    requests.ConnectionError,
                    requests.Timeout,
                    requests.exceptions.ChunkedEncodingError,
                ) as error:
                    tries, have = (tries + 1 if self._have() <= have else 1), self._have()
                    if tries > self.retries:
                        raise ConnectionError(
                            f"{url}: the connection broke {tries} times at the same place "
                            f"({error}). {have} bytes are kept in "
                            f"{self.part}: run the command again to go on, or give another "
                            "address with --url"
                        ) from None
                    time.sleep(self.pause * 2 ** (tries - 1))
        shutil.move(self.part, output_file)
        self._state.unlink(missing_ok=True)

    @property
    def _state(self) -> Path:
        return self.part.with_name(self.part.name + ".json")

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() and self._state.exists() else 0

    def _go_on(self, url, progress):
        have = self._have()
        version = read_own(self._state, {"version": (str, None)})["version"] if have else None
        headers = {"Accept-Encoding": "identity"}  # bytes as they lie on the server
        if have and version:
            headers |= {"Range": f"bytes={have}-", "If-Range": version}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416:  # the part is as long as the file, or longer
                if response.headers.get("Content-Range") == f"bytes */{have}":
                    return
                self.part.unlink()
                return self._go_on(url, progress)
            if response.status_code >= 500:
                raise requests.ConnectionError(
                    f"the server answers {response.status_code} {response.reason}"
                )
            if not response.ok:
                raise FileNotFoundError(
                    f"{url}: the server answers {response.status_code} {response.reason}. Give "
                    "another address with --url"
                )
            if response.status_code != 206 or not response.headers.get(
                "Content-Range", ""
            ).startswith(f"bytes {have}-"):
                have = 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            free = shutil.disk_usage(self.part.parent).free
            if total and total - have > free:
                raise OSError(
                    f"{url}: {(total - have) / GB:.1f} GB to download, {free / GB:.1f} GB free in "
                    f"{self.part.parent}"
                )
            tag = response.headers.get("ETag", "")
            strong = (
                tag if tag and not tag.startswith("W/") else None
            )  # If-Range takes no weak tags
            write_json(
                self._state,
                {"url": url, "version": strong or response.headers.get("Last-Modified")},
            )
            with open(self.part, "ab" if have else "wb") as file:
                for piece in response.iter_content(1 << 20):
                    have += file.write(piece)
                    progress(have, total)
        if total is not None and have != total:
            raise requests.ConnectionError(f"got {have} of {total} bytes")


def fetch(archive: Archive, folder: str | Path, retries: int = 5, pause: float = 2.0) -> Path:
    """The archive's file in ``folder``, downloaded unless it is there and intact.

    ValueError when its checksum is another than the known one or the one recorded in
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
            f"warning: {path} has another checksum than {known}: half copied, damaged or another "
            "version. It is downloaded "
            f"again from {archive.url} and replaced when that is whole",
            markup=False,
            highlight=False,
        )
    hook = Resuming(path.with_name(path.name + ".part"), retries, pause)
    pooch.get_logger().setLevel("WARNING")  # it announces every hash; the progress bar says enough
    try:
        pooch.retrieve(archive.url, known, fname=path.name, path=path.parent, downloader=hook)
    except ValueError as error:  # pooch's own words name a temporary file
        if "does not match the known hash" not in str(error):
            raise
        whose = "known for this archive"
        cure = "give its checksum with --checksum"
        if not archive.checksum:
            whose, cure = f"recorded at the first download in {record}", f"delete {record}"
        raise ValueError(
            f"{archive.url}: the downloaded file has another checksum than {known} ({whose}). It "
            "was not kept. Try again, give another address with --url, or, if the file is meant to "
            f"have changed, {cure}"
        ) from error
    return path


def keep_checksum(path: Path, url: str) -> None:
    """Record the SHA-256 of a file whose unpacking proved it whole, beside it, unless that was
    done before."""
    record = path.with_name(path.name + ".json")
    if not record.exists():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        write_json(record, {"url": url, "sha256": digest, "bytes": path.stat().st_size})


def unpack(path: str | Path, folder: str | Path, max_bytes: int) -> None:
    """All files of a .zip, .tar, .tar.gz or .tgz into ``folder``; nothing leaves it, and links are
    refused.

    ValueError for a damaged archive, for a member that is unsafe and for more than ``max_bytes``;
    OSError when the disk is too small.
    """
    path, folder = Path(path), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(path):
            _unpack_zip(path, folder, max_bytes)
        else:
            _unpack_tar(path, folder, max_bytes)
    except (
        tarfile.ReadError,
        zipfile.BadZipFile,
        gzip.BadGzipFile,
        zlib.error,
        EOFError,
        RuntimeError,
    ) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"archive {path} is damaged or half downloaded ({why}). Delete it and run the command "
            "again"
        ) from None


def _unpack_zip(path, folder, max_bytes):
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_space(path, folder, sum(m.file_size for m in members), max_bytes)
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)
            _check_member(path, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
        for member in members:  # reads no more than the stated size of a member, and checks its CRC
            archive.extract(member, folder)


def _unpack_tar(path, folder, max_bytes):
    total = 0
    with tarfile.open(path) as archive:
        for member in archive:
            total += member.size
            _check_space(path, folder, total, max_bytes, member.size)
            _check_member(path, member.name, member.isreg() or member.isdir())
            archive.extract(member, folder, filter="data")
        while archive.fileobj.read(1 << 20):  # to the end, where gzip's checksum stands
            pass


def _check_member(path, name, plain):
    pure = PurePosixPath(name.replace("\\", "/"))
    if (
        not plain
        or pure.is_absolute()
        or ".." in pure.parts
        or any(":" in part for part in pure.parts[:1])
    ):
        raise ValueError(
            f"archive {path}: member {name!r} is a link or special file, or would leave the "
            "folder; not unpacked"
        )


def _check_space(path, folder, total, max_bytes, needed=None):
    if total > max_bytes:
        raise ValueError(
            f"archive {path} unpacks to more than {max_bytes / GB:.3g} GB, the most that is "
            "expected of it"
        )
    needed, free = total if needed is None else needed, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"archive {path} needs {needed / GB:.1f} GB more, {free / GB:.1f} GB are free in "
            f"{folder}"
        )


def obtain(archive: Archive, downloads: str | Path, target: str | Path, folder: str, **how) -> Path:
    """Download the archive, unpack it and put its folder named ``folder`` in place as ``target``,
    at once and whole.

    ValueError if the archive has no such folder. A target that exists is never replaced.
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
                f"archive {path} from {archive.url} has no folder {folder!r} in it: is it another "
                "archive?"
            )
        keep_checksum(path, archive.url)
        found.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
