"""The command line: compose a configuration, answer mistyped overrides with the names that exist, and errors on one screen."""

import errno
import logging
import os
import re
import sys
import warnings
from difflib import get_close_matches
from pathlib import Path

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dd.config.objects import USER_ERRORS
from dd.executors import CANNOT_WRITE, EXIT, UnitsFailed, stopped_by_signal
from dd.locks import Busy
from dd.provenance import shortened

CONF = Path(__file__).parents[2] / "conf"
PATHS = ("images", "list", "output", "run")  # last part of a key: its value is a file or folder


def swept_name(cfg, overrides: list[str]) -> str:
    """The run's name, followed in a multirun by what was swept (``shots=16,seed=0``), so that jobs never share a folder."""
    parsed = OverridesParser.create().parse_overrides([a for a in sys.argv[1:] if "=" in a and not a.startswith("-")])
    swept = {o.key_or_group for o in parsed if o.is_sweep_override()}
    parts = [o for o in overrides if o.split("=", 1)[0].lstrip("+~") in swept and o not in re.split("[/,]", cfg.name)]
    return "/".join([cfg.name, ",".join(parts)]) if parts else cfg.name


def quoted(argument: str) -> str:
    """An override in the quotes that Hydra wants around run folders (``shots=16,seed=0``) and around what its grammar cannot
    read (``Fotos für uns``, ``Photos (1)``); a path is never a number (``images=2024``)."""
    key, _, value = argument.partition("=")
    if not value or argument.startswith("-") or '"' in value or value[0] in "'[{":
        return argument
    bare = "=" in value and not any(c in value for c in "'[]()")
    path = key.rpartition(".")[2] in PATHS and value != "null"
    text = "," not in value and (path or not _readable(argument))  # with a comma it may be a sweep
    return f'{key}="{value}"' if bare or text else argument


def _readable(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


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
        print(f"error: {shortened(str(error))}\n(DD_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
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
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # a resumed training's
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # Lightning's own, for every run
        OmegaConf.set_struct(cfg, False)
        cfg.name = swept_name(cfg, list(HydraConfig.get().overrides.task))
        OmegaConf.set_struct(cfg, True)
        try:
            check_values(cfg)
            with stopped_by_signal():
                return run(cfg)
        except (*USER_ERRORS, OSError, UnitsFailed, Busy) as error:
            code = exit_code(error)
            if os.environ.get("DD_TRACEBACK") or code is None:
                raise
            print(f"error: {_message(error)}\n(DD_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
            sys.exit(code)

    return task


def _message(error: Exception) -> str:
    """What an error says; of one that a loader's worker passed on with its traceback, the last paragraph; of a value that has
    to be given, how."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no default and was not given: add {error.full_key}=<value> to the command"
    text = str(error)
    return shortened(text.rpartition(f"\n{type(error).__name__}: ")[2] if text.startswith("Caught ") else text)


def check_values(cfg) -> None:
    """ValueError for a value of a key that all commands share, before any work starts."""
    for key in ("images", "output", "run", "unlabelled.images", "unlabelled.list", "adaptation.images", "adaptation.list"):
        if not isinstance(value := OmegaConf.select(cfg, key), str | int | float | None):
            raise ValueError(f"{key}={value}: expected one path")
    if type(cfg.seed) is not int or cfg.seed < 0:
        raise ValueError(f"seed={cfg.seed!r}: expected a whole number of 0 or more")
    number = cfg.get("num_images", 1)
    if number is not None and (type(number) is not int or number < 1):
        raise ValueError(f"num_images={number!r}: expected a whole number of 1 or more, or null for each prompt once")
    if cfg.device == "auto":
        return
    try:
        chosen = torch.device(cfg.device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={cfg.device!r}; allowed: auto, cpu, cuda, cuda:1, ...") from None
    there = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= there:
        raise ValueError(f"device={cfg.device}, but torch sees {there} CUDA devices here; device=auto takes what there is")


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
    try:
        _check_overrides(config_name, overrides)
    except OSError as error:  # Hydra looks for a file of that name
        if error.errno != errno.ENAMETOOLONG:
            raise
        longest = max(overrides, key=len)
        raise ValueError(f"{longest[:80]!r}...: no setting or choice has a name of {len(longest)} characters") from None


def _check_overrides(config_name: str, overrides: list[str]) -> None:
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
