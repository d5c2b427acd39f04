"""Groups of images that belong together, as those of a camera, a part, a day or a folder: all of a
group fall into one split, so that no test image has a near twin among the images trained on."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dd.data.datasets import RECORD
from dd.data.folders import Finder, check_shares
from dd.store.provenance import read_own, read_text, sha256
from dd.store.schemas import GROUPED

FOLDER = "folder"
FAR = 0.05  # of all images: a split that is further from its share is told


@dataclass(frozen=True)
class Groups:
    """``of``: {image: its group}; ``by``: how they were told apart, ``noun``: what they are."""

    of: Mapping[str, str]
    by: str
    noun: str = "group"

    def members(self, ids: Iterable[str] | None = None) -> dict[str, list[str]]:
        """{group: its images}, those of ``ids`` alone, sorted."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.of if ids is None else ids):
            found[self.of[name]].append(name)
        return dict(sorted(found.items()))

    def told(self, splits: Mapping[str, Iterable[str]]) -> dict[str, object]:
        """As dataset.json keeps it: how, what, how many, and how many in each split."""
        each = {split: len(self.members(ids)) for split, ids in splits.items()}
        return {"by": self.by, "noun": self.noun, "number": len(self.members()), "splits": each}


def groups_of(ids: Iterable[str], how: str) -> Groups:
    """The groups of images by ``how``: ``folder``, a CSV file of images and their groups, or a
    regular expression, found in the path of each image below its folder (without suffix): its first
    bracket, or all that is found. A bracket's name, or the head of the CSV's second column, says
    what the groups are: ``(?P<camera>cam[0-9]+)``.

    ValueError for an expression or a file that is none, and for images without a group.
    """
    ids = list(ids)
    if how == FOLDER:
        found = {name: name.rpartition("/")[0] or "." for name in ids}
        groups = Groups(found, how, FOLDER)
    elif how.lower().endswith(".csv"):
        groups = _listed(ids, Path(how))
    else:
        groups = _matched(ids, how)
    if len(groups.members()) < 2:
        (only,) = groups.members()
        raise ValueError(
            f"--group {how}: all {len(ids)} images are of one group, {only!r}, and no "
            "split can be made of it: tell groups apart by something finer"
        )
    return groups


def _matched(ids: list[str], how: str) -> Groups:
    try:
        pattern = re.compile(how)
    except re.error as error:
        raise ValueError(
            f"--group {how}: is no regular expression ({error}); allowed: one, the word folder, or "
            "a CSV file of images and groups"
        ) from None
    found = {name: match for name in ids if (match := pattern.search(name))}
    without = [name for name in ids if name not in found]
    place = 1 if pattern.groups else 0
    without += [name for name, match in found.items() if not match[place]]
    if without:
        raise ValueError(
            f"--group {how}: {len(without)} of {len(ids)} images have no group by it, such as "
            f"{sorted(without)[:3]}: it is looked for in these paths; give one that all have"
        )
    names = {place: name for name, place in pattern.groupindex.items()}
    of = {name: match[place] for name, match in found.items()}
    return Groups(of, how, names.get(place, "group"))


def _listed(ids: list[str], path: Path) -> Groups:
    """Of a CSV file: a head, then an image and its group in each line."""
    if not path.is_file():
        raise FileNotFoundError(f"--group {path}: no such file")
    head, *rows = list(csv.reader(io.StringIO(read_text(path)))) or [[]]
    wrong = [row for row in rows if row and (len(row) < 2 or not row[0] or not row[1].strip())]
    if len(head) < 2 or not rows or wrong:
        raise ValueError(
            f"--group {path}: expected a head, as image,camera, and in each line an image and its "
            f"group; got {(wrong or [head])[0]!r}"
        )
    find = Finder(ids)
    of: dict[str, str] = {}
    for name, group, *_ in (row for row in rows if row):
        if (image := find(name)) is not None and of.setdefault(
            image, group.strip()
        ) != group.strip():
            raise ValueError(f"--group {path}: {name} is of two groups, {of[image]} and {group}")
    if without := sorted(set(ids) - of.keys()):
        raise ValueError(
            f"--group {path}: {len(without)} of {len(ids)} images are not in it, such as "
            f"{without[:3]}"
        )
    digest = sha256(path)[:12]
    return Groups(of, f"{path.name} ({digest})", head[1].strip() or "group")


