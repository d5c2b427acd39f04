"""Stage: the label-budget study, mIoU against the number of real labelled images on several arms."""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dd.budget import ARMS, WITH_SYNTHETIC, Plan, Prices, bought, check_targets, curves, skipped, target_costs
from dd.locks import Busy
from dd.provenance import made_by, refuse_other, write_json
from dd.supervision import merged, told

SHOWN = 10  # failures listed at the end; budget.json has them all
POLL = 5.0  # seconds between looks at what other processes are at


class _Work:
    """Each piece of work once in a call. One that fails is kept in ``failed``, so that the rest of the study goes on."""

    def __init__(self, train):
        self.train, self.found, self.failed = train, {}, []

    def __call__(self, work, job, *more):
        """``work(job, *more)``, or None if it failed or what the job goes on from did. Busy: another process is at it."""
        key = (work, job, *more)
        if key not in self.found:
            ready = job.after is None or self(self.train, job.after) is not None
            self.found[key] = self._try(work, job, *more) if ready else None
        return self.found[key]

    def all(self, calls: list[tuple]) -> None:
        """Each of ``calls``; what another process is at comes last, and is waited for."""
        told = False
        while calls:
            later = [call for call in calls if not self._free(call)]
            if len(later) == len(calls):
                if not told:
                    print(f"waiting for what other processes are at: {len(later)} of the jobs")
                told = True
                time.sleep(POLL)
            calls = later

    def _free(self, call) -> bool:
        try:
            self(*call)
        except Busy:
            return False
        return True

    def _try(self, work, job, *more):
        what = f"{job.recipe} {job.domain or ''} shots={job.shots} seed={job.seed} learning_rate={job.learning_rate:g}"
        try:
            return work(job, *more)
        except Busy:
            raise
        except Exception as error:
            self.failed.append({"job": what, "error": f"{type(error).__name__}: {error}"[:500]})
            print(f"failed: {what}: {self.failed[-1]['error']}")


def _choose(plan: Plan, work: _Work, judge) -> tuple[dict, dict]:
    """({recipe: learning rate}, how each was chosen). A recipe with a candidate that failed has none in this call."""
    rates, choices = {}, {}
    several = {r: c for r in plan.recipes() if len(c := plan.candidates(r)) > 1}
    free = [plan.candidate(recipe, rate, {}) for recipe, found in several.items() for rate in found]
    work.all([(judge, job) for job in free if job])  # all but those that wait for the pre-training's rate
    for recipe in plan.recipes():
        candidates, wanted = plan.candidates(recipe), plan.learning_rates.get(recipe) or ()
        choice = {"chosen": candidates[0], "candidates": None, "judged_on": None}
        if len(candidates) == 1:
            choice["why"] = "nothing to judge candidates on: the experiment's own" if len(wanted) > 1 else "as set"
        else:
            jobs = {rate: plan.candidate(recipe, rate, rates) for rate in candidates}
            work.all([(judge, job) for job in jobs.values() if job])
            scores = {rate: job and work(judge, job) for rate, job in jobs.items()}
            done = None not in scores.values()
            choice |= {"chosen": max(scores, key=scores.get) if done else None, "judged_on": plan.judged_on}
            choice |= {"candidates": {f"{rate:g}": value for rate, value in scores.items()}}
            choice["why"] = "best mIoU of the candidates" if done else "not chosen: a candidate failed"
        choice["chosen_on"] = plan.choices.get(recipe)
        if choice["chosen"] is not None:
            rates[recipe] = choice["chosen"]
        choices[recipe] = choice
        print(f"learning rate, {recipe}: {choice['chosen']} ({choice['why']}; {choice['candidates'] or ''})")
    return rates, choices


def budget(
    folder, plan: Plan, train, judge, score, identity: dict, prices: Prices, targets=None, generation_seconds: float = 0.0
) -> dict:  # fmt: skip
    """Train and score what ``plan`` says, write budget.json and return it; the same call goes on with what is missing.

    ``train(job)`` trains, or finds trained, one job and returns {"run", "seconds", "steps",
    "chosen_on"}, the last one if it knows what labels decided (:mod:`dd.supervision`);
    ``judge(job)`` trains it and returns its mIoU on the tune split; ``score(job, domain)`` that of
    a trained job on the domain's test split. Finished
    jobs are theirs to skip, and they raise :class:`dd.locks.Busy` for one that another process is at: processes with the
    same call share the jobs, and each of them ends with the whole study. ``identity``: all settings of the study;
    FileExistsError if study.json holds others. ``generation_seconds``: of the synthetic set, once. ValueError at the end,
    with a list, if jobs failed.
    """
    check_targets(targets)
    folder = Path(folder)
    refuse_other(folder / "study.json", identity, "study")
    if not (folder / "study.json").exists():
        write_json(folder / "study.json", {"identity": identity})
    work = _Work(train)
    rates, choices = _choose(plan, work, judge)
    shape = lambda: {a: {str(k): {} for k in plan.shots if k or a in WITH_SYNTHETIC} for a in plan.arms}  # noqa: E731
    arms, seconds, runs = shape(), shape(), []
    chosen = {arm: {False: [], True: []} for arm in plan.arms}  # without real images, with some
    points = [  # the whole curve of one seed before the next
        (arm, domain, k, seed)
        for seed in plan.seeds for domain in plan.domains for k in plan.shots for arm in arms if str(k) in arms[arm]
    ]  # fmt: skip
    jobs = {point: plan.job(*point, rates) for point in points}

    def scored(job, domain):
        return None if work(train, job) is None else score(job, domain)

    work.all([(scored, job, domain) for (_, domain, _, _), job in jobs.items() if job])
    for (arm, domain, k, seed), job in jobs.items():
        row = _point(job, domain, work, scored, generation_seconds)
        sets = _chosen(plan, job, work) if row["run"] else []
        chosen[arm][k != 0] = merged(chosen[arm][k != 0], sets)
        for table, key in ((arms, "miou"), (seconds, "seconds")):
            table[arm][str(k)].setdefault(domain, []).append(row[key])
        runs.append({"arm": arm, "shots": k, "domain": domain, "seed": seed, **row})

    def labels(arm, domain, images):
        return bought(plan, chosen[arm][images != 0], images, domain)

    paid = {
        arm: {k: {d: labels(arm, d, plan.images(_shots(k), d)) for d in plan.domains} for k in values}
        for arm, values in arms.items()
    }
    result = {
        "study": folder.name,
        "supervision": "real labels: shots, and those that settings were chosen on (cost.labels)",
        "chosen_on": {arm: merged(*found.values()) for arm, found in chosen.items()},
        "domains": plan.domains, "seeds": plan.seeds, "labels": {a: ARMS[a] for a in plan.arms}, "arms": arms,
        "learning_rates": choices, "steps": _steps(runs), "curves": curves(arms, plan.domains),
        "skipped": skipped(arms, plan.domains),
        "cost": {"prices": vars(prices), "generation_seconds": generation_seconds, "seconds": seconds,
                 "labels": paid,
                 "targets": target_costs(arms, seconds, plan.domains, prices, targets, labels)},
        "runs": runs, "failed": work.failed, **made_by(),
    }  # fmt: skip
    write_json(folder / "budget.json", result)
    print_study(result)
    if work.failed:
        lines = [f"{f['job']}: {f['error']}" for f in work.failed]
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more, in {folder}/budget.json"] if len(lines) > SHOWN else []
        missing = sum(r["miou"] is None for r in runs)
        raise ValueError(
            f"some jobs failed, {missing} of {len(runs)} points are missing; the same command tries them again:\n  "
            + "\n  ".join(lines)
        )
    return result


