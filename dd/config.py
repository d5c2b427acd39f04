"""From a Hydra configuration to plain objects: the only importer of Hydra beside the root scripts.

Nothing outside an allow-list of prefixes is instantiated, checked on the resolved object's own module and name, and a
mistyped override is answered with the names that exist before any work starts.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read by the imports below: no advice about optional packages

import itertools
import logging
import re
import sys
import warnings
from difflib import get_close_matches
from glob import glob
from pathlib import Path

import hydra
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dd import taxonomy as taxonomies
from dd.datamodule import Mixture, hold_out
from dd.datasets import SegmentationFolder
from dd.masks import READING, MaskSettings
from dd.provenance import read_json
from dd.segmentation import Views
from dd.stages.train import load_weights, supervision
from dd.tracking.loggers import Guarded

CONF = Path(__file__).parent.parent / "conf"
ALLOWED = (
    "dd.prompt_sources.",
    "dd.captioner.",
    "dd.masks.",
    "dd.diffusion.",
    "dd.segmenters.",
    "dd.segmentation.",
    "dd.tracking.",
    "pytorch_lightning.trainer.trainer.Trainer",
    "pytorch_lightning.loggers.",
    "pytorch_lightning.callbacks.",
)
SOURCES = ("synthetic", "real", "mixed")
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


def segmenter_of(run: dict, trusted: bool = False):
    """The segmenter of a run.json with its number of classes: our own classes with plain scalars, nothing else. A run.json
    cannot declare a configuration file ``trusted``, because that file is executed: whoever rebuilds the segmenter does."""
    node = dict(run["segmenter"])
    if "trusted" in node:
        node["trusted"] = trusted
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
    command = list(sys.argv)

    def task(cfg):
        sys.argv = list(command)  # a launcher's worker has another one; it names what is swept
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
        if key.startswith("hydra/"):
            there = GlobalHydra.instance().config_loader().get_group_options(key)
            if value not in there:
                more = ""
                if key == "hydra/launcher":
                    more = '; joblib, submitit_local and submitit_slurm are installed by: pip install -e ".[sweeps]"'
                elif key == "hydra/sweeper":
                    more = "; Optuna is used directly: python train.py stage=tune"
                return f"{override!r}: no such {key}; installed: {', '.join(there)}{more}"
            continue
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


def real_data(cfg, split: str, shots: int | None = None) -> SegmentationFolder:
    """Images and masks of one split of the data group."""
    images = plain(cfg.data).get("images")  # a folder, a list of them, or null: where the data set itself says
    return SegmentationFolder(cfg.data.root, split, taxonomy(cfg), cfg.data.masks, shots, cfg.seed, images)


def training_sets(cfg):
    """(training set, tune set or None) of a train configuration. The tune set is ``hold_out`` images of the training set
    (of its real part in mixed training), or the data's tune split; nothing is held out when nothing is validated."""
    if cfg.source not in SOURCES:
        raise ValueError(f"source={cfg.source!r}; allowed: {', '.join(SOURCES)}")
    if cfg.source == "synthetic" and cfg.shots not in (None, "all"):
        raise ValueError(f"shots={cfg.shots} has no effect with source=synthetic; use source=real or source=mixed")
    real = synthetic = tune = None
    if cfg.source != "synthetic":
        real = real_data(cfg, cfg.data.train_split, None if cfg.shots in (None, "all") else cfg.shots)
    if cfg.source != "real":
        synthetic = SegmentationFolder(cfg.synthetic, "train", taxonomy(cfg), cfg.synthetic_masks)
    if _holds_out(cfg) and real is not None:
        real, tune = hold_out(real, cfg.hold_out, cfg.seed)
    elif _holds_out(cfg):
        synthetic, tune = hold_out(synthetic, cfg.hold_out, cfg.seed)
    elif cfg.data.tune_split is not None and cfg.trainer.get("limit_val_batches") != 0:
        tune = real_data(cfg, cfg.data.tune_split)
    return (Mixture(real, synthetic, cfg.real_share) if real and synthetic else real or synthetic), tune


def _holds_out(cfg) -> bool:
    return cfg.hold_out is not None and cfg.trainer.get("limit_val_batches") != 0


