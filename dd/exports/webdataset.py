"""WebDataset: tar shards with ``<id>.jpg`` (or another suffix), ``<id>.mask.png`` and ``<id>.json``
of each sample.

The bytes depend on the content alone: files in order, no times, owners or permissions. A dot in the
last part of an id would end the key of a sample, so it is written as %2E (and % as %25). ``id`` in
the JSON is unchanged.
"""

import io
import json
import tarfile
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dd.exports.source import ExportItem, Source, record
from dd.exports.target import Target, shards
from dd.taxonomy import IGNORE


def check(source: Source, link: bool) -> list[str]:
    return ["--link changes nothing: a tar file holds copies"] if link else []


def write(source: Source, target: Target) -> None:
    found: dict[str, list[dict[str, Any]]] = {split: [] for split in source.splits}
    for split in source.splits:
        for number, items in enumerate(shards(source.each(split))):
            name = f"{split}-{number:06d}.tar"
            found[split].append({"file": name, "images": len(items)})
            if target.missing(name):
                with target.whole(name) as path:
                    _tar(source, items, path, target)
    target.write("info.json", partial(_info, source, found))


def key(name: str) -> str:
    """The key of a sample: its id, dots and % in the last part escaped."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.replace("%", "%25").replace(".", "%2E")))


def _tar(source: Source, items: list[ExportItem], path: Path, target: Target) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for item in items:
            facts = record(source, item) | {"file": f"{item.id}{item.suffix}"}
            _add(tar, f"{key(item.id)}{item.suffix.lower()}", item.image.read_bytes())
            _add(tar, f"{key(item.id)}.mask.png", item.mask.read_bytes())
            _add(tar, f"{key(item.id)}.json", json.dumps(facts, ensure_ascii=False).encode())
            target.done(item)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time 0, owner 0, permissions 644
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _info(source: Source, found: dict[str, list[dict[str, Any]]]) -> str:
    content = {
        "name": source.name,
        "classes": dict(enumerate(source.taxonomy.all_names)),
        "ignored": IGNORE,
        "splits": found,
        "about": source.about,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
