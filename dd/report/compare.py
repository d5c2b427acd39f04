"""Which results may be compared, and how sure a difference is: checks of metrics.json, intervals
paired over runs."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from dd.evaluation import statistics
from dd.evaluation.statistics import LEAST_IMAGES, LEAST_SEEDS, Interval, Score, holm, interval
from dd.report.html import Cell, Section, Table
from dd.report.rows import Row
from dd.store.provenance import differences, fingerprint, read_json, sha256

KEYS = (
    "data",
    "split",
    "masks",
    "num_images",
    "protocol",
    "miou",
    "iou",
    "pixel_accuracy",
    "confusion",
    "weights_sha256",
    "supervision",
    "trained_on",
)
LEVEL = 0.95  # of intervals
EDITED = "it was edited or damaged; remove it and evaluate the run again"


Result = dict[str, Any]  # of a metrics.json
Scores = Mapping[Any, Score]  # {(seed, draw): its score}


def read_metrics(path: str | Path, weights_sha256: str | None = None) -> Result:
    """metrics.json once it has shown that its numbers are those of its confusion matrix, and of the
    images' own where they are stored (they come along as ``images``: {"confusion": uint32 [N, C,
    C], "ids"}).

    ValueError for a file of another version, one that was edited, or one of another checkpoint than
    ``weights_sha256``.
    """
    path, found = Path(path), read_json(path)
    lacking = [k for k in KEYS if k not in found] if isinstance(found, dict) else list(KEYS)
    if lacking:
        raise ValueError(
            f"{path} lacks {', '.join(lacking)}: another version wrote it; remove it and evaluate "
            "the run again"
        )
    if weights_sha256 is not None and found["weights_sha256"] != weights_sha256:
        raise ValueError(
            f"{path} was measured with another checkpoint than the run has now; evaluate the run "
            "again"
        )
    confusion = _checked_confusion(found)
    if confusion is None:
        raise ValueError(
            f"{path}: its mIoU, IoUs and accuracy are not those of its confusion matrix: {EDITED}"
        )
    if "per_image" in found:
        found["images"] = _read_images(path.parent, found, confusion)
    return found


def _checked_confusion(found: Result) -> np.ndarray | None:
    """The confusion matrix, if it is one and the scores are its own."""
    try:
        confusion = np.array(found["confusion"], np.int64)
        square = confusion.shape == (len(found["iou"]),) * 2
        counts = square and confusion.min() >= 0 and confusion.sum() > 0
        return confusion if counts and _same_scores(found, confusion) else None
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None


def _same_scores(found: Result, confusion: np.ndarray) -> bool:
    ious = 100 * statistics.class_shares(confusion)
    given = np.array([np.nan if v is None else v for v in found["iou"].values()], float)
    accuracy = 100 * np.trace(confusion) / confusion.sum()
    pairs = [
        (found["miou"], np.nanmean(ious)),
        (found["pixel_accuracy"], accuracy),
        *zip(given, ious, strict=True),
    ]
    return all(np.isclose(a, b, rtol=0, atol=1e-6, equal_nan=True) for a, b in pairs)


def _read_images(folder: Path, found: Result, confusion: np.ndarray) -> dict[str, Any] | None:
    """The images' own matrices; None if their file is gone."""
    path = folder / "per_image.npz"
    if not path.is_file():
        return None
    if sha256(path) != found["per_image"].get("sha256"):
        raise ValueError(f"{path} is not the file that metrics.json names: {EDITED}")
    with np.load(path, allow_pickle=False) as stored:
        images = {"confusion": stored["confusion"], "ids": stored["ids"].tolist()}
    whole = images["confusion"].sum(0, dtype=np.int64)
    if len(images["ids"]) != found["num_images"] or not np.array_equal(whole, confusion):
        raise ValueError(f"{path} does not add up to metrics.json beside it: {EDITED}")
    return images


def image_miou(images: Mapping[str, Any]) -> dict[str, float]:
    """{id: mIoU of this image alone, over the classes that occur in it}, without images whose
    pixels are all ignored."""
    pairs = zip(images["ids"], 100 * statistics.class_shares(images["confusion"]), strict=True)
    return {i: float(np.nanmean(v)) for i, v in pairs if not np.isnan(v).all()}


def measured_on(result: Result) -> dict[str, Any]:
    """What two results must share to be compared; ``content`` (ids, masks) and ``ids`` are None
    where it does not say."""
    images = result.get("images")
    return {
        "data": result["data"],
        "split": result["split"],
        "masks": result["masks"],
        "images": result["num_images"],
        "classes": list(result["iou"]),
        "masks made with": fingerprint(result.get("masks_made_with"))[:12],
        "ids": images and fingerprint(images["ids"])[:12],
        "content": result.get("content"),
    }


