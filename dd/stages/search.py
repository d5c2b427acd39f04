"""Stage: search hyper-parameters with Optuna. Each trial is a separate run, judged by its mIoU on
the tune split."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dd.evaluation.supervision import LabelSet
from dd.store.progress import left_in_all
from dd.store.provenance import write_atomic
from dd.store.settings import Count, Settings
from dd.training.search import Study, overrides

# (number, {key: value}, report) -> objective; report(step, mIoU, whether it is the last)
Reporting = Callable[[int, float, bool], None]
TrainTrial = Callable[[int, dict[str, Any], Reporting], float | None]
FAILURES = 3  # training errors of trials in a row that end the study


class SearchSettings(Settings):
    """``trials`` to complete or prune, in all; Optuna's ``sampler`` and ``pruner`` by name
    (:mod:`dd.training.search`)."""

    noun: ClassVar[str] = "search"
    trials: Count
    sampler: str
    pruner: str
    pruner_settings: dict[str, Any] | None


def _train(study: Study, trial: Any, train_trial: TrainTrial) -> None:
    """Train one trial and tell the study how it ended. Errors of the training itself (out of
    memory, a loss that is not a number) fail the trial. Other errors and interruptions are raised;
    an interrupted trial is resumed the next time."""
    states = study.optuna.trial.TrialState
    known = set(study.trials()[trial.number].intermediate_values)

    def report(step: int, value: float, last: bool) -> None:
        if step not in known:  # a resumed training repeats a validation
            trial.report(value, step)
            known.add(step)
        if not last and trial.should_prune():
            raise study.optuna.TrialPruned

    try:
        study.study.tell(trial, train_trial(trial.number, dict(trial.params), report))
    except study.optuna.TrialPruned:
        study.study.tell(trial, state=states.PRUNED)
    except Exception as error:
        trial.set_user_attr("error", f"{type(error).__name__}: {error}"[:500])
        study.study.tell(trial, state=states.FAIL)
        if not isinstance(error, RuntimeError | ArithmeticError):
            raise


def search(
    folder: str | Path,
    train_trial: TrainTrial,
    identity: dict[str, Any],
    space: dict[str, Any],
    settings: SearchSettings,
    seed: int = 0,
    chosen_on: Sequence[LabelSet] = (),
    record: Sequence[str] = (),
) -> dict[str, Any]:
    """Run trials until ``trials`` of them are complete or pruned; returns the content of best.yaml,
    the best one.

    ``train_trial(number, {key: value}, report)`` trains and returns the objective; ``report(step,
    mIoU, last)`` may end it by an exception. The same command resumes a study, in several processes
    at once if wanted. ``identity``: the settings that all trials share; a study with others is
    refused (FileExistsError). ``chosen_on``: the label sets used for the choice. ``record``:
    overrides that declare them (:mod:`dd.evaluation.supervision`), written behind the best
    settings, so that a command with these settings records them.
    """
    trials, prunes = settings.trials, (settings.pruner, settings.pruner_settings or {})
    study, failed = Study(folder, identity, space, settings.sampler, *prunes, seed), 0
    # only trials of this process show how long the others will take
    begun, own = time.monotonic(), 0
    while True:
        with ExitStack() as held:
            trial = study.next(trials, held)
            if trial is None:
                break
            _train(study, trial, train_trial)
            ended = study.trials()[trial.number]
        write_atomic(study.folder / "trials.csv", study.table())
        own, over = own + 1, len(study.trials("COMPLETE", "PRUNED"))
        left = (time.monotonic() - begun) / own * max(0, trials - over)
        result = "" if ended.value is None else f", mIoU {ended.value:.2f}"
        print(
            f"trial {ended.number}: {ended.state.name.lower()}{result} with "
            f"{' '.join(overrides(ended.params, study.space))}; "
            f"{over} of {trials} are over, {left_in_all(left)}"
        )
        failed = failed + 1 if ended.state.name == "FAIL" else 0
        if failed == FAILURES:
            raise ValueError(
                f"{FAILURES} trials in a row failed; the last one: {ended.user_attrs['error']}"
            )
    if not study.trials("COMPLETE"):
        raise ValueError(
            f"no trial of {folder} is complete yet; other workers are running them, or all were "
            "pruned: raise search.trials"
        )
    best = study.study.best_trial
    found = {
        "objective": best.value,
        "trial": best.number,
        "metric": "mIoU on the images that judge, averaged weights of the last step",
        "run": f"{folder}/trial={best.number}",
        "overrides": [*overrides(best.params, study.space), *record],
        "chosen_on": list(chosen_on),
        "trials": {
            s: len(study.trials(s.upper())) for s in ("complete", "pruned", "fail", "running")
        },
    }
    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
    write_atomic(study.folder / "best.yaml", text)
    return found