def _mask_settings(images) -> dict:
    """What the masks of a synthetic set were made with: settings, heat, and the teacher of self-training."""
    path = images.root / images.masks / "masks.json"
    if not path.is_file():
        raise FileNotFoundError(f"mask set {path.parent} is not finished (no masks.json); run the stage that makes it again")
    return read_json(path)["identity"]


def training_record(cfg, images, tune=None) -> tuple[dict, dict]:
    """(identity, record) of a training run: what makes it another run, and what evaluation must know of it."""
    shots = None if cfg.source == "synthetic" else "all" if cfg.shots in (None, "all") else cfg.shots
    before = read_json(Path(cfg.init_from) / "run.json") if cfg.init_from else None
    trained_on = {
        "source": cfg.source, **images.fingerprint(), "shots": shots, "seed": cfg.seed,
        "after": before and before["trained_on"],
    }  # fmt: skip
    if cfg.source == "synthetic":
        trained_on["mask_settings"] = _mask_settings(images)
    if cfg.source == "mixed":
        trained_on["synthetic"]["mask_settings"] = _mask_settings(images.synthetic)
    if _holds_out(cfg):
        trained_on["hold_out"] = cfg.hold_out
    trainer_keys = ("max_steps", "precision", "gradient_clip_val", "callbacks")
    chosen = {k: plain(cfg)[k] for k in ("segmenter", "optimizer", "transform", "batch_size", "scale", "seed")}
    trainer_settings = {k: v for k, v in plain(cfg)["trainer"].items() if k in trainer_keys}
    trainer_settings["callbacks"] = {"ema": (trainer_settings.get("callbacks") or {}).get("ema")}
    identity = {**chosen, "trainer": trainer_settings, "trained_on": trained_on}
    identity["init_from_sha256"] = before and before["checkpoint_sha256"]
    record = {
        "segmenter": plain(cfg.segmenter), "taxonomy": {"name": images.taxonomy.name, "names": list(images.taxonomy.names)},
        "scale": cfg.scale, "bf16": cfg.trainer.precision == "bf16-mixed", "trained_on": trained_on,
        "supervision": supervision(trained_on, before and before["supervision"]),
        "validated_on": tune and {**tune.fingerprint(), **({"ids": tune.ids} if _holds_out(cfg) else {})},
    }  # fmt: skip
    return identity, record


def report_arguments(cfg) -> dict:
    """What the report stage takes, from an evaluate configuration; ``runs`` is a glob of run folders."""
    runs = sorted(Path(p).parent for p in glob(f"{cfg.runs}/**/run.json", recursive=True)) if cfg.runs else []
    if not runs:
        raise FileNotFoundError(f"runs={cfg.runs}: no finished training run below it (a folder with run.json)")
    return {
        "folder": f"{cfg.output_root}/{cfg.name}", "runs": runs, "tests": test_sets(cfg), "synthetic": cfg.synthetic,
        "taxonomy": taxonomy(cfg), "domains": list(cfg.domains), "title": f"Dataset Diffusion: {cfg.name}",
    }  # fmt: skip


def masks_from(cfg) -> dict | None:
    """Put the settings of ``masks_from``, a file of stage=calibrate or stage=sweep, in ``cfg``: those of the masks and how the
    attention is read. Returns what a mask set records of their choice; None if there is no file.

    FileNotFoundError, or ValueError for another content (nothing but numbers and names is taken from it), for a stage that
    makes its own choice, and for an override that contradicts the file.
    """
    if cfg.masks_from is None:
        return None
    path, kinds = Path(cfg.masks_from), {"power": int, "threshold": float, "band": float, "source": str}
    if cfg.stage in ("sweep", "calibrate"):
        raise ValueError(f"masks_from has no effect with stage={cfg.stage}, which tries settings of its own")
    if not path.is_file():
        raise FileNotFoundError(f"masks_from={path}: no such file; stage=calibrate and stage=sweep print where theirs is")
    given = [a for a in sys.argv[1:] if re.match(rf"masks[.=]|diffusion\.({'|'.join(READING)})=", a)]
    if given:
        raise ValueError(f"masks_from={path} and {', '.join(given)} contradict each other; give one of them")
    try:
        content = read_json(path) if path.suffix == ".json" else yaml.safe_load(path.read_text())
        masks, reading = content["masks"], content["diffusion"]
        values = [v for value in reading.values() for v in (value if type(value) is list else [value])]
        typed = {k: type(v) for k, v in masks.items()} == kinds and all(
            v is None or type(v) is int or (type(v) is str and re.fullmatch(r"[\w.]+", v)) for v in values
        )
        if not typed or not reading.keys() <= set(READING):
            raise ValueError(f"masks hold {masks}, diffusion holds {reading}")
        MaskSettings(**masks)
        calibration = {**content["calibration"], "generator": dict(content["calibration"]["generator"])}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"masks_from={path} is not a file of stage=calibrate or stage=sweep: {error!r:.300}") from None
    cfg.masks.update(masks)
    cfg.diffusion.update(reading)
    return calibration


