"""Writes the mask set of a labeler image by image. It resumes where it stopped, and never mixes
masks of different labelers."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dd.data.datasets import encode_mask
from dd.labelers.base import Labelled
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.provenance import differences, read_own, sha256, write_atomic, write_json
from dd.store.samples import append_records, intact_masks, read_records
from dd.store.schemas import IDENTIFIED

NEEDS = ("sha256", "pixels")  # of the record of a mask
Batches = list[list[str]]


def write_set(
    target: Path,
    head: dict[str, Any],
    ids: Sequence[str],
    batch_size: int,
    look: Callable[[Batches], Iterable[list[Labelled]]],
    what: str,
) -> dict[str, dict[str, Any]]:
    """Write the masks of ``ids`` to the folder ``target``, ``masks.json`` last. Returns the records
    of a set made now, {} for one that was already finished.

    ``head``: the first part of masks.json, including its ``identity``; ``look(batches)`` gives the
    masks of each batch of ids, in order; ``what``: label of the progress line. Recorded batches
    with unchanged masks stay; others are made whole, because rounding depends on the batch.
    FileExistsError for a set of another identity, which is not changed.
    """
    _refuse_other(target, head["identity"])
    if _finished(target, ids):
        return {}
    target.mkdir(parents=True, exist_ok=True)
    with Lock(target, hint="Choose another name with mask_set=..."):
        if _finished(target, ids):  # another process finished it in the meantime
            return {}
        write_json(target / "settings.json", head)
        done = intact_masks(target, NEEDS)
        batches = [list(ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]
        batches = [batch for batch in batches if not done.issuperset(batch)]
        with Progress(what, len(ids), len(ids) - sum(map(len, batches))) as progress:
            for names, found in zip(batches, look(batches), strict=True):
                rows = [_write(target, *pair) for pair in zip(names, found, strict=True)]
                append_records(target, "0", rows)
                progress.advance(len(names))
        records, pixels, counts = read_records(target, NEEDS), Counter[str](), Counter[str]()
        for name in ids:
            pixels.update(records[name]["pixels"])
            counts.update(records[name].get("counts", {}))
        hashes = {name: records[name]["sha256"] for name in ids}
        counted = {"counts": dict(counts)} if counts else {}
        write_json(
            target / "masks.json", {**head, "pixels": dict(pixels), **counted, "sha256": hashes}
        )
        return records


def _finished(target: Path, ids: Sequence[str]) -> bool:
    """Whether the set is complete; a mask that was removed since is made again."""
    return (target / "masks.json").exists() and all((target / f"{i}.png").is_file() for i in ids)


def _refuse_other(target: Path, identity: dict[str, Any]) -> None:
    for file in (target / "masks.json", target / "settings.json"):
        there = read_own(file, IDENTIFIED)["identity"] if file.exists() else identity
        if lines := differences(there, identity):
            more = [f"... and {len(lines) - 8} more"] if len(lines) > 8 else []
            raise FileExistsError(
                f"mask set {target} was made by another teacher or with other settings:\n  "
                + "\n  ".join([line[:200] for line in lines[:8]] + more)
                + "\nNothing was changed. Choose another name (mask_set=...), or remove the "
                "folder to make it again."
            )


def _write(target: Path, name: str, found: Labelled) -> dict[str, Any]:
    """Write a mask and return its record."""
    data = encode_mask(found.mask)
    write_atomic(target / f"{name}.png", data)
    values = zip(*np.unique(found.mask, return_counts=True), strict=True)
    record = {"id": name, "sha256": sha256(data), "pixels": {str(v): int(n) for v, n in values}}
    return record | ({"counts": found.counts} if found.counts else {})
