"""Finished runs as entries, and their numbers as summary.json."""

import os
from pathlib import Path
from statistics import mean, stdev

from dd.provenance import read_json
from dd.report.compare import comparable, read_metrics
from dd.samples import read_records

ARMS = {
    "synthetic_only": "synthetic only",
    "self_training": "synthetic, self-training",
    "finetuned": "synthetic, then {k} real",
    "mixed": "synthetic and {k} real",
    "real_only": "{k} real only",
}


def labelled_part(trained_on: dict) -> dict:
    """What the weights were trained on, before statistics of unlabelled photographs followed (stage=batch_norm)."""
    while trained_on["source"] == "unlabelled":
        trained_on = trained_on["after"]
    return trained_on


def unlabelled_steps(trained_on: dict | None) -> list[str]:
    """What a run, and those that it goes on from, learnt from photographs without labels; the first step first."""
    if not trained_on:
        return []
    here = []
    if style := trained_on.get("style"):
        settings = ", ".join(f"{k} {style[k]:g}" for k in ("bandwidth", "share") if k in style)
        here.append(f"{style['kind']} style of photographs ({settings})")
    if trained_on.get("self_training"):
        here.append("self-training on photographs")
    if trained_on["source"] == "unlabelled":
        share = trained_on["batch_norm"]["share"]
        here.append("batch norm of photographs" + (f" (share {share:g})" if share != 1 else ""))
    return [*unlabelled_steps(trained_on.get("after")), *here]


def arm_of(trained_on: dict) -> str:
    """A key of ARMS: what a run was trained on, in which order."""
    trained_on = labelled_part(trained_on)
    if trained_on["source"] == "mixed":
        return "mixed"
    if trained_on["source"] == "synthetic":
        return "self_training" if "teacher" in trained_on["mask_settings"] else "synthetic_only"
    return "finetuned" if trained_on["after"] else "real_only"


def collect(folders) -> tuple[list[dict], list[tuple[str, str]]]:
    """(one entry per finished run: name, folder, arm, shots, seed, where the shots came from, run.json, and its metrics by
    eval folder; [(result, why it is left out)] for those that cannot be trusted)."""
    entries, left_out = [], []
    for folder in map(Path, folders):
        if not (folder / "run.json").is_file() or "trained_on" not in (run := read_json(folder / "run.json")):
            continue
        trained_on, steps = labelled_part(run["trained_on"]), unlabelled_steps(run["trained_on"])
        metrics = _read(folder, "eval/*/metrics.json", run, lambda p: p.parent.name, left_out)
        augmented = _read(folder, "eval/*/ms_flip/metrics.json", run, lambda p: p.parts[-3], left_out)
        audits = _read(folder, "audit/*/*/metrics.json", run, lambda p: "/".join(p.parts[-3:-1]), left_out)
        ablation = folder.parts[folder.parts.index("ablation") + 1] if "ablation" in folder.parts else None
        if not ablation and run.get("identity", {}).get("trainer", {}).get("callbacks", {"ema": True})["ema"] is None:
            ablation = "ema=off"
        if steps:  # not a seed of the arm, a recipe of its own
            arm = arm_of(trained_on)
            what = [] if arm == "synthetic_only" else [ARMS[arm].format(k=trained_on["shots"])]
            ablation = ", ".join([*what, *([ablation] if ablation else []), *steps])
        entries.append(
            {"folder": folder, "arm": arm_of(trained_on), "shots": trained_on["shots"] and str(trained_on["shots"]),
             "shots_from": trained_on.get("data", trained_on.get("root")) if trained_on["shots"] else None,
             "seed": trained_on["seed"], "segmenter": segmenter_name(run["segmenter"]), "ablation": ablation,
             "supervision": run["supervision"], "metrics": metrics, "augmented": augmented, "audits": audits,
             "seconds": run["seconds"], "run": run}
        )  # fmt: skip
    shared = os.path.commonpath([e["folder"].parent for e in entries]) if entries else ""
    for entry in entries:
        entry["name"] = Path(os.path.relpath(entry["folder"], shared)).as_posix()
    _separate(entries)
    return sorted(entries, key=lambda e: e["seed"]), left_out


def _separate(entries: list[dict]) -> None:
    """Two runs of one arm and one seed are two recipes, not two samples of one: the second gets a row of its own."""
    seen = set()
    for e in sorted((e for e in entries if not e["ablation"]), key=lambda e: e["name"]):
        key = (e["segmenter"], e["arm"], e["shots"], e["shots_from"], e["seed"])
        if key in seen:
            e["ablation"] = e["name"]
        seen.add(key)


def _read(folder: Path, pattern: str, run: dict, key, left_out) -> dict:
    found = {}
    for path in sorted(folder.glob(pattern)):
        try:
            found[key(path)] = read_metrics(path, run["checkpoint_sha256"])
        except ValueError as error:
            left_out.append((str(path), str(error).removeprefix(str(path)).lstrip(": ")))
    return found


def separate(entries: list[dict], baseline: str | None) -> list[tuple[str, str]]:
    """Take results that were measured on other images or classes than most (or than the baseline) out of the entries; returns
    [(result, why)]."""
    left_out = []
    for kind in ("metrics", "augmented", "audits"):
        for data in sorted({d for e in entries for d in e[kind]}):
            _, others = comparable({e["name"]: e[kind][data] for e in entries if data in e[kind]}, baseline)
            for entry in entries:
                if entry["name"] in others:
                    miou = entry[kind].pop(data)["miou"]
                    left_out.append((f"{entry['name']} on {data} (mIoU {miou:.1f})", others[entry["name"]]))
    return left_out


