"""Stage: a trained segmenter labels the synthetic images it learnt from, and the next one is
trained on these labels from scratch (self-training, Dataset Diffusion)."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from dd.data.datasets import SegmentationFolder, encode_mask, read_image
from dd.store.locks import Lock
from dd.store.names import folder_name
from dd.store.progress import Progress
from dd.store.provenance import differences, fingerprint, read_own, sha256, write_atomic, write_json
from dd.store.samples import append_records, read_records
from dd.store.schemas import IDENTIFIED, RUN
from dd.taxonomy import Taxonomy
from dd.training.datamodule import whole_loader
from dd.training.segmentation import to_device


def label_by_run(
    folder,
    run: dict,
    segmenter,
    views,
    mask_set: str = "self_training",
    confidence: float | None = None,
    weights: str = "ema",
    batch_size: int = 16,
    device: str = "cpu",
    num_workers: int = 0,
) -> Path:
    """Write the predictions of ``segmenter`` (weights loaded) for the training images of the
    synthetic set ``folder`` to ``masks/<mask_set>``, beside the masks that are there; returns that
    folder.

    ``run`` is the teacher's run.json, ``views`` (:class:`dd.training.segmentation.Views`) how it
    looks at an image. ``confidence``: pixels whose strongest class has a smaller probability become
    255; None keeps every pixel. ``masks.json`` comes last, as in the label stage; an interrupted
    set goes on, and a finished one is left alone. ValueError for a teacher of other classes;
    FileExistsError for a set of another teacher or other settings, whose predictions were costly:
    nothing is touched then.
    """
    if confidence is not None and (
        type(confidence) not in (int, float) or not 0 <= confidence <= 1
    ):
        raise ValueError(
            f"confidence={confidence!r}: expected a probability from 0 to 1, or null to keep "
            "every pixel"
        )
    if folder_name(mask_set, "mask_set") == "SegmentationClass":
        raise ValueError(
            f"mask_set={mask_set!r}: expected the name of a new set in {folder}/masks, as "
            "self_training"
        )
    folder = Path(folder)
    images, target = _training_images(folder, run), folder / "masks" / mask_set
    identity = _identity(
        folder, images, run, {**views.protocol, "confidence": confidence, "weights": weights}
    )
    _refuse_other(target, identity)
    chosen = run.get("chosen_on", [])
    if (done := target / "masks.json").exists():
        if "chosen_on" not in (there := read_own(done, IDENTIFIED)):  # of an earlier version
            write_json(done, {**there, "chosen_on": chosen})
        return target
    target.mkdir(parents=True, exist_ok=True)
    arguments = images, run, segmenter, views, confidence, batch_size, device, num_workers
    with Lock(target, hint="Choose another name with mask_set=..."):
        if not done.exists():  # by another process in between
            _label(target, identity, chosen, folder, *arguments)
    return target


def _label(
    target,
    identity,
    chosen,
    folder,
    images,
    run,
    segmenter,
    views,
    confidence,
    batch_size,
    device,
    num_workers,
) -> None:
    write_json(target / "settings.json", {"identity": identity, "chosen_on": chosen})
    done, batches = (
        _done(target),
        [images.ids[i : i + batch_size] for i in range(0, len(images), batch_size)],
    )
    batches = [
        b for b in batches if not all(name in done for name in b)
    ]  # whole ones: rounding depends on a batch
    todo = [name for batch in batches for name in batch]
    loader = whole_loader(_Unlabelled(images, todo), views, batch_size, num_workers)
    segmenter = segmenter.to(device).eval()
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=run.get("bf16", False))
    progress = Progress(f"label {folder.name} again", len(images), len(images) - len(todo))
    with progress, torch.no_grad(), autocast:
        for names, (shown, empty) in zip(batches, loader, strict=True):
            predictions = views.predict(
                segmenter, to_device(shown, device), [tuple(e.shape) for e in empty], confidence
            )
            append_records(
                target,
                "0",
                [_write(target, *pair) for pair in zip(names, predictions, strict=True)],
            )
            progress.advance(len(names))
    _finish(target, identity, chosen, images.ids)


def _finish(target, identity, chosen, names):
    records, pixels = read_records(target, ("sha256", "pixels")), Counter()
    for name in names:
        pixels.update(records[name]["pixels"])
    hashes = {name: records[name]["sha256"] for name in names}
    done = {"identity": identity, "chosen_on": chosen}
    write_json(target / "masks.json", {**done, "pixels": dict(pixels), "sha256": hashes})


class _Unlabelled:
    """Images by name, each with an empty mask that says its size."""

    def __init__(self, images: SegmentationFolder, names: list[str]):
        self.images, self.names = images, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int):
        image = read_image(self.images.image_path(self.names[index]))
        return image, np.zeros(image.shape[:2], np.uint8)


def _training_images(folder: Path, run: dict) -> SegmentationFolder:
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not a synthetic data set (no run.json); make one with generate.py"
        )
    classes, theirs = (
        read_own(folder / "run.json", RUN)["identity"]["taxonomy"],
        run["taxonomy"]["names"],
    )
    if classes["names"] != theirs:
        raise ValueError(
            f"the teacher was trained for the classes {theirs}, the synthetic set {folder} has "
            f"{classes['names']}: "
            "a teacher labels images of its own classes"
        )
    return SegmentationFolder(folder, "train", Taxonomy(classes["name"], classes["names"]))


def _identity(folder, images, run, settings) -> dict:
    """What decides a mask: settings, the images, and the teacher with what it was trained on,
    its mask set included."""
    records = read_records(folder, ("image_sha256",))
    missing = [name for name in images.ids if name not in records]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(images)} images have no record; run generate.py "
            "again"
        )
    teacher = {k: run[k] for k in ("weights_sha256", "supervision", "trained_on")}
    hashes = [records[name]["image_sha256"] for name in images.ids]
    return {"settings": settings, "images": fingerprint(hashes), "teacher": teacher}


def _refuse_other(target: Path, identity: dict) -> None:
    for file in (target / "masks.json", target / "settings.json"):
        lines = (
            differences(read_own(file, IDENTIFIED)["identity"], identity) if file.exists() else []
        )
        if lines:
            more = [f"... and {len(lines) - 8} more"] if len(lines) > 8 else []
            raise FileExistsError(
                f"mask set {target} was made by another teacher or with other settings:\n  "
                + "\n  ".join([line[:200] for line in lines[:8]] + more)
                + "\nNothing was changed. Choose another name (mask_set=...), or remove the "
                "folder to make it anew."
            )


def _done(target: Path) -> set[str]:
    """Names of the masks that are as they were written."""
    records = read_records(target, ("sha256", "pixels"))
    files = {name: target / f"{name}.png" for name in records}
    return {
        name
        for name, path in files.items()
        if path.is_file() and sha256(path) == records[name]["sha256"]
    }


def _write(target: Path, name: str, prediction: torch.Tensor) -> dict:
    """Write a mask and return its record."""
    mask = prediction.cpu().numpy().astype(np.uint8)
    data = encode_mask(mask)
    write_atomic(target / f"{name}.png", data)
    pixels = {str(v): int(n) for v, n in zip(*np.unique(mask, return_counts=True), strict=True)}
    return {"id": name, "sha256": sha256(data), "pixels": pixels}
