"""Rates synthetic samples: signals of their heat, mask and (with a CLIP model) image, and rules on
these signals.

Min-max makes a class that was never drawn as strong as one that was (see
:mod:`dd.masks.from_heat`), so the signals of the heat are taken *before* min-max. Shape letters: K
classes of a sample, P powers, N cells of a heat map, T texts, D width of an embedding.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dd.store.samples import Sample
from dd.taxonomy import IGNORE

HEAT = ("peak", "spread", "entropy", "area")  # of each class and power
CLIP = {"clip": "prompt", "clip_class": "classes"}  # signal: where a record keeps it
MASK = ("share", "uncertain", "foreground", "missing")
PER_CLASS = (*HEAT, "clip_class", "share")  # the others are one number per sample
BOUNDS = ("below", "above", "below_percentile", "above_percentile")
DTYPES = ("float32", "float16", "bfloat16")


class Scores(Protocol):
    """What compares an image with texts, like :class:`ClipScore`."""

    weights_sha256: str

    def __call__(self, image: np.ndarray, texts: list[str]) -> list[float]: ...


# ------------------------------------------------------------------------------------------ signals


def heat_signals(maps: np.ndarray) -> dict[str, list[list[float]]]:
    """{signal: [K][P]} of stored heat [K, P, r, r]: ``peak`` = max; ``spread`` = max - min, what
    min-max stretches to 1; ``entropy`` of the map as a distribution, from 0 (one cell) to 1
    (flat); ``area`` = share of the cells with at least half of the peak. Six significant digits."""
    heat_KPN = np.asarray(maps, np.float64).reshape(*np.shape(maps)[:2], -1)
    peak, mass_KPN = heat_KPN.max(-1), heat_KPN.clip(0)
    cells, total = heat_KPN.shape[-1], mass_KPN.sum(-1, keepdims=True)
    part_KPN = np.divide(mass_KPN, total, out=np.full_like(mass_KPN, 1 / cells), where=total > 0)
    logs_KPN = np.log(part_KPN, out=np.zeros_like(part_KPN), where=part_KPN > 0)
    found = {
        "peak": peak,
        "spread": peak - heat_KPN.min(-1),
        "entropy": -(part_KPN * logs_KPN).sum(-1) / np.log(cells),
        "area": (heat_KPN >= peak[..., None] / 2).mean(-1),
    }
    return {
        name: [[float(f"{v:.6g}") for v in row] for row in values.tolist()]
        for name, values in found.items()
    }


def signals_by_source(heat: Mapping[str, np.ndarray]) -> dict[str, dict[str, list[list[float]]]]:
    """:func:`heat_signals` of each source; one of a single cell holds numbers, and no map."""
    return {source: heat_signals(maps) for source, maps in heat.items() if maps.shape[-1] > 1}


def mask_signals(
    mask: np.ndarray, class_ids: Iterable[int], absent: Collection[int] = ()
) -> dict[str, Any]:
    """Signals of a mask uint8 [H, W]. ``uncertain`` and ``foreground``: shares of the pixels that
    are 255 and that have a class; ``share``: of each of ``class_ids``, None for those in ``absent``
    (class ids that were not drawn); ``missing``: number of the others without a pixel."""
    share = [None if i in absent else float((mask == i).mean()) for i in class_ids]
    return {
        "uncertain": float((mask == IGNORE).mean()),
        "foreground": float(((mask != 0) & (mask != IGNORE)).mean()),
        "share": share,
        "missing": share.count(0.0),
    }


def clip_signals(
    clip: Scores, image: np.ndarray, prompt: str, classes: Iterable[str]
) -> dict[str, Any]:
    """Scores of an image for its prompt and for "a photo of a <class>" of each class; ``by``: the
    model."""
    scores = clip(image, [prompt, *(f"a photo of a {name}" for name in classes)])
    return {"by": clip.weights_sha256[:16], "prompt": scores[0], "classes": scores[1:]}


def sample_signals(
    sample: Sample,
    heat: Mapping[str, np.ndarray],
    clip: Scores | None = None,
    image: np.ndarray | None = None,
) -> dict[str, Any]:
    """The signals in a sample's record: of each source of its heat, and of its image if there is a
    CLIP model."""
    found: dict[str, Any] = {"heat": signals_by_source(heat)}
    if clip is not None:
        assert image is not None, "a CLIP model needs the image"
        found["clip"] = clip_signals(clip, image, sample.prompt, sample.classes)
    return found


# -------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    """What happens to samples whose signal lies beyond a bound: ``action`` drop, or absent (the
    class is not drawn).

    Exactly one bound is given, as a number (``below``, ``above``) or as a percentile over the
    samples with the same class (``below_percentile``, ``above_percentile``; over all samples for a
    signal that is one number per sample). A signal that exists for each class drops a sample if one
    of its classes is beyond the bound. ``power`` of the heat: None = that of the masks.
    """

    name: str
    action: str
    signal: str
    below: float | None = None
    above: float | None = None
    below_percentile: float | None = None
    above_percentile: float | None = None
    power: int | None = None

    def __post_init__(self) -> None:
        where, possible = f"quality.rules.{self.name}", (*HEAT, "clip_class")
        if self.action not in ("drop", "absent"):
            raise ValueError(
                f"{where}.action={self.action!r}; "
                "allowed: drop (the sample), absent (the class is not drawn)"
            )
        if self.signal not in (*HEAT, *CLIP, *MASK):
            raise ValueError(
                f"{where}.signal={self.signal!r}; allowed: {', '.join((*HEAT, *CLIP, *MASK))}"
            )
        if self.action == "absent" and self.signal not in possible:
            raise ValueError(
                f"{where}: {self.signal} is not known of a class before the masks are drawn; "
                f"a class is called absent by one of {', '.join(possible)}"
            )
        given = {b: getattr(self, b) for b in BOUNDS if getattr(self, b) is not None}
        if len(given) != 1 or type(next(iter(given.values()))) not in (int, float):
            raise ValueError(
                f"{where} needs one number for one of {', '.join(BOUNDS)}; got {given or 'none'}"
            )
        (kind, value), power = next(iter(given.items())), self.power
        if kind.endswith("percentile") and not 0 < value < 100:
            raise ValueError(f"{where}.{kind}={value}: expected a percentile between 0 and 100")
        if power is not None and (self.signal not in HEAT or type(power) is not int or power < 0):
            raise ValueError(
                f"{where}.power={power!r}: expected a stored power, 0, 1, ..., for one of "
                f"{', '.join(HEAT)}"
            )

    def settings(self) -> dict[str, Any]:
        """As in YAML, without settings that are not given."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "name"}

    @property
    def bound(self) -> tuple[str, float]:
        """The bound that is given: (its kind, the number)."""
        return next((kind, v) for kind in BOUNDS if (v := getattr(self, kind)) is not None)

    def threshold(self, values: list[float]) -> float:
        """The number that ``values`` of one class are compared with."""
        kind, number = self.bound
        return float(np.percentile(values, number) if kind.endswith("percentile") else number)

    def meets(self, value: float, threshold: float) -> bool:
        return value < threshold if self.bound[0].startswith("below") else value > threshold


