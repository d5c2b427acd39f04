"""Scores against loops over the pixels, in float64."""

import math

import numpy as np
import pytest
import torch

from dd.evaluation.uncertainty import alike, entropy, look, margin, near_pairs


def probabilities(classes, seed=0):
    logits = np.random.default_rng(seed).normal(0, 3, (classes, 5, 7))
    return torch.tensor(logits, dtype=torch.float32).softmax(0)


@pytest.mark.parametrize("classes", [2, 9])
def test_scores_are_those_of_loops(classes):
    p = probabilities(classes)
    entropies, margins = [], []
    for y in range(5):
        for x in range(7):
            pixel = sorted((float(v) for v in p[:, y, x]), reverse=True)
            entropies.append(-sum(v * math.log(v) for v in pixel))
            margins.append(1 - (pixel[0] - pixel[1]))
    assert entropy(p) == pytest.approx(sum(entropies) / 35, rel=1e-5)
    assert margin(p) == pytest.approx(sum(margins) / 35, rel=1e-5)


def test_the_ends_of_the_scale():
    sure, unsure = torch.zeros(4, 3, 3), torch.full((4, 3, 3), 0.25)
    sure[1] = 1
    assert entropy(sure) == margin(sure) == 0
    assert entropy(unsure) == pytest.approx(math.log(4)) and margin(unsure) == 1
    half = unsure.bfloat16()
    assert entropy(half) == entropy(unsure)


def test_a_look_stays_when_an_image_is_darker_or_smaller_and_not_for_another():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (8, 9, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    other = rng.integers(0, 256, image.shape, dtype=np.uint8)
    assert alike(look(image), look(image)) == 0
    assert alike(look(image), look((image * 0.6).astype(np.uint8))) <= 4
    assert alike(look(image), look(image[::2, ::2])) <= 4
    assert alike(look(image), look(other)) > 10
    assert alike(look(image), look(image[:, ::-1])) > 10


def test_a_look_of_a_slope_and_of_a_pixel():
    slope = np.arange(90, dtype=np.uint8)[None, :, None].repeat(16, 0).repeat(3, 2)
    assert look(slope) == 2**64 - 1 and look(slope[:, ::-1]) == 0
    assert look(np.zeros((1, 1, 3), np.uint8)) == 0


def test_near_pairs_are_those_of_few_bits():
    looks = {"b": 0b1111, "a": 0b1110, "c": (1 << 63) | 0b1000, "far": (1 << 60) - 1, "flat": 0}
    assert near_pairs(looks, 0) == []
    assert near_pairs(looks, 1) == [("a", "b")]
    assert near_pairs(looks, 3) == [("a", "b"), ("a", "c")]
    assert near_pairs(looks | {"flat too": 0, "b too": 0b1111}, 0) == [("b", "b too")]
    assert near_pairs({}, 3) == near_pairs({"a": 1}, 3) == []