def trained_run(folder) -> tuple:
    """(run.json, segmenter with its averaged weights, one view at the run's own scale) of a finished run."""
    if not (Path(folder) / "run.json").is_file():
        raise FileNotFoundError(f"{folder}: no finished training run there (a folder with run.json); train it with train.py")
    run = read_json(Path(folder) / "run.json")
    segmenter = segmenter_of(run)
    segmenter.load_state_dict(load_weights(folder))
    return run, segmenter, Views(run["scale"])


def sweep_arguments(cfg) -> dict:
    """What the sweep stage takes beside the folder; ``reference`` is missing as yet if a run has to predict it."""
    given = plain(cfg.sweep)
    if (given["masks"] is None) == (given["run"] is None):
        raise ValueError(
            "stage=sweep compares masks with sweep.masks=<a folder of masks <id>.png> or with what sweep.run=<a training run> "
            f"predicts; give one of them, got sweep.masks={given['masks']}, sweep.run={given['run']}"
        )
    reference = Path(given["masks"] or given["run"])
    inside = reference.relative_to(cfg.output_root) if reference.is_relative_to(cfg.output_root) else Path(reference.name)
    found = {"powers": given["power"], "thresholds": given["threshold"], "bands": given["band"], "sources": given["source"]}
    found |= {"limit": given["limit"], "workers": given["workers"], "name": given["name"] or "_".join(inside.parts)}
    return found | {"reference": reference}


def calibrate_arguments(cfg) -> tuple[str, dict]:
    """(file of the choice, what the calibrate stage takes): each reading of the attention builds its own generator."""
    given, grid = plain(cfg.calibrate), plain(cfg.sweep)
    if type(given["shots"]) is not int:
        raise ValueError(f"calibrate.shots={given['shots']!r}: expected a number of labelled images, such as 16")
    own = given["data"] == cfg.data.root
    images = plain(cfg.data).get("images") if own else None
    data = SegmentationFolder(
        given["data"], given["split"], taxonomy(cfg), cfg.data.masks, given["shots"], cfg.seed, images
    )  # fmt: skip
    for key in READING:
        if given[key] is not None and (not isinstance(given[key], list) or not given[key]):
            raise ValueError(f"calibrate.{key}={given[key]!r}: expected a list of choices, or null for that of diffusion")
    choices = [given[k] or [plain(cfg.diffusion)[k]] for k in READING]
    found = {
        "make_generator": lambda **reading: instantiate(cfg.diffusion, device=device(cfg), **reading),
        "readings": [dict(zip(READING, choice, strict=True)) for choice in itertools.product(*choices)],
        "data": data, "test_split": cfg.data.test_split, "timesteps": given["timesteps"], "seed": cfg.seed,
        "powers": grid["power"], "thresholds": grid["threshold"], "sources": grid["source"], "band": cfg.masks.band,
        "append": cfg.prompts.append,
    }  # fmt: skip
    name = f"calibration_{data.root.name}_{data.split}_{given['shots']}_seed{cfg.seed}.yaml"
    return f"{cfg.output_root}/{cfg.name}/{name}", found


def test_sets(cfg) -> dict[str, SegmentationFolder]:
    """Test images of each of ``domains`` (names of the data group) that lie on this machine."""
    found = {}
    for domain in cfg.domains:
        file, node = CONF / "data" / f"{domain}.yaml", cfg.data
        if domain != cfg.data.name and file.is_file():
            node = OmegaConf.merge({"data_root": cfg.data_root}, OmegaConf.load(file))
        if Path(node.root).is_dir() and domain in (cfg.data.name, file.stem if file.is_file() else None):
            images = OmegaConf.to_container(node, resolve=True).get("images")
            found[domain] = SegmentationFolder(node.root, node.test_split, taxonomy(cfg), node.masks, images=images)
    return found