def read_rules(given: Mapping[str, Any]) -> list[Rule]:
    """Rules by name as in YAML; a rule that is null is left out. ValueError names an invalid key or
    value."""
    known = {field.name for field in fields(Rule)} - {"name"}
    rules = {name: rule for name, rule in given.items() if rule is not None}
    for name, rule in rules.items():
        if not isinstance(rule, dict) or not {"action", "signal"} <= rule.keys() <= known:
            raise ValueError(
                f"quality.rules.{name}={rule!r}: expected action, signal and a bound; "
                f"keys: {sorted(known)}"
            )
    return [Rule(str(name), **rule) for name, rule in rules.items()]


def judge(
    rule: Rule,
    samples: Sequence[Sample],
    signals: Sequence[Mapping[str, Any]],
    power: int | None = None,
    source: str = "class_prompt",
) -> dict[str, Any]:
    """{"thresholds": {class, or "all": number}, "hits": {sample id: [{"class", "value",
    "threshold"}]}} of a rule.

    ``signals``: of each sample, with ``heat``, ``clip`` and ``mask`` if the rule needs them;
    ``power`` and ``source`` are those of the masks. A value of None is never beyond a bound.
    """
    values: dict[str, list[float]] = defaultdict(list)
    pairs: list[tuple[Sample, list[tuple[str, float]]]] = []
    for sample, found in zip(samples, signals, strict=True):
        stored = _values(rule, found, power, source)
        per_class = rule.signal in PER_CLASS
        own = zip(sample.classes, stored, strict=True) if per_class else [("all", stored)]
        pairs.append((sample, [(name, value) for name, value in own if value is not None]))
        for name, value in pairs[-1][1]:
            values[name].append(value)
    bounds = {name: rule.threshold(given) for name, given in values.items()}
    hits = {
        sample.id: [
            {"class": name, "value": value, "threshold": bounds[name]}
            for name, value in known
            if rule.meets(value, bounds[name])
        ]
        for sample, known in pairs
    }
    return {"thresholds": bounds, "hits": {name: beyond for name, beyond in hits.items() if beyond}}


def _values(rule: Rule, found: Mapping[str, Any], power: int | None, source: str) -> Any:
    """The signal of a sample: a number, or one for each of its classes."""
    if rule.signal in MASK:
        return found["mask"][rule.signal]
    if rule.signal in CLIP:
        return found["clip"][CLIP[rule.signal]]
    power = power if rule.power is None else rule.power
    if power is None:
        raise ValueError(
            f"quality.rules.{rule.name}: these masks were not made from heat; "
            "give the power, as .power=0"
        )
    stored = found["heat"][source][rule.signal]
    if power >= len(stored[0]):
        raise ValueError(
            f"quality.rules.{rule.name}: power {power} is not stored, "
            f"powers 0 to {len(stored[0]) - 1} are"
        )
    return [powers[power] for powers in stored]


