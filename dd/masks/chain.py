"""From heat to scores by a chain of small steps, a list in YAML:

    steps:
      - {propagate: power}
      - {normalise: min_max}
      - {refine: pamr, iterations: 10, dilations: [1, 2, 4, 8]}
      - {threshold: otsu}
      - {uncertain: margin, least: 0.1}

Each step is a function in the module of its place (:data:`STEPS`); its signature defines its
arguments. ``power``, ``fixed`` and ``band`` take ``masks.power``, ``masks.threshold`` and
``masks.band``. Shape letters: K classes of a sample, P powers, r side of the heat, h, w side at
which scores are refined, H, W image size; C: the classes and the background.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge

from dd.masks import (
    background,
    normalise,
    presence,
    propagate,
    refine,
    thresholds,
    uncertain,
    weigh,
)
from dd.masks.resize import resize
from dd.store.settings import check_kind, shown

Heat: TypeAlias = np.ndarray | torch.Tensor  # [K, P, r, r]
Values: TypeAlias = tuple[tuple[str, Any], ...]
Function: TypeAlias = Callable[..., Any]


def fixed(scores_Khw: torch.Tensor, threshold: float) -> torch.Tensor:
    """One threshold for all classes (Dataset Diffusion, section on mask generation)."""
    return torch.full((len(scores_Khw),), threshold, dtype=torch.float64)


def by_background(scores_Khw: torch.Tensor) -> torch.Tensor:
    """A class wins where its score reaches the background's."""
    return torch.zeros(len(scores_Khw), dtype=torch.float64)


# places in the order of a chain
STEPS: dict[str, dict[str, Function]] = {
    "weight": {"by_side": weigh.by_side},
    "presence": {"evidence": presence.by_evidence},
    "propagate": {
        "power": propagate.power,
        "walk": propagate.walk,
        "adaptive": propagate.adaptive,
    },
    "normalise": {
        "min_max": normalise.min_max,
        "elbo": normalise.elbo,
        "per_pixel": normalise.per_pixel,
        "softmax": normalise.softmax,
    },
    "background": {"inverse": background.inverse, "words": background.words},
    "refine": {"pamr": refine.pamr, "joint_bilateral": refine.joint_bilateral},
    "threshold": {
        "fixed": fixed,
        "background": by_background,
        "otsu": thresholds.otsu,
        "two_gaussians": thresholds.two_gaussians,
    },
    "uncertain": {
        "band": uncertain.band,
        "posterior": uncertain.posterior,
        "margin": uncertain.margin,
        "entropy": uncertain.entropy,
        "disagreement": uncertain.disagreement,
    },
}
ORDER = tuple(STEPS)
CHAINS = Path(__file__).with_name("chains.yaml")  # the chains to compare
ONCE = ("propagate", "normalise", "threshold")  # places with exactly one step
EDGES = ("band", "posterior")
# arguments that the chain supplies: tensors, and the settings of the paper's chain
TENSORS = {
    *("maps_Whw", "heats_GKPrr", "heat_KPrr", "maps_Khw", "scores_Khw", "scores_Chw", "scores_CHW"),
    *("scores_KHW", "others_KHW", "image_3hw", "sure_K", "evidence_K", "alone_K"),
}
OWN = {"power": "power", "fixed": "threshold", "band": "band"}  # {step: its mask setting}
WORDS = "background"  # the source that holds the background's words
# steps that read one number for each class, and the source that holds it
NUMBERS = {"evidence": presence.EVIDENCE, "elbo": presence.ALONE}
CELLS = 4  # scores are refined at this many pixels a side for each cell of the heat


@dataclass(frozen=True)
class Step:
    """``place`` in the chain, ``name`` of the function there, ``values`` of all its arguments in
    the order of its signature."""

    place: str
    name: str
    values: Values = ()

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.values)

    def plain(self) -> dict[str, Any]:
        """As in YAML."""
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in self.values}
        return {self.place: self.name, **lists}


