"""The plan of a label-budget study, and prices. What it found:
:mod:`dd.evaluation.budget_results`."""

import math
from dataclasses import dataclass, field

from dd.evaluation.supervision import distinct, label_set, merged

ARMS = {
    "finetune": "synthetic, then real",
    "mixed": "real and synthetic mixed",
    "real": "real only, equal total steps",
    "real_short": "real only, equal fine-tuning steps",
}
WITH_SYNTHETIC, CONTROLS = ("finetune", "mixed"), ("real", "real_short")
RECIPES = ("synthetic", *ARMS)  # what has a learning rate of its own


@dataclass(frozen=True)
class Job:
    """One training. ``domain`` gives its ``shots`` real images (both None: synthetic images
    alone), ``after`` is the training that it goes on from. ``draw``: the synthetic set that it
    or ``after`` sees, None for none."""

    recipe: str
    seed: int
    steps: int
    learning_rate: float
    domain: str | None = None
    shots: int | str | None = None
    after: "Job | None" = None
    draw: str | None = None

    @property
    def total_steps(self) -> int:
        return self.steps + (self.after.total_steps if self.after else 0)


def _whole(value, least: int) -> bool:
    return type(value) is int and value >= least


@dataclass(frozen=True)
class Plan:
    """What a study trains. ValueError for a plan that cannot be.

    ``shots``: numbers of real images, 0 (synthetic images alone) and ``all`` included; ``domains``:
    {name: images in its training split}; ``synthetic_steps`` of pre-training, ``finetune_steps``
    after it; ``own_rates``: {recipe: learning rate of its experiment}; ``learning_rates``: {recipe:
    candidates, or None for its own}; ``choose``: the {shots, seed} at which the candidates are
    compared; ``judged_on``: the images, never test images, on which they are, or None if there are
    none. ``draws``: the synthetic sets, crossed with the seeds; candidates see the first.

    ``choose`` may name several: ``shots`` a list, or ``each`` for all of the study's, gives each of
    them a rate of its own (:func:`rate_at`); over a list of ``seed`` candidates are averaged.

    ``lists``: {domain: "shapes/train", whose images its shots are}; ``judges``: the label sets of
    ``judged_on`` that no training learns (:mod:`dd.evaluation.supervision`).
    """

    shots: list
    seeds: list
    domains: dict[str, int]
    arms: list
    synthetic_steps: int
    finetune_steps: int
    own_rates: dict[str, float]
    learning_rates: dict[str, list | None]
    choose: dict
    judged_on: str | None
    draws: list[str]
    lists: dict[str, str] = field(default_factory=dict)
    judges: list[dict] = field(default_factory=list)

    def __post_init__(self):
        for name, good in (
            ("shots", lambda k: k == "all" or _whole(k, 0)),
            ("seeds", lambda s: _whole(s, 0)),
            ("arms", ARMS.__contains__),
        ):
            given = getattr(self, name)
            if (
                not isinstance(given, list)
                or not given
                or not all(map(good, given))
                or len(set(given)) < len(given)
            ):
                what = {
                    "shots": "numbers of images, such as [0, 16, all]",
                    "seeds": "whole numbers",
                    "arms": ", ".join(ARMS),
                }
                raise ValueError(
                    f"budget.{name}={given!r}: expected a list, without repetition, of {what[name]}"
                )
        if 0 in self.shots and not set(WITH_SYNTHETIC) & set(self.arms):
            raise ValueError(
                "study.shots holds 0, synthetic images alone, and no arm has any; add finetune "
                "or mixed"
            )
        if not self.domains:
            raise ValueError("study.domains is empty: name the data whose images are labelled")
        draws = self.draws
        if not isinstance(draws, list) or not draws or len(set(draws)) < len(draws):
            raise ValueError(
                f"study.synthetic={draws!r}: expected a list of different synthetic sets, "
                "or null for the one of synthetic=..."
            )
        places, seeds = self.choice_shots(), self.choice_seeds()
        fit = [k == "all" or _whole(k, 1) for k in places] + [_whole(s, 0) for s in seeds]
        repeated = any(len(set(found)) < len(found) for found in (places, seeds))
        if not places or not seeds or not all(fit) or repeated:
            raise ValueError(
                f"study.choose={self.choose!r}: expected shots (1 or more, or all; a list of "
                "them, or each) and seed (or a list of them), without repetition"
            )
        for name, size in self.domains.items():
            for k in (*self.shots, *places):
                if k != "all" and k > size:
                    raise ValueError(
                        f"budget: {k} shots, but the training split of {name} holds {size} "
                        "images; use all"
                    )
            if {size, "all"} <= set(self.shots):
                raise ValueError(
                    f"study.shots: {size} and all are the same images of {name}; give one of them"
                )
        for recipe, rates in self.learning_rates.items():
            fine = rates is None or (
                isinstance(rates, list) and rates and len(set(rates)) == len(rates)
            )
            if (
                recipe not in RECIPES
                or not fine
                or not all(type(r) in (int, float) and 0 < r < math.inf for r in rates or ())
            ):
                raise ValueError(
                    f"study.learning_rates.{recipe}={rates!r}: expected a list of different "
                    "numbers above 0, or null for the "
                    f"experiment's own; recipes: {', '.join(RECIPES)}"
                )

    def images(self, shots, domain: str) -> int:
        return self.domains[domain] if shots == "all" else shots

    def recipes(self) -> list[str]:
        """Recipes that the arms need, in an order in which their learning rates can be chosen."""
        return [
            r
            for r in RECIPES
            if r in self.arms or (r == "synthetic" and set(WITH_SYNTHETIC) & set(self.arms))
        ]

    def candidates(self, recipe: str) -> list[float]:
        """Learning rates to compare; its own alone if there is nothing to judge them on."""
        rates = self.learning_rates.get(recipe) or [self.own_rates[recipe]]
        return rates if len(rates) == 1 or self.judged_on else [self.own_rates[recipe]]

    def choice_shots(self) -> list:
        return choice_shots(self.choose, self.shots)

    @property
    def choices(self) -> dict[str, list[dict]]:
        """{recipe: the label sets that its learning rate is chosen on}, of the recipes with several
        candidates: what judges them, and the real images that they learn."""
        several = [r for r in self.recipes() if len(self.candidates(r)) > 1]
        domain, seeds = next(iter(self.domains)), self.choice_seeds()
        learnt = merged(
            *(self.drawn(k, domain, seed) for k in self.choice_shots() for seed in seeds)
        )
        return {r: merged(() if r == "synthetic" else learnt, self.judges) for r in several}

    def drawn(self, shots, domain: str, seed: int | None = None) -> list[dict]:
        """The label sets that ``shots`` images of a domain are, in the draw of ``seed``; None: that
        of the first seed at which rates are chosen."""
        images, name = self.images(shots, domain), self.lists.get(domain, f"{domain}/train")
        seed = self.choice_seeds()[0] if seed is None else seed
        whole = images == self.domains[domain]
        return [label_set(name, images, None if whole else seed)] if images else []

    def choice_seeds(self) -> list[int]:
        seeds = self.choose.get("seed")
        return seeds if isinstance(seeds, list) else [seeds]

    def pretraining(self, seed: int, rates: dict, draw: str | None = None) -> Job:
        rate = rate_at(rates["synthetic"], None)
        return Job("synthetic", seed, self.synthetic_steps, rate, draw=draw or self.draws[0])

    def job(self, arm: str, domain: str, shots, seed: int, rates: dict, draw=None) -> Job | None:
        """The training behind one point of a curve; None for a control without images, or an arm
        without a rate as yet.

        All arms take ``synthetic_steps + finetune_steps`` in total, but for the control of equal
        fine-tuning steps. ``rates``: {recipe: see :func:`rate_at`}; ``draw``: one of ``draws``,
        None for the first.
        """
        total, draw = self.synthetic_steps + self.finetune_steps, draw or self.draws[0]
        recipe = "synthetic" if shots == 0 else arm
        needed = {recipe, "synthetic"} if arm == "finetune" else {recipe}
        if (shots == 0 and arm in CONTROLS) or not needed <= rates.keys():
            return None
        rate = rate_at(rates[recipe], None if shots == 0 else shots)
        if rate is None:
            return None
        if shots == 0:
            return Job(recipe, seed, total, rate, draw=draw)
        if arm == "finetune":
            before = self.pretraining(seed, rates, draw)
            return Job(arm, seed, self.finetune_steps, rate, domain, shots, before, draw)
        steps = self.finetune_steps if arm == "real_short" else total
        return Job(arm, seed, steps, rate, domain, shots, draw=None if arm in CONTROLS else draw)

    def candidate(self, recipe: str, rate: float, rates: dict, shots, seed: int) -> Job | None:
        """The training that stands for a rate of a recipe, on the first domain and draw."""
        rates = {**rates, recipe: rate}
        if recipe == "synthetic":
            return self.pretraining(seed, rates)
        return self.job(recipe, next(iter(self.domains)), shots, seed, rates)


