"""Stage: a segmenter's predictions for the images of a synthetic set, made once, for a sweep to
compare masks with."""

from pathlib import Path
from typing import Any

import numpy as np

from dd.data.datasets import encode_mask, read_image, synthetic_image
from dd.execution.units import check_generated
from dd.segmenters.base import Segmenter
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.provenance import fingerprint, read_own, sha256, write_atomic, write_json
from dd.store.samples import Sample, append_records, intact_masks, read_plan, recorded
from dd.store.schemas import RUN
from dd.training.segmentation import Predictor, Views


def predict_set(
    folder: str | Path,
    run: dict[str, Any],
    segmenter: Segmenter,
    views: Views,
    limit: int | None = None,
    weights: str = "ema",
    batch_size: int = 16,
    device: str = "cpu",
) -> Path:
    """Predictions of ``segmenter`` (weights loaded) for the first ``limit`` samples of the
    synthetic set ``folder``, in ``sweeps/predictions/<checkpoint's hash>-<hash of all else>``;
    returns that folder.

    ``run`` is the run's run.json, ``views`` its views of an image. Existing predictions are kept. A
    batch always has the same samples, so neither ``limit`` nor an interruption changes a pixel.
    ValueError for a run with other classes.
    """
    folder = Path(folder)
    plan, hashes = read_plan(folder), recorded(folder, "image_sha256")
    check_generated(folder, plan, hashes)
    classes = read_own(folder / "run.json", RUN)["identity"]["taxonomy"]["names"]
    if classes != run["taxonomy"]["names"]:
        raise ValueError(
            f"the run was trained for the classes {run['taxonomy']['names']}, the synthetic set "
            f"{folder} has {classes}: masks are compared with the predictions of a run with the "
            "same classes"
        )
    identity = {
        "settings": {**views.protocol, "weights": weights, "batch_size": batch_size},
        "images": fingerprint([hashes[s.id] for s in plan]),
        "teacher": {k: run[k] for k in ("weights_sha256", "supervision", "trained_on")},
    }
    name = f"{run['weights_sha256'][:12]}-{fingerprint(identity)[:8]}"
    target = folder / "sweeps" / "predictions" / name
    chosen = run.get("chosen_on", [])
    write_json(target / "settings.json", {"identity": identity, "chosen_on": chosen})
    batches = [plan[i : i + batch_size] for i in range(0, len(plan[:limit]), batch_size)]
    done = intact_masks(target, ("sha256",))
    todo = [batch for batch in batches if any(s.id not in done for s in batch)]
    total = sum(map(len, batches))
    progress = Progress(f"predict {folder.name}", total, total - sum(map(len, todo)))
    predictor = Predictor(run, segmenter, views, device)
    with Lock(target), progress:
        for batch in todo:
            masks = predictor([read_image(synthetic_image(folder, s.id)) for s in batch])
            rows = [_write(target, *pair) for pair in zip(batch, masks, strict=True)]
            append_records(target, "0", rows)
            progress.advance(len(batch))
    return target


def _write(target: Path, sample: Sample, mask: np.ndarray) -> dict[str, Any]:
    data = encode_mask(mask)
    write_atomic(target / f"{sample.id}.png", data)
    return {"id": sample.id, "sha256": sha256(data)}
