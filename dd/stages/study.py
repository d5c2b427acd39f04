"""Stage: the label-budget study: mIoU against the number of real labelled images, on several
arms."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dd.evaluation.budget import (
    ARMS,
    WITH_SYNTHETIC,
    Job,
    Plan,
    Prices,
    Shots,
    bought,
    check_targets,
    edge,
)
from dd.evaluation.budget_results import (
    Measured,
    curves,
    differences,
    skipped,
    target_costs,
)
from dd.evaluation.savings import price_text, skipped_text
from dd.evaluation.supervision import LabelSet, merged, told
from dd.store.locks import Busy
from dd.store.progress import left_in_all
from dd.store.provenance import made_by, refuse_other, write_json

SHOWN = 10  # failures listed at the end; budget.json has them all
POLL = 5.0  # seconds between checks of other processes' work

Train = Callable[[Job], dict[str, Any]]
Values = dict[str, dict[str, dict[str, list[Any]]]]  # arm, shots, domain: of each run
Point = tuple[str, str, Shots, int, str]  # arm, domain, shots, seed, draw


@dataclass(frozen=True)
class Measuring:
    """What a study does with a job. The functions skip finished jobs, and raise
    :class:`dd.store.locks.Busy` for one that another process is working on.

    ``train(job)`` trains, or finds it trained, and returns {"run", "seconds", "steps",
    "chosen_on"}, the last one if it knows what labels decided (:mod:`dd.evaluation.supervision`).
    ``judge(job)`` trains it and returns its mIoU on the tune split. ``score(job, domain)`` returns
    that of a trained job on the domain's test split, {"miou", "num_images", "per_image"} with the
    file that holds each image's confusions, or None.
    """

    train: Train
    judge: Callable[[Job], float | None]
    score: Callable[[Job, str], dict[str, Any]]


class _Work:
    """Does each piece of work once in a call. A failure is kept in ``failed``, so that the rest of
    the study continues."""

    def __init__(self, train: Train, expected: Collection[Job] = ()) -> None:
        """``expected``: all trainings of the study, at any learning rate."""
        self.train, self.total = train, len(expected)
        self.steps = sum(job.steps for job in expected)
        self.found: dict[tuple[Any, ...], Any] = {}
        self.failed: list[dict[str, str]] = []
        self.begun: set[Job] = set()
        self.recorded: dict[Job, float] = {}  # seconds, from the job's run
        self.watched: dict[Job, float] = {}  # seconds that we measured

    def __call__(self, work: Callable[..., Any], job: Job, *more: str) -> Any:
        """``work(job, *more)``, or None if it failed, or if the job that it starts from failed.
        Busy: another process is working on it."""
        key = (work, job, *more)
        if key not in self.found:
            ready = job.after is None or self(self.train, job.after) is not None
            self.found[key] = self._try(work, job, *more) if ready else None
        return self.found[key]

    def all(self, calls: list[tuple[Any, ...]]) -> None:
        """Do each of ``calls``; work of another process comes last, and is waited for."""
        told = False
        while calls:
            later = [call for call in calls if not self._free(call)]
            if len(later) == len(calls):
                if not told:
                    print(f"waiting for what other processes are at: {len(later)} of the jobs")
                told = True
                time.sleep(POLL)
            calls = later

    def _free(self, call: tuple[Any, ...]) -> bool:
        try:
            self(*call)
        except Busy:
            return False
        return True

    def _try(self, work: Callable[..., Any], job: Job, *more: str) -> Any:
        what = (
            f"{job.recipe} {job.domain or ''} shots={job.shots} seed={job.seed} "
            f"learning_rate={job.learning_rate:g}"
        )
        what += f" draw={job.draw}" if job.draw else ""
        if job not in self.begun:
            self.begun.add(job)
            print(f"run {len(self.begun)} of {self.total}: {what}{self._left()}", flush=True)
        started = time.monotonic()
        try:
            result = work(job, *more)
            self.watched.setdefault(job, time.monotonic() - started)
            if isinstance(result, dict) and "seconds" in result:
                self.recorded[job] = result["seconds"]
            return result
        except Busy:
            raise
        except Exception as error:
            self.failed.append({"job": what, "error": f"{type(error).__name__}: {error}"[:500]})
            print(f"failed: {what}: {self.failed[-1]['error']}")
            return None

    def _left(self) -> str:
        """How long the remaining runs will take at the rate of the finished ones."""
        found = self.recorded or self.watched  # runs that were trained before take no time now
        if not found:
            return ""
        rate = sum(found.values()) / sum(job.steps for job in found)
        left = rate * max(0, self.steps - sum(job.steps for job in self.watched))
        return f", {left_in_all(left)}"


def _expected(plan: Plan, points: list[Point]) -> set[Job]:
    """All trainings of a study. Their number does not depend on the chosen learning rates."""
    rates = {recipe: plan.candidates(recipe)[0] for recipe in plan.recipes()}
    found = [plan.job(*point[:4], rates, point[4]) for point in points]
    for recipe in plan.recipes():
        if len(plan.candidates(recipe)) > 1:
            found += [job for jobs in _places(plan, recipe, rates).values() for job in jobs]
    jobs = {job for job in found if job}
    return jobs | {job.after for job in jobs if job.after}


def _choose(
    plan: Plan, work: _Work, judge: Callable[[Job], float | None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """({recipe: learning rate, or {shots: it}}, how each was chosen). If a candidate failed, there
    is no choice in this call."""
    rates: dict[str, Any] = {}
    choices: dict[str, Any] = {}
    several = [r for r in plan.recipes() if len(plan.candidates(r)) > 1]
    # all except those that wait for the pre-training's rate
    free = [jobs for recipe in several for jobs in _places(plan, recipe, {}).values()]
    work.all([(judge, job) for jobs in free for job in jobs if job])
    for recipe in plan.recipes():
        if recipe not in several:
            choices[recipe] = _only(plan, recipe)
            rates[recipe] = choices[recipe]["chosen"]
            _tell(recipe, None, choices[recipe])
            continue
        places = _places(plan, recipe, rates)
        work.all([(judge, job) for jobs in places.values() for job in jobs if job])
        found = {}
        for k, jobs in places.items():
            scores = [work(judge, job) if job else None for job in jobs]
            owed = {"judged_on": plan.judged_on, "chosen_on": plan.choices.get(recipe)}
            found[k] = _best(plan.candidates(recipe), scores) | owed
            _tell(recipe, k if len(places) > 1 else None, found[k])
        if len(places) > 1:
            rates[recipe] = {k: choice["chosen"] for k, choice in found.items()}
            choices[recipe] = {"by_shots": {str(k): choice for k, choice in found.items()}}
        else:
            (choices[recipe],) = found.values()
            if choices[recipe]["chosen"] is not None:
                rates[recipe] = choices[recipe]["chosen"]
    return rates, choices


def _only(plan: Plan, recipe: str) -> dict[str, Any]:
    """The choice of a recipe with a single candidate."""
    judgeless = len(plan.learning_rates.get(recipe) or ()) > 1
    why = "nothing to judge candidates on: the experiment's own" if judgeless else "as set"
    none = dict.fromkeys(("candidates", "judged_on", "edge"))
    return {"chosen": plan.candidates(recipe)[0], **none, "why": why, "chosen_on": None}


def _places(plan: Plan, recipe: str, rates: dict[str, Any]) -> dict[Any, list[Job | None]]:
    """{shots: its candidates' jobs, all seeds of the first candidate before the next}."""
    each = list(product(plan.candidates(recipe), plan.choice_seeds()))
    return {
        k: [plan.candidate(recipe, rate, rates, k, seed) for rate, seed in each]
        for k in ([None] if recipe == "synthetic" else plan.choice_shots())
    }


def _best(candidates: list[float], scores: list[float | None]) -> dict[str, Any]:
    """The choice by means over seeds; ``scores`` of the jobs of :func:`_places`, in order."""
    seeds = len(scores) // len(candidates)
    of = {rate: scores[i * seeds : (i + 1) * seeds] for i, rate in enumerate(candidates)}
    good = {rate: [miou for miou in found if miou is not None] for rate, found in of.items()}
    means = {rate: mean(found) for rate, found in good.items() if len(found) == seeds}
    done = len(means) == len(of)
    chosen = max(means, key=means.__getitem__) if done else None
    return {
        "chosen": chosen,
        "candidates": {f"{rate:g}": means.get(rate) for rate in candidates},
        "why": "best mIoU of the candidates" if done else "not chosen: a candidate failed",
        "edge": None if chosen is None else edge(chosen, candidates),
    }


def _tell(recipe: str, shots: Shots | None, choice: dict[str, Any]) -> None:
    """Print the choice, and whether a better one may lie outside the grid."""
    where = recipe if shots is None else f"{recipe} at {shots} images"
    found = (choice["candidates"] or {}).items()
    among = ", ".join(f"{rate}: {'-' if miou is None else f'{miou:.1f}'}" for rate, miou in found)
    why = "; ".join(filter(None, (choice["why"], among)))
    print(f"learning rate, {where}: {choice['chosen']} ({why})")
    if choice["edge"]:
        end, add = choice["edge"]["end"], choice["edge"]["add"]
        print(f"  the {end} of its candidates: a better one may lie beyond it; add {add:g}")


def study(
    folder: str | Path,
    plan: Plan,
    measuring: Measuring,
    identity: dict[str, Any],
    prices: Prices,
    targets: list[float] | None = None,
    generation_seconds: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Train and score what ``plan`` says, write budget.json and return it. The same call resumes
    with what is missing. Processes with the same call share the jobs, and each of them ends with
    the whole study.

    ``identity``: all settings of the study; FileExistsError if study.json holds others.
    ``generation_seconds``: of each draw, once. ValueError at the end, with a list, if jobs failed.
    """
    check_targets(targets)
    folder, train, score = Path(folder), measuring.train, measuring.score
    refuse_other(folder / "study.json", identity, "study")
    if not (folder / "study.json").exists():
        write_json(folder / "study.json", {"identity": identity})
    used: dict[str, list[str]] = {
        a: [str(k) for k in plan.shots if k or a in WITH_SYNTHETIC] for a in plan.arms
    }
    arms: Values = {a: {k: {} for k in ks} for a, ks in used.items()}
    seconds: Values = {a: {k: {} for k in ks} for a, ks in used.items()}
    runs: list[dict[str, Any]] = []
    files: dict[tuple[str, str, str, int], Path | None] = {}
    # {(arm, with real images or not): label sets}
    chosen: dict[tuple[str, bool], list[LabelSet]] = dict.fromkeys(
        product(plan.arms, (False, True)), []
    )
    points = _points(plan, used)
    work = _Work(train, _expected(plan, points))
    rates, choices = _choose(plan, work, measuring.judge)
    jobs = {point: plan.job(*point[:4], rates, point[4]) for point in points}

    def scored(job: Job, domain: str) -> dict[str, Any] | None:
        return None if work(train, job) is None else score(job, domain)

    work.all([(scored, job, domain) for (_, domain, *_), job in jobs.items() if job])
    for (arm, domain, k, seed, _), job in jobs.items():
        row = _point(job, domain, work, scored, generation_seconds or {})
        sets = _chosen(plan, job, work) if job and row["run"] else []
        chosen[arm, k != 0] = merged(chosen[arm, k != 0], sets)
        at = arms[arm][str(k)].setdefault(domain, [])
        files[arm, str(k), domain, len(at)] = row.pop("per_image")
        at.append(row["miou"])
        seconds[arm][str(k)].setdefault(domain, []).append(row["seconds"])
        head = {"arm": arm, "shots": k, "domain": domain, "seed": seed, "draw": job and job.draw}
        runs.append({**head, **row})

    def stored(arm: str, shots: str, domain: str, run: int) -> np.ndarray | None:
        return _confusions(files[arm, shots, domain, run])

    def labels(arm: str, domain: str, images: int) -> int:
        return bought(plan, chosen[arm, images != 0], images, domain)

    def paid(arm: str, shots: str) -> dict[str, int]:
        k = shots if shots == "all" else int(shots)
        return {d: labels(arm, d, plan.images(k, d)) for d in plan.domains}

    found = Measured(arms, plan.domains, plan.seeds, [*plan.draws], stored)
    result = {
        "study": folder.name,
        "supervision": "real labels: shots, and those that settings were chosen on (cost.labels)",
        "chosen_on": {a: merged(chosen[a, False], chosen[a, True]) for a in plan.arms},
        "domains": plan.domains,
        "seeds": plan.seeds,
        "draws": plan.draws,
        "labels": {a: ARMS[a] for a in plan.arms},
        "arms": arms,
        "learning_rates": choices,
        "steps": _steps(runs),
        "curves": curves(arms, plan.domains),
        "differences": differences(found),
        "skipped": skipped(found),
        "cost": {
            "prices": vars(prices),
            "generation_seconds": generation_seconds or {},
            "seconds": seconds,
            "labels": {arm: {k: paid(arm, k) for k in values} for arm, values in arms.items()},
            "targets": target_costs(found, seconds, prices, targets, labels),
        },
        "runs": runs,
        "failed": work.failed,
        **made_by(),
    }
    write_json(folder / "budget.json", result)
    print_study(result)
    if work.failed:
        raise ValueError(_told_failed(work.failed, runs, folder))
    return result


def _points(plan: Plan, used: Mapping[str, list[str]]) -> list[Point]:
    """The whole curve of one seed and draw before the next; controls see no draw."""
    return [
        (arm, domain, k, seed, draw)
        for seed, draw in product(plan.seeds, plan.draws)
        for domain, k, arm in product(plan.domains, plan.shots, used)
        if str(k) in used[arm] and (arm in WITH_SYNTHETIC or draw == plan.draws[0])
    ]


def _told_failed(failed: list[dict[str, str]], runs: list[dict[str, Any]], folder: Path) -> str:
    lines = [f"{f['job']}: {f['error']}" for f in failed]
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more, in {folder}/budget.json"]
    missing = sum(r["miou"] is None for r in runs)
    return (
        f"some jobs failed, {missing} of {len(runs)} points are missing; the same command "
        "tries them again:\n  " + "\n  ".join(lines)
    )


def _confusions(path: Path | None) -> np.ndarray | None:
    """Each test image's confusions, read when needed: those of all runs may not fit into memory."""
    if path is None:
        return None
    with np.load(path, allow_pickle=False) as stored:
        return stored["confusion"].astype(np.int64)


def _point(
    job: Job | None,
    domain: str,
    work: _Work,
    scored: Callable[[Job, str], dict[str, Any] | None],
    generated: Mapping[str, float],
) -> dict[str, Any]:
    """{"run", "miou", "num_images", "per_image", "steps", "seconds"} of one point, all None if it
    is missing. Steps and seconds are those of all its trainings; seconds include drawing its
    synthetic set (``generated``)."""
    keys = ("run", "miou", "num_images", "per_image", "steps", "seconds")
    result = work(scored, job, domain) if job else None
    if job is None or result is None:
        return dict.fromkeys(keys)
    done = work(work.train, job)
    before = work(work.train, job.after) if job.after else {"steps": 0, "seconds": 0.0}
    spent = done["seconds"] + before["seconds"] + generated.get(job.draw or "", 0.0)
    steps = done["steps"] + before["steps"]
    found = {**result, "run": str(done["run"]), "steps": steps, "seconds": spent}
    return {key: found[key] for key in keys}


def _chosen(plan: Plan, job: Job, work: _Work) -> list[dict[str, Any]]:
    """The choices behind a trained job and the one it starts from: its run's, and the study's."""
    own = ({"what": "learning_rate", **one} for one in plan.choices.get(job.recipe, ()))
    before = _chosen(plan, job.after, work) if job.after else []
    return merged(before, work(work.train, job).get("chosen_on"), own)


def _steps(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """{arm: optimiser steps of its runs, including pre-training}, as measured."""
    found = {
        r["arm"]: sorted({o["steps"] for o in runs if o["arm"] == r["arm"] and o["steps"]})
        for r in runs
    }
    return {arm: steps[0] if len(steps) == 1 else steps or None for arm, steps in found.items()}


def _cell(values: tuple[float, float | None] | None) -> str:
    if values is None:
        return "-"
    return f"{values[0]:.1f}" + (f" ± {values[1]:.1f}" if values[1] is not None else "")


def print_study(result: dict[str, Any]) -> None:
    """Print curves, differences, images that can be skipped, and costs of targets, as tables."""
    console = Console()
    for domain in result["domains"]:
        shown = [c for c in result["curves"] if c["domain"] == domain]
        console.print(_curve_table(result, domain, shown))
        for row in result["differences"]:
            if row["domain"] == domain:
                print(difference_text(row))
        _print_skipped(result["skipped"], domain)
        for arm, sets in result["chosen_on"].items():
            print(f"settings of {ARMS[arm]} were chosen on: {told(sets) or 'no real label'}")
        console.print(_target_table(result["cost"]["targets"][domain], domain, shown))


def _table(title: str, first: str, shown: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for name in (first, *(c["label"] for c in shown)):
        table.add_column(name, justify="right")
    return table


def _curve_table(result: dict[str, Any], domain: str, shown: list[dict[str, Any]]) -> Table:
    draws = f", {len(result['draws'])} synthetic draws" if len(result["draws"]) > 1 else ""
    title = f"mIoU on {domain} (test), seeds {result['seeds']}{draws}"
    table = _table(title, "real images", shown)
    points = [dict(zip(c["k"], zip(c["mean"], c["sd"], strict=True), strict=True)) for c in shown]
    for k in sorted({k for at in points for k in at}):
        table.add_row(str(k), *(_cell(at.get(k)) for at in points))
    return table


def _print_skipped(found: dict[str, Any], domain: str) -> None:
    for arm, controls in found.items():
        for control, domains in controls.items():
            for k, at in domains.get(domain, {}).items():
                what = f"{ARMS[arm]} with {k}, against {ARMS[control]}"
                print(f"{what}: real images skipped: {skipped_text(at)}")


def _target_table(targets: list[dict[str, Any]], domain: str, shown: list[dict[str, Any]]) -> Table:
    title = f"What a target costs on {domain}: images to label, price in all"
    table = _table(f"{title} with what chose settings", "mIoU", shown)
    for row in targets:
        found = [row["arms"].get(c["arm"]) for c in shown]
        cells = ["-" if f is None else price_text(f) for f in found]
        table.add_row(f"{row['target']:.1f}", *cells)
    return table


def difference_text(row: dict[str, Any]) -> str:
    """A row of ``differences`` as one line."""
    arm, against = ARMS[row["arm"]], ARMS[row["against"]]
    what = f"{arm} with {row['k']} less {against} with {row['against_k']}: {row['value']:+.1f}"
    if row["low"] is None:
        return f"{what}, one run: not shown"
    images = f", {row['images']} images" if row["images"] else ""
    p = f", p {row['p']:.3f}, {row['p_holm']:.3f} after Holm"
    shown = ": not shown" if row["low"] <= 0 <= row["high"] else ""
    interval = f"[{row['low']:.1f}, {row['high']:.1f}]"
    return f"{what} {interval} ({row['seeds']} seeds{images}{p}){shown}"
