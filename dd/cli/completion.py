"""What a shell offers for the settings of ``dataset-diffusion generate|train|evaluate``: read from
the settings files alone, since Hydra and torch take seconds to start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dd.store.conf import CONF, choices, groups, of_working_folder


def complete_setting(prefix: str, parsed_args: Any, **_: Any) -> list[str]:
    """Settings that begin with ``prefix``, for argcomplete: ``masks=``, ``masks.power=``,
    ``masks=refined``. ``parsed_args``: the command and the settings before."""
    given = dict(s.split("=", 1) for s in parsed_args.settings or [] if "=" in s)
    return [s for s in settings(parsed_args.command, prefix, given) if s.startswith(prefix)]


def settings(door: str, prefix: str, given: dict[str, str]) -> list[str]:
    """``key=`` of every setting of a root script, with the choices of groups that are ``given``; of
    a group, once its ``=`` is typed, ``key=choice`` of each of its files."""
    here = of_working_folder()
    folders = [here, CONF] if here else [CONF]
    key, equals, _ = prefix.partition("=")
    if equals:
        found = choices(folders, key) if key in groups(CONF) else []
        return [f"{key}={name}" for name in found if key != "experiment" or _is_of(door, name)]
    there, defaults = _root(folders, door)
    there |= {group: {} for group in defaults}
    for group, choice in (defaults | given).items():
        if group in groups(CONF) and group not in ("experiment", "debug"):
            there[group] = _read(folders, f"{group}/{choice}")
    return sorted({f"{name}=" for name in _names(there)} | {f"{group}=" for group in defaults})


def _is_of(door: str, experiment: str) -> bool:
    """Whether the header of an experiment of ours names that root script; of data, evaluate.py
    too."""
    file = CONF / "experiment" / f"{experiment}.yaml"
    scripts = {"evaluate": ("evaluate", "generate")}.get(door, (door,))
    return not file.is_file() or any(f"python {s}.py" in file.read_text() for s in scripts)


def _root(folders: list[Path], name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings, {group: choice}) of a root script's file and of those that it is made of."""
    found = _read(folders, name)
    own: dict[str, Any] = {}
    chosen: dict[str, str] = {}
    for entry in found.pop("defaults", []):
        if isinstance(entry, dict):
            chosen |= {k: v for k, v in entry.items() if k in groups(CONF)}
        elif entry != "_self_":
            own |= _read(folders, entry)
    return {k: v for k, v in (own | found).items() if k != "hydra"}, chosen


def _read(folders: list[Path], name: str) -> dict[str, Any]:
    """A settings file; nothing where there is none that can be read."""
    file = next((f for x in folders if (f := x / f"{name}.yaml").is_file()), None)
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _names(node: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in node.items():
        if str(key).startswith("_") or (key == "defaults" and above):
            continue
        if isinstance(value, dict) and value and not any("." in str(k) for k in value):
            yield from _names(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"
