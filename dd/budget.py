"""The plan of a label-budget study; how much labelling can be skipped, and what a target costs: pure functions.

A curve is ``{k: mIoU in percent}`` with k real labelled images; a confusion array is int [N, C, C] (image, true, predicted).
"""

import math
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, stdev

import numpy as np

from dd.supervision import distinct, label_set, merged

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
    """One training. ``domain`` gives its ``shots`` real images (both None: synthetic images alone), ``after`` is the training
    that it goes on from."""

    recipe: str
    seed: int
    steps: int
    learning_rate: float
    domain: str | None = None
    shots: int | str | None = None
    after: "Job | None" = None

    @property
    def total_steps(self) -> int:
        return self.steps + (self.after.total_steps if self.after else 0)


def _whole(value, least: int) -> bool:
    return type(value) is int and value >= least


@dataclass(frozen=True)
class Plan:
    """What a study trains. ValueError for a plan that cannot be.

    ``shots``: numbers of real images, 0 (synthetic images alone) and ``all`` included; ``domains``: {name: images in its
    training split}; ``synthetic_steps`` of pre-training, ``finetune_steps`` after it; ``own_rates``: {recipe: learning rate of
    its experiment}; ``learning_rates``: {recipe: candidates, or None for its own}; ``choose``: the {shots, seed} at which the
    candidates are compared; ``judged_on``: the images, never test images, on which they are, or None if there are none.
    ``lists``: {domain: "shapes/train", whose images its shots are}; ``judges``: the label sets of
    ``judged_on`` that no training learns (:mod:`dd.supervision`).
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
    lists: dict[str, str] = field(default_factory=dict)
    judges: list[dict] = field(default_factory=list)

    def __post_init__(self):
        for name, good in (
            ("shots", lambda k: k == "all" or _whole(k, 0)), ("seeds", lambda s: _whole(s, 0)), ("arms", ARMS.__contains__)
        ):  # fmt: skip
            given = getattr(self, name)
            if not isinstance(given, list) or not given or not all(map(good, given)) or len(set(given)) < len(given):
                what = {"shots": "numbers of images, such as [0, 16, all]", "seeds": "whole numbers", "arms": ", ".join(ARMS)}
                raise ValueError(f"budget.{name}={given!r}: expected a list, without repetition, of {what[name]}")
        if 0 in self.shots and not set(WITH_SYNTHETIC) & set(self.arms):
            raise ValueError("budget.shots holds 0, synthetic images alone, and no arm has any; add finetune or mixed")
        if not self.domains:
            raise ValueError("budget.domains is empty: name the data whose images are labelled")
        at = self.choose.get("shots")
        if not (at == "all" or _whole(at, 1)) or not _whole(self.choose.get("seed"), 0):
            raise ValueError(f"budget.choose={self.choose!r}: expected shots (1 or more, or all) and seed")
        for name, size in self.domains.items():
            for k in (*self.shots, at):
                if k != "all" and k > size:
                    raise ValueError(f"budget: {k} shots, but the training split of {name} holds {size} images; use all")
            if {size, "all"} <= set(self.shots):
                raise ValueError(f"budget.shots: {size} and all are the same images of {name}; give one of them")
        for recipe, rates in self.learning_rates.items():
            fine = rates is None or (isinstance(rates, list) and rates and len(set(rates)) == len(rates))
            if recipe not in RECIPES or not fine or not all(type(r) in (int, float) and 0 < r < math.inf for r in rates or ()):
                raise ValueError(
                    f"budget.learning_rates.{recipe}={rates!r}: expected a list of different numbers above 0, or null for the "
                    f"experiment's own; recipes: {', '.join(RECIPES)}"
                )

    def images(self, shots, domain: str) -> int:
        return self.domains[domain] if shots == "all" else shots

    def recipes(self) -> list[str]:
        """Recipes that the arms need, in an order in which their learning rates can be chosen."""
        return [r for r in RECIPES if r in self.arms or (r == "synthetic" and set(WITH_SYNTHETIC) & set(self.arms))]

    def candidates(self, recipe: str) -> list[float]:
        """Learning rates to compare; its own alone if there is nothing to judge them on."""
        rates = self.learning_rates.get(recipe) or [self.own_rates[recipe]]
        return rates if len(rates) == 1 or self.judged_on else [self.own_rates[recipe]]

    @property
    def choices(self) -> dict[str, list[dict]]:
        """{recipe: the label sets that its learning rate is chosen on}, of the recipes with several
        candidates: what judges them, and the real images that they learn."""
        several = [r for r in self.recipes() if len(self.candidates(r)) > 1]
        learnt = self.drawn(self.choose["shots"], next(iter(self.domains)))
        return {r: merged(() if r == "synthetic" else learnt, self.judges) for r in several}

    def drawn(self, shots, domain: str) -> list[dict]:
        """The label sets that ``shots`` images of a domain are, in the draw that rates are chosen
        at."""
        images, name = self.images(shots, domain), self.lists.get(domain, f"{domain}/train")
        seed = None if images == self.domains[domain] else self.choose["seed"]
        return [label_set(name, images, seed)] if images else []

    def pretraining(self, seed: int, rates: dict) -> Job:
        return Job("synthetic", seed, self.synthetic_steps, rates["synthetic"])

    def job(self, arm: str, domain: str, shots, seed: int, rates: dict) -> Job | None:
        """The training behind one point of a curve; None for a control without images, or an arm without a rate as yet.

        All arms take ``synthetic_steps + finetune_steps`` in total, but for the control of equal fine-tuning steps.
        """
        total = self.synthetic_steps + self.finetune_steps
        needed = {"synthetic"} if shots == 0 else {arm, "synthetic"} if arm == "finetune" else {arm}
        if (shots == 0 and arm in CONTROLS) or not needed <= rates.keys():
            return None
        if shots == 0:
            return Job("synthetic", seed, total, rates["synthetic"])
        if arm == "finetune":
            return Job(arm, seed, self.finetune_steps, rates[arm], domain, shots, self.pretraining(seed, rates))
        return Job(arm, seed, self.finetune_steps if arm == "real_short" else total, rates[arm], domain, shots)

    def candidate(self, recipe: str, rate: float, rates: dict) -> Job | None:
        """The training that stands for a learning rate of a recipe, on the first domain."""
        at, rates = self.choose, {**rates, recipe: rate}
        if recipe == "synthetic":
            return self.pretraining(at["seed"], rates)
        return self.job(recipe, next(iter(self.domains)), at["shots"], at["seed"], rates)


def _miou(confusion: np.ndarray) -> np.ndarray:
    """mIoU in percent of confusion matrices [..., C, C], over the classes that occur in each."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    union = confusion.sum(-1) + confusion.sum(-2) - hit
    share = np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)
    return 100 * np.nanmean(share, axis=-1)


