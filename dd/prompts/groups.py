"""Which classes occur together: listed, or counted in a caption file or in a folder of masks."""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from dd.prompts.captions import nouns_alone, read_rows, row_classes
from dd.prompts.nouns import ClassNouns
from dd.taxonomy import IGNORE, Taxonomy

Group = frozenset[str]  # classes that occur together


def read_groups(groups: list[list[str]] | str, taxonomy: Taxonomy) -> Counter[Group]:
    """{set of classes: weight}. ``groups``: lists of class names (weight 1 each); the path of a
    caption file, with classes or with nouns to find them; or a folder of masks (PNG of class ids).
    From files, each set is weighted by how often it occurs.

    ValueError for unknown classes or pixel values, FileNotFoundError for a path that does not
    exist.
    """
    if isinstance(groups, str):
        path = Path(groups)
        if not path.exists():
            raise FileNotFoundError(
                f"prompts.groups={groups}: no such caption file or folder of masks"
            )
        found = mask_groups(path, taxonomy) if path.is_dir() else caption_groups(path, taxonomy)
    else:
        if any(not isinstance(group, list | tuple) for group in groups):
            raise ValueError(f"prompts.groups: a list of lists of class names, got {groups!r:.200}")
        for group in groups:
            taxonomy.ids(group)
        found = Counter(frozenset(group) for group in groups)
    if not any(found):
        raise ValueError(
            f"prompts.groups={groups!r:.200} holds no class; leave groups out (null) if any "
            "classes go together"
        )
    return found


def caption_groups(path: Path, taxonomy: Taxonomy) -> Counter[Group]:
    """Class sets of a caption file's entries."""
    nouns, found = ClassNouns(taxonomy), Counter[Group]()
    for i, row in enumerate(read_rows(path)):
        labelled = row.keys() & {"classes", "class_prompt"}
        try:
            classes = row_classes(row, taxonomy) if labelled else nouns.find(nouns_alone(row))
        except ValueError as error:
            raise ValueError(f"{path}, entry {i}: {error}") from None
        found[frozenset(classes)] += 1
    return found


def mask_groups(folder: Path, taxonomy: Taxonomy) -> Counter[Group]:
    """Class sets of the masks (PNG of mode P or L with class ids, 255 ignored) in a folder."""
    found = Counter[Group]()
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(
                    f"mask {path} has mode {image.mode}; "
                    "a mask holds one class id per pixel (mode P or L)"
                )
            values = set(np.unique(np.asarray(image)).tolist()) - {0, IGNORE}
        if values and max(values) >= len(taxonomy):
            raise ValueError(
                f"mask {path} has the value {max(values)}; "
                f"taxonomy {taxonomy.name!r} has classes 0 to {len(taxonomy) - 1}"
            )
        found[frozenset(taxonomy.all_names[value] for value in values)] += 1
    if not found:
        raise FileNotFoundError(f"prompts.groups={folder}: no masks (*.png) there")
    return found
