import math

import pytest
import torch

from dd.attention import maths as attention
from dd.attention.maths import (
    class_maps,
    exponentiate,
    mean_attention,
    refine,
    resize_maps,
    split_heads,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stochastic(*shape, seed=0):
    return random(*shape, seed=seed).softmax(-1)


def test_split_heads_keeps_each_head_together():
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 2)
    for h in range(4):
        assert torch.equal(heads[:, h], x[:, :, 2 * h : 2 * h + 2])


def test_mean_attention_against_loops():
    q, k, scale = random(2, 3, 4, 5), random(2, 3, 6, 5, seed=1), 0.7
    found = mean_attention(q, k, scale)
    for b in range(2):
        for n in range(4):
            expected = [0.0] * 6
            for h in range(3):
                logits = [
                    sum(float(q[b, h, n, d]) * float(k[b, h, t, d]) for d in range(5)) * scale
                    for t in range(6)
                ]
                powers = [math.exp(x) for x in logits]
                for t in range(6):
                    expected[t] += powers[t] / sum(powers) / 3
            torch.testing.assert_close(found[b, n], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_distributions_in_float32(dtype):
    found = mean_attention(
        random(2, 3, 16, 8).to(dtype), random(2, 3, 77, 8, seed=1).to(dtype) * 20, 1.0
    )
    assert found.dtype == torch.float32 and found.shape == (2, 16, 77)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 16))


def test_mean_attention_leaves_its_arguments_alone():
    q, k = random(1, 2, 4, 5), random(1, 2, 6, 5, seed=1)
    before = q.clone(), k.clone()
    mean_attention(q, k, 0.5)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


def test_samples_of_a_batch_do_not_touch_each_other():
    q, k = random(4, 2, 9, 5), random(4, 2, 7, 5, seed=1)
    together, order = mean_attention(q, k, 0.5), [2, 0, 3, 1]
    torch.testing.assert_close(mean_attention(q[order], k[order], 0.5), together[order])
    for b in range(4):
        torch.testing.assert_close(mean_attention(q[b : b + 1], k[b : b + 1], 0.5)[0], together[b])


def test_a_class_map_is_the_mean_over_its_tokens():
    cross = stochastic(9, 7)
    maps = class_maps(cross, [[1], [2, 3, 5]])
    assert maps.shape == (2, 9)
    torch.testing.assert_close(maps[0], cross[:, 1])
    torch.testing.assert_close(maps[1], (cross[:, 2] + cross[:, 3] + cross[:, 5]) / 3)


def test_resizing_keeps_the_place_of_a_peak_and_of_each_class():
    maps = torch.zeros(2, 8, 8)
    maps[0, 1, 5] = maps[1, 6, 2] = 1
    large = resize_maps(maps.flatten(1), 16)
    assert large.shape == (2, 256)
    for k, (row, column) in enumerate([(1, 5), (6, 2)]):
        y, x = divmod(int(large[k].argmax()), 16)
        assert (y // 2, x // 2) == (row, column)
    torch.testing.assert_close(resize_maps(torch.full((1, 64), 0.3), 16), torch.full((1, 256), 0.3))


def test_resizing_to_the_same_side_changes_nothing():
    maps = random(3, 64)
    assert torch.equal(resize_maps(maps, 8), maps)


def test_exponentiation_against_the_matrix_power():
    attention, maps = stochastic(12, 12).double(), stochastic(3, 12, seed=1).double()
    powers = exponentiate(attention, maps, 6)
    assert powers.shape == (3, 7, 12)
    for k in range(7):
        torch.testing.assert_close(powers[:, k].T, torch.linalg.matrix_power(attention, k) @ maps.T)


def test_power_zero_is_the_map_itself_and_constants_stay():
    attention, maps = stochastic(12, 12), stochastic(3, 12, seed=1)
    torch.testing.assert_close(
        exponentiate(attention, maps, 4)[:, 0], maps.double(), rtol=2e-7, atol=1e-8
    )
    assert exponentiate(attention, maps, 0).shape == (3, 1, 12)
    constant = torch.full((1, 12), 1 / 77)
    assert torch.equal(exponentiate(attention, constant, 5), constant.double().expand(1, 6, 12))


def test_heat_is_made_by_the_steps_in_order():
    cross, self_attention, spans = (
        stochastic(64, 9),
        stochastic(256, 256, seed=1),
        [[1, 2], [4], [5]],
    )
    heat = refine(class_maps(cross, spans), self_attention, 16, 3)
    assert heat.shape == (3, 4, 16, 16) and heat.dtype == torch.float64
    start = resize_maps(class_maps(cross, spans), 16).double()
    for power in range(4):
        expected = start @ torch.linalg.matrix_power(self_attention.double(), power).T
        torch.testing.assert_close(heat[:, power].flatten(1), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("cross_side", "self_side"), [(8, 8), (8, 16), (16, 8), (3, 6)])
def test_heat_has_the_side_of_the_self_attention(cross_side, self_side):
    maps = class_maps(stochastic(cross_side**2, 5), [[1], [2]])
    heat = refine(maps, stochastic(self_side**2, self_side**2), self_side, 2)
    assert heat.shape == (2, 3, self_side, self_side)


@pytest.mark.parametrize("heads_at_once", [1, 2, 3, 8])
def test_the_mean_is_the_same_for_any_number_of_heads_at_a_time(monkeypatch, heads_at_once):
    q, k = random(2, 8, 16, 4), random(2, 8, 7, 4, seed=1)
    monkeypatch.setitem(attention.AT_ONCE, "cpu", heads_at_once * 2 * 16 * 7 * 4)
    expected = torch.softmax(q @ k.transpose(2, 3) * 0.5, -1).mean(1)
    torch.testing.assert_close(mean_attention(q, k, 0.5), expected, rtol=1e-5, atol=1e-7)
