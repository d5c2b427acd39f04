"""Stage: which mask settings fit best? Hundreds are tried on the stored heat of a synthetic set,
nothing is generated."""

import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from dd.data.datasets import (
    check_mask,
    check_values,
    choose_source,
    read_mask,
    stored_heat,
    synthetic_image,
)
from dd.evaluation import metrics
from dd.evaluation.supervision import behind, declared, label_set
from dd.masks.threshold import READING, MaskSettings, count_grid, scores, settings_grid
from dd.store.names import folder_name
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
from dd.store.samples import read_plan, read_records
from dd.store.schemas import IDENTIFIED, RUN, SWEPT
from dd.taxonomy import Taxonomy

MADE_HERE = ("masks.json", "settings.json")  # of mask sets and predictions of ours
PART = (
    128  # samples that are counted by one process in one go, and kept when a sweep is interrupted
)


def sweep(
    folder,
    reference,
    name: str,
    powers=None,
    thresholds=(0.4, 0.5, 0.6),
    bands=(0.1,),
    sources=None,
    limit: int | None = None,
    workers: int | None = None,
) -> dict:
    """Score every combination of settings on the synthetic set ``folder`` against the masks
    ``<reference>/<id>.png`` (exact, human, or a segmenter's predictions); writes
    ``sweeps/<name>.json`` and returns its content. No mask is touched.

    ``powers`` and ``sources``: None = all that are stored. ``limit``: the first samples of the plan
    only. ``workers``: processes, None = one for each core unless there is little to do; the numbers
    do not depend on it. The best setting has the highest mIoU with uncertain pixels counted as
    background, then the fewest uncertain pixels. A sweep that is there for the same settings, heat
    and reference is returned as it is, an interrupted one goes on; another one is replaced.
    """
    folder, reference = Path(folder), Path(reference)
    folder_name(name, "sweep.name")
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ValueError(
            f"sweep.workers={workers!r}: expected a whole number from 1 on, or null for the "
            "number of cores"
        )
    samples, heat_sha256 = _samples(folder, limit)
    settings, left_out = _settings(folder, samples[0], powers, thresholds, bands, sources)
    run = read_own(folder / "run.json", RUN)["identity"]
    identity = {
        "settings": [s.identity() for s in settings],
        "samples": len(samples),
        "heat": heat_sha256,
        "reference": _reference_sha256(reference, samples),
        "classes": run["taxonomy"]["names"],
    }
    path = folder / "sweeps" / f"{name}.json"
    there = read_own(path, SWEPT) if path.exists() else {}
    if "chosen_on" in there and not differences(there["sweep"].get("identity", {}), identity):
        return there
    sweep_beside(path)
    kept = path.with_suffix(".parts") / fingerprint(identity)[:16]
    taxonomy = Taxonomy(run["taxonomy"]["name"], run["taxonomy"]["names"])
    counts = _count(
        partial(count_samples, folder, reference, settings, taxonomy), samples, kept, workers
    )
    table = [
        {**s.identity(), **metrics.with_uncertain(torch.from_numpy(c))}
        for s, c in zip(settings, counts, strict=True)
    ]
    table.sort(key=lambda row: (-row["miou"], row["uncertain"]))
    reading = {k: run["generator"].get(k) for k in READING}
    labels, made = _labels(folder, reference, len(samples))
    result = {
        "masks": {k: table[0][k] for k in settings[0].identity()},
        "diffusion": reading,
        "chosen_on": declared(labels),
        "calibration": {
            "by": "sweep",
            **made,
            "reference_sha256": identity["reference"],
            "generator": {"weights_sha256": run["generator"]["weights_sha256"], **reading},
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
    shutil.rmtree(path.with_suffix(".parts"))
    return result


def _samples(folder, limit):
    """(samples, fingerprint of their heat)."""
    plan, records = read_plan(folder), read_records(folder, ("heat_sha256",))
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(
            f"sweep.limit={limit!r}: expected a number of samples from 1 on, or null for all "
            f"{len(plan)}"
        )
    missing = [s.id for s in plan[:limit] if s.id not in records]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(plan)} samples are not generated yet; run "
            "generate.py first"
        )
    return plan[:limit], fingerprint([records[s.id]["heat_sha256"] for s in plan[:limit]])


