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
from dd.config.composition import replaced, with_own_folders
from dd.config.doors import Door
from dd.config.generation import own_mask_set
from dd.config.jobs import JobFailed, debugged, job_overrides, name_job, swept_parts
from dd.config.objects import USER_ERRORS, check_loaded
from dd.config.overrides import check_overrides, one_line, quoted
from dd.execution import CANNOT_WRITE, EXIT, UnitsFailed, stopped_by_signal
from dd.store.commands import spelled
from dd.store.conf import CONF
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


def main(door: Door, named: bool = False) -> NoReturn:
    """Entry point of a root script: compose its configuration, run the chosen stage, report errors
    on one screen. Without arguments, and with ``--help``, print the help of the door. ``named``:
    the first argument is the name of the door, as in ``dataset-diffusion generate``."""
    begin = 2 if named else 1
    given = set(sys.argv[begin:])
    asked = given & {"-h", "--help"}
    if asked or not given - {"-m", "--multirun"}:
        print(spelled(door.help()), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    code: int | None = 0
    try:
        _run(door, begin, bool({"-m", "--multirun"} & given))
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


def _run(door: Door, begin: int, multirun: bool) -> None:
    """``begin``: where the settings begin in ``sys.argv``."""
    before, given = sys.argv[:begin], with_own_folders([quoted(a) for a in sys.argv[begin:]])
    command = [*before, *given]
    sys.argv = [before[0], *given]  # what Hydra reads
    try:
        if not {"-sc", "--shell-completion"} & {*given}:  # a shell asks Hydra: no settings to check
            typed = [a for a in given if "=" in a and not a.startswith(("-", "hydra.searchpath"))]
            cfg = check_overrides(door.name, typed, multirun)
            _tell_replaced(door.name, cfg)
            if multirun:  # Hydra's multirun.yaml lies there
                Path(cfg.output_root).mkdir(parents=True, exist_ok=True)
        run = hydra.main(version_base="1.3", config_path=str(CONF), config_name=door.name)
        with _own_words() if multirun else nullcontext():
            run(_guarded(door, command))()
    finally:
        sys.argv = command


def _tell_replaced(config_name: str, cfg: Any) -> None:
    if os.environ.get("LOCAL_RANK", "0") != "0":  # a further process of a training
        return
    chosen = [f"{group}/{name}" for group, name in cfg.hydra.runtime.choices.items()]
    for file in replaced([config_name, *chosen]):
        print(f"note: {file} is read instead of this package's file of that name", file=sys.stderr)


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


def _guarded(door: Door, command: list[str]) -> Callable[[Any], float | None]:
    """The task that Hydra runs; ``command`` was typed. For an exception in a single job Hydra
    prints its own traceback, so ours is passed around it. In a multirun each error reaches the
    launcher as one line, so that the other jobs run; Hydra's exit code is then 1."""

    def task(cfg: Any) -> float | None:
        numerics()
        # A launcher's worker has another one. It names what is swept, and Lightning starts the
        # further processes of a training with it.
        sys.argv = list(command)
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


def numerics() -> None:
    """Numeric settings that results depend on, and less output from libraries."""
    torch.set_flush_denormal(True)
    # print neither hardware lists nor advertisements
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message)


def prepare(config_name: str, cfg: Any) -> None:
    """Name a job's result and check every value. ValueError, or OmegaConf's errors, for invalid
    values."""
    typed = job_overrides()
    check(config_name, cfg)
    OmegaConf.set_struct(cfg, False)
    name_job(cfg, typed, debugged())
    OmegaConf.set_struct(cfg, True)


def check(config_name: str, cfg: Any) -> None:
    """Check every value. ValueError, or OmegaConf's errors, for invalid values."""
    check_settings(config_name, cfg)
    check_loaded(cfg)
    OmegaConf.set_struct(cfg, False)
    if "labeler" in cfg and cfg.get("mask_set") is None:
        cfg.mask_set = own_mask_set(cfg)
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
    return spelled(shortened(_words(error, cfg)))


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
