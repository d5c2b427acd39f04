"""Stage: stored heat maps -> a mask set. Cheap: another threshold or power never runs the
generator."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from dd.data.datasets import (
    choose_source,
    encode_image,
    encode_mask,
    heat_generator,
    heat_hashes,
    heat_root,
    image_size,
    read_image,
    read_mask,
    stored_heat,
    synthetic_image,
)
from dd.evaluation.supervision import LabelSet, merged
from dd.execution.units import check_read, read_run
from dd.exports.card import BIASES, adapter, used_labels
from dd.masks.chain import WORDS
from dd.masks.from_heat import MaskSettings, check_stored, decide, how_read, scored
from dd.report.pictures import colour_mask, contact_sheet, overlay
from dd.report.pictures import heat as coloured_heat
from dd.store.names import folder_name
from dd.store.provenance import (
    differences,
    fingerprint,
    read_own,
    sha256,
    sweep,
    write_atomic,
    write_json,
)
from dd.store.samples import Sample, outcomes, read_plan
from dd.store.schemas import MASKS, READ, RUN
from dd.store.templates import fill
from dd.taxonomy import IGNORE, voc_palette

TEMPLATE = Path(__file__).parent / "templates" / "data_card.md.j2"
DEFAULT_SET = "SegmentationClass"
TOGETHER = 1024  # masks that wait for a thread
Result = TypeVar("Result")
Maps: TypeAlias = dict[str, np.ndarray]  # [K, P, r, r] by source
Heat: TypeAlias = Callable[[Sample], Maps]


def read_sources(
    folder: str | Path, settings: MaskSettings, reading: str | None, sample: Sample
) -> Maps:
    """Stored heat of a sample by source, only of the sources that ``settings`` read."""
    stored = stored_heat(folder, sample.id, reading)
    if settings.source in settings.sources:
        choose_source(stored, settings.source, folder)
    check_stored(stored, settings)
    return {name: stored[name] for name in settings.sources}


def label(
    folder: str | Path,
    settings: MaskSettings,
    mask_set: str | None = None,
    calibration: dict[str, Any] | None = None,
    absent: dict[str, Any] | None = None,
    workers: int | None = None,
    chosen_on: Iterable[LabelSet] = (),
    reading: str | None = None,
) -> Path:
    """Write the masks of every generated sample to ``SegmentationClass`` or ``masks/<mask_set>``;
    returns that folder.

    ``masks.json`` comes last and holds settings, the heat's fingerprint and each mask's hash. A
    complete set with the same settings and heat is left alone; one with others is made again. The
    default set also renews the data card. ``calibration``: how ``settings`` were chosen (by images,
    by a run); ValueError if for attention that was read in another way than this set's.
    ``chosen_on``: the labels that chose them (:mod:`dd.evaluation.supervision`). These, and those
    behind the images and the reading, are recorded beside the identity, since they decide no pixel;
    the last call's record is kept. ``reading``: the heat to use (:mod:`dd.stages.read_heat`), None
    = that stored while drawing. ``absent``: {"rules", "classes": {sample id: names}} of
    :func:`dd.stages.filter.find_absent`; these classes are not drawn. ``workers``: threads, None =
    one for each core.

    A class whose map is flat at this power and source has no pixel. ``vanished`` in masks.json
    names these, {sample id: names}, and their number is printed.
    """
    folder = Path(folder)
    plan, hashes = read_plan(folder), heat_hashes(folder, reading)
    check_read(folder, plan, hashes, reading)
    target = _place(folder, mask_set)
    identity = {"settings": settings.identity(), "heat": fingerprint([hashes[s.id] for s in plan])}
    if reading is not None:
        identity["reading"] = reading
    if calibration is not None:
        check_calibration(calibration, heat_generator(folder, reading))
        identity["calibration"] = calibration
    if absent is not None:
        identity["absent"] = {"rules": absent["rules"], "classes": fingerprint(absent["classes"])}
    run, read = (
        read_own(folder / "run.json", RUN),
        read_own(heat_root(folder, reading) / "run.json", READ),
    )
    chosen = merged(run.get("chosen_on"), read.get("chosen_on"), chosen_on)
    done = target / "masks.json"
    heat = partial(read_sources, folder, settings, reading)
    if done.exists():
        there = read_own(done, MASKS)
        if not differences(there["identity"], identity):
            if there.get("chosen_on") != chosen:
                _record(folder, target, {**there, "chosen_on": chosen}, plan, settings, heat)
            return target
        # refuse impossible settings before changing anything
        heat(plan[0])
        done.unlink()
    sweep(target)
    beside = {"absent": absent["classes"]} if absent else {}
    made, vanished = _make(folder, target, plan, settings, heat, beside.get("absent", {}), workers)
    beside |= {"vanished": vanished} if vanished else {}
    content = {"identity": identity, "chosen_on": chosen, **made, **beside}
    _record(folder, target, content, plan, settings, heat)
    if vanished:
        power = f"power {settings.power}" if settings.one_power else "the powers"
        print(
            f"warning: {sum(map(len, vanished.values()))} classes of {len(vanished)} samples show "
            f"nothing at {power} of {settings.source} and have no pixel ({done}: vanished)"
        )
    return target


def _place(folder: Path, mask_set: str | None) -> Path:
    """The folder of a mask set; FileExistsError for one of self-training."""
    target = folder / DEFAULT_SET
    if mask_set not in (None, DEFAULT_SET):
        target = folder / "masks" / folder_name(mask_set, "mask_set")
    if (target / "settings.json").is_file():
        raise FileExistsError(
            f"{target} holds the masks of self-training, costly to make; choose another "
            "mask_set=..."
        )
    return target


def _record(
    folder: Path,
    target: Path,
    content: dict[str, Any],
    plan: list[Sample],
    settings: MaskSettings,
    heat: Heat,
) -> None:
    """Write masks.json and, for the default set, the data card."""
    write_json(target / "masks.json", content)
    if target.name == DEFAULT_SET:
        _write_card(folder, content, plan, settings, heat)


def _make(
    folder: Path,
    target: Path,
    plan: list[Sample],
    settings: MaskSettings,
    heat: Heat,
    absent: dict[str, list[str]],
    workers: int | None,
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Write the masks; returns (their ``pixels`` and ``sha256``, {id: classes without a pixel})."""

    def write(sample: Sample) -> tuple[str, np.ndarray, list[str]]:
        path = synthetic_image(folder, sample.id)
        image = read_image(path) if settings.refined else None
        size = image_size(path) if image is None else image.shape[:2]
        hidden = absent.get(sample.id, ())
        mask, gone = _mask(heat(sample), sample, hidden, size, settings, image)
        data = encode_mask(mask)
        write_atomic(target / f"{sample.id}.png", data)
        return sha256(data), np.bincount(mask.ravel(), minlength=256), gone

    counts = np.zeros(256, np.int64)
    hashes: dict[str, str] = {}
    vanished: dict[str, list[str]] = {}
    for sample, (written, own, gone) in zip(plan, _threaded(write, plan, workers), strict=True):
        hashes[sample.id] = written
        counts += own
        vanished |= {sample.id: gone} if gone else {}
    pixels = {str(value): int(counts[value]) for value in np.flatnonzero(counts)}
    return {"pixels": pixels, "sha256": hashes}, vanished


