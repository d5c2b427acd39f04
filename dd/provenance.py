"""Who made this and from what: hashes, versions, atomic files. No torch."""

import codecs
import csv
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "pytorch-lightning", "mmsegmentation", "torchmetrics", "numpy", "pillow")
BYTE_ORDER_MARKS = (  # the longer one first: that of UTF-32 begins as that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip

SETTINGS = "settings.json"  # of a run that has begun


def sha256(data: bytes | memoryview | Path) -> str:
    """Hexadecimal SHA-256 of bytes, or of a file read in pieces."""
    if isinstance(data, bytes | memoryview):
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256()
    with open(data, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(value) -> str:
    """SHA-256 of a plain value through canonical JSON: equal values, equal fingerprints."""
    return sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode())


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder to write to: synced and renamed to ``path`` when the block ends well, removed when
    it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # some systems sync only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # a full disk, a signal: nothing half-written stays
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write names no file
        raise


def write_atomic(path: str | Path, data: bytes | str | Iterable[str]) -> None:
    """Write a whole file or nothing (:func:`whole`). ``data`` may come in pieces."""
    with whole(path) as temporary, open(temporary, "wb") as file:
        for piece in [data] if isinstance(data, bytes | str) else data:
            file.write(piece.encode() if isinstance(piece, str) else piece)


def write_json(path: str | Path, value) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_csv(path: str | Path, rows: Iterable) -> None:
    """A table for spreadsheets: what one would take for a formula (a class named ``=1+1``) has a ' before it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_no_formula(cell) for cell in row] for row in rows)
    write_atomic(path, text.getvalue())


def _no_formula(cell):
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def decode(data: bytes, where) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark. ValueError names ``where``
    it is of another encoding."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is no text in UTF-8 ({error.reason} at byte {error.start}; is it ANSI or Latin-1?): save it as UTF-8"
        ) from None


def read_text(path: str | Path) -> str:
    """The text of a file that a person may have written (:func:`decode`), with ``\\n`` at the
    ends of lines."""
    return decode(Path(path).read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path) -> list[str]:
    """Lines of a list, without blanks around them and without empty ones."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_json(path: str | Path):
    """Parse a JSON file; FileNotFoundError or ValueError name the file."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, numbers of 5,000 digits, lists in lists in lists
        raise ValueError(f"{path} is not valid JSON: {error!s:.300}") from None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit(folder: str | Path = Path(__file__).parent) -> str:
    """Commit of the checkout of ``folder`` (this package), with ``+`` when files differ from it; empty outside one."""
    here = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*here, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else ""


def made_by() -> dict:
    """Versions, commit and command of this process: what run.json carries beside its settings."""
    return {"versions": versions(), "git_commit": git_commit(), "command": " ".join(sys.argv)}


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lines ``key: old -> new`` for every differing leaf of two nested dictionaries."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def refuse_other(path: str | Path, identity: dict, what: str) -> None:
    """FileExistsError if ``path`` (a JSON file with an ``identity``) was made with other settings; nothing is changed."""
    if not Path(path).exists():
        return
    lines = differences(read_json(path).get("identity", {}), identity)
    if lines:
        raise FileExistsError(
            f"{what} {Path(path).parent} was made with other settings:\n  "
            + "\n  ".join(lines)
            + "\nNothing was changed. Choose another name (name=...), or remove the folder to make it anew."
        )


def finished_run(folder: str | Path, identity: dict) -> dict | None:
    """run.json of a finished run, None where there is none yet; FileExistsError for a folder, finished or begun, of other
    settings."""
    folder = Path(folder)
    for file in (folder / "run.json", folder / SETTINGS):
        refuse_other(file, identity, "run")
    return read_json(folder / "run.json") if (folder / "run.json").exists() else None