def choice_shots(choose: dict, shots: list) -> list:
    """Numbers of images at which the candidates of an arm are compared."""
    at = choose.get("shots")
    if at == "each":
        return [k for k in shots if k != 0]
    return at if isinstance(at, list) else [at]


def rate_at(rates: float | dict, shots) -> float | None:
    """The learning rate at ``shots`` images, of one rate for all or of {shots: rate}.

    Shots without a choice of their own take that of the nearest fewer that have one, below all of
    them that of the fewest. None where that choice is still to be made.
    """
    if not isinstance(rates, dict):
        return rates
    order = lambda k: math.inf if k == "all" else k  # noqa: E731
    fewer = [k for k in rates if order(k) <= order(shots)]
    return rates[max(fewer, key=order) if fewer else min(rates, key=order)]


def edge(chosen: float, candidates: list[float]) -> dict | None:
    """{"end": lowest or highest, "add": the next candidate there} for a choice at the edge of its
    grid, beyond which a better one may lie. None inside the grid and for a single candidate."""
    grid = sorted(candidates)
    if len(grid) < 2 or chosen not in (grid[0], grid[-1]):
        return None
    end, first, second = ("lowest", *grid[:2]) if chosen == grid[0] else ("highest", *grid[:-3:-1])
    return {"end": end, "add": float(f"{first * first / second:.2g}")}


