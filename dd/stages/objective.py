"""Stage: the number by which runs are chosen: mIoU of the last averaged weights on the tune
split."""

from pathlib import Path

import torch

from dd.data.datasets import SegmentationFolder
from dd.evaluation import metrics
from dd.segmenters.base import Segmenter
from dd.store.provenance import read_own, write_json
from dd.training.datamodule import whole_loader
from dd.training.segmentation import Views, count


def objective(
    folder: str | Path,
    segmenter: Segmenter,
    data: SegmentationFolder,
    views: Views,
    batch_size: int = 16,
    device: str = "cpu",
    bf16: bool = False,
    num_workers: int = 0,
) -> float:
    """mIoU in percent of a finished run on ``data``, the tune split or the images held out; written
    to ``objective.json`` and read from there the next time.

    ``segmenter`` holds the averaged weights of the run's last checkpoint, ``views``
    (:class:`dd.training.segmentation.Views`) are its views of an image.
    """
    path, run = Path(folder) / "objective.json", read_own(Path(folder) / "run.json", {})
    head = {
        "metric": "tune/miou",
        "weights_sha256": run["weights_sha256"],
        "data": data.root.name,
        "split": data.split,
        "num_images": len(data),
        "content": data.content(),
        "protocol": views.protocol,
    }
    if path.exists():
        there = read_own(path, {"objective": float})
        if {k: there.get(k) for k in head} == head:
            return there["objective"]
    segmenter.to(device).eval()
    confusion = metrics.confusion_matrix(len(data.taxonomy)).to(device)
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
        loader = whole_loader(data, views, batch_size, num_workers)
        counted = count(segmenter, loader, confusion, device, None, views.predict)
    value = metrics.miou(counted.cpu())
    write_json(path, {**head, "objective": value})
    return value