def grouped_splits(
    shares: Mapping[str, float],
    groups: Groups,
    seed: int,
    kept: Mapping[str, list[str]] | None = None,
) -> tuple[dict[str, list[str]], list[str]]:
    """({split: images}, notes): whole groups in each split, as near to its share of the images as
    they allow, one split after the other, the rest ``train``. Of the choices that are as near, that
    which comes first in the order of a hash of seed and group: the same call always makes the same
    splits.

    ``kept``: {split: images} of an earlier set, which stay; a group of theirs takes its new images
    along. ValueError for a group that is larger than any split, for fewer groups than splits, and
    for an earlier set that has a group in two splits.
    """
    check_shares(shares)
    members, total = groups.members(), len(groups.of)
    placed = _placed(kept or {}, groups)
    splits = {split: [g for g, at in placed.items() if at == split] for split in ("train", *shares)}
    free = [g for g in members if g not in placed]
    free.sort(key=lambda group: sha256(f"{seed}/{group}".encode()))
    wanted = {split: max(1, round(share * total)) for split, share in shares.items()}
    if not placed:
        _check_sizes(members, wanted, groups, total)
    for split, count in wanted.items():
        there = sum(len(members[g]) for g in splits[split])
        # a group is left for each later split, and for train
        empty = [s for s in ("train", *shares) if s != split and not splits[s]]
        most = len(free) - len(empty)
        chosen = _nearest([len(members[g]) for g in free], count - there, most, bool(there))
        splits[split] += [free[i] for i in chosen]
        free = [g for i, g in enumerate(free) if i not in chosen]
    splits["train"] += free
    found = {split: sorted(i for g in names for i in members[g]) for split, names in splits.items()}
    return found, _far(found, shares, total, groups)


def _placed(kept: Mapping[str, list[str]], groups: Groups) -> dict[str, str]:
    """{group: the split of its images in the earlier set}."""
    placed: dict[str, str] = {}
    for split, names in kept.items():
        for group in groups.members(name for name in names if name in groups.of):
            if placed.setdefault(group, split) != split:
                raise ValueError(
                    f"--group {groups.by}: the earlier set has images of the {groups.noun} "
                    f"{group!r} in {placed[group]} and in {split}: it was not split by this group, "
                    "and cannot stay as it is. Prepare a set of its own, without --splits-of"
                )
    return placed


def _check_sizes(
    members: Mapping[str, list[str]], wanted: Mapping[str, int], groups: Groups, total: int
) -> None:
    if len(members) < len(wanted) + 1:
        raise ValueError(
            f"--group {groups.by}: {len(members)} {plural(groups.noun)} are too few for "
            f"{len(wanted) + 1} splits, each of which takes whole ones: {', '.join(members)}"
        )
    largest = max(members, key=lambda group: (len(members[group]), group))
    size, left = len(members[largest]), max(0, total - sum(wanted.values()))
    if size > max(left, *wanted.values()):
        raise ValueError(
            f"--group {groups.by}: the {groups.noun} {largest!r} has {size} of {total} images, "
            f"more than the {left} that the shares leave for train: give smaller shares (--share), "
            "or groups that are finer"
        )


def _nearest(sizes: list[int], wanted: int, most: int, may_be_none: bool) -> set[int]:
    """Which of ``sizes`` to take, at most ``most`` of them and one at least unless
    ``may_be_none``, so that their sum is nearest ``wanted``: the first in their order.

    The bits of a whole number are the sums that some of the sizes reach.
    """
    if most < 1 or (may_be_none and wanted <= 0):
        return set()
    limit = 2 * max(wanted, 1) + max(sizes)  # a sum beyond is further away than one group
    mask = (1 << (limit + 1)) - 1
    after = [1]  # sums of the sizes from i on, from behind
    for size in reversed(sizes):
        after.append((after[-1] | after[-1] << size) & mask)
    after.reverse()
    sums = [n for n in range(limit + 1) if after[0] >> n & 1 and (n or may_be_none)]
    for total in sorted(sums, key=lambda n: (abs(n - wanted), n)):
        chosen = _walk(sizes, after, total)
        if len(chosen) <= most:
            return chosen
    return {min(range(len(sizes)), key=lambda i: (abs(sizes[i] - wanted), i))}


def _walk(sizes: list[int], after: list[int], total: int) -> set[int]:
    """The places whose sizes are ``total`` together, early ones first."""
    chosen: set[int] = set()
    for i, size in enumerate(sizes):
        if total >= size and after[i + 1] >> (total - size) & 1:
            chosen.add(i)
            total -= size
    return chosen


def _far(
    splits: Mapping[str, list[str]], shares: Mapping[str, float], total: int, groups: Groups
) -> list[str]:
    notes = []
    for split, share in shares.items():
        got = len(splits[split]) / total
        if abs(got - share) > FAR:
            notes.append(
                f"{split} is {got:.2f} of the images where {share:g} was asked for: "
                f"{plural(groups.noun)} are not divided"
            )
    return notes


def plural(noun: str) -> str:
    return noun if noun.endswith("s") else f"{noun}s"


def recorded_groups(root: str | Path) -> str | None:
    """How a prepared data set was split by groups, in words (:func:`group_text`); None where it
    was not, or is none."""
    path = Path(root) / RECORD
    parts = read_own(path, GROUPED).get("parts", {}) if path.is_file() else {}
    return next((group_text(at["groups"]) for at in parts.values() if "groups" in at), None)


def group_text(found: Mapping[str, object]) -> str:
    """:meth:`Groups.told` in words: ``split by group: 14 cameras (train 10, val 4)``."""
    number, noun, splits = found["number"], str(found["noun"]), found["splits"]
    assert isinstance(splits, Mapping)
    each = ", ".join(f"{split} {n}" for split, n in splits.items())
    return f"split by group: {number} {plural(noun)} ({each})"
