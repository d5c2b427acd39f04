"""From heat maps to masks with an uncertainty band (Dataset Diffusion, section on mask generation).

Shape letters: K classes of a sample, P powers, r side of the heat map, H W image size; C classes of
the taxonomy with background, S settings.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, model_validator

from dd.masks.chain import OWN, WORDS, Heat, Scored, Step, parse, run, sources
from dd.masks.presence import NUMBERS
from dd.store.settings import Natural, Settings
from dd.taxonomy import IGNORE

# How a generator's attention is read; identities leave defaults out. Mask settings that were chosen
# for one reading do not fit another.
READING: dict[str, Any] = {
    "cross_resolution": None,
    "self_resolution": None,
    "cross_layers": None,
    "cross_heads": None,
    "self_layers": None,
    "pool": 1,
    "reading": "sampling",
    "read_at": [100],
    "read_draws": 1,
    "mirror": False,
    "head_weights": False,
    "layer_weights": None,
    "background_words": None,
    "word_errors": None,
    "class_forward": False,
    "capture_every": 1,
}
# The words at which attention is read: those of the class prompt, which is encoded by itself; in
# the prompt that the image is drawn from (the full prompt), the appended words or the caption's
# own; or those of the class prompt after drawing, where both are stored.
Source = Literal["class_prompt", "full_prompt_appended", "full_prompt_caption", "after"]
SOURCES: tuple[Source, ...] = get_args(Source)
APPLIED = {"threshold": 1.0, "band": 0.0}  # settings that are applied to scores, not part of them
# The chain of the paper.
PAPER = parse(
    [
        {"propagate": "power"},
        {"normalise": "min_max"},
        {"threshold": "fixed"},
        {"uncertain": "band"},
    ]
)
Stored: TypeAlias = Heat | Mapping[str, Heat]  # of one source, or by source
Steps = Annotated[tuple[Step, ...], BeforeValidator(parse)]


def how_read(generator: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a generator's identity that concerns :data:`READING`."""
    return {key: generator.get(key, default) for key, default in READING.items()}


class MaskSettings(Settings):
    """How heat becomes a mask. Defaults are the paper's: power 4, class from 0.6, uncertain from
    0.5 to 0.6.

    ``power``: exponent of the self-attention; ``threshold``: a pixel gets its strongest class if
    that reaches the threshold; ``band``: a pixel less than ``band`` below the threshold is
    uncertain (255), further below it is background; ``source``: the words that are read
    (``SOURCES``), ``class_prompt`` or, for ablations, others; ``steps``: the chain from heat to
    mask (:mod:`dd.masks.chain`).
    """

    noun = "masks"

    power: Natural = 4
    threshold: Annotated[float, Gt(0), Le(1)] = 0.6
    band: Annotated[float, Ge(0), Lt(1)] = 0.1
    source: Source = "class_prompt"
    steps: Steps = PAPER

    @model_validator(mode="after")
    def _band_below_threshold(self) -> Self:
        if self.band >= self.threshold:
            raise ValueError(
                f"masks.band={self.band}: expected less than masks.threshold={self.threshold}"
            )
        return self

    @property
    def sources(self) -> list[str]:
        """The sources of heat that are read."""
        return sources(self.steps, self.source)

    @property
    def one_power(self) -> bool:
        """Whether the chain reads ``power``, and not a mixture or choice of powers."""
        return any(step.name == "power" for step in self.steps)

    @property
    def refined(self) -> bool:
        """Whether masks follow the edges of the image, and so need the image."""
        return any(step.place == "refine" for step in self.steps)

    @property
    def edges(self) -> tuple[float, float]:
        """The scores from which a pixel gets its strongest class, and from which it is not
        background, if one threshold and the band decide."""
        band = self.band if any(step.name == "band" for step in self.steps) else 0.0
        return self.threshold, self.threshold - band

    def certain(self) -> Self:
        """The same without uncertain pixels: they become background, or their strongest class."""
        decided = [step for step in self.steps if step.place != "uncertain"]
        return self.model_copy(update={"steps": tuple(decided), "band": 0.0})

    @property
    def on_edges(self) -> bool:
        """Whether threshold and band alone decide (:attr:`edges`)."""
        last = [step for step in self.steps if step.place in ("threshold", "uncertain")]
        return all(step.name in ("fixed", "band") for step in last)

    def identity(self) -> dict[str, Any]:
        """For the paper's chain, its settings; for another chain, its steps and the settings that
        they read."""
        known = super().identity()
        if self.steps == PAPER:
            del known["steps"]
            return known
        read = {OWN[step.name] for step in self.steps if step.name in OWN}
        unread = set(OWN.values()) - read
        known["steps"] = [step.plain() for step in self.steps]
        return {key: value for key, value in known.items() if key not in unread}


