"""From heat maps to masks with an uncertainty band (Dataset Diffusion, section on mask generation).

Shape letters: K classes of a sample, P powers, r side of the heat map, H W image size; C classes of
the taxonomy with background, S settings.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from dd.taxonomy import IGNORE

# How a generator's attention is read: mask settings that were chosen for one reading fit no other.
READING = ("cross_resolution", "self_resolution", "cross_layers", "cross_heads")
# Which words attention is read at: those of the class prompt, which is encoded by itself, or in the
# prompt the image is made from (the full prompt) the appended ones or the caption's own.
SOURCES = ("class_prompt", "full_prompt_appended", "full_prompt_caption")
FLAT = 1e-6  # contrast of a map in relation to its peak up to which it is rounding of the attention


@dataclass(frozen=True)
class MaskSettings:
    """How heat becomes a mask. Defaults are the paper's: power 4, class from 0.6, uncertain from
    0.5 to 0.6.

    ``power``: exponent of the self-attention; ``threshold``: a pixel whose strongest class reaches
    it gets that class; ``band``: below the threshold and within the band the pixel is uncertain
    (255), further below it is background; ``source``: the words that are read (``SOURCES``),
    ``class_prompt`` or, for ablations, others.
    """

    power: int = 4
    threshold: float = 0.6
    band: float = 0.1
    source: str = "class_prompt"

    def __post_init__(self):
        if not (isinstance(self.power, int) and self.power >= 0):
            raise ValueError(f"masks.power must be a whole number >= 0, got {self.power!r}")
        if not 0 < self.threshold <= 1 or not 0 <= self.band < self.threshold:
            raise ValueError(
                "masks: need 0 < threshold <= 1 and 0 <= band < threshold, got "
                f"threshold={self.threshold}, band={self.band}"
            )
        if self.source == "full_prompt":
            raise ValueError(
                "masks.source=full_prompt does not say which of its words: full_prompt_appended "
                "(the class words behind the caption, what it was before) or full_prompt_caption"
            )
        if self.source not in SOURCES:
            raise ValueError(f"masks.source={self.source!r}; allowed: {', '.join(SOURCES)}")


def flat(maps: torch.Tensor) -> torch.Tensor:
    """Whether each map [..., r, r] shows nothing: its contrast is at most ``FLAT`` of its peak."""
    return maps.amax((-2, -1)) - maps.amin((-2, -1)) <= FLAT * maps.abs().amax((-2, -1))


def normalise(maps_Krr: torch.Tensor) -> torch.Tensor:
    """Min-max of each class map to [0, 1]; a map that is :func:`flat` becomes 0."""
    low, high = maps_Krr.amin((1, 2), keepdim=True), maps_Krr.amax((1, 2), keepdim=True)
    nothing = flat(maps_Krr)[:, None, None]
    return ((maps_Krr - low) / (high - low).masked_fill(nothing, 1)).masked_fill(nothing, 0)


@lru_cache(maxsize=32)
def _bicubic(side: int, length: int) -> torch.Tensor:
    """The linear map [length, side] that bicubic interpolation is along one axis."""
    unit = torch.eye(side).view(side, 1, side, 1)
    return (
        F.interpolate(unit, size=(length, 1), mode="bicubic", align_corners=False)
        .view(side, length)
        .T.contiguous()
    )


def resize(maps_Krr: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic resize of maps [K, r, r] to [K, H, W], as torch's, by two thin matrix products:
    several times as fast."""
    height, width = (
        _bicubic(side, n).to(maps_Krr) for side, n in zip(maps_Krr.shape[1:], size, strict=True)
    )
    return height @ (maps_Krr @ width.T)


def scores(heat_KPrr, power: int, size: tuple[int, int]) -> torch.Tensor:
    """Class scores float32 [K, H, W]: the chosen power, min-max per class (in float64, as contrast
    may be small beside the level), bicubic to ``size`` (H, W)."""
    heat = np.asarray(heat_KPrr)
    if power >= heat.shape[1]:
        raise ValueError(
            f"masks.power={power} is not stored in this data set: it holds powers 0 to "
            f"{heat.shape[1] - 1}. "
            "Choose one of them, or generate with a larger diffusion.max_power"
        )
    return resize(normalise(torch.from_numpy(heat[:, power].astype(np.float64))).float(), size)


