"""Hugging Face: parquet files with images and masks inside, an image folder with ``metadata.jsonl``
and card.

``load_dataset(<target>)`` reads ``data/<split>-<n>-of-<m>.parquet``; ``imagefolder/<split>`` holds
the same samples as files. Masks stay palette (or grey) PNGs: their pixel values are the keys of
``id2label.json``.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from dd.exports.card import card
from dd.exports.source import ExportItem, Source, record
from dd.exports.target import Target, shards
from dd.taxonomy import IGNORE

GROUP = 100  # samples of a row group
COLUMNS = {  # column: (type in parquet, feature of the datasets library)
    "id": ("string", {"dtype": "string", "_type": "Value"}),
    "image": ("image", {"_type": "Image"}),
    "mask": ("image", {"_type": "Image"}),
    "prompt": ("string", {"dtype": "string", "_type": "Value"}),
    "classes": ("strings", {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}),
    "seed": ("int64", {"dtype": "int64", "_type": "Value"}),
    "present": ("strings", {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}),
}


def check(source: Source, link: bool) -> list[str]:
    """ValueError without pyarrow, and for a split whose name the datasets library refuses."""
    _pyarrow()
    bad = [split for split in source.splits if not re.fullmatch(r"\w+(\.\w+)*", split)]
    if bad:
        raise ValueError(
            f"split {bad[0]!r}: the datasets library takes letters, digits, _ and single dots in "
            "a split's name. Copy the list in ImageSets/Segmentation under another name, and "
            "choose by --split what to export"
        )
    return ["--link changes nothing for the parquet files, which hold copies"] if link else []


def write(source: Source, target: Target) -> None:
    files: dict[str, list[str]] = {}
    for split in source.splits:
        folder, rows = f"imagefolder/{split}", []
        for item in source.each(split):
            image, mask = f"images/{item.id}{item.suffix}", f"masks/{item.id}.png"
            target.place(item.image, f"{folder}/{image}")
            target.place(item.mask, f"{folder}/{mask}")
            rows.append({"image_file_name": image, "mask_file_name": mask, **record(source, item)})
        target.write(f"{folder}/metadata.jsonl", partial(map, _line, rows))
        parts = shards(source.each(split))
        files[split] = [
            f"data/{split}-{i:05d}-of-{len(parts):05d}.parquet" for i in range(len(parts))
        ]
        for name, items in zip(files[split], parts, strict=True):
            if target.missing(name):
                with target.whole(name) as path:
                    _parquet(source, items, path)
            for item in items:
                target.done(item)
    names = dict(enumerate(source.taxonomy.all_names)) | {IGNORE: "uncertain"}
    labels = json.dumps(names, indent=1, ensure_ascii=False) + "\n"
    target.write("id2label.json", lambda: labels)
    target.write("README.md", partial(card, source, files))


def columns(source: Source) -> list[str]:
    """The columns of a synthetic set, or those that real data has too."""
    left_out = () if source.about["synthetic"] else ("prompt", "classes", "seed")
    return [c for c in COLUMNS if c not in left_out]


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(
            'export huggingface needs pyarrow, which is not installed: pip install -e ".[exports]"'
        ) from None
    return pyarrow


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parquet(source: Source, items: list[ExportItem], path: Path) -> None:
    """One shard, in row groups, with the features that let the datasets library decode images."""
    pa, chosen = _pyarrow(), columns(source)
    types = {
        "string": pa.string(),
        "int64": pa.int64(),
        "strings": pa.list_(pa.string()),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    }
    features = {"info": {"features": {c: COLUMNS[c][1] for c in chosen}}}
    schema = pa.schema(
        [(c, types[COLUMNS[c][0]]) for c in chosen], {"huggingface": json.dumps(features)}
    )
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(items), GROUP):
            rows = [_row(source, item) for item in items[start : start + GROUP]]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _row(source: Source, item: ExportItem) -> dict[str, Any]:
    image = {"bytes": item.image.read_bytes(), "path": f"{item.id}{item.suffix}"}
    mask = {"bytes": item.mask.read_bytes(), "path": f"{item.id}.png"}
    return {**record(source, item), "image": image, "mask": mask}
