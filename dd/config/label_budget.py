"""The label-budget study: its plan and the configuration of each of its runs."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from dd.config.composition import choices, compose
from dd.config.jobs import job_overrides
from dd.config.objects import chosen_on, plain, real_data, taxonomy
from dd.config.training import training_sets
from dd.config.tuning import one_device, study_identity
from dd.data.datasets import SegmentationFolder
from dd.evaluation.budget import RECIPES, Job, Plan, choice_shots
from dd.evaluation.supervision import LabelSet, declared, label_set
from dd.store.samples import read_records
from dd.training import search

SET_BY_STUDY = ("seed", "shots", "source", "init_from", "optimizer.learning_rate")
SHARED = (
    r"(data_root|output_root|device|num_workers|logger.*"
    r"|trainer\.(devices|accelerator|enable_progress_bar))$"
)
JUDGED = (
    "trainer.limit_val_batches=1.0",
    "trainer.val_check_interval=null",
    "trainer.check_val_every_n_epoch=1",
)


def _given() -> dict[str, str]:
    """{key: override} of this command, except those that select the study itself."""
    keys = {o.lstrip("+~").partition("=")[0]: o for o in job_overrides()}
    own = ("name", "stage", "search", "experiment", "study")
    return {k: o for k, o in keys.items() if k.split(".")[0] not in own}


def _budget_part(
    cfg: Any, recipe: str, domain: str, more: Sequence[str] = (), draw: str | None = None
) -> Any:
    """The configuration of a recipe of the study on a domain, except its name: the recipe's
    experiment, then the overrides of this command, then ``more``. Its synthetic images are those of
    ``draw``; None means ``synthetic``. ValueError for an experiment or a domain that does not
    exist."""
    experiment = plain(cfg.study)["experiments"]["real" if recipe == "real_short" else recipe]
    known = {kind: choices(kind) for kind in ("experiment", "data")}
    if experiment not in known["experiment"]:
        raise ValueError(
            f"study.experiments: {recipe}: {experiment!r}; allowed: "
            f"{', '.join(known['experiment'])}"
        )
    own = domain == cfg.data.name
    if not own and domain not in known["data"]:
        raise ValueError(
            f"study.domains: {domain!r} is neither {cfg.data.name!r} nor one of "
            f"{', '.join(known['data'])}"
        )
    given = {k: o for k, o in _given().items() if k != "data"}
    if not own and (detail := [o for k, o in given.items() if k.startswith("data.")]):
        raise ValueError(
            f"{', '.join(detail)} would change every domain; write a file in conf/data for each "
            "of them"
        )
    data = HydraConfig.get().runtime.choices["data"] if own else domain
    fixed = [f"experiment={experiment}", f"data={data}", "stage=segmenter", "hold_out=null"]
    fixed += ["shots_list=null"] if recipe == "synthetic" else []
    drawn = search.override("synthetic", draw or cfg.synthetic)
    return compose("train", [*given.values(), *fixed, drawn, *more])


def _draws(cfg: Any) -> list[str]:
    """The synthetic sets of the study. ValueError for sets that cannot be distinguished."""
    given = plain(cfg.study)["synthetic"]
    if given is None:
        return [cfg.synthetic]
    if "synthetic" in _given():
        raise ValueError("synthetic=... and study.synthetic both name synthetic sets; give one")
    names = [Path(path).name for path in given]
    if len(set(names)) < len(names):
        why = "runs are filed by the last part of these folders, and two have the same"
        raise ValueError(f"study.synthetic={given!r}: {why}; rename one")
    return given


def budget_plan(cfg: Any) -> tuple[Plan, dict[str, Any]]:
    """(plan, settings that all runs of the study share). Checks data and settings; trains and
    writes nothing."""
    one_device(cfg, "a run of the study trains on one device")
    if found := [o for k, o in _given().items() if k in SET_BY_STUDY]:
        raise ValueError(
            f"{', '.join(found)}: stage=study sets this for each run; see the keys of study"
        )
    given = plain(cfg.study)
    needed = {"synthetic", "finetune", *(given["arms"] or ())}
    parts = {r: _budget_part(cfg, r, given["domains"][0]) for r in RECIPES if r in needed}
    domains = {domain: _budget_part(cfg, "finetune", domain) for domain in given["domains"]}
    for domain, part in domains.items():
        _check_domain(cfg, domain, part)
    first = next(iter(domains.values()))
    plan = Plan(
        **{k: given[k] for k in ("shots", "seeds", "arms")},
        choose=given["choose"] or {},
        learning_rates=given["learning_rates"] or {},
        domains={d: len(real_data(part, part.data.train_split)) for d, part in domains.items()},
        synthetic_steps=parts["synthetic"].trainer.max_steps,
        finetune_steps=parts["finetune"].trainer.max_steps,
        own_rates={recipe: part.optimizer.learning_rate for recipe, part in parts.items()},
        judged_on=_judged_on(cfg, first),
        draws=_draws(cfg),
        lists={d: f"{part.data.name}/{part.data.train_split}" for d, part in domains.items()},
        judges=_judges(cfg, first),
    )
    for draw in plan.draws if "synthetic" in plan.recipes() else ():
        training_sets(_budget_part(cfg, "synthetic", given["domains"][0], draw=draw))
    # leave out settings that only use the runs, and a list of draws that is not given
    loose = {"prices", "targets", "generation_seconds"}
    loose |= {"synthetic"} if given["synthetic"] is None else set()
    settings = {
        **{k: v for k, v in given.items() if k not in loose},
        "hold_out": cfg.hold_out,
        "images": plan.domains,
        "judged_on": plan.judged_on,
    }
    recipes = {r: _shared(p) for r, p in parts.items() if r in plan.recipes()}
    data = {domain: plain(part.data) for domain, part in domains.items()}
    return plan, {"budget": settings, "recipes": recipes, "data": data}


def _check_domain(cfg: Any, domain: str, part: Any) -> None:
    if part.data.tune_split == part.data.test_split:
        raise ValueError(
            f"data {domain!r} has its test split as tune split, and nothing is ever chosen on "
            "the test split; set data.tune_split=null, or to other images"
        )
    if taxonomy(part) != taxonomy(cfg):
        raise ValueError(f"study.domains: {domain!r} has other classes than {cfg.data.name!r}")


def _judged_on(cfg: Any, first: Any) -> str | None:
    """The images on which learning rates are compared: held-out ones, the tune split, or none."""
    if cfg.hold_out is not None:
        given = plain(cfg.study)
        images = given["choose"]["shots"]
        listed = choice_shots(given["choose"], given["shots"])
        fewest = min((k for k in listed if type(k) is int), default=math.inf)
        if cfg.hold_out >= fewest:
            raise ValueError(
                f"hold_out={cfg.hold_out}: expected a number of images below "
                f"study.choose.shots={images}"
            )
        return f"{cfg.hold_out} images held out of the training set"
    if first.data.tune_split is None:
        return None
    return (
        f"{len(real_data(first, first.data.tune_split))} images of "
        f"{first.data.name}/{first.data.tune_split}"
    )


def _judges(cfg: Any, first: Any) -> list[dict[str, Any]]:
    """The label sets of :func:`_judged_on`, unless they are held out and so belong to the
    training's."""
    split = first.data.tune_split
    if cfg.hold_out is not None or split is None:
        return []
    return [label_set(f"{first.data.name}/{split}", len(real_data(first, split)))]


