"""Stage: mIoU of a trained run on real data, and the audit of a synthetic set's masks by such a run."""

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dd import metrics
from dd.datamodule import whole_loader
from dd.datasets import SegmentationFolder, encode_mask
from dd.provenance import read_json, write_atomic, write_json
from dd.segmentation import count

EXAMPLES = 8  # predictions of the first images are kept as pictures


def evaluate(
    path, run: dict, segmenter, data: SegmentationFolder, views, batch_size: int = 16, device: str = "cpu", weights="ema",
    num_workers: int = 0,
) -> dict:  # fmt: skip
    """Score ``segmenter`` (weights loaded) on every image of ``data`` and write metrics.json to ``path``.

    ``run`` is the run's run.json, ``views`` (:class:`dd.segmentation.Views`) the protocol: single scale, or test-time
    augmentation. One integer confusion matrix at original image size, 255 left out. A file that is there for the same
    checkpoint, data and protocol is kept. ValueError if the run's classes are not the data's.
    """
    theirs = run["taxonomy"]["names"]
    if list(data.taxonomy.names) != theirs:
        raise ValueError(
            f"the run was trained for the classes {theirs}, data {data.root.name!r} has {list(data.taxonomy.names)}: "
            "a run is evaluated on data with its own classes"
        )
    head = {
        "data": data.root.name, "split": data.split, "masks": data.masks, "num_images": len(data),
        "checkpoint": "checkpoints/last.ckpt", "checkpoint_sha256": run["checkpoint_sha256"], "weights": weights,
        "protocol": views.protocol,
        "supervision": run["supervision"], "trained_on": run["trained_on"], "masks_made_with": _made_with(data),
    }  # fmt: skip
    if Path(path).exists():
        there = read_json(path)
        if {k: there.get(k) for k in head} == head:
            return there
    segmenter = segmenter.to(device).eval()
    confusion = metrics.confusion_matrix(len(data.taxonomy)).to(device)
    with Progress(transient=True) as bar:
        task = bar.add_task(f"evaluate on {data.root.name}/{data.split}", total=len(data))
        autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=run.get("bf16", False))
        with autocast:
            loader = whole_loader(data, views, batch_size, num_workers)
            shown = []

            def after(predictions):
                bar.advance(task, len(predictions))
                shown.extend(p.cpu() for p in predictions[: EXAMPLES - len(shown)])

            counted = count(segmenter, loader, confusion, device, after, views.predict)
    for name, prediction in zip(data.ids, shown, strict=False):
        write_atomic(Path(path).parent / "examples" / f"{name}.png", encode_mask(prediction.numpy().astype(np.uint8)))
    result = {**head, **metrics.summarise(counted.cpu(), data.taxonomy.all_names)}
    write_json(path, result)
    return result


def _made_with(data):
    path = data.root / data.masks / "masks.json"
    return read_json(path)["identity"] if path.is_file() else None


def print_table(results: dict[str, dict], title: str) -> None:
    """Per-class IoU and mIoU of several results, one column each."""
    table = Table(title=title)
    table.add_column("class", no_wrap=True)
    folders = [Path(name).parts for name in results]
    shared = 0 if len(folders) == 1 else next(i for i, parts in enumerate(zip(*folders, strict=False)) if len(set(parts)) > 1)
    for parts in folders:
        table.add_column("/".join(parts[shared:]).replace("/", "/ ").replace(",", ", "), justify="right", overflow="fold")
    for class_name in next(iter(results.values()))["iou"]:
        values = [r["iou"].get(class_name) for r in results.values()]
        table.add_row(class_name, *("-" if v is None else f"{v:.1f}" for v in values))
    table.add_section()
    table.add_row("mIoU", *(f"[bold]{r['miou']:.1f}[/bold]" for r in results.values()))
    Console().print(table)
