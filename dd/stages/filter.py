"""Stage: select the samples of a synthetic set that are good enough to train on. Writes a further
list of them and deletes nothing."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from dd.data.datasets import (
    check_mask,
    read_image,
    read_mask,
    stored_heat,
    synthetic_image,
    write_split,
)
from dd.data.quality import (
    CLIP,
    Rule,
    Scores,
    clip_signals,
    judge,
    mask_signals,
    refuse_excess,
    signals_by_source,
)
from dd.evaluation.supervision import LabelSet, behind, merged
from dd.execution.units import check_generated
from dd.masks.from_heat import MaskSettings
from dd.store.names import folder_name
from dd.store.progress import Progress
from dd.store.provenance import differences, fingerprint, made_by, read_json, read_own, write_json
from dd.store.samples import Sample, append_records, read_plan, read_records
from dd.store.schemas import MASKS, WHOLE_FILTER, WHOLE_MASKS

HASHES = ("image_sha256", "heat_sha256")
PART = 64  # samples whose signals are written together
Signals: TypeAlias = dict[str, Any]


def find_absent(
    folder: str | Path,
    rules: list[Rule],
    settings: MaskSettings,
    clip: Scores | None = None,
    max_share: float = 0.5,
) -> dict[str, Any] | None:
    """The argument ``absent`` of :func:`dd.stages.label.label`: {"rules", "classes": {sample id:
    names that are not drawn}, in plan order}; None without a rule of that action. ValueError for
    rules that would remove too much (max_share, a whole class).
    """
    rules = [r for r in rules if r.action == "absent"]
    if not rules:
        return None
    samples, signals = _signals(Path(folder), rules, clip)
    lost: dict[str, set[str]] = {}
    for rule in rules:
        where = f"quality.rules.{rule.name}"
        found = judge(rule, samples, signals, settings.power, settings.source)["hits"]
        hits = {name: [hit["class"] for hit in each] for name, each in found.items()}
        refuse_excess(where, samples, hits, max_share, "absent")
        number = sum(map(len, hits.values()))
        print(f"{where}: {number} classes of {len(hits)} samples called absent")
        for name, classes in hits.items():
            lost.setdefault(name, set()).update(classes)
    every = {s.id: [c for c in s.classes if c in lost[s.id]] for s in samples if s.id in lost}
    together = "the rules that call classes absent, together,"
    refuse_excess(together, samples, every, max_share, "absent")
    return {"rules": {r.name: r.settings() for r in rules}, "classes": every}


def filter_samples(
    folder: str | Path,
    rules: list[Rule],
    mask_set: str | None = None,
    split: str = "train_filtered",
    clip: Scores | None = None,
    max_share: float = 0.5,
    chosen_on: Iterable[LabelSet] = (),
) -> dict[str, Any]:
    """Write ``quality/<split>/filter.json``, then the ids that no rule of action ``drop`` hits to
    ``ImageSets/Segmentation/<split>.txt``. Returns the content of the former: rules, thresholds,
    counts, dropped ids with the reason, and the labels that chose the rules (``chosen_on``) or are
    behind the masks that they use (:func:`dd.evaluation.supervision.behind`).

    Every rule sees every sample. Images, heat, masks and the list ``train`` stay as they are; a
    filtered list of the same name is replaced. ValueError for rules that would drop too much
    (``max_share``, a whole class), for a mask set that was made with other rules of action
    ``absent``, and for a list that this stage did not write.
    """
    folder, masks = Path(folder), "SegmentationClass"
    if mask_set not in (None, masks):
        masks = f"masks/{folder_name(mask_set, 'mask_set')}"
    path, done = _place(folder, split), _mask_set(folder / masks, rules)
    samples, signals = _signals(folder, rules, clip)
    if done["sha256"].keys() != {s.id for s in samples}:
        raise ValueError(
            f"mask set {folder / masks} has other samples than {folder}/plan.jsonl; run "
            "generate.py stage=label again"
        )
    not_drawn = done.get("absent", {})
    for sample, found in zip(samples, signals, strict=True):
        names, mask = not_drawn.get(sample.id, ()), folder / masks / f"{sample.id}.png"
        pairs = zip(sample.class_ids, sample.classes, strict=True)
        check_mask(mask)
        absent = [i for i, name in pairs if name in names]
        found["mask"] = mask_signals(read_mask(mask), sample.class_ids, absent)
    dropping = [r for r in rules if r.action == "drop"]
    counts, dropped = _dropped(dropping, samples, signals, done["identity"]["settings"], max_share)
    lost = {s.id: list(s.classes) for s in samples if s.id in dropped}
    refuse_excess("the rules together", samples, lost, max_share, "drop")
    together = "the rules together, with those that call classes absent,"
    refuse_excess(together, samples, {**not_drawn, **lost}, 1, "drop")
    kept = [s.id for s in samples if s.id not in dropped]
    asked = Counter(name for s in samples for name in s.classes)
    left = Counter(name for s in samples if s.id not in dropped for name in s.classes)
    result = {
        "identity": {
            "rules": {r.name: r.settings() for r in dropping},
            "max_share": max_share,
            "ids": fingerprint(kept),
            "clip": signals[0]["clip"]["by"] if any(r.signal in CLIP for r in dropping) else None,
            "mask_set": {
                "masks": masks,
                **done["identity"],
                "sha256": fingerprint(done["sha256"]),
            },
        },
        "samples": len(samples),
        "kept": len(kept),
        "rules": counts,
        "classes": {name: {"samples": asked[name], "kept": left[name]} for name in sorted(asked)},
        "dropped": {i: dropped[i] for i in sorted(dropped)},
        "chosen_on": merged(chosen_on, ({**labels, "what": "samples"} for labels in behind(done))),
        **made_by(),
    }
    there = read_own(path, WHOLE_FILTER) if path.is_file() else {"identity": {}}
    other = differences(there["identity"], result["identity"])
    if other or there.get("chosen_on") != result["chosen_on"]:
        write_json(path, result)
    write_split(folder, split, kept)
    return read_json(path)


def _dropped(
    rules: list[Rule],
    samples: list[Sample],
    signals: list[Signals],
    how: dict[str, Any],
    max_share: float,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """({rule: its settings, thresholds and how many samples it hits}, {sample id: why it is
    dropped}). ``how``: the settings of the masks."""
    asked = {s.id: list(s.classes) for s in samples}
    counts = {}
    dropped: dict[str, list[dict[str, Any]]] = {}
    for rule in rules:
        found = judge(rule, samples, signals, how.get("power"), how.get("source", "class_prompt"))
        hits, thresholds = found["hits"], found["thresholds"]
        lost = {i: asked[i] for i in hits}
        refuse_excess(f"quality.rules.{rule.name}", samples, lost, max_share, "drop")
        counts[rule.name] = rule.settings() | {"thresholds": thresholds, "samples": len(hits)}
        for name, reasons in hits.items():
            dropped.setdefault(name, []).extend({"rule": rule.name, **why} for why in reasons)
    return counts, dropped


def _place(folder: Path, split: str) -> Path:
    """The folder of the filter's record; ValueError for a list that this stage did not write."""
    folder_name(split, "quality.split")
    path = folder / "quality" / split / "filter.json"
    listed = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    if listed.exists() and not path.exists():
        raise ValueError(
            f"quality.split={split}: {listed} is a list that no filter wrote; choose another name"
        )
    return path


