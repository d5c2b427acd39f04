"""Stage: which samples of a synthetic set are good enough to learn from? Writes another list of
them, deletes nothing."""

from pathlib import Path

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
    clip_signals,
    heat_signals,
    judge,
    mask_signals,
    refuse_excess,
)
from dd.evaluation.supervision import behind, merged
from dd.masks.threshold import MaskSettings
from dd.store.names import folder_name
from dd.store.progress import Progress
from dd.store.provenance import differences, fingerprint, made_by, read_json, read_own, write_json
from dd.store.samples import append_records, read_plan, read_records
from dd.store.schemas import MASKS, WHOLE_FILTER, WHOLE_MASKS

HASHES = ("image_sha256", "heat_sha256")
PART = 64  # samples whose signals are written in one go


def find_absent(
    folder, rules: list[Rule], settings: MaskSettings, clip=None, max_share: float = 0.5
) -> dict | None:
    """What :func:`dd.stages.label.label` takes as ``absent``: {"rules", "classes": {sample id:
    names that are not drawn}, in plan order}; None without a rule of that action. ValueError for
    rules that would hit too much (max_share, a whole class).
    """
    rules = [r for r in rules if r.action == "absent"]
    if not rules:
        return None
    samples, signals = _signals(folder, rules, clip)
    lost = {
        r: _classes(judge(r, samples, signals, settings.power, settings.source)["hits"])
        for r in rules
    }
    for rule, hits in lost.items():
        refuse_excess(f"quality.rules.{rule.name}", samples, hits, max_share, "absent")
        print(
            f"quality.rules.{rule.name}: {sum(map(len, hits.values()))} classes of {len(hits)} "
            "samples called absent"
        )
    every = {
        s.id: [c for c in s.classes if any(c in hits.get(s.id, ()) for hits in lost.values())]
        for s in samples
    }
    every = {name: classes for name, classes in every.items() if classes}
    refuse_excess(
        "the rules that call classes absent, together,", samples, every, max_share, "absent"
    )
    return {"rules": {r.name: r.settings() for r in rules}, "classes": every}


def filter_samples(
    folder,
    rules: list[Rule],
    mask_set: str | None = None,
    split: str = "train_filtered",
    clip=None,
    max_share: float = 0.5,
    chosen_on: list[dict] = (),
) -> dict:
    """Write ``quality/<split>/filter.json``, then the ids that no rule of action ``drop`` hits to
    ``ImageSets/Segmentation/<split>.txt``; returns what the former holds: rules, thresholds,
    counts, ids dropped and why, and the labels that chose the rules (``chosen_on``) or are behind
    the masks that they look at (:func:`dd.evaluation.supervision.behind`).

    Every rule looks at every sample. Images, heat, masks and the list ``train`` stay as they are; a
    filtered list of the same name is replaced. ValueError for rules that would drop too much
    (``max_share``, a whole class), for a mask set that was made with other rules of action
    ``absent``, and for a list that this stage did not write.
    """
    folder = Path(folder)
    path, target = _place(folder, split), folder / _masks(mask_set)
    done = _mask_set(target, rules)
    samples, signals = _signals(folder, rules, clip)
    if done["sha256"].keys() != {s.id for s in samples}:
        raise ValueError(
            f"mask set {target} has other samples than {folder}/plan.jsonl; run generate.py "
            "stage=label again"
        )
    not_drawn, how, dropping = (
        done.get("absent", {}),
        done["identity"]["settings"],
        [r for r in rules if r.action == "drop"],
    )
    for sample, found in zip(samples, signals, strict=True):
        names = not_drawn.get(sample.id, ())
        absent = [
            i for i, name in zip(sample.class_ids, sample.classes, strict=True) if name in names
        ]
        check_mask(target / f"{sample.id}.png")
        found["mask"] = mask_signals(
            read_mask(target / f"{sample.id}.png"), sample.class_ids, absent
        )
    asked, dropped, counts = {s.id: list(s.classes) for s in samples}, {}, {}
    for rule in dropping:
        found = judge(rule, samples, signals, how.get("power"), how.get("source", "class_prompt"))
        refuse_excess(
            f"quality.rules.{rule.name}",
            samples,
            {i: asked[i] for i in found["hits"]},
            max_share,
            "drop",
        )
        counts[rule.name] = {
            **rule.settings(),
            "thresholds": found["thresholds"],
            "samples": len(found["hits"]),
        }
        for sample_id, reasons in found["hits"].items():
            dropped.setdefault(sample_id, []).extend(
                {"rule": rule.name, **reason} for reason in reasons
            )
    lost = {i: asked[i] for i in dropped}
    refuse_excess("the rules together", samples, lost, max_share, "drop")
    refuse_excess(
        "the rules together, with those that call classes absent,",
        samples,
        {**not_drawn, **lost},
        1,
        "drop",
    )
    kept = [s.id for s in samples if s.id not in dropped]
    identity = {
        "rules": {r.name: r.settings() for r in dropping},
        "max_share": max_share,
        "ids": fingerprint(kept),
        "clip": signals[0]["clip"]["by"] if any(r.signal in CLIP for r in dropping) else None,
        "mask_set": {
            "masks": _masks(mask_set),
            **done["identity"],
            "sha256": fingerprint(done["sha256"]),
        },
    }
    result = {
        "identity": identity,
        "samples": len(samples),
        "kept": len(kept),
        "rules": counts,
        "classes": {
            name: _left(name, samples, dropped)
            for name in sorted({c for s in samples for c in s.classes})
        },
        "dropped": {i: dropped[i] for i in sorted(dropped)},
        "chosen_on": merged(chosen_on, ({**labels, "what": "samples"} for labels in behind(done))),
        **made_by(),
    }
    there = read_own(path, WHOLE_FILTER) if path.is_file() else {"identity": {}}
    if differences(there["identity"], identity) or there.get("chosen_on") != result["chosen_on"]:
        write_json(path, result)
    write_split(folder, split, kept)
    return read_json(path)


