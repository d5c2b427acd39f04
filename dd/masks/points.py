"""Points for a promptable segmenter, from the heat of the classes: where a class is strongest, and
where it is absent. T2S and other pipelines take points from attention; the rule here is ours.

Shape letters: K classes of a sample, r side of the heat map. A cell is (row, column).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dd.masks.normalise import min_max

Cell = tuple[int, int]


@dataclass(frozen=True)
class Points:
    """Cells of one class. ``inside`` the class: the strongest first. ``outside`` it: cells inside
    other classes, then the coldest cells. Both are empty for a class whose map is flat."""

    inside: tuple[Cell, ...]
    outside: tuple[Cell, ...]


def points(
    heat_Krr: torch.Tensor,
    inside: int = 3,
    outside: int = 3,
    peak: float = 0.8,
    cold: float = 0.2,
    distance: int = 2,
) -> list[Points]:
    """The :class:`Points` of each class of heat float [K, r, r].

    Each map is stretched to [0, 1]. Inside are at most ``inside`` local maxima that reach ``peak``
    and where no other class is stronger. The strongest cell of a class is always inside, whatever
    the other classes. Outside are the inside cells of the other classes, and at most ``outside``
    cells where no class exceeds ``cold``, the coldest in this class first. Cells of one list, and
    outside cells from inside cells, are at least ``distance`` apart (the larger of rows and
    columns). Of equal cells the first in reading order is taken.
    """
    maps_Krr = min_max(heat_Krr.double())
    strongest_rr = maps_Krr.amax(0)
    peaks_Krr = maps_Krr == F.max_pool2d(maps_Krr[None], 3, 1, 1)[0]
    there = [bool(one.max() > 0) for one in maps_Krr]
    own: list[list[Cell]] = []
    for map_rr, local_rr, shown in zip(maps_Krr, peaks_Krr, there, strict=True):
        allowed_rr = local_rr & (map_rr >= peak) & (map_rr >= strongest_rr)
        allowed_rr |= _first_of(map_rr)
        own.append(_spaced(map_rr, allowed_rr, inside, distance) if shown else [])
    found = []
    for k, (map_rr, shown) in enumerate(zip(maps_Krr, there, strict=True)):
        if not shown:
            found.append(Points((), ()))
            continue
        others = [c for j, cells in enumerate(own) if j != k for c in cells]
        others = [c for c in dict.fromkeys(others) if _apart(c, own[k], distance)]
        away = _spaced(-map_rr, strongest_rr <= cold, outside, distance, own[k])
        away = [c for c in away if c not in others]
        found.append(Points(tuple(own[k]), (*others, *away)))
    return found


def _first_of(map_rr: torch.Tensor) -> torch.Tensor:
    """The position of a map's largest value, the first of equal ones."""
    marked = torch.zeros(map_rr.numel(), dtype=torch.bool)
    marked[int(map_rr.flatten().argmax())] = True
    return marked.view(map_rr.shape)


def _spaced(
    map_rr: torch.Tensor,
    allowed_rr: torch.Tensor,
    number: int,
    distance: int,
    away_from: Sequence[Cell] = (),
) -> list[Cell]:
    """The allowed cells with the largest values, ``distance`` apart, at most ``number``."""
    values = map_rr.masked_fill(~allowed_rr, -torch.inf).flatten()
    order = torch.argsort(values, descending=True, stable=True)
    taken: list[Cell] = []
    for index in order[: int(allowed_rr.sum())].tolist():
        if len(taken) == number:
            break
        cell = divmod(index, map_rr.shape[1])
        if _apart(cell, [*taken, *away_from], distance):
            taken.append(cell)
    return taken


def _apart(cell: Cell, others: Sequence[Cell], distance: int) -> bool:
    return all(max(abs(cell[0] - y), abs(cell[1] - x)) >= distance for y, x in others)


def centres(cells: Sequence[Cell], side: int) -> torch.Tensor:
    """(x, y) of the centres of cells on a map of ``side`` cells, float [N, 2], as shares of the
    image's width and height."""
    if not cells:
        return torch.zeros(0, 2)
    rows_columns = torch.tensor(cells, dtype=torch.float32)
    return (rows_columns.flip(1) + 0.5) / side