@dataclass(frozen=True)
class Prices:
    """``minutes_per_image``: annotation; ``per_hour``: of an annotator; ``per_gpu_hour``: of the
    machine that computes."""

    minutes_per_image: float = 10.0
    per_hour: float = 20.0
    per_gpu_hour: float = 2.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (isinstance(value, int | float) and value >= 0 and math.isfinite(value)):
                raise ValueError(f"prices: {name}={value!r}; a number of 0 or more is needed")


def cost(images: int, gpu_seconds: float, prices: Prices) -> dict[str, float]:
    """What ``images`` labelled by hand and ``gpu_seconds`` of computing cost: labelling,
    computing, total."""
    labelling = images * prices.minutes_per_image / 60 * prices.per_hour
    computing = gpu_seconds / 3600 * prices.per_gpu_hour
    return {"labelling": labelling, "computing": computing, "total": labelling + computing}


def bought(plan: Plan, chosen: list[dict], shots, domain: str) -> int:
    """Labels that a point of a curve is paid for: those of its images, and those that its settings
    were ``chosen`` on, each once. The images are taken from the draw that chose: it costs least."""
    return distinct([*chosen, *plan.drawn(shots, domain)])


def check_targets(targets) -> None:
    """ValueError for targets that are no list of numbers; None is allowed."""
    if targets is not None and not (
        isinstance(targets, list) and all(type(t) in (int, float) for t in targets)
    ):
        raise ValueError(f"study.targets={targets!r}: expected a list of mIoUs in percent, or null")