def _classes(hits) -> dict[str, list[str]]:
    return {name: [hit["class"] for hit in found] for name, found in hits.items()}


def _left(name, samples, dropped) -> dict[str, int]:
    asked = [s.id for s in samples if name in s.classes]
    return {"samples": len(asked), "kept": sum(i not in dropped for i in asked)}


def _masks(mask_set) -> str:
    if mask_set in (None, "SegmentationClass"):
        return "SegmentationClass"
    return f"masks/{folder_name(mask_set, 'mask_set')}"


def _place(folder, split) -> Path:
    """Where the filter's record lies; ValueError for a list that is not ours to write."""
    folder_name(split, "quality.split")
    path = folder / "quality" / split / "filter.json"
    listed = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    if listed.exists() and not path.exists():
        raise ValueError(
            f"quality.split={split}: {listed} is a list that no filter wrote; choose another name"
        )
    return path


def _mask_set(target, rules) -> dict:
    """masks.json of a finished mask set whose absent classes are those of ``rules``."""
    if not (target / "masks.json").is_file():
        raise FileNotFoundError(
            f"mask set {target} is not finished (no masks.json); run generate.py stage=label first"
        )
    done = read_own(
        target / "masks.json", {**WHOLE_MASKS, "identity": {**MASKS["identity"], "settings": dict}}
    )
    theirs, ours = (
        done["identity"].get("absent", {}).get("rules", {}),
        [r for r in rules if r.action == "absent"],
    )
    lines = differences(theirs, {r.name: r.settings() for r in ours})
    if lines:
        raise ValueError(
            f"mask set {target} was made with other rules for absent classes (its own -> "
            "these):\n  "
            + "\n  ".join(lines)
            + "\nMake its masks with these: generate.py stage=label with the same quality; or "
            "leave a rule out: "
            "quality.rules.<name>=null"
        )
    return done


def _signals(folder, rules, clip) -> tuple[list, list[dict]]:
    """(samples, their signals): those of the records; what these lack is computed from stored
    heat and images, and kept in ``quality/records/``."""
    folder = Path(folder)
    samples, records, kept = (
        read_plan(folder),
        read_records(folder),
        read_records(folder / "quality", (*HASHES, "signals")),
    )
    missing = [s.id for s in samples if s.id not in records]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(samples)} samples are not generated yet; run "
            "generate.py first"
        )
    found, new = [], []
    with Progress("quality signals", len(samples)) as progress:
        for sample in samples:
            record, later = records[sample.id], kept.get(sample.id, {})
            later = later["signals"] if later and all(later[h] == record[h] for h in HASHES) else {}
            signals, added = _complete(folder, sample, [later, record.get("signals", {})], clip)
            found.append(signals)
            new += (
                [{"id": sample.id, **{h: record[h] for h in HASHES}, "signals": signals}]
                if added
                else []
            )
            if len(new) == PART:
                append_records(folder / "quality", "0", new)
                new = []
            progress.advance()
    if new:
        append_records(folder / "quality", "0", new)
    if any(r.signal in CLIP for r in rules):
        by = {signals["clip"]["by"] if "clip" in signals else None for signals in found}
        if None in by or len(by) > 1:
            raise ValueError(
                f"{folder}: rules on CLIP scores need those of one model for all {len(found)} "
                "samples; "
                f"{sum('clip' in s for s in found)} have scores, by {len(by - {None})} models. "
                "Give quality.clip.model"
            )
    return samples, found


def _complete(folder, sample, stored: list[dict], clip) -> tuple[dict, bool]:
    """(signals of a sample, whether some of them were computed now). With a CLIP model only its
    own scores count."""
    heat = next((s["heat"] for s in stored if "heat" in s), None)
    all_scores = [s["clip"] for s in stored if "clip" in s]
    scores = next(
        (s for s in all_scores if clip is None or s["by"] == clip.weights_sha256[:16]), None
    )
    if heat is not None and (scores is not None or clip is None):
        return {"heat": heat} | ({"clip": scores} if scores else {}), False
    if heat is None:
        heat = {
            source: heat_signals(maps) for source, maps in stored_heat(folder, sample.id).items()
        }
    if scores is None and clip is not None:
        scores = clip_signals(
            clip, read_image(synthetic_image(folder, sample.id)), sample.prompt, sample.classes
        )
    return {"heat": heat} | ({"clip": scores} if scores else {}), True


def print_counts(result: dict) -> None:
    """What each rule hit, and what is left of each class."""
    table = Table(title=f"{result['kept']} of {result['samples']} samples kept")
    for column in ("rule", "samples hit", "share"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for name, rule in result["rules"].items():
        table.add_row(
            name, str(rule["samples"]), f"{100 * rule['samples'] / result['samples']:.1f} %"
        )
    Console().print(table)
    print(
        "kept by class: "
        + ", ".join(
            f"{name} {n['kept']} of {n['samples']}" for name, n in result["classes"].items()
        )
    )
