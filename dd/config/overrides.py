"""Overrides as typed, ``key=value``: quoted if Hydra would read them otherwise; errors list the
existing names."""

import errno
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dd.config.composition import choices, compose, groups, parse, plugins

# last part of keys whose value is a name, a file or a folder: there 2024 is text
TEXT = (
    "images",
    "list",
    "output",
    "run",
    "runs",
    "name",
    "folder",
    "mask_set",
    "root",
    "data_root",
    "output_root",
    "synthetic",
    "synthetic_masks",
    "init_from",
    "masks_from",
    "leave_out",
    "baseline",
    "path",
    "model",
    "shots_list",
)
REFUSED = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    TypeError,
    AttributeError,
    yaml.YAMLError,  # in one of the user's files
)  # errors that compositions raise


def quoted(argument: str) -> str:
    """An override with the quotes that Hydra needs around run folders (``shots=16,seed=0``) and
    around text outside its grammar (``Fotos für uns``, ``Photos (1)``). A path is never a number
    (``images=2024``)."""
    key, _, value = argument.partition("=")
    if not value or argument.startswith("-") or '"' in value or value[0] in "'[{":
        return argument
    bare = "=" in value and not any(c in value for c in "'[]()")
    path = key.lstrip("+").rpartition(".")[2] in TEXT and value not in ("null", "???")
    text = "," not in value and (path or not _readable(argument))  # a comma may mean a sweep
    return f'{key}="{value}"' if bare or text else argument