def bootstrap(per_image: np.ndarray, other: np.ndarray | None = None, draws: int = 1000, level: float = 0.95, seed: int = 0):
    """(low, high) of the mIoU, or of its difference to ``other`` (``per_image`` minus ``other``, same images in both).

    Percentile bootstrap over images: each draw takes N images with replacement and scores the sum of their matrices.
    ValueError for no image, or for two runs of another number of images or classes.
    """
    if per_image.ndim != 3 or not len(per_image) or per_image.shape[1] != per_image.shape[2]:
        raise ValueError(f"bootstrap: confusions int [N, C, C] of at least one image, got {list(per_image.shape)}")
    if other is not None and other.shape != per_image.shape:
        raise ValueError(
            f"bootstrap: the two runs were scored on {list(per_image.shape)} and {list(other.shape)} (images, classes, "
            "classes); only runs on the same images and classes can be compared"
        )
    n, c = len(per_image), per_image.shape[1]
    rng, scores = np.random.default_rng([seed, 4]), []
    flat = [a.reshape(n, -1).astype(np.float64) for a in (per_image, other) if a is not None]
    for start in range(0, draws, 100):  # weights of 100 draws at a time: a matrix product instead of a gather
        size = min(100, draws - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        drawn = [_miou((weights @ a).reshape(size, c, c)) for a in flat]
        scores.append(drawn[0] - drawn[1] if len(drawn) == 2 else drawn[0])
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(scores), [tail, 100 - tail])
    return float(low), float(high)


def images_for(curve: dict[int, float], target: float) -> float | None:
    """Number of labelled images at which ``curve`` first reaches ``target``, linear in log(k) between measured points.

    The smallest measured k if it is reached there already; None if no measured k reaches it. k = 0 is joined linearly.
    """
    points = sorted(curve.items())
    if not points:
        raise ValueError("images_for: the curve is empty")
    if points[0][1] >= target:
        return float(points[0][0])
    for (k0, m0), (k1, m1) in zip(points, points[1:], strict=False):
        if m1 >= target:
            share = (target - m0) / (m1 - m0)
            return k0 + share * (k1 - k0) if k0 == 0 else math.exp(math.log(k0) + share * (math.log(k1) - math.log(k0)))
    return None


def images_skipped(with_synthetic: dict[int, float], real_only: dict[int, float]) -> dict[int, dict]:
    """For each k of ``with_synthetic``: ``needed``, the real images that the control needs for the same mIoU, and ``skipped``,
    needed - k (negative: the synthetic start costs images). Both None if no measured control gets there; ``at_least`` is
    then what is skipped for sure."""
    largest, found = max(real_only), {}
    for k, miou in sorted(with_synthetic.items()):
        needed = images_for(real_only, miou)
        found[k] = {"needed": needed, "skipped": None if needed is None else needed - k}
        if needed is None:
            found[k]["at_least"] = largest - k
    return found


@dataclass(frozen=True)
class Prices:
    """``minutes_per_image``: annotation; ``per_hour``: of an annotator; ``per_gpu_hour``: of the machine that computes."""

    minutes_per_image: float = 10.0
    per_hour: float = 20.0
    per_gpu_hour: float = 2.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (isinstance(value, int | float) and value >= 0 and math.isfinite(value)):
                raise ValueError(f"prices: {name}={value!r}; a number of 0 or more is needed")


