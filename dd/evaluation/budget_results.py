"""Results of a label-budget study: curves, differences, images that can be skipped, prices.

mIoUs are in percent; k is the number of real labelled images. Everything is compared run by run,
for the same seed and draw (:mod:`dd.evaluation.statistics`).
"""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import mean, stdev
from typing import Any

import numpy as np

from dd.evaluation import savings
from dd.evaluation.budget import ARMS, CONTROLS, WITH_SYNTHETIC, Prices, cost
from dd.evaluation.savings import Bounds, Curve
from dd.evaluation.statistics import Interval, Score, holm, interval

# {number of real images, or "all": {domain: [value, or None, of each run]}}
ByShots = Mapping[str, Mapping[str, list[float | None]]]


def curve(values: ByShots, domain: str, size: int) -> dict[int, list[float | None]]:
    """{images: values of the runs} of one arm on a domain, whose ``all`` is ``size`` images."""
    found = {_images(k, size): at.get(domain, []) for k, at in values.items()}
    return {k: found[k] for k in sorted(found) if found[k]}


def _images(shots: str, size: int) -> int:
    return size if shots == "all" else int(shots)


def curves(arms: Mapping[str, ByShots], domains: dict[str, int]) -> list[dict[str, Any]]:
    """Each arm on each domain, ready for plotting: k; mean, sd (null for one run) and number of
    runs at each k."""
    found = []
    for arm, domain in product(arms, domains):
        whole = curve(arms[arm], domain, domains[domain]).items()
        points = {k: there for k, v in whole if (there := [x for x in v if x is not None])}
        head = {"arm": arm, "label": ARMS[arm], "domain": domain, "k": list(points)}
        sd = [stdev(v) if len(v) > 1 else None for v in points.values()]
        runs = list(map(len, points.values()))
        found.append({**head, "mean": list(map(mean, points.values())), "sd": sd, "runs": runs})
    return found


