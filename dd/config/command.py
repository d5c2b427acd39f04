"""The command line: compose a configuration, check every value, run it, and report errors on one
screen."""

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dd.config.check_values import check_settings
from dd.config.composition import CONF, with_own_folders
from dd.config.doors import Door
from dd.config.generation import own_mask_set
from dd.config.jobs import JobFailed, debugged, job_overrides, name_job, swept_parts
from dd.config.objects import USER_ERRORS, check_loaded
from dd.config.overrides import check_overrides, one_line, quoted
from dd.execution import CANNOT_WRITE, EXIT, UnitsFailed, stopped_by_signal
from dd.store.locks import Busy
from dd.store.provenance import shortened

SAID: set[str] = set()  # messages already printed for jobs of a multirun, in this process
FULL = "HYDRA_FULL_ERROR"
NO_PATH = (  # errors about the kind of thing that a path leads to
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EINVAL,
)
ANSWERED = (*USER_ERRORS, OSError, UnitsFailed, Busy)
NOISE = (  # warnings of Lightning
    "Experiment logs directory .* exists and is not empty",  # it holds config.yaml
    "Checkpoint directory .* exists and is not empty",  # from the training that is resumed
    ".*LeafSpec.* is deprecated",  # Lightning's own, in every run
)
PATHS = (
    "data_root",
    "output_root",
    "run",
    "report.runs",
    "report.baseline",
    "review.leave_out",
    "sweep.run",
    "sweep.masks",
    "calibrate.data",
    "labeler.run",
    "labeler.folder",
    "caption.images",
    "unlabelled.images",
    "images",
    "init_from",
    "synthetic",
    "masks_from",
    "data.root",
)


