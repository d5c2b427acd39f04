"""The arguments of train.py: images, the record of a run, Lightning's trainer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from dd.config.identity import processes, settings_identity
from dd.config.objects import chosen_on, instantiate, plain, real_data, settings, taxonomy
from dd.data.datasets import SegmentationFolder, read_split
from dd.data.photos import Unlabelled
from dd.evaluation.supervision import LabelSet, merged, supervision
from dd.segmenters.base import Segmenter
from dd.store.provenance import fingerprint, read_own
from dd.store.schemas import FILTERED, JUDGED_MASKS, STARTED
from dd.training.callbacks import Steps
from dd.training.datamodule import Mixture, hold_out, per_process
from dd.training.loggers import Guarded, is_main_process


def seed_everything(seed: int) -> None:
    """Seeds the weights' initial values and everything that does not depend on the sample
    alone."""
    pl.seed_everything(seed, verbose=False)


def training_sets(
    cfg: Any,
) -> tuple[SegmentationFolder | Mixture, SegmentationFolder | None]:
    """(training set, tune set or None) of a train configuration. The tune set is ``hold_out``
    images of the training set (of its real part in mixed training), or the data's tune split.
    Without validation nothing is held out."""
    per_process(cfg.batch_size, processes(cfg))
    _check_source(cfg)
    shots, parts = None if cfg.shots == "all" else cfg.shots, []
    if cfg.source != "synthetic":
        parts.append(real_data(cfg, cfg.data.train_split, shots, cfg.shots_list))
    if cfg.source != "real":
        which = (cfg.synthetic_split, taxonomy(cfg), cfg.synthetic_masks)
        parts.append(SegmentationFolder(cfg.synthetic, *which))
    tune = None
    if holds_out(cfg):
        parts[0], tune = hold_out(parts[0], cfg.hold_out, cfg.seed)
    elif cfg.data.tune_split is not None and cfg.trainer.get("limit_val_batches") != 0:
        tune = real_data(cfg, cfg.data.tune_split)
    images = parts[0] if len(parts) == 1 else Mixture(parts[0], parts[1], cfg.real_share)
    return images, tune


def _check_source(cfg: Any) -> None:
    if cfg.source == "synthetic" and cfg.shots not in (None, "all"):
        raise ValueError(
            f"shots={cfg.shots} has no effect with source=synthetic; use source=real or "
            "source=mixed"
        )
    if cfg.source == "synthetic" and cfg.shots_list is not None:
        raise ValueError(f"shots_list={cfg.shots_list} has no effect with source=synthetic")


def unlabelled_photos(cfg: Any, why: str) -> Unlabelled:
    """The photographs of the site; if none are given, ValueError that says what needs them
    (``why``)."""
    if not cfg.unlabelled.images:
        raise ValueError(
            f"{why} needs photographs of the site: unlabelled.images=<folder> (it is never "
            "written to)"
        )
    return Unlabelled(cfg.unlabelled.images, cfg.unlabelled.list)


def self_training(cfg: Any, num_classes: int) -> tuple[Any, Any]:
    """(teacher, (photographs, their transform)) of a train configuration; (None, None) if it is
    off. ValueError without photographs, or without the average of the weights."""
    if not cfg.self_training.teacher:
        return None, None
    if not cfg.trainer.callbacks.get("ema"):
        raise ValueError(
            "self_training: the teacher is the average of the weights; leave "
            "trainer.callbacks.ema on (or self_training=off)"
        )
    photos = unlabelled_photos(cfg, "self_training")
    teacher = instantiate(cfg.self_training.teacher, num_classes=num_classes)
    return teacher, (photos, instantiate(cfg.self_training.transform))


def holds_out(cfg: Any) -> bool:
    return cfg.hold_out is not None and cfg.trainer.get("limit_val_batches") != 0


def _synthetic_record(
    images: SegmentationFolder | Mixture,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(how the masks of a synthetic set were made and its samples chosen, the labels that decided
    these)."""
    path = images.root / images.masks / "masks.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"mask set {path.parent} is not finished (no masks.json); run the stage that makes it "
            "again"
        )
    masks, filtered = read_own(path, JUDGED_MASKS), _chosen_list(images)
    listed = images.root / "quality" / images.split / "filter.json"
    rules = "rules" in filtered.get("filter", {})
    chosen = read_own(listed, FILTERED).get("chosen_on") if rules else []
    return {"mask_settings": masks["identity"], **filtered}, merged(masks.get("chosen_on"), chosen)


