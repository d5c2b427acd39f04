"""What a training run is: its arm, its recipe, its seed, the draw of its synthetic images; read
from run.json alone.

Runs are seeds of one recipe only if everything is equal but the seed and what follows from it: the
images drawn or held out by it, the weights of the same seed that it goes on from, masks that a run
or a few images of the same seed made. Names of folders, and what a setting was chosen on, are no
part of a recipe.
What cannot be told is left in: a recipe is rather split in two than two are pooled.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dd.report.origins import flatten
from dd.store.provenance import fingerprint

ARMS = {
    "synthetic_only": "synthetic only",
    "self_training": "synthetic, self-training",
    "finetuned": "synthetic, then {k} real",
    "mixed": "synthetic and {k} real",
    "real_only": "{k} real only",
    "other": "{chain}",
}
NO_RECIPE = ("seed", "init_from_sha256")  # the second one is said by the run before
SHOWN = 3  # settings that name a recipe; more are counted
FIRST = ("rate", "step", "steps", "images")  # what a name says first
ABSENT = object()

Run = dict[str, Any]  # a run.json
Entry = dict[str, Any]  # of a finished run, see dd.report.summary.collect
Json = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """``settings``: all that is the same in its seeds, nested. ``steps``: optimiser steps in total,
    those of the runs before counted; None if these are not at hand. ``shots`` (a number or "all")
    and ``shots_from`` (a data set) are None without real images. ``draw``: seed of the synthetic
    set, None where it is not known or there is none."""

    arm: str
    words: str
    segmenter: str
    settings: Json
    seed: int | None
    draw: Any
    shots: str | None
    shots_from: str | None
    steps: int | None
    photographs: tuple[str, ...]

    @property
    def key(self) -> str:
        """Equal for the seeds of one recipe."""
        return fingerprint([self.arm, self.segmenter, self.shots_from, self.settings])

    @property
    def group(self) -> tuple[Any, ...]:
        """Recipes of one group differ in settings alone: they are told apart by these."""
        return self.segmenter, self.arm, self.words, self.shots, self.shots_from, self.photographs


def weights_of(run: Run) -> str | None:
    """The hash by which other runs name the weights of ``run``, a run.json."""
    return run.get("weights_sha256")


def unknown(data: Json) -> Run | None:
    """No synthetic set is at hand."""
    return None


def recipe(
    run: Run,
    runs: Mapping[str | None, list[Run]] | None = None,
    sets: Callable[[Json], Run | None] = unknown,
) -> Recipe:
    """The recipe of ``run``, a run.json. ``runs``: {hash of weights: their run.json} of those that
    it may go on from; ``sets(synthetic part of trained_on)``: run.json of that set, if at hand."""
    data, reader = run["trained_on"], _Reader(runs or {}, sets)
    settings = without_choices(reader.settings(run))
    draws = sorted({str(d): d for d in reader.draws}.items())
    shots, arm = None if data.get("shots") is None else str(data["shots"]), arm_of(data)
    return Recipe(
        arm,
        ARMS[arm].format(k=_number(data), chain=chain(data)),
        segmenter_name(run["segmenter"]),
        settings,
        data.get("seed"),
        draws[0][1] if len(draws) == 1 else tuple(d for _, d in draws) or None,
        shots,
        data.get("data", data.get("root")) if shots else None,
        reader.total(run),
        tuple(unlabelled_steps(data)),
    )


def without_choices(settings: Any) -> Any:
    """Nested settings without what they were chosen on, which changes no training."""
    if not isinstance(settings, dict):
        return settings
    return {k: without_choices(v) for k, v in settings.items() if k != "chosen_on"}


class _Reader:
    """Settings of a run and of those before it; ``draws``: seeds of the synthetic sets on the
    way."""

    def __init__(
        self, runs: Mapping[str | None, list[Run]], sets: Callable[[Json], Run | None]
    ) -> None:
        self.runs, self.sets = runs, sets
        self.draws: list[Any] = []

    def find(self, weights: str | None, trained_on: Json) -> Run | None:
        """The run of these weights. That it was trained on ``trained_on`` too keeps a training that
        changes nothing from being the one before itself."""
        found = [r for r in self.runs.get(weights, ()) if r["trained_on"] == trained_on]
        return min(found, key=fingerprint, default=None) if weights else None

    def before(self, run: Run) -> Run | None:
        after = run["trained_on"].get("after")
        return after and self.find((run.get("identity") or {}).get("init_from_sha256"), after)

    def total(self, run: Run) -> int | None:
        own, before = _steps(run), self.before(run)
        if run["trained_on"].get("after") is None or own is None:
            return own
        steps = None if before is None else self.total(before)
        return None if steps is None else own + steps

    def settings(self, run: Run) -> Json:
        identity = run.get("identity") or {}
        found = {k: v for k, v in identity.items() if k not in (*NO_RECIPE, "trained_on")}
        if "trainer" in found:
            found["trainer"] = {k: v for k, v in found["trainer"].items() if k != "max_steps"}
        found |= {"steps": _steps(run), "trained_on": self.data(run["trained_on"])}
        if (after := run["trained_on"].get("after")) is not None:
            earlier = self.before(run)
            found["before"] = self.settings(earlier) if earlier else self.history(after)
            found["before"] |= _other_seed(after, run["trained_on"])
        return found

    def history(self, trained_on: Json) -> Json:
        """What is known of a run that is not at hand."""
        found: Json = {"trained_on": self.data(trained_on)}
        if after := trained_on.get("after"):
            found["before"] = {**self.history(after), **_other_seed(after, trained_on)}
        return found

    def data(self, trained_on: Json) -> Json:
        by_seed = trained_on.get("shots") not in (None, "all") or "hold_out" in trained_on
        parts = ("seed", "after", "real", "synthetic")
        found = {k: v for k, v in trained_on.items() if k not in parts}
        if trained_on["source"] == "synthetic":
            return self.synthetic(found, trained_on)
        if trained_on["source"] == "mixed":
            found["synthetic"] = self.synthetic(trained_on["synthetic"], trained_on)
            found["real"] = _real(trained_on["real"], by_seed, named="data" in trained_on)
            return found
        return _real(found, by_seed, named="data" in trained_on)

    def synthetic(self, data: Json, trained_on: Json) -> Json:
        """A synthetic set with its masks: by how both were made where that is known, else by name.
        ``trained_on``: of the run, whose seed that of a teacher or a calibration follows."""
        made, found = self.sets(data), {k: v for k, v in data.items() if k != "filter"}
        masks, chosen = data.get("mask_settings") or {}, data.get("filter") or {}
        if masks:
            found |= {"mask_settings": self.masks(masks, trained_on)}
            found.pop("masks", None)
        if "rules" in chosen:
            found |= {"filter": {k: v for k, v in chosen.items() if k not in ("ids", "mask_set")}}
            found.pop("images", None)  # as many as the rules leave
        elif chosen:
            found["filter"] = chosen
        if made is not None:
            self.draws.append(made["identity"].get("seed"))
            found["images_made"] = _synthesis(made)
            found["mask_settings"] = {
                k: v for k, v in found["mask_settings"].items() if k not in ("heat", "images")
            }
            found.pop("root", None)
        if made is not None or "hold_out" in data or "rules" in chosen or _by_seed(masks):
            found.pop("content", None)
            found.pop("drawn_from", None)
        return found

    def masks(self, masks: Json, trained_on: Json) -> Json:
        found = dict(masks)
        if "absent" in found:
            found["absent"] = {k: v for k, v in found["absent"].items() if k != "classes"}
        if teacher := masks.get("teacher"):
            run = self.find(weights_of(teacher), teacher["trained_on"])
            known = self.settings(run) if run else self.history(teacher["trained_on"])
            found["teacher"] = {**known, **_other_seed(teacher["trained_on"], trained_on)}
        if labeler := masks.get("labeler"):
            found["labeler"] = self.labeler(labeler, trained_on)
        if calibration := masks.get("calibration"):
            results = ["ids", "without_object", "generator", "reference"]
            same_seed = calibration.get("seed") == trained_on.get("seed")
            if same_seed or calibration.get("shots") in (None, "all"):
                results.append("seed")
            given = {k: v for k, v in calibration.items() if not k.startswith("miou")}
            kept = {k: v for k, v in given.items() if k not in results}
            if reference := calibration.get("reference"):
                nested = isinstance(reference, dict)
                kept["reference"] = self.masks(reference, trained_on) if nested else reference
            found["calibration"] = kept
            if _by_seed(masks):
                found.pop("settings", None)  # the choice of these images
        return found

    def labeler(self, labeler: Json, trained_on: Json) -> Json:
        """A labeler without what is of these images alone: given masks, those that it joined."""
        found = {k: v for k, v in labeler.items() if k not in ("content", "sets")}
        if sets := labeler.get("sets"):
            parts = [self.masks(one["identity"], trained_on) for one in sets]
            kept = [{k: v for k, v in m.items() if k not in ("heat", "images")} for m in parts]
            found["sets"] = kept
        return found


def _steps(run: Run) -> int | None:
    return run.get("steps", (run.get("identity") or {}).get("trainer", {}).get("max_steps"))


def _other_seed(earlier: Json, trained_on: Json) -> Json:
    """{"seed": that of an earlier run} where it is not the run's own. Runs that share one start, or
    one teacher, are not as many independent seeds as they have seeds of their own."""
    seeds = [data.get("seed") for data in (earlier, trained_on)]
    return {} if None in seeds or seeds[0] == seeds[1] else {"seed": seeds[0]}


def _real(data: Json, by_seed: bool, named: bool) -> Json:
    left_out = ("content",) * by_seed + ("root",) * named
    return {k: v for k, v in data.items() if k not in left_out}


def _by_seed(masks: Json) -> bool:
    """Whether masks differ from seed to seed because other images or other runs decided them."""
    calibration = masks.get("calibration") or {}
    sets = masks.get("labeler", {}).get("sets", [])
    if "content" in masks.get("labeler", {}) or any(_by_seed(one["identity"]) for one in sets):
        return True
    return "teacher" in masks or calibration.get("shots") not in (None, "all")


def _synthesis(made: Run) -> Json:
    """How a synthetic set was made, but for its seed. Its plan follows from the seed and from what
    prompts are drawn from; a set that does not tell the latter stands for itself."""
    found = {k: v for k, v in made["identity"].items() if k not in ("seed", "plan_sha256")}
    if drawn_from := made.get("prompts_sha256"):
        return {**found, "prompts": drawn_from}
    return {**found, "plan_sha256": made["identity"].get("plan_sha256")}


# ------------------------------------------------------------------------------------------ arms


def unlabelled_steps(trained_on: Json | None) -> list[str]:
    """What a run, and those that it goes on from, learnt from photographs without labels; the first
    step first."""
    if not trained_on:
        return []
    here = ["self-training on photographs"] if trained_on.get("self_training") else []
    return [*unlabelled_steps(trained_on.get("after")), *here]


def _number(trained_on: Json) -> str:
    """How many real images, in words: ``16``, ``all``, or ``92 of 92.txt`` for those of a list."""
    listed = trained_on.get("shots_list")
    return f"{trained_on.get('shots') or 'all'}" + (f" of {listed['file']}" if listed else "")


def _stages(trained_on: Json | None) -> list[tuple[str, str]]:
    """(kind, words) of what a run and those before it were trained on, the first one first."""
    if not trained_on:
        return []
    earlier, source = _stages(trained_on.get("after")), trained_on["source"]
    k = _number(trained_on)
    if source == "synthetic":
        here = ("synthetic", "synthetic")
        if teacher := (trained_on.get("mask_settings") or {}).get("teacher"):
            taught = _stages(teacher["trained_on"])
            here = ("self_training", "synthetic, self-training")
            if any(kind not in ("synthetic", "self_training") for kind, _ in taught):
                here = (
                    "taught",
                    f"synthetic with masks of a run on {', then '.join(w for _, w in taught)}",
                )
    else:
        here = {"real": ("real", f"{k} real"), "mixed": ("mixed", f"synthetic and {k} real")}[
            source
        ]
    return earlier if earlier[-1:] == [here] == [("synthetic", "synthetic")] else [*earlier, here]


def arm_of(trained_on: Json) -> str:
    """A key of ARMS: what a run was trained on, in which order."""
    kinds = [kind for kind, _ in _stages(trained_on)]
    plain = {
        ("synthetic",): "synthetic_only",
        ("self_training",): "self_training",
        ("synthetic", "real"): "finetuned",
        ("mixed",): "mixed",
        ("real",): "real_only",
    }
    return plain.get(tuple(kinds), "other")


def chain(trained_on: Json) -> str:
    """What a run and those before it were trained on: "all real, then 8 real"."""
    return ", then ".join(words for _, words in _stages(trained_on))


def segmenter_name(settings: Json) -> str:
    """A run's segmenter as tables name it: "DeepLabV3 R101", "Mask2Former R50", "SegFormer B0",
    "EoMT Base"."""
    kind = settings["_target_"].rsplit(".", 1)[1]
    if kind == "Mask2Former":
        return f"Mask2Former R{settings.get('depth', 50)}"
    if "depth" in settings:
        return f"{kind} R{settings['depth']}"
    parts = [
        str(settings[k]).capitalize() if k == "size" else settings[k]
        for k in ("size", "config")
        if k in settings
    ]
    return " ".join([kind, *parts])


# ----------------------------------------------------------------------------------------- names


def leaves(settings: Json) -> frozenset[tuple[str, str]]:
    """Single settings with their values."""
    return frozenset(flatten(settings).items())


def telling(settings: Json, other: Json) -> list[str]:
    """What ``settings`` have that ``other`` have not, in words: ["rate 1e-5", "2 steps"]."""
    found = [_words(*pair) for pair in _differences(settings, other, ())]
    there = [words for words, present in found if present]
    order = {word: place for place, word in enumerate(FIRST)}
    chosen = there or [words for words, _ in found]
    return sorted(
        dict.fromkeys(chosen),
        key=lambda w: min((order.get(part, 9) for part in w.split()), default=9),
    )


def _differences(
    own: Json, other: Json, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key in sorted(own.keys() | other.keys()):
        a, b = own.get(key, ABSENT), other.get(key, ABSENT)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, (*path, key))
        elif a is ABSENT or b is ABSENT or a != b:
            yield (*path, key), a


def _words(path: tuple[str, ...], value: Any) -> tuple[str, bool]:
    """(a setting and its value in words, whether there is one)."""
    *groups, key = path
    before = "before it " * groups.count("before")
    if value is ABSENT:
        return f"{before}no {key}", False
    if key == "before":
        return f"{before}goes on from another run", True
    if key in ("content", "heat", "ids", "sha256", "plan_sha256"):
        return (
            f"{before}other "
            f"{'images or masks' if key == 'content' else key.removesuffix('_sha256')}",
            True,
        )
    if isinstance(value, dict):
        return before + key, True
    text = _value(value)
    plain = {
        "learning_rate": f"rate {text}",
        "steps": f"{text} step{'s' * (text != '1')}",
        "images": f"{text} images",
        "batch_size": f"batch {text}",
    }
    return before + plain.get(key, f"{key}={text}"), True


def _value(value: Any) -> str:
    if value is None or value is False:
        return "off"
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def named(settings: Mapping[str, Json], lead: str) -> dict[str, str]:
    """{key: what tells this recipe from the ``lead``'s}, "" for the lead; no two are the same."""
    told = {key: telling(s, settings[lead]) for key, s in settings.items() if key != lead}
    short = {}
    for key, words in told.items():
        more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
        short[key] = ", ".join(words[:SHOWN]) + more
    for key in told:
        if list(short.values()).count(short[key]) > 1 or not short[key]:
            whole = ", ".join(told[key])
            alike = [k for k in told if ", ".join(told[k]) == whole]
            short[key] = whole if whole and len(alike) == 1 else f"{whole or 'recipe'} ({key[:6]})"
    return {lead: "", **short}