def cost(images: int, gpu_seconds: float, prices: Prices) -> dict[str, float]:
    """What ``images`` labelled by hand and ``gpu_seconds`` of computing cost: labelling, computing, total."""
    labelling = images * prices.minutes_per_image / 60 * prices.per_hour
    computing = gpu_seconds / 3600 * prices.per_gpu_hour
    return {"labelling": labelling, "computing": computing, "total": labelling + computing}


# ------------------------------------------------------------------------------------------------------- results of a study


def curve(values: dict[str, dict[str, list]], domain: str, size: int) -> dict[int, list]:
    """{images: values of the seeds} of one arm on one domain, from ``{shots: {domain: [value or None per seed]}}``."""
    found = {size if k == "all" else int(k): at.get(domain, []) for k, at in values.items()}
    return {k: found[k] for k in sorted(found) if found[k]}


def means(values, domain: str, size: int) -> dict[int, float]:
    """:func:`curve` averaged over seeds, only where no seed is missing: points of other seeds are not comparable."""
    return {k: mean(v) for k, v in curve(values, domain, size).items() if None not in v}


def curves(arms: dict, domains: dict[str, int]) -> list[dict]:
    """Each arm on each domain, ready to be drawn: k, mean, sd (null for one seed) and number of seeds of each point."""
    found = []
    for arm, values in arms.items():
        for domain, size in domains.items():
            points = {k: [x for x in v if x is not None] for k, v in curve(values, domain, size).items()}
            points = {k: v for k, v in points.items() if v}
            sd = [stdev(v) if len(v) > 1 else None for v in points.values()]
            found.append({"arm": arm, "label": ARMS[arm], "domain": domain, "k": list(points),
                          "mean": list(map(mean, points.values())),
                          "sd": sd, "seeds": list(map(len, points.values()))})  # fmt: skip
    return found


def skipped(arms: dict, domains: dict[str, int]) -> dict:
    """{arm with synthetic images: {control: {domain: :func:`images_skipped`}}}, from means over seeds."""
    return {
        arm: {
            control: {
                domain: images_skipped(means(arms[arm], domain, size), means(arms[control], domain, size))
                for domain, size in domains.items()
                if means(arms[control], domain, size)
            }
            for control in CONTROLS
            if control in arms
        }
        for arm in WITH_SYNTHETIC
        if arm in arms
    }


def bought(plan: Plan, chosen: list[dict], shots, domain: str) -> int:
    """Labels that a point of a curve is paid for: those of its images, and those that its settings
    were ``chosen`` on, each once. The images are taken from the draw that chose: it costs least."""
    return distinct([*chosen, *plan.drawn(shots, domain)])


def target_cost(
    target: float, miou: dict[int, float], seconds: dict[int, float], prices: Prices, labels=None
) -> dict:  # fmt: skip
    """What ``target`` mIoU costs along one curve: images to label and their :func:`cost`, with the GPU seconds of the next
    measured point; ``images`` None and ``more_than`` (images) if no measured point reaches it.
    ``labels(images)``: how many labels are paid for, those that chose settings among them; None =
    the images alone."""
    images = images_for(miou, target)
    if images is None:
        return {"images": None, "more_than": max(miou)}
    whole = math.ceil(round(images, 6))
    spent = seconds[min(k for k in miou if k >= whole)]
    paid = whole if labels is None else labels(whole)
    return {"images": whole, "labels": paid, "gpu_seconds": spent, **cost(paid, spent, prices)}


def check_targets(targets) -> None:
    """ValueError for targets that are no list of numbers; None is allowed."""
    if targets is not None and not (isinstance(targets, list) and all(type(t) in (int, float) for t in targets)):
        raise ValueError(f"budget.targets={targets!r}: expected a list of mIoUs in percent, or null")


def target_costs(
    arms: dict, seconds: dict, domains: dict[str, int], prices: Prices, targets: list | None = None,
    labels=None,
) -> dict:  # fmt: skip
    """{domain: [{"target", "why", "arms": {arm: :func:`target_cost`}}]}. ``seconds`` has the form of ``arms``. Without
    ``targets``, what the first control reaches with each number of images (without one, the first
    arm). ``labels(arm, domain, images)``: labels that are paid for; None = the images alone."""
    found = {}
    for domain, size in domains.items():
        measured = {arm: means(values, domain, size) for arm, values in arms.items()}
        measured = {arm: points for arm, points in measured.items() if points}
        reference = next((arm for arm in (*CONTROLS, *measured) if arm in measured), None)
        wanted = [(t, "given") for t in targets or ()] or [
            (m, f"{ARMS[reference]}, {k} images") for k, m in (measured[reference].items() if reference else ())
        ]
        found[domain] = [
            {"target": t, "why": why, "arms": {
                arm: target_cost(
                    t, points, means(seconds[arm], domain, size), prices,
                    labels and partial(labels, arm, domain),
                )
                for arm, points in measured.items()
            }}
            for t, why in wanted
        ]  # fmt: skip
    return found