def _shared(part: Any) -> dict[str, Any]:
    each = ("search", "seed", "shots", "init_from", "data", "data_root", "hold_out")
    return {k: v for k, v in study_identity(part, {}).items() if k not in each}


def budget_run(
    cfg: Any, job: Job, judged: bool = False, choices: dict[str, Any] | None = None
) -> Any:
    """The configuration of a job. If it equals its experiment except for data, shots and seed, it
    has the folder of ``train.py -m experiment=...`` and is shared with it, provided that the
    experiment's record holds the labels that the study chose the rate on. All others go below the
    study's folder. ``choices``: {recipe: the label sets that its rate is chosen on}
    (:attr:`dd.evaluation.budget.Plan.choices`)."""
    held = judged and cfg.hold_out is not None
    more = _points(job) + [*JUDGED, "trainer.callbacks.best=null"] * judged
    part = _budget_part(cfg, job.recipe, job.domain or cfg.study.domains[0], more, job.draw)
    after = job.after and budget_run(cfg, job.after, choices=choices)
    init_from = after and f"{after.output_root}/{after.name}"
    changes = _changes(cfg, job, part, held)
    sets = (choices or {}).get(job.recipe)
    own = (not changes, init_from == part.init_from, (job.domain or "") in part.name)
    # a recipe with the data in its name is the same run as with data=... typed
    named = {"data"} if part.data.name in part.name else set()
    shared = all(re.match(SHARED, key) for key in _given().keys() - named)
    if all(own) and shared and _told(part, sets):
        rest = [p for p in _points(job) if p not in re.split("[/,]", part.name)]
        part.name = "/".join([part.name, *([",".join(rest)] if rest else [])])
    else:
        where = f"{job.recipe}_{job.domain}" if job.domain else job.recipe
        part.name = f"{cfg.name}/{where}/{','.join(_points(job) + changes)}"
        _declare(part, sets)
    part.trainer.max_steps, part.optimizer.learning_rate = job.steps, job.learning_rate
    part.init_from, part.hold_out = init_from, cfg.hold_out if held else None
    return part


