"""Points from heat."""

import torch

from dd.masks.points import Points, centres, points


def heat(*cells, side=6, base=0.0):
    """A map with values at cells."""
    found = torch.full((side, side), base)
    for row, column, value in cells:
        found[row, column] = value
    return found


def test_peaks_are_inside_and_those_of_others_outside():
    maps = torch.stack(
        [
            heat((0, 0, 1.0), (0, 4, 0.9), (5, 5, 0.5), (3, 3, 0.85)),
            heat((4, 1, 2.0), (0, 4, 0.2)),
        ]
    )
    first, second = points(maps, inside=3, outside=0)
    assert first.inside == ((0, 0), (0, 4), (3, 3))  # strongest first; 0.5 is below the peak
    assert second.inside == ((4, 1),)
    assert first.outside == ((4, 1),) and second.outside == ((0, 0), (0, 4), (3, 3))


def test_cold_cells_are_the_coldest_of_the_class_and_of_no_other():
    one = heat((0, 0, 1.0), (1, 1, -0.2), base=0.1)
    other = heat((5, 5, 1.0), (3, 0, 0.9), base=0.0)
    first, _ = points(torch.stack([one, other]), inside=1, outside=2, cold=0.3)
    # (1, 1) is the coldest but next to the peak (distance 2 needs two cells): left out
    assert first.outside == ((5, 5), (0, 2), (0, 4))
    (alone,) = points(one[None], inside=1, outside=1, cold=0.3, distance=1)
    assert alone.outside == ((1, 1),)


def test_points_keep_their_distance():
    map_rr = heat((2, 2, 1.0), (2, 4, 0.95), (4, 4, 0.9), (0, 0, 0.85))
    at = {d: points(map_rr[None], inside=4, outside=0, distance=d)[0].inside for d in (1, 2, 3, 9)}
    assert at[1] == at[2] == ((2, 2), (2, 4), (4, 4), (0, 0))
    assert at[3] == ((2, 2),) == at[9]


def test_a_peak_where_another_class_is_stronger_is_none():
    maps = torch.stack([heat((0, 0, 1.0), (3, 3, 0.9)), heat((3, 3, 5.0))])
    first, second = points(maps, inside=3, outside=0)
    assert first.inside == ((0, 0),) and second.inside == ((3, 3),)
    same = torch.stack([heat((3, 3, 1.0))] * 2)
    first, second = points(same, inside=3, outside=0)
    assert first == second == Points(((3, 3),), ())  # its own peak is no negative


def test_a_flat_map_has_no_points():
    first, second = points(torch.stack([heat(base=0.7), heat((1, 1, 1.0))]), outside=1)
    assert first == Points((), ())
    assert second.inside == ((1, 1),) and second.outside == ((0, 3),)


def test_of_equal_cells_the_first_is_taken():
    map_rr = heat((0, 5, 1.0), (5, 0, 1.0))
    assert points(map_rr[None], inside=1, outside=0)[0].inside == ((0, 5),)


def test_the_scale_of_the_heat_does_not_matter():
    maps = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert points(maps) == points(maps * 1e-3 + 7)


def test_centres_are_shares_of_width_and_height():
    assert centres([(0, 3), (1, 0)], 4).tolist() == [[0.875, 0.125], [0.125, 0.375]]
    assert centres([], 4).shape == (0, 2)
