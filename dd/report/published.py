"""Published results beside measured ones: the reproduction table.

The published numbers are data (``published.json``) with their sources and what the method was shown
(supervision class): A image-text pairs only, B a few real masks, C all real masks, D a foundation
labeller, real = real masks train the segmenter. What was not run stays empty.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dd.report.html import Cell, Section, Table

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
KEYS = ("segmenter", "arm", "supervision")  # what saw other labels is another row
ALIKE = 0.1  # share by which the number of images may differ from the published one
TRAINED_ON = {
    "synthetic": "synthetic",
    "self_training": "synthetic, self-training",
    "mixed": "real + synthetic",
    "real": "real",
}


Published = Mapping[str, Any]  # a row of published.json
Measured = Mapping[str, Any]  # see reproduction


def reproduction(data: str, measured: Sequence[Measured]) -> list[Section]:
    """The reproduction table of ``data`` (``voc``, ``coco``) and the other published results; []
    for other data.

    ``measured``: one entry per run and protocol: ``segmenter`` (as "DeepLabV3 R101"), ``arm`` (a
    key of TRAINED_ON, or another name as it is), ``tta`` (multi-scale and flip), ``seed``, ``miou``
    in percent, ``supervision``; ``images`` in words, their ``number`` and ``steps``; ``variant``:
    "" for the main recipe of its arm; ``recipe``: equal for its seeds; ``origin``: the data set of
    the real images, or "". Of several main recipes (real images of several data sets) the one whose
    number of images is nearest to the published one stands beside it. Several seeds become mean ±
    standard deviation. The difference is single scale minus published, where as many images were
    trained on (within a tenth).
    """
    published = [r for r in PUBLISHED["results"] if r["data"] == data]
    if not published:
        return []
    groups: dict[tuple[Any, ...], list[Measured]] = {}
    for entry in measured:
        key = tuple(entry[k] for k in (*KEYS, "variant", "origin", "recipe"))
        groups.setdefault(key, []).append(entry)
    rows = []
    for row in published:
        nearest = _nearest(groups, row)
        found = groups.pop(nearest) if nearest else []
        rows.append(_row(row["segmenter"], row["arm"], row, found))
    for (segmenter, arm, *_), found in sorted(groups.items()):
        rows.append(_row(segmenter, arm, None, found))
    columns = ["segmenter", "trained on", "saw", "published", "published for", "measured"]
    columns += ["measured with", "difference", "measured, multi-scale + flip", "seeds"]
    sources = {r["source"] for r in published}
    note = (
        "mIoU in percent; a dash: not run. A difference is given where as many images were "
        "trained on. Saw: "
        + "; ".join(f"{k} = {v}" for k, v in PUBLISHED["supervision"].items())
        + ". Sources: "
        + "; ".join(f"{PUBLISHED['sources'][s]} ({_which(published, s)})" for s in sorted(sources))
        + ". Whether the published figures include self-training or test-time augmentation is not "
        "known."
    )
    table = Table(f"Reproduction: {data}", columns, rows, note=note, digits={"difference": 1})
    others = [r for r in PUBLISHED["others"] if r["data"] == data]
    if not others:
        return [table]
    cells = [
        [r["method"], r["segmenter"], r["images"], r["supervision"], str(r["miou"]), _source(r)]
        for r in others
    ]
    names = ["method", "segmenter", "images", "saw", "mIoU", "source"]
    other = Table(f"Other published results: {data}", names, cells, note="Not measured here.")
    return [table, other]


def _nearest(
    groups: Mapping[tuple[Any, ...], list[Measured]], published: Published
) -> tuple[Any, ...] | None:
    """The main recipe of a published row whose number of images is nearest to the published one."""
    wanted, own = _number(published["images"]), (*(published[k] for k in KEYS), "")
    found = [key for key in groups if key[: len(own)] == own]
    return min(found, key=lambda key: (abs(groups[key][0]["number"] - wanted), key), default=None)


def _row(
    segmenter: str, arm: str, published: Published | None, found: list[Measured]
) -> list[Cell]:
    single, augmented = ([e["miou"] for e in found if e["tta"] is tta] for tta in (False, True))
    saw = "/".join(sorted({e["supervision"] for e in found}))
    name = TRAINED_ON.get(arm, arm) + next((f"; {e['variant']}" for e in found if e["variant"]), "")
    value = difference = None
    images = ""
    if published:
        saw, value, images = (published[key] for key in ("supervision", "miou", "images"))
        if single and all(_as_many(e["number"], images) for e in found):
            difference = mean(single) - value
    else:
        name += next((f" (real images from {e['origin']})" for e in found if e["origin"]), "")
    seeds = ", ".join(str(s) for s in sorted({e["seed"] for e in found}))
    known: list[Cell] = [segmenter, name, saw, value, images]
    return [*known, _cell(single), _measured_with(found), difference, _cell(augmented), seeds]


def _measured_with(found: list[Measured]) -> str:
    """ "16 synthetic images, 5 steps" of the runs of one recipe."""
    steps = {"steps not known" if e["steps"] is None else f"{e['steps']:,} steps" for e in found}
    return "; ".join(sorted({f"{e['images']} images, {s}" for e in found for s in steps}))


def _as_many(number: int, published: str) -> bool:
    """Whether ``number`` images are as many as "40k synthetic + 11.5k real"."""
    wanted = _number(published)
    return abs(number - wanted) <= ALIKE * wanted


def _number(published: str) -> float:
    return 1000 * sum(float(k) for k in re.findall(r"([\d.]+)k", published))


def _cell(values: list[float]) -> Cell:
    if not values:
        return None
    return (mean(values), stdev(values)) if len(values) > 1 else values[0]


def _which(rows: list[Published], source: str) -> str:
    return ", ".join(sorted({TRAINED_ON[r["arm"]] for r in rows if r["source"] == source}))


def _source(row: Published) -> str:
    return PUBLISHED["sources"].get(row["source"], row["source"])
