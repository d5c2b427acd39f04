"""Trackers of a run beside Lightning's metrics.csv: TensorBoard and MLflow here, W&B in its own
module.

A failing tracker never ends a training (:class:`Guarded`). In addition to Lightning's interface a
logger may offer ``begin(settings, trained_on, init_from)``, ``show(samples, class_names, step)``,
``confusion(counts, class_names, step)``, ``table(samples, class_names, step)``, ``end(done,
objective)`` and ``finish(failed)``; ``done`` is run.json. A step is the number of finished
optimiser steps, for numbers, pictures and objectives alike.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from dd.store.provenance import fingerprint, read_own, write_json
from dd.taxonomy import voc_palette

CELL = 12  # pixels of a confusion matrix's cell
# after this many failures in a row a method is no longer called: a missing server costs minutes
# each time
PATIENCE = 3


@dataclass
class ShownImage:
    """One validated image: uint8 [H, W, 3], its true and predicted class ids [H, W], its own mIoU
    (None: all is 255)."""

    id: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    miou: float | None


def data_sets(trained_on: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: its record} of the data sets behind a run's ``trained_on``: one, or two for mixed
    training."""
    parts = [trained_on[k] for k in ("real", "synthetic") if isinstance(trained_on.get(k), dict)]
    keys = ("root", "split", "masks", "images", "shots", "mask_settings")
    return {part["root"]: {k: part[k] for k in keys if k in part} for part in parts or [trained_on]}


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in nested settings, keys joined by dots. Values other than
    numbers, truth values and text become text."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            simple = isinstance(value, bool | int | float | str)
            yield f"{prefix}{key}", value if simple else str(value)


