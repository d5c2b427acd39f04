"""Stage: mIoU of a synthetic set's masks from a few images that people labelled. The agreement of
two mask sets of the same images (two readings, two labelers) predicts which masks are good. It
shortens the interval if it predicts well, and shows which images to look at first."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Gt

from dd.data.datasets import SegmentationFolder, check_mask, check_values, read_mask
from dd.evaluation.few_labels import Estimated, estimate, image_miou, label_more, sums
from dd.store.progress import Progress
from dd.store.provenance import made_by, write_atomic, write_csv, write_json
from dd.store.settings import Count, Hint, Parts, Settings
from dd.taxonomy import Taxonomy

BINS = 5  # of the reliability curve, with equally many labelled images


class EstimateSettings(Settings):
    """``other``: another mask set of the same synthetic set, which predicts (``masks/<name>``).
    ``labels``: a folder of ``<id>.png``, masks by people of a random draw of the images; None draws
    ``draw`` images to be labelled. ``within``: half the interval, in points, for which the number
    of missing labels is given."""

    noun: ClassVar[str] = "estimate"
    other: Annotated[Parts, Hint("a second mask set of the same images, such as masks/after")]
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
    """Write ``<folder>/estimates/<masks>_<other>.json`` and ``.csv`` (every image, the least agreed
    first) and return the content of the first. Without labels, write only ``to_label.txt``, a draw
    that a larger one extends.

    Pixels that are uncertain in ``masks`` count as background; pixels uncertain in ``other`` are
    left out. Labels without a pixel that counts are ignored. FileNotFoundError for missing masks or
    labels; ValueError for masks that were changed, other sizes or classes, labels of images that
    are not in the set, and too few of them; FileExistsError for another draw than the existing
    one.
    """
    folder, ids = Path(folder), masks.ids
    if settings.other == masks.masks:
        raise ValueError(
            f"estimate.other={settings.other} is the mask set itself, which agrees with itself; "
            "give another one (generate.py stage=label mask_set=...)"
        )
    other = SegmentationFolder(folder, masks.split, classes, settings.other)
    where = folder / "estimates"
    if settings.labels is None:
        return {"to_label": _drawn(where / "to_label.txt", ids, settings.draw, seed)}
    labels = Path(settings.labels)
    wanted, predicted = set(_labelled(labels, ids)), []
    true: dict[int, np.ndarray] = {}
    with Progress("masks compared", len(ids)) as progress:
        for i, name in enumerate(ids):
            mask, second = (_mask(s.mask_path(name), classes) for s in (masks, other))
            path = folder / settings.other / f"{name}.png"
            predicted.append(_sums(mask, second, path, len(classes)))
            if i in wanted:
                path = labels / f"{name}.png"
                label = read_mask(path, classes)
                check_values(label, classes, path)
                own = _sums(mask, label, path, len(classes))
                true |= {i: own} if own.any() else {}
            progress.advance()
    agreement = image_miou(np.stack(predicted))
    found: dict[str, Any] = {"masks": masks.masks, "other": settings.other, "images": len(ids)}
    each, chosen = np.array(list(true.values())), list(true)
    result = estimate(each, chosen, np.stack(predicted), settings.within)
    scored = image_miou(each)
    found |= _told(result, classes)
    found["empty"] = len(wanted) - len(true)
    found["reliability"] = reliability(agreement[chosen], scored)
    order = np.argsort(np.nan_to_num(agreement, nan=-1), kind="stable").tolist()
    known = dict(zip(chosen, scored.tolist(), strict=True))
    rows = [[ids[i], _text(agreement[i]), _text(known.get(i))] for i in order]
    target = where / f"{masks.masks}_{settings.other}.json".replace("/", "-")
    where.mkdir(exist_ok=True)
    write_csv(target.with_suffix(".csv"), [["id", "agreement", "miou"], *rows])
    write_json(target, {"estimate": found, **made_by()})
    return found


def _drawn(path: Path, ids: Sequence[str], number: int, seed: int) -> list[str]:
    """``number`` ids at random, in their order, written to ``path``; a larger draw contains a
    smaller one."""
    drawn = {ids[i] for i in np.random.default_rng(seed).permutation(len(ids))[:number].tolist()}
    there = set(path.read_text().split()) if path.is_file() else set()
    if not there <= drawn:
        raise FileExistsError(
            f"{path} holds another draw of {len(there)} images, which may already be labelled. A "
            "larger estimate.draw with the same seed extends it; remove the file to draw again"
        )
    path.parent.mkdir(exist_ok=True)
    listed = [name for name in ids if name in drawn]
    write_atomic(path, "".join(f"{name}\n" for name in listed))
    return listed


def _mask(path: Path, classes: Taxonomy) -> np.ndarray:
    check_mask(path)
    mask = read_mask(path)
    check_values(mask, classes, path)
    return mask


def _text(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.2f}"


def _labelled(labels: Path, ids: Sequence[str]) -> list[int]:
    """Indices of the labelled images in the set, in its order."""
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


def _sums(mask: np.ndarray, truth: np.ndarray, path: Path, number: int) -> np.ndarray:
    if mask.shape != truth.shape:
        raise ValueError(
            f"{path} is {truth.shape[1]}x{truth.shape[0]}, the mask of its image "
            f"{mask.shape[1]}x{mask.shape[0]}"
        )
    return sums(mask, truth, number)


def _told(result: Estimated, classes: Taxonomy) -> dict[str, Any]:
    """The content to write: classes by name, nan as null."""
    told = asdict(result)
    names = classes.all_names
    told["classes"] = [names[c] for c in result.classes]
    told["rare"] = {names[c]: n for c, n in result.rare.items()}
    told["correlation"] = None if np.isnan(result.correlation) else result.correlation
    return told


def reliability(agreement: np.ndarray, miou: np.ndarray) -> list[dict[str, float]]:
    """Means over labelled images in bins by their agreement, equally many in each. Where the
    prediction is reliable, ``miou`` rises with ``agreement``."""
    known = np.flatnonzero(~np.isnan(agreement))
    order = known[np.argsort(agreement[known], kind="stable")]
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
    if found["correlation"] is not None:
        print(
            f"without {found['other']}: {result.plain:.1f} [{result.plain_low:.1f}, "
            f"{result.plain_high:.1f}]; its agreement is correlated by {result.correlation:.2f} "
            f"with what an image adds to the mIoU: {why}"
        )
    if found["empty"]:
        print(f"{found['empty']} labels hold no pixel that counts, and are left out")
    if result.rare:
        each = ", ".join(f"{name} ({number})" for name, number in found["rare"].items())
        print(f"left out, in too few of the labelled images: {each}")
    if result.low == result.high and result.labelled < result.images:
        print("the labelled images do not differ: an interval of width 0 proves nothing")
    else:
        print(label_more(result))
