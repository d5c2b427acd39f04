"""Finished runs as entries, and their numbers as summary.json."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dd.evaluation.statistics import interval
from dd.report.compare import Result, Scores, comparable, read_metrics
from dd.report.html import Number
from dd.report.recipes import ARMS, Entry, Run, recipe, unknown, weights_of
from dd.report.rows import Row
from dd.store.provenance import SETTINGS, read_own
from dd.store.samples import read_records
from dd.store.schemas import LISTED

Value = float | list[float] | None  # of one run, of several, of none
LeftOut = list[tuple[str, str]]  # (result, why it is in no table)
RESULTS = {  # key of an entry: (files below the run, parts of their path that name a result)
    "metrics": ("eval/*/metrics.json", slice(-2, -1)),
    "augmented": ("eval/*/ms_flip/metrics.json", slice(-3, -2)),
    "audits": ("audit/*/*/metrics.json", slice(-3, -1)),
}
BEGUN = "begun and not finished (no run.json): the same train.py command goes on"


def collect(
    folders: Iterable[str | Path], synthetic: Path | None = None
) -> tuple[list[Entry], LeftOut]:
    """(one entry per finished run: name, folder, recipe, seed, draw, supervision, run.json, and its
    metrics by eval folder; [(result, why it is left out)] for those that cannot be trusted, and
    for runs that are not finished).

    ``synthetic``: a synthetic set; what is said of a draw is read from it and from those beside it.
    """
    runs, left_out = _runs(folders)
    by_weights: dict[str | None, list[Run]] = {}
    for run in runs.values():
        by_weights.setdefault(weights_of(run), []).append(run)
    sets = synthetic_sets(Path(synthetic).parent) if synthetic is not None else unknown
    shared = os.path.commonpath([folder.parent for folder in runs]) if runs else ""
    entries = []
    for folder, run in runs.items():
        what = recipe(run, by_weights, sets)
        entry = {"folder": folder, "name": Path(os.path.relpath(folder, shared)).as_posix()}
        entry |= {"recipe": what, "seed": what.seed, "draw": what.draw, "run": run}
        entry |= {key: run[key] for key in ("supervision", "seconds")}
        for kind, (pattern, named) in RESULTS.items():
            entry[kind] = _read(folder, pattern, named, run, left_out)
        entries.append(entry)
    return sorted(entries, key=lambda e: str(e["seed"])), left_out


def _runs(folders: Iterable[str | Path]) -> tuple[dict[Path, Run], LeftOut]:
    """({folder: run.json} of the finished trainings, those that are begun)."""
    runs, left_out = {}, []
    for folder in map(Path, folders):
        if (folder / "run.json").is_file():
            if "trained_on" in read_own(folder / "run.json", {}):
                runs[folder] = read_own(folder / "run.json", LISTED)
            continue
        begun = read_own(folder / SETTINGS, {}) if (folder / SETTINGS).is_file() else {}
        if "trained_on" in begun.get("identity", {}):
            left_out.append((str(folder), BEGUN))
    return runs, left_out


def synthetic_sets(root: Path) -> Callable[[dict[str, Any]], Run | None]:
    """``find(data)``: run.json of the synthetic set that ``data``, a part of ``trained_on``, names,
    if it lies in ``root`` and is still the one that was trained on, by the heat or the images of
    the mask set; else None."""

    @cache
    def read(path: Path) -> dict[str, Any]:
        return read_own(path, {}) if path.is_file() else {}

    def find(data: dict[str, Any]) -> Run | None:
        made, folder = data.get("mask_settings") or {}, root / str(data.get("root"))
        there = read(folder / str(data.get("masks")) / "masks.json").get("identity") or {}
        keys = [k for k in ("heat", "images") if k in made]
        same = keys and all(there.get(k) == made[k] for k in keys)
        run = read(folder / "run.json")
        return run if same and "identity" in run else None

    return find


def _read(
    folder: Path, pattern: str, named: slice, run: Run, left_out: LeftOut
) -> dict[str, Result]:
    found = {}
    for path in sorted(folder.glob(pattern)):
        try:
            found["/".join(path.parts[named])] = read_metrics(path, weights_of(run))
        except ValueError as error:
            left_out.append((str(path), str(error).removeprefix(str(path)).lstrip(": ")))
    return found


def separate(entries: Sequence[Entry], baseline: str | None) -> LeftOut:
    """Take results that were measured on other images or classes than most (or than the
    baseline) out of the entries; returns [(result, why)]."""
    left_out = []
    for kind in RESULTS:
        for data in sorted({d for e in entries for d in e[kind]}):
            there = {e["name"]: e for e in entries if data in e[kind]}
            _, others = comparable({name: e[kind][data] for name, e in there.items()}, baseline)
            for name, why in others.items():
                miou = there[name][kind].pop(data)["miou"]
                left_out.append((f"{name} on {data} (mIoU {miou:.1f})", why))
    return left_out


def values(entries: Iterable[Entry], data: str) -> Value:
    """mIoU on ``data``: a number for one run, a list over seeds for several."""
    return _value([e["metrics"][data]["miou"] for e in entries if data in e["metrics"]])


def _value(found: list[float]) -> Value:
    return found[0] if len(found) == 1 else found or None


def _main(rows: Iterable[Row], arm: str, shots_from: str | None = None) -> list[Row]:
    """The main rows of an arm, of one number of shots each."""
    wanted = arm, shots_from, None
    return [r for r in rows if (r.recipe.arm, r.recipe.shots_from, r.variant) == wanted]


def _by_shots(
    rows: Iterable[Row], shots_from: str, domains: list[str]
) -> dict[str, dict[str | None, dict[str, Value]]]:
    """{arm with real images: {shots: {domain: mIoU}}}."""
    return {
        arm: {
            r.recipe.shots: {d: values(r.runs, d) for d in domains}
            for r in _main(rows, arm, shots_from)
        }
        for arm in ("finetuned", "real_only")
    }


def summarise(rows: list[Row], folder: Path, domains: list[str], synthetic: Path) -> dict[str, Any]:
    """The content of summary.json; mIoU in percent, lists over seeds where several were run.
    ``rows``: of one segmenter."""
    first, *others = domains
    plain = [e for r in _main(rows, "synthetic_only") for e in r.runs]
    whole = [r for r in _main(rows, "real_only", first) if r.recipe.shots == "all"]
    judges = [e for r in whole for e in r.runs]
    summary: dict[str, Any] = {
        "mask_miou": _probe(folder / f"probe_{first}_test.json"),
        "synthetic_only": {d: values(plain, d) for d in domains},
        **_by_shots(rows, first, domains),
        "shots_from": first,
    }
    arms = {f"shots_from_{other}": _by_shots(rows, other, domains) for other in others}
    summary |= {key: found for key, found in arms.items() if any(found.values())}
    known = {
        "mask_agreement": _agreement(judges, {f"{synthetic.name}/SegmentationClass"}),
        "ablations": _ablations(rows, folder, domains, judges),
    }
    summary |= {key: found for key, found in known.items() if found}
    entries = [e for r in rows for e in r.runs]
    generation = sum(r["seconds"] for r in read_records(synthetic, ("seconds",)).values())
    train = {arm: sum(e["seconds"] for e in entries if e["recipe"].arm == arm) for arm in ARMS}
    seconds = {"generate": generation, **{f"train_{arm}": spent for arm, spent in train.items()}}
    return summary | {
        "seconds": {stage: round(spent, 1) for stage, spent in seconds.items()},
        "seeds": _seeds(entries),
        "test_images": images_of(rows, domains),
        "recipes": [_described(row, domains) for row in rows],
    }


def _seeds(entries: Iterable[Entry]) -> list[Any]:
    return sorted({e["seed"] for e in entries}, key=str)


def images_of(rows: Sequence[Row], domains: Iterable[str]) -> dict[str, int | None]:
    """{domain: images that its scores were taken on}; None where there is no score."""
    metrics = [e["metrics"] for r in rows for e in r.runs]
    return {d: max((m[d]["num_images"] for m in metrics if d in m), default=None) for d in domains}


def _described(row: Row, domains: list[str]) -> dict[str, Any]:
    """A recipe in summary.json, with all that its numbers rest on."""
    what = row.recipe
    return {
        "name": row.label,
        "arm": what.arm,
        "main": row.variant is None,
        "segmenter": what.segmenter,
        "shots": what.shots,
        "shots_from": what.shots_from,
        "steps": what.steps,
        "trained_on": row.images,
        "supervision": row.supervision,
        "recipe": what.key,
        "runs": [
            {
                "run": e["name"],
                "seed": e["seed"],
                "draw": e["draw"],
                "miou": {d: e["metrics"][d]["miou"] for d in domains if d in e["metrics"]},
            }
            for e in row.runs
        ],
    }


def _ablations(
    rows: Sequence[Row], folder: Path, domains: list[str], judges: Sequence[Entry]
) -> dict[str, dict[str, Any]]:
    """{what tells a recipe from the main one of its arm: its mIoUs, ``less`` (of synthetic images
    alone: those less the main one's, paired over seeds), and the quality of its masks}."""
    first, found = domains[0], {}
    main = next(iter(_main(rows, "synthetic_only")), None)
    for row in rows:
        if row.variant is not None:
            own = main if row.recipe.arm == "synthetic_only" else None
            name = row.variant if own else f"{_with_origin(row, first)}, {row.variant}"
            found[name] = _ablation(row, own, domains)
            sets = {audited(e["run"]["trained_on"]) for e in row.runs} if own else set()
            probed = _probed(row.runs, folder, f"probe_{first}_test.json")
            masks = {"mask_miou": probed, "mask_agreement": _agreement(judges, sets) or None}
            found[name] |= {key: value for key, value in masks.items() if value is not None}
    if main and (raw := _raw(main, domains)):
        found["ema=off" if "ema=off" not in found else "ema=off (raw weights)"] = raw
    for name, miou in _probed_ablations(folder, first).items():
        if name in found:
            found[name]["mask_miou"] = miou
    return found


def _with_origin(row: Row, first: str) -> str:
    """The words of a recipe, and where its real images are from if not from ``first``."""
    origin = row.recipe.shots_from
    return row.recipe.words + (f" ({origin})" if origin not in (None, first) else "")


def _ablation(row: Row, main: Row | None, domains: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {d: values(row.runs, d) for d in domains}
    found |= {"of": row.recipe.words, "steps": row.recipe.steps, "seeds": row.seeds}
    if main:
        found["less"] = {d: _less(row.scores(d), main.scores(d)) for d in domains}
    return found


def _raw(main: Row, domains: list[str]) -> dict[str, Any]:
    """The main recipe's own runs with raw weights, no average of them; {} if none was scored so."""
    found: dict[str, Any] = {d: values(main.runs, f"{d}-raw") for d in domains}
    if all(value is None for value in found.values()):
        return {}
    scored = [e for e in main.runs if any(f"{d}-raw" in e["metrics"] for d in domains)]
    found |= {"of": ARMS["synthetic_only"], "seeds": _seeds(scored)}
    less = {d: _less(main.scores(f"{d}-raw"), main.scores(d)) for d in domains}
    return {**found, "less": less}


def _less(scores: Scores, main: Scores) -> dict[str, Any] | None:
    """{"value", "low", "high", "seeds"} of a paired difference; None without a pair."""
    if not scores.keys() & main.keys():
        return None
    found = interval(scores, main)
    return {"value": found.value, "low": found.low, "high": found.high, "seeds": found.seeds}


def audited(data: dict[str, Any]) -> str:
    """Name of a synthetic set with its masks, of a fingerprint or ``trained_on``: where
    ``audit/`` keeps their agreement."""
    listed = "" if data["split"] == "train" else f"-{data['split']}"
    return f"{data['root']}/{Path(data['masks']).name}{listed}"


def _agreement(judges: Iterable[Entry], sets: set[str]) -> Value:
    """Agreement of masks with each judge, its mean over several mask sets; None if a judge lacks
    one."""
    found = [[e["audits"].get(name) for name in sets] for e in judges]
    if not sets or any(None in each for each in found):
        return None
    return _value([mean(a["miou"] for a in each) for each in found])


def _probed(runs: Sequence[Entry], folder: Path, file: str) -> Value:
    """Mask mIoU beside an ablation's runs (one setting for all of them), or in each of them
    (settings of their own). What lies in ``folder`` itself was measured with the masks of the
    main recipe."""
    beside = runs[0]["folder"].parent
    if beside.resolve() != folder.resolve() and (shared := _probe(beside / file)) is not None:
        return shared
    found = [miou for e in runs if (miou := _probe(e["folder"] / file)) is not None]
    return _value(found) if len(found) == len(runs) else None


def _probe(path: Path) -> float | None:
    return read_own(path, {"miou": float})["miou"] if path.is_file() else None


def _probed_ablations(folder: Path, data: str) -> dict[str, float]:
    """Mask mIoU of the ablations that stage=probe measured on noised real test scenes."""
    path = folder / f"probe_{data}_test.json"
    schema = {"ablations?": {"*": float}}
    found = read_own(path, schema).get("ablations", {}) if path.is_file() else {}
    without = _probe(folder / f"probe_{data}_test_append=off.json")
    return found if without is None else {**found, "append=off": without}


def cell(value: Value) -> Number | tuple[Number, Number]:
    """A table cell: a number, or (mean, standard deviation) of a list."""
    if isinstance(value, list):
        return (mean(value), stdev(value)) if len(value) > 1 else value[0]
    return value
