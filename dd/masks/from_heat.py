"""From heat maps to masks with an uncertainty band (Dataset Diffusion, section on mask generation).

Shape letters: K classes of a sample, P powers, r side of the heat map, H W image size; C classes of
the taxonomy with background, S settings.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt
from pydantic import model_validator

from dd.store.settings import Natural, Settings
from dd.taxonomy import IGNORE

# How a generator's attention is read, and what an identity leaves out as it is the default: mask
# settings that were chosen for one reading fit no other.
READING: dict[str, Any] = {
    "cross_resolution": None,
    "self_resolution": None,
    "cross_layers": None,
    "cross_heads": None,
    "self_layers": None,
    "pool": 1,
    "reading": "sampling",
    "read_at": [100],
}
# Which words attention is read at: those of the class prompt, which is encoded by itself, or in the
# prompt the image is made from (the full prompt) the appended ones or the caption's own; or those
# of the class prompt after drawing, where both are stored.
Source = Literal["class_prompt", "full_prompt_appended", "full_prompt_caption", "after"]
SOURCES: tuple[Source, ...] = get_args(Source)
Heat: TypeAlias = np.ndarray | torch.Tensor  # [K, P, r, r]
APPLIED = {"threshold": 1.0, "band": 0.0}  # settings that are applied to scores, not part of them
FLAT = 1e-6  # contrast of a map in relation to its peak up to which it is rounding of the attention


def how_read(generator: Mapping[str, Any]) -> dict[str, Any]:
    """What an identity of a generator says of :data:`READING`."""
    return {key: generator.get(key, default) for key, default in READING.items()}


class MaskSettings(Settings):
    """How heat becomes a mask. Defaults are the paper's: power 4, class from 0.6, uncertain from
    0.5 to 0.6.

    ``power``: exponent of the self-attention; ``threshold``: a pixel whose strongest class reaches
    it gets that class; ``band``: below the threshold and within the band the pixel is uncertain
    (255), further below it is background; ``source``: the words that are read (``SOURCES``),
    ``class_prompt`` or, for ablations, others.
    """

    noun = "masks"

    power: Natural = 4
    threshold: Annotated[float, Gt(0), Le(1)] = 0.6
    band: Annotated[float, Ge(0), Lt(1)] = 0.1
    source: Source = "class_prompt"

    @model_validator(mode="after")
    def _band_below_threshold(self) -> Self:
        if self.band >= self.threshold:
            raise ValueError(
                f"masks.band={self.band}: expected less than masks.threshold={self.threshold}"
            )
        return self

    @property
    def edges(self) -> tuple[float, float]:
        """The scores from which a pixel is of its strongest class, and from which it is no
        background."""
        return self.threshold, self.threshold - self.band


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
    resized = F.interpolate(unit, size=(length, 1), mode="bicubic", align_corners=False)
    return resized.view(side, length).T.contiguous()


def resize(maps_Krr: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic resize of maps [K, r, r] to [K, H, W], as torch's, by two thin matrix products:
    several times as fast."""
    sides = zip(maps_Krr.shape[1:], size, strict=True)
    height, width = (_bicubic(side, length).to(maps_Krr) for side, length in sides)
    return height @ (maps_Krr @ width.T)


def scores(heat_KPrr: Heat, settings: MaskSettings, size: tuple[int, int]) -> torch.Tensor:
    """Class scores float32 [K, H, W]: the chosen power, min-max per class (in float64, as contrast
    may be small beside the level), bicubic to ``size`` (H, W). A further step of the masks has its
    place here: it may read every setting but threshold and band, which are applied to scores."""
    heat, power = np.asarray(heat_KPrr), settings.power
    if power >= heat.shape[1]:
        raise ValueError(
            f"masks.power={power} is not stored in this data set: it holds powers 0 to "
            f"{heat.shape[1] - 1}. Choose one of them, or generate with a larger "
            "diffusion.max_power"
        )
    return resize(normalise(torch.from_numpy(heat[:, power].astype(np.float64))).float(), size)


