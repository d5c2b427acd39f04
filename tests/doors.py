"""The root scripts for tests: as they are, or with another thing to do."""

import importlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from dd.config.doors import Door


def door(name: str) -> Door:
    return importlib.import_module(f"dd.cli.{name}").DOOR


def watched(name: str, run: Callable[[Any], Any]) -> Door:
    """The door of that name, which does ``run(cfg)`` whatever the stage is."""

    class Watched(Door):
        def run(self, cfg: Any) -> Any:
            return run(cfg)

    real = door(name)
    return Watched(**{field.name: getattr(real, field.name) for field in fields(real)})
