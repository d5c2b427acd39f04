"""The observer sees what torch's attention is given; class heat without a matrix is that of an
explicit softmax in float64."""

import pytest
import torch
import torch.nn.functional as F

from dd.attention import maths as attention
from dd.attention.observer import Observer
from dd.attention.sites import Layout, check_layout, choose_sites, find_sites


def heads(length, seed, batch=2, count=3, width=16):
    return torch.randn(batch, count, length, width, generator=torch.Generator().manual_seed(seed))


def explicit(q, k, scale, mask=None):
    logits = q.double() @ k.double().mT * scale
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    return logits.softmax(-1).mean(1)


BOOLEAN = torch.ones(2, 1, 1, 71, dtype=torch.bool)
BOOLEAN[0, ..., 60:] = False
ADDED = torch.zeros(2, 1, 1, 71).masked_fill(~BOOLEAN, -10_000.0)


@pytest.mark.parametrize("mask", [None, BOOLEAN, ADDED])
def test_columns_of_classes_are_those_of_the_softmax(mask):
    q, k = heads(64, 0), heads(71, 1)
    spans = [[[3], [4, 5, 9]], [[1, 2]]]
    columns = attention.indicators(spans, 71)
    assert columns.shape == (2, 71, 2) and (columns[1, :, 1] == 0).all()
    found = attention.mean_columns(q, k, columns, 0.25, mask)
    whole = explicit(q, k, 0.25, mask)
    for i, classes in enumerate(spans):
        for c, rows in enumerate(classes):
            expected = whole[i][:, rows].mean(1)
            torch.testing.assert_close(found[i, :, c].double(), expected, atol=1e-6, rtol=0)
    matrix = attention.mean_attention(q, k, 0.25, mask=mask)
    torch.testing.assert_close(matrix.double(), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mask", [None, BOOLEAN, ADDED])
@pytest.mark.parametrize("at_once", [1, 2**22])
@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("louder", [1, 200])
def test_joint_attention_is_read_from_one_exponential(mask, at_once, first, louder, monkeypatch):
    monkeypatch.setitem(attention.AT_ONCE, "cpu", at_once)
    q, k = heads(64, 0), heads(71, 1)
    image = slice(first, first + 64)
    words = [r for r in range(71) if not first <= r < first + 64]
    k[:, :, words] *= louder  # what the pixels give one another is nothing beside it
    seen = None if mask is None or first else mask.expand(2, 3, 64, 71)
    spans = [[[words[0]], words[1:3]], [words[3:5]]]
    columns = attention.indicators(spans, 71)
    own, found = attention.joint_means(q, k, image, columns, 0.25, seen)
    whole = explicit(q, k, 0.25, seen)
    for i, classes in enumerate(spans):
        for c, rows in enumerate(classes):
            expected = whole[i][:, rows].mean(1)
            # large products have fewer digits behind the point
            close = {"atol": 1e-6 if louder == 1 else 1e-4, "rtol": 0}
            torch.testing.assert_close(found[i, :, c].double(), expected, **close)
    pixels = None if seen is None else seen[..., image]
    expected = explicit(q, k[:, :, image], 0.25, pixels)
    torch.testing.assert_close(own.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("classes", [1, 3, 16, 20])
def test_values_are_as_wide_as_the_heads(classes, monkeypatch):
    """Fused kernels take no others: torch would write the whole softmax out."""
    q, k, widths = heads(64, 0), heads(71, 1), []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **given: (widths.append(v.shape[3]), fused(q, k, v, **given))[1],
    )
    columns = torch.rand(2, 71, classes, generator=torch.Generator().manual_seed(2))
    found = attention.mean_columns(q, k, columns, 0.25)
    assert widths == [16] * -(-classes // 16) and found.shape == (2, 64, classes)
    expected = explicit(q, k, 0.25) @ columns.double()
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def test_half_precision_is_read_in_float32():
    q, k = heads(64, 0).bfloat16(), heads(71, 1).bfloat16()
    columns = attention.indicators([[[3]], [[4]]], 71)
    found = attention.mean_columns(q, k, columns, 0.25)
    assert found.dtype == torch.float32
    whole = explicit(q.float(), k.float(), 0.25)
    expected = torch.stack([whole[0][:, 3], whole[1][:, 4]])
    torch.testing.assert_close(found[..., 0].double(), expected, atol=1e-6, rtol=0)


def test_applied_without_a_matrix_it_is_the_power_of_the_matrix():
    sites = [(heads(64, seed, 1), heads(64, seed + 9, 1)) for seed in range(3)]
    maps = torch.rand(2, 64, generator=torch.Generator().manual_seed(4))
    matrix = sum(explicit(q, k, 0.25)[0] for q, k in sites) / 3

    def spread(maps_KN):
        each = (attention.mean_columns(q, k, maps_KN.T[None], 0.25) for q, k in sites)
        return sum(each)[0].T / 3

    found = attention.exponentiate(spread, maps, 8)
    for power in range(9):
        expected = maps.double() @ torch.linalg.matrix_power(matrix, power).T
        torch.testing.assert_close(found[:, power], expected, atol=1e-6, rtol=0)


def test_pooled_attention_is_what_patches_give_to_patches():
    matrix = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    pooled = attention.pool(matrix, 2)
    assert pooled.shape == (2, 16, 16)
    torch.testing.assert_close(pooled.sum(-1), torch.ones(2, 16))
    patch = [
        [8 * (2 * r + a) + 2 * c + b for a in (0, 1) for b in (0, 1)]
        for r in range(4)
        for c in range(4)
    ]
    for i, one in enumerate(patch):
        for j, other in enumerate(patch):
            expected = matrix[:, one][:, :, other].sum(2).mean(1)
            torch.testing.assert_close(pooled[:, i, j], expected)
    maps = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    whole = attention.shrink(attention.enlarge(maps, 2) @ matrix[0].T, 2)
    torch.testing.assert_close(whole, maps @ pooled[0].T)


class Attention(torch.nn.Module):
    def forward(self, x, context=None):
        q = x[:, None]
        k = q if context is None else context[:, None]
        return F.scaled_dot_product_attention(q, k, k, scale=0.5)[:, 0]


class Network(torch.nn.Module):
    """Two layers of self- and one of cross-attention, and one whose attention nobody sees."""

    def __init__(self, hidden=False):
        super().__init__()
        self.first, self.second, self.words = Attention(), Attention(), Attention()
        self.hidden = HiddenAttention() if hidden else None

    def forward(self, x, context):
        x = self.second(self.first(x))
        if self.hidden is not None:
            x = self.hidden(x)
        # outside an attention module: not a layer's
        return F.scaled_dot_product_attention(*[self.words(x, context)[:, None]] * 3)


class HiddenAttention(torch.nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


X = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))


def test_each_call_is_seen_by_the_name_of_its_module_and_changes_nothing():
    network, seen = Network(), []
    plain = network(X, WORDS)
    with Observer(network, lambda name, a: seen.append((name, a))) as observer:
        assert torch.equal(network(X, WORDS), plain)
    assert [name for name, _ in seen] == ["first", "second", "words"] == sorted(observer.ran)
    assert torch.equal(seen[0][1].q[:, 0], X) and torch.equal(seen[2][1].k[:, 0], WORDS)
    assert {a.scale for _, a in seen} == {0.5}
    network(X, WORDS)
    assert len(seen) == 3


def test_only_named_modules_are_seen_and_nothing_stays_after_an_error():
    network, seen = Network(), []

    def see(name, _):
        seen.append(name)
        raise KeyError(name)

    with pytest.raises(KeyError), Observer(network, see, {"second"}):
        network(X, WORDS)
    assert seen == ["second"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert torch.overrides._get_current_function_mode() is None
    network(X, WORDS)
    assert seen == ["second"]


def test_heads_that_share_their_keys_each_have_them():
    seen = []

    class SharingAttention(torch.nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    network = torch.nn.Sequential()
    network.shared = SharingAttention()
    q, k = heads(9, 0, count=4), heads(5, 1, count=2)
    with Observer(network, lambda _, a: seen.append(a)):
        network.shared(q, k)
    assert seen[0].k.shape == (2, 4, 5, 16)
    assert torch.equal(seen[0].k[:, 0], seen[0].k[:, 1]) and torch.equal(seen[0].k[:, 2], k[:, 1])


def test_sites_are_found_chosen_and_missed_by_name():
    network = Network()
    sites = find_sites(network, Layout("apart"), lambda: network(X, WORDS))
    assert [(s.name, s.kind, s.heads, s.side) for s in sites] == [
        ("first", "self", 1, 4),
        ("second", "self", 1, 4),
        ("words", "cross", 1, 4),
    ]
    assert [s.name for s in choose_sites("self", sites, 4, ["second"])] == ["second"]
    hidden = Network(hidden=True)
    with pytest.raises(ValueError, match=r"Network was not seen \(hidden\).*F.scaled_dot_product"):
        find_sites(hidden, Layout("apart"), lambda: hidden(X, WORDS))
    with pytest.raises(ValueError, match="not form a square; only square images"):
        find_sites(network, Layout("apart"), lambda: network(X[:, :12], WORDS))


def changed(mix):
    """``forward(row)`` of a network whose words stand in the rows of their keys, or are mixed."""
    network = Network()

    def forward(row):
        words = WORDS.clone()
        if row is not None:
            words[:, row] += 1
        return network(X, words + words.mean(1, keepdim=True) * mix)

    return network, forward


def test_a_word_is_followed_to_its_key():
    network, forward = changed(mix=0)
    check_layout(network, Layout("apart"), "words", forward, 2)
    with pytest.raises(ValueError, match="should be in key row 18 .*was seen in .2."):
        check_layout(network, Layout("last", 16, 16), "words", forward, 2)
    network, forward = changed(mix=0.5)
    with pytest.raises(ValueError, match="changes 7 key rows .*mix the words"):
        check_layout(network, Layout("apart"), "words", forward, 2)
    check_layout(network, Layout("apart"), "words", forward, 2, refined=True)
