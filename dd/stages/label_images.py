"""Stage: a labeler of :mod:`dd.labelers` makes a mask set of a synthetic set's images."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dd.data.datasets import (
    choose_source,
    heat_hashes,
    heat_root,
    read_image,
    stored_heat,
    synthetic_image,
)
from dd.evaluation.supervision import LabelSet, merged
from dd.execution.units import check_generated, check_read, read_run
from dd.labelers.base import Asked, Images, Labeler, Labelled, Ready
from dd.labelers.writing import Batches, write_set
from dd.store.names import folder_name
from dd.store.provenance import fingerprint, read_own, versions
from dd.store.samples import Sample, read_plan, recorded
from dd.store.schemas import READ
from dd.taxonomy import Taxonomy

SHOWN = 5  # samples with missing classes to name


def label_images(
    folder: str | Path,
    labeler: Labeler,
    mask_set: str,
    reading: str | None = None,
    chosen_on: Iterable[LabelSet] = (),
) -> Path:
    """Write a labeler's masks of every sample of the synthetic set ``folder`` to
    ``masks/<mask_set>``; returns that folder.

    ``masks.json`` comes last, with the labeler, its supervision class and the real labels behind
    the masks. An interrupted set resumes, a finished one is left alone. ``reading``: the heat to
    read, None = that stored while drawing; ``chosen_on``: labels that chose the labeler's settings.
    FileExistsError for a set of another labeler, settings or images, which is not changed.
    """
    folder = Path(folder)
    target = folder / "masks" / _new_set(mask_set)
    run, images = read_run(folder), _images(folder)
    heat = _heat(labeler, images, reading)
    ready = labeler.ready(images)
    identity = {
        "settings": ready.settings,
        "images": images.content,
        **heat,
        "labeler": {"name": labeler.name, "supervision": ready.supervision, **ready.identity},
    }
    read = read_own(heat_root(folder, reading) / "run.json", READ) if heat else {}
    behind = (run.get("chosen_on"), read.get("chosen_on"), ready.chosen_on, chosen_on)
    head = {
        "identity": identity,
        "chosen_on": merged(*behind),
        "made": {**ready.made, "versions": versions()},
    }
    ids, look = [s.id for s in images.plan], partial(_look, labeler, ready, images, reading)
    what = f"label {folder.name} by {labeler.name}"
    _tell(images.plan, write_set(target, head, ids, labeler.batch_size, look, what), target)
    return target


def _new_set(mask_set: str) -> str:
    if mask_set == "SegmentationClass":
        raise ValueError(
            f"mask_set={mask_set!r}: expected the name of a set in masks, such as sam3; masks of "
            "attention stay"
        )
    return folder_name(mask_set, "mask_set")


def _images(folder: Path) -> Images:
    plan, hashes = read_plan(folder), recorded(folder, "image_sha256")
    check_generated(folder, plan, hashes)
    classes = read_run(folder)["identity"]["taxonomy"]
    taxonomy = Taxonomy(classes["name"], classes["names"])
    return Images(folder, taxonomy, plan, fingerprint([hashes[s.id] for s in plan]))


def _heat(labeler: Labeler, images: Images, reading: str | None) -> dict[str, Any]:
    """The identity's part on the heat that a labeler reads; ValueError if it is not there."""
    if labeler.reads is None:
        return {}
    folder, power_source = images.folder, labeler.reads
    hashes = heat_hashes(folder, reading)
    check_read(folder, images.plan, hashes, reading)
    _maps(folder, reading, power_source, images.plan[0])  # fails before anything is written
    found = {"heat": fingerprint([hashes[s.id] for s in images.plan])}
    return found if reading is None else {**found, "reading": reading}


def _maps(folder: Path, reading: str | None, reads: tuple[int, str], sample: Sample) -> Any:
    """Heat float64 [K, r, r] of a sample's classes."""
    power, source = reads
    maps_KPrr = choose_source(stored_heat(folder, sample.id, reading), source, folder)
    if power >= maps_KPrr.shape[1]:
        raise ValueError(
            f"labeler.power={power} is not stored in {folder}, powers 0 to "
            f"{maps_KPrr.shape[1] - 1} are"
        )
    return maps_KPrr[:, power]


def _look(
    labeler: Labeler, ready: Ready, images: Images, reading: str | None, batches: Batches
) -> Iterator[list[Labelled]]:
    samples = {s.id: s for s in images.plan}
    for names in batches:
        batch = []
        for sample in map(samples.__getitem__, names):
            heat = None
            if labeler.reads is not None:
                heat = _maps(images.folder, reading, labeler.reads, sample)
            batch.append(Asked(read_image(synthetic_image(images.folder, sample.id)), sample, heat))
        yield ready.label(batch)


def _tell(plan: list[Sample], records: dict[str, dict[str, Any]], target: Path) -> None:
    """Print which classes that were asked for have no pixel, and the counts of a new set."""
    if not records:
        return
    lacking = {
        s.id: names
        for s in plan
        if (names := [c for c, i in zip(s.classes, s.class_ids, strict=True)
                      if str(i) not in records[s.id]["pixels"]])
    }  # fmt: skip
    if lacking:
        first = "; ".join(f"{i}: {', '.join(names)}" for i, names in list(lacking.items())[:SHOWN])
        print(
            f"warning: {sum(map(len, lacking.values()))} classes of {len(lacking)} samples have no "
            f"pixel in {target} ({first}{'; ...' if len(lacking) > SHOWN else ''})"
        )
    for what in sorted({key for r in records.values() for key in r.get("counts", {})}):
        counts = [r.get("counts", {}).get(what, 0) for r in records.values()]
        if sum(counts):
            print(f"{what}: {sum(counts)} pixels of {sum(map(bool, counts))} images")