def strongest(maps_KHW: torch.Tensor, values: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(the highest score of each pixel, uint8 [H, W] of the ``values`` of the class it is of; the
    first of several equal ones). Faster than an argmax over so few."""
    best = maps_KHW[0].clone()
    which = torch.full(best.shape, values[0], dtype=torch.uint8)
    for score, value in zip(maps_KHW[1:], values[1:], strict=True):
        which.masked_fill_(score > best, value)
        torch.maximum(best, score, out=best)
    return best, which


def to_mask(
    heat_KPrr: Heat, class_ids: Sequence[int], size: tuple[int, int], settings: MaskSettings
) -> np.ndarray:
    """Mask uint8 [H, W]: the strongest class where its score reaches the threshold, 255 in the
    band, else 0."""
    best_HW, mask_HW = strongest(scores(heat_KPrr, settings, size), class_ids)
    sure, known = settings.edges
    mask_HW.masked_fill_(best_HW < sure, IGNORE)
    mask_HW.masked_fill_(best_HW < known, 0)
    return mask_HW.numpy()


def settings_grid(
    powers: Sequence[int],
    thresholds: Sequence[float],
    bands: Sequence[float],
    sources: Sequence[str],
) -> tuple[list[MaskSettings], int]:
    """All combinations in order, and the number left out because their band is not below their
    threshold.

    ValueError names an empty list or the value that no mask can be made with.
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
            f"sweep: no band of {list(bands)} is below a threshold of {list(thresholds)}; nothing "
            "to try"
        )
    return possible, len(combinations) - len(possible)


def stored_grid(
    heat: Mapping[str, np.ndarray],
    power: Sequence[int] | None,
    threshold: Sequence[float],
    band: Sequence[float],
    source: Sequence[str] | None,
) -> tuple[list[MaskSettings], int]:
    """:func:`settings_grid`; None stands for all powers or sources of a sample's ``heat``."""
    stored = range(next(iter(heat.values())).shape[1])
    powers = list(stored if power is None else power)
    sources = list(heat if source is None else source)
    return settings_grid(powers, threshold, band, sources)


def count_grid(
    heat: Mapping[str, Heat],
    class_ids: Sequence[int],
    reference_HW: np.ndarray,
    settings: Sequence[MaskSettings],
    num_classes: int,
) -> np.ndarray:
    """Pixels int64 [S, C, C + 1] of each setting: [class in the reference, class in the mask], the
    last column counts the uncertain ones. Pixels whose reference is 255 are left out.

    ``heat``: {source: [K, P, r, r]}; ``reference_HW``: uint8 class ids below ``num_classes``, or
    255. The numbers are those of :func:`to_mask`, but scores are made once for all thresholds and
    bands, which are read off one joint histogram of reference, strongest class and the interval
    its score falls into.
    """
    counts = np.zeros((len(settings), num_classes, num_classes + 1), np.int64)
    truth_HW = torch.from_numpy(
        np.where(reference_HW == IGNORE, num_classes, reference_HW).astype(np.int64)
    )
    height, width = reference_HW.shape
    by_scores: dict[MaskSettings, list[int]] = {}
    for i, s in enumerate(settings):  # those that differ in what is applied to scores alone
        by_scores.setdefault(s.model_copy(update=APPLIED), []).append(i)
    for first, chosen in by_scores.items():
        maps_KHW = scores(heat[first.source], first, (height, width))
        best_HW, which_HW = strongest(maps_KHW, range(len(class_ids)))
        sure_known = zip(*(settings[i].edges for i in chosen), strict=True)
        values = np.array([*sure_known], np.float32)  # as torch compares them
        edges, place = np.unique(values, return_inverse=True)
        # the number of edges that a score reaches
        bins_HW = torch.bucketize(best_HW, torch.from_numpy(edges), right=True)
        shape = (num_classes + 1, len(class_ids), len(edges) + 1)
        cells = (truth_HW * shape[1] + which_HW) * shape[2] + bins_HW
        histogram = torch.bincount(cells.flatten(), minlength=int(np.prod(shape)))
        joint = histogram.view(shape)[:num_classes].numpy()
        # [C, K, edges]: pixels whose score reaches an edge
        reached = joint[..., ::-1].cumsum(-1)[..., ::-1][..., 1:]
        # [C, K, chosen]: class given; not background
        sure, known = np.split(reached[..., place.reshape(-1)], 2, axis=-1)
        for k, value in enumerate(class_ids):
            counts[chosen, :, value] += sure[:, k].T
        counts[chosen, :, -1] = (known - sure).sum(1).T
        counts[chosen, :, 0] += (joint.sum((1, 2))[:, None] - known.sum(1)).T
    return counts
