"""Which results may be compared, and how sure a difference is: checks of metrics.json, paired bootstrap over images."""

from collections import Counter
from pathlib import Path

import numpy as np

from dd.budget import bootstrap
from dd.provenance import differences, fingerprint, read_json, sha256
from dd.report.page import Section, Table

KEYS = ("data", "split", "masks", "num_images", "protocol", "miou", "iou", "pixel_accuracy", "confusion",
        "weights_sha256", "supervision", "trained_on")  # fmt: skip
EDITED = "it was edited or damaged; remove it and evaluate the run again"


def read_metrics(path: str | Path, weights_sha256: str | None = None) -> dict:
    """metrics.json once it has shown that its numbers are those of its confusion matrix, and of the images' own where they are
    stored (they come along as ``images``: {"confusion": uint32 [N, C, C], "ids"}).

    ValueError for a file of another version, one that was edited, or one of another checkpoint than
    ``weights_sha256``.
    """
    path, found = Path(path), read_json(path)
    lacking = [k for k in KEYS if k not in found] if isinstance(found, dict) else list(KEYS)
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: another version wrote it; remove it and evaluate the run again")
    if weights_sha256 is not None and found["weights_sha256"] != weights_sha256:
        raise ValueError(f"{path} was measured with another checkpoint than the run has now; evaluate the run again")
    try:
        confusion = np.array(found["confusion"], np.int64)
        names = list(found["iou"])
        right = confusion.shape == (len(names),) * 2 and confusion.min() >= 0 and confusion.sum() > 0
        right = right and _same_scores(found, confusion)
    except (TypeError, ValueError, AttributeError, OverflowError):
        right = False
    if not right:
        raise ValueError(f"{path}: its mIoU, IoUs and accuracy are not those of its confusion matrix: {EDITED}")
    if "per_image" in found:
        found["images"] = _read_images(path.parent, found["per_image"], confusion, found["num_images"])
    return found


def _same_scores(found: dict, confusion: np.ndarray) -> bool:
    ious = iou(confusion)
    given = np.array([np.nan if v is None else v for v in found["iou"].values()], float)
    accuracy = 100 * np.trace(confusion) / confusion.sum()
    pairs = [(found["miou"], np.nanmean(ious)), (found["pixel_accuracy"], accuracy), *zip(given, ious, strict=True)]
    return all(np.isclose(a, b, rtol=0, atol=1e-6, equal_nan=True) for a, b in pairs)


def _read_images(folder: Path, recorded: dict, confusion: np.ndarray, number: int) -> dict | None:
    """The images' own matrices; None if their file is gone."""
    path = folder / "per_image.npz"
    if not path.is_file():
        return None
    if sha256(path) != recorded.get("sha256"):
        raise ValueError(f"{path} is not the file that metrics.json names: {EDITED}")
    with np.load(path, allow_pickle=False) as stored:
        images = {"confusion": stored["confusion"], "ids": stored["ids"].tolist()}
    if len(images["ids"]) != number or not np.array_equal(images["confusion"].sum(0, dtype=np.int64), confusion):
        raise ValueError(f"{path} does not add up to metrics.json beside it: {EDITED}")
    return images


def iou(confusion: np.ndarray) -> np.ndarray:
    """IoU in percent of each class of matrices [..., C, C]; nan for a class that occurs neither in labels nor predictions."""
    confusion = confusion.astype(float)
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(-1) + confusion.sum(-2) - hit
    return 100 * np.divide(hit, union, out=np.full_like(union, np.nan), where=union > 0)


def image_miou(images: dict) -> dict[str, float]:
    """{id: mIoU of this image alone, over the classes that occur in it}, without images whose pixels are all ignored."""
    values = iou(images["confusion"])
    return {i: float(np.nanmean(v)) for i, v in zip(images["ids"], values, strict=True) if not np.isnan(v).all()}


def measured_on(result: dict) -> dict:
    """What two results must share to be compared; ``content`` (ids, masks) and ``ids`` are None where it does not say."""
    images = result.get("images")
    return {
        "data": result["data"], "split": result["split"], "masks": result["masks"], "images": result["num_images"],
        "classes": list(result["iou"]), "masks made with": fingerprint(result.get("masks_made_with"))[:12],
        "ids": images and fingerprint(images["ids"])[:12], "content": result.get("content"),
    }  # fmt: skip


def _lines(one: dict, other: dict) -> list[str]:
    known = {k for k in one if one[k] is not None and other[k] is not None}
    return differences({k: one[k] for k in known}, {k: other[k] for k in known})


def comparable(results: dict[str, dict], baseline: str | None = None) -> tuple[dict[str, dict], dict[str, str]]:
    """(results that were measured on the same images and classes, {name of another: why it is left out}).

    The standard is ``baseline`` where it is among them, else what most results were measured on.
    """
    if not results:
        return {}, {}
    on = {name: measured_on(r) for name, r in results.items()}
    if baseline in on:
        standard = on[baseline]
    else:  # one with ids, where there is one: without them nothing says that the images are the same
        votes = Counter(fingerprint(v) for v in on.values())
        standard = max(on.values(), key=lambda v: (votes[fingerprint(v)], v["ids"] is not None))
    left_out = {}
    for name, given in on.items():
        if lines := _lines(standard, given):
            left_out[name] = "measured on something else than the others: " + "; ".join(line[:200] for line in lines)
    return {n: r for n, r in results.items() if n not in left_out}, left_out


def comparison(title: str, results: dict[str, dict], baseline: str, draws: int = 1000) -> Section:
    """One row per run, the best first: mIoU and its difference to ``baseline``, with 95 % bootstrap intervals over the images,
    paired.

    ``results``: comparable ones by name. A difference whose interval leaves out 0 is bold. ValueError if ``baseline`` is
    none of them.
    """
    if baseline not in results:
        raise ValueError(f"baseline={baseline!r} has no result to compare with on this data; runs: {', '.join(results)}")
    reference, rows, strong = results[baseline], [], set()
    for name, result in sorted(results.items(), key=lambda pair: -pair[1]["miou"]):
        images = result.get("images")
        own = bootstrap(images["confusion"], draws=draws) if images else None
        row = [name, result["supervision"], result["miou"], _interval(own)]
        if name == baseline:
            rows.append([*row, "baseline", "\u2013"])
            continue
        paired = images and reference.get("images")
        span = bootstrap(images["confusion"], reference["images"]["confusion"], draws=draws) if paired else None
        if span and not span[0] <= 0 <= span[1]:
            strong.add((len(rows), 4))
        rows.append([*row, signed(result["miou"] - reference["miou"]), _interval(span, signed)])
    columns = ["run", "supervision", "mIoU", "95 % interval", f"difference to {baseline}", "95 % interval of the difference"]
    note = (
        "mIoU in percent. Intervals: percentile bootstrap over the test images, 1,000 draws, the same images drawn for both "
        "runs of a difference. They say how much the choice of test images matters, not how much the training seed does. "
        "Bold: the interval leaves out 0."
    )
    if any(not r.get("images") for r in results.values()):
        note += " A dash: this result stores no matrix for each image; evaluate the run again to have an interval."
    return Table(title, columns, rows, note=note, bars=("mIoU",), highlight=frozenset(strong))


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _interval(span, text=lambda v: f"{v:.1f}".replace("-", "\N{MINUS SIGN}")) -> str | None:
    return span and f"{text(span[0])} to {text(span[1])}"
