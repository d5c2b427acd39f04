"""Finished runs as entries, and their numbers as summary.json."""

import os
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from dd.evaluation.statistics import interval
from dd.report.compare import comparable, read_metrics
from dd.report.recipes import ARMS, recipe, weights_of
from dd.report.rows import Row
from dd.store.provenance import SETTINGS, read_own
from dd.store.samples import read_records
from dd.store.schemas import LISTED


def collect(folders, synthetic: Path | None = None) -> tuple[list[dict], list[tuple[str, str]]]:
    """(one entry per finished run: name, folder, recipe, seed, draw, supervision, run.json, and its
    metrics by eval folder; [(result, why it is left out)] for those that cannot be trusted, and
    for runs that are not finished).

    ``synthetic``: a synthetic set; what is said of a draw is read from it and from those beside it.
    """
    entries, left_out, runs = [], [], {}
    for folder in map(Path, folders):
        if (folder / "run.json").is_file():
            if "trained_on" in read_own(folder / "run.json", {}):
                runs[folder] = read_own(folder / "run.json", LISTED)
        elif (folder / SETTINGS).is_file() and "trained_on" in read_own(folder / SETTINGS, {}).get(
            "identity", {}
        ):
            left_out.append(
                (
                    str(folder),
                    "begun and not finished (no run.json): the same train.py command goes on",
                )
            )
    by_weights = {}
    for run in runs.values():
        by_weights.setdefault(weights_of(run), []).append(run)
    sets = synthetic_sets(Path(synthetic).parent) if synthetic is not None else None
    for folder, run in runs.items():
        metrics = _read(folder, "eval/*/metrics.json", run, lambda p: p.parent.name, left_out)
        augmented = _read(
            folder, "eval/*/ms_flip/metrics.json", run, lambda p: p.parts[-3], left_out
        )
        audits = _read(
            folder, "audit/*/*/metrics.json", run, lambda p: "/".join(p.parts[-3:-1]), left_out
        )
        what = recipe(run, by_weights, *([sets] if sets else []))
        entries.append(
            {
                "folder": folder,
                "recipe": what,
                "seed": what.seed,
                "draw": what.draw,
                "supervision": run["supervision"],
                "metrics": metrics,
                "augmented": augmented,
                "audits": audits,
                "seconds": run["seconds"],
                "run": run,
            }
        )
    shared = os.path.commonpath([e["folder"].parent for e in entries]) if entries else ""
    for entry in entries:
        entry["name"] = Path(os.path.relpath(entry["folder"], shared)).as_posix()
    return sorted(entries, key=lambda e: str(e["seed"])), left_out


def synthetic_sets(root: Path) -> Callable[[dict], dict | None]:
    """``find(data)``: run.json of the synthetic set that ``data``, a part of ``trained_on``, names,
    if it lies in ``root`` and is still the one that was trained on, by the heat or the images of
    the mask set; else None."""
    known = {}

    def find(data: dict) -> dict | None:
        made, masks = data.get("mask_settings") or {}, data.get("masks")
        folder = root / str(data.get("root")) / str(masks)
        if folder not in known:
            files = folder / "masks.json", root / str(data.get("root")) / "run.json"
            known[folder] = (
                [read_own(f, {}) for f in files] if all(f.is_file() for f in files) else None
            )
        if known[folder] is None:
            return None
        there, run = known[folder]
        keys = [k for k in ("heat", "images") if k in made]
        same = keys and all((there.get("identity") or {}).get(k) == made[k] for k in keys)
        return run if same and "identity" in run else None

    return find


def _read(folder: Path, pattern: str, run: dict, key, left_out) -> dict:
    found = {}
    for path in sorted(folder.glob(pattern)):
        try:
            found[key(path)] = read_metrics(path, run.get("weights_sha256"))
        except ValueError as error:
            left_out.append((str(path), str(error).removeprefix(str(path)).lstrip(": ")))
    return found


