"""The rows of a report: one for each recipe, its runs are seeds (and synthetic draws) of it.

In each arm one row is the main one, by what the recipes say and never by the names of folders; see
:func:`arrange`. The others are named by the settings that tell them from it.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from dd.evaluation.statistics import Score
from dd.report.recipes import ARMS, Entry, Recipe, leaves, named, weights_of
from dd.store.provenance import differences


@dataclass
class Row:
    """``runs``: entries of :func:`dd.report.summary.collect`, by seed and draw. ``variant``: None
    for the main row of an arm, else what tells it apart. ``label`` is unlike all others."""

    recipe: Recipe
    runs: list[Entry]
    variant: str | None = None
    label: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        return self.recipe.words + (f"; {self.variant}" if self.variant else "")

    @property
    def seeds(self) -> list[Any]:
        return sorted({e["seed"] for e in self.runs}, key=str)

    @property
    def draws(self) -> int:
        return len({e["draw"] for e in self.runs})

    @property
    def supervision(self) -> str:
        return "/".join(sorted({e["supervision"] for e in self.runs}))

    @property
    def images(self) -> str:
        """What was trained on: "512 synthetic, 16 real images"."""
        found = images_by_kind(self.runs[0]["run"]["trained_on"])
        return ", ".join(f"{n:,} {kind}" for kind, n in found.items())

    def scores(self, data: str) -> dict[Hashable, Score]:
        """{(seed, draw): its score on ``data``}."""
        found: dict[Hashable, Score] = {}
        for e in self.runs:
            if result := e["metrics"].get(data):
                images = result.get("images") or {}
                found[e["seed"], e["draw"]] = Score(result["miou"], images.get("confusion"))
        return found


def _back(trained_on: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """``trained_on`` of a run, then of those that it goes on from."""
    while trained_on:
        yield trained_on
        trained_on = trained_on.get("after")


def images_by_kind(trained_on: Mapping[str, Any]) -> dict[str, int]:
    """{"synthetic", "real": images} of a run and those before it; the same images count once."""
    counts: Counter[str] = Counter()
    for data in _back(trained_on):
        for kind in ("synthetic", "real"):
            if data["source"] in (kind, "mixed"):
                part = data[kind] if data["source"] == "mixed" else data
                counts[kind] = max(counts[kind], part.get("images") or 0)
    return {kind: counts[kind] for kind in ("synthetic", "real") if kind in counts}


def number_of_images(trained_on: Mapping[str, Any]) -> int:
    """All of :func:`images_by_kind`."""
    return sum(images_by_kind(trained_on).values())


def arrange(
    entries: list[Entry], synthetic: str | None = None, masks: str = "SegmentationClass"
) -> tuple[list[Row], list[tuple[str, str]]]:
    """(rows in the order of tables, [(run, why it is in none)]).

    The main row of an arm (by segmenter, shots and their origin) is, of the recipes without
    unlabelled photographs, the one that was trained on the report's ``synthetic`` set and mask set;
    of several the one with as many steps in total as most arms have; then with the most seeds, the
    most steps, the most images; then the one that shares most settings with all other recipes.
    What is equal in all this is told apart by the hash of its settings. Recipes of less than half
    of the steps of another one of their arm do not say how many steps arms have: a few short trials
    never become the rule.
    """
    kept, left_out = _once(entries)
    recipes: dict[str, list[Entry]] = {}
    for entry in sorted(kept, key=lambda e: (str(e["seed"]), str(e["draw"]))):
        recipes.setdefault(entry["recipe"].key, []).append(entry)
    groups: dict[tuple[Any, ...], dict[str, list[Entry]]] = {}
    for key, runs in recipes.items():
        groups.setdefault(runs[0]["recipe"].group, {})[key] = runs
    rank = _ranking(recipes, groups, synthetic, masks)
    rows = []
    for found in groups.values():
        lead = max(found, key=rank)
        for key, variant in _variants(found, lead).items():
            rows.append(Row(found[key][0]["recipe"], found[key], variant))
    rows.sort(key=_place)
    _label(rows)
    for row in rows:
        for entry in row.runs:
            entry["ablation"] = row.variant
    return rows, left_out


def _once(entries: list[Entry]) -> tuple[list[Entry], list[tuple[str, str]]]:
    """One run for each recipe, seed and draw; that with more results, else by the weights' hash."""

    def key(entry: Entry) -> tuple[str, str, str]:
        return entry["recipe"].key, str(entry["seed"]), str(entry["draw"])

    def rank(entry: Entry) -> tuple[int, str, str]:
        return -len(entry["metrics"]), str(weights_of(entry["run"])), entry["name"]

    kept, left_out = [], []
    for _, found in groupby(sorted(entries, key=key), key):
        best, *others = sorted(found, key=rank)
        kept.append(best)
        for other in others:
            first, second = (e["run"].get("identity") or {} for e in (best, other))
            lines = [line[:100] for line in differences(first, second)[:2]]
            why = f"a second run of the recipe and seed of {best['name']}"
            more = f"; they differ in {'; '.join(lines)}" if lines else ""
            left_out.append((other["name"], why + more))
    return kept, left_out