def refuse_excess(
    what: str,
    samples: Sequence[Sample],
    lost: Mapping[str, list[str]],
    max_share: float,
    action: str,
) -> None:
    """ValueError with the numbers if ``lost`` ({sample id: classes}) is more than ``max_share`` of
    the samples (action drop) or of the classes asked for (absent), or every image of a class."""
    if type(max_share) not in (int, float) or not 0 < max_share <= 1:
        raise ValueError(f"quality.max_share={max_share!r}: expected a share above 0 and up to 1")
    asked = Counter(name for sample in samples for name in sample.classes)
    gone = Counter(name for names in lost.values() for name in names)
    number, total, unit = len(lost), len(samples), "samples"
    if action == "absent":
        number, total, unit = gone.total(), asked.total(), "classes that were asked for"
    counts = ", ".join(f"{name} {n} of {asked[name]}" for name, n in sorted(gone.items()))
    whole = sorted(name for name in asked if gone[name] == asked[name])
    if number > max_share * total or whole:
        every = f"and with them every image of {', '.join(whole)}"
        raise ValueError(
            f"{what} would take out {number} of {total} {unit} ({100 * number / total:.0f} %), "
            f"{every if whole else f'more than quality.max_share={max_share:g}'}. "
            f"Images by class: {counts}. Nothing was changed; choose a milder bound"
        )


# --------------------------------------------------------------------------------------------- CLIP


class ClipScore:
    """``clip(image, texts)`` -> 100 · max(cosine, 0) of an image uint8 [H, W, 3] and each text, as
    torchmetrics' CLIPScore.

    ``model``: a local folder or a hub id (with ``revision``) of a CLIP of transformers; safetensors
    only, no code from its repository. A text longer than the encoder reads is cut.
    FileNotFoundError or ValueError say what is wrong with the model.
    """

    def __init__(
        self, model: str, revision: str | None = None, dtype: str = "float32", device: str = "cpu"
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"quality.clip.dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
        _check_folder(model)
        # commands that have rules and no CLIP start without them
        import torch
        import transformers

        from dd.store.checkpoints import weights_sha256

        transformers.utils.logging.disable_progress_bar()  # a bar for loading a few files
        where = {"revision": revision, "trust_remote_code": False}
        try:
            kind = transformers.AutoConfig.from_pretrained(model, **where).model_type
            if kind != "clip":
                raise ValueError(f"it is a model of type {kind!r}, expected clip")
            self.processor = transformers.AutoImageProcessor.from_pretrained(
                model, backend="pil", **where
            )
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, **where)
            self.model, loading = transformers.CLIPModel.from_pretrained(
                model,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
                **where,
            )
            if lacking := len(loading["missing_keys"]):
                raise ValueError(f"its weights lack {lacking} of CLIP's; is it half of a CLIP?")
        except (OSError, ValueError) as error:
            what = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"quality.clip.model={model!r} could not be loaded: {what[0]}\n"
                "A hub id needs a network (or a filled cache) and a quality.clip.revision with "
                "safetensors weights; without a network give the folder of a copy"
            ) from None
        self.model.to(device).eval()
        self.weights_sha256 = weights_sha256(self.model.state_dict())

    def __call__(self, image: np.ndarray, texts: list[str]) -> list[float]:
        import torch

        with torch.no_grad():
            return self._scores(image, texts)

    def _scores(self, image: np.ndarray, texts: list[str]) -> list[float]:
        import torch

        pixels = self.processor(
            images=[image], return_tensors="pt", input_data_format="channels_last"
        )["pixel_values"]
        longest = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        read = {k: words[k].to(self.model.device) for k in ("input_ids", "attention_mask")}
        seen = pixels.to(self.model.device, self.model.dtype)
        image_1D = self.model.get_image_features(pixel_values=seen).pooler_output.float()
        text_TD = self.model.get_text_features(**read).pooler_output.float()
        scores_T = (100 * torch.cosine_similarity(image_1D, text_TD)).clamp_min(0)
        return [round(v, 4) for v in scores_T.tolist()]


def _check_folder(model: str) -> None:
    folder = Path(model)
    if not folder.exists() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise FileNotFoundError(
            f"quality.clip.model={model!r}: no such folder. Give a local folder in transformers "
            "format or a hub id such as openai/clip-vit-large-patch14"
        )
    if folder.exists() and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"quality.clip.model={model!r} holds no safetensors weights (*.safetensors); "
            "pickles can run code when loaded"
        )
