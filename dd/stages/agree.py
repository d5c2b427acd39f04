"""Stage: compare two mask sets of the same images: the agreement of each class, and the images on
which they differ most."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dd.data.datasets import check_mask, read_image, read_mask, synthetic_image
from dd.evaluation.agreement import agreeing_share, agreement, joint_counts
from dd.evaluation.supervision import class_of_masks
from dd.execution.units import read_run
from dd.labelers.base import Images
from dd.labelers.joined import check_same, finished_set
from dd.report.agreement_page import agreement_sections
from dd.report.html import render, write
from dd.report.origins import flatten
from dd.store.names import folder_name
from dd.store.progress import Progress
from dd.store.provenance import fingerprint, made_by, write_json
from dd.store.samples import read_plan, recorded
from dd.store.settings import Count, Parts, Settings
from dd.taxonomy import Taxonomy


class AgreeSettings(Settings):
    """``a`` and ``b``: mask sets, as folders in the data set; ``worst``: number of images on the
    page."""

    noun = "agree"

    a: Parts
    b: Parts
    worst: Count = 24


def agree(folder: str | Path, settings: AgreeSettings) -> tuple[dict[str, Any], Path]:
    """Compare two mask sets of the synthetic set ``folder``; returns (the result, its page).

    ``agreement/<a>,<b>.json`` holds :func:`dd.evaluation.agreement.agreement` and the integer
    counts, ``.html`` the same with pictures. FileNotFoundError for a set that is not finished,
    ValueError for sets of other images, or one set given twice. No mask is changed.
    """
    folder = Path(folder)
    names = (settings.a, settings.b)
    if settings.a == settings.b:
        raise ValueError(f"agree.a and agree.b are both {settings.a}: give two mask sets")
    classes, plan = read_run(folder)["identity"]["taxonomy"], read_plan(folder)
    taxonomy = Taxonomy(classes["name"], classes["names"])
    hashes = recorded(folder, "image_sha256")
    content = fingerprint([hashes.get(s.id) for s in plan])
    images = Images(folder, taxonomy, plan, content)
    found = {name: finished_set(folder, name) for name in names}
    for name, masks in found.items():
        check_same(images, name, masks)
    counts = np.zeros((len(taxonomy) + 1,) * 2, np.int64)
    shares: dict[str, float] = {}
    with Progress(f"compare masks of {folder.name}", len(plan)) as progress:
        for sample in plan:
            try:
                own = joint_counts(*_masks(folder, names, sample.id), len(taxonomy))
            except ValueError as error:
                raise ValueError(f"sample {sample.id} in {' and '.join(names)}: {error}") from None
            counts += own
            shares[sample.id] = agreeing_share(own)
            progress.advance()
    worst = sorted(shares, key=lambda name: (shares[name], name))[: settings.worst]
    worst = [name for name in worst if shares[name] < 100]
    result = {
        "sets": [_told(name, found[name]) for name in names],
        "classes": list(taxonomy.names),
        "images": len(plan),
        "agreement": agreement(counts),
        "worst": {name: shares[name] for name in worst},
        "counts": counts.tolist(),
    }
    where = folder_name(",".join(name.replace("/", "_") for name in names), "agree")
    write_json(folder / "agreement" / f"{where}.json", {**result, **made_by()})
    asked = {s.id: ", ".join(s.classes) for s in plan}
    rows = []
    for name in worst:
        image = read_image(synthetic_image(folder, name))
        label = f"{name}: {asked[name]} ({shares[name]:.1f} % the same)"
        rows.append((label, image, *_masks(folder, names, name)))
    title = f"{names[0]} and {names[1]}"
    page = render(f"Mask sets: {title}", str(folder), agreement_sections(result, rows))
    return result, write(folder / "agreement" / f"{where}.html", page)


def _masks(folder: Path, names: tuple[str, str], sample: str) -> tuple[np.ndarray, np.ndarray]:
    masks = []
    for name in names:
        path = folder / name / f"{sample}.png"
        check_mask(path)
        masks.append(read_mask(path))
    return masks[0], masks[1]


def _told(name: str, masks: dict[str, Any]) -> dict[str, Any]:
    made = {k: v for k, v in masks["identity"].items() if k not in ("teacher", "absent")}
    made |= {"made": {k: v for k, v in masks.get("made", {}).items() if k != "versions"}}
    return {"set": name, "supervision": class_of_masks(masks), "made": flatten(made)}


def print_agreement(result: dict[str, Any]) -> None:
    """The classes as a table."""
    a, b = (one["set"] for one in result["sets"])
    scores = result["agreement"]
    table = Table("class", "IoU", f"% of {a}", f"% of {b}", title=f"{a} and {b}")
    each = zip(
        ["background", *result["classes"]], scores["iou"], scores["a"], scores["b"], strict=True
    )
    for name, iou, in_a, in_b in each:
        table.add_row(name, _number(iou), _number(in_a), _number(in_b))
    table.add_row("mean", _number(scores["miou"]), "", "")
    table.add_row("uncertain (255)", "", *map(_number, scores["uncertain"]))
    Console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
