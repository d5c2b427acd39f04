"""Each step of a chain against its formula written out, and chains as a whole."""

import cv2
import numpy as np
import pytest
import torch

from dd.masks import normalise, propagate, refine, thresholds, uncertain
from dd.masks.chain import ORDER, STEPS, parse, run
from dd.masks.from_heat import PAPER, MaskSettings, count_grid, scored, to_mask

PLAIN = [step.plain() for step in PAPER]
EDGES = [{"propagate": "walk"}, {"normalise": "min_max"}, {"refine": "pamr"}, {"threshold": "otsu"}]


def heat(classes=3, powers=5, side=8, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((classes, powers, side, side)))


def picture(side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_a_walk_is_the_weighted_mean_of_the_stored_powers():
    stored, alpha = heat(), 0.3
    weights = [alpha**p for p in range(5)]
    expected = sum(w * stored[:, p] for p, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(propagate.walk(stored, alpha), expected)


def test_adaptive_power_stops_where_the_mask_stands_still():
    """A square whose side grows from 2 to 3 pixels, and then no more: it stops at the first power
    that changed nothing."""
    stored = torch.zeros(2, 5, 8, 8)
    for p, side in enumerate((2, 3, 3, 4, 5)):
        stored[0, p, :side, :side] = p + 1
    for p, side in enumerate((1, 2, 3, 4, 5)):  # never
        stored[1, p, :side, :side] = p + 1
    chosen = propagate.adaptive(stored)
    assert torch.equal(chosen[0], stored[0, 2]) and torch.equal(chosen[1], stored[1, 4])
    assert propagate.adaptive(stored[:, :1]).shape == (2, 8, 8)


def test_shares_of_a_pixel():
    maps = torch.tensor([[[1.0, 3], [2, 0]], [[1, 1], [2, 1]]])
    shares = torch.tensor([[[0.5, 0.75], [0.5, 0]], [[0.5, 0.25], [0.5, 1]]])
    torch.testing.assert_close(normalise.per_pixel(maps), normalise.min_max(shares))
    alone = heat(1)[:, 0]
    assert torch.equal(normalise.per_pixel(alone), normalise.min_max(alone))
    flat = torch.cat([maps, torch.ones(1, 2, 2)])
    torch.testing.assert_close(normalise.per_pixel(flat)[:2], normalise.min_max(shares))
    assert (normalise.per_pixel(flat)[2] == 0).all()


def test_probabilities_with_a_background():
    maps = heat(2)[:, 0]
    scores = normalise.min_max(maps)
    powers = [torch.exp(s / 0.2) for s in scores]
    total = sum(powers) + np.exp(0.4 / 0.2)
    found = normalise.softmax(maps, temperature=0.2, background=0.4)
    torch.testing.assert_close(found, torch.stack(powers) / total)


def neighbours(image, y, x, dilations):
    """Values around a pixel [8 * len(dilations), channels], the border repeated."""
    height, width = image.shape[1:]
    around = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
    return np.stack(
        [
            image[:, min(max(y + d * a, 0), height - 1), min(max(x + d * b, 0), width - 1)]
            for d in dilations
            for a, b in around
        ]
    )


@pytest.mark.parametrize("dilations", [(1,), (1, 3)])
def test_pamr_against_loops(dilations):
    rng = np.random.default_rng(0)
    image, scores = rng.random((3, 5, 6)), rng.random((2, 5, 6))
    expected = scores.copy()
    for _ in range(2):
        before = expected.copy()
        for y in range(5):
            for x in range(6):
                colours = neighbours(image, y, x, dilations)
                sigma = colours.std(0, ddof=1)
                k = -(np.abs(colours - image[:, y, x]) / (0.1 * sigma + 1e-8)).mean(1)
                k = np.exp(k - k.max())
                expected[:, y, x] = (k / k.sum()) @ neighbours(before, y, x, dilations)
    found = refine.pamr(torch.from_numpy(scores), torch.from_numpy(image).float(), 2, dilations)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-5)


def test_joint_bilateral_against_loops():
    rng = np.random.default_rng(1)
    image, scores = rng.random((3, 5, 6)), rng.random((2, 5, 6))
    expected = np.zeros_like(scores)
    for y in range(5):
        for x in range(6):
            total = 0.0
            for a in range(-2, 3):
                for b in range(-2, 3):
                    v, u = min(max(y + a, 0), 4), min(max(x + b, 0), 5)
                    apart = ((image[:, v, u] - image[:, y, x]) ** 2).sum()
                    weight = np.exp(-(a * a + b * b) / (2 * 1.5**2) - apart / (2 * 0.3**2))
                    expected[:, y, x] += weight * scores[:, v, u]
                    total += weight
            expected[:, y, x] /= total
    found = refine.joint_bilateral(
        torch.from_numpy(scores), torch.from_numpy(image), radius=2, spatial=1.5, colour=0.3
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("step", [refine.pamr, refine.joint_bilateral])
def test_refining_follows_the_edges_of_the_image(step):
    """A blurred disc on the picture of a sharp one comes nearer to it; constants stay."""
    y, x = np.mgrid[:48, :48]
    disc = ((y - 22) ** 2 + (x - 26) ** 2 < 12**2).astype(np.float32)
    image = torch.from_numpy(np.stack([0.2 + 0.6 * disc, 0.5 - 0.2 * disc, 0.3 + 0 * disc]))
    image = image + 0.02 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    blurred = cv2.GaussianBlur(np.roll(disc, 3, 1), (0, 0), 4)
    scores = torch.from_numpy(blurred)[None]

    def iou(found):
        mask, truth = found[0].numpy() >= 0.5, disc > 0
        return (mask & truth).sum() / (mask | truth).sum()

    refined = step(scores, image)
    assert iou(refined) > iou(scores) + 0.05
    assert refined.min() >= scores.min() - 1e-5 and refined.max() <= scores.max() + 1e-5
    constant = torch.full((1, 48, 48), 0.3)
    torch.testing.assert_close(step(constant, image), constant)


@pytest.mark.parametrize("seed", range(5))
def test_otsus_threshold_is_that_of_opencv(seed):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(0.25, 0.08, 700), rng.normal(0.7, 0.1, 324)]).clip(0, 1)
    bins = np.minimum((values * 256).astype(np.uint8), 255).reshape(32, 32)
    last_below, _ = cv2.threshold(bins, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    found = thresholds.otsu(torch.from_numpy(values.reshape(1, 32, 32)))
    assert abs(float(found) - (last_below + 1) / 256) < 2 / 256


def test_two_gaussians_cross_where_their_densities_do():
    rng = np.random.default_rng(0)
    low, high = rng.normal(0.2, 0.05, 70_000), rng.normal(0.7, 0.1, 30_000)
    scores = torch.from_numpy(np.concatenate([low, high]).reshape(1, 250, 400))
    x = np.linspace(0.2, 0.7, 5001)
    lower = 0.7 / 0.05 * np.exp(-((x - 0.2) ** 2) / (2 * 0.05**2))
    upper = 0.3 / 0.1 * np.exp(-((x - 0.7) ** 2) / (2 * 0.1**2))
    probability = upper / (lower + upper)
    for posterior in (0.3, 0.5, 0.7):
        expected = x[np.argmax(probability >= posterior)]
        assert abs(float(thresholds.two_gaussians(scores, posterior)) - expected) < 0.01
    sure, known = uncertain.posterior(scores)
    assert float(known) < float(thresholds.two_gaussians(scores)) < float(sure)


def test_pixels_without_a_winner_are_open():
    scores = torch.tensor([[[0.5, 0.9]], [[0.45, 0.1]], [[0.0, 0.0]]])
    assert uncertain.margin(scores, least=0.1).tolist() == [[True, False]]
    assert uncertain.margin(scores, least=0.01).tolist() == [[False, False]]
    equal = torch.full((3, 1, 1), 0.4)
    assert uncertain.entropy(equal, most=0.99).item() is True
    shares = scores.clamp(min=1e-6) / scores.clamp(min=1e-6).sum(0)
    bits = -(shares * shares.log()).sum(0) / np.log(3)
    assert uncertain.entropy(scores, most=0.5).tolist() == (bits > 0.5).tolist()
    assert not uncertain.margin(scores[:1]).any() and not uncertain.entropy(scores[:1]).any()


def test_thresholds_of_each_class_are_its_own():
    """By hand: a class is where it is the strongest and reaches its own threshold."""
    stored, image = heat(3, 2, 8, 4).numpy(), picture(32)
    steps = [{"propagate": "power"}, {"normalise": "min_max"}, {"threshold": "otsu"}]
    settings = MaskSettings(power=1, steps=steps)
    large = scored(stored, settings, (32, 32), image)
    least = thresholds.otsu(normalise.min_max(torch.from_numpy(stored[:, 1])))
    expected = np.zeros((32, 32), np.uint8)
    for y in range(32):
        for x in range(32):
            k = int(large.scores_KHW[:, y, x].argmax())
            if large.scores_KHW[k, y, x] >= least[k]:
                expected[y, x] = (7, 3, 5)[k]
    assert len(set(least.tolist())) == 3 and (expected > 0).any()
    np.testing.assert_array_equal(to_mask(stored, (7, 3, 5), (32, 32), settings), expected)


def test_the_background_has_a_score_of_its_own():
    stored = heat(2, 1, 8, 5).numpy()
    steps = [
        {"propagate": "power"},
        {"normalise": "min_max"},
        {"background": "inverse", "alpha": 2.0},
        {"threshold": "background"},
        {"uncertain": "band"},
    ]
    settings = MaskSettings(power=0, band=0.2, steps=steps)
    found = scored(stored, settings, (8, 8))
    best = found.scores_KHW.amax(0)
    torch.testing.assert_close(found.background_HW, (1 - best) ** 2)
    mask = to_mask(stored, (1, 2), (8, 8), settings)
    less = (best - found.background_HW).numpy()
    assert ((mask == 255) == ((less < 0) & (less >= np.float32(-0.2)))).all()
    assert ((mask == 0) == (less < np.float32(-0.2))).all() and (mask == 255).any()


def test_the_papers_chain_is_the_default_and_has_its_identity():
    """A mask set made before chains is the same set."""
    assert MaskSettings().steps == PAPER == MaskSettings(steps=PLAIN).steps
    assert MaskSettings(steps=PLAIN).identity() == {
        "power": 4,
        "threshold": 0.6,
        "band": 0.1,
        "source": "class_prompt",
    }
    other = MaskSettings(steps=EDGES).identity()
    assert other.keys() == {"source", "steps"}  # power, threshold and band are read by none
    assert other["steps"][2] == {
        "refine": "pamr",
        "iterations": 10,
        "dilations": [1, 2, 4, 8, 12, 24],
        "cells": 4,
    }
    assert MaskSettings(**other) == MaskSettings(steps=EDGES)
    assert hash(MaskSettings(**other)) == hash(MaskSettings(steps=EDGES))


def test_refined_at_a_fixed_number_of_pixels_a_cell(monkeypatch):
    sizes = []

    def seen(scores, image, **given):
        sizes.append((scores.shape, image.shape, given))
        return scores

    steps = parse([*EDGES[:2], {"refine": "pamr", "cells": 3}, EDGES[3]])
    monkeypatch.setitem(STEPS["refine"], "pamr", seen)
    own = {"power": 4, "threshold": 0.6, "band": 0.1, "source": "class_prompt"}
    run(steps, {"class_prompt": heat(2).numpy()}, own, (40, 50), picture(64))
    (scores, image, given) = sizes[0]
    assert scores == (2, 24, 24) and image == (3, 24, 24)
    assert "cells" not in given


@pytest.mark.parametrize("chain", [PLAIN, EDGES])
def test_a_grid_counts_what_masks_hold(chain):
    stored = {"class_prompt": heat(2, 3, 8, 6).numpy()}
    reference = np.random.default_rng(0).integers(0, 4, (32, 32)).astype(np.uint8)
    reference[:3] = 255
    grid = [
        MaskSettings(power=p, threshold=t, band=0.1, steps=chain)
        for p in (0, 2)
        for t in (0.4, 0.6)
    ]
    found = count_grid(stored, (3, 1), reference, grid, 4, picture(32))
    for settings, counts in zip(grid, found, strict=True):
        mask = to_mask(stored["class_prompt"], (3, 1), (32, 32), settings, picture(32))
        for truth in range(4):
            for value in (*range(4), 255):
                number = ((reference == truth) & (mask == value)).sum()
                assert counts[truth, 4 if value == 255 else value] == number


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("pamr", "expected a list of steps"),
        ([], "expected a list of steps"),
        ([{"refine": "crf"}], "refine: 'crf': no such step; allowed: pamr, joint_bilateral"),
        ([{"sharpen": "pamr"}], "is not a step; a step is one of weight, presence, propagate"),
        ([{"refine": "pamr", "rounds": 3}], "pamr takes no rounds; allowed: iterations, dilations"),
        ([{"refine": "pamr", "iterations": 0}], "iterations=0: expected a whole number of 1"),
        ([{"refine": "pamr", "dilations": []}], "pamr: dilations="),
        ([{"propagate": "power", "power": 2}], "power takes no power; allowed: nothing"),
        (PLAIN[1:], "0 of propagate; a chain has one of power, walk, adaptive"),
        ([PLAIN[1], PLAIN[0], *PLAIN[2:]], "their order is " + ", ".join(ORDER)),
        ([*PLAIN[:2], {"threshold": "background"}], "need each other; one of them is missing"),
        ([*PLAIN, {"uncertain": "posterior"}], "band and posterior; a chain has one"),
        ([*PLAIN[:3], {"uncertain": "posterior"}], "posterior} uses the two Gaussians"),
        ([{"presence": "evidence"}] * 2 + PLAIN, "more than one of presence"),
        (
            [PLAIN[0], {"normalise": "elbo"}, {"background": "words"}, {"threshold": "background"}],
            "elbo} has no errors of {background: words}",
        ),
    ],
)
def test_what_is_no_chain_is_refused_in_words(steps, message):
    with pytest.raises(ValueError, match=f"^masks.steps: .*{message}|^masks.steps.*{message}"):
        MaskSettings(steps=steps)


