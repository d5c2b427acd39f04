"""Where settings come from: the user's own folders first, then the files of this package."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from dd.store import conf
from dd.store.conf import CONF

SEARCHPATH = "hydra.searchpath"
SHARED = ("base", "synthetic")  # what the files of the root scripts are made of


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
    if here := conf.of_working_folder(CONF):
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
    """Folders of the user's own settings, as :func:`with_own_folders` left them in the arguments;
    called from Python, ``conf`` of the working folder."""
    if not (given := _searchpath()):
        here = conf.of_working_folder(CONF)
        return [here] if here else []
    parsed = OverridesParser.create().parse_overrides(given)
    places = [place for override in parsed for place in override.value()]
    return [Path(str(p).removeprefix("file://")) for p in places if str(p).startswith("file://")]


class OwnFolders(SearchPathPlugin):
    """Searches the user's folders before our files; Hydra searches ``hydra.searchpath`` after
    them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        ours = SearchPathQuery(provider="main")
        for folder in own_folders():
            search_path.prepend("own", f"file://{folder}", ours)


Plugins.instance().register(OwnFolders)


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
    return conf.groups(CONF)


def choices(group: str) -> list[str]:
    """Names of the files of a group, including the user's own."""
    return conf.choices((*own_folders(), CONF), group)


def settings_file(name: str) -> Path | None:
    """The file that is read for ``generate`` or ``data/voc``: the user's own before ours; None if
    there is none."""
    files = [folder / f"{name}.yaml" for folder in (*own_folders(), CONF)]
    return next((f for f in files if os.path.isfile(f)), None)


def replaced(names: Iterable[str]) -> list[Path]:
    """The user's own files among ``names`` (as of :func:`settings_file`) that are read instead of
    a file of ours with another content."""
    found = []
    for name in (*names, *SHARED):
        ours, read = CONF / f"{name}.yaml", settings_file(name)
        if read and read != ours and ours.is_file() and read.read_bytes() != ours.read_bytes():
            found.append(read)
    return found