def to_mask(heat_KPrr, class_ids, size: tuple[int, int], settings: MaskSettings) -> np.ndarray:
    """Mask uint8 [H, W]: ``class_ids[argmax]`` where the score reaches the threshold, 255 in the
    band, else 0."""
    maps_KHW = scores(heat_KPrr, settings.power, size)
    best, mask = maps_KHW[0].clone(), torch.full(size, class_ids[0], dtype=torch.uint8)
    for score, value in zip(
        maps_KHW[1:], class_ids[1:], strict=True
    ):  # faster than an argmax over so few
        mask.masked_fill_(score > best, value)
        torch.maximum(best, score, out=best)
    mask.masked_fill_(best < settings.threshold, IGNORE)
    mask.masked_fill_(best < settings.threshold - settings.band, 0)
    return mask.numpy()


def settings_grid(powers, thresholds, bands, sources) -> tuple[list[MaskSettings], int]:
    """All combinations in order, and the number left out because their band is not below their
    threshold.

    ValueError names an empty list or the value that no mask can be made with.
    """
    values = {"power": powers, "threshold": thresholds, "band": bands, "source": sources}
    for key, given in values.items():
        if isinstance(given, str) or not given:
            raise ValueError(
                f"sweep.{key}={given!r}: expected a list of at least one value, as "
                f"sweep.{key}=[...]"
            )
        for value in given:
            alone = {"threshold": {"band": 0.0}, "band": {"threshold": 1.0}}.get(key, {})
            if key in ("threshold", "band") and type(value) not in (int, float):
                raise ValueError(f"sweep.{key}: expected numbers from 0 to 1, got {value!r}")
            try:
                MaskSettings(**{key: value, **alone})
            except ValueError as error:
                raise ValueError(f"sweep.{key}={list(given)}: {error}") from None
    combinations = list(product(*(dict.fromkeys(given) for given in values.values())))
    possible = [MaskSettings(p, float(t), float(b), s) for p, t, b, s in combinations if b < t]
    if not possible:
        raise ValueError(
            f"sweep: no band of {list(bands)} is below a threshold of {list(thresholds)}; nothing "
            "to try"
        )
    return possible, len(combinations) - len(possible)


def count_grid(
    heat, class_ids, reference_HW: np.ndarray, settings: list[MaskSettings], num_classes: int
) -> np.ndarray:
    """Pixels int64 [S, C, C + 1] of each setting: [class in the reference, class in the mask], the
    last column counts the uncertain ones. Pixels whose reference is 255 are left out.

    ``heat``: {source: [K, P, r, r]}; ``reference_HW``: uint8 class ids below ``num_classes``, or
    255. The numbers are those of :func:`to_mask`, but maps are resized once for each power and
    source: all thresholds and bands are read off one joint histogram of reference, strongest class
    and the interval its score falls into.
    """
    counts = np.zeros((len(settings), num_classes, num_classes + 1), np.int64)
    truth_HW = torch.from_numpy(
        np.where(reference_HW == IGNORE, num_classes, reference_HW).astype(np.int64)
    )
    for source, power in dict.fromkeys((s.source, s.power) for s in settings):
        chosen = [i for i, s in enumerate(settings) if (s.source, s.power) == (source, power)]
        best_HW, which_HW = scores(heat[source], power, reference_HW.shape).max(0)
        lower = [settings[i].threshold - settings[i].band for i in chosen]
        values = np.array(
            [settings[i].threshold for i in chosen] + lower, np.float32
        )  # as torch compares them
        edges, place = np.unique(values, return_inverse=True)
        bins_HW = torch.bucketize(
            best_HW, torch.from_numpy(edges), right=True
        )  # number of edges that are reached
        shape = (num_classes + 1, len(class_ids), len(edges) + 1)
        cells = (truth_HW * shape[1] + which_HW) * shape[2] + bins_HW
        joint = (
            torch.bincount(cells.flatten(), minlength=int(np.prod(shape)))
            .view(shape)[:num_classes]
            .numpy()
        )
        reached = joint[..., ::-1].cumsum(-1)[..., ::-1][
            ..., 1:
        ]  # [C, K, edges]: pixels whose score reaches an edge
        sure, known = np.split(
            reached[..., place], 2, axis=-1
        )  # [C, K, chosen]: class given; not background
        for k, value in enumerate(class_ids):
            counts[chosen, :, value] += sure[:, k].T
        counts[chosen, :, -1] = (known - sure).sum(1).T
        counts[chosen, :, 0] += (joint.sum((1, 2))[:, None] - known.sum(1)).T
    return counts
