import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dd.masks.from_heat import (
    SOURCES,
    MaskSettings,
    count_grid,
    scored,
    settings_grid,
    to_mask,
)
from dd.masks.normalise import flat, min_max
from dd.masks.resize import resize


def heat(classes=3, powers=5, side=8, seed=0):
    return np.random.default_rng(seed).random((classes, powers, side, side)).astype(np.float16)


def loop_mask(stored, class_ids, size, settings):
    """The paper's steps, one pixel at a time."""
    maps = stored[:, settings.power].astype(np.float32)
    maps = np.stack([(m - m.min()) / (m.max() - m.min()) for m in maps])
    large = F.interpolate(
        torch.from_numpy(maps)[None], size=size, mode="bicubic", align_corners=False
    )[0].numpy()
    mask = np.zeros(size, np.uint8)
    for y in range(size[0]):
        for x in range(size[1]):
            column = list(large[:, y, x])
            best = max(column)
            if best >= settings.threshold:
                mask[y, x] = class_ids[column.index(best)]
            elif best >= settings.threshold - settings.band:
                mask[y, x] = 255
    return mask


@pytest.mark.parametrize("size", [(8, 8), (512, 512), (500, 375), (5, 7), (1, 1)])
@pytest.mark.parametrize("side", [8, 32])
def test_the_quick_resize_is_torchs(side, size):
    maps = torch.from_numpy(np.random.default_rng(side).random((3, side, side), np.float32))
    expected = F.interpolate(maps[None], size=size, mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(resize(maps, size), expected, atol=2e-6, rtol=0)


def test_quick_masks_are_those_of_the_slow_way():
    """At the size of Stable Diffusion, where a score may lie on an edge within rounding: 99.99 %
    of the pixels."""
    equal = []
    for seed in range(20):
        coarse = torch.from_numpy(heat(3, 1, 6, seed).astype(np.float32))[:, 0]
        stored = (
            F.interpolate(coarse[None], size=(32, 32), mode="bicubic")[0][:, None]
            .numpy()
            .astype(np.float16)
        )
        maps = min_max(torch.from_numpy(stored[:, 0].astype(np.float32)))
        best, which = F.interpolate(
            maps[None], size=(512, 512), mode="bicubic", align_corners=False
        )[0].max(0)
        slow = torch.tensor([4, 9, 1])[which]
        slow[best < 0.6] = 255
        slow[best < 0.5] = 0
        equal.append(
            np.mean(
                to_mask(
                    stored, (4, 9, 1), (512, 512), MaskSettings(power=0, threshold=0.6, band=0.1)
                )
                == slow.numpy()
            )
        )
    assert np.mean(equal) >= 0.9999


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (13, 21)])
@pytest.mark.parametrize(
    "settings",
    [
        MaskSettings(),
        MaskSettings(power=0, threshold=0.75, band=0.25),
        MaskSettings(power=2, threshold=0.9, band=0.0),
        MaskSettings(power=1, threshold=1.0),
    ],
)
def test_masks_against_a_loop(size, settings):
    stored, ids = heat(), (7, 2, 254)
    mask = to_mask(stored, ids, size, settings)
    expected = loop_mask(stored, ids, size, settings)
    assert mask.dtype == np.uint8 and mask.shape == size
    assert np.array_equal(mask, expected)
    assert len(np.unique(expected)) > 1


def test_the_defaults_are_the_papers():
    assert MaskSettings() == MaskSettings(power=4, threshold=0.6, band=0.1, source="class_prompt")


def ramp(*values):
    """One class whose normalised heat is ``values`` (they must hold 0 and 1), side 1 x len: no
    resizing."""
    return np.asarray(values, np.float32).reshape(1, 1, 1, -1)


def test_threshold_and_band_include_their_lower_end():
    values = (0.0, 0.25, 0.49, 0.5, 0.74, 0.75, 1.0)
    mask = to_mask(ramp(*values), [9], (1, 7), MaskSettings(power=0, threshold=0.75, band=0.25))
    assert mask.tolist() == [[0, 0, 0, 255, 255, 9, 9]]


def test_no_band_means_no_uncertain_pixel():
    settings = MaskSettings(power=0, threshold=0.75, band=0.0)
    assert to_mask(ramp(0, 0.7, 0.75, 1), [9], (1, 4), settings).tolist() == [[0, 0, 9, 9]]
    assert 255 not in to_mask(heat(), (1, 2, 3), (32, 32), settings)


def test_ties_go_to_the_first_class_of_the_prompt():
    one = heat(classes=1)
    for ids in [(3, 5), (5, 3)]:
        mask = to_mask(np.concatenate([one, one]), ids, (8, 8), MaskSettings(power=0))
        assert set(np.unique(mask)) == {0, 255, ids[0]}


