"""Stage: find the mask settings that fit best. Hundreds are tried on the stored heat of a synthetic
set; nothing is generated."""

import os
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
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
    read_image,
    read_mask,
    stored_heat,
    synthetic_image,
)
from dd.evaluation import metrics
from dd.evaluation.boundary import boundary_counts, boundary_iou
from dd.evaluation.statistics import Score, holm, interval, miou
from dd.evaluation.supervision import LabelSet, behind, declared, label_set
from dd.execution.units import check_read
from dd.masks.from_heat import (
    MaskSettings,
    check_stored,
    count_grid,
    count_mask,
    how_read,
    stored_grid,
    to_mask,
)
from dd.report.chains_page import chain_sections
from dd.report.html import render, write
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

MADE_HERE = ("masks.json", "settings.json")  # in mask sets and predictions of ours
PART = 128  # samples counted by one process together, and kept when a sweep is interrupted
EXAMPLES = 6  # images shown for a chain
Counter: TypeAlias = Callable[[list[Sample]], np.ndarray]
# (sample, heat by source, the mask to compare with, the image or None)
Compared: TypeAlias = tuple[Sample, dict[str, np.ndarray], np.ndarray, Any]


class SweepSettings(Settings):
    """``name``: of the result; a command may leave it out. ``power`` and ``source``: None = all
    that are stored. ``limit``: only the first samples of the plan. ``heat``: a reading of the set
    (:mod:`dd.stages.read_heat`), None = that stored while drawing. ``workers``: processes, None =
    one for each core unless there is little to do; the numbers do not depend on it. ``chains``:
    {name: steps} to compare, None = the paper's alone; each is measured image by image with its
    best setting, against the first one."""

    noun = "sweep"

    name: Name | None
    power: Sequence[Natural] | None
    threshold: Sequence[float]
    band: Sequence[float]
    source: Sequence[str] | None
    limit: Count | None
    workers: Count | None
    heat: Name | None = None
    chains: dict[str, list[dict[str, Any]]] | None = None


def sweep(folder: str | Path, reference: str | Path, settings: SweepSettings) -> dict[str, Any]:
    """Score every combination of settings on the synthetic set ``folder`` against the masks
    ``<reference>/<id>.png`` (exact, human, or a segmenter's predictions); writes
    ``sweeps/<name>.json`` and returns its content. No mask is changed.

    The best setting has the highest mIoU with uncertain pixels counted as background, then the
    fewest uncertain pixels. A finished sweep of the same settings, heat and reference is returned
    as it is, an interrupted one resumes; another one is replaced.
    """
    folder, reference = Path(folder), Path(reference)
    plan, heat = read_plan(folder)[: settings.limit], heat_hashes(folder, settings.heat)
    check_read(folder, plan, heat, settings.heat)
    ranges = settings.power, settings.threshold, settings.band, settings.source
    first = stored_heat(folder, plan[0].id, settings.heat)
    named, left_out = stored_grid(first, *ranges, settings.chains)
    grid = [s for _, s in named]
    for s in grid:  # refuse impossible settings before any work
        choose_source(first, s.source, folder)
        check_stored(first, s)
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
    rows: list[dict[str, Any]] = [
        {
            **({"chain": name} if settings.chains else {}),
            **s.identity(),
            **metrics.with_uncertain(torch.from_numpy(c)),
        }
        for (name, s), c in zip(named, counts, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: (-rows[i]["miou"], rows[i]["uncertain"]))
    table = [rows[i] for i in order]
    compared = {}
    if settings.chains:
        best = {name: grid[i] for i in reversed(order) for name in [named[i][0]]}
        best = {name: best[name] for name in settings.chains}
        seen = Seen(folder, reference, taxonomy, settings.heat)
        compared = {"chains": compare_chains(seen, plan, best)}
    reading = how_read(generator)
    labels, made = _labels(folder, reference, len(plan))
    result = {
        "masks": grid[order[0]].identity(),
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
            **compared,
            "identity": identity,
            **made_by(),
        },
    }
    write_json(path, result)
    shutil.rmtree(parts)
    return result


