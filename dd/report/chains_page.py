"""What chains of mask steps are worth: a page beside the sweep that compared them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dd.report.html import Gallery, Section, Table, Text
from dd.report.pictures import colour_mask, legend, small_data_uri
from dd.taxonomy import voc_palette

Shown = tuple[str, Sequence[np.ndarray]]  # label, [image, mask, mask, ...]
COLUMNS = [
    "chain",
    "mIoU",
    "95 %",
    "less the first [95 %]",
    "p (Holm)",
    "boundary IoU",
    "uncertain %",
    "ms",
]


def chain_sections(
    result: dict[str, Any], pictures: Sequence[tuple[str, Sequence[Shown]]]
) -> list[Section]:
    """Sections of a sweep with ``chains``: the table, best first, and ``pictures``, galleries of
    (title, rows) whose rows hold an image, the mask compared with, the first chain's and the best
    one's."""
    chains = result["chains"]
    order = sorted(chains, key=lambda name: -chains[name]["miou"])
    first = next(iter(chains))
    rows = [[name, *_row(chains[name])] for name in order]
    samples = result["identity"]["samples"]
    about = Text(
        "What was compared",
        [
            f"Masks of {len(chains)} chains on {samples} images, each with the power, threshold "
            f"and words that fit {result['against']} best. Uncertain pixels count as background. "
            f"Intervals are paired over the images; p is Holm's over all chains but {first!r}.",
            "The settings were chosen on these images: a chain with more settings gains more by "
            "the choice alone. Only other images measure it.",
        ],
    )
    note = "ms: of one thread, an image."
    digits = {"p (Holm)": 3}
    table = Table("Chains", COLUMNS, rows, note, digits=digits, best=("mIoU", "boundary IoU"))
    colours = legend(["background", *result["identity"]["classes"]], voc_palette(), uncertain=True)
    names = ["image", "compared with", first, order[0]]
    shown = [
        Gallery(title, names, [_pictures(row) for row in rows], legend=colours)
        for title, rows in pictures
    ]
    return [about, table, *shown]


def _row(chain: dict[str, Any]) -> list[Any]:
    less = chain.get("less_first")
    return [
        chain["miou"],
        _between(chain["interval"]),
        less and f"{less[0]:+.1f} {_between(less[1:])}".replace("-", "−"),
        chain.get("p"),
        chain["boundary_iou"],
        chain["uncertain"],
        chain["milliseconds"],
    ]


def _between(ends: Sequence[float | None]) -> str | None:
    low, high = ends
    return None if low is None or high is None else f"[{low:.1f}, {high:.1f}]".replace("-", "−")


def _pictures(row: Shown) -> tuple[str, list[str]]:
    label, (image, *masks) = row
    palette = voc_palette()
    drawn = [small_data_uri(colour_mask(mask, palette), photo=False) for mask in masks]
    return label, [small_data_uri(image), *drawn]
