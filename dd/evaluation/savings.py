"""How many labelled images a curve needs, given as bounds where it was not measured.

A curve is ``{k: mIoU in percent}`` of one run, with k real labelled images. A run is named as in
:mod:`dd.evaluation.statistics`. Each run is read off its own curve, because neither a mean of
bounds nor a bound of means would be valid.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from dd.evaluation.statistics import Interval, Score, interval

Curve = Mapping[int, float]


@dataclass(frozen=True)
class Bounds:
    """A number between ``low`` and ``high``; None: nothing is known on that side."""

    low: float | None = None
    high: float | None = None

    @property
    def exact(self) -> bool:
        return self.low is not None and self.low == self.high

    def holds(self, value: float) -> bool:
        return self.low is not None and self.high is not None and self.low <= value <= self.high

    def less(self, k: float) -> "Bounds":
        return Bounds(*(None if end is None else end - k for end in (self.low, self.high)))


def images_for(curve: Curve, target: float) -> Bounds:
    """Labelled images with which ``curve`` first reaches ``target``, linear in log(k) between
    measured points (linear in k from k = 0).

    At most the smallest measured k if that already reaches it; at least the largest if none does;
    unknown for a curve without points. If a curve is not monotone, its first crossing counts; a
    later dip below the target is ignored (:func:`dips`).
    """
    points = sorted(curve.items())
    if not points:
        return Bounds()
    if points[0][1] >= target:
        smallest = float(points[0][0])
        return Bounds(0.0 if smallest == 0 else None, smallest)
    for (k0, m0), (k1, m1) in zip(points, points[1:], strict=False):
        if m1 >= target:
            share = (target - m0) / (m1 - m0)
            found = share * k1 if k0 == 0 else k0 * (k1 / k0) ** share
            return Bounds(found, found)
    return Bounds(float(points[-1][0]), None)


def dips(curve: Curve, target: float) -> bool:
    """Whether ``curve`` falls below ``target`` again after reaching it."""
    reached = [miou >= target for _, miou in sorted(curve.items())]
    return True in reached and False in reached[reached.index(True) :]


def middle(bounds: Iterable[Bounds]) -> Bounds:
    """Bounds of the median: the medians of the lower and of the upper ends."""
    lows, highs = _ends(bounds)
    return _bounds(median(lows), median(highs))


def spread(bounds: Iterable[Bounds]) -> Bounds:
    """Bounds that hold all of ``bounds``."""
    lows, highs = _ends(bounds)
    return _bounds(min(lows), max(highs))


def summary(bounds: Mapping[Hashable, Bounds]) -> dict[str, Any]:
    """As plain values: ``runs`` (seed, draw, bounds of each), ``median`` and ``range``."""
    return {
        "runs": [{**run_name(key), **vars(found)} for key, found in bounds.items()],
        "median": vars(middle(bounds.values())),
        "range": vars(spread(bounds.values())),
    }


def _ends(bounds: Iterable[Bounds]) -> tuple[list[float], list[float]]:
    bounds = list(bounds)
    lows = [-math.inf if b.low is None else b.low for b in bounds]
    return lows, [math.inf if b.high is None else b.high for b in bounds]


def _bounds(low: float, high: float) -> Bounds:
    return Bounds(*(end if math.isfinite(end) else None for end in (low, high)))


def seeds_interval(needed: Mapping[Hashable, Bounds]) -> Bounds | None:
    """95 % interval over seeds of the images needed, in log(k), as curves are read.

    None if a run's reading is only a bound, or with one seed.
    """
    read = {key: Score(math.log(b.low)) for key, b in needed.items() if b.exact and b.low}
    found = interval(read) if read and len(read) == len(needed) else None
    if found is None or found.low is None or found.high is None:
        return None
    return Bounds(math.exp(found.low), math.exp(found.high))


def images_skipped(
    k: int,
    mious: Mapping[Hashable, float],
    control: Mapping[Hashable, Curve],
    gain: Interval | None,
    matched: bool = True,
) -> dict[str, Any]:
    """How many images k labelled images save: the images that the control needs for the same mIoU,
    minus k.

    ``mious``: of the arm's runs at k; ``control``: the curve of each of these runs' partner;
    ``gain``: the arm at k minus the control at the smallest measured number of images >= k, None if
    there is none; ``matched``: that number is k. If it is larger, a gain still shows that images
    are skipped, but a loss does not show that they cost.

    Returns, as plain values: ``runs`` (bounds of each), ``median`` and ``range`` (bounds),
    ``interval`` over seeds if all runs are read exactly, ``falls_again`` (number of runs whose
    control later dips below the mIoU), and ``shown``: False if the interval of ``gain``, or that of
    the skipped images, contains 0, and for a loss that is not ``matched``. Negative: images cost.
    """
    needed = {key: images_for(control.get(key, {}), miou) for key, miou in mious.items()}
    skips = {key: found.less(k) for key, found in needed.items()}
    over_seeds = seeds_interval(needed)
    over_seeds = over_seeds and over_seeds.less(k)
    shown = gain is not None and not gain.holds_zero and (matched or gain.value > 0)
    return {
        **summary(skips),
        "interval": over_seeds and vars(over_seeds),
        "falls_again": sum(dips(control.get(key, {}), miou) for key, miou in mious.items()),
        "shown": shown and not (over_seeds and over_seeds.holds(0)),
    }


def run_name(key: Hashable) -> dict[str, Any]:
    """{"seed", "draw"} of a run; no draw: None."""
    seed, draw = key if isinstance(key, tuple) else (key, None)
    return {"seed": seed, "draw": draw}


def bounds_text(low: float | None, high: float | None) -> str:
    """Images skipped in words: ``61``, ``at least 512``, ``costs 106``, ``unknown``."""
    least, most = (None if end is None else round(end) for end in (low, high))
    if least is None:
        if most is None:
            return "unknown"
        return f"at most {most}" if most >= 0 else f"costs at least {-most}"
    if most is None:
        return f"at least {least}" if least >= 0 else f"costs at most {-least}"
    if least == most:
        return f"{least}" if least >= 0 else f"costs {-least}"
    return f"costs {-most} to {-least}" if most <= 0 else f"{least} to {most}".replace("-", "−")


def range_text(low: float | None, high: float | None) -> str:
    """The range of several runs: ``37 to 328``, ``512 or more``, ``unknown``."""
    least, most = ("" if end is None else f"{round(end)}".replace("-", "−") for end in (low, high))
    if not least or not most:
        return f"{most} or fewer" if most else f"{least} or more" if least else "unknown"
    return least if least == most else f"{least} to {most}"


def skipped_text(found: dict[str, Any]) -> str:
    """An entry of :func:`images_skipped` in words: ``not shown (37 to 328)``, ``41 (39 to 60)``."""
    text = bounds_text(**found["median"]) if found["shown"] else "not shown"
    return f"{text} ({range_text(**found['range'])})" if len(found["runs"]) > 1 else text


def price_text(found: dict[str, Any]) -> str:
    """What a target costs, {"images", "price"}, each a :func:`summary`:
    ``213 (64 images; 60 to 71)``."""
    images, price = found["images"]["median"], found["price"]["median"]
    low, high = images["low"], images["high"]
    if low is None and high is None:
        return "unknown"
    if high is None:
        text = f"more than {low:.0f} images"
    elif low is None:
        text = f"at most {_money(price['high'])} ({high:.0f} images"
    elif low == high:
        text = f"{_money(price['high'])} ({high:.0f} images"
    else:
        ends = f"{low:.0f} to {high:.0f} images"
        text = f"{_money(price['low'])} to {_money(price['high'])} ({ends}"
    if len(found["images"]["runs"]) > 1:
        text += f"{'; ' if '(' in text else ' ('}{range_text(**found['images']['range'])}"
    return f"{text})" if "(" in text else text


def _money(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:.2f}"
