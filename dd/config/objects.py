"""Configuration nodes as objects: which targets are allowed, and what several commands need."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dd import taxonomy as taxonomies
from dd.config.check_values import check_arguments
from dd.data.datasets import SegmentationFolder
from dd.evaluation.supervision import LabelSet, choices, merged
from dd.segmenters.base import Segmenter
from dd.stages.train_segmenter import fill, load_weights
from dd.store.provenance import SETTINGS, read_own
from dd.store.schemas import TRAINED
from dd.training.segmentation import Views

ALLOWED = (
    "dd.prompts.",
    "dd.prompts.captioner.",
    "dd.execution.",
    "dd.masks.from_heat.",
    "dd.data.quality.",
    "dd.generators.",
    "dd.segmenters.",
    "dd.labelers.",
    "dd.training.segmentation.",
    "dd.training.mean_teacher.",
    "dd.training.",
    "pytorch_lightning.trainer.trainer.Trainer",
    "pytorch_lightning.loggers.",
    "pytorch_lightning.callbacks.",
    "pytorch_lightning.profilers.",
)
GROUPS = {
    "diffusion": "attention",
    "labeler": "masks",
}  # group: name of what was chosen in it, if different
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    HydraException,
    OmegaConfBaseException,
)


def instantiate(node: Any, **kwargs: Any) -> Any:
    """``hydra.utils.instantiate`` for allowed targets only, with plain lists and dictionaries
    inside. ``chosen_on`` (see :func:`chosen_on`) is not passed as an argument.

    ValueError names the target that is refused: a configuration cannot call ``os.system`` or
    ``torch.load``.
    """
    _check_targets([node, kwargs])
    prefix = f"{node._get_full_key(None)}.".lstrip(".") if OmegaConf.is_config(node) else ""
    if (isinstance(node, dict) or OmegaConf.is_dict(node)) and "chosen_on" in node:
        node = settings(node)
    _check_arguments(node, prefix)
    try:
        return hydra.utils.instantiate(node, _convert_="all", **kwargs)
    except InstantiationException as error:
        if isinstance(error.__cause__, USER_ERRORS):
            raise error.__cause__ from None
        raise


def _check_targets(node: Any) -> None:
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        if "_target_" in node:
            try:
                target = hydra.utils.get_object(node["_target_"])
            except Exception:
                target = None
            name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
            prefixes = tuple(a for a in ALLOWED if a.endswith("."))
            if not isinstance(target, type) or not (name.startswith(prefixes) or name in ALLOWED):
                raise ValueError(
                    f"_target_ {node['_target_']!r} (really {name}) is not allowed; allowed: "
                    f"{', '.join(ALLOWED)}"
                )
        node = list(node.values())
    for value in node if isinstance(node, list | tuple) else ():
        _check_targets(value)


def check_loaded(cfg: DictConfig) -> None:
    """ValueError for a setting that the constructor of its node does not take, if its module is
    already imported. Other modules may be large and not needed by the stage; their nodes are
    checked when they are made."""
    for key, node in plain(cfg).items():
        _check_arguments(node, f"{key}.", loaded=True)


def _check_arguments(node: Any, prefix: str, loaded: bool = False) -> None:
    if OmegaConf.is_config(node):
        prefix = prefix or f"{node._get_full_key(None)}.".lstrip(".")
        node = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    if isinstance(node, dict):
        target = node.get("_target_")
        if "_target_" in node and not (loaded and _elsewhere(target)):
            _check_targets({"_target_": target})
            # may be null until it is made
            known = {k: v for k, v in node.items() if v is not None or not loaded}
            check_arguments(prefix, hydra.utils.get_object(target), known)
        for key, value in node.items():
            _check_arguments(value, f"{prefix}{key}.", loaded)


def _elsewhere(target: object) -> bool:
    """Whether a target's module is not imported yet."""
    return isinstance(target, str) and target.rpartition(".")[0] not in sys.modules


def plain(node: Any) -> Any:
    """A configuration node as resolved plain containers."""
    return OmegaConf.to_container(node, resolve=True)


def settings(node: Any) -> dict[str, Any]:
    """:func:`plain` without the record of what the values were chosen on, which decides no
    result."""
    values = plain(node) if OmegaConf.is_config(node) else node
    return {k: v for k, v in values.items() if k != "chosen_on"}