def _threaded(
    work: Callable[[Sample], Result], items: list[Sample], workers: int | None
) -> Iterator[Result]:
    """``work`` of each item in order, in threads that each use one thread for tensors."""
    workers, threads = workers or os.cpu_count() or 1, torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for first in range(0, len(items), TOGETHER):  # a set may have a million
                yield from pool.map(work, items[first : first + TOGETHER])
    finally:
        torch.set_num_threads(threads)


def _mask(
    heat: Maps,
    sample: Sample,
    absent: Collection[str],
    size: tuple[int, ...],
    settings: MaskSettings,
    image: np.ndarray | None,
) -> tuple[np.ndarray, list[str]]:
    """(mask, the drawn classes whose map is flat)."""
    drawn = [k for k, name in enumerate(sample.classes) if name not in absent]
    if not drawn:
        return np.zeros(size, np.uint8), []
    own = {s: maps if s == WORDS else maps[drawn] for s, maps in heat.items()}
    found = scored(own, settings, (size[0], size[1]), image)
    mask = decide(found, [sample.class_ids[k] for k in drawn])
    gone = zip(drawn, found.nothing, strict=True)
    return mask, [sample.classes[k] for k, nothing in gone if nothing]


def check_calibration(calibration: dict[str, Any], generator: dict[str, Any]) -> None:
    """ValueError if mask settings were chosen for other attention than that of ``generator``, an
    identity as in run.json."""
    theirs = calibration["generator"]
    known = {**generator, **how_read(generator)}
    lines = differences({k: known.get(k) for k in theirs}, theirs)
    if lines:
        raise ValueError(
            "the mask settings of masks_from were chosen for other attention (this generator -> "
            "theirs):\n  "
            + "\n  ".join(lines)
            + "\nUse the generator they were chosen for (masks_from sets how its attention is "
            "read; an older set keeps its own, so take another name=...), or choose settings again"
        )


