"""How unsure a segmenter is of an image, and whether two images look alike: used to order a
labelling queue."""

from collections.abc import Mapping

import numpy as np
import torch


def entropy(probabilities_KHW: torch.Tensor) -> float:
    """Mean over the pixels of the entropy of their classes in nats, 0 to log K; computed in
    float32."""
    p = probabilities_KHW.float()
    return float(torch.special.entr(p).sum(0).mean())


def margin(probabilities_KHW: torch.Tensor) -> float:
    """Mean over the pixels of 1 - (largest probability - second largest), 0 to 1: higher means
    less sure; in float32."""
    best = probabilities_KHW.float().topk(2, 0).values
    return float((1 - (best[0] - best[1])).mean())


SCORES = {"entropy": entropy, "margin": margin}
SIDE = 8  # of the grid of brightness comparisons


def look(image: np.ndarray) -> int:
    """64 bits of an image uint8 [H, W, 3]: whether each cell of an 8x9 grid of mean brightness
    is darker than the next one in its row (a difference hash). A small image is repeated to fill
    the grid."""
    grey = image.astype(np.float32).mean(2)
    grid = np.array(
        [[part.mean() for part in _parts(row, SIDE + 1, 1)] for row in _parts(grey, SIDE, 0)]
    )
    bits = (grid[:, :-1] < grid[:, 1:]).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def _parts(values: np.ndarray, number: int, axis: int) -> list[np.ndarray]:
    size = values.shape[axis]
    starts = [i * size // number for i in range(number)]
    ends = [max(a + 1, (i + 1) * size // number) for i, a in enumerate(starts)]
    return [values.take(range(a, b), axis) for a, b in zip(starts, ends, strict=True)]


def alike(one: int, other: int) -> int:
    """Number of different bits, of 64, between two looks: 0 for the same picture."""
    return (one ^ other).bit_count()


def near_pairs(looks: Mapping[str, int], bits: int) -> list[tuple[str, str]]:
    """Pairs of names whose looks differ in at most ``bits`` of 64, sorted. Looks of 0 (nothing is
    darker than what is beside it: a picture of one colour) are of no pair."""
    names = sorted(name for name, seen in looks.items() if seen)
    values = np.array([looks[name] for name in names], np.uint64)
    pairs = []
    for i, name in enumerate(names[:-1]):
        near = np.bitwise_count(values[i + 1 :] ^ values[i]) <= bits
        pairs += [(name, names[i + 1 + j]) for j in np.flatnonzero(near)]
    return pairs
