"""Stage: the photographs that a trained run is least sure of, with its masks as a start, for
annotators' tools."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dd.data import label_studio
from dd.data.datasets import encode_image, encode_mask, read_mask
from dd.data.folders import output_folder
from dd.data.photos import Photos, Picture, Video, batches
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
from dd.taxonomy import IGNORE, Taxonomy, taxonomy_yaml
from dd.training.segmentation import Predictor, predict_fitting

SETTINGS, QUEUE, UNREADABLE, LIST = "review.json", "queue.csv", "unreadable.csv", "train.txt"
ORDERS = ("uncertain", "random")
BATCH_PIXELS = 1 << 22  # of a batch together: probabilities take 4 bytes a pixel and class
LOCAL_FILES = (
    "/data/local-files/?d=images/"  # Label Studio's address of a file below its document root
)


def check(number: int, score: str, order: str, distinct: int | None, seed: int) -> None:
    """ValueError for settings that are not allowed."""
    if type(number) is not int or number < 1:
        raise ValueError(
            f"number={number!r}: expected a whole number of 1 or more, how many images to label"
        )
    for key, value, allowed in (("score", score, SCORES), ("order", order, ORDERS)):
        if value not in allowed:
            raise ValueError(f"{key}={value!r}; allowed: {', '.join(allowed)}")
    if distinct is not None and (type(distinct) is not int or not 0 <= distinct < 64):
        raise ValueError(
            f"distinct={distinct!r}: expected 0 to 63 of 64 bits, or null to take similar images "
            "too"
        )
    if type(seed) is not int:
        raise ValueError(f"seed={seed!r}: expected a whole number")


def review(
    target: str | Path,
    source: Photos | Video,
    predictor: Predictor,
    identity: dict[str, Any],
    classes: Taxonomy,
    number: int = 16,
    score: str = "entropy",
    order: str = "uncertain",
    distinct: int | None = 4,
    seed: int = 0,
    batch_size: int = 16,
    address: str = LOCAL_FILES,
) -> dict[str, Any]:
    """A queue of ``number`` images of ``source`` (:class:`dd.data.photos.Photos`) in the folder
    ``target``; returns {"images", "scored": how many were looked at now, "similar": left out,
    "unreadable": {file: why}, "notes"}.

    ``score``: one of :data:`dd.evaluation.uncertainty.SCORES`. ``order``: ``uncertain``, highest
    score first, ties by name; an image whose look differs in at most ``distinct`` of 64 bits from
    one before it is left out. Or ``random``, drawn by ``seed`` from all that can be read.
    ``predictor`` makes masks and ``probabilities``; ``classes``: its taxonomy. ``review.json`` is
    written first, queue.csv last, index.html shows the queue; an interrupted queue goes on.
    FileExistsError if ``target`` holds another queue, ValueError if no image can be read.
    """
    check(number, score, order, distinct, seed)
    chosen = {
        "number": number,
        "score": score,
        "order": order,
        "distinct": distinct,
        "seed": seed,
        "address": address,
    }
    identity = {
        **identity,
        **chosen,
        "files": sha256("".join(f"{i.file} {i.digest}\n" for i in source.items).encode()),
    }
    cvat.check(_source(Path(target), classes, []), False)
    target = output_folder(target, SETTINGS, identity, "reviews")
    with Lock(target, hint="Choose another folder with output=..."):
        write_json(target / SETTINGS, {"identity": identity, **made_by()})
        unreadable = dict(source.unreadable)
        if order == "random":
            queue, scored = _drawn(target, source, predictor, number, seed, batch_size, unreadable)
            similar = 0
        else:
            records, scored = _scored(
                target, source, source.items, predictor, batch_size, unreadable
            )
            queue, similar = _most(records, score, number, distinct)
        if not queue:
            file, why = next(iter(unreadable.items()))
            raise ValueError(f"none of the {len(unreadable)} images could be read; {file}: {why}")
        items = {item.id: item for item in source.items}
        _write(
            target,
            source,
            [(items[r["id"]], r) for r in queue],
            predictor,
            classes,
            score,
            identity,
            address,
        )
        if unreadable or (target / UNREADABLE).exists():
            write_csv(target / UNREADABLE, [["file", "why"], *unreadable.items()])
        rows = [[r["file"], f"{r[score]:.6f}", rank] for rank, r in enumerate(queue, 1)]
        pictures = [
            (f"{rank}: {r['file']}", f"overlays/{r['id']}.jpg") for rank, r in enumerate(queue, 1)
        ]
        note = f"The run's own masks over the images, in the order of the queue ({score}, {order})."
        colours = legend(classes.all_names, classes.palette)
        write_contact_sheet(target, f"{len(queue)} images to label", note, pictures, colours)
        write_csv(target / QUEUE, [["file", "score", "rank"], *rows])
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
    print(
        f"{found['images']} images to label in {target} ({found['scored']} were scored now; list "
        f"in {QUEUE})"
    )
    print(f"to look at: {Path(target) / NAME}")
    if found["similar"]:
        print(f"{found['similar']} that look like one before them were left out")
    if found["images"] < number:
        why = (
            "the others look like these: distinct=null takes them too"
            if found["similar"]
            else "there are no more images"
        )
        print(f"warning: number={number}, but {why}")
    if found["unreadable"]:
        print(
            f"warning: {len(found['unreadable'])} images could not be read, listed in {UNREADABLE}"
        )


def _scored(
    target: Path,
    source: Photos | Video,
    items: list[Picture],
    predictor: Predictor,
    batch_size: int,
    unreadable: dict[str, Any],
) -> tuple[list[dict[str, Any]], int]:
    """(records of the items that can be read, how many of them are new); what is recorded of the
    same file is kept."""
    records = read_records(target, ("file", "source", "look", *SCORES))
    found = {i.id: records[i.id] for i in items if records.get(i.id, {}).get("source") == i.digest}
    todo, before = [item for item in items if item.id not in found], len(found)
    with Progress("score", len(items), before) as bar:
        for batch in batches(source.read(todo), batch_size, BATCH_PIXELS, unreadable, bar.fail):
            new = [
                _record(*row)
                for row in predict_fitting(predictor.probabilities, batch, unreadable, bar.fail)
            ]
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
    """(the records of highest score, ties by name, how many were left out for their look)."""
    queue, left = [], 0
    for record in sorted(records, key=lambda r: (-r[score], r["file"])):
        if len(queue) == number:
            break
        if distinct is not None and any(
            alike(int(record["look"], 16), int(r["look"], 16)) <= distinct for r in queue
        ):
            left += 1
            continue
        queue.append(record)
    return queue, left


def _drawn(
    target: str | Path,
    source: Photos | Video,
    predictor: Predictor,
    number: int,
    seed: int,
    batch_size: int,
    unreadable: dict[str, Any],
) -> tuple[list[dict[str, Any]], int]:
    """As :func:`_scored`, of ``number`` images in the order of a hash of seed and id: more
    images begin with the same ones."""
    order = sorted(source.items, key=lambda item: sha256(f"{seed}/{item.id}".encode()))
    queue, scored = [], 0
    while order and len(queue) < number:
        some, order = order[: number - len(queue)], order[number - len(queue) :]
        found, new = _scored(target, source, some, predictor, batch_size, unreadable)
        queue, scored = queue + found, scored + new
    return queue, scored


def _write(
    target: Path,
    source: Photos | Video,
    queue: list[tuple[Picture, dict[str, Any]]],
    predictor: Predictor,
    classes: Taxonomy,
    score: str,
    identity: dict[str, Any],
    address: str,
) -> None:
    """Copies of the images, masks, and the files of the tools; what is there stays, edited or
    not."""
    labels, items, tasks = (
        dict(enumerate(classes.names, 1)) | {IGNORE: label_studio.IGNORED},
        [],
        [],
    )
    for rank, (item, record) in enumerate(queue, 1):
        copy, path = target / "images" / item.file, target / "masks" / f"{item.id}.png"
        if not copy.is_file():
            write_atomic(copy, source.files[item.id].read_bytes())
        mask = read_mask(path, classes) if path.is_file() else predictor([_image(source, item)])[0]
        if not path.is_file():
            write_atomic(path, encode_mask(mask, classes.palette))
        shown = overlay(_image(source, item), mask, classes.palette)
        write_atomic(target / "overlays" / f"{item.id}.jpg", encode_image(shown, ".jpg"))
        items.append(ExportItem(item.id, copy, path, mask.shape, tuple(np.unique(mask).tolist())))
        facts = {"rank": rank, "score": round(record[score], 6)}
        tasks.append(
            label_studio.task(
                item.file, mask, labels, identity["weights_sha256"][:12], facts, address
            )
        )
    colours = {
        name: tuple(classes.palette[3 * i : 3 * i + 3]) for i, name in enumerate(classes.names, 1)
    }
    colours[label_studio.IGNORED] = tuple(classes.palette[-3:])
    files = Target(target)
    files.write("taxonomy.yaml", lambda: taxonomy_yaml(classes))
    files.write(LIST, lambda: "".join(f"{item.file}\n" for item, _ in queue))
    files.write("label_studio.json", lambda: label_studio.tasks_text(tasks))
    files.write("label_studio.xml", lambda: label_studio.configuration(colours))
    cvat.write(_source(target, classes, items), files)


def _image(source: Photos | Video, item: Picture) -> np.ndarray:
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
