"""Weights of heads and layers, against the formulas written out."""

import pytest
import torch

from dd.attention import maths, weights


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_shares_of_heads_are_the_products_written_out():
    out, projection = random(2, 3, 5, 4), random(7, 12, seed=1)
    shares = weights.head_weights(out, projection)
    assert shares.shape == (2, 3, 5)
    for b in range(2):
        for n in range(5):
            added = [projection[:, 4 * h : 4 * h + 4] @ out[b, h, n] for h in range(3)]
            whole = sum(added)
            for h in range(3):
                expected = (added[h] @ whole) / (whole @ whole)
                torch.testing.assert_close(shares[b, h, n], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 5))
    torch.testing.assert_close(
        weights.output_of(out, projection)[0, 0],
        projection @ out[0, :, 0].flatten(),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_head_that_adds_nothing_has_no_share_and_heads_that_cancel_have_equal_ones():
    out, projection = random(1, 2, 3, 4), random(6, 8, seed=1)
    out[:, 1] = 0
    torch.testing.assert_close(
        weights.head_weights(out, projection)[0],
        torch.tensor([[1.0, 1, 1], [0, 0, 0]]),
        rtol=0,
        atol=1e-6,
    )
    assert torch.equal(
        weights.head_weights(torch.zeros(1, 2, 3, 4), projection), torch.full((1, 2, 3), 0.5)
    )


@pytest.mark.parametrize("masked", [False, True])
def test_weighed_attention_is_the_sum_over_heads(masked):
    q, k, shares = random(2, 3, 4, 5), random(2, 3, 6, 5, seed=1), random(2, 3, 4, seed=2)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1, ..., 4:] = False
    logits = q.double() @ k.double().mT * 0.7
    if masked:
        logits = logits.masked_fill(~mask, -torch.inf)
    expected = (logits.softmax(-1) * shares[..., None]).sum(1)
    given = mask if masked else None
    whole = maths.mean_attention_by_heads(q, k, 0.7, given, shares)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-6)
    columns = maths.indicators([[[1], [2, 3]], [[0, 5]]], 6)
    thin = maths.mean_columns(q, k, columns, 0.7, given, shares)
    torch.testing.assert_close(thin.double(), expected @ columns.double(), rtol=1e-5, atol=1e-6)


def test_some_heads_at_a_time_give_the_same_weighed_attention(monkeypatch):
    q, k, shares = random(1, 4, 9, 5), random(1, 4, 7, 5, seed=1), random(1, 4, 9, seed=2)
    together = maths.mean_attention_by_heads(q, k, 0.5, None, shares)
    monkeypatch.setattr(maths, "AT_ONCE", {"cpu": 1, "cuda": 1})
    torch.testing.assert_close(maths.mean_attention_by_heads(q, k, 0.5, None, shares), together)


def test_the_reference_says_which_pixels_are_alike():
    features = random(2, 16, 8)
    alike = weights.reference(features, 4)
    expected = (features @ features.mT / 8**0.5).softmax(-1)
    torch.testing.assert_close(alike, expected)
    finer = weights.reference(features, 8)
    assert finer.shape == (2, 64, 64)
    torch.testing.assert_close(finer.sum(-1), torch.ones(2, 64))


def test_a_layer_that_tells_the_same_pixels_apart_weighs_more():
    groups = torch.tensor([0, 0, 1, 1, 0, 1, 1, 0, 0])
    features = torch.nn.functional.one_hot(groups).float()[None] * 4
    alike = weights.reference(features, 3)
    same, opposite = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0], [-1]])
    agrees = weights.layer_weight(same[groups][None], alike)
    mixed = weights.layer_weight(random(1, 9, 2), alike)
    assert agrees > mixed
    cosines = torch.nn.functional.normalize(same[groups], dim=1)
    torch.testing.assert_close(agrees[0], (alike[0] * (cosines @ cosines.T)).sum())
    # one group against another, and the reference joins pixels of unlike ones: less than nothing
    against = 1 - alike / alike.amax()
    assert weights.layer_weight(opposite[groups][None], against) == 0
