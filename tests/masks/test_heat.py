"""From attention to masks through the file, against the method written out in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load, load_file, save_file

from dd.attention.maths import class_maps, mean_attention, refine
from dd.data.datasets import OtherDtype, as_stored, heat_bytes, stored_heat
from dd.masks.from_heat import MaskSettings, to_mask

LAYERS, HEADS, WIDTH, TOKENS, POWERS, SIZE = 6, 4, 16, 77, 8, 128
SPANS = [[1], [2, 3], [4]]


def discs(side, centres, radii):
    """Three soft discs as columns [side * side, 3]."""
    place = np.stack(np.mgrid[0:side, 0:side] / side, -1).reshape(-1, 1, 2)
    return 1 / (1 + np.exp((np.linalg.norm(place - centres, axis=-1) - radii) / 0.03))


def projections(seed, cross_side, self_side, mixing):
    """Queries and keys float32 [heads, N or T, D] of some layers, (self, self, cross, cross) of
    each.

    The lower ``mixing``, the faster the self-attention carries heat out of the objects.
    """
    rng = np.random.default_rng(seed)
    centres, radii = rng.uniform(0.2, 0.8, (3, 2)), rng.uniform(0.12, 0.22, 3)
    fine, coarse = (discs(side, centres, radii) for side in (self_side, cross_side))
    layers = []
    for _ in range(LAYERS):
        meanings = rng.normal(size=(3, WIDTH))
        meanings *= 4 / np.linalg.norm(meanings, axis=1, keepdims=True)
        own = [fine @ meanings * mixing + rng.normal(size=(len(fine), WIDTH)) * 0.3 for _ in "qk"]
        seen = coarse @ meanings + rng.normal(size=(len(coarse), WIDTH)) * 0.1
        words = rng.normal(size=(TOKENS, WIDTH)) * 0.3
        words[[1, 2, 4]] += meanings * 0.2
        both = (*own, seen, words)
        layers.append(
            [np.stack([x * (1 + 0.1 * h) for h in range(HEADS)]).astype(np.float32) for x in both]
        )
    return layers


def oracle(layers, cross_side, self_side):
    """Dataset Diffusion in float64: softmax, mean over heads and layers, mean over a class's
    tokens, bicubic to the self-attention's side, products with it one after the other: [K, P, r,
    r]."""

    def mean(queries, keys):
        total = 0
        for q, k in zip(queries, keys, strict=True):
            logits = q.astype(np.float64) @ k.astype(np.float64).swapaxes(1, 2) / np.sqrt(WIDTH)
            powers = np.exp(logits - logits.max(-1, keepdims=True))
            total = total + (powers / powers.sum(-1, keepdims=True)).mean(0)
        return total / len(layers)

    self_NN, cross_NT = (mean([x[i] for x in layers], [x[i + 1] for x in layers]) for i in (0, 2))
    start = torch.from_numpy(np.stack([cross_NT[:, span].mean(1) for span in SPANS]))
    start = start.view(1, len(SPANS), cross_side, cross_side)
    if cross_side != self_side:
        start = F.interpolate(start, size=(self_side, self_side), mode="bicubic")
    maps = [start.numpy().reshape(len(SPANS), -1)]
    for _ in range(POWERS):
        maps.append(maps[-1] @ self_NN.T)
    return np.stack(maps, 1).reshape(len(SPANS), POWERS + 1, self_side, self_side)


def oracle_mask(heat_KPrr, power, threshold=0.6, band=0.1):
    maps = torch.from_numpy(heat_KPrr[:, power])
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    best, which = F.interpolate(
        ((maps - low) / (high - low))[None], size=(SIZE, SIZE), mode="bicubic"
    )[0].max(0)
    mask = which + 1
    mask[best < threshold] = 255
    mask[best < threshold - band] = 0
    return mask.numpy()


def recorded(layers):
    """What a recorder hands over, in float32: (cross [N, T], self-attention [M, M])."""
    total = {"self": None, "cross": None}
    for layer in layers:
        for name, pair in zip(total, (layer[:2], layer[2:]), strict=True):
            queries, keys = (torch.from_numpy(x)[None] for x in pair)
            total[name] = mean_attention(queries, keys, WIDTH**-0.5, total[name])
    return total["cross"][0] / len(layers), total["self"][0] / len(layers)


def through_the_file(heat, tmp_path):
    (tmp_path / "heat").mkdir(exist_ok=True)
    (tmp_path / "heat/0.safetensors").write_bytes(heat_bytes({"class_prompt": heat}, {}))
    return stored_heat(tmp_path, "0")["class_prompt"]


@pytest.mark.parametrize(("cross_side", "self_side"), [(16, 16), (16, 32)])
@pytest.mark.parametrize(("mixing", "left"), [(1.0, 1e-3), (0.8, 1e-4), (0.7, 1e-5)])
def test_masks_of_stored_heat_are_those_of_the_method(
    tmp_path, cross_side, self_side, mixing, left
):
    """``left``: the contrast of power 8, of values about 1/77. Heat stored as float32 of the whole
    value fails for the smallest one, as float16 for each."""
    for seed in range(2):
        layers = projections(seed, cross_side, self_side, mixing)
        exact = oracle(layers, cross_side, self_side)
        contrasts = np.ptp(exact[:, POWERS], (1, 2))
        assert (
            0.9 < exact.mean() * TOKENS < 1.6
            and left / 3 < contrasts.min() < contrasts.max() < 10 * left
        )
        cross, own = recorded(layers)
        side = int(own.shape[0] ** 0.5)
        heat = refine(class_maps(cross, SPANS), own, side, POWERS).numpy()
        stored = through_the_file(heat, tmp_path)
        np.testing.assert_allclose(stored, exact, rtol=1e-5)  # the level is there too
        for power in range(POWERS + 1):
            mask = to_mask(stored, (1, 2, 3), (SIZE, SIZE), MaskSettings(power=power))
            expected = oracle_mask(exact, power)
            assert len(np.unique(expected)) > 2
            assert (mask == expected).mean() >= 0.999, power


# The file


def test_the_file_keeps_contrast_far_below_the_level(tmp_path):
    contrast = np.random.default_rng(0).random((2, 3, 8, 8)) * 1e-7
    heat = contrast + 1 / 77
    stored = through_the_file(heat, tmp_path)
    assert stored.dtype == np.float64 and stored.shape == (2, 3, 8, 8)
    relative = stored - stored.mean((2, 3), keepdims=True)
    np.testing.assert_allclose(
        relative, contrast - contrast.mean((2, 3), keepdims=True), atol=1e-14
    )
    np.testing.assert_allclose(stored, heat, rtol=1e-7)
    assert np.abs(np.float32(heat) - heat).max() > 1e-10  # as float32 it would be lost


def test_the_file_is_float32_and_what_is_read_is_what_was_promised(tmp_path):
    heat = {
        s: np.random.default_rng(i).random((2, 3, 4, 4))
        for i, s in enumerate(("class_prompt", "full_prompt_caption"))
    }
    tensors = load(heat_bytes(heat, {"classes": ["a", "b"]}))
    assert {name: (v.dtype.name, v.shape) for name, v in tensors.items()} == {
        name + end: ("float32", (2, 3, *more))
        for name in heat
        for end, more in (("", (4, 4)), (".mean", ()))
    }
    (tmp_path / "heat").mkdir()
    (tmp_path / "heat/0.safetensors").write_bytes(heat_bytes(heat, {}))
    stored, promised = stored_heat(tmp_path, "0"), as_stored(heat)
    assert stored.keys() == promised.keys() == heat.keys()
    assert all(np.array_equal(stored[s], promised[s]) for s in heat)


def test_maps_without_means_are_taken_as_they_are(tmp_path):
    (tmp_path / "heat").mkdir()
    maps = np.random.default_rng(0).random((1, 2, 4, 4)).astype(np.float32)
    save_file({"class_prompt": maps}, tmp_path / "heat/0.safetensors")
    assert np.array_equal(stored_heat(tmp_path, "0")["class_prompt"], maps)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_heat_of_another_precision_is_refused(tmp_path, dtype):
    (tmp_path / "heat").mkdir()
    save_file({"class_prompt": np.zeros((1, 2, 4, 4), dtype)}, tmp_path / "heat/0.safetensors")
    message = (
        f"0.safetensors holds class_prompt in {dtype.__name__}, expected float32: .*Draw "
        "the set again"
    )
    with pytest.raises(OtherDtype, match=message):
        stored_heat(tmp_path, "0")
    assert load_file(tmp_path / "heat/0.safetensors")["class_prompt"].dtype == dtype


@pytest.mark.parametrize("means", [(1, 3), (2, 2), (1, 2, 1)])
def test_means_that_fit_no_maps_are_damage(tmp_path, means):
    (tmp_path / "heat").mkdir()
    maps = np.zeros((1, 2, 4, 4), np.float32)
    save_file(
        {"class_prompt": maps, "class_prompt.mean": np.zeros(means, np.float32)},
        tmp_path / "heat/0.safetensors",
    )
    with pytest.raises(ValueError, match=r"is damaged \(class_prompt.mean of shape"):
        stored_heat(tmp_path, "0")
