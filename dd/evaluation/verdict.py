"""Whether synthetic images are worth it, in sentences that follow from numbers by rules.

The rules stand in docs/report.md. Differences are paired over runs and test images
(:mod:`dd.evaluation.statistics`), the p-values in :class:`Gain` are after Holm. What an interval
does not show is not said.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dd.evaluation.savings import bounds_text, range_text
from dd.evaluation.statistics import LEAST_IMAGES, LEAST_SEEDS, Interval

ALPHA = 0.05  # of p-values after Holm


@dataclass(frozen=True)
class Gain:
    """mIoU with synthetic images less that of ``k`` real images alone; ``p`` after Holm."""

    k: int
    found: Interval
    p: float | None

    @property
    def rests_on_too_little(self) -> bool:
        """Whether the interval leaves out 0, but rests on too few seeds or test images."""
        return not self.found.holds_zero and not self.found.decides

    @property
    def shown(self) -> int:
        """1 for a gain, -1 for a loss, 0 where neither is shown."""
        if not self.found.decides or self.p is None or self.p > ALPHA:
            return 0
        return 1 if self.found.value > 0 else -1


@dataclass(frozen=True)
class Facts:
    """What a verdict on the test images of ``domain`` rests on.

    ``images``: how many; ``alone``: mIoU of synthetic images alone; ``fewest``: that less the
    control with the fewest labels; ``worth``: the labels that the control needs for as much
    (:func:`dd.evaluation.savings.images_skipped` at 0); ``gains``: with k labels on top, less the
    control with the same k. ``control``: whether there is one at all. ``labels_of``: the data set
    of the labels, where it is another one. ``supervision`` with the number of ``labels`` that
    settings were chosen on (None: not recorded).
    """

    domain: str
    images: int
    alone: Interval | None = None
    fewest: Gain | None = None
    worth: dict[str, Any] | None = None
    gains: Sequence[Gain] = ()
    control: bool = True
    labels_of: str | None = None
    supervision: str = "A"
    labels: int | None = 0

    @property
    def pairs(self) -> list[Gain]:
        return [*([self.fewest] if self.fewest else []), *self.gains]

    @property
    def seeds(self) -> int:
        """Of the differences, where there are any; else of the runs of synthetic images."""
        found = [gain.found for gain in self.pairs]
        if not found and self.alone is not None:
            found = [self.alone]
        return max((i.seeds for i in found), default=0)


@dataclass(frozen=True)
class Verdict:
    """``outcome``: one of OUTCOMES; ``findings`` and ``verdict`` are sentences."""

    outcome: str
    findings: list[str]
    verdict: str


OUTCOMES = ("worth it", "not worth it", "not shown", "too few", "no control", "nothing")


def verdict(facts: Facts, several: bool = False) -> Verdict:
    """The verdict; ``several``: of several domains, which are named then."""
    outcome, text = _decided(facts)
    findings = [_level(facts, several), _gains(facts), _supervision(facts)]
    return Verdict(outcome, [f for f in findings if f], f"Verdict: {text}.")


def _decided(facts: Facts) -> tuple[str, str]:
    """(outcome, the verdict without its full stop)."""
    if facts.alone is None and not facts.gains:
        return "nothing", "none, for no run here was trained on synthetic images"
    if lacking := _lacking(facts):
        return "too few", lacking
    if not facts.control or not facts.pairs:
        why = "no real-only control was trained (train.py source=real shots=...)"
        return "no control", f"unknown, for {why}"
    won = [gain.k for gain in facts.gains if gain.shown > 0]
    first = facts.fewest
    if won:
        text = f"worth it {_where(won, [gain.k for gain in facts.gains])}"
        if first and first.shown < 0:
            text += f", but not alone: {_labels(first.k)} alone are better"
        return "worth it", text
    lost = [gain for gain in facts.gains if gain.shown < 0]
    if first and first.shown > 0:
        more = "; on top of labels no gain is shown" if facts.gains else ""
        return "worth it", f"worth it in place of {_labels(first.k)}{more}"
    if first and first.shown < 0:
        return "not worth it", f"do not use them: {_labels(first.k)} alone are better"
    if lost:
        which = f"{_labels(lost[0].k)} alone are better than with synthetic images"
        return "not worth it", f"do not use them: {which}"
    return "not shown", "not shown, for every interval holds 0 or the corrected p is above 0.05"


def _lacking(facts: Facts) -> str:
    """What there is too little of to decide anything; "" for enough."""
    few, todo = [], []
    if facts.images < LEAST_IMAGES:
        few.append(_number(facts.images, "test image"))
        todo.append(f"label {LEAST_IMAGES - facts.images} more")
    if facts.seeds < LEAST_SEEDS:
        paired = "paired " if facts.pairs else ""
        few.append(_number(facts.seeds, f"{paired}seed"))
        todo.append(f"train {LEAST_SEEDS - facts.seeds} more (seed=...)")
    if few:
        verb = "is" if len(few) == 1 and few[0].startswith("1 ") else "are"
        return f"{' and '.join(few)} {verb} too few to decide; {', and '.join(todo)}"
    if facts.pairs and all(gain.found.images is None for gain in facts.pairs):
        return (
            "the scores of each test image are not stored, without which nothing is decided; "
            "evaluate the runs again"
        )
    return ""


def _where(won: list[int], measured: list[int]) -> str:
    """``up to 64 labels`` and so on: the numbers of labels at which a gain is shown."""
    last = measured.index(won[-1])
    if won == measured[: len(won)]:
        text = f"up to {_labels(won[-1])}"
    elif won == measured[last + 1 - len(won) : last + 1] and len(won) > 1:
        text = f"with {won[0]} to {_labels(won[-1])}"
    else:
        text = f"with {' and '.join(map(str, won[:-1]))}{' and ' * (len(won) > 1)}"
        text += _labels(won[-1])
    return text + (", the most that were measured" if won[-1] == measured[-1] else "")


def _level(facts: Facts, several: bool) -> str:
    """How good synthetic images alone are, and how many labels are as good."""
    where = f" of {facts.domain}" if several else ""
    on = f"On {_number(facts.images, 'test image')}{where} and {_number(facts.seeds, 'seed')}"
    if facts.alone is None:
        return f"{on} no run of synthetic images alone was scored." if facts.gains else ""
    text = f"{on}, synthetic images alone reach a mIoU of {_level_text(facts.alone)}"
    origin = f" of {facts.labels_of}" if facts.labels_of else ""
    first = facts.fewest
    if first is None:
        return f"{text}."
    if first.shown > 0 and facts.worth and facts.worth["shown"]:
        return f"{text}, as much as {_worth(facts.worth)} labelled photographs{origin}."
    against = f"{_number(first.k, 'labelled photograph')}{origin} alone"
    difference = signed_interval(first.found)
    if first.shown:
        word = "more" if first.shown > 0 else "less"
        return f"{text}, {word} than {against} ({difference})."
    if first.rests_on_too_little:
        return f"{text}; the difference to {against} is {difference}, which decides nothing yet."
    return f"{text}; no difference to {against} is shown ({difference})."


def _worth(worth: dict[str, Any]) -> str:
    """``71 [55, 96]``, ``at least 512``, ``38 to 52 (runs: 38 to 64)``."""
    text = bounds_text(**worth["median"])
    if worth["interval"]:
        low, high = (round(worth["interval"][end]) for end in ("low", "high"))
        return f"{text} [{low}, {high}]"
    return f"{text} (runs: {range_text(**worth['range'])})" if len(worth["runs"]) > 1 else text


def _gains(facts: Facts) -> str:
    """What synthetic images add to labels: the first and the last gain, the first loss, and from
    where on no gain is shown."""
    if not facts.gains:
        return ""
    won = [gain for gain in facts.gains if gain.shown > 0]
    lost = [gain for gain in facts.gains if gain.shown < 0]
    if not won and not lost:
        return _no_gain(facts)
    named = dict.fromkeys([*won[:1], *won[-1:]])
    parts = [f"to {_labels(g.k)}: {_points(facts, g)}" for g in (*named, *lost[:1])]
    beyond = [gain.k for gain in facts.gains if won and gain.k > won[-1].k]
    if beyond and not lost:
        parts.append(f"from {_labels(beyond[0])} on no gain is shown")
    return f"Added {'; '.join(parts)}."


def _no_gain(facts: Facts) -> str:
    """The sentence where neither a gain nor a loss is shown."""
    best = max(facts.gains, key=lambda gain: gain.found.value)
    few, many = facts.gains[0].k, facts.gains[-1].k
    if best.rests_on_too_little:
        points, at = _points(facts, best), "the difference to these alone is"
        if few != many:
            points += f" with {best.k}"
            at = "the largest difference to these alone is"
        which = _labels(few) if few == many else f"{few} to {_labels(many)}"
        return f"With {which}, {at} {points}; it decides nothing yet."
    if few == many:
        return f"With {_labels(few)} no gain over these alone is shown ({_points(facts, best)})."
    most = f"the largest is {_points(facts, best)} with {best.k}"
    return f"With {few} to {_labels(many)} no gain over these alone is shown ({most})."


def _points(facts: Facts, gain: Gain) -> str:
    """A difference with its interval, and its seeds where they are fewer than those of the first
    sentence."""
    seeds, text = gain.found.seeds, signed_interval(gain.found)
    return text if seeds == facts.seeds else f"{text} on {_number(seeds, 'seed')}"


def _supervision(facts: Facts) -> str:
    if facts.supervision == "A" or (facts.alone is None and not facts.gains):
        return ""
    text = f"Supervision {facts.supervision}"
    if facts.labels is None:
        return f"{text}: which labels chose settings is not recorded."
    if facts.labels:
        return f"{text}: {_labels(facts.labels)} chose settings, and come on top."
    why = "a foundation model made the masks" if "D" in facts.supervision else ""
    why = why or ("whole real splits were trained on" if "real" in facts.supervision else "")
    return f"{text}{': ' * bool(why)}{why}."


def _labels(k: int) -> str:
    return _number(k, "label")


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _level_text(found: Interval) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.1f} (no interval)"
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"


def signed_interval(found: Interval) -> str:
    """``+3.9 [2.9, 4.8]``; where there is no interval, that is said."""
    value = f"{found.value:+.1f}"
    if found.low is None or found.high is None:
        return f"{value} (no interval)".replace("-", "−")
    return f"{value} [{found.low:.1f}, {found.high:.1f}]".replace("-", "−")
