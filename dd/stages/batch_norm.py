"""Stage: a finished run with the batch-norm statistics of unlabelled photographs, as a run of its own."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from dd import checkpoints
from dd.batch_norm import adapt, check_share, layers
from dd.locks import Lock
from dd.provenance import SETTINGS, finished_run, made_by, write_atomic, write_json

CHECKPOINT = Path("checkpoints") / checkpoints.LAST
KEPT = ("segmenter", "taxonomy", "scale", "bf16", "supervision", "chosen_on")  # of the run before


def batch_norm(
    folder, run: dict, segmenter, views, photos, share: float = 1.0, batch_size: int = 8, device: str = "cpu", config: str = ""
) -> dict:  # fmt: skip
    """Write a finished run to ``folder``: ``segmenter`` (averaged weights of the finished run ``run``, its run.json) whose
    batch-norm statistics are those of ``photos`` (:func:`dd.batch_norm.adapt`), shown as evaluation shows images
    (``views``). Returns what run.json holds.

    Photographs of one size that follow each other are shown ``batch_size`` together. ``run.json`` is written last: a folder
    that has it for the same settings is left alone, one of other settings is refused (FileExistsError); what was interrupted
    begins again. Resized photographs wait in a file without a name beside the checkpoint (3 bytes a pixel). ``config``: the
    content of config.yaml. ValueError for an unreadable photograph, a single one, and a segmenter without batch norm.
    """
    folder = Path(folder)
    trained_on = {
        "source": "unlabelled", "photographs": photos.fingerprint(), "batch_norm": {"share": share}, "shots": None,
        "seed": run["trained_on"].get("seed"), "after": run["trained_on"],
    }  # fmt: skip
    identity = {"stage": "batch_norm", "trained_on": trained_on, "init_from_sha256": run["weights_sha256"]}
    if (done := finished_run(folder, identity)) is not None:
        return done
    check_share(share)
    everything = layers(segmenter)
    if len(photos) < 2:
        raise ValueError(f"unlabelled.images={photos.folder} has one photograph; a variance needs two or more")
    photos.check()
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder, hint="Runs of another name are made beside it"):
        if (done := finished_run(folder, identity)) is not None:  # by another process in between
            return done
        started = time.perf_counter()
        how = (batch_size, device, run.get("bf16", False))
        changed = _adapted(folder, segmenter.to(device), views, photos, share, *how)
        last = folder / CHECKPOINT
        write_json(folder / SETTINGS, {"identity": identity})
        write_atomic(folder / "config.yaml", config)
        last.parent.mkdir(exist_ok=True)
        state = segmenter.cpu().state_dict()
        checkpoints.save({"state_dict": {f"segmenter.{k}": v for k, v in state.items()}}, last)
        done = {
            "identity": identity, **{k: run[k] for k in (*KEPT, "segmenter_files") if k in run},
            "trained_on": trained_on, "validated_on": None,
            "batch_norm": {"layers": len(changed), "kept": sorted(everything.keys() - set(changed))}, "steps": 0,
            "seconds": round(time.perf_counter() - started, 1),
            "weights_sha256": checkpoints.weights_sha256(state), **made_by(),
        }  # fmt: skip
        write_json(folder / "run.json", done)
    return done


class _Shown:
    """Photographs as the segmenter is shown them, uint8 [3, h, w], in a file without a name: decoded once, read for each
    layer."""

    def __init__(self, folder: Path, views, photos, advance):
        self.file, self.shapes = tempfile.TemporaryFile(dir=folder), []  # noqa: SIM115
        for i in range(len(photos)):
            (image,) = views(photos[i])
            self.file.write(np.ascontiguousarray(image.numpy()).tobytes())
            self.shapes.append(tuple(image.shape))
            advance(i + 1, len(photos))

    def batches(self, batch_size: int, device: str):
        """[B, 3, h, w]: up to ``batch_size`` neighbours of one size."""
        self.file.seek(0)
        at = 0
        while at < len(self.shapes):
            shape, number = self.shapes[at], 1
            while number < batch_size and self.shapes[at + number : at + number + 1] == [shape]:
                number += 1
            data = self.file.read(number * int(np.prod(shape)))
            yield torch.frombuffer(bytearray(data), dtype=torch.uint8).view(number, *shape).to(device)
            at += number


def _adapted(folder, segmenter, views, photos, share, batch_size, device, bf16) -> list[str]:
    """Names of the layers changed."""
    with Progress(transient=True) as bar:

        def follow(what):
            task = bar.add_task(what)
            return lambda done, total: bar.update(task, completed=done, total=total)

        shown = _Shown(folder, views, photos, follow("photographs"))
        with shown.file, torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
            return adapt(segmenter, lambda: shown.batches(batch_size, device), share, follow("batch-norm layers"))
