"""Optuna: the space of a search and its study on disk. The only importer of optuna."""

import csv
import fcntl
import inspect
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from dd.store.provenance import refuse_other, write_json
from dd.store.samples import sample_seed

SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler"}
PRUNERS = {
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
    "none": "NopPruner",
}
FORMS = "{low: 1.0e-5, high: 1.0e-2, log: true}, {low: 1, high: 8, step: 1} or {choices: [a, b]}"


def _optuna() -> ModuleType:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ValueError(
            'stage=search needs optuna, which is not installed: pip install -e ".[sweeps]"'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def override(key: str, value: Any) -> str:
    """``key=value`` as Hydra reads it: bare words stay bare, everything else is written as JSON."""
    bare = isinstance(value, str) and value and all(c.isalnum() or c in "_-./" for c in value)
    return f"{key}={value if bare else json.dumps(value)}"


def _distribution(key: str, spec: Any) -> Any:
    """Optuna's distribution of one entry of a space; ValueError lists the allowed forms."""
    d, wrong = _optuna().distributions, f"search.space: {key}: {spec!r}"
    given = set(spec) if isinstance(spec, dict) else set()
    if given != {"choices"} and not {"low", "high"} <= given <= {"low", "high", "log", "step"}:
        raise ValueError(f"{wrong}: expected {FORMS}")
    if "choices" in given:
        choices = spec["choices"]
        if not isinstance(choices, list) or len(choices) < 2:
            raise ValueError(f"{wrong}: expected a list of at least two choices")
        return d.CategoricalDistribution([override(key, c).partition("=")[2] for c in choices])
    low, high, log, step = spec["low"], spec["high"], spec.get("log"), spec.get("step")
    numbers = all(type(n) in (int, float) for n in (low, high))
    if not numbers or not low < high or log not in (None, True, False):
        raise ValueError(f"{wrong}: expected numbers low < high, and log: true or false")
    try:
        if isinstance(low, int) and isinstance(high, int):
            return d.IntDistribution(low, high, log=bool(log), step=1 if step is None else step)
        return d.FloatDistribution(low, high, log=bool(log), step=step)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{wrong}: {error}") from None


def distributions(space: Mapping[str, Any]) -> dict[str, Any]:
    """{key: Optuna's distribution} of a search space; ValueError for an empty one and for
    entries of another form."""
    if not isinstance(space, dict) or not space:
        raise ValueError(
            f"search.space={space!r}: expected keys of the configuration, each with {FORMS}"
        )
    return {key: _distribution(key, spec) for key, spec in space.items()}


def corners(space: Mapping[str, Any]) -> list[list[str]]:
    """Overrides that together cover every choice and both ends of every range; all must be accepted
    before a study begins."""
    distributions(space)
    values = {
        k: s["choices"] if "choices" in s else [s["low"], s["high"]] for k, s in space.items()
    }
    return [
        [override(k, v[min(i, len(v) - 1)]) for k, v in values.items()]
        for i in range(max(map(len, values.values())))
    ]


def _chosen(
    table: Mapping[str, str], module: Any, key: str, name: str, settings: Mapping[str, Any]
) -> Any:
    if name not in table:
        raise ValueError(f"search.{key}={name!r}; allowed: {', '.join(table)}")
    made = getattr(module, table[name])
    try:
        inspect.signature(made).bind(**settings)
        return made(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"search.{key}_settings={settings}: {error}; {name} takes {inspect.signature(made)}"
        ) from None


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Yields whether this process now holds the lock; a dead process's lock is free."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class Study:
    """An Optuna study in a folder: ``study.json`` (its settings), ``study.journal`` (its trials), a
    lock for each trial.

    Workers are processes that opened the same folder. FileExistsError for a folder whose study has
    other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: dict[str, Any],
        space: Mapping[str, Any],
        sampler: str,
        pruner: str,
        pruner_settings: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.optuna, self.folder = _optuna(), Path(folder)
        self.space, self.sampler_name, self.seed = distributions(space), sampler, seed
        cut = _chosen(PRUNERS, self.optuna.pruners, "pruner", pruner, pruner_settings)
        journal, first = self.optuna.storages.journal, self._sampler(0)
        refuse_other(self.folder / "study.json", identity, "study")
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / ".study.lock"):
            refuse_other(self.folder / "study.json", identity, "study")
            write_json(self.folder / "study.json", {"identity": identity})
            path = str(self.folder / "study.journal")
            storage = self.optuna.storages.JournalStorage(
                journal.JournalFileBackend(path, lock_obj=journal.JournalFileOpenLock(path))
            )
            self.study = self.optuna.create_study(
                study_name="study",
                storage=storage,
                sampler=first,
                pruner=cut,
                direction="maximize",
                load_if_exists=True,
            )

    def _sampler(self, number: int) -> Any:
        """The sampler of a trial, with its own random stream: workers and later calls must not
        repeat each other's draws."""
        seed = sample_seed(self.seed, f"trial={number}") % 2**32
        name = self.sampler_name
        return _chosen(SAMPLERS, self.optuna.samplers, "sampler", name, {"seed": seed})

    def trials(self, *states: str) -> list[Any]:
        found = self.study.get_trials(deepcopy=False)
        return [t for t in found if not states or t.state.name in states]

    def next(self, number: int, held: ExitStack) -> Any:
        """A trial to train, its lock in ``held``: one whose worker died, else a new one. None when
        ``number`` trials are complete, pruned or being trained by other workers."""
        with _locked(self.folder / ".study.lock"):
            for trial in self.trials("RUNNING"):
                if not held.enter_context(_locked(self._lock(trial.number), wait=False)):
                    continue
                if trial.params.keys() == self.space.keys():
                    return self.optuna.trial.Trial(self.study, trial._trial_id)
                # its worker died while choosing its settings
                self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
            if len(self.trials("COMPLETE", "PRUNED", "RUNNING")) >= number:
                return None
            self.study.sampler = self._sampler(len(self.trials()))
            trial = self.study.ask(self.space)
            held.enter_context(_locked(self._lock(trial.number)))
            return trial

    def _lock(self, number: int) -> Path:
        return self.folder / f".trial={number}.lock"

    def table(self) -> str:
        """All trials as CSV."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["trial", "state", "objective", "last_step", *self.space, "error"])
        for t in self.trials():
            last = max(t.intermediate_values, default=None)
            settings = [t.params.get(key) for key in self.space]
            error = t.user_attrs.get("error", "")
            rows.writerow([t.number, t.state.name.lower(), t.value, last, *settings, error])
        return text.getvalue()


def overrides(settings: Mapping[str, Any], space: Iterable[str]) -> list[str]:
    """Hydra overrides of a trial's settings; values of a choice are kept as written."""
    return [
        f"{k}={settings[k]}" if isinstance(settings[k], str) else override(k, settings[k])
        for k in space
    ]