def segmenter_name(settings: dict) -> str:
    """A run's segmenter as tables name it: "DeepLabV3 R101", "Mask2Former R50", "SegFormer B0"."""
    kind = settings["_target_"].rsplit(".", 1)[1]
    if kind == "Mask2Former":
        return f"Mask2Former R{settings.get('depth', 50)}"
    if "depth" in settings:
        return f"{kind} R{settings['depth']}"
    parts = [str(settings[k]).upper() if k == "size" else settings[k] for k in ("size", "config") if k in settings]
    return " ".join([kind, *parts])


def values(entries, data: str) -> float | list[float] | None:
    """mIoU on ``data``: a number for one run, a list over seeds for several."""
    found = [e["metrics"][data]["miou"] for e in entries if data in e["metrics"]]
    return found[0] if len(found) == 1 else found or None


def _by_shots(entries, arm, shots_from, domains) -> dict:
    chosen = [e for e in entries if e["arm"] == arm and e["shots_from"] == shots_from and not e["ablation"]]
    order = sorted({e["shots"] for e in chosen}, key=lambda k: (k == "all", int(k) if k != "all" else 0))
    return {k: {d: values([e for e in chosen if e["shots"] == k], d) for d in domains} for k in order}


def summarise(entries, folder: Path, domains: list[str], synthetic: Path) -> dict:
    """The content of summary.json; mIoU in percent, lists over seeds where several were run."""
    first, *others = domains
    plain = [e for e in entries if e["arm"] == "synthetic_only" and not e["ablation"]]
    summary = {
        "mask_miou": _probe(folder / f"probe_{first}_test.json"),
        "synthetic_only": {d: values(plain, d) for d in domains},
        "finetuned": _by_shots(entries, "finetuned", first, domains),
        "real_only": _by_shots(entries, "real_only", first, domains),
        "shots_from": first,
    }
    for other in others:
        arms = {arm: _by_shots(entries, arm, other, domains) for arm in ("finetuned", "real_only")}
        if any(arms.values()):
            summary[f"shots_from_{other}"] = arms
    judges = [
        e for e in entries if (e["arm"], e["shots"], e["shots_from"]) == ("real_only", "all", first) and not e["ablation"]
    ]
    if agreement := _agreement(judges, {f"{synthetic.name}/SegmentationClass"}):
        summary["mask_agreement"] = agreement
    ablations = {}
    for name in sorted({e["ablation"] for e in entries if e["ablation"]}):
        runs = [e for e in entries if e["ablation"] == name]
        ablations[name] = {d: values(runs, d) for d in domains}
        if (probed := _probed(runs, f"probe_{first}_test.json")) is not None:
            ablations[name]["mask_miou"] = probed
        sets = {audited(labelled_part(e["run"]["trained_on"])) for e in runs if e["arm"] == "synthetic_only"}
        if agreement := _agreement(judges, sets):
            ablations[name]["mask_agreement"] = agreement
    raw = {d: values(plain, f"{d}-raw") for d in domains}
    if any(v is not None for v in raw.values()):
        ablations["ema=off"] = raw
    for name, miou in _probed_ablations(folder, first).items():
        if name in ablations:
            ablations[name]["mask_miou"] = miou
    if ablations:
        summary["ablations"] = ablations
    generation = sum(r["seconds"] for r in read_records(synthetic).values())
    train = {arm: sum(e["seconds"] for e in entries if e["arm"] == arm) for arm in ARMS}
    summary["seconds"] = {"generate": round(generation, 1), **{f"train_{k}": round(v, 1) for k, v in train.items()}}
    summary["seeds"] = sorted({e["seed"] for e in entries})
    return summary


def audited(data: dict) -> str:
    """Name of a synthetic set with its masks, of a fingerprint or ``trained_on``: where ``audit/`` keeps their agreement."""
    listed = "" if data["split"] == "train" else f"-{data['split']}"
    return f"{data['root']}/{Path(data['masks']).name}{listed}"


def _agreement(judges, sets: set[str]) -> float | list[float] | None:
    """Agreement of masks with each judge, its mean over several mask sets; None if a judge lacks one."""
    found = [[e["audits"].get(name) for name in sets] for e in judges]
    if not sets or not found or any(None in each for each in found):
        return None
    found = [mean(a["miou"] for a in each) for each in found]
    return found[0] if len(found) == 1 else found


def _probed(runs, file: str) -> float | list[float] | None:
    """Mask mIoU beside an ablation's runs (one setting for all of them), or in each of them (settings of their own)."""
    if (shared := _probe(runs[0]["folder"].parent / file)) is not None:
        return shared
    found = [_probe(e["folder"] / file) for e in runs]
    return None if None in found else found[0] if len(found) == 1 else found


def _probe(path: Path) -> float | None:
    return read_json(path)["miou"] if path.is_file() else None


def _probed_ablations(folder: Path, data: str) -> dict[str, float]:
    """Mask mIoU of the ablations that stage=probe measured on noised real test scenes."""
    path = folder / f"probe_{data}_test.json"
    found = read_json(path).get("ablations", {}) if path.is_file() else {}
    without = _probe(folder / f"probe_{data}_test_append=off.json")
    return found if without is None else {**found, "append=off": without}


def cell(value):
    """A table cell: a number, or (mean, standard deviation) of a list."""
    if isinstance(value, list):
        return (mean(value), stdev(value))
    return value
