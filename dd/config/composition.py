"""Where settings come from: the files of this package, and the user's own folders beside them."""

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

CONF = Path(__file__).parents[2] / "conf"
SEARCHPATH = "hydra.searchpath"


def with_own_folders(arguments: list[str]) -> list[str]:
    """The arguments of a command with every folder of the user's own settings in one
    ``hydra.searchpath``, as absolute paths: those of ``--config-dir`` and of ``hydra.searchpath``,
    and ``conf`` in the working folder if it holds known groups. Every composition of this process
    and of its workers then reads them. ValueError for a folder that does not exist."""
    rest, places, waiting = [], [], False
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if waiting or (key in ("--config-dir", "-cd") and equals):
            places.append(_folder(argument if waiting else value, "--config-dir"))
            waiting = False
        elif argument in ("--config-dir", "-cd"):
            waiting = True
        elif key in ("--config-path", "-cp", "--config-name", "-cn"):
            raise ValueError(
                f"{key} would replace the settings of this package; --config-dir=<folder> adds "
                "yours to them"
            )
        elif key.lstrip("+") == SEARCHPATH:
            given = OverridesParser.create().parse_override(f"{SEARCHPATH}={value}").value()
            places += [
                _folder(str(v), SEARCHPATH) for v in (given if isinstance(given, list) else [given])
            ]
        else:
            rest.append(argument)
    here = Path.cwd() / "conf"
    if any((here / group).is_dir() for group in groups()) and here.resolve() != CONF.resolve():
        places.append(f"file://{here}")
    quoted = [
        '"' + place.replace("\\", "\\\\").replace('"', '\\"') + '"'
        for place in dict.fromkeys(places)
    ]
    return [*rest, *([f"{SEARCHPATH}=[{','.join(quoted)}]"] if quoted else [])]


def _folder(value: str, key: str) -> str:
    if "://" in value and not value.startswith("file://"):
        return value  # of a package
    path = Path(value.removeprefix("file://")).expanduser().absolute()
    if not path.is_dir():
        raise ValueError(f"{key}={value}: no such folder ({path})")
    return f"file://{path}"


def _searchpath() -> list[str]:
    """The override of this process that names the user's folders, if there are any."""
    return [a for a in sys.argv[1:] if a.startswith(f"{SEARCHPATH}=")]


def own_folders() -> list[Path]:
    """Folders of the user's own settings, as :func:`with_own_folders` left them in the
    arguments."""
    parsed = OverridesParser.create().parse_overrides(_searchpath())
    places = [place for override in parsed for place in override.value()]
    return [Path(str(p).removeprefix("file://")) for p in places if str(p).startswith("file://")]


def compose(config_name: str, overrides: list[str], **how: Any) -> Any:
    """Hydra's composition of our files, the user's own and ``overrides``."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, [*_searchpath(), *overrides], **how)


def parse(overrides: list[str]) -> list:
    """Overrides as Hydra's objects; ``glob(*)`` in them matches our files."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        return parser.parse_overrides(overrides)


def plugins(group: str) -> list[str]:
    """Choices of one of Hydra's own groups, such as ``hydra/launcher``."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return GlobalHydra.instance().config_loader().get_group_options(group)


def groups() -> list[str]:
    return sorted(p.name for p in CONF.iterdir() if p.is_dir())


def choices(group: str) -> list[str]:
    """Names of the files of a group, including the user's own."""
    return sorted(
        {p.stem for folder in (CONF, *own_folders()) for p in (folder / group).glob("*.yaml")}
    )


def group_file(group: str, name: str) -> Path | None:
    """The file of that name, ours before the user's own; None if there is none."""
    files = [folder / group / f"{name}.yaml" for folder in (CONF, *own_folders())]
    return next((f for f in files if os.path.isfile(f)), None)


def twins(group: str, name: str) -> list[Path]:
    """Files of the user with that name that ours hides, and whose content differs."""
    ours = CONF / group / f"{name}.yaml"
    files = [folder / group / f"{name}.yaml" for folder in own_folders()]
    return [
        f for f in files if ours.is_file() and f.is_file() and f.read_bytes() != ours.read_bytes()
    ]
