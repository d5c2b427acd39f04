import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, binary_fill_holes, binary_opening

from dd.embedded import scenes as world
from dd.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    DOMAINS,
    LIGHTS,
    MIN_VISIBLE,
    NAMES,
    SPLITS,
    scene,
)
from dd.embedded.things import THINGS, Look
from dd.generators import load_vae
from dd.taxonomy import IGNORE, SHAPES_NAMES

EVERY = [(domain, split) for domain in DOMAINS for split in SPLITS]


@pytest.fixture(scope="module")
def scenes():
    return {(d, s, i): scene(d, s, i) for d, s in EVERY for i in range(40)}


def same(a, b):
    return (
        a.image.tobytes() == b.image.tobytes()
        and a.mask.tobytes() == b.mask.tobytes()
        and a.caption == b.caption
    )


@pytest.mark.parametrize(("domain", "split"), EVERY)
def test_a_scene_is_a_pure_function_of_its_arguments(domain, split, scenes):
    np.random.seed(3)
    for i in (7, 0):  # in another order than the fixture, with another global random state
        assert same(scene(domain, split, i), scenes[domain, split, i])
    assert not same(scene(domain, split, 7, seed=1), scenes[domain, split, 7])


def test_form_of_a_scene(scenes):
    for s in scenes.values():
        assert (
            s.image.dtype == np.uint8
            and s.image.shape == (128, 128, 3)
            and s.image.flags.c_contiguous
        )
        assert s.mask.dtype == np.uint8 and s.mask.shape == (128, 128)
    large = scene("shapes", "train", 0, size=96)
    assert large.image.shape == (96, 96, 3) and large.mask.shape == (96, 96)


def test_masks_hold_the_named_classes_and_nothing_else(scenes):
    for s in scenes.values():
        assert 1 <= len(s.classes) <= 3 and len(set(s.classes)) == len(s.classes)
        assert set(np.unique(s.mask)) - {0} == {NAMES.index(c) + 1 for c in s.classes}
        assert IGNORE not in s.mask


def test_captions_name_classes_background_colour_and_light(scenes):
    for s in scenes.values():
        assert s.background in BACKGROUNDS and s.colour in COLOURS and s.light in LIGHTS
        assert f"{s.background} {s.colour} background" in s.caption
        assert f"{s.light} light" in s.caption
        places = [s.caption.find(name) for name in s.classes]
        assert min(places) >= 0 and places == sorted(places)
        assert not [n for n in NAMES if n in s.caption and n not in s.classes]


def test_every_class_number_and_condition_occurs(scenes):
    for domain in DOMAINS:
        there = [s for (d, _, _), s in scenes.items() if d == domain]
        assert {name for s in there for name in s.classes} == set(NAMES)
        assert {len(s.classes) for s in there} == {1, 2, 3}
        assert {s.background for s in there} == set(BACKGROUNDS)
        assert {s.colour for s in there} == set(COLOURS)
        assert {s.light for s in there} == set(LIGHTS)


def test_splits_and_domains_share_no_image(scenes):
    images = {hashlib.sha256(s.image.tobytes()).digest() for s in scenes.values()}
    masks = {hashlib.sha256(s.mask.tobytes()).digest() for s in scenes.values()}
    assert len(images) == len(masks) == len(scenes) == len(EVERY) * 40


def test_every_object_stays_visible_and_masks_are_exact(monkeypatch):
    """A pixel is of the last thing whose outline holds it, and of no other."""
    arranged = []
    place = world._place
    monkeypatch.setattr(
        world, "_place", lambda *given: (arranged.append(place(*given)), arranged[-1])[1]
    )
    shares, drawn_again = [], 0
    for index in range(150):
        arranged.clear()
        s = scene("shapes", "train", index)
        drawn_again += len(arranged) > len(s.classes)
        expected = np.zeros_like(s.mask)
        pieces = arranged[-len(s.classes) :]
        for name, piece in zip(s.classes, pieces, strict=True):
            expected[piece.box][piece.inside > 0] = NAMES.index(name) + 1
        np.testing.assert_array_equal(s.mask, expected)
        for name, piece in zip(s.classes, pieces, strict=True):
            seen = (s.mask == NAMES.index(name) + 1).sum()
            shares.append(seen / (piece.inside > 0).sum())
    assert min(shares) >= MIN_VISIBLE >= 0.45
    assert drawn_again > 0  # the rule was needed
    assert min(shares) < 0.95  # and objects do overlap


