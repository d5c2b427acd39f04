"""Test scores for the trackers that a run was trained with: TensorBoard and MLflow here, W&B in its
own module."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dd.store.provenance import read_json
from dd.training.loggers import artifact_name, confusion_picture, mlflow_client


def log_scores(run_folder: str | Path, where: str, result: Mapping[str, Any]) -> None:
    """Add a metrics.json to TensorBoard's files and the MLflow run of a training, if it had them:
    ``<where>/miou``, ``<where>/pixel_accuracy``, ``<where>/iou/<class>`` and the confusion matrix
    at the run's last step; ``where`` = ``eval/voc``. A failure is only a warning, since
    metrics.json is kept."""
    run_folder = Path(run_folder)
    for name, log in (("tensorboard", _tensorboard), ("mlflow.json", _mlflow)):
        if not (run_folder / name).exists():
            continue
        try:
            log(run_folder, where, result, read_json(run_folder / "run.json")["steps"])
        except Exception as error:
            tracker, why = name.partition(".")[0], f"{type(error).__name__}: {error}"
            what = f"{tracker} did not take the scores ({why}); metrics.json is kept"
            warnings.warn(what, stacklevel=2)


def scores(where: str, result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics.json by their names in trackers, without classes that have no
    value."""
    found = {f"{where}/{key}": result[key] for key in ("miou", "pixel_accuracy")}
    return found | {f"{where}/iou/{k}": v for k, v in result["iou"].items() if v is not None}


def _picture(result: Mapping[str, Any]) -> np.ndarray:
    return confusion_picture(result["confusion"], list(result["iou"]))


def _tensorboard(run_folder: Path, where: str, result: Mapping[str, Any], step: int) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run_folder / "tensorboard") as writer:
        for name, value in scores(where, result).items():
            writer.add_scalar(name, value, step)
        writer.add_image(f"{where}/confusion", _picture(result), step, dataformats="HWC")


def _mlflow(run_folder: Path, where: str, result: Mapping[str, Any], step: int) -> None:
    known = read_json(run_folder / "mlflow.json")
    client = mlflow_client(known["tracking_uri"])
    for name, value in scores(where, result).items():
        key = "/".join(map(artifact_name, name.split("/")))
        client.log_metric(known["run_id"], key, value, step=step)
    path = f"confusion/{artifact_name(where)}.png"
    client.log_image(known["run_id"], _picture(result), artifact_file=path)
