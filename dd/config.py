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
from functools import partial
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

from dd import search
from dd import taxonomy as taxonomies
from dd.budget import RECIPES, Job, Plan
from dd.datamodule import Mixture, hold_out
from dd.datasets import SegmentationFolder, read_split
from dd.executors import CANNOT_WRITE, EXIT, UnitsFailed
from dd.locks import Busy
from dd.masks import READING, MaskSettings
from dd.provenance import fingerprint, read_json
from dd.quality import CLIP, read_rules
from dd.samples import read_records
from dd.segmentation import Views
from dd.stages.train import load_weights, supervision
from dd.tracking.loggers import Guarded

CONF = Path(__file__).parent.parent / "conf"
ALLOWED = (
    "dd.prompt_sources.",
    "dd.captioner.",
    "dd.executors.",
    "dd.masks.",
    "dd.quality.",
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


def executor(cfg):
    """Who makes the units; its number of threads becomes this process's too, since it is part of the identity."""
    chosen = instantiate(cfg.executor)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    return chosen


def worker_tools(diffusion: dict, clip: dict | None, threads: int, device: str) -> tuple:
    """(generator, CLIP model or None) of a worker process, with the numerics of the driver's process."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    return instantiate(diffusion, device=device), clip and instantiate(clip, device=device)


def worker_build(cfg, clip):
    """``build(device)`` of the stage synthesize: what a worker process needs, as plain values."""
    model = clip and plain(cfg.quality)["clip"]
    return partial(worker_tools, plain(cfg.diffusion), model, torch.get_num_threads())


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
        except (*USER_ERRORS, OSError, UnitsFailed, Busy) as error:
            code = exit_code(error)
            if os.environ.get("DD_TRACEBACK") or code is None:
                raise
            print(f"error: {error}\n(DD_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
            sys.exit(code)

    return task


def exit_code(error: Exception) -> int | None:
    """Of an error that is answered on one screen (docs/scale.md); None for others."""
    if isinstance(error, UnitsFailed):
        return EXIT["units failed"]
    if isinstance(error, Busy):
        return EXIT["busy"]
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno in CANNOT_WRITE):
        return EXIT["cannot write"]
    return 2 if isinstance(error, USER_ERRORS) else None


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
        synthetic = SegmentationFolder(cfg.synthetic, cfg.synthetic_split, taxonomy(cfg), cfg.synthetic_masks)
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


def _chosen_list(images) -> dict:
    """{} for the whole list ``train`` of a synthetic set; for another one its ids' hash and, if a filter wrote it, how."""
    if images.split == "train":
        return {}
    path, ids = images.root / "quality" / images.split / "filter.json", fingerprint(read_split(images.root, images.split))
    if not path.is_file():
        return {"filter": {"ids": ids}}
    identity = read_json(path)["identity"]
    if identity["ids"] != ids:
        raise ValueError(f"split {images.split} is not the list that {path} tells of; run generate.py stage=filter again")
    return {"filter": identity}


def training_record(cfg, images, tune=None) -> tuple[dict, dict]:
    """(identity, record) of a training run: what makes it another run, and what evaluation must know of it."""
    shots = None if cfg.source == "synthetic" else "all" if cfg.shots in (None, "all") else cfg.shots
    if cfg.init_from and not (Path(cfg.init_from) / "run.json").is_file():
        raise FileNotFoundError(
            f"init_from={cfg.init_from}: not a finished training run (no run.json); train it with train.py"
        )
    before = read_json(Path(cfg.init_from) / "run.json") if cfg.init_from else None
    trained_on = {
        "source": cfg.source, **images.fingerprint(), "shots": shots, "seed": cfg.seed,
        "after": before and before["trained_on"],
    }  # fmt: skip
    if cfg.source != "synthetic":
        trained_on["data"] = cfg.data.name  # the name that reports know it by; "root" may be any folder
    if cfg.source == "synthetic":
        trained_on |= {"mask_settings": _mask_settings(images), **_chosen_list(images)}
    if cfg.source == "mixed":
        trained_on["synthetic"] |= {"mask_settings": _mask_settings(images.synthetic), **_chosen_list(images.synthetic)}
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
        "baseline": cfg.baseline, "budgets": sorted(glob(f"{cfg.runs}/**/budget.json", recursive=True)),
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


def quality(cfg) -> tuple:
    """(rules, CLIP model or None) of the quality group for the stages that use them; ([], None) for the others."""
    if cfg.stage not in ("all", "synthesize", "label", "filter"):
        return [], None
    rules, model = read_rules(plain(cfg.quality)["rules"]), cfg.quality.clip.model
    if cfg.stage == "filter" and not any(r.action == "drop" for r in rules):
        raise ValueError(
            "stage=filter needs a rule of action drop: quality=default, or one of your own such as "
            "+quality.rules.uncertain='{action: drop, signal: uncertain, above: 0.5}' (docs/quality.md)"
        )
    if cfg.stage == "all" and model is None and any(r.signal in CLIP for r in rules):
        raise ValueError("a rule of quality reads CLIP scores: give quality.clip.model=<folder, or hub id with a revision>")
    return rules, None if model is None else instantiate(cfg.quality.clip, device=device(cfg))


def trained_run(folder, trusted: bool = False) -> tuple:
    """(run.json, segmenter with its averaged weights, one view at the run's own scale) of a finished run."""
    if not (Path(folder) / "run.json").is_file():
        raise FileNotFoundError(f"{folder}: no finished training run there (a folder with run.json); train it with train.py")
    run = read_json(Path(folder) / "run.json")
    segmenter = segmenter_of(run, trusted)
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
    _one_device(cfg, "a trial trains on one device; start the same command once for each")


def _one_device(cfg, why: str) -> None:
    devices = cfg.trainer.devices
    if devices not in (1, "1") and not (isinstance(devices, ListConfig) and len(devices) == 1):
        raise ValueError(f"trainer.devices={devices}: {why}")


def search_space(cfg) -> dict:
    """``tune.space``, or what the YAML file says that it names; ValueError for a key that a search must not touch."""
    space = plain(cfg.tune)["space"]
    if isinstance(space, str):
        if not Path(space).is_file():
            raise FileNotFoundError(f"tune.space={space}: no such file")
        space = OmegaConf.to_container(OmegaConf.load(space))
    for key in space if isinstance(space, dict) else ():
        if str(key).partition(".")[0].partition("/")[0] in (*FIXED, "budget", "hydra"):
            raise ValueError(f"tune.space: {key} is not searched: it decides what is compared, not how well it trains")
    return space


def study_identity(cfg, space: dict) -> dict:
    """Settings that all trials of a study share: all but where it runs, how many trials there are and who listens."""
    elsewhere = ("name", "stage", "output_root", "device", "num_workers", "logger")
    node = {k: v for k, v in plain(cfg).items() if k not in (*elsewhere, "budget")}
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


# ------------------------------------------------------------------------------------------------- the label-budget study

SET_BY_STUDY = ("seed", "shots", "source", "init_from", "optimizer.learning_rate")
SHARED = r"(data_root|output_root|device|num_workers|logger.*|trainer\.(devices|accelerator|enable_progress_bar))$"
JUDGED = ("trainer.limit_val_batches=1.0", "trainer.val_check_interval=null", "trainer.check_val_every_n_epoch=1")


def _given() -> dict[str, str]:
    """{key: override} of this command, without those that say which study it is."""
    keys = {o.lstrip("+~").partition("=")[0]: o for o in HydraConfig.get().overrides.task}
    return {k: o for k, o in keys.items() if k.split(".")[0] not in ("name", "stage", "tune", "experiment", "budget")}


def _budget_part(cfg, recipe: str, domain: str, more=()):
    """The configuration of a recipe of the study on a domain, but for its name: the recipe's experiment, then the overrides of
    this command, then ``more``. ValueError for an experiment or a domain that does not exist."""
    experiment = plain(cfg.budget)["experiments"]["real" if recipe == "real_short" else recipe]
    known = {kind: sorted(p.stem for p in (CONF / kind).glob("*.yaml")) for kind in ("experiment", "data")}
    if experiment not in known["experiment"]:
        raise ValueError(f"budget.experiments: {recipe}: {experiment!r}; allowed: {', '.join(known['experiment'])}")
    own = domain == cfg.data.name
    if not own and domain not in known["data"]:
        raise ValueError(f"budget.domains: {domain!r} is neither {cfg.data.name!r} nor one of {', '.join(known['data'])}")
    given = {k: o for k, o in _given().items() if k != "data"}
    if not own and (detail := [o for k, o in given.items() if k.startswith("data.")]):
        raise ValueError(f"{', '.join(detail)} would change every domain; write a file in conf/data for each of them")
    data = HydraConfig.get().runtime.choices["data"] if own else domain
    fixed = [f"experiment={experiment}", f"data={data}", "stage=segmenter", "hold_out=null"]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("train", [*given.values(), *fixed, search.override("synthetic", cfg.synthetic), *more])


def budget_plan(cfg) -> tuple[Plan, dict]:
    """(plan, settings that all runs of the study share). Data and settings are checked; nothing is trained or written."""
    _one_device(cfg, "a run of the study trains on one device")
    if found := [o for k, o in _given().items() if k in SET_BY_STUDY]:
        raise ValueError(f"{', '.join(found)}: stage=budget sets this for each run; see the keys of budget")
    given = plain(cfg.budget)
    if not isinstance(given["domains"], list) or not given["domains"]:
        raise ValueError(f"budget.domains={given['domains']!r}: expected a list of data sets, such as [{cfg.data.name}]")
    needed = [r for r in RECIPES if r in ("synthetic", "finetune") or r in (given["arms"] or ())]
    parts = {recipe: _budget_part(cfg, recipe, given["domains"][0]) for recipe in needed}
    domains = {domain: _budget_part(cfg, "finetune", domain) for domain in given["domains"]}
    for domain, part in domains.items():
        if part.data.tune_split == part.data.test_split:
            raise ValueError(
                f"data {domain!r} has its test split as tune split, and nothing is ever chosen on the test split; "
                "set data.tune_split=null, or to other images"
            )
        if taxonomy(part) != taxonomy(cfg):
            raise ValueError(f"budget.domains: {domain!r} has other classes than {cfg.data.name!r}")
    plan = Plan(
        **{k: given[k] for k in ("shots", "seeds", "arms")}, choose=given["choose"] or {},
        learning_rates=given["learning_rates"] or {},
        domains={domain: len(real_data(part, part.data.train_split)) for domain, part in domains.items()},
        synthetic_steps=parts["synthetic"].trainer.max_steps, finetune_steps=parts["finetune"].trainer.max_steps,
        own_rates={recipe: part.optimizer.learning_rate for recipe, part in parts.items()},
        judged_on=_judged_on(cfg, next(iter(domains.values()))),
    )  # fmt: skip
    if "synthetic" in plan.recipes():
        training_sets(parts["synthetic"])
    settings = {**given, "hold_out": cfg.hold_out, "images": plan.domains, "judged_on": plan.judged_on}
    for loose in ("prices", "targets", "generation_seconds"):  # what is made of the runs, not what they are
        settings.pop(loose)
    identity = {"budget": settings, "recipes": {r: _shared(p) for r, p in parts.items() if r in plan.recipes()}}
    return plan, identity | {"data": {domain: plain(part.data) for domain, part in domains.items()}}


def _judged_on(cfg, first) -> str | None:
    """The images on which learning rates are compared: those held out, the tune split, or none."""
    if cfg.hold_out is not None:
        images = plain(cfg.budget)["choose"]["shots"]
        if type(cfg.hold_out) is not int or cfg.hold_out < 1 or (type(images) is int and cfg.hold_out >= images):
            raise ValueError(f"hold_out={cfg.hold_out}: expected a number of images below budget.choose.shots={images}")
        return f"{cfg.hold_out} images held out of the training set"
    if first.data.tune_split is None:
        return None
    return f"{len(real_data(first, first.data.tune_split))} images of {first.data.name}/{first.data.tune_split}"


def _shared(part) -> dict:
    each = ("tune", "seed", "shots", "init_from", "data", "data_root", "hold_out")
    return {k: v for k, v in study_identity(part, {}).items() if k not in each}


def budget_run(cfg, job: Job, judged: bool = False):
    """The configuration of a job. One that is its experiment's own, with nothing changed but data, shots and seed, has the
    folder that ``train.py -m experiment=...`` gives it, and is shared with it; all others lie below the study's folder."""
    domain = job.domain or cfg.budget.domains[0]
    held = judged and cfg.hold_out is not None
    more = [f"seed={job.seed}", *([f"shots={job.shots}"] if job.domain else []), *(JUDGED if judged else ())]
    part = _budget_part(cfg, job.recipe, domain, more + ["trainer.callbacks.best=null"] * judged)
    after = job.after and budget_run(cfg, job.after)
    init_from = after and f"{after.output_root}/{after.name}"
    changes = [f"max_steps={job.steps}"] * (job.steps != part.trainer.max_steps)
    changes += [f"learning_rate={job.learning_rate:g}"] * (job.learning_rate != part.optimizer.learning_rate)
    changes += [f"hold_out={cfg.hold_out}"] * held
    points = [f"shots={job.shots}"] * (job.domain is not None) + [f"seed={job.seed}"]
    own = not changes and init_from == part.init_from and (job.domain or "") in part.name
    if not own or any(not re.match(SHARED, k) for k in _given()):
        where = "_".join([job.recipe, *([job.domain] if job.domain else [])])
        part.name = f"{cfg.name}/{where}/{','.join(points + changes)}"
    else:
        rest = [p for p in points if p not in re.split("[/,]", part.name)]
        part.name = "/".join([part.name, ",".join(rest)]) if rest else part.name
    part.init_from, part.trainer.max_steps, part.optimizer.learning_rate = init_from, job.steps, job.learning_rate
    part.hold_out = cfg.hold_out if held else None
    return part


def budget_test(cfg, domain: str) -> SegmentationFolder:
    """The test images of a domain of the study."""
    part = _budget_part(cfg, "finetune", domain)
    return real_data(part, part.data.test_split)


def generation_seconds(cfg) -> float:
    """Seconds that drawing the synthetic set took, by its records, or as given."""
    given = cfg.budget.generation_seconds
    if given is not None and not (type(given) in (int, float) and given >= 0):
        raise ValueError(f"budget.generation_seconds={given!r}: expected a number of 0 or more, or null for the records' own")
    return round(sum(r["seconds"] for r in read_records(cfg.synthetic).values()), 1) if given is None else given
