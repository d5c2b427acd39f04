"""The root scripts for tests: as they are, or with another thing to do."""

import importlib
import logging
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from dd.config import main
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


def exit_status(name: str, *arguments: Any) -> int:
    """What the root script of that name ends with. In this process, which saves the seconds in
    which a new one imports torch."""
    handlers, level = logging.root.handlers[:], logging.root.level
    GlobalHydra.instance().clear()
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.delenv("DD_TRACEBACK", raising=False)
            patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
            main(door(name))
    finally:
        logging.root.handlers[:], logging.root.level = handlers, level
        torch.set_flush_denormal(False)
        GlobalHydra.instance().clear()
    return stop.value.code