def _mask_set(target: Path, rules: list[Rule]) -> dict[str, Any]:
    """masks.json of a finished mask set whose absent classes are those of ``rules``."""
    if not (target / "masks.json").is_file():
        raise FileNotFoundError(
            f"mask set {target} is not finished (no masks.json); run generate.py stage=label first"
        )
    schema = {**WHOLE_MASKS, "identity": {**MASKS["identity"], "settings": dict}}
    done = read_own(target / "masks.json", schema)
    theirs = done["identity"].get("absent", {}).get("rules", {})
    lines = differences(theirs, {r.name: r.settings() for r in rules if r.action == "absent"})
    if lines:
        raise ValueError(
            f"mask set {target} was made with other rules for absent classes (its own -> "
            "these):\n  "
            + "\n  ".join(lines)
            + "\nMake its masks with these: generate.py stage=label with the same quality; or "
            "leave a rule out: quality.rules.<name>=null"
        )
    return done


def _signals(
    folder: Path, rules: list[Rule], clip: Scores | None
) -> tuple[list[Sample], list[Signals]]:
    """(samples, their signals): those of the records; missing signals are computed from stored heat
    and images, and kept in ``quality/records/``."""
    samples, records, place = read_plan(folder), read_records(folder), folder / "quality"
    kept = read_records(place, (*HASHES, "signals"))
    check_generated(folder, samples, records)
    found: list[Signals] = []
    new: list[dict[str, Any]] = []
    with Progress("quality signals", len(samples)) as progress:
        for sample in samples:
            record, later = records[sample.id], kept.get(sample.id, {})
            hashes = {h: record[h] for h in HASHES}
            current = later if hashes.items() <= later.items() else {}
            stored = [each.get("signals", {}) for each in (current, record)]
            signals, added = _complete(folder, sample, stored, clip)
            found.append(signals)
            new += [{"id": sample.id, **hashes, "signals": signals}] if added else []
            if len(new) == PART or (new and len(found) == len(samples)):
                append_records(place, "0", new)
                new = []
            progress.advance()
    if any(r.signal in CLIP for r in rules):
        by = {signals["clip"]["by"] if "clip" in signals else None for signals in found}
        if None in by or len(by) > 1:
            raise ValueError(
                f"{folder}: rules on CLIP scores need those of one model for all {len(found)} "
                f"samples; {sum('clip' in s for s in found)} have scores, by {len(by - {None})} "
                "models. Give quality.clip.model"
            )
    return samples, found


def _complete(
    folder: Path, sample: Sample, stored: list[Signals], clip: Scores | None
) -> tuple[Signals, bool]:
    """(signals of a sample, whether some were computed now). With a CLIP model only its own scores
    count."""
    by = clip and clip.weights_sha256[:16]
    heat = next((s["heat"] for s in stored if "heat" in s), None)
    scored = (s["clip"] for s in stored if "clip" in s)
    scores = next((s for s in scored if by in (None, s["by"])), None)
    added = heat is None or (scores is None and clip is not None)
    if heat is None:
        heat = signals_by_source(stored_heat(folder, sample.id))
    if scores is None and clip is not None:
        image = read_image(synthetic_image(folder, sample.id))
        scores = clip_signals(clip, image, sample.prompt, sample.classes)
    return {"heat": heat} | ({"clip": scores} if scores else {}), added


def print_counts(result: dict[str, Any]) -> None:
    """Print what each rule hit, and what is left of each class."""
    total = result["samples"]
    table = Table(title=f"{result['kept']} of {total} samples kept")
    for column in ("rule", "samples hit", "share"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for name, rule in result["rules"].items():
        table.add_row(name, str(rule["samples"]), f"{100 * rule['samples'] / total:.1f} %")
    Console().print(table)
    left = (f"{name} {n['kept']} of {n['samples']}" for name, n in result["classes"].items())
    print("kept by class: " + ", ".join(left))
