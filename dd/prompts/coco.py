"""Prompts from COCO captions, with the classes of the same images' instance annotations."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dd.prompts.captions import Caption, keep
from dd.prompts.prompt import Prompts, make_prompt
from dd.store.names import is_text
from dd.store.provenance import read_json
from dd.taxonomy import Taxonomy

INSTANCES = {  # lists of an instances file, and the keys of their entries
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id"),
    "categories": ("id", "name"),
}


def read_lists(
    path: str | Path, needed: Mapping[str, tuple[str, ...]]
) -> dict[str, list[dict[str, Any]]]:
    """Lists of a COCO JSON whose entries have the ``needed`` keys. FileNotFoundError, or ValueError
    that names the entry."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no file {path}. COCO 2017 has captions_train2017.json and instances_train2017.json "
            "in one archive (python -m dd prepare coco); "
            "prompts.captions and prompts.instances say where they lie (prompts=paper_coco: "
            "prompts.sources.captions.captions and prompts.sources.captions.instances)"
        ) from None
    for part, keys in needed.items():
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(
                f"{path} has no list {part!r}; expected a COCO file with {', '.join(needed)}"
            )
        for row in content[part]:
            missing = [k for k in keys if not isinstance(row, dict) or k not in row]
            if missing:
                raise ValueError(f"{path}: an entry of {part} has no {missing[0]!r}: {row!r:.100}")
            ids = [k for k in keys if k.endswith("id")]
            whole = [k for k in ids if isinstance(row[k], float) and row[k].is_integer()]
            row |= {k: int(row[k]) for k in whole}  # 3.0 becomes 3
            odd = [k for k in ids if not isinstance(row[k], int | str)]
            if odd:
                raise ValueError(
                    f"{path}: {odd[0]} of an entry of {part} must be a number or a text: "
                    f"{row!r:.100}"
                )
    return content


def image_classes(
    path: str | Path, taxonomy: Taxonomy
) -> tuple[dict[int, tuple[str, ...]], dict[int, str]]:
    """({image id: classes in the taxonomy's order}, {image id: file name}) of an instances file.

    Categories are found by name or synonym, not by id. Those that are not a class of the taxonomy
    are skipped. Crowd regions count as their class. ValueError if no category is a class, or for
    ids that the file does not define.
    """
    content = read_lists(path, INSTANCES)
    names = {c["id"]: taxonomy.find(c["name"]) for c in content["categories"]}
    if not any(names.values()):
        raise ValueError(
            f"{path}: no category is a class of taxonomy {taxonomy.name!r}; categories: "
            f"{', '.join(str(c['name']) for c in content['categories'][:20])}; classes: "
            f"{', '.join(taxonomy.names[:20])}"
        )
    files = {image["id"]: str(image["file_name"]) for image in content["images"]}
    found: dict[int, set[str | None]] = defaultdict(set)
    for row in content["annotations"]:
        for key, known in (("category_id", names), ("image_id", files)):
            if row[key] not in known:
                raise ValueError(
                    f"{path}: an annotation has {key} {row[key]!r}, which the file does not "
                    f"define: {row!r:.100}"
                )
        found[row["image_id"]].add(names[row["category_id"]])
    return {i: tuple(name for name in taxonomy.names if name in found[i]) for i in files}, files


class CocoCaptions:
    """Prompts from ``captions_*.json`` and ``instances_*.json`` of the same COCO split; images
    without a class are dropped.

    An image gives its second caption only after every image has given one. ``exclude_split``,
    ``drop_similar``: see :func:`dd.prompts.captions.keep`. ``full_stop``: keep that of captions.
    """

    def __init__(
        self,
        captions: str,
        instances: str,
        append: bool = True,
        exclude_split: str | None = None,
        drop_similar: float | None = None,
        full_stop: bool = False,
    ) -> None:
        self.captions, self.instances, self.append = captions, instances, append
        self.exclude_split, self.drop_similar = exclude_split, drop_similar
        self.full_stop = full_stop

    def __call__(self, taxonomy: Taxonomy, number: int | None, seed: int) -> Prompts:
        classes, files = image_classes(self.instances, taxonomy)
        rows = read_lists(self.captions, {"annotations": ("image_id", "caption")})["annotations"]
        if not rows:
            raise ValueError(f"{self.captions} lists no captions")
        strange = sorted({row["image_id"] for row in rows} - files.keys(), key=str)
        if strange:
            raise ValueError(
                f"{self.captions} does not match {self.instances}: {len(strange)} images with "
                f"captions are not listed there, such as image_id {strange[:5]}. "
                "Both files must be of one split"
            )
        for row in rows:
            if not isinstance(row["caption"], str) or not is_text(row["caption"]):
                raise ValueError(
                    f"{self.captions}: a caption must be text without NUL and unpaired surrogates: "
                    f"{row!r:.200}"
                )
        text = one_line if self.full_stop else plain
        told = [(text(row["caption"]), row["image_id"]) for row in rows]
        captions, dropped = keep(
            (Caption(caption, classes[i], files[i]) for caption, i in told),
            self.exclude_split,
            self.drop_similar,
        )
        prompts = [make_prompt(c.text, c.classes, self.append) for c in captions]
        of_image: dict[str | None, list[int]] = defaultdict(list)
        for i, caption in enumerate(captions):
            of_image[caption.filename].append(i)
        order = rounds(list(of_image.values()), seed)
        chosen = [prompts[order[i % len(order)]] for i in range(number or len(order))]
        return Prompts(chosen, dropped)


def one_line(caption: str) -> str:
    return " ".join(caption.split())


def plain(caption: str) -> str:
    """A caption on one line, without its full stop, because class words follow it."""
    return one_line(caption).rstrip(" .")


def rounds(groups: list[list[int]], seed: int) -> list[int]:
    """All members in rounds: one of each group, then a second one of each, and so on; the order
    within groups and rounds depends on the seed."""
    rng = np.random.default_rng([seed, 5])
    order: list[int] = []
    groups = [[members[k] for k in rng.permutation(len(members))] for members in groups]
    while groups:
        order += [groups[k].pop() for k in rng.permutation(len(groups))]
        groups = [members for members in groups if members]
    return order