def check_stored(heat: Stored, settings: MaskSettings) -> None:
    """ValueError for settings that need heat that is not stored."""
    if isinstance(heat, Mapping):
        missing = [name for name in settings.sources if name not in heat]
        if missing:
            groups = sorted({int(name.partition("@")[2]) for name in missing if "@" in name})
            how = f"diffusion.cross_groups={groups}" if groups else "diffusion.reading=both"
            if WORDS in missing:
                how = "diffusion.background_words=[ground,sky]"
            if any(name in NUMBERS for name in missing):
                how = "diffusion.word_errors=[200,400,600,800,900]"
            raise ValueError(
                f"masks.steps: {', '.join(missing)} is not stored in this data set: it holds "
                f"{', '.join(heat)}. Draw it again, or read it again (stage=read), with {how}"
            )
    first = heat[settings.sources[0]] if isinstance(heat, Mapping) else heat
    powers = np.asarray(first).shape[1]
    if settings.one_power and settings.power >= powers:
        raise ValueError(
            f"masks.power={settings.power} is not stored in this data set: it holds powers 0 to "
            f"{powers - 1}. Choose one of them, or generate with a larger diffusion.max_power"
        )


def scored(
    heat: Stored,
    settings: MaskSettings,
    size: tuple[int, int],
    image: np.ndarray | None = None,
) -> Scored:
    """Scores of an image at its ``size`` (H, W), by the settings' chain. ``heat``: by source, or of
    the settings' own source alone; ``image``: uint8 [H, W, 3], needed if the settings are
    ``refined``."""
    check_stored(heat, settings)
    keys = ("power", "threshold", "band", "source")
    own = {key: getattr(settings, key) for key in keys}
    by_source: dict[str, Heat] = {settings.source: heat}
    if isinstance(heat, Mapping):
        by_source = dict(heat)
    return run(settings.steps, by_source, own, size, image)


