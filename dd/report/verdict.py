"""What the page of runs begins with: the verdict of each domain, and which classes to accept. From
the rows of the report, by the rules of :mod:`dd.evaluation.verdict`."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dd.evaluation import acceptance, savings
from dd.evaluation.budget_results import partner
from dd.evaluation.statistics import Score, holm, interval
from dd.evaluation.supervision import distinct, merged
from dd.evaluation.verdict import Facts, Gain, Verdict, verdict
from dd.report import html as page
from dd.report.compare import Scores, paired_interval, plain
from dd.report.html import Cell, Table
from dd.report.recipes import Entry
from dd.report.rows import Row, equal_steps, images_by_kind
from dd.report.summary import images_of

WITH_LABELS = ("finetuned", "mixed")  # the first that there is decides
Measured = Mapping[int, Row]  # {labels: row}


def number_of_labels(row: Row) -> int | None:
    """Real labels of a row, ``all`` as their number; None where it is not known."""
    if row.recipe.shots != "all":
        return None if row.recipe.shots is None else int(row.recipe.shots)
    return images_by_kind(row.runs[0]["run"]["trained_on"]).get("real") or None


def measured(rows: Sequence[Row], domain: str) -> tuple[Row | None, Measured, Measured, str | None]:
    """(synthetic images alone, {labels: with these on top}, {labels: these alone}, the data set of
    the labels) of rows of one segmenter that were scored on ``domain``.

    The labels are those of ``domain``, else of the first data set that gave any. Arms are compared
    at equal steps (:func:`dd.report.rows.equal_steps`); without a pair the main rows are taken.
    """
    there = [row for row in rows if row.scores(domain)]
    mains = [row for row in there if row.variant is None]
    alone = next((row for row in mains if row.recipe.arm == "synthetic_only"), None)
    origins = dict.fromkeys(row.recipe.shots_from for row in there if row.recipe.shots_from)
    origin = domain if domain in origins else next(iter(origins), None)
    own = [row for row in there if row.recipe.shots_from == origin]
    arms = [a for a in WITH_LABELS if any(row.recipe.arm == a for row in own)]
    arm = arms[0] if arms else WITH_LABELS[0]
    pairs = equal_steps(own, domain, arm)
    steps = {pair[1].recipe.steps for pair in pairs.values()}

    def of(which: str) -> dict[int, Row]:
        found: dict[int, Row] = {}
        for row in sorted(own, key=lambda r: r.variant is not None):
            fits = row.recipe.steps in steps if steps else row.variant is None
            if row.recipe.arm == which and fits and (k := number_of_labels(row)):
                found.setdefault(k, row)
        return dict(sorted(found.items()))

    return alone, of(arm), of("real_only"), origin


def facts_of(rows: Sequence[Row], domain: str) -> Facts:
    """What the verdict on ``domain`` rests on, p-values not yet adjusted."""
    alone, with_labels, control, origin = measured(rows, domain)
    scores = alone.scores(domain) if alone else {}
    alone_at = interval(scores) if scores else None
    few = next(iter(control), None)
    fewest = None if few is None else _gain(few, scores, control[few].scores(domain))
    gains = [
        gain
        for k, row in with_labels.items()
        if k in control and (gain := _gain(k, row.scores(domain), control[k].scores(domain)))
    ]
    behind = [e for row in (alone, *with_labels.values()) if row for e in row.runs]
    return Facts(
        domain,
        images_of(rows, [domain])[domain] or 0,
        alone_at,
        fewest,
        None if fewest is None else _worth(scores, control, domain, fewest),
        gains,
        control=bool(control),
        labels_of=origin if origin != domain else None,
        supervision="/".join(sorted({e["supervision"] for e in behind})) or "A",
        labels=_chosen(behind),
    )


def _gain(k: int, scores: Scores, control: Scores) -> Gain | None:
    """Not adjusted; None without a pair of runs."""
    found = paired_interval(scores, control) if scores and control else None
    return None if found is None else Gain(k, found, found.p)


def _worth(scores: Scores, control: Measured, domain: str, fewest: Gain) -> dict[str, Any]:
    """Labels that the control needs for the mIoU of synthetic images alone, each run on the curve
    of the control of its seed."""
    curves: dict[Any, dict[int, float]] = {key: {} for key in scores}
    for k, row in control.items():
        runs: dict[Any, Score] = {_plain(key): s for key, s in row.scores(domain).items()}
        for key in scores:
            if (own := partner(key, runs)) is not None:
                curves[key][k] = runs[own].miou
    mious = {key: s.miou for key, s in scores.items() if curves[key]}
    return savings.images_skipped(0, mious, curves, fewest.found, matched=False)


def _plain(key: Any) -> Any:
    """The seed alone of a run that saw no draw of synthetic images."""
    return key[0] if isinstance(key, tuple) and key[1] is None else key


def _chosen(entries: Sequence[Entry]) -> int | None:
    """Labelled images that settings were chosen on, each once; None where it is not recorded."""
    each = [e["run"].get("chosen_on") for e in entries]
    return None if None in each else distinct(merged(*each))


def adjusted(facts: Sequence[Facts]) -> list[Facts]:
    """The facts with p-values for having tested all differences of all of them (Holm)."""
    p_values: dict[Hashable, float] = {
        (i, j): gain.p
        for i, one in enumerate(facts)
        for j, gain in enumerate(one.pairs)
        if gain.p is not None
    }
    after = holm(p_values)
    found = []
    for i, one in enumerate(facts):
        pairs = [replace(gain, p=after.get((i, j))) for j, gain in enumerate(one.pairs)]
        first = 1 if one.fewest else 0
        found.append(replace(one, fewest=pairs[0] if first else None, gains=pairs[first:]))
    return found


def verdicts(rows: Sequence[Row], domains: Sequence[str]) -> list[tuple[Facts, Verdict]]:
    """The verdict of each domain that has scores."""
    there = [d for d in domains if any(row.scores(d) for row in rows)]
    facts = adjusted([facts_of(rows, domain) for domain in there])
    return [(one, verdict(one, len(there) > 1)) for one in facts]


def verdict_section(
    found: Sequence[tuple[Facts, Verdict]], rows: Sequence[Row], grouped: Mapping[str, str]
) -> page.VerdictSection:
    """The sentences, and what they rest on in small print. ``grouped``: {domain: how its splits
    keep groups of images together}."""
    number = sum(len(facts.pairs) for facts, _ in found)
    note = (
        "Square brackets: 95 % intervals, over test images and seeds; of a number of photographs, "
        "over seeds. Differences are mIoU points, paired over runs of one seed and over test "
        f"images; shown: the interval leaves out 0 and p, corrected for all {number} differences "
        "here (Holm), is at most 0.05."
    )
    if steps := _steps(found, rows):
        note += f" {steps}"
    note += "".join(f" {domain}: {text}." for domain, text in grouped.items())
    parts = [(" ".join(v.findings), v.verdict) for _, v in found]
    return page.VerdictSection("Verdict", parts, note)


def _steps(found: Sequence[tuple[Facts, Verdict]], rows: Sequence[Row]) -> str:
    """A sentence where synthetic images alone were trained for other steps than the labels."""
    for facts, _ in found:
        alone, _, control, _ = measured(rows, facts.domain)
        other = {row.recipe.steps for row in control.values()} - {None}
        if alone and alone.recipe.steps and other - {alone.recipe.steps}:
            theirs = " or ".join(f"{n:,}" for n in sorted(n for n in other if n))
            return (
                f"Synthetic images alone were trained for {alone.recipe.steps:,} steps, the labels "
                f"alone for {theirs}."
            )
    return ""


def as_plain(found: Iterable[tuple[Facts, Verdict]]) -> dict[str, Any]:
    """The verdicts as summary.json keeps them, by domain."""

    def pair(gain: Gain) -> dict[str, Any]:
        return {"labels": gain.k, **vars(gain.found), "p_holm": gain.p, "shown": gain.shown}

    return {
        facts.domain: {
            "outcome": v.outcome,
            "sentences": [*v.findings, v.verdict],
            "test_images": facts.images,
            "alone": facts.alone and vars(facts.alone),
            "alone_less_fewest_labels": facts.fewest and pair(facts.fewest),
            "worth_labels": facts.worth,
            "gains": [pair(gain) for gain in facts.gains],
        }
        for facts, v in found
    }


def acceptance_sections(
    rows: Sequence[Row], domains: Sequence[str], threshold: float | None
) -> Iterator[Table]:
    """What to do about each class, on each domain: accept, label more, or unknown."""
    for domain in domains if threshold is not None else []:
        assert threshold is not None
        alone, with_labels, control, _ = measured(rows, domain)
        synthetic = ({0: alone} if alone else {}) | dict(with_labels)
        per_image = {k: _first_images(row, domain) for k, row in (synthetic or control).items()}
        runs = {k: found for k, found in per_image.items() if found is not None}
        if runs:
            yield _acceptance(runs, domain, threshold)


def _first_images(row: Row, domain: str) -> tuple[Entry, Any] | None:
    """(the row's run of the first seed, its test images' confusions), None if not stored."""
    for entry in row.runs[:1]:
        if images := (entry["metrics"].get(domain) or {}).get("images"):
            return entry, images["confusion"]
    return None


def _acceptance(runs: Mapping[int, tuple[Entry, Any]], domain: str, threshold: float) -> Table:
    entries = [entry for entry, _ in runs.values()]
    names = list(entries[0]["metrics"][domain]["iou"])
    tests = len(names) * len(runs)
    ious = {k: acceptance.class_ious(counts, tests) for k, (_, counts) in runs.items()}
    cells: list[list[Cell]] = []
    for c, name in enumerate(names):
        each = [(k, found[c]) for k, found in ious.items()]
        decision = acceptance.decide(each, threshold)
        now, *later = (_iou_text(found) for _, found in each)
        cells.append([name, decision.text, _missing(decision), now, each[0][1].images, *later])
    first, *more = (f"IoU with {k} labels" if k else "IoU without a label" for k in runs)
    columns = ["class", f"decision at {threshold:g}", "test images missing", first]
    columns += ["test images with it", *more]
    total = entries[0]["metrics"][domain]["num_images"]
    names_of_runs = ", ".join(entry["name"] for entry in entries)
    note = (
        f"On {total:,} test images; one run of each ({names_of_runs}), since one is used. Accept: "
        f"the lower end of the interval of the first run reaches {threshold:g}; label k more: that "
        "of the first with k labels more does; unknown: none does and an interval holds the "
        f"threshold, or fewer than {acceptance.LEAST_OF_CLASS} test images hold the class. "
        "Missing: further test images with it that would tell, if they are like those. "
        f"Intervals are over the test images and hold together at 95 % (all {tests})."
    )
    return Table(f"Which classes to accept on {domain}", columns, cells, note)


def _missing(decision: acceptance.Decision) -> Cell:
    """Further test images that would tell; None where that is not asked."""
    if decision.kind != acceptance.UNKNOWN:
        return None
    return "too near" if decision.images is None else decision.images


def _iou_text(found: acceptance.ClassIou) -> str | None:
    """``41.3 [1.9, 80.8]``, on one line."""
    if found.value is None or found.low is None or found.high is None:
        return None if found.value is None else f"{found.value:.1f}"
    return f"{found.value:.1f} [{plain(found.low)}, {plain(found.high)}]".replace(
        " ", "\N{NO-BREAK SPACE}"
    )