def parse(steps: Sequence[Any]) -> tuple[Step, ...]:
    """The steps of a chain, given as in YAML or as :class:`Step`. ValueError names an unknown step
    or argument, a value that is not allowed, or a wrong order."""
    if isinstance(steps, str) or not isinstance(steps, Sequence) or not steps:
        raise ValueError(f"steps={shown(steps)}: expected a list of steps, as [{_example()}]")
    found = tuple(step if isinstance(step, Step) else _step(step) for step in steps)
    places = [step.place for step in found]
    if places != sorted(places, key=ORDER.index):
        raise ValueError(f"steps: {', '.join(places)}; their order is {', '.join(ORDER)}")
    for place in ONCE:
        if places.count(place) != 1:
            raise ValueError(
                f"steps: {places.count(place)} of {place}; a chain has one of "
                f"{', '.join(STEPS[place])}"
            )
    for place in ("weight", "presence", "background"):
        if places.count(place) > 1:
            raise ValueError(f"steps: more than one of {place}; a chain has one at most")
    if (Step("threshold", "background") in found) != ("background" in places):
        raise ValueError(
            "steps: {threshold: background} and a step of background need each other; one of them "
            "is missing"
        )
    if {"elbo", "words"} <= {step.name for step in found}:
        raise ValueError(
            "steps: {normalise: elbo} has no errors of {background: words}; take {normalise: "
            "min_max}, or {background: inverse}"
        )
    edges = [step.name for step in found if step.name in EDGES]
    if len(edges) > 1:
        raise ValueError(f"steps: {' and '.join(edges)}; a chain has one of them at most")
    if "posterior" in edges and Step("threshold", "two_gaussians") not in map(_named, found):
        raise ValueError(
            "steps: {uncertain: posterior} uses the two Gaussians; it needs {threshold: "
            "two_gaussians}"
        )
    return found


def _named(step: "Step") -> "Step":
    return Step(step.place, step.name)


def _example() -> str:
    return "{propagate: power}, {normalise: min_max}, {threshold: fixed}"


def _step(given: Any) -> Step:
    if not isinstance(given, Mapping) or not any(place in given for place in STEPS):
        raise ValueError(
            f"steps: {shown(given)} is not a step; a step is one of {', '.join(STEPS)} with the "
            f"name of a function and its arguments, as {_example()}"
        )
    place = next(place for place in STEPS if place in given)
    name = given[place]
    if not isinstance(name, str) or name not in STEPS[place]:
        raise ValueError(
            f"steps: {place}: {shown(name)}: no such step; allowed: {', '.join(STEPS[place])}"
        )
    takes = _arguments(place, name)
    values = []
    if unknown := [k for k in given if k != place and k not in takes]:
        allowed = ", ".join(takes) or "nothing"
        raise ValueError(f"steps: {place}: {name} takes no {unknown[0]}; allowed: {allowed}")
    for key, parameter in takes.items():
        value = given.get(key, parameter.default)
        if value is inspect.Parameter.empty:
            raise ValueError(f"steps: {place}: {name}: {key} is missing")
        value = list(value) if isinstance(value, tuple) else value
        if parameter.annotation is not inspect.Parameter.empty:
            check_kind(f"steps: {place}: {name}: {key}", value, parameter.annotation)
        values.append((key, tuple(value) if isinstance(value, list) else value))
    return Step(place, name, tuple(values))


def _arguments(place: str, name: str) -> dict[str, inspect.Parameter]:
    """The arguments that a step takes in YAML."""
    given = {*TENSORS, *([] if name not in OWN else ["power", "threshold", "width"])}
    signature = inspect.signature(STEPS[place][name]).parameters
    takes = {key: parameter for key, parameter in signature.items() if key not in given}
    kind = inspect.Parameter.KEYWORD_ONLY
    if place == "refine":
        count = Annotated[int, Ge(1)]
        takes["cells"] = inspect.Parameter("cells", kind, default=CELLS, annotation=count)
    if name == "disagreement":
        takes["other"] = inspect.Parameter("other", kind, default="after", annotation=str)
    return takes


@dataclass(frozen=True)
class Scored:
    """What a chain makes of heat. ``scores_KHW`` float32; ``background_HW``: score of the
    background, or None. ``edges``: the scores [K] from which a pixel surely has its strongest
    class, and from which it is not background (if there is a background score, it is subtracted
    first). ``open_HW``: pixels that are uncertain whatever their score, or None; ``nothing``: for
    each class, whether its map is flat."""

    scores_KHW: torch.Tensor
    background_HW: torch.Tensor | None
    edges: tuple[torch.Tensor, torch.Tensor]
    open_HW: torch.Tensor | None
    nothing: list[bool]


