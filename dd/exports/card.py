"""The data card of the Hugging Face export: a README.md with the header that the hub reads."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dd.evaluation.supervision import distinct, told
from dd.exports.source import Source
from dd.store.templates import fill
from dd.taxonomy import IGNORE

TEMPLATE = Path(__file__).with_name("card.md.j2")
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
LICENCES = {  # as data sets of this project state them: the hub's identifier
    "apache-2.0": "apache-2.0",
    "mit": "mit",
    "cc-by-4.0": "cc-by-4.0",
    "cc-by-sa-4.0": "cc-by-sa-4.0",
    "cc0-1.0": "cc0-1.0",
    "creativeml openrail-m": "creativeml-openrail-m",
    "creativeml openrail++-m": "openrail++",
}

BIASES = (
    "Known biases: the generator draws badly or not at all what it seldom saw, a mask marks where "
    "the model *attended* to a word even if the object is missing, and objects that were not "
    "asked for are background."
)


def card(source: Source, files: dict[str, list[str]]) -> str:
    """README.md: header, classes with counts, how to read it, origin, licence and limits."""
    about, names = source.about, source.taxonomy.all_names
    total, count = sum(source.pixels.values()), len(source.items)
    rows = [f"| {i} | {_cell(name)} | {_share(source, i, total)} |" for i, name in enumerate(names)]
    rows.append(f"| {IGNORE} | uncertain, to be ignored | {_share(source, IGNORE, total)} |")
    splits = ", ".join(f"`{split}` ({len(ids)})" for split, ids in source.splits.items())
    return fill(
        TEMPLATE,
        header=yaml.safe_dump(header(source, files), sort_keys=False, allow_unicode=True),
        name=_cell(source.name),
        count=count,
        splits=splits,
        origin=_origin(about),
        rows=rows,
        first=next(iter(files)),
        licence=_licence(about),
        masks=_cell(str(about["masks"])),
        biases=BIASES if about["synthetic"] else "",
    )


def header(source: Source, files: dict[str, list[str]]) -> dict[str, Any]:
    """The YAML header as plain values."""
    about = source.about
    licence = LICENCES.get(str(about["licence"] or "").lower())
    terms = {"license": licence or ("other" if about["licence"] else "unknown")}
    if terms["license"] == "other":
        named = {"license_name": about["licence"], "license_link": about["link"]}
        terms |= {key: value for key, value in named.items() if value}
    size = next((name for limit, name in SIZES if len(source.items) < limit), "n>10M")
    made = {
        "annotations_creators": ["machine-generated"],
        "tags": ["synthetic", "stable-diffusion"],
    }
    data = [{"split": split, "path": f"data/{split}-*-of-*.parquet"} for split in files]
    return {
        "pretty_name": source.name,
        "task_categories": ["image-segmentation"],
        "task_ids": ["semantic-segmentation"],
        **terms,
        **(made if about["synthetic"] else {}),
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": data}],
    }


def _share(source: Source, value: int, total: int) -> str:
    return f"{source.images.get(value, 0)} | {100 * source.pixels.get(value, 0) / total:.2f} %"


def _cell(text: str) -> str:
    """Text in a Markdown table or title: no markup, no second column."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;").replace("`", "&#96;")


def used_labels(sets: list[dict[str, Any]], supervision: str = "A") -> str:
    """A card's text on the labels behind a synthetic set
    (:func:`dd.evaluation.supervision.behind`) whose masks have this supervision class."""
    masks = ""
    if supervision not in ("A", "B"):
        masks = (
            f"Its masks are of supervision class {supervision} (docs/sweeps.md, What labels "
            "decide), and so is a segmenter trained on it. "
        )
    if not sets and supervision != "B":
        return (
            masks or "No real label was used: neither for a mask nor for the choice of a setting."
        )
    known = told(sets) or "which ones is not recorded"
    return (
        f"{masks}{distinct(sets) or 'An unknown number of'} real labels are behind it: settings "
        f"were chosen on them, or a teacher was trained on them: {known}. A segmenter trained on "
        "it does not have supervision class A (docs/sweeps.md)."
    )


def adapter(generator: Mapping[str, Any]) -> str:
    """A card's text on LoRA layers, given the generator of run.json; "" without any."""
    if not generator.get("adapter_sha256"):
        return ""
    return (
        f" Adapted with LoRA layers of weight {generator['adapter_weight']} (sha256 "
        f"`{generator['adapter_sha256']}`) that were trained on other images: the generated images "
        "may look like those, and their rights and privacy may apply here too."
    )


def _origin(about: Mapping[str, Any]) -> str:
    if not about["synthetic"]:
        groups = f" Its images are {_cell(about['groups'])}." if about.get("groups") else ""
        return (
            "Real images, as prepared by `python -m dd prepare` or by hand; see their source "
            f"for how they were labelled.{groups}"
        )
    generator, behind = about["generator"], used_labels(about["labels"], about["supervision"])
    if "given" in generator:
        masks = about["labeler"] or (
            "read from the attention of a text-to-image model (Dataset Diffusion, NeurIPS 2023)"
        )
        return f"**Synthetic masks**: the images were given, their masks {masks}. {behind}"
    masks = about["labeler"] or "read from its attention (Dataset Diffusion, NeurIPS 2023)"
    return (
        "**Synthetic**: the images were made by a text-to-image model, the masks "
        f"{masks}. Generator: `{generator.get('model')}`, "
        f"revision `{generator.get('revision')}`, weights sha256 "
        f"`{generator.get('weights_sha256')}`.{adapter(generator)} {behind}"
    )


def _licence(about: Mapping[str, Any]) -> str:
    if not about["synthetic"]:
        return "not known to this export; ask the owner of the images."
    if "given" in about["generator"]:
        return "not known to this export; ask the owner of the images."
    licence = about["licence"] or "not stated, ask the owner of the weights"
    link = f" ({about['link']})" if about["link"] else ""
    return (
        f"of the generator's weights: {licence}{link}. It governs what may be done with the images."
    )
