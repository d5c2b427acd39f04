"""Choosing on the tune split: objectives, search spaces, trials."""

import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import ListConfig, OmegaConf

from dd.config.composition import compose
from dd.config.identity import trainer_identity
from dd.config.jobs import job_overrides
from dd.config.objects import plain, real_data
from dd.config.overrides import check_overrides
from dd.config.training import holds_out, taught, training_record, training_sets, unlabelled_photos
from dd.data.datasets import SegmentationFolder
from dd.evaluation.supervision import label_set
from dd.store.provenance import read_yaml

FIXED = (
    "name",
    "stage",
    "experiment",
    "search",
    "data",
    "data_root",
    "output_root",
    "logger",
    "loggers",
    "seed",
    "hold_out",
    "device",
)


def judging_set(cfg: Any, tune: SegmentationFolder | None) -> SegmentationFolder | None:
    """The images that measure a run's objective: the ``tune`` set of its training; in a multirun
    without validation the data's tune split, if it has one; else None. Never the test split."""
    several = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if tune is not None or not several:
        return tune
    split = cfg.data.tune_split
    return None if split in (None, cfg.data.test_split) else real_data(cfg, split)


def check_tuning(cfg: Any) -> None:
    """ValueError for a study without a tune split, without validation during training, or on
    several devices."""
    if cfg.hold_out is None and cfg.data.tune_split in (None, cfg.data.test_split):
        split = cfg.data.tune_split
        what = "no tune split" if split is None else f"the test split {split!r} as tune split"
        raise ValueError(
            f"data {cfg.data.name!r} has {what}, and nothing is ever chosen on the test split; "
            "keep training images back with hold_out=<number>, or set data.tune_split"
        )
    if cfg.trainer.get("limit_val_batches") == 0:
        raise ValueError(
            "trainer.limit_val_batches=0 validates nothing, and trials are judged by validation: "
            "add trainer.limit_val_batches=1.0 trainer.val_check_interval=<steps between them>"
        )
    one_device(cfg, "a trial trains on one device; start the same command once for each")


def judged_labels(cfg: Any) -> list[dict[str, Any]]:
    """The label sets behind a choice between trainings of ``cfg`` by their objective: the real
    images that they are trained on, and those that judge them. Images held out of a synthetic set
    are judged against the masks of their attention, which use no real label."""
    found, shots = [], None if cfg.shots in (None, "all") else cfg.shots
    if cfg.source != "synthetic":
        images = real_data(cfg, cfg.data.train_split, shots)  # including those held out
        seed = None if shots is None else cfg.seed
        found.append(label_set(f"{cfg.data.name}/{images.split}", len(images), seed))
    if not holds_out(cfg) and cfg.data.tune_split is not None:
        images = real_data(cfg, cfg.data.tune_split)
        found.append(label_set(f"{cfg.data.name}/{images.split}", len(images)))
    return found


def one_device(cfg: Any, why: str) -> None:
    devices = cfg.trainer.devices
    if devices not in (1, "1") and not (isinstance(devices, ListConfig) and len(devices) == 1):
        raise ValueError(f"trainer.devices={devices}: {why}")


def search_space(cfg: Any) -> dict[str, Any]:
    """``search.space``, or the one that it names in ``search.spaces`` or as a YAML file. ValueError
    for a key that a search must not change."""
    given = plain(cfg.search)
    space, named = given["space"], given.get("spaces", {})
    if isinstance(space, str) and space in named:
        space = named[space]
    if isinstance(space, str):
        if not Path(space).is_file():
            raise FileNotFoundError(
                f"search.space={space}: no such file, and none of {', '.join(named)}"
            )
        read_yaml(space)  # refuses endless aliases
        # 1e-5 is read as a number, as on the command line
        space = OmegaConf.to_container(OmegaConf.load(space))
    for key in space if isinstance(space, dict) else ():
        if str(key).partition(".")[0].partition("/")[0] in (*FIXED, "study", "hydra", "chosen_on"):
            raise ValueError(
                f"search.space: {key} is not searched: it decides what is compared, not how well "
                "it trains"
            )
    return space


def study_identity(cfg: Any, space: dict[str, Any]) -> dict[str, Any]:
    """Settings that all trials of a study share: all except where it runs, the number of trials and
    loggers."""
    elsewhere = ("name", "stage", "output_root", "device", "num_workers", "logger", "loggers")
    node = {k: v for k, v in plain(cfg).items() if k not in (*elsewhere, "study", "chosen_on")}
    # leave out unused groups, since the study is the same without them
    used = {"self_training": cfg.self_training.teacher, "unlabelled": cfg.unlabelled.images}
    for key, value in {**used, "shots_list": cfg.shots_list}.items():
        if not value:
            node.pop(key)
    if cfg.self_training.teacher:
        node["self_training"] = taught(cfg)
    looks = ("val_check_interval", "check_val_every_n_epoch", "limit_val_batches")  # for pruning
    pruned = {k: v for k, v in node["trainer"].items() if k in looks}
    node["trainer"] = pruned | trainer_identity(cfg)
    found = {k: v for k, v in node["search"].items() if k not in ("trials", "spaces")}
    node["search"] = {**found, "space": space}
    return node


def study_content(cfg: Any) -> dict[str, Any]:
    """The content behind the paths in :func:`study_identity`: the images and masks that trials are
    trained and judged on, and the weights they start from. With other content, a finished study is
    another one."""
    images, tune = training_sets(cfg)
    photos = unlabelled_photos(cfg, "self_training") if cfg.self_training.teacher else None
    identity, _ = training_record(cfg, images, tune, photos)
    found = {key: identity[key] for key in ("trained_on", "init_from_sha256")}
    return found | {"judged_on": tune and tune.fingerprint()}


def trial(cfg: Any, name: str, overrides: list[str], check_only: bool = False) -> Any:
    """The configuration of one trial: the overrides of this command, then the trial's own."""
    given = [o for o in job_overrides() if not re.match(r"[+~]*(name|stage|search)\b", o)]
    together = [*given, f'name="{cfg.name}/{name}"', "stage=segmenter", *overrides]
    if check_only:
        return check_overrides("train", together)
    return compose("train", together)