def separate(entries: list[dict], baseline: str | None) -> list[tuple[str, str]]:
    """Take results that were measured on other images or classes than most (or than the
    baseline) out of the entries; returns [(result, why)]."""
    left_out = []
    for kind in ("metrics", "augmented", "audits"):
        for data in sorted({d for e in entries for d in e[kind]}):
            _, others = comparable(
                {e["name"]: e[kind][data] for e in entries if data in e[kind]}, baseline
            )
            for entry in entries:
                if entry["name"] in others:
                    miou = entry[kind].pop(data)["miou"]
                    left_out.append(
                        (f"{entry['name']} on {data} (mIoU {miou:.1f})", others[entry["name"]])
                    )
    return left_out


def values(entries, data: str) -> float | list[float] | None:
    """mIoU on ``data``: a number for one run, a list over seeds for several."""
    found = [e["metrics"][data]["miou"] for e in entries if data in e["metrics"]]
    return found[0] if len(found) == 1 else found or None


def _by_shots(rows, arm, shots_from, domains) -> dict:
    chosen = [
        r for r in rows if (r.recipe.arm, r.recipe.shots_from, r.variant) == (arm, shots_from, None)
    ]
    return {r.recipe.shots: {d: values(r.runs, d) for d in domains} for r in chosen}


def summarise(rows: list[Row], folder: Path, domains: list[str], synthetic: Path) -> dict:
    """The content of summary.json; mIoU in percent, lists over seeds where several were run.
    ``rows``: of one segmenter."""
    first, *others = domains
    plain = [
        e for r in rows if (r.recipe.arm, r.variant) == ("synthetic_only", None) for e in r.runs
    ]
    summary = {
        "mask_miou": _probe(folder / f"probe_{first}_test.json"),
        "synthetic_only": {d: values(plain, d) for d in domains},
        "finetuned": _by_shots(rows, "finetuned", first, domains),
        "real_only": _by_shots(rows, "real_only", first, domains),
        "shots_from": first,
    }
    for other in others:
        arms = {arm: _by_shots(rows, arm, other, domains) for arm in ("finetuned", "real_only")}
        if any(arms.values()):
            summary[f"shots_from_{other}"] = arms
    whole = ("real_only", "all", first, None)
    judges = [
        e
        for r in rows
        if (r.recipe.arm, r.recipe.shots, r.recipe.shots_from, r.variant) == whole
        for e in r.runs
    ]
    if agreement := _agreement(judges, {f"{synthetic.name}/SegmentationClass"}):
        summary["mask_agreement"] = agreement
    if ablations := _ablations(rows, plain, folder, domains, judges):
        summary["ablations"] = ablations
    entries = [e for r in rows for e in r.runs]
    generation = sum(r["seconds"] for r in read_records(synthetic, ("seconds",)).values())
    train = {arm: sum(e["seconds"] for e in entries if e["recipe"].arm == arm) for arm in ARMS}
    summary["seconds"] = {
        "generate": round(generation, 1),
        **{f"train_{k}": round(v, 1) for k, v in train.items()},
    }
    summary["seeds"] = sorted({e["seed"] for e in entries}, key=str)
    summary["test_images"] = images_of(rows, domains)
    summary["recipes"] = [_described(row, domains) for row in rows]
    return summary


def images_of(rows: list[Row], domains) -> dict[str, int | None]:
    """{domain: images that its scores were taken on}; None where there is no score."""
    found = {
        d: [e["metrics"][d]["num_images"] for r in rows for e in r.runs if d in e["metrics"]]
        for d in domains
    }
    return {d: max(numbers, default=None) for d, numbers in found.items()}


def _described(row: Row, domains) -> dict:
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