def _point(job, domain: str, work: _Work, scored, generation_seconds) -> dict:
    """{"run", "miou", "steps", "seconds"} of one point, all None if it is missing. Steps and seconds are those of all its
    trainings; what was drawn for it is counted in the seconds."""
    miou = work(scored, job, domain) if job else None
    if miou is None:
        return dict.fromkeys(("run", "miou", "steps", "seconds"))
    done = work(work.train, job)
    before = work(work.train, job.after) if job.after else {"steps": 0, "seconds": 0.0}
    drawn = generation_seconds if job.recipe in ("synthetic", *WITH_SYNTHETIC) else 0.0
    steps, spent = done["steps"] + before["steps"], done["seconds"] + before["seconds"] + drawn
    return {"run": str(done["run"]), "miou": miou, "steps": steps, "seconds": spent}


def _shots(key: str) -> int | str:
    return key if key == "all" else int(key)


def _chosen(plan: Plan, job, work: _Work) -> list[dict]:
    """The choices behind a trained job and what it goes on from: its run's, and the study's own."""
    own = ({"what": "learning_rate", **one} for one in plan.choices.get(job.recipe, ()))
    before = _chosen(plan, job.after, work) if job.after else []
    return merged(before, work(work.train, job).get("chosen_on"), own)


def _steps(runs: list[dict]) -> dict:
    """{arm: optimiser steps of its runs, pre-training counted}, as measured."""
    found = {r["arm"]: sorted({o["steps"] for o in runs if o["arm"] == r["arm"] and o["steps"]}) for r in runs}
    return {arm: steps[0] if len(steps) == 1 else steps or None for arm, steps in found.items()}


def _cell(values) -> str:
    return "-" if values is None else f"{values[0]:.1f}" + (f" ± {values[1]:.1f}" if values[1] is not None else "")


def print_study(result: dict) -> None:
    """Curves, images that can be skipped, and what targets cost, as tables."""
    console = Console()
    for domain in result["domains"]:
        shown = [c for c in result["curves"] if c["domain"] == domain]
        points = {c["arm"]: dict(zip(c["k"], zip(c["mean"], c["sd"], strict=True), strict=True)) for c in shown}
        table = Table(title=f"mIoU on {domain} (test), seeds {result['seeds']}")
        for name in ("real images", *(c["label"] for c in shown)):
            table.add_column(name, justify="right")
        for k in sorted({k for c in shown for k in c["k"]}):
            table.add_row(str(k), *(_cell(points[c["arm"]].get(k)) for c in shown))
        console.print(table)
        for arm, controls in result["skipped"].items():
            for control, found in controls.items():
                for k, at in found.get(domain, {}).items():
                    if at["skipped"] is None:
                        text = f"at least {at['at_least']} (the control never gets there)"
                    else:
                        text = f"{at['skipped']:.0f} (the control needs {at['needed']:.0f})"
                    print(f"{ARMS[arm]} with {k}, against {ARMS[control]}: real images skipped {text}")
        for arm, sets in result["chosen_on"].items():
            print(f"settings of {ARMS[arm]} were chosen on: {told(sets) or 'no real label'}")
        title = f"What a target costs on {domain}: images to label, price in all with what chose settings"
        table = Table(title=title)
        for name in ("mIoU", *(c["label"] for c in shown)):
            table.add_column(name, justify="right")
        for row in result["cost"]["targets"][domain]:
            found = [row["arms"].get(c["arm"]) for c in shown]
            cells = ["-" if f is None else f"> {f['more_than']}" if f["images"] is None else
                     f"{f['images']}, {f['total']:.2f}" for f in found]  # fmt: skip
            table.add_row(f"{row['target']:.1f}", *cells)
        console.print(table)
