"""Folders of images and masks as people have them: files found by stem, splits from lists or by a seeded share."""

import os
from collections import defaultdict
from pathlib import Path, PurePosixPath

from dd.provenance import differences, read_own, sha256
from dd.schemas import IDENTIFIED

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MASKS = (".png", ".bmp", ".tif", ".tiff")  # no JPEG: it smears the ids


def index(folder: str | Path, suffixes: tuple[str, ...], ending: str = "") -> dict[str, Path]:
    """{path below ``folder`` without suffix: file}, sorted, subfolders included; ``ending`` (``_mask``) is taken off the stem.
    What macOS lays beside files on other disks (``._name``) is no file of its own.

    FileNotFoundError for no folder or no such file, ValueError for two files of one stem and for names that are no UTF-8.
    """
    folder, found = Path(folder), {}
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    for path in sorted(folder.rglob("*")):
        beside = path.name.startswith("._")
        if path.suffix.lower() not in suffixes or not path.stem.endswith(ending) or beside or not path.is_file():
            continue
        _check_name(path)
        name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(ending)
        if name in found:
            raise ValueError(f"{found[name]} and {path} have the same stem, by which it is found: rename one")
        found[name] = path
    if not found:
        raise FileNotFoundError(f"no file *{ending} with {', '.join(suffixes)} in {folder}")
    return found


def _check_name(path: Path) -> None:
    """ValueError for a name that cannot be written to lists and tables: bytes of another encoding, as old archives bring."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name of {ascii(str(path))} is no UTF-8 (an old archive?): rename it") from None


class Finder:
    """Names as lists and exports write them (with or without suffix and folders, of any system) -> ids of an index."""

    def __init__(self, ids):
        self.ids, self.by_stem = set(ids), defaultdict(list)
        for name in ids:
            self.by_stem[PurePosixPath(name).name].append(name)

    def __call__(self, written: str) -> str | None:
        """None if there is no such id; ValueError if several folders have one."""
        path = PurePosixPath(str(written).strip().replace("\\", "/"))
        known = path.with_suffix("") if path.suffix.lower() in IMAGES else path
        if known.as_posix() in self.ids:
            return known.as_posix()
        found = self.by_stem.get(known.name, [])
        if len(found) > 1:
            raise ValueError(f"{written!r} may be any of {', '.join(found[:5])}: write its folder too")
        return found[0] if found else None


def listed_splits(files: dict[str, Path], ids) -> tuple[dict[str, list[str]], list[str]]:
    """({split: ids}, notes) from one text file for each split, an image a line; splits never share an image. What is
    in no list is ``train`` if there is no list of that name."""
    find, splits, owner = Finder(ids), {}, {}
    for split, path in files.items():
        if not Path(path).is_file():
            raise FileNotFoundError(f"split {split}: no file {path}")
        lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
        found = [find(line) for line in lines]
        unknown = [line for line, name in zip(lines, found, strict=True) if name is None]
        if unknown or not lines:
            what = (
                f"{len(unknown)} of {len(lines)} lines name no labelled image, such as {unknown[:5]}" if lines else "is empty"
            )
            raise ValueError(f"split {split} ({path}): {what}")
        shared = [name for name in found if owner.setdefault(name, split) != split]
        if shared:
            raise ValueError(f"splits {owner[shared[0]]} and {split} share {len(shared)} images, such as {shared[:5]}")
        splits[split] = list(dict.fromkeys(found))
    rest = sorted(set(ids) - owner.keys())
    if "train" not in splits:
        if not rest:
            raise ValueError("the lists hold every labelled image: none is left for train")
        return {"train": rest, **splits}, []
    return splits, [f"{len(rest)} labelled images are in no split"] if rest else []


def shared_splits(shares: dict[str, float], ids, seed: int) -> dict[str, list[str]]:
    """{split: ids}: each split its share, the rest ``train``. By a hash of seed and id: a new image moves few others."""
    ids, splits = sorted(ids), {}
    if "train" in shares or any(not 0 < s < 1 for s in shares.values()) or sum(shares.values()) >= 1:
        raise ValueError(
            f"shares {shares}: expected parts of 1 for splits beside train, such as val=0.2, that leave it a rest"
        )
    order = sorted(ids, key=lambda name: sha256(f"{seed}/{name}".encode()))
    for split, share in shares.items():
        count = max(1, round(share * len(ids)))
        splits[split], order = sorted(order[:count]), order[count:]
    if not order or not all(splits.values()):
        raise ValueError(f"{len(ids)} labelled images are too few for the shares {shares}")
    return {"train": sorted(order), **splits}


def writable_folder(folder) -> Path:
    """The folder, made if need be. ValueError where a file is in its place, PermissionError if it cannot be written to."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"output: {folder} is a file, or lies below one; choose another folder with output=...") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"output: you may not write to {folder}; choose another folder with output=...")
    return folder


def output_folder(target, settings: str, identity: dict, what: str) -> Path:
    """The folder, made, for results whose file ``settings`` names their ``identity``. PermissionError or ValueError for one
    that cannot be written, FileExistsError for one that holds others. ``what``: the results, for messages."""
    target = writable_folder(target)
    there = read_own(target / settings, IDENTIFIED)["identity"] if (target / settings).is_file() else None
    if there is None and any(path.name != ".lock" for path in target.iterdir()):
        raise FileExistsError(f"output={target} holds files that are no {what}; choose a new or empty folder")
    if there is not None and (lines := differences(there, identity)):
        raise FileExistsError(
            f"output={target} holds {what} that were made otherwise:\n  " + "\n  ".join(lines) + "\nNothing was changed. "
            "Choose another folder with output=..., or remove this one"
        )
    return target
