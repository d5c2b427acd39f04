"""Two mask sets of the same images beside each other: a page of where they agree and where not."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dd.report.html import Gallery, Section, Table, Text
from dd.report.pictures import legend, overlay, small_data_uri
from dd.taxonomy import IGNORE, voc_palette

Row = tuple[str, np.ndarray, np.ndarray, np.ndarray]  # label, image, mask of a, mask of b


def agreement_sections(result: dict[str, Any], rows: Sequence[Row]) -> list[Section]:
    """Sections of a result of :func:`dd.stages.agree.agree`; ``rows``: the images that differ
    most."""
    a, b = result["sets"]
    names, scores = ["background", *result["classes"]], result["agreement"]
    about = Text(
        "What was compared",
        [
            f"{a['set']} (supervision {a['supervision']}) and {b['set']} (supervision "
            f"{b['supervision']}) on the same {result['images']} images.",
            "IoU is that of the pixels of which both are certain, one integer matrix over all "
            "images; it is the same in both directions. Agreement is no accuracy: two sets may "
            "share an error.",
        ],
    )
    each = zip(names, scores["iou"], scores["a"], scores["b"], strict=True)
    shares = [f"share in {one['set']} %" for one in (a, b)]
    table = Table("Classes", ["class", "IoU", *shares], [list(row) for row in each], bars=("IoU",))
    total = Table(
        "Overall",
        ["of the pixels", "%"],
        [
            ["mIoU (mean of the classes' IoU)", scores["miou"]],
            ["certain in both", scores["certain"]],
            [f"uncertain (255) in {a['set']}", scores["uncertain"][0]],
            [f"uncertain (255) in {b['set']}", scores["uncertain"][1]],
        ],
    )
    made = [[key, *(str(one["made"].get(key, "")) for one in (a, b))] for key in _keys(a, b)]
    origin = Table("How they were made", ["", a["set"], b["set"]], made)
    gallery = Gallery(
        "Where they agree least",
        ["image", a["set"], b["set"], "differ"],
        [_pictures(row) for row in rows],
        "differ: in the colour of the second set, 255 where it is background.",
        legend(names, voc_palette(), uncertain=True),
    )
    return [about, total, table, gallery, origin]


def _keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys([*a["made"], *b["made"]]))


def _pictures(row: Row) -> tuple[str, list[str]]:
    label, image, *masks = row
    a, b = masks
    palette = voc_palette()
    other = np.where(a == b, 0, np.where(b == 0, IGNORE, b)).astype(np.uint8)
    shown = [overlay(image, mask, palette) for mask in (a, b, other)]
    return label, [small_data_uri(picture) for picture in (image, *shown)]