def _readable(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def one_line(error: Exception) -> str:
    """The message of an error of Hydra or OmegaConf, without lines that name their own objects."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [
        line
        for line in lines
        if not line.startswith(("object_type=", "reference_type=", "full_key:", "See https://"))
    ]
    key = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), ""
    )
    return f"{key}: {' '.join(kept)}" if key else " ".join(kept) or type(error).__name__


def check_overrides(config_name: str, overrides: list[str], multirun: bool = True) -> Any:
    """The configuration (the first one of a multirun). ValueError for an override whose key or
    group value does not exist, with the allowed names; and for a sweep without ``multirun``."""
    try:
        return _check_overrides(config_name, overrides, multirun)
    except OSError as error:  # Hydra tries to open a file of that name
        if error.errno != errno.ENAMETOOLONG:
            raise
        longest = max(overrides, key=len)
        raise ValueError(
            f"{longest[:80]!r}...: no setting or choice has a name of {len(longest)} characters"
        ) from None


def _check_overrides(config_name: str, overrides: list[str], multirun: bool) -> Any:
    try:
        parsed = parse(overrides)
    except HydraException as error:
        raise ValueError(_not_read(overrides, error)) from None
    values = [_choices(o) for o in parsed]
    tries = [[v[0] for v in values]]
    for i, each in enumerate(
        values
    ):  # each choice of a swept group must exist; values are checked when used
        if each[0].partition("=")[0] in groups():
            tries += [[*tries[0][:i], choice, *tries[0][i + 1 :]] for choice in each[1:]]
    first = None
    for single in tries:
        _check_choices(single)
        try:
            composed = compose(config_name, single, return_hydra_config=True)
        except REFUSED as error:
            raise ValueError(_explain(config_name, single, error)) from None
        if not multirun and composed.hydra.mode != RunMode.MULTIRUN:
            _refuse_sweeps(parsed)
        _check_output(composed)
        first = first or composed
    return first


def _not_read(overrides: list[str], error: HydraException) -> str:
    """Which override Hydra's grammar rejects, and why."""
    typed = next((o for o in overrides if not _readable(o)), None)
    if typed is None or "Exception" not in str(error).split(":")[0]:  # Hydra's message is enough
        return one_line(error)
    if "=" not in typed:
        return f"{typed!r:.200}: expected key=value"
    quote = next((q for q in "'\"" if typed.count(q) % 2), None)
    why = f"a quote {quote} is not closed" if quote else "a sign in it must stand between quotes"
    return f"{typed!r:.200}: {why}; a text as it is: {typed.partition('=')[0]}='\"the text\"'"


def _choices(override: Any) -> list[str]:
    """An override as typed, or each override that a sweep stands for, with its ``+``."""
    if not override.is_sweep_override():
        return [override.input_line]
    key = override.get_key_element()
    return [f"{key}={v}" for v in override.sweep_string_iterator()]


def _refuse_sweeps(parsed: list[Any]) -> None:
    for override in parsed:
        if override.is_sweep_override():
            key, _, value = override.input_line.partition("=")
            raise ValueError(
                f"{override.input_line!r} stands for several runs: add -m (a run for each value); "
                "one run "
                f"with a list of values is {key}=[...], a text with a comma needs quotes: "
                f"{key}='\"{value}\"'"
            )


def _check_output(composed: Any) -> None:
    """Check keys that Hydra itself reads before any task."""
    for key in ("output_root", "hydra.run.dir", "hydra.sweep.dir"):
        try:
            OmegaConf.select(composed, key, throw_on_resolution_failure=True)
        except OmegaConfBaseException as error:
            raise ValueError(f"{key}: {one_line(error)}") from None


def _check_choices(overrides: list[str]) -> None:
    """ValueError for a choice of a group that does not exist."""
    for override in OverridesParser.create().parse_overrides(overrides):
        key, value = override.key_or_group, override.value()
        if override.is_delete():
            continue
        if key.startswith("hydra/"):
            _check_plugin(override.input_line, key, value)
        if key not in groups():
            continue
        there = choices(key)
        names = value if isinstance(value, list) else [value]
        for name in names:
            if not isinstance(name, str) or (name not in there and "${" not in name):
                more = _nearest(str(name), there)
                raise ValueError(
                    f"{override.input_line!r:.200}: no such {key}; allowed: "
                    f"{', '.join(there)}{more}"
                )


def _check_plugin(typed: str, key: str, value: Any) -> None:
    there = plugins(key)
    if value not in there and value is not None:
        more = ""
        if key == "hydra/launcher":
            more = (
                "; joblib, submitit_local and submitit_slurm are installed by: pip install -e "
                '".[sweeps]"'
            )
        elif key == "hydra/sweeper":
            more = "; Optuna is used directly: python train.py stage=search"
        raise ValueError(f"{typed!r}: no such {key}; installed: {', '.join(there)}{more}")


def put(cfg: Any, values: Mapping[str, Any]) -> None:
    """Give ``cfg`` the values of ``{key: value}``. ValueError for a key that does not exist, with
    the names that do."""
    known = groups()
    for key, value in values.items():
        if said := _unknown(cfg, f"{key}={value}", known):
            raise ValueError(said)
        OmegaConf.update(cfg, key, value, merge=False)


def _explain(config_name: str, overrides: list[str], error: Exception) -> str:
    """What is wrong with the first invalid override: each is tried on the composition of the chosen
    groups."""
    known = groups()
    chosen = [
        o for o in overrides if o.lstrip("+~").partition("=")[0] in known or o.startswith("hydra/")
    ]
    try:
        base = compose(config_name, chosen, return_hydra_config=True)
    except REFUSED:  # the groups alone fail, so no value is to blame
        return one_line(error)
    values = [o for o in overrides if o not in chosen]
    for override in values:
        if not override.startswith("+") and (said := _unknown(base, override, known)):
            return said + _elsewhere(config_name, chosen, override)
    for override in values:
        try:
            compose(config_name, [*chosen, override])
        except REFUSED as own:
            return f"{override!r:.200}: {one_line(own)}"
    return one_line(error)


def _unknown(base: Any, override: str, known: list[str]) -> str | None:
    """A message if the key of an override is not in ``base``; None if it is."""
    node, path = base, list[str]()
    for part in override.lstrip("~").partition("=")[0].split("."):
        names = [str(k) for k in node] if isinstance(node, DictConfig) else []
        if not path:
            names += [group for group in known if group not in names]
        if part not in names:
            names = [name for name in names if name != "hydra"]
            where = f"in {'.'.join(path)}" if path else "at the top level"
            return (
                f"{override!r:.200}: no key {part!r} {where}; allowed: "
                f"{', '.join(names)}{_nearest(part, names)}"
            )
        path.append(part)
        node = node._get_node(part)
    return None


def _elsewhere(config_name: str, chosen: list[str], override: str) -> str:
    """Other choices of a group that have the key that this one lacks."""
    group, _, rest = override.lstrip("~").partition("=")[0].partition(".")
    key, having = rest.partition(".")[0], []
    for name in choices(group) if rest and group in groups() else ():
        try:
            node = compose(config_name, [*chosen, f"{group}={name}"])[group]
        except REFUSED:
            continue
        if isinstance(node, DictConfig) and key in node:
            having.append(f"{group}={name}")
    return f". It is a key of {', '.join(having)}" if having else ""


def _nearest(word: str, names: Iterable[str]) -> str:
    close = get_close_matches(word, names, 1)
    return f". Did you mean {close[0]!r}?" if close else ""
