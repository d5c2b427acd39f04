"""Folders of images and masks as users have them: files are found by stem, splits come from lists
or a seeded share."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dd.store.provenance import differences, read_lines, read_own, sha256
from dd.store.schemas import IDENTIFIED

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MASKS = (".png", ".bmp", ".tif", ".tiff")  # no JPEG: it smears the ids
HIDDEN = (".", "@eaDir", "__MACOSX")  # names of copies, thumbnails and trash begin like this


class Files(dict[str, Path]):
    """{path below a folder without suffix: file}; ``notes`` count skipped files."""

    def __init__(self, files: Mapping[str, Path] | None = None, notes: Iterable[str] = ()) -> None:
        super().__init__(files or {})
        self.notes = list(notes)


def walk(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """(files below ``folder``, those with a hidden name or in a hidden folder), sorted. Linked
    folders are followed. Each real folder counts once, under its own name if it has one here."""
    top, seen, places = Path(folder), set(), [Path(folder)]
    found: list[Path] = []
    while places:
        for place, folders, names in os.walk(places.pop(0)):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            links = [f for f in sorted(folders) if os.path.islink(os.path.join(place, f))]
            places += [Path(place) / f for f in links]
            found += [Path(place) / name for name in names]
    files = sorted(p for p in found if p.is_file())
    hidden = {p for p in files if any(x.startswith(HIDDEN) for x in p.relative_to(top).parts)}
    return [p for p in files if p not in hidden], [p for p in files if p in hidden]


def one_form(name: str) -> str:
    """A name in the form used for comparison: macOS stores letters and their marks separately
    (NFD), others as one (NFC)."""
    return unicodedata.normalize("NFC", name)


def index(
    folder: str | Path, suffixes: tuple[str, ...], ending: str = "", beginning: str = ""
) -> Files:
    """Files of ``folder`` and its subfolders by their path without suffix, sorted. ``ending``
    (``_mask``) and ``beginning`` (``gt_``) are removed from the name; files without them are left
    out. Hidden files are skipped, and counted in the notes, except macOS's companions of files
    (``._name``).

    FileNotFoundError for no folder or no such file, ValueError for two files of one stem and for
    names that are not UTF-8.
    """
    folder, found = Path(folder), Files()
    seen: dict[str, Path] = {}
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    files, hidden = walk(folder)
    for path in files:
        name = bare(path.relative_to(folder).with_suffix("").as_posix(), beginning, ending)
        if path.suffix.lower() not in suffixes or name is None:
            continue
        _check_name(path)
        if (before := seen.setdefault(one_form(name), path)) != path:
            raise ValueError(
                f"{before} and {path} have the same stem, which identifies them: rename one"
            )
        found[name] = path
    if not found:
        raise FileNotFoundError(
            f"no file {beginning}*{ending} with {', '.join(suffixes)} in {folder}"
        )
    passed = [p for p in hidden if p.suffix.lower() in suffixes and not p.name.startswith("._")]
    if passed:
        found.notes.append(
            f"{len(passed)} hidden files in {folder} are passed over, such as {passed[0]}"
        )
    return found


def bare(name: str, beginning: str = "", ending: str = "") -> str | None:
    """A path without suffix whose last part has ``beginning`` and ``ending`` removed; None if it
    lacks one of them."""
    if not beginning and not ending:
        return name
    folder, slash, last = name.rpartition("/")
    beginning, ending, last = one_form(beginning), one_form(ending), one_form(last)
    both = last.startswith(beginning) and last.endswith(ending)
    if not both or len(last) <= len(beginning + ending):
        return None
    return folder + slash + last[len(beginning) : len(last) - len(ending)]


def _check_name(path: Path) -> None:
    """ValueError for a name that cannot be written to lists and tables: bytes of another encoding,
    as in old archives."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the name of {ascii(str(path))} is not UTF-8 (an old archive?): rename it"
        ) from None