def _lines(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    known = {k for k in one if one[k] is not None and other[k] is not None}
    return differences({k: one[k] for k in known}, {k: other[k] for k in known})


def comparable(
    results: dict[str, Result], baseline: str | None = None
) -> tuple[dict[str, Result], dict[str, str]]:
    """(results that were measured on the same images and classes, {name of another: why it is left
    out}).

    The standard is ``baseline`` where it is among them, else what most results were measured on.
    """
    if not results:
        return {}, {}
    on = {name: measured_on(r) for name, r in results.items()}
    votes = Counter(fingerprint(v) for v in on.values())

    def rank(given: dict[str, Any]) -> tuple[Any, ...]:
        # one with ids, where there is one: without them nothing says that the images are the same
        mark = fingerprint(given)
        return votes[mark], given["ids"] is not None, given["images"], mark

    standard = on[baseline] if baseline in on else max(on.values(), key=rank)
    left_out = {}
    for name, given in on.items():
        if lines := _lines(standard, given):
            shown = "; ".join(line[:200] for line in lines)
            left_out[name] = f"measured on something else than the others: {shown}"
    return {n: r for n, r in results.items() if n not in left_out}, left_out


def comparison(
    title: str, rows: Sequence[Row], data: str, baseline: Row, draws: int = 1000
) -> Section:
    """One row per recipe, the best first: mean mIoU on ``data`` and its difference to the recipe
    ``baseline``, paired over seeds, synthetic draws and test images
    (:func:`dd.evaluation.statistics.interval`).

    Bold: what :attr:`Interval.decides` after Holm's correction over the rows. ValueError if
    ``baseline`` has no score.
    """
    scores = {row.label: found for row in rows if (found := row.scores(data))}
    if baseline.label not in scores:
        raise ValueError(
            f"baseline {baseline.label!r} has no result to compare with on {data}; there are: "
            f"{', '.join(scores)}"
        )
    supervision = {row.label: row.supervision for row in rows}
    means = {label: mean(s.miou for s in found.values()) for label, found in scores.items()}
    pairs = {
        label: paired_interval(found, scores[baseline.label], draws)
        for label, found in scores.items()
        if label != baseline.label
    }
    paired = {label: found for label, found in pairs.items() if found is not None}
    adjusted = holm({label: found.p for label, found in paired.items() if found.p is not None})
    cells: list[list[Cell]] = []
    strong = set()
    for label in sorted(scores, key=lambda name: (-means[name], name)):
        runs = scores[label]
        values = [s.miou for s in runs.values()]
        shown = (means[label], stdev(values)) if len(values) > 1 else means[label]
        own = _interval(interval(runs, draws=draws))
        compared: list[Cell] = ["baseline", None, None, None]
        if label != baseline.label:
            pair = pairs[label]
            compared = _difference(pair, adjusted.get(label))
            if pair is not None and pair.decides and adjusted[label] <= 1 - LEVEL:
                strong.add((len(cells), 5))
        cells.append([label, supervision[label], number_of_runs(runs), shown, own, *compared])
    columns = ["trained on", "supervision", "seeds", "mIoU", "95 % interval"]
    columns += [f"difference to {baseline.label}", "95 % interval of the difference"]
    columns += ["p (Holm)", "pairs"]
    images = next(r["metrics"][data] for row in rows for r in row.runs if data in r["metrics"])
    seeds = max((f.seeds for f in paired.values()), default=0)
    note = (
        f"mIoU in percent on {images['num_images']:,} test images; mean \u00b1 standard deviation "
        "over runs. Intervals count the choice of test images and, with several seeds, the seeds. "
        "A difference is taken between runs of the same seed (and the same synthetic draw) on the "
        "same images: pairs. Bold: the interval leaves out 0, and p, corrected for the number of "
        f"rows (Holm), is at most {1 - LEVEL:.2f}. {undecided(images['num_images'], seeds)}"
    )
    if any(s.per_image is None for runs in scores.values() for s in runs.values()):
        note += (
            " A result without a matrix for each image has no share of the images in its "
            "interval; evaluate the run again."
        )
    bold = frozenset(strong)
    return Table(title, columns, cells, note=note.strip(), bars=("mIoU",), highlight=bold)


def paired_interval(one: Scores, other: Scores, draws: int = 1000) -> Interval | None:
    """The interval of the mean difference of two recipes' scores by (seed, draw); None without a
    pair. A draw of None is that of real images alone, or not known: it goes with every draw of
    its seed."""
    pairs: dict[Hashable, tuple[Score, Score]] = {}
    for (seed, draw), score in one.items():
        partner = other.get((seed, draw), other.get((seed, None)))
        if partner is not None:
            pairs[seed, draw] = score, partner
        elif draw is None:
            pairs |= {(s, d): (score, found) for (s, d), found in other.items() if s == seed}
    if not pairs:
        return None
    first, second = ({k: pair[i] for k, pair in pairs.items()} for i in (0, 1))
    return interval(first, second, draws=draws)


def number_of_runs(keys: Collection[Any]) -> int | str:
    """How many seeds, and how many synthetic draws where there are several, of runs by (seed,
    draw)."""
    seeds, draws = len({s for s, _ in keys}), len({d for _, d in keys})
    return seeds if draws == 1 else f"{seeds} on {draws} draws"


def undecided(images: int | None, seeds: int) -> str:
    """A sentence for tables that rest on too little to decide anything; "" for others."""
    few = (images or 0) < LEAST_IMAGES
    lacking = [f"{images or 0} test image{'s' * (images != 1)}"] * few
    lacking += [f"{seeds} paired seed{'s' * (seeds != 1)}"] * (seeds < LEAST_SEEDS)
    if not lacking:
        return ""
    least = f"it takes {LEAST_IMAGES} test images and {LEAST_SEEDS} seeds"
    return f"This table decides nothing ({least}): {' and '.join(lacking)}."


def _difference(found: Interval | None, p: float | None) -> list[Cell]:
    if found is None:
        return ["no seed in both", None, None, 0]
    shown = p if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"
    return [signed(found.value), _interval(found, signed), shown, found.runs]


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def plain(value: float) -> str:
    return f"{value:.1f}".replace("-", "\N{MINUS SIGN}")


def _interval(found: Interval, text: Callable[[float], str] = plain) -> str | None:
    if found.low is None or found.high is None:
        return None
    return f"{text(found.low)} to {text(found.high)}"
