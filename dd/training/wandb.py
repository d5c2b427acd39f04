"""W&B: curves, masks, a table of samples, and the lineage data set -> model -> evaluation. The
only importer of wandb."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment

from dd.store.provenance import fingerprint, read_json, read_own, write_json
from dd.taxonomy import IGNORE
from dd.training.loggers import ShownImage, artifact_name, confusion_picture, data_sets, need

UNCERTAIN = "uncertain"  # name of 255 in overlays


class Wandb(WandbLogger):
    """One W&B run for each run folder. Its id is kept in ``<save_dir>/wandb.json``, so that a
    resumed run continues it.

    ``offline`` (or WANDB_MODE=offline): nothing is sent, the lineage is in the run's config,
    ``wandb sync`` sends it later. ``log_model``: true uploads checkpoints/last.ckpt once, at the
    end; false uploads no weights at all. ValueError for anything else, and for true with offline.
    """

    _experiment: Any  # Lightning's

    def __init__(
        self,
        save_dir: str,
        name: str,
        offline: bool = False,
        log_model: bool = False,
        group: str | None = None,
        **kwargs: Any,
    ) -> None:
        need("wandb", "wandb")
        offline = offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        if not isinstance(log_model, bool) or (log_model and offline):
            raise ValueError(
                f"loggers.wandb.log_model={log_model!r}{' and offline' if offline else ''}: "
                "expected false (no weights are uploaded) or, online, true (checkpoints/last.ckpt "
                "is uploaded once, at the end)"
            )
        self._record, self._upload = Path(save_dir) / "wandb.json", log_model
        self._fingerprints: dict[str, Any] = {}
        known = os.environ.get("WANDB_RUN_ID")
        if self._record.is_file():
            known = read_own(self._record, {"id": (str, None)})["id"]
        mode = {"mode": "offline"} if offline else {}
        group = group or name.rpartition("/")[0] or None
        super().__init__(
            name, save_dir, version=known, group=group, job_type="train", **mode, **kwargs
        )
        self._wandb_init.pop("anonymous")  # Lightning passes it on, and W&B warns about it

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            import wandb

            self._record.parent.mkdir(parents=True, exist_ok=True)
            _keep_in(self._record.parent)
            # an earlier run of this process, which Lightning would continue
            if wandb.run is not None:
                wandb.finish()
            run = super().experiment
            keys = ("id", "entity", "project", "name", "group", "offline")
            write_json(self._record, {k: getattr(run, k) or None for k in keys})
        return self._experiment

    def begin(
        self, settings: Mapping[str, Any], trained_on: Mapping[str, Any], init_from: str | None
    ) -> None:
        described, run = data_sets(trained_on), self.experiment
        self._fingerprints = {"data": {name: fingerprint(v) for name, v in described.items()}}
        run.config.update({**settings, "fingerprints": self._fingerprints}, allow_val_change=True)
        if run.offline:
            return
        for name, value in described.items():
            run.use_artifact(_artifact(name, "dataset", value, {"data.json": value}))
        if init_from and (Path(init_from) / "wandb.json").is_file():
            before = Path(init_from)
            run.use_artifact(_model(before, read_own(before / "run.json", {})))

    def show(self, samples: Sequence[ShownImage], class_names: Sequence[str], step: int) -> None:
        self.log_metrics({"tune/masks": [_overlay(s, class_names, "both") for s in samples]}, step)

    def confusion(self, counts: np.ndarray, class_names: Sequence[str], step: int) -> None:
        import wandb

        picture = wandb.Image(confusion_picture(counts, class_names))
        self.log_metrics({"tune/confusion": picture}, step)

    def table(self, samples: Sequence[ShownImage], class_names: Sequence[str], step: int) -> None:
        import wandb

        kinds = ("none", "truth", "prediction")
        rows = [
            [s.id, *(_overlay(s, class_names, kind) for kind in kinds), s.miou] for s in samples
        ]
        columns = ["id", "image", "truth", "prediction", "miou"]
        self.log_metrics({"tune/samples": wandb.Table(columns=columns, data=rows)}, step)

    def end(self, done: Mapping[str, Any], objective: float | None) -> None:
        sha = done["weights_sha256"]
        self._fingerprints["model"] = sha
        self.experiment.config.update({"fingerprints": self._fingerprints}, allow_val_change=True)
        if objective is not None:
            self.log_metrics({"objective": objective}, done["steps"])
        facts = {"weights_sha256": sha, "objective": objective, "trained_on": done["trained_on"]}
        artifact = _artifact(f"model-{self.experiment.id}", "model", facts, {"run.json": done})
        if self._upload:
            artifact.add_file(str(Path(self._save_dir) / "checkpoints" / "last.ckpt"))
        self.experiment.log_artifact(artifact, aliases=["latest", sha[:12]])

    def finish(self, failed: bool) -> None:
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(failed))
            self._experiment = None


def _keep_in(run_folder: Path) -> None:
    """Stage artifacts in the run folder. W&B stages them in the user's home, and an offline run
    would not be complete without them."""
    ours = str(run_folder.resolve() / "wandb")
    if os.environ.get("WANDB_DATA_DIR") in (None, os.environ.get("DD_WANDB_DATA_DIR")):
        os.environ["WANDB_DATA_DIR"] = os.environ["DD_WANDB_DATA_DIR"] = ours


def _overlay(sample: ShownImage, class_names: Sequence[str], what: str) -> Any:
    import wandb

    labels = {**dict(enumerate(class_names)), IGNORE: UNCERTAIN}
    chosen = {"both": ("truth", "prediction"), "none": ()}.get(what, (what,))
    masks = {k: {"mask_data": getattr(sample, k), "class_labels": labels} for k in chosen}
    return wandb.Image(sample.image, masks=masks or None, caption=sample.id)


def _artifact(name: str, kind: str, metadata: Mapping[str, Any], files: Mapping[str, Any]) -> Any:
    import wandb

    described = {"fingerprint": fingerprint(metadata), **metadata}
    artifact = wandb.Artifact(artifact_name(name), type=kind, metadata=described)
    for path, value in files.items():
        with artifact.new_file(path) as file:
            file.write(json.dumps(value, indent=1))
    return artifact


def _model(run_folder: Path, run: Mapping[str, Any]) -> str:
    """The artifact of a run's model, addressed as in W&B."""
    known = read_own(run_folder / "wandb.json", {"id": str})
    place = "/".join(filter(None, (known["entity"], known["project"])))
    return f"{place}/model-{known['id']}:{run['weights_sha256'][:12]}"