def main(door: Door) -> NoReturn:
    """Entry point of a root script: compose its configuration, run the chosen stage, report errors
    on one screen. Without arguments, and with ``--help``, print the help of the door."""
    asked = set(sys.argv[1:]) & {"-h", "--help"}
    if asked or not set(sys.argv[1:]) - {"-m", "--multirun"}:
        print(door.help(), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    code: int | None = 0
    try:
        _run(door, bool({"-m", "--multirun"} & set(sys.argv[1:])))
    except JobFailed as error:
        code = 1
        if str(error) not in SAID:  # the job ran in another process
            print(f"error in {error}", file=sys.stderr)
    except ANSWERED as error:
        code = exit_code(error)
        if os.environ.get("DD_TRACEBACK") or code is None:
            raise
        _say(error)
    except KeyboardInterrupt as stop:
        code = 130
        print(
            f"stopped: {str(stop) or 'interrupted'}. The same command resumes from here.",
            file=sys.stderr,
        )
    sys.exit(code)


def _run(door: Door, multirun: bool) -> None:
    sys.argv[1:] = with_own_folders([quoted(a) for a in sys.argv[1:]])
    typed = [a for a in sys.argv[1:] if "=" in a and not a.startswith(("-", "hydra.searchpath"))]
    cfg = check_overrides(door.name, typed, multirun)
    if multirun:  # Hydra writes multirun.yaml there
        Path(cfg.output_root).mkdir(parents=True, exist_ok=True)
    run = hydra.main(version_base="1.3", config_path=str(CONF), config_name=door.name)
    with _own_words() if multirun else nullcontext():
        run(_guarded(door))()


@contextmanager
def _own_words() -> Iterator[None]:
    """Pass errors of a multirun to :func:`main` unchanged. Hydra would print them again, with
    advice that does not fit."""
    before = os.environ.get(FULL)
    os.environ[FULL] = "1"
    try:
        yield
    finally:
        os.environ.pop(FULL)
        if before is not None:
            os.environ[FULL] = before


def _guarded(door: Door) -> Callable[[Any], float | None]:
    """The task that Hydra runs. For an exception in a single job Hydra prints its own traceback, so
    ours is passed around it. In a multirun each error reaches the launcher as one line, so that the
    other jobs run; Hydra's exit code is then 1."""
    command = list(sys.argv)

    def task(cfg: Any) -> float | None:
        sys.argv = list(command)  # a launcher's worker has another one; jobs are named by it
        torch.set_flush_denormal(True)
        # print neither hardware lists nor advertisements
        logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
        for message in NOISE:
            warnings.filterwarnings("ignore", message)
        multirun = HydraConfig.get().mode == RunMode.MULTIRUN
        try:
            prepare(door.name, cfg)
            with stopped_by_signal():
                return door.run(cfg)
        except Exception as error:
            code = exit_code(error)
            if os.environ.get("DD_TRACEBACK") or (code is None and not multirun):
                raise
            if not multirun:
                _say(error, cfg)
                sys.exit(code)
            raise _failed(error, cfg, known=code is not None) from None

    return task


def prepare(config_name: str, cfg: Any) -> None:
    """Name a job's result and check every value. ValueError, or OmegaConf's errors, for invalid
    values."""
    typed = job_overrides()
    check_settings(config_name, cfg)
    check_loaded(cfg)
    OmegaConf.set_struct(cfg, False)
    if "labeler" in cfg and cfg.get("mask_set") is None:
        cfg.mask_set = own_mask_set(cfg)
    name_job(cfg, typed, debugged())
    OmegaConf.set_struct(cfg, True)
    check_device(cfg)


def _failed(error: Exception, cfg: Any, known: bool) -> JobFailed:
    """Print at once what went wrong in a job of a multirun; returns the launcher's exception."""
    if not known:
        traceback.print_exception(error)
    job = ",".join(swept_parts(job_overrides())) or f"job {HydraConfig.get().job.num}"
    text = f"{job}: {_message(error, cfg) if known else repr(error)}"
    print(f"error in {text}\nThe other jobs continue.", file=sys.stderr)
    SAID.add(text)
    return JobFailed(text)


def _say(error: Exception, cfg: Any = None) -> None:
    print(
        f"error: {_message(error, cfg)}\n(DD_TRACEBACK=1 shows where it was raised)",
        file=sys.stderr,
    )


def _message(error: Exception, cfg: Any = None) -> str:
    return shortened(_words(error, cfg))


def _words(error: Exception, cfg: Any) -> str:
    """The message of an error. If a loader's worker passed it on with its traceback, the last
    paragraph; for a missing value, how to give it; for a missing file, where it was looked for."""
    if isinstance(error, MissingMandatoryValue):
        key, more = error.full_key, ", or choose an experiment" if error.full_key == "name" else ""
        return f"{key} has no default and was not given: add {key}=<value> to the command{more}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return one_line(error)
    if isinstance(error, OSError) and error.errno in NO_PATH and error.filename:
        return f"{error.filename!s:.100}: {error.strerror}; expected a file or a folder"
    text = str(error)
    text = text.rpartition(f"\n{type(error).__name__}: ")[2] if text.startswith("Caught ") else text
    return text + _looked_in(text, cfg) if isinstance(error, FileNotFoundError) else text


def _looked_in(text: str, cfg: Any) -> str:
    """For a relative path that does not exist: the working folder, and the likely data_root if one
    lies beside the script."""
    root = Path(str(cfg.data_root)) if cfg is not None else Path("data")
    beside = Path(sys.argv[0]).resolve().parent / root
    found = [OmegaConf.select(cfg, key) for key in PATHS] if cfg is not None else []
    given = [str(value) for value in found if value is not None]
    if not any(value in text and not Path(value).is_absolute() for value in given):
        return ""
    meant = beside.is_dir() and beside != root.resolve()
    more = f"; there is {beside}: data_root={beside}" if meant else ""
    return f". Relative paths begin at {Path.cwd()}, data_root={root} is {root.absolute()}{more}"


def check_device(cfg: Any) -> None:
    """ValueError for a device that does not exist here, before any work starts."""
    if cfg.device == "auto":
        return
    try:
        chosen = torch.device(cfg.device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={cfg.device!r}; allowed: auto, cpu, cuda, cuda:1, ...") from None
    there = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= there:
        raise ValueError(
            f"device={cfg.device}, but torch sees {there} CUDA devices here; device=auto takes "
            "what there is"
        )


def exit_code(error: Exception) -> int | None:
    """Exit code of an error that is reported on one screen (docs/scale.md); None for others."""
    if isinstance(error, UnitsFailed):
        return EXIT["units failed"]
    if isinstance(error, Busy):
        return EXIT["busy"]
    if isinstance(error, PermissionError) or (
        isinstance(error, OSError) and error.errno in CANNOT_WRITE
    ):
        return EXIT["cannot write"]
    wrong_path = isinstance(error, OSError) and error.errno in NO_PATH
    return 2 if wrong_path or isinstance(error, USER_ERRORS) else None