def chosen_on(cfg: DictConfig, *groups: str) -> list[LabelSet]:
    """The choices (:mod:`dd.evaluation.supervision`) that ``cfg`` declares: those of its own key
    ``chosen_on``, {what: label sets}, and of the ``chosen_on`` of ``groups``. ValueError for
    another form."""

    def given(key: str) -> Any:
        node = OmegaConf.select(cfg, key)
        return plain(node) if OmegaConf.is_config(node) else node

    own = given("chosen_on") or {}
    if not isinstance(own, dict):
        raise ValueError(f"chosen_on={own!r:.200}: expected {{what was chosen: label sets}}")
    found = [choices(str(what), sets) for what, sets in own.items()]
    found += [choices(GROUPS.get(group, group), given(f"{group}.chosen_on")) for group in groups]
    return merged(*found)


def taxonomy(cfg: DictConfig) -> taxonomies.Taxonomy:
    return taxonomies.taxonomy(cfg.data.taxonomy)


def palette(cfg: DictConfig, run: dict[str, Any]) -> list[int]:
    """Colours of a run's classes: those of the chosen data's taxonomy if it has the same classes,
    else VOC's."""
    try:
        chosen = taxonomy(cfg)
    except FileNotFoundError:  # data=own without its data: using a run needs no data set
        return taxonomies.voc_palette()
    same = list(chosen.names) == run["taxonomy"]["names"]
    return chosen.palette if same else taxonomies.voc_palette()


def device(cfg: DictConfig) -> str:
    """``auto`` means the GPU if there is one."""
    if cfg.device != "auto":
        return cfg.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def real_data(
    cfg: DictConfig, split: str, shots: int | None = None, shots_list: str | None = None
) -> SegmentationFolder:
    """Images and masks of one split of the data group; ``shots`` of them, or of those of a list."""
    # a folder, a list of them, or null: as the data set itself says
    images = plain(cfg.data).get("images")
    which = shots, cfg.seed, images, shots_list
    return SegmentationFolder(cfg.data.root, split, taxonomy(cfg), cfg.data.masks, *which)


def segmenter_of(run: dict[str, Any], trusted: bool = False) -> Segmenter:
    """The segmenter of a run.json with its number of classes: only our own classes with plain
    values. A run.json cannot declare a configuration file ``trusted``, because that file is
    executed; the caller decides."""
    node = dict(run["segmenter"])
    if "trusted" in node:
        node["trusted"] = trusted
    values = [x for v in node.values() for x in (v if isinstance(v, list) else [v])]
    ours = str(node.get("_target_", "")).startswith("dd.segmenters.")
    if not ours or any(isinstance(x, dict | list) for x in values):
        raise ValueError(
            f"run.json names a segmenter {node!r} that is not one of dd.segmenters with plain "
            "values"
        )
    made = instantiate({**node, "pretrained": None}, num_classes=1 + len(run["taxonomy"]["names"]))
    for part, what in (("config", ""), ("code", ", by the code that it imports,")):
        then, now = run.get("segmenter_files", {}).get(part), made.files.get(part)
        if then not in (None, now):
            raise ValueError(
                f"segmenter.config={node['config']} now describes{what} another model (sha256 "
                f"{str(now)[:12]}...) than the run was trained with (sha256 {then[:12]}...). "
                "Restore the file, or train a run of another name with the new one"
            )
    return made


def trained_run(
    folder: str | Path,
    trusted: bool = False,
    weights: str = "ema",
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> tuple[dict[str, Any], Segmenter, Views]:
    """(run.json, segmenter with its weights, views at the run's own scale) of a finished run."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        begun = (Path(folder) / SETTINGS).is_file()
        raise FileNotFoundError(
            f"{folder}: its training has begun and is not finished (no run.json); the same "
            "train.py command resumes"
            if begun
            else f"{folder}: no finished training run there (a folder with run.json); train it "
            "with train.py"
        )
    if "segmenter" not in read_own(path, {}):
        raise ValueError(
            f"{folder} is not a training run of a segmenter (its run.json names none); give the "
            "folder of one"
        )
    run = read_own(path, TRAINED)
    segmenter = segmenter_of(run, trusted)
    fill(segmenter, load_weights(folder, weights), folder)
    return run, segmenter, Views(run["scale"], scales, flip)