def _ranking(
    recipes: Mapping[str, list[Entry]],
    groups: Mapping[tuple[Any, ...], Mapping[str, list[Entry]]],
    synthetic: str | None,
    masks: str,
) -> Callable[[str], tuple[Any, ...]]:
    """The key by which the main recipe of a group is the largest."""
    arms: Counter[int] = Counter()
    runs_of: Counter[int] = Counter()
    for found in groups.values():
        number: Counter[int] = Counter()
        for runs in found.values():
            number[runs[0]["recipe"].steps or 0] += len(runs)
        whole = {steps: n for steps, n in number.items() if steps and 2 * steps >= max(number)}
        arms.update(whole.keys())
        runs_of.update(whole)
    shared = max(arms, key=lambda steps: (arms[steps], runs_of[steps], steps), default=None)
    settings = {key: leaves(runs[0]["recipe"].settings) for key, runs in recipes.items()}
    everywhere = Counter(leaf for found in settings.values() for leaf in found)

    def rank(key: str) -> tuple[Any, ...]:
        runs = recipes[key]
        recipe, seeds = runs[0]["recipe"], {e["seed"] for e in runs}
        data = runs[0]["run"]["trained_on"]
        return (  # the fingerprint last: something must tell equals apart, and names must not
            _configured(data, synthetic, masks),
            recipe.steps == shared,
            len(seeds),
            recipe.steps or 0,
            data.get("images") or 0,
            sum(everywhere[s] for s in settings[key]) / len(settings[key]),
            key,
        )

    return rank


def _configured(trained_on: Mapping[str, Any], synthetic: str | None, masks: str) -> bool:
    """Whether the synthetic images of a run are the report's, with its masks; so where it has
    none."""
    parts = (d.get("synthetic", d if d["source"] == "synthetic" else {}) for d in _back(trained_on))
    return all((p.get("root"), p.get("masks")) == (synthetic, masks) for p in parts if p)


def _variants(found: dict[str, list[Entry]], lead: str) -> dict[str, str | None]:
    """{recipe: what tells it apart} in one group. A name that the user chose (ablation/<name>/)
    stays, as long as it means one recipe."""
    told = named({key: runs[0]["recipe"].settings for key, runs in found.items()}, lead)
    chosen = {key: {_ablation(e) for e in runs} for key, runs in found.items() if key != lead}
    times = Counter(name for names in chosen.values() for name in names)
    photographs = ", ".join(found[lead][0]["recipe"].photographs)
    variants: dict[str, str | None] = {lead: photographs or None}
    for key, names in chosen.items():
        name = next(iter(names)) if len(names) == 1 else None
        own = told[key] if not name else name if times[name] == 1 else f"{name}, {told[key]}"
        variants[key] = ", ".join(filter(None, (photographs, own)))
    return variants


def _ablation(entry: Entry) -> str | None:
    parts = entry["folder"].parts
    at = parts.index("ablation") + 1 if "ablation" in parts else len(parts)
    return parts[at] if at < len(parts) else None


def equal_steps(
    rows: Iterable[Row], data: str, arm: str = "finetuned"
) -> dict[str, tuple[Row, Row]]:
    """{shots: (row of ``arm``, control)} of one number of steps in total, both scored on ``data``:
    the number for which there are most pairs. Of several recipes of as many steps the main one
    counts, else the first in the order of ranks."""
    found: dict[int, dict[str, dict[str, Row]]] = {}
    for row in sorted(rows, key=lambda r: r.variant is not None):
        own, steps, shots = row.recipe.arm, row.recipe.steps, row.recipe.shots
        scored = any(data in e["metrics"] for e in row.runs)
        if own in (arm, "real_only") and scored and steps and shots:
            found.setdefault(steps, {}).setdefault(shots, {}).setdefault(own, row)
    pairs = {
        steps: {k: (at[arm], at["real_only"]) for k, at in by_shots.items() if len(at) == 2}
        for steps, by_shots in found.items()
    }
    chosen = pairs[max(pairs, key=lambda steps: (len(pairs[steps]), steps))] if pairs else {}
    return {k: chosen[k] for k in sorted(chosen, key=lambda k: 10**9 if k == "all" else int(k))}


def without_short_controls(rows: Iterable[Row]) -> tuple[list[Row], list[tuple[str, str]]]:
    """(rows, [(run, why it is left out)]): a control of real images alone stays out where the main
    row of the same images took more steps, as many as the arms with synthetic images."""
    rows = list(rows)
    main = {row.recipe.group: row.recipe.steps or 0 for row in rows if row.variant is None}
    kept, left_out = [], []
    for row in rows:
        steps, whole = row.recipe.steps, main.get(row.recipe.group, 0)
        if row.recipe.arm == "real_only" and steps and steps < whole:
            why = f"a short control: {steps:,} steps, where the main one took {whole:,}"
            left_out += [(e["name"], why) for e in row.runs]
        else:
            kept.append(row)
    return kept, left_out


def place(recipe: Recipe) -> tuple[Any, ...]:
    """Where an arm stands among others: origin of its real images, their number, order of ARMS."""
    shots = -1 if recipe.shots is None else 10**9 if recipe.shots == "all" else int(recipe.shots)
    return recipe.shots_from or "", shots, list(ARMS).index(recipe.arm), recipe.words


def _place(row: Row) -> tuple[Any, ...]:
    return row.recipe.segmenter, *place(row.recipe), row.variant is not None, row.variant or ""


def _label(rows: list[Row]) -> None:
    several = len({row.recipe.segmenter for row in rows}) > 1
    origins = {row.recipe.shots_from for row in rows} - {None}
    for row in rows:
        origin = f" ({row.recipe.shots_from})" if row.recipe.shots_from and len(origins) > 1 else ""
        prefix = f"{row.recipe.segmenter}: " if several else ""
        variant = f"; {row.variant}" if row.variant else ""
        row.label = f"{prefix}{row.recipe.words}{origin}{variant}"
