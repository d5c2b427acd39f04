"""The plan of a label-budget study, and prices. Its results:
:mod:`dd.evaluation.budget_results`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, MinLen
from pydantic import AfterValidator, model_validator

from dd.evaluation.supervision import LabelSet, distinct, label_set, merged, told
from dd.store.settings import Hint, Settings

ARMS = {
    "finetune": "synthetic, then real",
    "mixed": "real and synthetic mixed",
    "real": "real only, equal total steps",
    "real_short": "real only, equal fine-tuning steps",
}
WITH_SYNTHETIC, CONTROLS = ("finetune", "mixed"), ("real", "real_short")
RECIPES = ("synthetic", *ARMS)  # trainings with a learning rate of their own

Shots = int | str  # a number of real images, or "all"
Rates = Mapping[str, Any]  # {recipe: see rate_at}
Whole = Annotated[int, Ge(0)]
Price = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class Job:
    """One training. ``domain`` gives its ``shots`` real images (both None: synthetic images alone);
    ``after`` is the training that it starts from. ``draw``: the synthetic set that it or ``after``
    sees, None for none."""

    recipe: str
    seed: int
    steps: int
    learning_rate: float
    domain: str | None = None
    shots: Shots | None = None
    after: "Job | None" = None
    draw: str | None = None

    @property
    def total_steps(self) -> int:
        return self.steps + (self.after.total_steps if self.after else 0)


def _once(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"{values!r}: expected a list without repetition")
    return values


class Plan(Settings):
    """What a study trains. ValueError for an impossible plan.

    ``shots``: numbers of real images, including 0 (synthetic images alone) and ``all``;
    ``domains``: {name: images in its training split}; ``synthetic_steps`` of pre-training;
    ``finetune_steps`` after it; ``own_rates``: {recipe: learning rate of its experiment};
    ``learning_rates``: {recipe: candidates, or None for its own}; ``choose``: the {shots, seed} at
    which the candidates are compared; ``judged_on``: the images (never test images) on which they
    are compared, or None if there are none. ``draws``: the synthetic sets, crossed with the seeds;
    candidates see the first.

    ``choose`` may name several: ``shots`` as a list, or ``each`` for all of the study's, gives each
    number its own rate (:func:`rate_at`); over a list of ``seed`` candidates are averaged.

    ``lists``: {domain: "shapes/train"}, the list that its shots are drawn from; ``judges``: the
    label sets of ``judged_on`` that no training sees (:mod:`dd.evaluation.supervision`).
    """

    noun: ClassVar[str] = "study"
    shots: Annotated[
        list[Whole | Literal["all"]], MinLen(1), AfterValidator(_once), Hint("such as [0, 16, all]")
    ]
    seeds: Annotated[list[Whole], MinLen(1), AfterValidator(_once)]
    domains: Annotated[dict[str, int], MinLen(1), Hint("the data whose images are labelled")]
    arms: Annotated[
        list[Literal["finetune", "mixed", "real", "real_short"]], MinLen(1), AfterValidator(_once)
    ]
    synthetic_steps: int
    finetune_steps: int
    own_rates: dict[str, float]
    learning_rates: dict[str, Any]
    choose: dict[str, Any]
    judged_on: str | None
    draws: list[str]
    lists: dict[str, str] = {}
    judges: list[LabelSet] = []

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 in self.shots and not set(WITH_SYNTHETIC) & set(self.arms):
            raise ValueError(
                "study.shots includes 0, synthetic images alone, but no arm has synthetic images; "
                "add finetune or mixed"
            )
        if not self.draws or len(set(self.draws)) < len(self.draws):
            raise ValueError(
                f"study.synthetic={self.draws!r}: expected a list of different synthetic sets, "
                "or null for the one of synthetic=..."
            )
        self._check_choice()
        for name, size in self.domains.items():
            self._check_sizes(name, size)
        for recipe, rates in self.learning_rates.items():
            _check_rates(recipe, rates)
        return self

    def _check_choice(self) -> None:
        places, seeds = self.choice_shots(), self.choice_seeds()
        fit = [k == "all" or _whole(k, 1) for k in places] + [_whole(s, 0) for s in seeds]
        repeated = any(len(set(found)) < len(found) for found in (places, seeds))
        if not places or not seeds or not all(fit) or repeated:
            raise ValueError(
                f"study.choose={self.choose!r}: expected shots (1 or more, or all; a list of "
                "them, or each) and seed (or a list of them), without repetition"
            )

    def _check_sizes(self, name: str, size: int) -> None:
        for k in (*self.shots, *self.choice_shots()):
            if k != "all" and k > size:
                raise ValueError(
                    f"budget: {k} shots, but the training split of {name} holds {size} images; "
                    "use all"
                )
        if {size, "all"} <= set(self.shots):
            raise ValueError(
                f"study.shots: {size} and all are the same images of {name}; give one of them"
            )

    def images(self, shots: Shots, domain: str) -> int:
        return self.domains[domain] if isinstance(shots, str) else shots

    def recipes(self) -> list[str]:
        """Recipes that the arms need, in an order in which their learning rates can be chosen."""
        started = {"synthetic"} if set(WITH_SYNTHETIC) & set(self.arms) else set()
        return [r for r in RECIPES if r in started | set(self.arms)]

    def candidates(self, recipe: str) -> list[float]:
        """Learning rates to compare; only its own if there is nothing to compare them on."""
        rates = self.learning_rates.get(recipe) or [self.own_rates[recipe]]
        return rates if len(rates) == 1 or self.judged_on else [self.own_rates[recipe]]

    def choice_shots(self) -> list[Any]:
        return choice_shots(self.choose, self.shots)

    @property
    def choices(self) -> dict[str, list[LabelSet]]:
        """{recipe: the label sets that its learning rate is chosen on}, for recipes with several
        candidates: the images that judge them, and the real images that they are trained on."""
        several = [r for r in self.recipes() if len(self.candidates(r)) > 1]
        domain, seeds = next(iter(self.domains)), self.choice_seeds()
        learnt = merged(
            *(self.drawn(k, domain, seed) for k in self.choice_shots() for seed in seeds)
        )
        return {r: merged(() if r == "synthetic" else learnt, self.judges) for r in several}

    def drawn(self, shots: Shots, domain: str, seed: int | None = None) -> list[LabelSet]:
        """The label sets of ``shots`` images of a domain, drawn by ``seed``; None: by the first
        seed at which rates are chosen."""
        images, name = self.images(shots, domain), self.lists.get(domain, f"{domain}/train")
        seed = self.choice_seeds()[0] if seed is None else seed
        whole = images == self.domains[domain]
        return [label_set(name, images, None if whole else seed)] if images else []

    def choice_seeds(self) -> list[Any]:
        seeds = self.choose.get("seed")
        return seeds if isinstance(seeds, list) else [seeds]

    def pretraining(self, seed: int, rates: Rates, draw: str | None = None) -> Job:
        rate, draw = rates["synthetic"], draw or self.draws[0]
        return Job("synthetic", seed, self.synthetic_steps, rate, draw=draw)

    def job(
        self,
        arm: str,
        domain: str,
        shots: Shots,
        seed: int,
        rates: Rates,
        draw: str | None = None,
    ) -> Job | None:
        """The training behind one point of a curve. None for a control without images, or an arm
        whose rate is not chosen yet.

        All arms take ``synthetic_steps + finetune_steps`` in total, except the control of equal
        fine-tuning steps. ``rates``: {recipe: see :func:`rate_at`}; ``draw``: one of ``draws``,
        None for the first.
        """
        total, draw = self.synthetic_steps + self.finetune_steps, draw or self.draws[0]
        recipe = "synthetic" if shots == 0 else arm
        needed = {recipe, "synthetic"} if arm == "finetune" else {recipe}
        if (shots == 0 and arm in CONTROLS) or not needed <= rates.keys():
            return None
        rate = rate_at(rates[recipe], shots)
        if rate is None:
            return None
        if shots == 0:
            return Job(recipe, seed, total, rate, draw=draw)
        if arm == "finetune":
            before = self.pretraining(seed, rates, draw)
            return Job(arm, seed, self.finetune_steps, rate, domain, shots, before, draw)
        steps = self.finetune_steps if arm == "real_short" else total
        return Job(arm, seed, steps, rate, domain, shots, draw=None if arm in CONTROLS else draw)

    def candidate(
        self, recipe: str, rate: float, rates: Rates, shots: Shots | None, seed: int
    ) -> Job | None:
        """The training that tests a rate of a recipe, on the first domain and draw."""
        rates = {**rates, recipe: rate}
        if recipe == "synthetic" or shots is None:
            return self.pretraining(seed, rates)
        return self.job(recipe, next(iter(self.domains)), shots, seed, rates)


def _whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _check_rates(recipe: str, rates: object) -> None:
    several: list[Any] = [] if rates is None else rates if isinstance(rates, list) else [None]
    good = all(type(r) in (int, float) and 0 < r < math.inf for r in several)
    if recipe not in RECIPES or rates == [] or not good or len(set(several)) < len(several):
        raise ValueError(
            f"study.learning_rates.{recipe}={rates!r}: expected a list of different numbers "
            f"above 0, or null for the experiment's own; recipes: {', '.join(RECIPES)}"
        )


def choice_shots(choose: Mapping[str, Any], shots: list[Any]) -> list[Any]:
    """Numbers of images at which the candidates of an arm are compared."""
    at = choose.get("shots")
    if at == "each":
        return [k for k in shots if k != 0]
    return at if isinstance(at, list) else [at]


def rate_at(rates: float | dict[Any, float | None], shots: Shots) -> float | None:
    """The learning rate at ``shots`` images, from one rate for all or {shots: rate}.

    Shots without a choice of their own take that of the nearest smaller number that has one; below
    all of them, that of the smallest. None if that choice is still to be made.
    """
    if not isinstance(rates, dict):
        return rates
    order = {k: math.inf if k == "all" else k for k in (*rates, shots)}
    fewer = [k for k in rates if order[k] <= order[shots]]
    return rates[max(fewer, key=order.__getitem__) if fewer else min(rates, key=order.__getitem__)]


def edge(chosen: float, candidates: list[float]) -> dict[str, Any] | None:
    """{"end": lowest or highest, "add": the next candidate there} for a choice at the edge of its
    grid, beyond which a better one may lie. None inside the grid and for a single candidate."""
    grid = sorted(candidates)
    if len(grid) < 2 or chosen not in (grid[0], grid[-1]):
        return None
    first, second = grid[:2] if chosen == grid[0] else grid[:-3:-1]
    return {
        "end": "lowest" if first < second else "highest",
        "add": float(f"{first * first / second:.2g}"),
    }


class Prices(Settings):
    """``minutes_per_image``: to annotate it; ``per_hour``: of an annotator; ``per_gpu_hour``: of
    the computing machine."""

    noun: ClassVar[str] = "study.prices"
    minutes_per_image: Price = 10.0
    per_hour: Price = 20.0
    per_gpu_hour: Price = 2.0


def cost(images: int, gpu_seconds: float, prices: Prices) -> dict[str, float]:
    """What ``images`` labelled by hand and ``gpu_seconds`` of computing cost: labelling, computing,
    total."""
    labelling = images * prices.minutes_per_image / 60 * prices.per_hour
    computing = gpu_seconds / 3600 * prices.per_gpu_hour
    return {"labelling": labelling, "computing": computing, "total": labelling + computing}


def bought(plan: Plan, chosen: list[LabelSet], shots: Shots, domain: str) -> int:
    """Labels that a point of a curve pays for: those of its images, and those that its settings
    were ``chosen`` on, each once. The images come from the draw used for the choice, which costs
    least."""
    number = distinct([*chosen, *plan.drawn(shots, domain)])
    if number is None:
        raise ValueError(f"{told(chosen)}: their cost needs a number of labels")
    return number


def check_targets(targets: object) -> None:
    """ValueError unless targets are a list of numbers, or None."""
    if targets is not None and not (
        isinstance(targets, list) and all(type(t) in (int, float) for t in targets)
    ):
        raise ValueError(f"study.targets={targets!r}: expected a list of mIoUs in percent, or null")
