"""Stage: write a finished data set in the format of another tool, after checking it file by
file."""

from pathlib import Path
from typing import Any

from dd.execution.units import read_run
from dd.exports.base import FORMATS
from dd.exports.checked import is_synthetic, read_source
from dd.exports.target import Target
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.provenance import fingerprint, made_by, read_own, refuse_other, write_json
from dd.store.schemas import EXPORTED
from dd.taxonomy import taxonomy_yaml

VERSION = 1  # of the formats' content: increase it when they write something else
BEGUN, DONE = "export_begun.json", "export.json"


def export(
    form: str,
    folder: str | Path,
    target: str | Path,
    masks: str = "SegmentationClass",
    splits: list[str] | None = None,
    classes: str | Path | None = None,
    link: bool = False,
) -> dict[str, Any]:
    """Write the data set ``folder`` to ``target`` in one of :data:`FORMATS`; {"images", "files",
    "kept", "notes"}.

    ``folder``: a finished synthetic set, or a folder in VOC layout; ``masks``: its mask set;
    ``splits``: its lists, None = all; ``classes``: a taxonomy's name or file, needed if the folder
    does not name its classes. ``link``: make hard links where the same file will do.
    ``export.json`` is written last. An interrupted export resumes, a finished one is kept (missing
    files are made again).

    FileNotFoundError or ValueError for a set that is unfinished or damaged, or that the format
    cannot hold; FileExistsError for a target that holds something else; Busy while another process
    exports there. Nothing is written then.
    """
    folder, target = Path(folder), Path(target)
    if form not in FORMATS:
        raise ValueError(f"format {form!r}; allowed: {', '.join(FORMATS)}")
    run = read_run(folder) if is_synthetic(folder) else None
    source, content = read_source(folder, run, masks, splits, classes)
    notes = FORMATS[form].check(source, link)
    identity = {
        "format": form,
        "version": VERSION,
        "name": source.name,
        "masks": masks,
        "content": content,
        "taxonomy": fingerprint(taxonomy_yaml(source.taxonomy)),
        "about": fingerprint(source.about),
        "splits": {split: fingerprint(ids) for split, ids in source.splits.items()},
    }
    _refuse(target, identity, [folder, *{item.image.parent for item in source.items.values()}])
    target.mkdir(parents=True, exist_ok=True)
    with Lock(target, hint="Two exports never share a folder."):
        _refuse(target, identity, [])
        if (target / DONE).is_file():
            files = read_own(target / DONE, EXPORTED)["files"]
            sizes = {(target / name): size for name, size in files.items()}
            lost = [p for p, size in sizes.items() if not p.is_file() or p.stat().st_size != size]
            if not lost:
                return {
                    "images": len(source.items),
                    "files": len(files),
                    "kept": True,
                    "notes": notes,
                }
            for path in lost:
                path.unlink(missing_ok=True)
        write_json(target / BEGUN, {"identity": identity})
        (target / DONE).unlink(missing_ok=True)
        with Progress("export", len(source.items)) as progress:
            written = Target(target, link, progress.advance)
            FORMATS[form].write(source, written)
        files = {name: (target / name).stat().st_size for name in written.names}
        write_json(target / DONE, {"identity": identity, "files": files, **made_by()})
        (target / BEGUN).unlink()
    return {"images": len(source.items), "files": len(files), "kept": False, "notes": notes}


def _refuse(target: Path, identity: dict[str, Any], sources: list[Path]) -> None:
    """FileExistsError for a target that holds something else, or lies in the exported folder."""
    for path in sources:
        if target.resolve().is_relative_to(path.resolve()):
            raise FileExistsError(
                f"{target} lies in {path}, which is exported and not written to: choose another "
                "target"
            )
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: an export is a folder")
    for name in (BEGUN, DONE):
        refuse_other(target / name, identity, "export")
    begun = any((target / name).is_file() for name in (BEGUN, DONE))
    if (
        target.is_dir()
        and not begun
        and any(not path.name.startswith(".") for path in target.iterdir())
    ):
        raise FileExistsError(
            f"{target} holds other files, which are not touched: choose a new or an empty folder"
        )
