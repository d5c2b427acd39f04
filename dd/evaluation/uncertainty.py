"""How unsure a segmenter is of an image, and whether two images look alike: used to order a
labelling queue."""

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
