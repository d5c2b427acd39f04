"""A configuration for a caller in Python: plain values in place of what is typed."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from dd.config.command import check, numerics
from dd.config.composition import groups
from dd.config.overrides import check_overrides, put


def composed(script: str, values: Mapping[str, Any]) -> Any:
    """The configuration of a root script with ``values`` {key: value}, each looked at as on the
    command line; the value of a group is the name of one of its files. ValueError names the keys,
    choices and values that are allowed."""
    known = groups()
    chosen = [f"{k}={v}" for k, v in values.items() if k in known and isinstance(v, str)]
    cfg = check_overrides(script, chosen, multirun=False)
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    put(cfg, {k: v for k, v in values.items() if k not in known or not isinstance(v, str)})
    numerics()
    check(script, cfg)
    return cfg