def _settings(folder, sample, powers, thresholds, bands, sources):
    """The grid, once the first sample has shown that its sources and powers are stored."""
    heat = stored_heat(folder, sample.id)
    stored = range(next(iter(heat.values())).shape[1])
    settings, left_out = settings_grid(
        list(stored) if powers is None else powers,
        thresholds,
        bands,
        list(heat) if sources is None else sources,
    )
    for s in settings:
        scores(choose_source(heat, s.source, folder), s.power, (1, 1))
    return settings, left_out


def _reference_sha256(reference, samples) -> str:
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
            f"{', '.join(missing[:5])}; a mask has the id of "
            "its sample in plan.jsonl. sweep.limit=... takes the first samples only"
        )
    return fingerprint([sha256(p) for p in paths])


def _labels(folder, reference, number) -> tuple[list[dict], dict]:
    """(label sets behind the choice, how the reference came about): ``number`` masks that nobody
    says a model made, or what is behind a mask set or a run's predictions."""
    for path in (reference / name for name in MADE_HERE):
        if path.is_file():
            made = read_own(path, IDENTIFIED)
            return behind(made), {"reference": made["identity"]}
    return [label_set(f"{folder.name}/{reference.name}", number)], {}


def count_samples(
    folder, reference, settings: list[MaskSettings], taxonomy: Taxonomy, samples
) -> np.ndarray:
    """Summed pixels [S, C, C + 1] (:func:`dd.masks.threshold.count_grid`) of some samples, on
    one thread: the same in any process."""
    threads, total = torch.get_num_threads(), 0
    foreign = not any((reference / name).is_file() for name in MADE_HERE)
    torch.set_num_threads(1)
    try:
        for sample in samples:
            path = reference / f"{sample.id}.png"
            check_mask(path)
            truth = read_mask(path, taxonomy if foreign else None)
            check_values(truth, taxonomy, path)
            with Image.open(synthetic_image(folder, sample.id)) as image:
                if truth.shape != image.size[::-1]:
                    raise ValueError(
                        f"{path} is {truth.shape[1]}x{truth.shape[0]}, its image "
                        f"{image.width}x{image.height}: a reference "
                        "has the size of the images"
                    )
            total = total + count_grid(
                stored_heat(folder, sample.id), sample.class_ids, truth, settings, len(taxonomy)
            )
    finally:
        torch.set_num_threads(threads)
    return total


def _count(count, samples, kept: Path, workers: int | None) -> np.ndarray:
    """Sum of ``count(part)`` over parts of the samples; each part's result is kept as
    ``<kept>/<number>.npy``."""
    parts = [samples[i : i + PART] for i in range(0, len(samples), PART)]
    todo = [n for n in range(len(parts)) if not (kept / f"{n}.npy").is_file()]
    workers = min(workers or min(os.cpu_count() or 1, len(todo) // 4), len(todo))
    with Progress("sweep", len(parts), len(parts) - len(todo), unit="parts") as progress:
        for number, counts in _results(count, parts, todo, workers):
            buffer = BytesIO()
            np.save(buffer, counts)
            write_atomic(kept / f"{number}.npy", buffer.getvalue())
            progress.advance()
    return sum(np.load(kept / f"{n}.npy") for n in range(len(parts)))


def _results(count, parts, todo, workers):
    if workers <= 1:
        yield from ((n, count(parts[n])) for n in todo)
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn")
    ) as pool:  # a fork would copy torch's threads
        futures = {pool.submit(count, parts[n]): n for n in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def print_best(result: dict, number: int = 10) -> None:
    """The first rows of a sweep's table."""
    table = Table(
        title=f"{len(result['sweep']['table'])} mask settings against {result['sweep']['against']}"
    )
    for column in (
        "power",
        "threshold",
        "band",
        "source",
        "mIoU",
        "mIoU without uncertain",
        "uncertain",
    ):
        table.add_column(column, justify="left" if column == "source" else "right")
    for row in result["sweep"]["table"][:number]:
        certain = "-" if row["miou_certain"] is None else f"{row['miou_certain']:.2f}"
        texts = (
            f"{row['threshold']:g}",
            f"{row['band']:g}",
            row["source"],
            f"{row['miou']:.2f}",
            certain,
        )
        table.add_row(str(row["power"]), *texts, f"{row['uncertain']:.1f} %")
    Console().print(table)
