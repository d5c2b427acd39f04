"""Who made a file and from what: hashes, versions, atomic files. No torch."""

import codecs
import csv
import hashlib
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from dd.store.commands import typed

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "pytorch-lightning",
    "mmsegmentation",
    "torchmetrics",
    "numpy",
    "pillow",
)
BYTE_ORDER_MARKS = (  # the longer one first: that of UTF-32 begins like that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

SETTINGS = "settings.json"  # of a run that has begun
CHECKSUM = "sha256_of_the_rest"  # the last key of our JSON files
SHOWN, MOST_SHOWN = 100, 1500  # most characters of a quoted value, and of a line of an error
MOST_NODES = 100_000  # most values of a YAML file


def sha256(data: bytes | memoryview | Path) -> str:
    """Hexadecimal SHA-256 of bytes, or of a file read in pieces."""
    if isinstance(data, bytes | memoryview):
        return hashlib.sha256(data).hexdigest()
    with open(data, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a plain value through canonical JSON: equal values, equal fingerprints."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return sha256(text.encode(errors="surrogatepass"))


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder to write to. It is synced and renamed to ``path`` if the
    block succeeds, removed if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # some systems sync only files open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # a full disk, a signal: leave nothing half-written
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # errors of a write do not name the file
        raise


def temporary_files(folder: str | Path) -> list[Path]:
    """Temporary files (:func:`whole`) in a folder and below it: left by writers that were killed,
    or being written just now."""
    return [
        Path(place) / name
        for place, _, names in os.walk(folder)
        for name in names
        if is_temporary(name)
    ]


def sweep(folder: str | Path) -> None:
    """Remove the :func:`temporary_files` of a folder. Nobody else may be writing there: see
    :class:`dd.store.locks.Lock`."""
    for path in temporary_files(folder):
        path.unlink(missing_ok=True)


def sweep_beside(*paths: str | Path) -> None:
    """Remove temporary files that ended writers of these paths, and of no others, have left beside
    them. For a stage that writes one file and needs no lock."""
    for path in map(Path, paths):
        for entry in os.scandir(path.parent) if path.parent.is_dir() else ():
            if is_temporary(entry.name) and entry.name.startswith(f".{path.name}."):
                process = int(entry.name.split(".")[-2])
                if process == os.getpid() or not alive(process):
                    Path(entry.path).unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp") and name.split(".")[-2].isdecimal()


def alive(process: int) -> bool:
    """Whether a process with this number runs on this machine, of any user."""
    try:
        os.kill(process, 0)
        return True
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False


def write_atomic(path: str | Path, data: bytes | str | Iterable[bytes | memoryview | str]) -> None:
    """Write a whole file or nothing (:func:`whole`). ``data`` may come in pieces."""
    with whole(path) as temporary, open(temporary, "wb") as file:
        for piece in [data] if isinstance(data, bytes | str) else data:
            file.write(piece.encode() if isinstance(piece, str) else piece)


def write_json(path: str | Path, value: Any) -> None:
    """Write one of our JSON files: the last key of an object is the checksum of the others, which
    :func:`read_json` checks."""
    plain = json.loads(json.dumps(value))  # as it will be read: keys are texts, tuples are lists
    if isinstance(plain, dict):
        plain[CHECKSUM] = fingerprint(plain)
    write_atomic(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def write_csv(path: str | Path, rows: Iterable[Iterable[object]]) -> None:
    """A table for spreadsheets. Cells that look like a formula (a class named ``=1+1``) get a
    ' before them."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [_no_formula(cell) for cell in row] for row in rows
    )
    write_atomic(path, text.getvalue())


def _no_formula(cell: object) -> object:
    formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if formula else cell


def decode(data: bytes, where: object) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark. ValueError names ``where`` for
    another encoding."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not valid UTF-8 ({error.reason} at byte {error.start}; is it ANSI or "
            "Latin-1?): save it as UTF-8"
        ) from None


def read_text(path: str | Path) -> str:
    """The text of a file that a person may have written (:func:`decode`), with ``\\n`` as line
    ends."""
    return decode(Path(path).read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path) -> list[str]:
    """Lines of a list, stripped, without empty ones."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_json(path: str | Path) -> Any:
    """Parse a JSON file; FileNotFoundError or ValueError name the file. The checksum of one of our
    files is checked and left out of the result; ValueError if it does not match the content."""
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits, nested lists
        raise ValueError(f"{path} is not valid JSON: {error!s:.300}") from None
    if not isinstance(found, dict) or CHECKSUM not in found:
        return found  # made by others, or edited
    recorded = found.pop(CHECKSUM)
    if recorded != fingerprint(found):
        raise ValueError(
            f"{path} is damaged, or was edited: its content does not match {CHECKSUM}, "
            "its last line. Restore it from a copy, or make it again; "
            "if you edited it on purpose, remove that line"
        )
    return found


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML file with plain values; FileNotFoundError or ValueError name the file.
    ValueError too if its aliases stand for more than ``MOST_NODES`` values."""
    data = Path(path).read_bytes()  # the library handles byte-order marks
    try:
        if _nodes(yaml.compose(data, yaml.SafeLoader), {}) > MOST_NODES:
            raise ValueError(
                f"with its aliases (*name) it has more than {MOST_NODES:,} values; "
                "write them out, or fewer"
            )
        return yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error!s:.300}") from None


def _nodes(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Number of values of a YAML document with each alias written out; ``known``: counts so far."""
    if node is None or not isinstance(node.value, list):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # a node that contains itself has no end
        parts = [
            part for item in node.value for part in (item if isinstance(item, tuple) else [item])
        ]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in parts)
    return known[id(node)]


def read_own(path: str | Path, schema: Mapping[str, Any]) -> dict[str, Any]:
    """One of our JSON files, with everything that its readers rely on (:func:`fault`); ValueError
    names what is missing."""
    found = read_json(path)
    if wrong := fault(found, schema):
        raise ValueError(f"{path} is damaged: {wrong}. Restore it from a copy, or make it again")
    return found


def fault(value: Any, schema: Any, name: str = "") -> str | None:
    """What differs in a parsed JSON value from ``schema``; None if it fits.

    A schema is a type (``float`` takes whole numbers, ``object`` anything), a tuple of schemas of
    which one must fit (None for null), ``[schema of each item]``, or ``{key: schema}`` of an object
    that may have more keys: a key that ends with ``?`` may be missing, ``*`` stands for every key.
    """
    if isinstance(schema, tuple):
        fits = any(fault(value, one, name) is None for one in schema)
        return None if fits else _expected(value, " or ".join(map(_kind, schema)), name)
    if schema is None or isinstance(schema, type):
        return None if _is(value, schema) else _expected(value, _kind(schema), name)
    if not isinstance(value, type(schema)):
        return _expected(value, _kind(schema), name)
    parts: Iterable[tuple[str, Any, Any]]  # (key, value, its schema)
    if isinstance(schema, list):
        parts = ((str(i), item, schema[0]) for i, item in enumerate(value))
    elif "*" in schema:
        parts = ((key, item, schema["*"]) for key, item in value.items())
    else:
        lacking = [key for key in schema if not key.endswith("?") and key not in value]
        if lacking:
            return f"{_dotted(name, lacking[0])} is missing"
        wanted = ((key.removesuffix("?"), one) for key, one in schema.items())
        parts = ((key, value[key], one) for key, one in wanted if key in value)
    return next(
        (found for key, item, one in parts if (found := fault(item, one, _dotted(name, key)))), None
    )


def _is(value: Any, kind: type | None) -> bool:
    if kind is None:
        return value is None
    number = kind in (int, float) and isinstance(value, bool)
    return not number and isinstance(value, (int, float) if kind is float else kind)


_KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    tuple: "a list",
}


def _kind(schema: Any) -> str:
    kind = schema if isinstance(schema, type) else type(schema)
    return "null" if schema is None else _KINDS[kind]


def _dotted(name: str, key: str) -> str:
    return f"{name}.{key:.{SHOWN}}".removeprefix(".")


def _expected(value: Any, what: str, name: str) -> str:
    return f"{name or 'the whole value'} is {quoted(value)}, expected {what}"


def quoted(value: Any, limit: int = SHOWN) -> str:
    """``repr`` of a value for a message, cut in its middle; for lists and objects only their
    size."""
    if isinstance(value, dict | list | tuple) and value:
        return f"{_kind(type(value))} of {len(value):,}"
    text = repr(value[: 2 * limit] if isinstance(value, str | bytes) else value)
    return text if len(text) <= limit else f"{text[: limit - 20]} ... {text[-10:]}"


def shortened(message: str, limit: int = MOST_SHOWN, lines: int = 100) -> str:
    """A message for a person, shortened: the part that it quotes from a file or a command line may
    have a million characters, or lines."""

    def line(text: str) -> str:
        left_out = len(text) - limit
        middle = f" ... {left_out:,} characters ... "
        return text if left_out <= 0 else text[: limit * 2 // 3] + middle + text[-(limit // 3) :]

    shown = message.split("\n")
    if len(shown) > lines:
        cut = f"... {len(shown) - lines:,} lines ..."
        shown = [*shown[: lines - 10], cut, *shown[-10:]]
    return "\n".join(map(line, shown))


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
    """Commit of the checkout of ``folder`` (this package), with ``+`` if files differ from it;
    empty outside a checkout, and for a folder that the checkout does not track."""

    def told(*command: str) -> str:
        git = ["git", "-C", str(folder), *command]
        found = subprocess.run(git, capture_output=True, text=True, timeout=10)
        return found.stdout.strip() if found.returncode == 0 else ""

    try:
        # an installation may lie inside a checkout of something else, as .venv/lib/...
        head = told("rev-parse", "HEAD") if told("ls-files", "--", ".") else ""
        return head + "+" * bool(head and told("status", "--porcelain", "-uno"))
    except (OSError, subprocess.TimeoutExpired):
        return ""


def made_by() -> dict[str, Any]:
    """Versions, commit and command of this process: run.json holds them beside its settings."""
    return {"versions": versions(), "git_commit": git_commit(), "command": typed()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines ``key: old -> new`` for every differing leaf of two nested dictionaries."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def refuse_other(
    path: str | Path, identity: Mapping[str, Any], what: str, key: str = "name"
) -> None:
    """FileExistsError if ``path`` (a JSON file with an ``identity``) was made with other settings;
    changes nothing. ``key``: the setting that names another place."""
    if not Path(path).exists():
        return
    lines = differences(read_own(path, {"identity": dict})["identity"], identity)
    if lines:
        raise FileExistsError(
            f"{what} {Path(path).parent} was made with other settings:\n  "
            + "\n  ".join(lines)
            + f"\nNothing was changed. Choose another name ({key}=...), or remove the folder to "
            "make it again."
        )


def finished_run(folder: str | Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """run.json of a finished run, None if it is not finished; FileExistsError for a folder,
    finished or begun, of other settings."""
    folder = Path(folder)
    for file in (folder / "run.json", folder / SETTINGS):
        refuse_other(file, identity, "run")
    return read_json(folder / "run.json") if (folder / "run.json").exists() else None