def test_the_order_of_the_classes_decides_nothing_else():
    stored = heat()
    mask = to_mask(stored, (4, 5, 6), (24, 24), MaskSettings(power=1))
    assert np.array_equal(
        mask, to_mask(stored[[2, 0, 1]], (6, 4, 5), (24, 24), MaskSettings(power=1))
    )


def test_a_constant_map_is_background():
    flat = np.full((1, 1, 8, 8), 0.3, np.float16)
    assert not to_mask(flat, [1], (16, 16), MaskSettings(power=0)).any()
    both = np.concatenate([flat, heat(1, 1)])
    assert set(np.unique(to_mask(both, (1, 2), (16, 16), MaskSettings(power=0)))) == {0, 2, 255}


def test_a_map_that_holds_nothing_but_rounding_is_flat():
    """Attention is recorded in float32: a millionth of the level is no contrast."""
    noise = np.random.default_rng(0).random((8, 8))
    shown = [0 * noise, 5e-7 * noise, 2e-6 * noise, 0.1 * noise.T]
    maps = np.stack([(1 + contrast) / 77 for contrast in shown] + [0 * noise])
    assert flat(torch.from_numpy(maps)).tolist() == [True, True, False, False, True]
    assert flat(torch.from_numpy(maps[None])).shape == (1, 5)
    found = min_max(torch.from_numpy(maps))
    assert not found[[0, 1, 4]].any() and torch.equal(
        found[2:4].amax((1, 2)), torch.ones(2).double()
    )
    mask = to_mask(maps[:, None], (5, 1, 2, 3, 4), (8, 8), MaskSettings(power=0))
    assert not {5, 1, 4} & set(np.unique(mask)) and {2, 3} <= set(np.unique(mask))


def test_contrast_far_below_the_level_makes_the_same_mask():
    stored = heat().astype(np.float64)
    small = 1 / 77 + stored * 1e-7
    settings = MaskSettings(power=2)
    assert np.array_equal(
        to_mask(small, (7, 2, 1), (24, 24), settings),
        to_mask(stored, (7, 2, 1), (24, 24), settings),
    )


def test_each_class_is_normalised_on_its_own():
    stored = heat()
    scaled = stored.astype(np.float32) * np.array([1, 0.01, 30])[:, None, None, None] + 5
    found = min_max(torch.from_numpy(stored[:, 0].astype(np.float32)))
    assert torch.equal(found.amin((1, 2)), torch.zeros(3)) and torch.equal(
        found.amax((1, 2)), torch.ones(3)
    )
    torch.testing.assert_close(
        min_max(torch.from_numpy(scaled[:, 0].astype(np.float32))), found, atol=2e-4, rtol=0
    )


def test_powers_are_not_mixed_up():
    stored = heat()
    for power in range(5):
        expected = min_max(torch.from_numpy(stored[:, power].astype(np.float32)))
        found = scored(stored, MaskSettings(power=power), (8, 8)).scores_KHW
        torch.testing.assert_close(found, expected)


