"""Stage: a segmenter's predictions for the images of a synthetic set, made once: what a sweep
compares masks with."""

from pathlib import Path

from dd.data.datasets import encode_mask, read_image, synthetic_image
from dd.store.locks import Lock
from dd.store.progress import Progress
from dd.store.provenance import fingerprint, read_own, sha256, write_atomic, write_json
from dd.store.samples import append_records, read_plan, read_records
from dd.store.schemas import RUN
from dd.training.segmentation import Predictor


def predict_set(
    folder,
    run: dict,
    segmenter,
    views,
    limit: int | None = None,
    weights: str = "ema",
    batch_size: int = 16,
    device: str = "cpu",
) -> Path:
    """Predictions of ``segmenter`` (weights loaded) for the first ``limit`` samples of the
    synthetic set ``folder``, in ``sweeps/predictions/<checkpoint's hash>-<hash of all else>``;
    returns that folder.

    ``run`` is the run's run.json, ``views`` (:class:`dd.training.segmentation.Views`) how it looks
    at an image. What is there is not made again; a batch is always the same samples, so neither
    ``limit`` nor an interruption changes a pixel. ValueError for a run with other classes.
    """
    folder = Path(folder)
    plan, records = read_plan(folder), read_records(folder, ("image_sha256",))
    missing = [s.id for s in plan if s.id not in records]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(plan)} samples are not generated yet; run "
            "generate.py first"
        )
    classes, theirs = (
        read_own(folder / "run.json", RUN)["identity"]["taxonomy"]["names"],
        run["taxonomy"]["names"],
    )
    if classes != theirs:
        raise ValueError(
            f"the run was trained for the classes {theirs}, the synthetic set {folder} has "
            f"{classes}: masks are compared with "
            "the predictions of a run with the same classes"
        )
    identity = {
        "settings": {**views.protocol, "weights": weights, "batch_size": batch_size},
        "images": fingerprint([records[s.id]["image_sha256"] for s in plan]),
        "teacher": {k: run[k] for k in ("weights_sha256", "supervision", "trained_on")},
    }
    target = (
        folder
        / "sweeps"
        / "predictions"
        / f"{run['weights_sha256'][:12]}-{fingerprint(identity)[:8]}"
    )
    chosen = run.get("chosen_on", [])
    write_json(target / "settings.json", {"identity": identity, "chosen_on": chosen})
    batches = [plan[i : i + batch_size] for i in range(0, len(plan[:limit]), batch_size)]
    done = _done(target)
    todo = [batch for batch in batches if any(s.id not in done for s in batch)]
    predictor = Predictor(run, segmenter, views, device)
    there = sum(map(len, batches)) - sum(map(len, todo))
    with (
        Lock(target),
        Progress(f"predict {folder.name}", there + sum(map(len, todo)), there) as progress,
    ):
        for batch in todo:
            predictions = predictor([read_image(synthetic_image(folder, s.id)) for s in batch])
            append_records(
                target,
                "0",
                [_write(target, *pair) for pair in zip(batch, predictions, strict=True)],
            )
            progress.advance(len(batch))
    return target


def _write(target, sample, prediction) -> dict:
    data = encode_mask(prediction)
    write_atomic(target / f"{sample.id}.png", data)
    return {"id": sample.id, "sha256": sha256(data)}


def _done(target) -> set[str]:
    """Ids whose prediction is as it was written."""
    files = {
        name: (target / f"{name}.png", record["sha256"])
        for name, record in read_records(target, ("sha256",)).items()
    }
    return {
        name
        for name, (path, written) in files.items()
        if path.is_file() and sha256(path) == written
    }
