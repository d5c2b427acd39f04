"""Checkpoints on disk: written as a whole file or not at all, with a checksum; the previous one is
kept.

A folder holds ``last.ckpt``, ``previous.ckpt`` (the one before it) and ``SHA256SUMS`` in the format
of ``sha256sum``. The sum of a file is recorded before the file gets its name, and afterwards only
names move. A file is therefore sound if its sum is recorded at all, and a crash at any point leaves
files that are known to be sound.
"""

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from dd.store.provenance import sha256, write_atomic

LAST, PREVIOUS, DAMAGED, SUMS = "last.ckpt", "previous.ckpt", "damaged.ckpt", "SHA256SUMS"


def save(content: dict[str, Any], path: str | Path) -> None:
    """``torch.save`` with a checksum. An existing ``last.ckpt`` becomes ``previous.ckpt`` (a
    damaged one ``damaged.ckpt``). OSError (a full disk) leaves everything as it was."""
    path, buffer = Path(path), io.BytesIO()
    torch.save(content, buffer)
    new, before = (sha256(buffer.getbuffer()), path.name), sums(path.parent)
    after = [line for line in before if line[1] != path.name]
    if path.name != LAST or not path.is_file():
        _record(path.parent, [new, *before])
        write_atomic(path, [buffer.getbuffer()])
    else:
        old = sha256(path)
        waiting, kept = path.with_suffix(".next"), DAMAGED if damage(path, old) else PREVIOUS
        if kept == PREVIOUS:
            before = [(old, LAST), *before]  # also for a file without a recorded sum
            after = [(old, PREVIOUS), *(line for line in after if line[1] != PREVIOUS)]
        _record(path.parent, [new, *before])
        write_atomic(waiting, [buffer.getbuffer()])
        os.replace(path, path.with_name(kept))
        os.replace(waiting, path)
    _record(path.parent, [new, *(line for line in after if path.with_name(line[1]).is_file())])


def load(path: str | Path) -> dict[str, Any]:
    """A checkpoint on the CPU, weights and plain values only; ValueError for a damaged one."""
    if wrong := damage(path):
        raise ValueError(
            f"{path} is damaged ({wrong}). Restore a copy of it, or make it again in another folder"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def weights_sha256(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors by name: equal names, dtypes, shapes and values give the same hash, in any
    order, file or memory layout.

    For each tensor, sorted by name: ``["name", "dtype", [shape]]`` as JSON with a line break, then
    its values row by row in little-endian bytes (the order of all machines that torch runs on).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update((json.dumps([name, kind, list(tensor.shape)]) + "\n").encode())
        values = tensor.detach().cpu().contiguous().view(-1)
        digest.update(memoryview(values.view(torch.uint8).numpy()))
    return digest.hexdigest()


def newest(folder: str | Path) -> tuple[Path | None, str]:
    """(the newest sound checkpoint or None, a warning or ""); ValueError if there are checkpoints
    but none is sound."""
    there = [path for path in (Path(folder, LAST), Path(folder, PREVIOUS)) if path.is_file()]
    wrong: list[str] = []
    for path in there:
        found = damage(path)
        if found is None:
            skipped = f"warning: {', '.join(wrong)}: resuming from the one before, {path}"
            return path, skipped if wrong else ""
        wrong.append(f"{path} is damaged ({found})")
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}, and there is no other checkpoint to resume from. "
            "Restore a copy of one of them, or remove what is damaged: "
            "the same command then begins at step 0"
        )
    return None, ""


def damage(path: str | Path, digest: str | None = None) -> str | None:
    """What is wrong with a file (``digest``: its SHA-256, if known); None if nothing is. For a file
    without a recorded sum, such as a copy, the sums inside it are checked."""
    path = Path(path)
    recorded = sums(path.parent)
    if any(name == path.name for _, name in recorded):
        sound = (digest or sha256(path)) in {known for known, _ in recorded}
        return None if sound else f"its SHA-256 is not the one in {SUMS}"
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        return f"not a complete file: {error}"
    return f"wrong checksum of its part {part}" if part else None


def sums(folder: str | Path) -> list[tuple[str, str]]:
    """(SHA-256, file name) of each line of ``SHA256SUMS``, the newest first; other lines are
    skipped."""
    path = Path(folder, SUMS)
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [
        (digest, name)
        for digest, _, name in (line.partition("  ") for line in lines)
        if len(digest) == 64 and name
    ]


def tidy(folder: str | Path) -> None:
    """Remove half-written files of writers that were killed."""
    for path in (*Path(folder).glob(".*.tmp"), *Path(folder).glob("*.next")):
        path.unlink(missing_ok=True)


def _record(folder: Path, lines: list[tuple[str, str]]) -> None:
    write_atomic(folder / SUMS, (f"{digest}  {name}\n" for digest, name in lines))
