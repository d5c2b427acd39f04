"""Stage: which mask settings fit best? Hundreds are tried on the stored heat of a synthetic set,
nothing is generated."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dd.data.datasets import (
    check_mask,
    check_values,
    choose_source,
    heat_generator,
    heat_hashes,
    image_size,
    read_mask,
    stored_heat,
    synthetic_image,
)
from dd.evaluation import metrics
from dd.evaluation.supervision import LabelSet, behind, declared, label_set
from dd.execution.units import check_read
from dd.masks.from_heat import MaskSettings, count_grid, how_read, scores, stored_grid
from dd.store.progress import Progress
from dd.store.provenance import (
    differences,
    fingerprint,
    made_by,
    read_own,
    sha256,
    sweep_beside,
    write_atomic,
    write_json,
)
from dd.store.samples import Sample, read_plan
from dd.store.schemas import IDENTIFIED, RUN, SWEPT
from dd.store.settings import Count, Name, Natural, Settings
from dd.taxonomy import Taxonomy

MADE_HERE = ("masks.json", "settings.json")  # of mask sets and predictions of ours
PART = 128  # samples counted by one process in one go, and kept when a sweep is interrupted
Counter: TypeAlias = Callable[[list[Sample]], np.ndarray]


class SweepSettings(Settings):
    """``name``: of the result, which a command may leave out. ``power`` and ``source``: None = all
    that are stored. ``limit``: the first samples of the plan only. ``heat``: a reading of the set
    (:mod:`dd.stages.read_heat`), None = that of its drawing. ``workers``: processes, None = one for
    each core unless there is little to do; the numbers do not depend on it."""

    noun = "sweep"

    name: Name | None
    power: Sequence[Natural] | None
    threshold: Sequence[float]
    band: Sequence[float]
    source: Sequence[str] | None
    limit: Count | None
    workers: Count | None
    heat: Name | None = None


def sweep(folder: str | Path, reference: str | Path, settings: SweepSettings) -> dict[str, Any]:
    """Score every combination of settings on the synthetic set ``folder`` against the masks
    ``<reference>/<id>.png`` (exact, human, or a segmenter's predictions); writes
    ``sweeps/<name>.json`` and returns its content. No mask is touched.

    The best setting has the highest mIoU with uncertain pixels counted as background, then the
    fewest uncertain pixels. A sweep that is there for the same settings, heat and reference is
    returned as it is, an interrupted one goes on; another one is replaced.
    """
    folder, reference = Path(folder), Path(reference)
    plan, heat = read_plan(folder)[: settings.limit], heat_hashes(folder, settings.heat)
    check_read(folder, plan, heat, settings.heat)
    ranges = settings.power, settings.threshold, settings.band, settings.source
    first = stored_heat(folder, plan[0].id, settings.heat)
    grid, left_out = stored_grid(first, *ranges)
    for s in grid:  # impossible ones are refused before any work
        scores(choose_source(first, s.source, folder), s, (1, 1))
    run = read_own(folder / "run.json", RUN)["identity"]
    generator = heat_generator(folder, settings.heat)
    identity = {
        "settings": [s.identity() for s in grid],
        "samples": len(plan),
        "heat": fingerprint([heat[s.id] for s in plan]),
        "reference": _reference_sha256(reference, plan),
        "classes": run["taxonomy"]["names"],
    }
    path = folder / "sweeps" / f"{settings.name}.json"
    there = read_own(path, SWEPT) if path.exists() else {"sweep": {}}
    if not differences(there["sweep"].get("identity", {}), identity):
        return there
    sweep_beside(path)
    parts = path.with_suffix(".parts")
    taxonomy = Taxonomy(run["taxonomy"]["name"], run["taxonomy"]["names"])
    count = partial(count_samples, folder, reference, grid, taxonomy, heat_of=settings.heat)
    counts = _count(count, plan, parts / fingerprint(identity)[:16], settings.workers)
    table: list[dict[str, Any]] = [
        {**s.identity(), **metrics.with_uncertain(torch.from_numpy(c))}
        for s, c in zip(grid, counts, strict=True)
    ]
    table.sort(key=lambda row: (-row["miou"], row["uncertain"]))
    reading = how_read(generator)
    labels, made = _labels(folder, reference, len(plan))
    result = {
        "masks": {k: table[0][k] for k in grid[0].identity()},
        "diffusion": reading,
        "chosen_on": declared(labels),
        "calibration": {
            "by": "sweep",
            **made,
            "reference_sha256": identity["reference"],
            "generator": {"weights_sha256": generator["weights_sha256"], **reading},
        },
        "sweep": {
            "folder": str(folder),
            "against": str(reference),
            "left_out": left_out,
            "table": table,
            "identity": identity,
            **made_by(),
        },
    }
    write_json(path, result)
    shutil.rmtree(parts)
    return result


def _reference_sha256(reference: Path, samples: list[Sample]) -> str:
    """Fingerprint of the masks compared with; FileNotFoundError names those that are not there."""
    if not reference.is_dir():
        raise FileNotFoundError(
            f"sweep.masks: no folder {reference}; give one with a mask <id>.png for each sample"
        )
    paths = [reference / f"{s.id}.png" for s in samples]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{reference} lacks {len(missing)} of {len(paths)} masks, such as "
            f"{', '.join(missing[:5])}; a mask has the id of its sample in plan.jsonl. "
            "sweep.limit=... takes the first samples only"
        )
    return fingerprint([sha256(p) for p in paths])


def _labels(folder: Path, reference: Path, number: int) -> tuple[list[LabelSet], dict[str, Any]]:
    """(label sets behind the choice, how the reference came about): ``number`` masks that nobody
    says a model made, or what is behind a mask set or a run's predictions."""
    for path in (reference / name for name in MADE_HERE):
        if path.is_file():
            made = read_own(path, IDENTIFIED)
            return behind(made), {"reference": made["identity"]}
    return [label_set(f"{folder.name}/{reference.name}", number)], {}


def count_samples(
    folder: Path,
    reference: Path,
    settings: list[MaskSettings],
    taxonomy: Taxonomy,
    samples: list[Sample],
    heat_of: str | None = None,
) -> np.ndarray:
    """Summed pixels [S, C, C + 1] (:func:`dd.masks.from_heat.count_grid`) of some samples, on
    one thread: the same in any process."""
    threads, classes = torch.get_num_threads(), len(taxonomy)
    foreign = not any((reference / name).is_file() for name in MADE_HERE)
    total = np.zeros((len(settings), classes, classes + 1), np.int64)
    torch.set_num_threads(1)
    try:
        for sample in samples:
            path = reference / f"{sample.id}.png"
            check_mask(path)
            truth = read_mask(path, taxonomy if foreign else None)
            check_values(truth, taxonomy, path)
            height, width = image_size(synthetic_image(folder, sample.id))
            if truth.shape != (height, width):
                raise ValueError(
                    f"{path} is {truth.shape[1]}x{truth.shape[0]}, its image {width}x{height}: a "
                    "reference has the size of the images"
                )
            heat = stored_heat(folder, sample.id, heat_of)
            total += count_grid(heat, sample.class_ids, truth, settings, classes)
    finally:
        torch.set_num_threads(threads)
    return total


def _count(count: Counter, samples: list[Sample], kept: Path, workers: int | None) -> np.ndarray:
    """Sum of ``count(part)`` over parts of the samples; each part's result is kept as
    ``<kept>/<number>.npy``."""
    parts = [samples[i : i + PART] for i in range(0, len(samples), PART)]
    todo = {n: p for n, p in enumerate(parts) if not (kept / f"{n}.npy").is_file()}
    workers = min(workers or min(os.cpu_count() or 1, len(todo) // 4), len(todo))
    with Progress("sweep", len(parts), len(parts) - len(todo), unit="parts") as progress:
        for number, counts in _results(count, todo, workers):
            buffer = BytesIO()
            np.save(buffer, counts)
            write_atomic(kept / f"{number}.npy", buffer.getvalue())
            progress.advance()
    return sum(np.load(kept / f"{n}.npy") for n in range(len(parts)))


def _results(
    count: Counter, todo: dict[int, list[Sample]], workers: int
) -> Iterator[tuple[int, np.ndarray]]:
    if workers <= 1:
        yield from ((n, count(part)) for n, part in todo.items())
        return
    # a fork would copy torch's threads
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(count, part): n for n, part in todo.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "power": lambda row: str(row["power"]),
    "threshold": lambda row: f"{row['threshold']:g}",
    "band": lambda row: f"{row['band']:g}",
    "source": lambda row: row["source"],
    "mIoU": lambda row: f"{row['miou']:.2f}",
    "mIoU without uncertain": lambda row: (
        "-" if row["miou_certain"] is None else f"{row['miou_certain']:.2f}"
    ),
    "uncertain": lambda row: f"{row['uncertain']:.1f} %",
}


def print_best(result: dict[str, Any], number: int = 10) -> None:
    """The first rows of a sweep's table."""
    rows, against = result["sweep"]["table"], result["sweep"]["against"]
    table = Table(title=f"{len(rows)} mask settings against {against}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "source" else "right")
    for row in rows[:number]:
        table.add_row(*(text(row) for text in COLUMNS.values()))
    Console().print(table)
