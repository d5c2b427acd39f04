"""Names of the jobs of a multirun: each writes to a folder, a mask set or a file of its own."""

import re
import sys
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

RESULT = {  # stage: the key that names its output in an existing data set
    "label": "mask_set",
    "read": "reader",
    "filter": "quality.split",
    "sweep": "sweep.name",
}
# keys that distinguish jobs, and so are not repeated
THEMSELVES = {"name", "folder", "output_root", *RESULT.values()}


class JobFailed(CompactHydraException):
    """One line about a failed job of a multirun. It can be sent from a launcher's worker, and Hydra
    prints no traceback."""


def job_overrides() -> list[str]:
    """The overrides of this job as typed. Hydra's list of them would resolve
    ``init_from=out/seed=${seed}`` among its own keys, where there is no seed."""
    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return typed


def debugged() -> str | None:
    """The choice of the group ``debug``; None for a real training."""
    return HydraConfig.get().runtime.choices.get("debug") if HydraConfig.initialized() else None


def swept_keys() -> set[str]:
    """Keys with several values, on the command line or in ``hydra.sweeper.params`` of an
    experiment."""
    typed = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]
    if HydraConfig.initialized():
        params = HydraConfig.get().sweeper.get("params") or {}
        plain: Any = OmegaConf.to_container(OmegaConf.create(params), resolve=False)
        typed += [f"{key}={value}" for key, value in plain.items()]
    return {
        o.key_or_group
        for o in OverridesParser.create().parse_overrides(typed)
        if o.is_sweep_override()
    }


def swept_parts(overrides: list[str]) -> list[str]:
    """The overrides of this job that differ between jobs: ``["shots=16", "seed=0"]``."""
    swept = swept_keys()
    return [o for o in overrides if o.split("=", 1)[0].lstrip("+~") in swept]


def name_job(cfg: Any, overrides: list[str], debug: str | None = None) -> None:
    """Name the result of a job after the swept values (``a_run/shots=16,seed=0``), so that jobs
    never share one. This is the run or data set or, for a stage that works on a data set, its mask
    set or file (``masks/masks.threshold=0.4``). Runs of a ``debug`` choice go to a folder of its
    name."""
    key = RESULT.get(cfg.get("stage"), "name")
    given = OmegaConf.select(cfg, key)
    parts = [p for p in swept_parts(overrides) if p.split("=", 1)[0].lstrip("+~") not in THEMSELVES]
    if key == "name":
        parts = [p for p in parts if p not in re.split("[/,]", cfg.name)]
        place = ["debug", debug] if debug else []
        cfg.name = "/".join([*place, cfg.name, *([",".join(parts)] if parts else [])])
    elif parts:
        # a reading is named after its model, and heat= then takes that name
        parts = [p.removeprefix("diffusion=") for p in parts]
        first = [] if given in (None, "SegmentationClass") else [str(given)]
        OmegaConf.update(cfg, key, ",".join([*first, *(p.replace("/", "_") for p in parts)]))
