"""From a Hydra configuration to plain objects: the only importer of Hydra beside the root scripts.

Nothing outside an allow-list of prefixes is instantiated, checked on the resolved object's own module and name, and a
mistyped override is answered with the names that exist before any work starts.
"""

import logging
import os
import re
import sys
import warnings
from difflib import get_close_matches
from glob import glob
from pathlib import Path

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dd import taxonomy as taxonomies
from dd.datasets import SegmentationFolder
from dd.provenance import read_json

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice about optional packages at import

CONF = Path(__file__).parent.parent / "conf"
ALLOWED = (
    "dd.prompts.",
    "dd.masks.",
    "dd.diffusion.",
    "dd.segmenters.",
    "dd.segmentation.",
    "pytorch_lightning.trainer.trainer.Trainer",
    "pytorch_lightning.loggers.",
    "pytorch_lightning.callbacks.",
)
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, PermissionError, HydraException, OmegaConfBaseException)


def instantiate(node, **kwargs):
    """``hydra.utils.instantiate`` for allowed targets only, with plain lists and dictionaries inside.

    ValueError names the target that is refused: a configuration cannot call ``os.system`` or ``torch.load``.
    """
    _check_targets([node, kwargs])
    try:
        return hydra.utils.instantiate(node, _convert_="all", **kwargs)
    except InstantiationException as error:
        if isinstance(error.__cause__, USER_ERRORS):
            raise error.__cause__ from None
        raise


def _check_targets(node):
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        if "_target_" in node:
            try:
                target = hydra.utils.get_object(node["_target_"])
            except Exception:
                target = None
            name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
            if not isinstance(target, type) or not any(name == a or (a.endswith(".") and name.startswith(a)) for a in ALLOWED):
                raise ValueError(
                    f"_target_ {node['_target_']!r} (really {name}) is not allowed; allowed: {', '.join(ALLOWED)}"
                )
        for value in node.values():
            _check_targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            _check_targets(value)


def plain(node) -> dict:
    """A configuration node as resolved plain containers."""
    return OmegaConf.to_container(node, resolve=True)


def taxonomy(cfg) -> taxonomies.Taxonomy:
    return taxonomies.taxonomy(cfg.data.taxonomy)


def device(cfg) -> str:
    """``auto`` means the GPU when there is one."""
    if cfg.device != "auto":
        return cfg.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def segmenter_of(run: dict):
    """The segmenter of a run.json with its number of classes: our own classes with plain scalars, nothing else."""
    node = dict(run["segmenter"])
    if not str(node.get("_target_", "")).startswith("dd.segmenters.") or any(
        isinstance(v, dict | list) for v in node.values()
    ):
        raise ValueError(f"run.json names a segmenter {node!r} that is not one of dd.segmenters with plain values")
    return instantiate({**node, "pretrained": None}, num_classes=1 + len(run["taxonomy"]["names"]))


def swept_name(cfg, overrides: list[str]) -> str:
    """The run's name, followed in a multirun by what was swept (``shots=16,seed=0``), so that jobs never share a folder."""
    parsed = OverridesParser.create().parse_overrides([a for a in sys.argv[1:] if "=" in a and not a.startswith("-")])
    swept = {o.key_or_group for o in parsed if o.is_sweep_override()}
    parts = [o for o in overrides if o.split("=", 1)[0].lstrip("+~") in swept and o not in re.split("[/,]", cfg.name)]
    return "/".join([cfg.name, ",".join(parts)]) if parts else cfg.name


def quoted(argument: str) -> str:
    """Run folders are named ``shots=16,seed=0``; in an override Hydra wants such a value in quotes: ``run="..."``."""
    key, _, value = argument.partition("=")
    bare = "=" in value and not argument.startswith("-") and not any(c in value for c in "\"'[]()")
    return f'{key}="{value}"' if bare else argument