def _ablations(rows, plain, folder, domains, judges) -> dict:
    """{what tells a recipe from the main one of its arm: its mIoUs, ``less`` (of synthetic images
    alone: those less the main one's, paired over seeds), and the quality of its masks}."""
    first, ablations = domains[0], {}
    main = next((r for r in rows if (r.recipe.arm, r.variant) == ("synthetic_only", None)), None)
    for row in rows:
        if row.variant is None:
            continue
        origin = f" ({row.recipe.shots_from})" if row.recipe.shots_from not in (None, first) else ""
        own = row.recipe.arm == "synthetic_only" and main is not None
        name = row.variant if own else f"{row.recipe.words}{origin}, {row.variant}"
        ablations[name] = {d: values(row.runs, d) for d in domains}
        ablations[name] |= {"of": row.recipe.words, "steps": row.recipe.steps, "seeds": row.seeds}
        if own:
            ablations[name]["less"] = {d: _less(row.scores(d), main.scores(d)) for d in domains}
        if (probed := _probed(row.runs, folder, f"probe_{first}_test.json")) is not None:
            ablations[name]["mask_miou"] = probed
        sets = {audited(e["run"]["trained_on"]) for e in row.runs} if own else set()
        if agreement := _agreement(judges, sets):
            ablations[name]["mask_agreement"] = agreement
    raw = {d: values(plain, f"{d}-raw") for d in domains}
    if any(v is not None for v in raw.values()):
        scored = [e for e in plain if any(f"{d}-raw" in e["metrics"] for d in domains)]
        raw |= {"of": ARMS["synthetic_only"], "seeds": sorted({e["seed"] for e in scored}, key=str)}
        raw["less"] = {d: _less(main.scores(f"{d}-raw"), main.scores(d)) for d in domains}
        ablations["ema=off" if "ema=off" not in ablations else "ema=off (raw weights)"] = raw
    for name, miou in _probed_ablations(folder, first).items():
        if name in ablations:
            ablations[name]["mask_miou"] = miou
    return ablations


def _less(scores: dict, main: dict) -> dict | None:
    """{"value", "low", "high", "seeds"} of a paired difference; None without a pair."""
    if not scores.keys() & main.keys():
        return None
    found = interval(scores, main)
    return {"value": found.value, "low": found.low, "high": found.high, "seeds": found.seeds}


def audited(data: dict) -> str:
    """Name of a synthetic set with its masks, of a fingerprint or ``trained_on``: where
    ``audit/`` keeps their agreement."""
    listed = "" if data["split"] == "train" else f"-{data['split']}"
    return f"{data['root']}/{Path(data['masks']).name}{listed}"


def _agreement(judges, sets: set[str]) -> float | list[float] | None:
    """Agreement of masks with each judge, its mean over several mask sets; None if a judge lacks
    one."""
    found = [[e["audits"].get(name) for name in sets] for e in judges]
    if not sets or not found or any(None in each for each in found):
        return None
    found = [mean(a["miou"] for a in each) for each in found]
    return found[0] if len(found) == 1 else found


def _probed(runs, folder: Path, file: str) -> float | list[float] | None:
    """Mask mIoU beside an ablation's runs (one setting for all of them), or in each of them
    (settings of their own). What lies in ``folder`` itself was measured with the masks of the
    main recipe."""
    beside = runs[0]["folder"].parent
    if beside.resolve() != folder.resolve() and (shared := _probe(beside / file)) is not None:
        return shared
    found = [_probe(e["folder"] / file) for e in runs]
    return None if None in found else found[0] if len(found) == 1 else found


def _probe(path: Path) -> float | None:
    return read_own(path, {"miou": float})["miou"] if path.is_file() else None


def _probed_ablations(folder: Path, data: str) -> dict[str, float]:
    """Mask mIoU of the ablations that stage=probe measured on noised real test scenes."""
    path = folder / f"probe_{data}_test.json"
    found = (
        read_own(path, {"ablations?": {"*": float}}).get("ablations", {}) if path.is_file() else {}
    )
    without = _probe(folder / f"probe_{data}_test_append=off.json")
    return found if without is None else {**found, "append=off": without}


def cell(value):
    """A table cell: a number, or (mean, standard deviation) of a list."""
    if isinstance(value, list):
        return (mean(value), stdev(value)) if len(value) > 1 else value[0]
    return value