def log_evaluation(run_folder: str | Path, where: str, result: Mapping[str, Any]) -> None:
    """Add metrics.json to the W&B lineage of a run that was trained with logger=wandb, as a run of
    its own, ``where`` = ``eval/voc``. FileNotFoundError for a run without W&B; a failure of W&B
    itself is a warning."""
    run_folder = Path(run_folder)
    if not (run_folder / "wandb.json").is_file():
        raise FileNotFoundError(
            f"{run_folder} has no wandb.json: it was not trained with logger=wandb; "
            "leave out wandb=true"
        )
    need("wandb", "wandb")
    try:
        _log_evaluation(run_folder, read_json(run_folder / "wandb.json"), where, result)
    except Exception as error:
        warnings.warn(
            f"W&B did not take the evaluation ({type(error).__name__}: {error}); "
            "metrics.json is kept",
            stacklevel=2,
        )


def _log_evaluation(
    run_folder: Path, known: Mapping[str, Any], where: str, result: Mapping[str, Any]
) -> None:
    import wandb

    _keep_in(run_folder)
    kept = ("data", "split", "masks", "num_images", "weights", "protocol", "supervision")
    prints = {"model": result["weights_sha256"], "evaluation": fingerprint(result)}
    run = wandb.init(
        project=known["project"],
        entity=known["entity"],
        group=known["group"],
        name=f"{known['name']}/{where}",
        id=artifact_name(f"{known['id']}-{where}"),
        resume="allow",
        job_type="evaluate",
        dir=run_folder,
        mode="offline" if known["offline"] else None,
        config={**{k: result[k] for k in kept}, "fingerprints": prints},
    )
    rows = [[name, value] for name, value in result["iou"].items()]
    run.log({"iou": wandb.Table(columns=["class", "iou"], data=rows)})
    run.log({"confusion": wandb.Image(confusion_picture(result["confusion"], list(result["iou"])))})
    run.summary.update({"miou": result["miou"], "pixel_accuracy": result["pixel_accuracy"]})
    if not run.offline:
        run.use_artifact(_model(run_folder, result))
    facts = {"miou": result["miou"], "model": result["weights_sha256"]}
    facts |= {k: result[k] for k in kept}
    name = f"evaluation-{known['id']}-{where}"
    run.log_artifact(_artifact(name, "evaluation", facts, {"metrics.json": result}))
    run.finish()
