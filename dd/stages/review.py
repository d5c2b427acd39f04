"""Stage: the photographs that a trained run is least sure of, with its masks as a start, for
annotation tools."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Le

from dd.data import label_studio
from dd.data.datasets import encode_image, encode_mask, read_mask
from dd.data.folders import output_folder
from dd.data.photos import Photos, Picture, batches
from dd.evaluation.uncertainty import SCORES, alike, look
from dd.exports import cvat
from dd.exports.source import ExportItem, Source
from dd.exports.target import Target
from dd.report.contact_sheet import NAME, write_contact_sheet
from dd.report.pictures import legend, overlay
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.provenance import made_by, sha256, write_atomic, write_csv, write_json
from dd.store.samples import append_records, read_records
from dd.store.settings import Count, Hint, Settings
from dd.taxonomy import IGNORE, Taxonomy, taxonomy_yaml
from dd.training.segmentation import Predictor, predict_fitting

SETTINGS, QUEUE, UNREADABLE, LIST = "review.json", "queue.csv", "unreadable.csv", "train.txt"
BATCH_PIXELS = 1 << 22  # limit of a batch: probabilities take 4 bytes a pixel and class


class ReviewSettings(Settings):
    """``number`` of images to label. ``order``: ``uncertain`` takes the highest ``score`` (of
    :data:`dd.evaluation.uncertainty.SCORES`) first, ties by name, and skips an image whose look
    differs in at most ``distinct`` of 64 bits from an earlier one (None skips none); ``random``
    draws from all that can be read. ``address``: prefix of a file in Label Studio's tasks."""

    noun: ClassVar[str] = "review"
    number: Annotated[Count, Hint("how many images to label")]
    score: Literal["entropy", "margin"]
    order: Literal["uncertain", "random"]
    distinct: Annotated[
        Annotated[int, Ge(0), Le(63)] | None, Hint("of 64 bits; null takes similar images too")
    ]
    address: str


def review(
    target: str | Path,
    source: Photos,
    predictor: Predictor,
    identity: dict[str, Any],
    classes: Taxonomy,
    settings: ReviewSettings,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, Any]:
    """A queue of images of ``source`` in the folder ``target``. Returns {"images", "scored": how
    many were scored now, "similar": how many were skipped, "unreadable": {file: why}, "notes"}.

    ``predictor`` makes masks and ``probabilities``; ``classes``: its taxonomy; ``seed`` draws a
    random order. ``review.json`` is written first, queue.csv last; index.html shows the queue. An
    interrupted queue resumes. FileExistsError if ``target`` holds another queue, ValueError if no
    image can be read.
    """
    number, score = settings.number, settings.score
    identity = {
        **identity,
        **dict(settings),
        "seed": seed,
        "files": sha256("".join(f"{i.file} {i.digest}\n" for i in source.items).encode()),
    }
    cvat.check(_source(Path(target), classes, []), False)
    target = output_folder(target, SETTINGS, identity, "reviews")
    with Lock(target, hint="Choose another folder with output=..."):
        write_json(target / SETTINGS, {"identity": identity, **made_by()})
        unreadable = dict(source.unreadable)
        scoring = Scoring(target, source, predictor, batch_size, unreadable)
        if settings.order == "random":
            queue, scored = _drawn(scoring, number, seed)
            similar = 0
        else:
            records, scored = _scored(scoring, source.items)
            queue, similar = _most(records, score, number, settings.distinct)
        if not queue:
            file, why = next(iter(unreadable.items()))
            raise ValueError(f"none of the {len(unreadable)} images could be read; {file}: {why}")
        items = {item.id: item for item in source.items}
        rows = [(items[r["id"]], r) for r in queue]
        _write(scoring, rows, classes, settings, identity["weights_sha256"])
        if unreadable or (target / UNREADABLE).exists():
            write_csv(target / UNREADABLE, [["file", "why"], *unreadable.items()])
        pictures = [
            (f"{rank}: {r['file']}", f"overlays/{r['id']}.jpg") for rank, r in enumerate(queue, 1)
        ]
        how = f"{score}, {settings.order}"
        note = f"The run's own masks over the images, in the order of the queue ({how})."
        colours = legend(classes.all_names, classes.palette)
        write_contact_sheet(target, f"{len(queue)} images to label", note, pictures, colours)
        listed = [[r["file"], f"{r[score]:.6f}", rank] for rank, r in enumerate(queue, 1)]
        write_csv(target / QUEUE, [["file", "score", "rank"], *listed])
    return {
        "images": len(queue),
        "scored": scored,
        "similar": similar,
        "unreadable": unreadable,
        "notes": source.notes,
    }


def print_review(target: str | Path, found: dict[str, Any], number: int) -> None:
    for note in found["notes"]:
        print(f"warning: {note}")
    scored = f"{found['scored']} were scored now"
    print(f"{found['images']} images to label in {target} ({scored}; list in {QUEUE})")
    print(f"to look at: {Path(target) / NAME}")
    if found["similar"]:
        print(f"{found['similar']} that look like one before them were left out")
    if found["images"] < number:
        look_alike = "the others look like these: distinct=null takes them too"
        why = look_alike if found["similar"] else "there are no more images"
        print(f"warning: number={number}, but {why}")
    if bad := len(found["unreadable"]):
        print(f"warning: {bad} images could not be read, listed in {UNREADABLE}")