class Finder:
    """Finds ids of an index for names as lists and exports write them (with or without suffix and
    folders, of any system).

    One of the two paths, the written one and that of the id, must be the end of the other:
    cam1/a.jpg is not cam2/a, but photos/a.jpg is a.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self.ids = {one_form(name): name for name in ids}
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        self.named: dict[str, PurePosixPath] = {}
        for name in self.ids:
            self.by_stem[PurePosixPath(name).name].append(name)

    def __call__(self, written: str) -> str | None:
        """None if there is no such id; ValueError if several have the name, or if two paths would
        have one id."""
        path = _written(written)
        found = [i for i in self.by_stem[path.name] if _ends(path, PurePosixPath(i))]
        inside = [i for i in found if len(PurePosixPath(i).parts) <= len(path.parts)]
        found = [max(inside, key=len)] if inside else found
        if len(found) > 1:
            raise ValueError(
                f"{written!r} may be any of {', '.join(found[:5])}: write its folder too"
            )
        if not found:
            return None
        before = self.named.setdefault(found[0], path)
        if not _ends(before, path):
            raise ValueError(
                f"{before} and {path} are two files, and both would be the image {found[0]!r}"
            )
        return self.ids[found[0]]

    def near(self, written: str) -> str:
        """``written`` for a message, with the id of the same name in another folder, if any."""
        others = self.by_stem[_written(written).name]
        return f"{written!r} (another folder has {others[0]!r})" if others else repr(written)

    def upload(self, written: str) -> str | None:
        """Like calling the finder, for a name that Label Studio may have changed at the upload:
        eight characters and a dash in front, blanks as _, other characters removed, without parent
        folders. None if several ids would get this name."""
        folder, _, name = _written(written).as_posix().rpartition("/")
        prefix = re.match(r"[0-9a-f]{8}-(?=.)", name)
        own = re.search(r"(^|/)upload/\d+$", folder) or (prefix and folder in ("", "images"))
        if not own:
            return None
        plain = _uploaded(name[prefix.end() :] if prefix else name)
        found = [i for stem, ids in self.by_stem.items() if _uploaded(stem) == plain for i in ids]
        return self.ids[found[0]] if len(found) == 1 else None


def _written(text: str) -> PurePosixPath:
    return PurePosixPath(without_suffix(one_form(str(text).strip().replace("\\", "/"))))


def without_suffix(name: str) -> str:
    """A path without the suffix of an image; other dots stay."""
    stem, dot, suffix = name.rpartition(".")
    return stem if f"{dot}{suffix.lower()}" in IMAGES else name


def _ends(a: PurePosixPath, b: PurePosixPath) -> bool:
    """Whether one of two paths is the end of the other."""
    length = min(len(a.parts), len(b.parts))
    return a.parts[-length:] == b.parts[-length:]


def _uploaded(stem: str) -> str:
    return re.sub(r"[^-\w.]", "", stem.strip().replace(" ", "_"))


def listed_splits(
    files: Mapping[str, Path], ids: Iterable[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """({split: ids}, notes) from one text file for each split, an image a line; splits never share
    an image. Unlisted images become ``train`` if there is no list of that name."""
    ids = list(ids)
    find, splits = Finder(ids), {}
    owner: dict[str, str] = {}
    for split, path in files.items():
        if not Path(path).is_file():
            raise FileNotFoundError(f"split {split}: no file {path}")
        lines = read_lines(path)
        if not lines:
            raise ValueError(f"split {split} ({path}): is empty")
        named = {line: find(line) for line in lines}
        found = [name for name in named.values() if name is not None]
        if unknown := [find.near(line) for line in lines if named[line] is None]:
            raise ValueError(
                f"split {split} ({path}): {len(unknown)} of {len(lines)} lines "
                f"name no labelled image, such as {', '.join(unknown[:5])}"
            )
        shared = [name for name in found if owner.setdefault(name, split) != split]
        if shared:
            raise ValueError(
                f"splits {owner[shared[0]]} and {split} share {len(shared)} images, "
                f"such as {shared[:5]}"
            )
        splits[split] = list(dict.fromkeys(found))
    rest = sorted(set(ids) - owner.keys())
    if "train" not in splits:
        if not rest:
            raise ValueError("the lists hold every labelled image: none is left for train")
        return {"train": rest, **splits}, []
    return splits, [f"{len(rest)} labelled images are in no split"] if rest else []


def kept_splits(root: str | Path) -> dict[str, list[str]]:
    """{split: ids} of a prepared data set; FileNotFoundError if there is none."""
    folder = Path(root) / "ImageSets" / "Segmentation"
    found = {
        p.stem: p.read_text(encoding="utf-8").splitlines() for p in sorted(folder.glob("*.txt"))
    }
    if not found:
        raise FileNotFoundError(f"{root} is not a prepared data set: no lists in {folder}")
    return found


def grown_splits(
    shares: Mapping[str, float], ids: Iterable[str], seed: int, kept: Mapping[str, list[str]]
) -> tuple[dict[str, list[str]], list[str]]:
    """({split: ids}, notes) of a set that has grown: the images of ``kept`` {split: ids} stay in
    their splits, new ones are shared out (:func:`shared_splits`). ValueError if none of them is
    left, or for a split that only one of the two has."""
    ids = set(ids)
    old = {split: [name for name in names if name in ids] for split, names in kept.items()}
    number, gone = sum(map(len, old.values())), sum(map(len, kept.values()))
    if not number:
        raise ValueError(
            "none of the images of the earlier set is labelled here: is it another one?"
        )
    check_kept(shares, kept)
    new = ids.difference(*old.values())
    drawn = shared_splits(shares, new, seed) if len(new) > len(shares) else {"train": sorted(new)}
    notes = [f"{len(new)} images are new, {number} stay in their splits"]
    if gone > number:
        notes.append(f"{gone - number} images of the earlier set are not labelled here")
    return {split: sorted([*old[split], *drawn.get(split, [])]) for split in kept}, notes


def shared_splits(
    shares: Mapping[str, float], ids: Iterable[str], seed: int
) -> dict[str, list[str]]:
    """{split: ids}: each split gets its share, the rest is ``train``. Uses a hash of seed and id,
    so that a new image moves few others."""
    ids, splits = sorted(ids), {}
    check_shares(shares)
    order = sorted(ids, key=lambda name: sha256(f"{seed}/{name}".encode()))
    for split, share in shares.items():
        count = max(1, round(share * len(ids)))
        splits[split], order = sorted(order[:count]), order[count:]
    if not order or not all(splits.values()):
        raise ValueError(f"{len(ids)} labelled images are too few for the shares {shares}")
    return {"train": sorted(order), **splits}


def check_shares(shares: Mapping[str, float]) -> None:
    """ValueError for shares that are no parts of 1 or leave nothing to train."""
    parts = all(0 < s < 1 for s in shares.values()) and sum(shares.values()) < 1
    if "train" in shares or not parts:
        raise ValueError(
            f"shares {shares}: expected parts of 1 for splits beside train, such as val=0.2, "
            "that leave it a rest"
        )


def check_kept(shares: Mapping[str, float], kept: Mapping[str, list[str]]) -> None:
    """ValueError for a split that only one of the shares and an earlier set has."""
    if kept.keys() != {"train", *shares}:
        raise ValueError(
            f"the earlier set has the splits {', '.join(kept)}, the shares make "
            f"{', '.join(['train', *shares])}: give the same ones (--share SPLIT=PART)"
        )


def writable_folder(folder: str | Path) -> Path:
    """The folder, created if needed. ValueError if a file is in its place, PermissionError if it
    cannot be written to."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"output: {folder} is a file, or lies below one; choose another folder with output=..."
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"output: you may not write to {folder}; choose another folder with output=..."
        )
    return folder


def output_folder(
    target: str | Path, settings: str, identity: Mapping[str, Any], what: str
) -> Path:
    """The folder, created if needed, for results whose file ``settings`` holds their ``identity``.
    PermissionError or ValueError if it cannot be written to, FileExistsError if it holds others.
    ``what``: the results, for messages."""
    target = writable_folder(target)
    if not (target / settings).is_file():
        if any(path.name != ".lock" for path in target.iterdir()):
            raise FileExistsError(
                f"output={target} holds files that are not {what}; choose a new or empty folder"
            )
    elif lines := differences(read_own(target / settings, IDENTIFIED)["identity"], identity):
        raise FileExistsError(
            f"output={target} holds {what} that were made otherwise:\n  "
            + "\n  ".join(lines)
            + "\nNothing was changed. Choose another folder with output=..., or remove this one"
        )
    return target
