"""Stage: mIoU of a synthetic set's masks from a few images that a human labelled. How far two mask
sets of the same images agree (two readings, two labellers) predicts which masks are good; it
shortens the interval where it does, and orders what to look at first."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Gt

from dd.data.datasets import SegmentationFolder, check_values, read_mask
from dd.evaluation.few_labels import Estimated, estimate, image_miou, label_more, sums
from dd.store.progress import Progress
from dd.store.provenance import made_by, write_atomic, write_csv, write_json
from dd.store.settings import Count, Hint, Settings
from dd.taxonomy import Taxonomy

BINS = 5  # of the reliability curve, with equally many labelled images


class EstimateSettings(Settings):
    """``other``: the mask set of the same synthetic set that predicts (``masks/<name>``).
    ``labels``: a folder of ``<id>.png``, masks by humans of a random draw of the images; None draws
    ``draw`` of them to be labelled. ``within``: half of the interval, in points, that the number of
    missing labels is told for."""

    noun: ClassVar[str] = "estimate"
    other: Annotated[str, Hint("a second mask set of the same images, as masks/after")]
    labels: str | None = None
    draw: Annotated[Count, Hint("how many images to label")] = 50
    within: Annotated[float, Gt(0)] = 2.0


def estimate_masks(
    folder: str | Path,
    masks: SegmentationFolder,
    settings: EstimateSettings,
    classes: Taxonomy,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes ``<folder>/estimates/<masks>_<other>.json`` and ``.csv`` (every image, the least
    agreed first) and returns the content of the first; without labels, and where there are none
    yet, ``to_label.txt`` beside them.

    Pixels that are uncertain in ``masks`` count as background; those of ``other`` are left out.
    FileNotFoundError for missing masks or labels, ValueError for other sizes or classes, for labels
    of images that are not in the set, and for too few of them.
    """
    folder, ids = Path(folder), masks.ids
    if settings.other == masks.masks:
        raise ValueError(
            f"estimate.other={settings.other} is the mask set itself, which agrees with itself; "
            "give another one (generate.py stage=label mask_set=...)"
        )
    other = SegmentationFolder(folder, masks.split, classes, settings.other)
    chosen, labels = [], None
    if settings.labels is not None:
        labels = Path(settings.labels)
        chosen = _labelled(labels, ids)
    predicted, true = [], []
    wanted = set(chosen)
    with Progress("masks compared", len(ids)) as progress:
        for i, name in enumerate(ids):
            mask = read_mask(masks.mask_path(name))
            where = folder / settings.other / f"{name}.png"
            predicted.append(_sums(mask, read_mask(other.mask_path(name)), where, classes))
            if labels is not None and i in wanted:
                path = labels / f"{name}.png"
                true.append(_sums(mask, read_mask(path, classes), path, classes))
            progress.advance()
    agreement = image_miou(np.stack(predicted))
    name = f"{masks.masks}_{settings.other}".replace("/", "-")
    target = folder / "estimates" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    found: dict[str, Any] = {"masks": masks.masks, "other": settings.other, "images": len(ids)}
    scored: dict[int, float] = {}
    if labels is None:
        drawn = np.random.default_rng(seed).permutation(len(ids))[: settings.draw]
        found["to_label"] = [ids[i] for i in sorted(drawn.tolist())]
        write_atomic(target.with_name("to_label.txt"), "".join(f"{n}\n" for n in found["to_label"]))
    else:
        each = np.stack(true)
        result = estimate(each, chosen, np.stack(predicted), settings.within)
        scored = dict(zip(chosen, image_miou(each).tolist(), strict=True))
        found |= _told(result, classes)
        found["reliability"] = reliability(agreement[chosen], np.array(list(scored.values())))
    order = np.argsort(agreement, kind="stable").tolist()
    known = {i: f"{value:.2f}" for i, value in scored.items()}
    rows = [[ids[i], f"{agreement[i]:.2f}", known.get(i, "")] for i in order]
    write_csv(target.with_suffix(".csv"), [["id", "agreement", "miou"], *rows])
    write_json(target, {"estimate": found, **made_by()})
    return found


def _labelled(labels: Path, ids: Sequence[str]) -> list[int]:
    """Positions of the labelled images in the set, in its order."""
    if not labels.is_dir():
        raise FileNotFoundError(
            f"estimate.labels: no folder {labels}; give one with a mask <id>.png for each labelled "
            "image, or leave it out to draw the images to label"
        )
    there, known = sorted(p.stem for p in labels.glob("*.png")), {n: i for i, n in enumerate(ids)}
    if foreign := [name for name in there if name not in known]:
        raise ValueError(
            f"{labels} holds masks of {len(foreign)} images that are not in the set, such as "
            f"{foreign[0]}.png; a label has the id of its image"
        )
    if not there:
        raise FileNotFoundError(f"estimate.labels: {labels} holds no <id>.png")
    return sorted(known[name] for name in there)


def _sums(mask: np.ndarray, truth: np.ndarray, path: Path, classes: Taxonomy) -> np.ndarray:
    check_values(truth, classes, path)
    if mask.shape != truth.shape:
        raise ValueError(
            f"{path} is {truth.shape[1]}x{truth.shape[0]}, the mask of its image "
            f"{mask.shape[1]}x{mask.shape[0]}"
        )
    return sums(mask, truth, len(classes))


def _told(result: Estimated, classes: Taxonomy) -> dict[str, Any]:
    """What is written: classes by name, nan as null."""
    told = asdict(result)
    names = classes.all_names
    told["classes"] = [names[c] for c in result.classes]
    told["rare"] = {names[c]: n for c, n in result.rare.items()}
    told["correlation"] = None if np.isnan(result.correlation) else result.correlation
    return told


def reliability(agreement: np.ndarray, miou: np.ndarray) -> list[dict[str, float]]:
    """Means of labelled images in bins by their agreement, with equally many in each: where the
    prediction is reliable, ``miou`` rises with ``agreement``."""
    order = np.argsort(agreement, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    return [
        {
            "agreement": float(agreement[part].mean()),
            "miou": float(miou[part].mean()),
            "images": len(part),
        }
        for part in parts
    ]


def print_estimate(folder: str | Path, found: dict[str, Any]) -> None:
    where = Path(folder) / "estimates"
    if "to_label" in found:
        print(
            f"{len(found['to_label'])} images drawn at random to be labelled: "
            f"{where / 'to_label.txt'}. Then: estimate.labels=<folder of <id>.png>"
        )
        return
    kept = {k: v for k, v in found.items() if k in Estimated.__dataclass_fields__}
    result = Estimated(**{**kept, "correlation": found["correlation"] or float("nan")})
    print(
        f"mIoU of {found['masks']}: {result.miou:.1f} [{result.low:.1f}, {result.high:.1f}], from "
        f"{result.labelled} labelled of {result.images} images, if these were drawn at random"
    )
    why = "used" if result.used else "too weak to be used"
    print(
        f"without {found['other']}: {result.plain:.1f} [{result.plain_low:.1f}, "
        f"{result.plain_high:.1f}]; its agreement is correlated by {result.correlation:.2f} with "
        f"what an image adds to the mIoU: {why}"
    )
    if result.rare:
        each = ", ".join(f"{name} ({number})" for name, number in found["rare"].items())
        print(f"left out, in too few of the labelled images: {each}")
    print(label_more(result))