def _chosen_list(images: SegmentationFolder | Mixture) -> dict[str, Any]:
    """{} for the whole list ``train`` of a synthetic set; for another one its ids' hash and, if a
    filter wrote it, how."""
    if images.split == "train":
        return {}
    path = images.root / "quality" / images.split / "filter.json"
    ids = fingerprint(read_split(images.root, images.split))
    if not path.is_file():
        return {"filter": {"ids": ids}}
    identity = read_own(path, FILTERED)["identity"]
    if identity["ids"] != ids:
        raise ValueError(
            f"split {images.split} is not the list of {path}; run generate.py stage=filter again"
        )
    return {"filter": identity}


def training_record(
    cfg: Any,
    images: SegmentationFolder | Mixture,
    tune: SegmentationFolder | None = None,
    photos: Unlabelled | None = None,
    network: Segmenter | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(identity, record) of a training run: what makes it another run (:mod:`dd.config.identity`),
    and what evaluation must know of it. ``photos``: the unlabelled ones of self-training;
    ``network``: the segmenter, which knows the content of the files that it was made from."""
    before = _before(cfg.init_from)
    trained_on, chosen_data = _trained_on(cfg, images, photos, before.get("trained_on"))
    names, files = list(images.taxonomy.names), {} if network is None else network.files
    identity = {
        **settings_identity(cfg),
        "classes": names,
        "segmenter_files": files,
        "trained_on": trained_on,
        "init_from_sha256": before.get("weights_sha256"),
    }
    # What labels decided changes no weight, so it is recorded beside the identity, including that
    # of everything the run builds on.
    own = chosen_on(cfg, *(["self_training"] if photos is not None else []))
    decided = merged(before.get("chosen_on"), chosen_data, own)
    held = {"ids": tune.ids} if tune and holds_out(cfg) else {}
    record = {
        "segmenter": plain(cfg.segmenter),
        "segmenter_files": files,
        "taxonomy": {"name": images.taxonomy.name, "names": names},
        "scale": cfg.scale,
        "bf16": cfg.trainer.precision == "bf16-mixed",
        "trained_on": trained_on,
        "supervision": supervision(trained_on, decided, before.get("supervision")),
        "chosen_on": decided,
        "validated_on": tune and {**tune.fingerprint(), **held},
    }
    return identity, record


def _before(init_from: str | None) -> dict[str, Any]:
    """run.json of the run that a training starts from; {} without one."""
    if not init_from:
        return {}
    if not (Path(init_from) / "run.json").is_file():
        raise FileNotFoundError(
            f"init_from={init_from}: not a finished training run (no run.json); train it with "
            "train.py"
        )
    return read_own(Path(init_from) / "run.json", STARTED)


def _trained_on(
    cfg: Any,
    images: SegmentationFolder | Mixture,
    photos: Unlabelled | None,
    after: dict[str, Any] | None,
) -> tuple[dict[str, Any], list[LabelSet]]:
    """(what a training is trained on, the labels that decided its synthetic images)."""
    real, synthetic = (getattr(images, kind, images) for kind in ("real", "synthetic"))
    shots = real.listed["images"] if real.listed else "all"
    shots = shots if cfg.shots in (None, "all") else cfg.shots
    found = {
        "source": cfg.source,
        **images.fingerprint(),
        "shots": None if cfg.source == "synthetic" else shots,
        "seed": cfg.seed,
        "after": after,
    }
    if cfg.source != "synthetic":
        found["data"] = cfg.data.name  # the name used by reports; "root" may be any folder
    if real.listed:
        found["shots_list"] = real.listed
    made, chosen = ({}, []) if cfg.source == "real" else _synthetic_record(synthetic)
    (found["synthetic"] if cfg.source == "mixed" else found).update(made)
    if holds_out(cfg):
        found["hold_out"] = cfg.hold_out
    if photos is not None:
        shown = {"photographs": photos.fingerprint()}
        found["self_training"] = {**settings(taught(cfg)), **shown}
    return found, chosen


def taught(cfg: Any) -> dict[str, Any]:
    """The group ``self_training`` for records and identities. Leaves out the ``momentum`` that all
    runs had before it became a setting, which keeps those runs resumable."""
    group = plain(cfg.self_training)
    teacher = {k: v for k, v in group["teacher"].items() if (k, v) != ("momentum", 0.99)}
    return {**group, "teacher": teacher}


def loggers(cfg: Any, **more: Any) -> list[Guarded]:
    """The chosen loggers, CSV first; a failure in one of them is a warning and does not end the
    training."""
    nodes, given = plain(cfg.loggers), plain(cfg)["logger"]
    chosen = {given} if isinstance(given, str) else set(given or ())
    return [Guarded(instantiate({**nodes[k], **more})) for k in ("csv", *sorted(chosen - {"csv"}))]


def trainer(cfg: Any, validate: bool, more_callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """Lightning's trainer with the chosen callbacks and loggers; without a tune set nothing is
    validated, and there is no best checkpoint."""
    node = plain(cfg.trainer)
    callbacks = {k: v for k, v in node.pop("callbacks").items() if v and (validate or k != "best")}
    if not validate:
        off = ("val_check_interval", "check_val_every_n_epoch")
        node |= {"limit_val_batches": 0, **dict.fromkeys(off)}
    _prepare(cfg, Path(node["default_root_dir"]), Path(node["default_root_dir"]))
    # otherwise Lightning adds a ModelCheckpoint of its own
    node["enable_checkpointing"] = "best" in callbacks
    if cfg.device != "auto":
        where = torch.device(cfg.device)
        node["accelerator"] = where.type
        node["devices"] = node["devices"] if where.index is None else [where.index]
    chosen = [*(instantiate(v) for v in callbacks.values()), *more_callbacks]
    return _trainer(cfg.name, node, chosen, loggers(cfg))


def _trainer(
    name: str, node: dict[str, Any], callbacks: list[pl.Callback], loggers: list[Guarded]
) -> pl.Trainer:
    """Callbacks and loggers are already objects here: Hydra copies its arguments, and must not see
    them. A training of fewer steps than ``log_every_n_steps`` logs its last one.
    ``enable_progress_bar``: use our own bar; without it, lines."""
    callbacks = [*callbacks, Steps(name, node.get("enable_progress_bar", True))]
    node = {**node, "enable_progress_bar": False}
    if node["max_steps"] > 0:
        node["log_every_n_steps"] = min(node["log_every_n_steps"], node["max_steps"])
    return instantiate({**node, "_partial_": True})(callbacks=callbacks, logger=loggers)


def _prepare(cfg: Any, folder: Path, log_folder: Path) -> None:
    """Write config.yaml and move an earlier log away; only in the first process of a training."""
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        _keep_log(log_folder / "metrics.csv")


def _keep_log(path: Path) -> None:
    """Lightning's CSV logger removes an existing metrics.csv, so that of an interrupted run is kept
    as metrics.1.csv, 2, ..."""
    if path.exists():
        names = (path.with_name(f"metrics.{i}.csv") for i in range(1, 10**6))
        path.rename(next(p for p in names if not p.exists()))


def trainer_factory(cfg: Any) -> Callable[[int, str | Path, bool], pl.Trainer]:
    """``make(max_steps, default_root_dir, average)`` for a training of several parts, each with
    its own folder and log."""

    def make(max_steps: int, default_root_dir: str | Path, average: bool) -> pl.Trainer:
        node = plain(cfg.trainer) | {"max_steps": max_steps}
        node["default_root_dir"] = str(default_root_dir)
        parts = {k: v for k, v in node.pop("callbacks").items() if v and (average or k != "ema")}
        _prepare(cfg, Path(cfg.output_root, cfg.name), Path(default_root_dir))
        parts["last"]["dirpath"] = str(Path(default_root_dir) / "checkpoints")
        chosen = [instantiate(v) for v in parts.values()]
        return _trainer(cfg.name, node, chosen, loggers(cfg, save_dir=str(default_root_dir)))

    return make
