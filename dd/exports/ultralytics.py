"""Ultralytics' semantic layout: ``images/<split>``, ``masks/<split>`` (grey PNGs of class ids) and ``data.yaml``."""

from functools import partial
from pathlib import PurePosixPath

import yaml

from dd.exports.source import Source, png, read_ids
from dd.exports.target import Target


def check(source: Source, link: bool) -> list[str]:
    """ValueError for a folder that Ultralytics, which replaces ``images`` in a path, would replace too."""
    bad = [name for name in source.items if {"images", "masks"} & set(PurePosixPath(name).parts[:-1])]
    if bad:
        raise ValueError(
            f"id {bad[0]!r} has a folder called images or masks, and Ultralytics finds a mask by replacing images in the "
            "path: rename the folder, or choose another format"
        )
    train, val, _ = source.main_splits()
    missing = [key for key, split in (("train", train), ("val", val)) if split is None]
    hint = "such as the images/val of another export (its path from the root, /...)"
    return [
        f"Ultralytics wants train and val, and there is no split for {key}: add {key} to data.yaml, {hint}" for key in missing
    ]


def write(source: Source, target: Target) -> None:
    for split in source.splits:
        for item in source.each(split):
            target.place(item.image, f"images/{split}/{item.id}{item.suffix}")
            target.write(f"masks/{split}/{item.id}.png", partial(png, read_ids(item)))
            target.done(item)
    target.write("data.yaml", partial(_yaml, source))


def _yaml(source: Source) -> str:
    used = zip(("train", "val", "test"), source.main_splits(), strict=True)
    content = {key: f"images/{split}" for key, split in used if split}
    content |= {"masks_dir": "masks", "nc": len(source.taxonomy), "names": dict(enumerate(source.taxonomy.all_names))}
    head = "# Pixel values are the numbers of names, 255 is ignored. Paths begin at this file's folder.\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