def _reference_sha256(reference: Path, samples: list[Sample]) -> str:
    """Fingerprint of the masks to compare with; FileNotFoundError names missing ones."""
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
    """(label sets behind the choice, the origin of the reference). Masks without a record of a
    model count as ``number`` labels; for a mask set or a run's predictions, the labels behind
    it."""
    for path in (reference / name for name in MADE_HERE):
        if path.is_file():
            made = read_own(path, IDENTIFIED)
            return behind(made), {"reference": made["identity"]}
    return [label_set(f"{folder.name}/{reference.name}", number)], {}


@dataclass(frozen=True)
class Seen:
    """What masks are compared on: the images of ``folder`` with the heat of a reading
    (``heat_of``), and the masks of ``reference``."""

    folder: Path
    reference: Path
    taxonomy: Taxonomy
    heat_of: str | None = None

    def images(self, samples: list[Sample], pictures: bool) -> Iterator[Compared]:
        """(sample, its heat by source, the mask to compare with, the image if ``pictures``)."""
        foreign = not any((self.reference / name).is_file() for name in MADE_HERE)
        for sample in samples:
            path = self.reference / f"{sample.id}.png"
            check_mask(path)
            truth = read_mask(path, self.taxonomy if foreign else None)
            check_values(truth, self.taxonomy, path)
            picture = synthetic_image(self.folder, sample.id)
            image = read_image(picture) if pictures else None
            height, width = image_size(picture)
            if truth.shape != (height, width):
                raise ValueError(
                    f"{path} is {truth.shape[1]}x{truth.shape[0]}, its image {width}x{height}: a "
                    "reference has the size of the images"
                )
            yield sample, stored_heat(self.folder, sample.id, self.heat_of), truth, image


def compare_chains(
    seen: Seen, samples: list[Sample], chains: dict[str, MaskSettings]
) -> dict[str, dict[str, Any]]:
    """Each chain with its setting, image by image on one thread: ``miou`` (uncertain pixels count
    as background) with its 95 % interval, ``less_first`` [difference to the first chain, low,
    high], ``p`` after Holm's correction, ``boundary_iou``, ``uncertain`` in percent,
    ``milliseconds`` an image, and ``images`` that gained and lost most against the first."""
    classes, threads = len(seen.taxonomy), torch.get_num_threads()
    counts = {name: np.zeros((len(samples), classes, classes + 1), np.int32) for name in chains}
    outlines = {name: np.zeros((classes, 2), np.int64) for name in chains}
    seconds = dict.fromkeys(chains, 0.0)
    torch.set_num_threads(1)
    try:
        with Progress("chains", len(samples)) as progress:
            for n, (sample, heat, truth, image) in enumerate(seen.images(samples, True)):
                for name, chosen in chains.items():
                    started = time.perf_counter()
                    mask = to_mask(heat, sample.class_ids, truth.shape, chosen, image)
                    seconds[name] += time.perf_counter() - started
                    counts[name][n] = count_mask(truth, mask, classes)
                    outlines[name] += boundary_counts(mask, truth, classes)
                progress.advance()
    finally:
        torch.set_num_threads(threads)
    found = {
        name: {
            "settings": chosen.identity(),
            **metrics.with_uncertain(torch.from_numpy(counts[name].sum(0, dtype=np.int64))),
            "boundary_iou": boundary_iou(outlines[name]),
            "milliseconds": round(1000 * seconds[name] / len(samples), 2),
        }
        for name, chosen in chains.items()
    }
    return _against_first(found, {name: shown(each) for name, each in counts.items()}, samples)


def shown(counts_NCU: np.ndarray) -> np.ndarray:
    """Confusions [N, C, C]: uncertain pixels count as background."""
    confusions = counts_NCU[..., :-1].copy()
    confusions[..., 0] += counts_NCU[..., -1]
    return confusions