def test_refining_without_the_image_is_refused():
    with pytest.raises(ValueError, match="refine: pamr.* follows the edges of the image, but no"):
        to_mask(heat(2).numpy(), (1, 2), (32, 32), MaskSettings(steps=EDGES))


def test_without_uncertainty_each_pixel_is_decided():
    stored = heat(3, 5, 8, 7).numpy()
    settings = MaskSettings(steps=[*PLAIN, {"uncertain": "margin", "least": 0.3}])
    assert (to_mask(stored, (1, 2, 3), (32, 32), settings) == 255).mean() > 0.2
    certain = to_mask(stored, (1, 2, 3), (32, 32), settings.certain())
    plain = to_mask(stored, (1, 2, 3), (32, 32), MaskSettings(band=0.0))
    np.testing.assert_array_equal(certain, plain)


def test_heat_of_several_sides_is_weighed():
    """By hand: each map divided by its sum, at every power."""
    stored = {f"class_prompt@{side}": heat(2, 3, 8, side).numpy() for side in (4, 8)}
    steps = [{"weight": "by_side", "sides": [4, 8], "shares": [0.3, 0.7]}, *PLAIN]
    settings = MaskSettings(power=1, threshold=0.5, steps=steps)
    parts = [
        share * m / m.sum((2, 3), keepdims=True)
        for share, m in zip((0.3, 0.7), stored.values(), strict=True)
    ]
    plain = MaskSettings(power=1, threshold=0.5)
    expected = to_mask(sum(parts), (1, 2), (16, 16), plain)
    np.testing.assert_array_equal(to_mask(stored, (1, 2), (16, 16), settings), expected)
    assert (expected != to_mask(stored["class_prompt@8"], (1, 2), (16, 16), plain)).any()
    message = (
        r"class_prompt@8 is not stored in this data set: it holds class_prompt@4.*groups=\[8\]"
    )
    with pytest.raises(ValueError, match=message):
        to_mask({"class_prompt@4": stored["class_prompt@4"]}, (1, 2), (16, 16), settings)
    uneven = [{"weight": "by_side", "sides": [4, 8], "shares": [1.0]}, *PLAIN]
    with pytest.raises(ValueError, match="2 sides and 1 shares; give one share for each side"):
        to_mask(stored, (1, 2), (16, 16), MaskSettings(power=1, steps=uneven))


