"""A root script: its purpose, its stages by name, and its help."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from dd.config.composition import choices, groups, settings_file
from dd.store.conf import CONF, INSTALLED


@dataclass(frozen=True)
class Stage:
    """``run(cfg)`` runs it and returns its objective, or None; ``says``: one line about it."""

    run: Callable[[Any], float | None]
    says: str


@dataclass(frozen=True)
class Door:
    """A root script. ``name`` is that of its configuration and its file, ``purpose`` one sentence,
    ``first``: commands to start with, ``experiments``: scripts whose experiments it also takes."""

    name: str
    purpose: str
    stages: Mapping[str, Stage]
    first: tuple[str, ...]
    experiments: tuple[str, ...] = ()

    def run(self, cfg: Any) -> float | None:
        """Run the chosen stage. ValueError for an unknown one."""
        if cfg.stage not in self.stages:
            raise ValueError(f"stage={cfg.stage!r}; allowed: {', '.join(self.stages)}")
        return self.stages[cfg.stage].run(cfg)

    def help(self) -> str:
        """The help text, printed without arguments and with ``--help``."""
        width = max(map(len, self.stages)) + 2
        default = self._defaults().stage
        lines = [self.purpose, "", f"usage: python {self.name}.py key=value ...", "", "stages:"]
        lines += [
            f"  {name:<{width}}{stage.says}{' (default)' if name == default else ''}"
            for name, stage in self.stages.items()
        ]
        lines += ["", "start with:", *(f"  {command}" for command in self.first), ""]
        lines += [f"{group}={' | '.join(names)}" for group, names in self._choices().items()]
        return "\n".join([*lines, "", *self._keys()])

    def _choices(self) -> dict[str, list[str]]:
        """The experiments of this script, and the files of its groups."""
        entries = self._defaults().defaults
        names = [group for entry in entries if not isinstance(entry, str) for group in entry]
        known = set(groups())
        own = [e for e in choices("experiment") if self._is_own(e)]
        found = {"experiment": own} if own else {}
        return found | {g: choices(g) for g in names if g in known and g != "experiment"}

    def _is_own(self, experiment: str) -> bool:
        """Whether the header of an experiment names one of these scripts, or it is the user's."""
        file = settings_file(f"experiment/{experiment}")
        scripts = [f"python {name}.py" for name in (self.name, *self.experiments)]
        if file is None or not file.is_relative_to(CONF):
            return True
        return any(script in file.read_text() for script in scripts)

    def _defaults(self) -> Any:
        return OmegaConf.load(settings_file(self.name) or CONF / f"{self.name}.yaml")

    def _keys(self) -> list[str]:
        conf = str(CONF) if CONF == INSTALLED else "conf"
        return [
            "several values: -m seed=0,1,2 runs one job after the other",
            f"every key with its value: python {self.name}.py --cfg job [key=value ...]",
            f"and what it means: {conf}/{self.name}.yaml, and of a group "
            f"{conf}/<group>/<choice>.yaml",
        ]
