"""Stage: caption a folder of unlabelled images, one caption each, in a file for prompts.
Resumable."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dd.data.datasets import READ_SUFFIXES
from dd.data.folders import walk
from dd.data.photos import PILLOWS_LIMIT, read_photo
from dd.store.progress import Progress
from dd.store.provenance import made_by, refuse_other, write_atomic, write_json

if TYPE_CHECKING:  # loads heavy libraries
    from dd.prompts.captioner import Captioner

CAPTIONS = "captions.jsonl"
UNREADABLE = "unreadable.txt"


def caption(
    folder: str | Path, captioner: "Captioner", images: str | Path | None, batch_size: int
) -> dict[str, Any]:
    """Caption every image below the folder ``images`` into ``folder``; returns counts and the
    unreadable images.

    ``captions.jsonl`` holds {"filename" (below ``images``), "caption"}, appended batch by batch and
    sorted at the end; a line torn by a crash is made again. Images that cannot be read are skipped
    and listed in ``unreadable.txt`` with the reason. ``images`` is never written to.
    FileNotFoundError if there are no images; ValueError if none can be read; FileExistsError if the
    existing captions are from another captioner.
    """
    if images is None:
        raise ValueError(
            "caption.images: the folder of images to caption is missing; give "
            "caption.images=<folder>"
        )
    folder, images = Path(folder), Path(images)
    if not images.is_dir():
        raise FileNotFoundError(f"caption.images={images}: no such folder")
    if folder.resolve().is_relative_to(images.resolve()):
        raise ValueError(
            f"caption.folder={folder} lies in {images}, which is never written to; choose another "
            "caption.folder"
        )
    names = _names(images)
    identity = {"captioner": captioner.identity(), "images": str(images)}
    refuse_other(folder / "run.json", identity, "captions in")
    if not (folder / "run.json").exists():
        write_json(folder / "run.json", {"identity": identity, **made_by()})

    found = _read(folder / CAPTIONS)
    _write(folder / CAPTIONS, found)  # without lines torn by a crash
    todo = [name for name in names if name not in found]
    unreadable: dict[str, str] = {}
    progress = Progress("caption", len(names), len(names) - len(todo))
    with progress, open(folder / CAPTIONS, "a", encoding="utf-8") as file:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            pixels, reasons = _pixels(images, batch)
            unreadable |= reasons
            texts = captioner(list(pixels.values())) if pixels else []
            rows = dict(zip(pixels, texts, strict=True))
            file.write("".join(map(_line, rows.items())))
            file.flush()
            os.fsync(file.fileno())
            found |= rows
            progress.advance(len(batch))
    _write(folder / CAPTIONS, dict(sorted(found.items())))
    (folder / UNREADABLE).unlink(missing_ok=True)
    if unreadable:
        lines = (f"{name}\t{reason}\n" for name, reason in unreadable.items())
        write_atomic(folder / UNREADABLE, lines)
    if not found:
        name, reason = next(iter(unreadable.items()))
        raise ValueError(
            f"none of the {len(names)} images in {images} can be read, such as {name}: {reason}"
        )
    return {
        "captions": len(found),
        "made_now": len(todo) - len(unreadable),
        "unreadable": list(unreadable),
    }


def _names(images: Path) -> list[str]:
    """The images below a folder, as paths in it; FileNotFoundError if there are none."""
    there, hidden = (
        [p for p in files if p.suffix.lower() in READ_SUFFIXES] for files in walk(images)
    )
    if hidden:
        print(
            f"warning: {len(hidden)} hidden files in {images} are passed over, such as {hidden[0]}"
        )
    if not there:
        kinds = ", ".join(sorted({suffix.lower() for suffix in READ_SUFFIXES}))
        raise FileNotFoundError(f"caption.images={images} holds no images ({kinds})")
    return sorted(p.relative_to(images).as_posix() for p in there)


def _pixels(images: Path, names: list[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: image uint8 [H, W, 3], upright}, {name of an image that cannot be read: reason})."""
    pixels, reasons = {}, {}
    for name in names:
        try:
            pixels[name] = read_photo(images / name, PILLOWS_LIMIT)
        except (OSError, ValueError) as error:
            reasons[name] = " ".join(str(error).split())
    return pixels, reasons


def _line(row: tuple[str, str]) -> str:
    return json.dumps({"filename": row[0], "caption": row[1]}, ensure_ascii=False) + "\n"


def _write(path: Path, captions: dict[str, str]) -> None:
    write_atomic(path, "".join(map(_line, captions.items())))


def _read(path: Path) -> dict[str, str]:
    """{file name: caption} of the complete lines of a caption file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found: dict[str, str] = {}
    for line in text.split("\n")[:-1]:
        try:
            row = json.loads(line)
            found[row["filename"]] = row["caption"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return found