def _write_card(
    folder: Path,
    masks: dict[str, Any],
    plan: list[Sample],
    settings: MaskSettings,
    heat: Heat,
) -> None:
    """Write README.md and a picture: what is in the data set, how it was made, its limits.
    ``masks``: masks.json."""
    rows = [_row(folder, sample, settings, heat) for sample in plan[:8]]
    sheet = contact_sheet(rows, scale=max(1, 128 // rows[0][0].shape[0]))
    write_atomic(folder / "card.png", encode_image(sheet, ".png"))
    run, pixels = read_run(folder), {int(v): n for v, n in masks["pixels"].items()}
    reading = masks["identity"].get("reading")
    generator, names = run["identity"]["generator"], run["identity"]["taxonomy"]["names"]
    total, asked = sum(pixels.values()), Counter(name for s in plan for name in s.classes)
    asked["background"] = len(plan)
    classes = [
        (name, asked[name], 100 * pixels.get(i, 0) / total)
        for i, name in enumerate(["background", *names])
    ]
    found = Counter(outcomes(folder).values())
    text = fill(
        TEMPLATE,
        images=len(plan),
        labels=used_labels(masks["chosen_on"]),
        classes=classes,
        uncertain=100 * pixels.get(IGNORE, 0) / total,
        generator=generator,
        reader=heat_generator(folder, reading) if reading else None,
        again=found["drawn again"],
        left_out=found["failed"] + found["quarantined"],
        lora=adapter(generator),
        settings=settings,
        not_drawn=sum(map(len, masks.get("absent", {}).values())),
        run=run,
        terms={"licence": None, "link": None, **(run.get("terms") or {})},
        biases=BIASES,
    )
    write_atomic(folder / "README.md", text)


def _row(folder: Path, sample: Sample, settings: MaskSettings, heat: Heat) -> list[np.ndarray]:
    """An image, the heat of its first class, its mask, and the mask over the image."""
    image, palette = read_image(synthetic_image(folder, sample.id)), voc_palette()
    maps = heat(sample)[settings.sources[0]]
    mask = read_mask(folder / DEFAULT_SET / f"{sample.id}.png")
    strongest = maps[0, min(settings.power, maps.shape[1] - 1) if settings.one_power else 0]
    seen = coloured_heat(image, strongest)
    return [image, seen, colour_mask(mask, palette), overlay(image, mask, palette)]