@dataclass(frozen=True)
class Scoring:
    """What scores images, and where; ``unreadable`` {file: why} is filled."""

    target: Path
    source: Photos
    predictor: Predictor
    batch_size: int
    unreadable: dict[str, str]


def _scored(scoring: Scoring, items: list[Picture]) -> tuple[list[dict[str, Any]], int]:
    """(records of the items that can be read, how many of them are new); existing records of the
    same file are kept."""
    target, bad = scoring.target, scoring.unreadable
    records = read_records(target, ("file", "source", "look", *SCORES))
    found = {i.id: records[i.id] for i in items if records.get(i.id, {}).get("source") == i.digest}
    todo, before = [item for item in items if item.id not in found], len(found)
    look = scoring.predictor.probabilities
    with Progress("score", len(items), before) as bar:
        read = scoring.source.read(todo)
        for batch in batches(read, scoring.batch_size, BATCH_PIXELS, bad, bar.fail):
            new = [_record(*row) for row in predict_fitting(look, batch, bad, bar.fail)]
            append_records(target, "0", new)
            found |= {r["id"]: r for r in new}
            bar.advance(len(new))
    return [found[i.id] for i in items if i.id in found], len(found) - before


def _record(item: Picture, image: np.ndarray, probabilities: torch.Tensor) -> dict[str, Any]:
    scores = {name: of(probabilities) for name, of in SCORES.items()}
    return {
        "id": item.id,
        "file": item.file,
        "source": item.digest,
        "look": f"{look(image):016x}",
        **scores,
    }


def _most(
    records: list[dict[str, Any]], score: str, number: int, distinct: int | None
) -> tuple[list[dict[str, Any]], int]:
    """(the records with the highest scores, ties by name; how many were skipped as similar)."""
    queue: list[dict[str, Any]] = []
    left = 0
    for record in sorted(records, key=lambda r: (-r[score], r["file"])):
        if len(queue) == number:
            break
        differ = (alike(int(record["look"], 16), int(r["look"], 16)) for r in queue)
        if distinct is not None and any(bits <= distinct for bits in differ):
            left += 1
            continue
        queue.append(record)
    return queue, left


def _drawn(scoring: Scoring, number: int, seed: int) -> tuple[list[dict[str, Any]], int]:
    """Like :func:`_scored`, for ``number`` images in the order of a hash of seed and id: a larger
    number starts with the same images."""
    items = scoring.source.items
    order = sorted(items, key=lambda item: sha256(f"{seed}/{item.id}".encode()))
    queue: list[dict[str, Any]] = []
    scored = 0
    while order and len(queue) < number:
        some, order = order[: number - len(queue)], order[number - len(queue) :]
        found, new = _scored(scoring, some)
        queue, scored = queue + found, scored + new
    return queue, scored


def _write(
    scoring: Scoring,
    queue: list[tuple[Picture, dict[str, Any]]],
    classes: Taxonomy,
    settings: ReviewSettings,
    weights_sha256: str,
) -> None:
    """Write copies of the images, masks, and the files of the tools. Existing files stay, edited or
    not."""
    labels = dict(enumerate(classes.names, 1)) | {IGNORE: label_studio.IGNORED}
    target, source, palette = scoring.target, scoring.source, classes.palette
    items, tasks = [], []
    for rank, (item, record) in enumerate(queue, 1):
        copy, path = target / "images" / item.file, target / "masks" / f"{item.id}.png"
        if not copy.is_file():
            write_atomic(copy, source.files[item.id].read_bytes())
        image = _image(source, item)
        mask = read_mask(path, classes) if path.is_file() else scoring.predictor([image])[0]
        if not path.is_file():
            write_atomic(path, encode_mask(mask, palette))
        shown = encode_image(overlay(image, mask, palette), ".jpg")
        write_atomic(target / "overlays" / f"{item.id}.jpg", shown)
        items.append(ExportItem(item.id, copy, path, mask.shape, tuple(np.unique(mask).tolist())))
        facts = {"rank": rank, "score": round(record[settings.score], 6)}
        about = (weights_sha256[:12], facts, settings.address)
        tasks.append(label_studio.task(item.file, mask, labels, *about))
    places = {n: i for i, n in enumerate(classes.names, 1)} | {label_studio.IGNORED: IGNORE}
    r, g, b = palette[::3], palette[1::3], palette[2::3]
    colours = {name: (r[i], g[i], b[i]) for name, i in places.items()}
    files = Target(target)
    files.write("taxonomy.yaml", lambda: taxonomy_yaml(classes))
    files.write(LIST, lambda: "".join(f"{item.file}\n" for item, _ in queue))
    files.write("label_studio.json", lambda: label_studio.tasks_text(tasks))
    files.write("label_studio.xml", lambda: label_studio.configuration(colours))
    cvat.write(_source(target, classes, items), files)


def _image(source: Photos, item: Picture) -> np.ndarray:
    [(_, image)] = source.read([item])
    if isinstance(image, Exception):
        raise ValueError(f"{item.file} could be read before and cannot now: {image}")
    return image


def _source(target: Path, classes: Taxonomy, items: list[ExportItem]) -> Source:
    return Source(
        target.name,
        classes,
        {"default": [i.id for i in items]},
        {i.id: i for i in items},
        {},
        {},
        {},
    )