def test_two_readings_that_differ_leave_pixels_open():
    stored = {"class_prompt": heat(2, 2, 8, 1).numpy(), "after": heat(2, 2, 8, 2).numpy()}
    steps = [*PLAIN[:3], {"uncertain": "disagreement", "most": 0.2}]
    settings = MaskSettings(power=1, threshold=0.5, steps=steps)
    assert settings.sources == ["class_prompt", "after"]
    one, other = (normalise.min_max(torch.from_numpy(m[:, 1])) for m in stored.values())
    mask = to_mask(stored, (1, 2), (8, 8), settings)
    apart = ((one - other).abs() / 2 > 0.2).any(0).numpy()
    np.testing.assert_array_equal(mask == 255, apart)
    assert apart.any() and not apart.all()
    with pytest.raises(ValueError, match="after is not stored .*diffusion.reading=both"):
        to_mask({"class_prompt": stored["class_prompt"]}, (1, 2), (8, 8), settings)


def test_words_of_the_background_compete_with_the_classes():
    stored = {"class_prompt": heat(2, 2, 8, 1).numpy(), "background": heat(3, 2, 8, 2).numpy()}
    steps = [*PLAIN[:2], {"background": "words"}, {"threshold": "background"}]
    settings = MaskSettings(power=1, steps=steps)
    classes, words = (normalise.min_max(torch.from_numpy(m[:, 1])) for m in stored.values())
    mask = to_mask(stored, (4, 9), (8, 8), settings)
    best = classes.float().max(0)
    wins = best.values >= words.float().amax(0)
    expected = np.where(wins, np.array([4, 9])[best.indices], 0)
    np.testing.assert_array_equal(mask, expected)
    assert wins.any() and not wins.all()
    with pytest.raises(ValueError, match=r"background is not stored .*background_words=\["):
        to_mask({"class_prompt": stored["class_prompt"]}, (4, 9), (8, 8), settings)