def test_a_power_that_is_not_stored_is_answered_with_those_that_are():
    with pytest.raises(
        ValueError, match=r"masks\.power=5 is not stored.*powers 0 to 4\. .*diffusion\.max_power"
    ):
        to_mask(heat(powers=5), (1, 2, 3), (8, 8), MaskSettings(power=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"power": -1}, "masks.power=-1: expected a whole number of 0 or more"),
        ({"power": 1.5}, "masks.power=1.5: expected a whole number of 0 or more"),
        ({"power": "4"}, "masks.power='4': expected a whole number of 0 or more"),
        ({"threshold": 0}, "masks.threshold=0: expected a number above 0, of 1 or less"),
        ({"threshold": 1.1}, "masks.threshold=1.1: expected a number above 0, of 1 or less"),
        ({"band": -0.1}, "masks.band=-0.1: expected a number of 0 or more, below 1"),
        ({"band": 0.6}, "masks.band=0.6: expected less than masks.threshold=0.6"),
        ({"threshold": float("nan")}, "masks.threshold=nan: expected a number above 0"),
        (
            {"source": "caption"},
            "masks.source='caption': expected class_prompt, full_prompt_appended, full_prompt_c",
        ),
        (
            {"source": "full_prompt"},
            "masks.source='full_prompt': expected .*full_prompt_appended, full_prompt_caption",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskSettings(**settings)


# Many settings at once


def slow_counts(stored, class_ids, reference, settings, num_classes):
    """One mask for each setting, counted one by one."""
    found = np.zeros((len(settings), num_classes, num_classes + 1), np.int64)
    for i, s in enumerate(settings):
        mask = to_mask(stored[s.source], class_ids, reference.shape, s).astype(int)
        mask[mask == 255] = num_classes
        kept = reference != 255
        np.add.at(found[i], (reference[kept], mask[kept]), 1)
    return found


@pytest.mark.parametrize("size", [(8, 8), (32, 24), (13, 21)])
@pytest.mark.parametrize("class_ids", [(3,), (5, 1, 2)])
def test_a_grid_is_counted_as_mask_by_mask(size, class_ids):
    stored = {s: heat(len(class_ids), 3, seed=i) for i, s in enumerate(SOURCES[:2])}
    reference = np.random.default_rng(1).choice([0, 1, 2, 3, 4, 5, 255], size).astype(np.uint8)
    settings, left_out = settings_grid(
        [0, 2], [0.1, 0.3, 0.55, 0.7, 1.0], [0.0, 0.1, 0.3], list(stored)
    )
    assert (
        len(settings) + left_out == 60 and left_out == 2 * 2 * 3
    )  # 0.1 with 0.1 and 0.3, 0.3 with 0.3
    counts = count_grid(stored, class_ids, reference, settings, 6)
    assert counts.dtype == np.int64 and counts.shape == (len(settings), 6, 7)
    assert np.array_equal(counts, slow_counts(stored, class_ids, reference, settings, 6))
    assert (counts.sum((1, 2)) == (reference != 255).sum()).all() and counts[..., -1].any()


def test_a_grid_counts_scores_on_the_edge_as_a_mask_does():
    values = np.float32([0, 0.1, 0.2, 0.3, 0.3 - 0.1, 0.6, 0.6 - 0.1, 0.7, 0.7 - 0.1, 0.8, 1])
    values = np.concatenate(
        [values, np.nextafter(values, np.float32(0)), np.nextafter(values, np.float32(1))]
    )
    stored = {"class_prompt": ramp(*values)}
    reference = np.arange(len(values), dtype=np.uint8)[None] % 3
    settings, _ = settings_grid(
        [0], [0.1, 0.2, 0.3, 0.6, 0.7, 0.8, 1.0], [0.0, 0.1, 0.2], ["class_prompt"]
    )
    assert np.array_equal(
        count_grid(stored, [2], reference, settings, 3),
        slow_counts(stored, [2], reference, settings, 3),
    )


def test_settings_come_in_the_order_given_and_once():
    found, left_out = settings_grid([2, 0, 2], [0.5], [0, 0.1], ["class_prompt"])
    assert [(s.power, s.threshold, s.band) for s in found] == [
        (2, 0.5, 0.0),
        (2, 0.5, 0.1),
        (0, 0.5, 0.0),
        (0, 0.5, 0.1),
    ]
    assert left_out == 0 and all(type(s.band) is float for s in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"powers": []}, r"sweep\.power=\[\]: expected a list of at least one value"),
        (
            {"powers": [0, -1]},
            r"sweep\.power=\[0, -1\]: masks.power=-1: expected a whole number of 0 or more",
        ),
        (
            {"thresholds": [0.5, 1.2]},
            r"sweep\.threshold=\[0.5, 1.2\]: masks.threshold=1.2: expected .*, of 1 or less",
        ),
        (
            {"thresholds": [0]},
            r"sweep\.threshold=\[0\]: masks.threshold=0: expected a number above 0",
        ),
        (
            {"thresholds": ["high"]},
            r"sweep\.threshold=\['high'\]: masks.threshold='high': expected a number",
        ),
        (
            {"bands": [-0.1]},
            r"sweep\.band=\[-0.1\]: masks.band=-0.1: expected a number of 0 or more",
        ),
        (
            {"bands": [1.0]},
            r"sweep\.band=\[1.0\]: masks.band=1.0: expected a number of 0 or more, below 1",
        ),
        ({"sources": ["caption"]}, "masks.source='caption': expected class_prompt, "),
        ({"sources": ["class_prompt", "full_prompt"]}, "sweep.source=.*: .*full_prompt_appended"),
        ({"sources": "class_prompt"}, r"sweep\.source='class_prompt': expected a list"),
        ({"bands": [0.5, 0.6]}, "no band of .* is below a threshold"),
    ],
)
def test_impossible_grids_are_refused(change, message):
    grid = {
        "powers": [0],
        "thresholds": [0.5],
        "bands": [0.1],
        "sources": ["class_prompt"],
        **change,
    }
    with pytest.raises(ValueError, match=message):
        settings_grid(**grid)