def test_brightness_follows_the_light(scenes):
    mean = {
        light: np.mean(
            [
                s.image.mean()
                for (d, _, _), s in scenes.items()
                if d == "shapes" and s.light == light
            ]
        )
        for light in LIGHTS
    }
    assert mean["dark"] < 0.8 * mean["normal"] < 0.8 * mean["bright"]


def test_the_shifted_domain_differs_in_noise(scenes):
    def roughness(domain):
        images = [s.image.astype(float) for (d, _, _), s in scenes.items() if d == domain]
        return np.mean([np.abs(2 * x[:, 1:-1] - x[:, :-2] - x[:, 2:]).mean() for x in images])

    assert roughness("shapes_shift") > 1.2 * roughness("shapes")


@pytest.mark.parametrize(
    "arguments", [("shape", "train", 0), ("shapes", "val", 0), ("shapes", "train", -1)]
)
def test_scenes_that_do_not_exist(arguments):
    with pytest.raises(
        ValueError, match=r"no scene .*domains .*shapes_shift.*splits .*tune.*index >= 0"
    ):
        scene(*arguments)


def test_the_world_draws_the_classes_of_its_taxonomy():
    assert NAMES == SHAPES_NAMES


def test_articles():
    assert [world.article(n) for n in ("apple", "tire", "gold ring")] == [
        "an apple",
        "a tire",
        "a gold ring",
    ]


# What is finer than a cell of the attention


def outline(name, seed, side=128, radius=32):
    """Whether each pixel is of a thing, upright in the middle; its rng is of ``seed`` alone."""
    t = (np.arange(side, dtype=np.float32) + 0.5 - side / 2) / radius
    look = Look(np.random.default_rng(seed), 1 / radius, (-0.6, -0.8))
    return THINGS[name](*np.meshgrid(t, t), look)[0] > 0


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("heart", "brick", "gold ring")])
def test_things_have_parts_thinner_than_a_cell(name):
    """Parts that vanish where the outline is opened by a cell of the cross-attention (8 px)."""
    for seed in range(5):
        mask = outline(name, seed)
        opened = binary_opening(mask, np.ones((8, 8), bool))
        assert (mask & ~opened).sum() > 0.02 * mask.sum()


@pytest.mark.parametrize("name", ["brick", "tire", "gold ring", "mug"])
def test_the_background_is_seen_through_holes(name):
    for seed in range(5):
        mask = outline(name, seed)
        assert (binary_fill_holes(mask) & ~mask).sum() > 15


def test_mug_and_jar_share_a_body_and_differ_in_their_parts():
    for seed in range(8):
        mug, jar = outline("mug", seed), outline("jar", seed)
        body = binary_opening(mug, np.ones((14, 14), bool))
        assert (body & jar).sum() > 0.93 * body.sum()
        assert (mug ^ jar).sum() > 60
        holes = [binary_fill_holes(m) & ~m for m in (mug, jar)]
        assert holes[0].any() and not holes[1].any()  # the handle's


def test_every_drawn_colour_is_of_its_thing_or_its_background():
    """Where no thing and no shadow is near, the background is left alone: no stray lines."""
    for seed in range(12):
        t = np.linspace(-2.4, 2.4, 240, dtype=np.float32)
        for name in NAMES:
            look = Look(np.random.default_rng(seed), 1 / 50, (-0.6, -0.8))
            inside, _ = THINGS[name](*np.meshgrid(t, t), look)
            mask = inside > 0
            near = binary_dilation(mask, np.ones((3, 3), bool), iterations=2)
            assert (inside[~near] > -0.5 / 50).sum() < 0.01 * mask.sum(), name


def test_the_autoencoder_of_the_generators_keeps_what_is_drawn():
    """Scenes nobody was trained on come back within a few grey levels, thin parts included."""
    folder = Path(world.__file__).parent / "assets/shapes_unet"
    vae = load_vae(folder / "vae").float()
    images = np.stack([scene("shapes", "tune", i).image for i in range(8)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        made = vae.decode(latents).sample
    assert latents.shape == (8, 4, 32, 32) and vae.config.scaling_factor == 1
    assert 0.8 < latents.std() < 1.2
    assert float((made - pixels).abs().mean()) * 127.5 < 5