def loggers(cfg, **more) -> list[Guarded]:
    """The chosen loggers, CSV first; what fails in one of them is a warning and not the end of the training."""
    nodes = plain(cfg.logger)
    return [Guarded(instantiate({**nodes[k], **more})) for k in sorted(nodes, key=lambda name: name != "csv")]


def trainer(cfg, validate: bool, more_callbacks=()):
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
    chosen = [*(instantiate(v) for v in callbacks.values()), *more_callbacks]
    return _trainer(node, chosen, loggers(cfg))


def _trainer(node, callbacks, loggers):
    """Callbacks and loggers are objects by now: Hydra, which copies its arguments, must not see them."""
    return instantiate({**node, "_partial_": True})(callbacks=callbacks, logger=loggers)


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
        chosen = [instantiate(v) for v in parts.values()]
        return _trainer(node, chosen, loggers(cfg, save_dir=str(default_root_dir)))

    return make


# --------------------------------------------------------------------------------------------- choosing by the tune split

FIXED = ("name", "stage", "experiment", "tune", "data", "data_root", "output_root", "logger", "seed", "hold_out", "device")


def judging_set(cfg, tune):
    """What a run's objective is measured on: the ``tune`` set of its training; in a multirun without validation the data's
    tune split, if it has one; else None. Never the test split."""
    if tune is not None or not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return tune
    split = cfg.data.tune_split
    return None if split in (None, cfg.data.test_split) else real_data(cfg, split)


def check_tuning(cfg) -> None:
    """ValueError for a study without a tune split, without validation on the way, or on several devices."""
    if cfg.hold_out is None and cfg.data.tune_split in (None, cfg.data.test_split):
        what = "no tune split" if cfg.data.tune_split is None else f"the test split {cfg.data.test_split!r} as tune split"
        raise ValueError(
            f"data {cfg.data.name!r} has {what}, and nothing is ever chosen on the test split; keep training images back "
            "with hold_out=<number>, or set data.tune_split"
        )
    if cfg.trainer.get("limit_val_batches") == 0:
        raise ValueError(
            "trainer.limit_val_batches=0 validates nothing, and trials are judged by validation: add "
            "trainer.limit_val_batches=1.0 trainer.val_check_interval=<steps between looks>"
        )
    devices = cfg.trainer.devices
    if devices not in (1, "1") and not (isinstance(devices, ListConfig) and len(devices) == 1):
        raise ValueError(f"trainer.devices={devices}: a trial trains on one device; start the same command once for each")


def search_space(cfg) -> dict:
    """``tune.space``, or what the YAML file says that it names; ValueError for a key that a search must not touch."""
    space = plain(cfg.tune)["space"]
    if isinstance(space, str):
        if not Path(space).is_file():
            raise FileNotFoundError(f"tune.space={space}: no such file")
        space = OmegaConf.to_container(OmegaConf.load(space))
    for key in space if isinstance(space, dict) else ():
        if str(key).partition(".")[0].partition("/")[0] in (*FIXED, "hydra"):
            raise ValueError(f"tune.space: {key} is not searched: it decides what is compared, not how well it trains")
    return space


def study_identity(cfg, space: dict) -> dict:
    """Settings that all trials of a study share: all but where it runs, how many trials there are and who listens."""
    elsewhere = ("name", "stage", "output_root", "device", "num_workers", "logger")
    node = {k: v for k, v in plain(cfg).items() if k not in elsewhere}
    loose = ("default_root_dir", "callbacks", "accelerator", "devices", "log_every_n_steps", "enable_progress_bar")
    node["trainer"] = {k: v for k, v in node["trainer"].items() if k not in loose}
    node["trainer"]["ema"] = cfg.trainer.callbacks.get("ema") and plain(cfg.trainer.callbacks.ema)
    node["tune"] = {**{k: v for k, v in node["tune"].items() if k != "trials"}, "space": space}
    return node


def trial(cfg, name: str, overrides: list[str], check_only: bool = False):
    """The configuration of one trial: the overrides of this command, then the trial's own."""
    given = [o for o in HydraConfig.get().overrides.task if not re.match(r"[+~]*(name|stage|tune)\b", o)]
    together = [*given, f'name="{cfg.name}/{name}"', "stage=segmenter", *overrides]
    if check_only:
        return check_overrides("train", together)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("train", together)