def _declare(part: Any, sets: list[LabelSet] | None) -> None:
    if sets is not None:
        chosen, how = declared(sets), {"merge": False, "force_add": True}
        OmegaConf.update(part, "chosen_on.learning_rate", chosen, **how)


def _points(job: Job) -> list[str]:
    return [f"shots={job.shots}"] * (job.domain is not None) + [f"seed={job.seed}"]


def _changes(cfg: Any, job: Job, part: Any, held: bool) -> list[str]:
    """How a job differs from its experiment, apart from data, shots and seed."""
    rate, draw = job.learning_rate, job.draw
    changes = {
        f"max_steps={job.steps}": job.steps != part.trainer.max_steps,
        f"learning_rate={rate:g}": rate != part.optimizer.learning_rate,
        f"hold_out={cfg.hold_out}": held,
        f"draw={Path(draw or '').name}": draw not in (None, cfg.synthetic),
    }
    return [text for text, is_so in changes.items() if is_so]


def _told(part: Any, sets: list[dict[str, Any]] | None) -> bool:
    """Whether an experiment's own record of its learning rate holds these label sets, or the whole
    lists that they are drawn from."""
    record = [
        {"data": c["data"], "labels": c["labels"], "seed": c.get("seed")}
        for c in chosen_on(part)
        if c["what"] == "learning_rate"
    ]
    whole = {one["data"] for one in record if one["seed"] is None}
    return all(one["data"] in whole or {"seed": None, **one} in record for one in sets or ())


def budget_test(cfg: Any, domain: str) -> SegmentationFolder:
    """The test images of a domain of the study."""
    part = _budget_part(cfg, "finetune", domain)
    return real_data(part, part.data.test_split)


def generation_seconds(cfg: Any) -> dict[str, float]:
    """{synthetic set: seconds that drawing it took}, from its records, or as given for each."""
    given = cfg.study.generation_seconds
    if given is not None:
        return dict.fromkeys(_draws(cfg), given)
    drawn = {draw: read_records(draw).values() for draw in _draws(cfg)}
    return {draw: round(sum(r["seconds"] for r in records), 1) for draw, records in drawn.items()}