def numbers(*values):
    return np.array(values).reshape(-1, 1, 1, 1)


def test_a_class_whose_word_explains_nothing_has_no_pixel():
    stored = {"class_prompt": heat(3, 2, 8, 1).numpy(), "evidence": numbers(0.02, -0.01, 0.0)}
    steps = [{"presence": "evidence"}, *PLAIN[:3]]
    settings = MaskSettings(power=1, threshold=0.5, steps=steps)
    assert settings.sources == ["class_prompt", "evidence"]
    found = scored(stored, settings, (8, 8))
    assert found.nothing == [False, True, True]
    alone = MaskSettings(power=1, threshold=0.5, steps=PLAIN[:3])
    expected = to_mask(stored["class_prompt"][:1], (4,), (8, 8), alone)
    np.testing.assert_array_equal(to_mask(stored, (4, 9, 7), (8, 8), settings), expected)
    # the class with the most evidence is shown, whatever there is of it
    stored["evidence"] = numbers(-0.03, -0.01, -0.02)
    assert scored(stored, settings, (8, 8)).nothing == [True, False, True]
    least = [{"presence": "evidence", "least": -0.025}, *PLAIN[:3]]
    settings = MaskSettings(power=1, threshold=0.5, steps=least)
    assert scored(stored, settings, (8, 8)).nothing == [True, False, False]
    with pytest.raises(ValueError, match=r"evidence is not stored .*diffusion.word_errors=\["):
        to_mask({"class_prompt": stored["class_prompt"]}, (4, 9, 7), (8, 8), settings)


