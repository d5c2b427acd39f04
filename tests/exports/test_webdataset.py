import json
import os
import tarfile
from pathlib import Path

import numpy as np
import webdataset

from dd.exports import target
from dd.exports.webdataset import key

SHOWN = (
    (Path(__file__).parents[2] / "docs/exports.md")
    .read_text()
    .split("```python\n# WebDataset")[1]
    .split("```")[0]
)


def read(root, split):
    shards = [
        str(root / part["file"])
        for part in json.loads((root / "info.json").read_text())["splits"][split]
    ]
    found = {"shards": shards}
    exec(f"# {SHOWN}", found)  # what docs/exports.md shows
    return list(found["data"])


def test_webdataset_reads_the_same_pixels(hall, exported):
    root = exported("webdataset", hall.root)
    for split, ids in hall.splits.items():
        rows = read(root, split)
        assert [row["json"]["id"] for row in rows] == ids
        for name, row in zip(ids, rows, strict=True):
            assert np.array_equal(row["mask.png"], hall.masks[name])
            assert np.array_equal(row[hall.suffixes[name][1:]], hall.pixels(name))
            assert row["json"]["file"] == name + hall.suffixes[name]


def test_without_the_decoder_masks_would_be_colours(hall, exported):
    root = exported("webdataset", hall.root)
    row = next(
        iter(webdataset.WebDataset(str(root / "val-000000.tar"), shardshuffle=False).decode("rgb8"))
    )
    assert row["mask.png"].ndim == 3


def test_the_bytes_depend_on_the_content_alone(hall, exported, tmp_path, monkeypatch):
    first = exported("webdataset", hall.root)
    before = {p.name: p.read_bytes() for p in first.glob("*.tar")}
    for path in hall.root.rglob("*.*"):
        os.utime(path, (10**9, 10**9))
    first.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert {
        p.name: p.read_bytes() for p in exported("webdataset", hall.root).glob("*.tar")
    } == before
    with tarfile.open(tmp_path / "elsewhere/train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_shards_have_a_limit_and_keep_the_order(hall, exported, monkeypatch):
    monkeypatch.setattr(target, "SHARD_BYTES", 1)
    root = exported("webdataset", hall.root)
    assert sorted(p.name for p in root.glob("train-*")) == [f"train-{i:06d}.tar" for i in range(3)]
    assert [row["json"]["id"] for row in read(root, "train")] == hall.splits["train"]


def test_prompts_of_any_text(pets, exported, prompts):
    rows = read(exported("webdataset", pets), "train")
    assert [row["json"]["prompt"] for row in rows] == prompts
    assert [row["__key__"] for row in rows] == [f"{i:06d}" for i in range(4)]


def test_a_key_ends_at_no_dot_and_stays_unique():
    assert key("line.1/b.v2") == "line.1/b%2Ev2"
    assert key("b%2Ev2") == "b%252Ev2"