def main(config_name: str, run):
    """Entry point of a root script: compose ``conf/<config_name>.yaml``, call ``run(cfg)``, answer errors on one screen."""
    sys.argv[1:] = [quoted(a) for a in sys.argv[1:]]
    overrides = [a for a in sys.argv[1:] if "=" in a and not a.startswith(("-", "hydra."))]
    code = 0
    try:
        check_overrides(config_name, overrides)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(_guarded(run))()
    except USER_ERRORS as error:
        if os.environ.get("DD_TRACEBACK"):
            raise
        code = 2
        print(f"error: {error}\n(DD_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
    except KeyboardInterrupt as stop:
        code = 130
        print(f"stopped: {stop or 'interrupted'}. The same command goes on from here.", file=sys.stderr)
    sys.exit(code)


def _guarded(run):
    """Hydra prints a traceback of its own for an exception inside a job: carry ours past it."""

    def task(cfg):
        from hydra.core.hydra_config import HydraConfig

        torch.set_flush_denormal(True)
        logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # neither hardware lists nor advertisements
        warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")  # it holds config.yaml
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # Lightning's own, for every run
        OmegaConf.set_struct(cfg, False)
        cfg.name = swept_name(cfg, list(HydraConfig.get().overrides.task))
        OmegaConf.set_struct(cfg, True)
        try:
            return run(cfg)
        except USER_ERRORS as error:
            if os.environ.get("DD_TRACEBACK"):
                raise
            print(f"error: {error}\n(DD_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
            sys.exit(2)

    return task


def check_overrides(config_name: str, overrides: list[str]) -> None:
    """ValueError for an override whose key or group value does not exist, with the allowed names."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
        choices = [
            [f"{o.key_or_group}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line]
            for o in parsed
        ]
        groups = {p.name for p in CONF.iterdir() if p.is_dir()}
        tries = [[c[0] for c in choices]]
        for i, each in enumerate(choices):  # each choice of a swept group must exist; values are checked when used
            if each[0].partition("=")[0] in groups:
                tries += [[*tries[0][:i], choice, *tries[0][i + 1 :]] for choice in each[1:]]
        for single in tries:
            try:
                hydra.compose(config_name, overrides=single)
            except (HydraException, OmegaConfBaseException) as error:
                raise ValueError(_explain(config_name, single, error)) from None


def _explain(config_name, overrides, error) -> str:
    groups = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in CONF.iterdir() if p.is_dir()}
    base = hydra.compose(config_name)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in groups:
            if value not in groups[key] and value != "null":
                return f"{override!r}: no such {key}; allowed: {', '.join(groups[key])}{_nearest(value, groups[key])}"
            if key == "experiment" and value != "null":
                base = hydra.compose(config_name, overrides=[override])
            continue
        node, path = base, []
        for part in key.split("."):
            names = [str(k) for k in node] if isinstance(node, DictConfig) else []
            names += [] if path else sorted(groups.keys() - set(names))
            if part not in names:
                where = f"in {'.'.join(path)}" if path else "at the top level"
                return f"{override!r}: no key {part!r} {where}; allowed: {', '.join(names)}{_nearest(part, names)}"
            path.append(part)
            node = node._get_node(part)
    return str(error)


def _nearest(word, names) -> str:
    close = get_close_matches(word, names, 1)
    return f". Did you mean {close[0]!r}?" if close else ""


# --------------------------------------------------------------------------------------------- pieces of the root scripts


def seed_everything(seed: int) -> None:
    """Seeds of the weights' initial values and of everything that is not a function of the sample."""
    from pytorch_lightning import seed_everything as seed_all

    seed_all(seed, verbose=False)


def training_sets(cfg):
    """(training set, tune set or None) of a train configuration."""
    classes = taxonomy(cfg)
    tune = None
    if cfg.data.tune_split is not None and cfg.trainer.get("limit_val_batches") != 0:
        tune = SegmentationFolder(cfg.data.root, cfg.data.tune_split, classes, cfg.data.masks)
    if cfg.source == "real":
        shots = None if cfg.shots in (None, "all") else cfg.shots
        return SegmentationFolder(cfg.data.root, cfg.data.train_split, classes, cfg.data.masks, shots, cfg.seed), tune
    if cfg.source != "synthetic":
        raise ValueError(f"source={cfg.source!r}; allowed: synthetic, real")
    if cfg.shots not in (None, "all"):
        raise ValueError(f"shots={cfg.shots} has no effect with source=synthetic; use source=real")
    return SegmentationFolder(cfg.synthetic, "train", classes, cfg.synthetic_masks), tune


def training_record(cfg, images) -> tuple[dict, dict]:
    """(identity, record) of a training run: what makes it another run, and what evaluation must know of it."""
    shots = None if cfg.source == "synthetic" else "all" if cfg.shots in (None, "all") else cfg.shots
    before = read_json(Path(cfg.init_from) / "run.json") if cfg.init_from else None
    trained_on = {
        "source": cfg.source, **images.fingerprint(), "shots": shots, "seed": cfg.seed,
        "after": before and before["trained_on"],
    }  # fmt: skip
    if cfg.source == "synthetic":
        trained_on["mask_settings"] = read_json(images.root / images.masks / "masks.json")["identity"]
    trainer_keys = ("max_steps", "precision", "gradient_clip_val", "callbacks")
    chosen = {k: plain(cfg)[k] for k in ("segmenter", "optimizer", "transform", "batch_size", "scale", "seed")}
    trainer_settings = {k: v for k, v in plain(cfg)["trainer"].items() if k in trainer_keys}
    trainer_settings["callbacks"] = {"ema": (trainer_settings.get("callbacks") or {}).get("ema")}
    identity = {**chosen, "trainer": trainer_settings, "trained_on": trained_on}
    identity["init_from_sha256"] = before and before["checkpoint_sha256"]
    record = {
        "segmenter": plain(cfg.segmenter), "taxonomy": {"name": images.taxonomy.name, "names": list(images.taxonomy.names)},
        "scale": cfg.scale, "bf16": cfg.trainer.precision == "bf16-mixed", "trained_on": trained_on,
        "supervision": "A" if cfg.source == "synthetic" or before and before["supervision"] == "A" else "real",
    }  # fmt: skip
    return identity, record


def report_arguments(cfg) -> dict:
    """What the report stage takes, from an evaluate configuration; ``runs`` is a glob of run folders."""
    runs = sorted(Path(p).parent for p in glob(f"{cfg.runs}/**/run.json", recursive=True)) if cfg.runs else []
    if not runs:
        raise FileNotFoundError(f"runs={cfg.runs}: no finished training run below it (a folder with run.json)")
    return {
        "folder": f"{cfg.output_root}/{cfg.name}", "runs": runs, "data_root": cfg.data_root, "synthetic": cfg.synthetic,
        "taxonomy": taxonomy(cfg), "domains": list(cfg.domains), "title": f"Dataset Diffusion: {cfg.name}",
    }  # fmt: skip


def trainer(cfg, validate: bool):
    """Lightning's trainer with the chosen callbacks and loggers; without a tune set nothing is validated or called best."""
    node = plain(cfg.trainer)
    callbacks = {k: v for k, v in node.pop("callbacks").items() if v and (validate or k != "best")}
    node |= {} if validate else {"limit_val_batches": 0, "val_check_interval": None, "check_val_every_n_epoch": None}
    Path(node["default_root_dir"]).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, Path(node["default_root_dir"]) / "config.yaml", resolve=True)
    _keep_log(Path(node["default_root_dir"]) / "metrics.csv")
    node["enable_checkpointing"] = "best" in callbacks  # otherwise Lightning adds a ModelCheckpoint of its own
    if cfg.device != "auto":
        chosen = torch.device(cfg.device)
        node["accelerator"] = chosen.type
        node["devices"] = node["devices"] if chosen.index is None else [chosen.index]
    loggers = [instantiate(v) for v in plain(cfg.logger).values()]
    return instantiate(node, callbacks=[instantiate(v) for v in callbacks.values()], logger=loggers)


def _keep_log(path: Path) -> None:
    """Lightning's CSV logger removes the metrics.csv it finds: an interrupted run's goes on as metrics.1.csv, 2, ..."""
    if path.exists():
        path.rename(next(p for i in range(1, 10**6) if not (p := path.with_name(f"metrics.{i}.csv")).exists()))


def trainer_factory(cfg):
    """``make(max_steps, default_root_dir, average)`` for a training of several parts, each with its own folder and log."""

    def make(max_steps, default_root_dir, average):
        node = plain(cfg.trainer) | {"max_steps": max_steps, "default_root_dir": str(default_root_dir)}
        parts = {k: v for k, v in node.pop("callbacks").items() if v and (average or k != "ema")}
        _keep_log(Path(default_root_dir) / "metrics.csv")
        parts["last"]["dirpath"] = str(Path(default_root_dir) / "checkpoints")
        loggers = [instantiate({**v, "save_dir": str(default_root_dir)}) for v in plain(cfg.logger).values()]
        return instantiate(node, callbacks=[instantiate(v) for v in parts.values()], logger=loggers)

    return make