@dataclass(frozen=True)
class Measured:
    """The measurements of a study, and differences between them: paired over runs of the same seed
    and draw, and over test images.

    ``arms``: the mIoUs of each, runs seed by seed and within a seed draw by draw (controls have no
    draws). ``per_image(arm, shots, domain, run)``: the confusions of a run, int [N, C, C], or None
    if they were not stored.
    """

    arms: Mapping[str, ByShots]
    domains: dict[str, int]
    seeds: list[int]
    draws: list[str | None]
    per_image: Callable[[str, str, str, int], np.ndarray | None] = lambda *_: None
    _found: dict[tuple[Any, ...], Interval | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def keys(self, arm: str) -> list[Hashable]:
        """Names of the runs at each k: (seed, draw) for several draws, else the seed."""
        several = arm in WITH_SYNTHETIC and len(self.draws) > 1
        return list(product(self.seeds, self.draws)) if several else list(self.seeds)

    def points(self, arm: str, domain: str) -> list[int]:
        """Numbers of images with at least one run."""
        found = curve(self.arms[arm], domain, self.domains[domain])
        return [k for k, values in found.items() if any(v is not None for v in values)]

    def mious(self, arm: str, k: int, domain: str) -> dict[Hashable, float]:
        values = curve(self.arms[arm], domain, self.domains[domain])[k]
        pairs = zip(self.keys(arm), values, strict=True)
        return {key: value for key, value in pairs if value is not None}

    def curves_of(self, arm: str, domain: str) -> Mapping[Hashable, Curve]:
        """The curve of each run, without missing points."""
        found: dict[Hashable, dict[int, float]] = {key: {} for key in self.keys(arm)}
        for k in self.points(arm, domain):
            for key, miou in self.mious(arm, k, domain).items():
                found[key][k] = miou
        return found

    def means(self, arm: str, domain: str) -> dict[int, float]:
        """{k: mean over runs}, only where no run is missing."""
        found = {k: self.mious(arm, k, domain) for k in self.points(arm, domain)}
        return {k: mean(v.values()) for k, v in found.items() if len(v) == len(self.keys(arm))}

    def _scores(
        self, arm: str, k: int, domain: str, names: list[Hashable]
    ) -> dict[Hashable, Score]:
        """Scores by the ``names`` of other runs: a control is repeated for each draw of its
        seed."""
        shots = next(s for s in self.arms[arm] if _images(s, self.domains[domain]) == k)
        keys, runs = self.keys(arm), {}
        for key, miou in self.mious(arm, k, domain).items():
            runs[key] = Score(miou, self.per_image(arm, shots, domain, keys.index(key)))
        return {name: runs[own] for name in names if (own := partner(name, runs)) is not None}

    def difference(
        self, arm: str, k: int, other: str, other_k: int, domain: str
    ) -> Interval | None:
        """Interval of the mIoU of ``arm`` with k images minus that of ``other`` with ``other_k``;
        None if no runs can be paired."""
        what = (arm, k, other, other_k, domain)
        if what not in self._found:
            names = max(self.keys(arm), self.keys(other), key=len)
            one = self._scores(arm, k, domain, names)
            two = self._scores(other, other_k, domain, names)
            self._found[what] = interval(one, two) if one.keys() & two.keys() else None
        return self._found[what]

    def gain(self, arm: str, k: int, control: str, domain: str) -> Interval | None:
        """``arm`` with k images minus ``control`` with the smallest measured number >= k."""
        enough = [n for n in self.points(control, domain) if n >= k]
        return self.difference(arm, k, control, enough[0], domain) if enough else None


def partner(key: Hashable, runs: Mapping[Hashable, Any]) -> Hashable | None:
    """The run of ``runs`` that pairs with ``key``: itself, or that of its seed without a draw."""
    if key in runs:
        return key
    return key[0] if isinstance(key, tuple) and key[0] in runs else None


def skipped(found: Measured) -> dict[str, dict[str, Any]]:
    """{arm with synthetic images: {control: {domain: {k: entry}}}}, each run read off the curve of
    its own control (:func:`dd.evaluation.savings.images_skipped`)."""
    result: dict[str, dict[str, Any]] = {a: {} for a in WITH_SYNTHETIC if a in found.arms}
    for arm, control in product(result, (c for c in CONTROLS if c in found.arms)):
        result[arm][control] = {
            domain: {k: _skipped(found, arm, control, domain, k) for k in points}
            for domain in found.domains
            if found.points(control, domain) and (points := found.points(arm, domain))
        }
    return result


def _skipped(found: Measured, arm: str, control: str, domain: str, k: int) -> dict[str, Any]:
    mious, controls = found.mious(arm, k, domain), found.curves_of(control, domain)
    own = {key: controls[of] for key in mious if (of := partner(key, controls)) is not None}
    matched = k in found.points(control, domain)
    return savings.images_skipped(k, mious, own, found.gain(arm, k, control, domain), matched)


def differences(found: Measured) -> list[dict[str, Any]]:
    """The differences that a study reports, with p-values adjusted for all of them (Holm).

    On each domain: an arm with synthetic images minus the first available control, at each k (at
    k = 0 minus the control's smallest k); the same arm with k images minus itself with none; mixed
    minus fine-tuned.
    """
    control = next((c for c in CONTROLS if c in found.arms), "")
    arms = [a for a in WITH_SYNTHETIC if a in found.arms]
    asked = []
    for domain, arm in product(found.domains, arms):
        points = found.points(arm, domain)
        real = found.points(control, domain) if control else []
        tuned = found.points("finetune", domain) if "finetune" in arms else []
        if 0 in points and real and arm == arms[0]:  # without real images all arms are the same
            asked.append((arm, 0, control, real[0], domain))
        for k in (k for k in points if k > 0):
            asked += [(arm, k, control, k, domain)] * (k in real)
            asked += [(arm, k, arm, 0, domain)] * (0 in points)
            asked += [(arm, k, "finetune", k, domain)] * (arm == "mixed" and k in tuned)
    names = ("arm", "k", "against", "against_k", "domain")
    there = [(what, at) for what in asked if (at := found.difference(*what)) is not None]
    adjusted = holm({i: at.p for i, (_, at) in enumerate(there) if at.p is not None})
    rows = [{**dict(zip(names, what, strict=True)), **vars(at)} for what, at in there]
    return [{**row, "p_holm": adjusted.get(i)} for i, row in enumerate(rows)]


def target_cost(
    target: float,
    miou: Curve,
    seconds: Curve,
    prices: Prices,
    labels: Callable[[int], int] = int,
) -> dict[str, Bounds]:
    """What ``target`` mIoU costs along one curve: bounds of the ``images`` to train on (whole
    numbers), of the ``labels`` to pay for, and of the total ``price``.

    Computing is that of the next measured point (``seconds``: {k: GPU seconds}).
    ``labels(images)``: how many labels are paid for; by default those of the images alone.
    """
    reached = savings.images_for(miou, target)
    ends = [n if n is None else math.ceil(round(n, 6)) for n in (reached.low, reached.high)]

    def price(n: int) -> float:
        return cost(labels(n), seconds[min(k for k in miou if k >= n)], prices)["total"]

    each: dict[str, Callable[[int], float]] = {"images": int, "labels": labels, "price": price}
    return {what: Bounds(*(n if n is None else of(n) for n in ends)) for what, of in each.items()}


def target_costs(
    found: Measured,
    seconds: Mapping[str, ByShots],
    prices: Prices,
    targets: list[float] | None = None,
    labels: Callable[[str, str, int], int] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """{domain: [{"target", "why", "arms": {arm: {"images", "labels", "price"}}}]}, each as the
    bounds of all ``runs``, those of their ``median``, and their ``range``.

    ``seconds`` has the form of ``found.arms``. Default ``targets``: the mean mIoU of the first
    control at each number of images (without a control, of the first arm). ``labels(arm, domain,
    images)``: labels that are paid for; None: those of the images alone.
    """
    spent = Measured(seconds, found.domains, found.seeds, found.draws)
    rows: dict[str, list[dict[str, Any]]] = {}
    for domain in found.domains:
        measured = [arm for arm in found.arms if found.points(arm, domain)]
        reference = next((arm for arm in (*CONTROLS, *measured) if arm in measured), "")
        reached = found.means(reference, domain) if reference else {}
        wanted = [(t, "given") for t in targets or ()]
        wanted = wanted or [(m, f"{ARMS[reference]}, {k} images") for k, m in reached.items()]
        rows[domain] = [{"target": t, "why": why, "arms": {}} for t, why in wanted]
        for row, arm in product(rows[domain], measured):
            paid = partial(labels, arm, domain) if labels else int
            points, own = found.curves_of(arm, domain), spent.curves_of(arm, domain)
            costs = partial(target_cost, row["target"], prices=prices, labels=paid)
            runs = {key: costs(at, own[key]) for key, at in points.items() if at}
            row["arms"][arm] = {
                kind: savings.summary({key: at[kind] for key, at in runs.items()})
                for kind in ("images", "labels", "price")
            }
    return rows