def sources(steps: Sequence[Step], source: str) -> list[str]:
    """The sources of heat that a chain reads, the main one first."""
    own, more = [source], []
    for step in steps:
        if step.place == "weight":
            own = [f"{source}@{side}" for side in step.arguments["sides"]]
        if step.name == "disagreement":
            more.append(step.arguments["other"])
        if step.name == "words":
            more.append(WORDS)
        if step.name in NUMBERS:
            more.append(NUMBERS[step.name])
    return [*own, *more]


def run(
    steps: Sequence[Step],
    heats: Mapping[str, Heat],
    own: Mapping[str, Any],
    size: tuple[int, int],
    image: np.ndarray | None = None,
) -> Scored:
    """Apply ``steps`` to the stored heat of one image, by source, and resize to its ``size``
    (H, W). ``own``: power, threshold, band and source of the mask settings; ``image``: uint8
    [H, W, 3], needed for refining."""
    names = sources(steps, own["source"])
    stored = {n: torch.from_numpy(np.asarray(heats[n]).astype(np.float64)) for n in names}
    heat = stored[names[0]]
    by_place = {place: [s for s in steps if s.place == place] for place in ORDER}

    def call(step: Step, *tensors: torch.Tensor, **given: Any) -> Any:
        return STEPS[step.place][step.name](*tensors, **given, **step.arguments)

    (spread,), (scaled,), (cut,) = (by_place[place] for place in ONCE)
    chosen = {"power": own["power"]} if spread.name == "power" else {}
    numbers = {n: stored[n].flatten() for n in NUMBERS.values() if n in stored}
    explained = [numbers[NUMBERS[scaled.name]]] if scaled.name in NUMBERS else []
    for step in by_place["weight"]:
        groups = [stored[n] for n in names[: len(step.arguments["sides"])]]
        heat = STEPS["weight"][step.name](groups, **step.arguments)
    for step in by_place["presence"]:  # the map of what is not there is flat, and shows nothing
        heat = heat * call(step, numbers[NUMBERS[step.name]])[:, None, None, None]
    maps = call(spread, heat, **chosen)
    nothing = normalise.flat(maps).tolist()
    scores = plain = call(scaled, maps, *explained).float()
    behind = by_place["background"]
    for step in behind:
        seen = scores
        if step.name == "words":
            seen = call(scaled, call(spread, stored[WORDS], **chosen)).float()
        scores = torch.cat([scores, call(step, seen)[None]])
    for step in by_place["refine"]:
        scores = _refined(step, scores, heat.shape[-1], image)
    classes = scores[: len(maps)]
    sure = call(cut, classes, **({"threshold": own["threshold"]} if cut.name == "fixed" else {}))
    known, open_HW = sure, None
    large = resize(scores, size)
    ground = large[-1] if behind else None
    for step in by_place["uncertain"]:
        if step.name == "band":
            sure, known = uncertain.band(sure, own["band"])
        elif step.name == "posterior":
            sure, known = call(step, classes)
        elif step.name == "disagreement":
            given = step.arguments
            second = call(spread, stored[given.pop("other")], **chosen)
            other = call(scaled, second, *explained).float()
            left = uncertain.disagreement(resize(plain, size), resize(other, size), **given)
            open_HW = left if open_HW is None else open_HW | left
        else:
            level = torch.full(size, float(sure.mean())) if ground is None else ground
            left = call(step, torch.cat([level[None], large[: len(maps)]]))
            open_HW = left if open_HW is None else open_HW | left
    return Scored(large[: len(maps)], ground, (sure, known), open_HW, nothing)


def _refined(
    step: Step, scores_Chw: torch.Tensor, side: int, image: np.ndarray | None
) -> torch.Tensor:
    """Scores after a refining step, at ``cells`` pixels for each cell of the heat."""
    if image is None:
        raise ValueError(
            f"steps: {{refine: {step.name}}} follows the edges of the image, but no image is given"
        )
    arguments = step.arguments
    grid = (arguments.pop("cells") * side,) * 2
    picture = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)
    guide = F.interpolate(picture[None], size=grid, mode="area")[0]
    if scores_Chw.shape[1:] != grid:
        scores_Chw = resize(scores_Chw, grid)
    return STEPS[step.place][step.name](scores_Chw, guide, **arguments)