def _against_first(
    found: dict[str, dict[str, Any]], confusions: dict[str, np.ndarray], samples: list[Sample]
) -> dict[str, dict[str, Any]]:
    scores: dict[str, dict[Hashable, Score]] = {
        name: {0: Score(found[name]["miou"], each)} for name, each in confusions.items()
    }
    first = next(iter(found))
    own = miou(confusions[first])
    pairs = {name: interval(scores[name], scores[first]) for name in found if name != first}
    adjusted = holm({name: pair.p for name, pair in pairs.items() if pair.p is not None})
    for name, row in found.items():
        around = interval(scores[name])
        row["interval"] = [around.low, around.high]
        if name == first:
            continue
        pair = pairs[name]
        row["less_first"], row["p"] = [pair.value, pair.low, pair.high], adjusted.get(name)
        gained = np.argsort(miou(confusions[name]) - own, kind="stable")
        row["gained"] = [samples[i].id for i in gained[::-1][:EXAMPLES]]
        row["lost"] = [samples[i].id for i in gained[:EXAMPLES]]
    return found


def count_samples(
    folder: Path,
    reference: Path,
    settings: list[MaskSettings],
    taxonomy: Taxonomy,
    samples: list[Sample],
    heat_of: str | None = None,
) -> np.ndarray:
    """Summed pixels [S, C, C + 1] (:func:`dd.masks.from_heat.count_grid`) of some samples, on one
    thread, so that it is the same in any process."""
    threads, classes = torch.get_num_threads(), len(taxonomy)
    seen = Seen(folder, reference, taxonomy, heat_of)
    total = np.zeros((len(settings), classes, classes + 1), np.int64)
    refined = any(s.refined for s in settings)
    torch.set_num_threads(1)
    try:
        for sample, heat, truth, image in seen.images(samples, refined):
            total += count_grid(heat, sample.class_ids, truth, settings, classes, image)
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
    # spawn, because a fork would copy torch's threads
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(count, part): n for n, part in todo.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def write_page(path: str | Path, seen: Seen, result: dict[str, Any]) -> Path:
    """Write the page of a sweep that compared chains, with the images on which the best one gained
    and lost most against the first."""
    swept = result["sweep"]
    chains = swept["chains"]
    first = next(iter(chains))
    best = max(chains, key=lambda name: chains[name]["miou"])
    plan = {s.id: s for s in read_plan(seen.folder)}
    two = [MaskSettings(**chains[name]["settings"]) for name in (first, best)]
    galleries = []
    for title in ("gained", "lost") if best != first else ():
        rows = []
        chosen = [plan[i] for i in chains[best][title]]
        for sample, heat, truth, image in seen.images(chosen, True):
            size, ids = truth.shape, sample.class_ids
            masks = [to_mask(heat, ids, size, s, image) for s in two]
            rows.append((", ".join(sample.classes), [image, truth, *masks]))
        galleries.append((f"Where {best} {title} most against {first}", rows))
    sections = chain_sections(swept, galleries)
    return write(path, render("Chains of mask steps", str(seen.folder), sections))


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "chain": lambda row: row["chain"],
    "power": lambda row: str(row.get("power", "-")),
    "threshold": lambda row: f"{row['threshold']:g}" if "threshold" in row else "-",
    "band": lambda row: f"{row['band']:g}" if "band" in row else "-",
    "source": lambda row: row["source"],
    "mIoU": lambda row: f"{row['miou']:.2f}",
    "mIoU without uncertain": lambda row: (
        "-" if row["miou_certain"] is None else f"{row['miou_certain']:.2f}"
    ),
    "uncertain": lambda row: f"{row['uncertain']:.1f} %",
}


def print_best(result: dict[str, Any], number: int = 10) -> None:
    """Print the first rows of a sweep's table."""
    rows, against = result["sweep"]["table"], result["sweep"]["against"]
    table = Table(title=f"{len(rows)} mask settings against {against}")
    columns = {k: text for k, text in COLUMNS.items() if k != "chain" or "chain" in rows[0]}
    for column in columns:
        table.add_column(column, justify="left" if column in ("chain", "source") else "right")
    for row in rows[:number]:
        table.add_row(*(text(row) for text in columns.values()))
    Console().print(table)
