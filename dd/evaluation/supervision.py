"""Which real labels are behind a result, what they decided, and the supervision class that
follows.

A *label set* is ``{"data": "shapes/tune", "labels": 128}``: that many labelled images of a split.
With ``"seed"`` they are a draw of it (:func:`dd.data.datasets.choose_shots`: with one seed, fewer
are contained in more); without it, they are the whole list. A *choice* is a label set with
``"what"`` was chosen by looking at it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

LabelSet = dict[str, Any]
TrainedOn = Mapping[str, Any]  # from a run.json
TRAINED = ("real", "mixed")  # sources whose real images are trained on
KEYS = {"data", "split", "labels"}
# supervision classes, the weaker first; C and D saw different things, and neither is weaker
RANKS = {"A": 0, "B": 1, "C": 2, "D": 2, "real": 3}
FORM = (
    "{data: shapes, split: tune, labels: 128} (seed: <number> too for a draw), a list of such, "
    "or null"
)


def choices(what: str, given: object) -> list[LabelSet]:
    """The choices that a ``chosen_on`` of the configuration declares for ``what``: a label set in
    the form of FORM, a list of them, or None. An empty list means a choice without a real label.
    ValueError for another form."""
    each = given if isinstance(given, list) else [] if given is None else [given]
    return [{"what": what, **_read(what, one)} for one in each]


def _read(what: str, one: object) -> LabelSet:
    if isinstance(one, dict) and KEYS <= one.keys() <= KEYS | {"seed"}:
        names = all(isinstance(one[key], str) and one[key] for key in ("data", "split"))
        numbers = type(one["labels"]) is int and type(one.get("seed", 0)) is int
        if names and numbers and one["labels"] >= 1:
            return label_set(f"{one['data']}/{one['split']}", one["labels"], one.get("seed"))
    raise ValueError(f"chosen_on of {what}: got {one!r:.200}; expected {FORM}")


def label_set(data: str, labels: int | None, seed: int | None = None) -> LabelSet:
    """``labels`` images of ``data`` ("shapes/tune"), drawn by ``seed``; None = the whole list."""
    return {"data": data, "labels": labels} | ({} if seed is None else {"seed": seed})


def declared(sets: Iterable[LabelSet]) -> list[LabelSet]:
    """Label sets in the form in which a configuration declares them, and :func:`choices` reads
    them."""
    found = []
    for one in merged([{k: v for k, v in one.items() if k != "what"} for one in sets]):
        data, _, split = one.pop("data").rpartition("/")
        found.append({"data": data, "split": split, **one})
    return found


def override(key: str, sets: Iterable[LabelSet]) -> str:
    """A Hydra override, in one word, that declares label sets instead of earlier ones."""

    def text(value: object) -> str:
        plain = re.fullmatch(r"[\w./-]+", str(value))
        return str(value) if plain else "'" + str(value).replace("'", r"\'") + "'"

    pairs = ([f"{key}:{text(value)}" for key, value in one.items()] for one in declared(sets))
    shown = ("{" + ",".join(each) + "}" for each in pairs)
    return f"++{key}=[{','.join(shown)}]"


def merged(*lists: Iterable[LabelSet] | None) -> list[LabelSet]:
    """Label sets or choices of several lists, each once, in order."""
    found: list[LabelSet] = []
    for one in (one for each in lists for one in each or ()):
        if one not in found:
            found.append(one)
    return found


def trained_labels(trained_on: TrainedOn | None) -> list[LabelSet]:
    """The label sets that were trained on: by a run itself, by the run it started from, by the
    teacher that labelled its synthetic images, and so on back. ``trained_on`` is that of
    run.json."""
    if not trained_on:
        return []
    found = []
    if trained_on["source"] in TRAINED:
        own = trained_on.get("real", trained_on)
        images, shots = own.get("images"), trained_on.get("shots")
        if type(shots) is int:
            labels, seed = shots, trained_on.get("seed")
        else:  # count what was held out of them, because it judged the run
            labels, seed = images and images + trained_on.get("hold_out", 0), None
        data = trained_on.get("data") or own.get("root")
        found.append(label_set(f"{data}/{own.get('split')}", labels, seed))
    before = [*_teachers(trained_on), trained_on.get("after")]
    return merged(found, *map(trained_labels, before))


def real_labels(trained_on: TrainedOn | None) -> list[int | str]:
    """:func:`trained_labels` as the ``shots`` of these trainings: a number, or ``all``; [] means
    none."""
    if not trained_on:
        return []
    found = [trained_on.get("shots") or "all"] if trained_on["source"] in TRAINED else []
    for teacher in _teachers(trained_on):
        found += real_labels(teacher)
    return found + real_labels(trained_on.get("after"))


def _made(trained_on: TrainedOn) -> list[Mapping[str, Any]]:
    """The identities of the mask sets of a training, including those that were joined into one."""
    parts = (trained_on, trained_on.get("synthetic", {}))
    found: list[Mapping[str, Any]] = [m for part in parts if (m := part.get("mask_settings"))]
    for masks in found:  # the list grows during the loop
        found += [one["identity"] for one in masks.get("labeler", {}).get("sets", [])]
    return found


def _teachers(trained_on: TrainedOn) -> list[TrainedOn]:
    """``trained_on`` of the runs that labelled the synthetic images of a training."""
    masks = _made(trained_on)
    return [found for m in masks if (found := m.get("teacher", {}).get("trained_on"))]


def _labeler_classes(trained_on: TrainedOn | None) -> list[str]:
    """Supervision classes of the labelers behind a training: of its own masks, and of those that
    its teachers and the run before it were trained on."""
    if not trained_on:
        return []
    named = (masks.get("labeler", {}).get("supervision") for masks in _made(trained_on))
    before = [*_teachers(trained_on), trained_on.get("after")]
    return [c for c in named if c] + [c for one in before for c in _labeler_classes(one)]


def strongest(classes: Iterable[str]) -> str:
    """The supervision class of something made from parts of these classes: the strongest, in the
    order A, B, C and D, real; ``C/D`` if both are strongest. ValueError for none, and for another
    class."""
    there = sorted({one for each in classes for one in each.split("/")})
    if not there or not set(there) <= RANKS.keys():
        raise ValueError(f"supervision classes {there}; allowed: {', '.join(RANKS)}, one at least")
    top = max(map(RANKS.__getitem__, there))
    return "/".join(one for one in there if RANKS[one] == top)


def behind(masks: Mapping[str, Any]) -> list[LabelSet]:
    """Label sets behind a mask set, from its masks.json (or the settings.json of predictions):
    those that its teacher was trained on, and those that guided a choice."""
    made = {"source": "synthetic", "mask_settings": masks.get("identity")}
    return merged(trained_labels(made), masks.get("chosen_on"))


def class_of_masks(masks: Mapping[str, Any]) -> str:
    """Supervision class of a mask set, from its masks.json: the class of a segmenter trained on it
    alone."""
    made = {"source": "synthetic", "mask_settings": masks.get("identity")}
    return supervision(made, masks.get("chosen_on") or [])


def supervision(trained_on: TrainedOn, chosen: list[LabelSet], before: str | None = None) -> str:
    """Supervision class of a run. ``chosen``: the choices behind it, including those of the runs
    and masks it builds on; ``before``: the class of the run it starts from.

    Real images alone are ``real``. ``A``: no real label chose anything; settings are published
    constants or were chosen without labels. Fine-tuning with real images keeps the class of its
    synthetic start, because the class says what made the synthetic images (``trained_on`` says how
    many real ones followed); if its own settings were chosen by labels, A becomes ``B``. Other runs
    are ``real`` if whole splits of real masks were trained on anywhere. Else they have the class of
    the labelers that made their masks (``D``: a foundation model), and at least ``B`` if a number
    of real masks was trained on or a label chose anything."""
    if trained_on["source"] == "real":
        return "B" if before == "A" and chosen else before or "real"
    trained = real_labels(trained_on)
    own = "real" if "all" in trained else "B" if trained or chosen else "A"
    return strongest([own, *_labeler_classes(trained_on)])


def distinct(sets: Iterable[LabelSet]) -> int | None:
    """How many labelled images ``sets`` hold together, each counted once. A whole list contains its
    draws; with one seed the larger draw contains the smaller; draws of different seeds are counted
    as disjoint. None if a number is not known."""
    by_data: dict[str, dict[int | None, int]] = {}
    for one in sets:
        draws = by_data.setdefault(one["data"], {})
        if one["labels"] is None:
            return None
        draws[one.get("seed")] = max(draws.get(one.get("seed"), 0), one["labels"])
    return sum(draws.get(None) or sum(draws.values()) for draws in by_data.values())


def told(sets: Iterable[LabelSet]) -> str:
    """Choices or label sets in words: "128 labels of a/tune (masks, learning_rate), 64 of
    a/train"."""
    by_set: dict[tuple[str, int | None, int | None], dict[str, None]] = {}
    for one in sets:
        what = by_set.setdefault((one["data"], one["labels"], one.get("seed")), {})
        what |= dict.fromkeys([one["what"]] if "what" in one else [])
    parts: list[str] = []
    for (data, labels, _), what in by_set.items():
        number = f"{'all' if labels is None else labels}{'' if parts else ' labels'}"
        parts.append(f"{number} of {data}" + (f" ({', '.join(what)})" if what else ""))
    return ", ".join(parts)