def strongest(maps_KHW: torch.Tensor, values: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(highest score of each pixel, uint8 [H, W] with the entry of ``values`` for its class; the
    first of several equal ones). Faster than an argmax over so few classes."""
    best = maps_KHW[0].clone()
    which = torch.full(best.shape, values[0], dtype=torch.uint8)
    for score, value in zip(maps_KHW[1:], values[1:], strict=True):
        which.masked_fill_(score > best, value)
        torch.maximum(best, score, out=best)
    return best, which


def decide(found: Scored, class_ids: Sequence[int]) -> np.ndarray:
    """Mask uint8 [H, W] of scores: the strongest class where its score reaches the threshold, 255
    where uncertain, else 0."""
    best_HW, which_HW = strongest(found.scores_KHW, range(len(class_ids)))
    mask_HW = torch.tensor(class_ids, dtype=torch.uint8)[which_HW.int()]
    if found.background_HW is not None:
        best_HW = best_HW - found.background_HW
    sure, known = (
        edge[0].item() if (edge == edge[0]).all() else edge.float()[which_HW.int()]
        for edge in found.edges
    )
    mask_HW.masked_fill_(best_HW < sure, IGNORE)
    mask_HW.masked_fill_(best_HW < known, 0)
    if found.open_HW is not None:
        mask_HW.masked_fill_(found.open_HW, IGNORE)
    return mask_HW.numpy()


def to_mask(
    heat: Stored,
    class_ids: Sequence[int],
    size: tuple[int, int],
    settings: MaskSettings,
    image: np.ndarray | None = None,
) -> np.ndarray:
    """Mask uint8 [H, W] of heat (:func:`scored`, :func:`decide`)."""
    return decide(scored(heat, settings, size, image), class_ids)


def settings_grid(
    powers: Sequence[int],
    thresholds: Sequence[float],
    bands: Sequence[float],
    sources: Sequence[str],
) -> tuple[list[MaskSettings], int]:
    """All combinations in order, and the number left out because their band is not below their
    threshold.

    ValueError names an empty list, or a value that masks cannot be made with.
    """
    values: dict[str, Sequence[Any]] = {
        "power": powers,
        "threshold": thresholds,
        "band": bands,
        "source": sources,
    }
    alone = {"threshold": {"band": 0.0}, "band": {"threshold": 1.0}}
    for key, given in values.items():
        if isinstance(given, str) or not given:
            raise ValueError(
                f"sweep.{key}={given!r}: expected a list of at least one value, as "
                f"sweep.{key}=[...]"
            )
        for value in given:
            try:
                MaskSettings(**{key: value, **alone.get(key, {})})
            except ValueError as error:
                raise ValueError(f"sweep.{key}={list(given)}: {error}") from None
    each = (dict.fromkeys(given) for given in values.values())
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in product(*each)]
    possible = [MaskSettings(**c) for c in combinations if c["band"] < c["threshold"]]
    if not possible:
        raise ValueError(
            f"sweep: no band of {list(bands)} is below a threshold of {list(thresholds)}; there is "
            "nothing to try"
        )
    return possible, len(combinations) - len(possible)


Chains: TypeAlias = Mapping[str, Sequence[Any]]  # {name: steps, as in YAML}


def chain_grid(
    chains: Chains,
    powers: Sequence[int],
    thresholds: Sequence[float],
    bands: Sequence[float],
    sources: Sequence[str],
) -> tuple[list[tuple[str, MaskSettings]], int]:
    """:func:`settings_grid` of each chain, with its name. Settings that no step of a chain reads
    take one value. ValueError names an invalid chain."""
    found: list[tuple[str, MaskSettings]] = []
    left_out = 0
    for name, steps in chains.items():
        try:
            chain = MaskSettings(steps=parse(steps))
        except ValueError as error:
            raise ValueError(f"sweep.chains: {name}: {error}") from None
        read = {OWN[step.name] for step in chain.steps if step.name in OWN}
        grid, less = settings_grid(
            powers if "power" in read else [MaskSettings().power],
            thresholds if "threshold" in read else [1.0],
            bands if "band" in read else [0.0],
            sources,
        )
        left_out += less
        found += [(name, s.model_copy(update={"steps": chain.steps})) for s in grid]
    return found, left_out


def stored_grid(
    heat: Mapping[str, np.ndarray],
    power: Sequence[int] | None,
    threshold: Sequence[float],
    band: Sequence[float],
    source: Sequence[str] | None,
    chains: Chains | None = None,
) -> tuple[list[tuple[str, MaskSettings]], int]:
    """:func:`chain_grid`. None means all powers, or all sources, of a sample's ``heat``, and for
    chains the paper's chain alone."""
    stored = range(next(iter(heat.values())).shape[1])
    powers = list(stored if power is None else power)
    stored_sources = [name for name in heat if name in SOURCES]
    sources = list(stored_sources if source is None else source)
    return chain_grid(chains or {"paper": PAPER}, powers, threshold, band, sources)


def count_grid(
    heat: Mapping[str, Heat],
    class_ids: Sequence[int],
    reference_HW: np.ndarray,
    settings: Sequence[MaskSettings],
    num_classes: int,
    image: np.ndarray | None = None,
) -> np.ndarray:
    """Pixels int64 [S, C, C + 1] of each setting: [class in the reference, class in the mask]; the
    last column counts uncertain pixels. Pixels whose reference is 255 are left out.

    ``heat``: {source: [K, P, r, r]}; ``reference_HW``: uint8 class ids below ``num_classes``, or
    255; ``image``: see :func:`scored`. The counts equal those of :func:`to_mask`. Where threshold
    and band alone decide, scores are computed once for all of them. The counts are then read off
    one joint histogram of reference, strongest class and the interval of its score.
    """
    counts = np.zeros((len(settings), num_classes, num_classes + 1), np.int64)
    truth_HW = torch.from_numpy(
        np.where(reference_HW == IGNORE, num_classes, reference_HW).astype(np.int64)
    )
    height, width = reference_HW.shape
    by_scores: dict[MaskSettings, list[int]] = {}
    for i, s in enumerate(settings):  # group those that differ only in what is applied to scores
        if s.on_edges:
            by_scores.setdefault(s.model_copy(update=APPLIED), []).append(i)
        else:
            mask = to_mask(heat, class_ids, (height, width), s, image)
            counts[i] = count_mask(reference_HW, mask, num_classes)
    for first, chosen in by_scores.items():
        maps_KHW = scored(heat, first, (height, width), image).scores_KHW
        best_HW, which_HW = strongest(maps_KHW, range(len(class_ids)))
        sure_known = zip(*(settings[i].edges for i in chosen), strict=True)
        values = np.array([*sure_known], np.float32)  # the type in which torch compares them
        edges, place = np.unique(values, return_inverse=True)
        # the number of edges that a score reaches
        bins_HW = torch.bucketize(best_HW, torch.from_numpy(edges), right=True)
        shape = (num_classes + 1, len(class_ids), len(edges) + 1)
        cells = (truth_HW * shape[1] + which_HW) * shape[2] + bins_HW
        histogram = torch.bincount(cells.flatten(), minlength=int(np.prod(shape)))
        joint = histogram.view(shape)[:num_classes].numpy()
        # [C, K, edges]: pixels whose score reaches an edge
        reached = joint[..., ::-1].cumsum(-1)[..., ::-1][..., 1:]
        # [C, K, chosen]: pixels that get the class; pixels that are not background
        sure, known = np.split(reached[..., place.reshape(-1)], 2, axis=-1)
        for k, value in enumerate(class_ids):
            counts[chosen, :, value] += sure[:, k].T
        counts[chosen, :, -1] = (known - sure).sum(1).T
        counts[chosen, :, 0] += (joint.sum((1, 2))[:, None] - known.sum(1)).T
    return counts


def count_mask(truth_HW: np.ndarray, mask_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels int64 [C, C + 1] of one mask; the last column counts uncertain pixels. Pixels whose
    truth is 255 are not counted."""
    size = num_classes + 1
    truth, given = (
        np.where(m == IGNORE, num_classes, m).astype(np.int64) for m in (truth_HW, mask_HW)
    )
    cells = np.bincount((truth * size + given).ravel(), minlength=size * size)
    return cells.reshape(size, size)[:-1]