def test_scores_of_what_is_explained_worst_are_sharpened_most():
    stored = {"class_prompt": heat(3, 2, 8, 1).numpy(), "evidence_alone": numbers(0.3, 0.1, 0.2)}
    settings = MaskSettings(power=1, steps=[PLAIN[0], {"normalise": "elbo"}, PLAIN[2]])
    maps = normalise.min_max(torch.from_numpy(stored["class_prompt"][:, 1]))
    expected = [maps[0], maps[1] ** 3, maps[2] ** 3**0.5]
    found = scored(stored, settings, (8, 8)).scores_KHW
    torch.testing.assert_close(found, torch.stack(expected).float())
    stored["evidence_alone"] = numbers(0.2, 0.2, 0.2)
    torch.testing.assert_close(scored(stored, settings, (8, 8)).scores_KHW, maps.float())


@pytest.mark.parametrize("cut", ["otsu", "two_gaussians"])
def test_a_class_that_shows_nothing_has_no_pixel_whatever_finds_its_threshold(cut):
    stored = heat(2, 1, 8, 1).numpy()
    stored[1] = 0.25
    settings = MaskSettings(power=0, steps=[*PLAIN[:2], {"threshold": cut}])
    mask = to_mask(stored, (4, 9), (16, 16), settings)
    assert (mask == 4).any() and not (mask == 9).any()
    assert scored(stored, settings, (16, 16)).nothing == [False, True]


def test_sides_and_a_second_reading_are_read_together():
    stored = {f"class_prompt@{side}": heat(2, 2, 8, side).numpy() for side in (4, 8)}
    stored["after"] = heat(2, 2, 8, 3).numpy()
    weight = {"weight": "by_side", "sides": [4, 8], "shares": [0.5, 0.5]}
    open_ = {"uncertain": "disagreement", "most": 0.2}
    one = MaskSettings(power=1, threshold=0.5, steps=[weight, *PLAIN[:3]])
    both = MaskSettings(power=1, threshold=0.5, steps=[weight, *PLAIN[:3], open_])
    mask, certain = (to_mask(stored, (1, 2), (8, 8), s) for s in (both, one))
    assert (mask == 255).any()
    np.testing.assert_array_equal(mask[mask != 255], certain[mask != 255])