def artifact_name(text: str) -> str:
    """``text`` with only the characters that W&B allows in names."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def need(library: str, extra: str) -> None:
    """ValueError with the extra to install if ``library`` is missing."""
    if find_spec(library) is None:
        raise ValueError(
            f'logger={extra} needs {library}, which is not installed: pip install -e ".[{extra}]"'
        )


def _attempted(name: str) -> property:
    return property(lambda guarded: guarded.attempt(name))


class Guarded(Logger):
    """A logger whose failures become one warning. A method that fails :data:`PATIENCE` times in a
    row is no longer called."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self.logger, self.kind = logger, type(logger).__name__
        self._failures: Counter[str] = Counter()
        self._warned = False

    def attempt(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The attribute ``name`` of the logger, or its result when called; None if it is missing or
        fails."""
        if self._failures[name] >= PATIENCE or not hasattr(type(self.logger), name):
            return None
        try:
            value = getattr(self.logger, name)
            value = value(*args, **kwargs) if callable(value) else value
            self._failures[name] = 0
            return value
        except Exception as error:
            self._failures[name] += 1
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"logger {self.kind} failed in {name} ({type(error).__name__}: {error}); the "
                    f"training continues without it. It is tried again, up to {PATIENCE} times in "
                    "a row",
                    stacklevel=2,
                )
        return None

    name, version = _attempted("name"), _attempted("version")
    save_dir, log_dir = _attempted("save_dir"), _attempted("log_dir")
    experiment = _attempted("experiment")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Lightning passes the index of the step, counted from 0."""
        self.attempt("log_metrics", metrics, None if step is None else step + 1)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.attempt("log_hyperparams", params, *args, **kwargs)

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self.attempt("log_graph", model, input_array)

    def save(self) -> None:
        self.attempt("save")

    def finalize(self, status: str) -> None:
        self.attempt("finalize", status)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.attempt("after_save_checkpoint", checkpoint_callback)


def is_main_process() -> bool:
    """Whether this is the process that writes, among those that train together."""
    return rank_zero_only.rank == 0


def tell(trainer: pl.Trainer, what: str, *args: Any) -> None:
    """Call ``begin``, ``show``, ``confusion``, ``table``, ``end`` or ``finish`` of each of a
    trainer's loggers that has it."""
    if is_main_process():
        for logger in trainer.loggers:
            logger.attempt(what, *args)


def panel(sample: ShownImage) -> np.ndarray:
    """Image, truth and prediction side by side in the palette's colours: uint8 [H, 3 W, 3]; 255
    is light grey."""
    palette = np.array(voc_palette(), np.uint8).reshape(256, 3)
    image = sample.image
    masks = (sample.truth, sample.prediction)
    coloured = [(image * 0.4 + palette[m] * 0.6).astype(np.uint8) for m in masks]
    return np.concatenate([image, *coloured], 1)


def confusion_picture(counts: npt.ArrayLike, class_names: Sequence[str]) -> np.ndarray:
    """A confusion matrix [K, K] (rows true, columns predicted) as uint8 [H, W, 3]. A darker cell
    has a larger share of its row, from white (none) to black (all of the pixels of this class)."""
    pixels, font = np.asarray(counts, np.float64), ImageFont.load_default(10)
    shares = pixels / np.maximum(pixels.sum(1, keepdims=True), 1)
    side = int(np.ceil(max(font.getlength(name) for name in class_names))) + 6  # room for the names
    cells = np.round(255 * (1 - shares)).astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
    size = side + len(cells)
    page = Image.new("L", (size, size), 255)
    page.paste(Image.fromarray(cells), (side, side))
    draw = ImageDraw.Draw(page)
    for i, name in enumerate(class_names):
        draw.text((side - 3, side + CELL * i + CELL // 2), name, 0, font, anchor="rm")
        column = Image.new("L", (side, CELL), 255)
        ImageDraw.Draw(column).text((3, CELL // 2), name, 0, font, anchor="lm")
        page.paste(column.rotate(90, expand=True), (side + CELL * i, 0))
    return np.asarray(page.convert("RGB"))


class TensorBoard(TensorBoardLogger):
    """TensorBoard's files in ``<save_dir>/tensorboard``; a resumed run continues there. Its table
    of hyper-parameters is written at the end, with the objective."""

    def __init__(self, save_dir: str) -> None:
        need("tensorboard", "tensorboard")
        super().__init__(save_dir, name="", version="tensorboard", default_hp_metric=False)
        self._settings: Mapping[str, Any] = {}

    def begin(
        self, settings: Mapping[str, Any], trained_on: Mapping[str, Any], init_from: str | None
    ) -> None:
        self._settings = settings

    def confusion(self, counts: np.ndarray, class_names: Sequence[str], step: int) -> None:
        picture = confusion_picture(counts, class_names)
        self.experiment.add_image("tune/confusion", picture, step, dataformats="HWC")

    def end(self, done: Mapping[str, Any], objective: float | None) -> None:
        from torch.utils.tensorboard.summary import hparams

        metrics = {} if objective is None else {"objective": objective}
        self.log_metrics(metrics, done["steps"])
        for summary in hparams(dict(flat(self._settings)), metrics):
            self.experiment._get_file_writer().add_summary(summary, done["steps"])
        self.experiment.flush()

    def show(self, samples: Sequence[ShownImage], class_names: Sequence[str], step: int) -> None:
        for sample in samples:
            picture = panel(sample)
            name = f"tune/masks/{sample.id}"
            self.experiment.add_image(name, picture, step, dataformats="HWC")


class MLflow(MLFlowLogger):
    """One MLflow run for each run folder. Its id is kept in ``<save_dir>/mlflow.json``, so that a
    resumed run continues it.

    ``tracking_uri``: a server or database; None = MLFLOW_TRACKING_URI, or files in the folder
    ``store``. No checkpoint is copied.
    """

    def __init__(
        self,
        save_dir: str,
        store: str,
        experiment_name: str,
        run_name: str,
        tracking_uri: str | None = None,
    ) -> None:
        need("mlflow", "mlflow")
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        uri = uri or Path(store).resolve().as_uri()
        _allow_files(uri)
        self._folder, self._record = save_dir, Path(save_dir) / "mlflow.json"
        known = read_own(self._record, {"run_id?": str}) if self._record.is_file() else {}
        self._goes_on = known.get("tracking_uri") == uri
        run_id = known["run_id"] if self._goes_on else None
        super().__init__(experiment_name, run_name, uri, save_dir=store, run_id=run_id)

    @property
    def save_dir(self) -> str:
        return self._folder

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        first = not self._initialized
        client = super().experiment
        if first:
            client.update_run(self._run_id, status="RUNNING")
            write_json(self._record, {"run_id": self._run_id, "tracking_uri": self._tracking_uri})
        return client

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        if not self._goes_on:  # MLflow refuses to change logged values
            super().log_hyperparams(params)

    def begin(
        self, settings: Mapping[str, Any], trained_on: Mapping[str, Any], init_from: str | None
    ) -> None:
        self.log_hyperparams(settings)
        for name, described in data_sets(trained_on).items():
            key = f"data.{artifact_name(name)}"
            self.experiment.set_tag(self.run_id, key, fingerprint(described))

    def show(self, samples: Sequence[ShownImage], class_names: Sequence[str], step: int) -> None:
        for sample in samples:
            path = f"masks/{artifact_name(sample.id)}/step_{step:07d}.png"
            self.experiment.log_image(self.run_id, panel(sample), artifact_file=path)

    def confusion(self, counts: np.ndarray, class_names: Sequence[str], step: int) -> None:
        path, picture = f"confusion/step_{step:07d}.png", confusion_picture(counts, class_names)
        self.experiment.log_image(self.run_id, picture, artifact_file=path)

    def table(self, samples: Sequence[ShownImage], class_names: Sequence[str], step: int) -> None:
        rows = {"step": step, "columns": ["id", "miou"], "data": [[s.id, s.miou] for s in samples]}
        self.experiment.log_dict(self.run_id, rows, "samples.json")

    def end(self, done: Mapping[str, Any], objective: float | None) -> None:
        self.experiment.set_tag(self.run_id, "weights_sha256", done["weights_sha256"])
        if objective is not None:
            self.log_metrics({"objective": objective}, done["steps"])


def _allow_files(uri: str) -> None:
    if uri.startswith("file:"):  # MLflow 3 accepts files only with this variable
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


def mlflow_client(uri: str) -> Any:
    """A client that reads and writes the runs of an MLflow server, database or folder of files."""
    from mlflow.tracking import MlflowClient

    _allow_files(uri)
    return MlflowClient(uri)
