"""The attention that is read: equal to the formula written out, at the resolutions that a UNet
has."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch.overrides import _get_current_function_mode_stack

from benchmarks.reading import means, recorder_of, sites_of
from dd.attention import maths as attention
from dd.attention import recorder as recorder_module
from dd.attention.recorder import AttentionRecorder, Reading, Words
from dd.attention.sites import Layout, choose_side, find_sites
from dd.masks.from_heat import SOURCES


class Explicit:
    """An attention processor that writes the formula out, one head at a time, and keeps the
    probabilities."""

    def __init__(self, class_states, sides, kept):
        self.class_states, (self.cross, self.self), self.kept = class_states, sides, kept

    @staticmethod
    def probabilities(attn, hidden, context):
        width = attn.to_q.out_features // attn.heads
        found = []
        for h in range(attn.heads):
            part = slice(h * width, (h + 1) * width)
            q, k = (
                F.linear(x, layer.weight[part])
                for x, layer in ((hidden, attn.to_q), (context, attn.to_k))
            )
            found.append(torch.softmax(q @ k.transpose(1, 2) / width**0.5, -1))
        return torch.stack(found, 1)

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ):
        count, length = len(self.class_states), hidden_states.shape[1]
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        attention = self.probabilities(attn, hidden_states, context)
        q, k, values = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, context),
                (attn.to_v, context),
            )
        )
        # as any processor does: it is what the recorder looks at; the image is not made of it
        F.scaled_dot_product_attention(q, k, values)
        if encoder_hidden_states is None and length == self.self**2:
            self.kept.setdefault("self", []).append(attention[-count:].mean(1))
        if encoder_hidden_states is not None and length == self.cross**2:
            self.kept.setdefault("full_prompt", []).append(attention[-count:].mean(1))
            from_classes = self.probabilities(attn, hidden_states[-count:], self.class_states)
            self.kept.setdefault("class_prompt", []).append(from_classes.mean(1))
        return attn.to_out[0]((attention @ values).transpose(1, 2).flatten(2))


def states_of(pipe, kind, texts):
    """Text states by hand: the last layer of the one encoder; of XL the last but one of each,
    side by side."""

    def encode(tokenizer, encoder):
        tokens = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            return encoder(tokens, output_hidden_states=True)

    if kind == "sd":
        return encode(pipe.tokenizer, pipe.text_encoder).last_hidden_state
    pairs = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
    return torch.cat([encode(*pair).hidden_states[-2] for pair in pairs], -1)


@pytest.fixture(scope="module")
def observed(model, samples, kind, sides):
    """(attention kept by the explicit processor, the recorder) of one and the same generation."""
    class_states = states_of(model.pipe, kind, [s.class_prompt for s in samples])
    before, kept = model.network.attn_processors, {}
    model.network.set_attn_processor(Explicit(class_states, sides, kept))
    with recorder_of(model.network, class_states, *sides, full_prompt=True) as recorder:
        images, _, _ = model.generate(samples, capture=False)
    model.network.set_attn_processor(before)
    return {key: torch.stack(each) for key, each in kept.items()}, recorder, images


def test_the_class_prompt_is_read_by_every_encoder_of_the_model(model, kind, samples):
    texts = [s.class_prompt for s in samples]
    states, pooled = model.text_states(texts), model.family.text(texts)["pooled"]
    torch.testing.assert_close(states, states_of(model.pipe, kind, texts), rtol=1e-5, atol=1e-6)
    assert states.shape == (3, 77, 32 if kind == "sd" else 32 + 40)
    assert pooled is None if kind == "sd" else pooled.shape == (3, 24)


def test_the_explicit_processor_makes_the_same_image(observed, made):
    np.testing.assert_allclose(observed[2].astype(int), made[0], atol=2)


def test_recorded_attention_is_the_mean_over_heads_layers_and_steps(observed, kind):
    kept, recorder, _ = observed
    down_mid_up = (
        1 + 1 + 2 if kind == "sd" else 2 + 2 + 4
    )  # two blocks in a row at the lowest level of xl
    assert len(kept["self"]) == 2 * (1 + 2) and len(kept["class_prompt"]) == 2 * down_mid_up
    cross = {source: means(recorder, source) for source in ("class_prompt", "full_prompt")}
    for source, recorded in {**cross, "self": means(recorder, "self")}.items():
        torch.testing.assert_close(recorded, kept[source].mean(0), rtol=1e-4, atol=1e-6)
    assert (cross["class_prompt"] - cross["full_prompt"]).abs().max() > 1e-3


def test_rows_of_recorded_attention_are_distributions(observed, sides):
    _, recorder, _ = observed
    shapes = [(3, sides[0] ** 2, 77)] * 2 + [(3, sides[1] ** 2, sides[1] ** 2)]
    for source, shape in zip(("class_prompt", "full_prompt", "self"), shapes, strict=True):
        recorded = means(recorder, source)
        assert recorded.shape == shape and (recorded >= 0).all()
        torch.testing.assert_close(recorded.sum(-1), torch.ones(shape[:2]))


def test_heat_follows_from_the_attention_by_the_papers_formula(
    observed, made, model, samples, sides
):
    kept, _, _ = observed
    low, high = sides
    for i, sample in enumerate(samples):
        power = kept["self"].mean(0)[i]
        for source, spans in model.spans(sample).items():
            cross = kept["class_prompt" if source == "class_prompt" else "full_prompt"].mean(0)[i]
            for k, positions in enumerate(spans):
                start = cross[:, positions].mean(1).view(1, 1, low, low)
                start = F.interpolate(start, size=(high, high), mode="bicubic").flatten()
                for p in range(4):
                    expected = (torch.linalg.matrix_power(power, p) @ start).view(high, high)
                    np.testing.assert_allclose(
                        made[1][i][source][k, p], expected, rtol=1e-4, atol=1e-7
                    )


def test_attention_can_be_read_in_some_of_the_steps(changed, samples, made, observed, monkeypatch):
    """Of three steps the first and the third, as an independent observer of every step counts
    them."""
    model, kept = changed(steps=3), []
    hold = AttentionRecorder._hold
    monkeypatch.setattr(
        AttentionRecorder,
        "_hold",
        lambda self, key, *rest: (kept.append((self.calls, key)), hold(self, key, *rest)),
    )
    every, _, _ = model.generate(samples), kept.clear(), None
    images, heat, _ = changed(capture_every=2).generate(samples)
    assert {step for step, _ in kept} == {0, 2}
    assert images.tobytes() == every[0].tobytes()
    first, each = changed(capture_every=3).generate(samples)[1], every[1]
    for some, one, whole in zip(heat, first, each, strict=True):
        maps = [m["class_prompt"][:, 0].astype(np.float32) for m in (some, one, whole)]
        assert np.abs(maps[0] - maps[2]).max() > 0 and np.abs(maps[1] - maps[0]).max() > 0
        # the whole is the mean of three steps, the pair of two: the second step is what is left, a
        # distribution as well
        second = 3 * maps[2] - 2 * maps[0]
        assert second.min() > -5e-3 and second.max() < 1


@pytest.mark.parametrize("held", [1, 2**17, 2**30])
def test_layers_read_together_are_read_as_each_by_itself(changed, samples, held, monkeypatch):
    """Some at a time, of one kind; and all of a step, whose sum does not change by more than the
    order of additions."""
    model, calls, mean = changed(cross_heads=[1, 0]), [], attention.mean_attention
    monkeypatch.setattr(
        attention, "mean_attention", lambda *given: (calls.append(given[4]), mean(*given))[1]
    )
    images, each, _ = model.generate(samples)
    alone = sum(calls)
    assert set(calls) == {1}
    calls.clear()
    monkeypatch.setattr(recorder_module, "TOGETHER", {"cpu": held})
    same, heat, _ = model.generate(samples)
    assert (
        sum(calls) == alone
        and (max(calls) > 1) == (held > 1)
        and same.tobytes() == images.tobytes()
    )
    for maps, before in zip(heat, each, strict=True):
        for source in SOURCES[:3]:
            np.testing.assert_allclose(
                maps[source].astype(np.float32),
                before[source].astype(np.float32),
                rtol=2e-3,
                atol=1e-6,
            )


def test_heat_of_further_sides_is_kept_for_itself(changed, samples, sides):
    """As it is when a side is the one that is read; the image and the heat of that are the same."""
    plain = changed(full_prompt=False)
    others = sorted({s.side for s in plain.sites if s.kind == "cross"})
    model = changed(full_prompt=False, cross_groups=others)
    images, heat, _ = model.generate(samples)
    before, own, _ = plain.generate(samples)
    assert len(others) > 1 and images.tobytes() == before.tobytes()
    for maps, sample in zip(heat, samples, strict=True):
        assert maps.keys() == {"class_prompt", *(f"class_prompt@{side}" for side in others)}
        assert maps.keys() == model.spans(sample).keys()
    for side in others:
        alone = changed(full_prompt=False, cross_resolution=side).generate(samples)[1]
        for maps, each, first in zip(heat, alone, own, strict=True):
            read, kept = each["class_prompt"], maps[f"class_prompt@{side}"]
            np.testing.assert_allclose(kept, read, rtol=1e-6, atol=1e-9)
            assert maps["class_prompt"].tobytes() == first["class_prompt"].tobytes()
    with pytest.raises(ValueError, match=r"cross_resolution=3: this model has no cross-attention"):
        changed(cross_groups=[3])


def test_only_the_class_prompt_is_read_unless_more_is_asked_for(changed, made, samples):
    _, heat, _ = changed(full_prompt=False).generate(samples)
    for maps, before in zip(heat, made[1], strict=True):
        assert maps.keys() == {"class_prompt"}
        assert maps["class_prompt"].tobytes() == before["class_prompt"].tobytes()


def test_hooks_are_gone_afterwards(model, kind, sides, samples, monkeypatch, hooks):
    assert hooks() == 0
    model.generate(samples)
    assert hooks() == 0
    states = model.text_states([samples[0].class_prompt])
    with pytest.raises(KeyboardInterrupt), recorder_of(model.network, states, *sides):
        # before and after the network and each layer that is read, cross- and self-attention: sd
        # 1 + 1 + 2 of the former (down, middle, up) and 1 + 2 of the latter, xl 2 + 2 + 4 and 1 + 2
        assert hooks() == 2 + 2 * (4 + 3 if kind == "sd" else 8 + 3)
        raise KeyboardInterrupt
    assert hooks() == 0

    def broken(*_, **__):
        raise RuntimeError("the scheduler stopped")

    monkeypatch.setattr(model.pipe.scheduler, "step", broken)
    with pytest.raises(RuntimeError, match="the scheduler stopped"):
        model.generate(samples)
    assert hooks() == 0


def test_hooks_are_gone_after_a_layer_that_takes_none(model, sides, samples, monkeypatch, hooks):
    layers = dict(model.network.named_modules())

    def refuses(*_, **__):
        raise KeyboardInterrupt

    last = layers[model.reading.cross[-1].name]
    monkeypatch.setattr(last, "register_forward_hook", refuses)
    states = model.text_states([samples[0].class_prompt])
    with (
        pytest.raises(KeyboardInterrupt),
        recorder_of(model.network, states, *sides, full_prompt=True),
    ):
        pass
    assert hooks() == 0


def test_torchs_functions_are_plain_again_after_an_interrupted_layer(
    model, samples, monkeypatch, hooks
):
    """Torch calls no hook after KeyboardInterrupt."""
    layer = dict(model.network.named_modules())[model.reading.cross[-1].name]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer.to_v, "forward", stopped)
        with pytest.raises(KeyboardInterrupt):
            model.generate(samples)
    assert not _get_current_function_mode_stack() and hooks() == 0


def test_a_network_without_attention_is_named():
    reading = Reading(Layout("apart"), [], [])
    words = Words([{"class_prompt": [[1]]}], torch.zeros(1, 77, 32))
    with AttentionRecorder(torch.nn.Linear(2, 2), reading, words) as recorder:
        pass
    with pytest.raises(ValueError, match="no attention was captured of Linear"):
        recorder.check()
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="attention of Linear was not seen .none ran"):
        find_sites(linear, Layout("apart"), lambda: linear(torch.zeros(1, 2)))


# Resolutions


@pytest.mark.parametrize("which", ["cross", "self"])
@pytest.mark.parametrize("place", [0, 1])
def test_every_resolution_that_there_is_can_be_read(changed, samples, kind, sides, which, place):
    wanted = ((8, 16) if kind == "sd" else (4, 8))[place]
    model = changed(**{f"{which}_resolution": wanted})
    side = model.self_resolution
    assert model.generate(samples)[1][0]["class_prompt"].shape == (2, 4, side, side)


@pytest.mark.parametrize("which", ["cross", "self"])
def test_a_resolution_that_is_not_there(changed, kind, hooks, which):
    there = r"\[8, 16\]" if kind == "sd" else r"\[4, 8\]"
    message = (
        rf"diffusion\.{which}_resolution=32: this model has no {which}-attention there; it "
        rf"has {there} for latents of 16x16"
    )
    with pytest.raises(ValueError, match=message):
        changed(**{f"{which}_resolution": 32})
    assert hooks() == 0


@pytest.mark.parametrize("unseen", ["attn1", "attn2"])
def test_attention_that_is_no_longer_seen_is_found_at_the_first_step(
    changed, samples, hooks, unseen
):
    """A guard beside the choice of sites: it looks at the layers that really ran."""
    model, calls = changed(steps=5), []
    before = model.network.attn_processors
    past = sorted(s.name for s in model.reading.cross + model.reading.self if unseen in s.name)[-1]
    model.network.set_attn_processor(
        {n: PastTorch() if n == f"{past}.processor" else own for n, own in before.items()}
    )
    handle = model.network.register_forward_pre_hook(lambda *_: calls.append(1))
    message = f"no attention was captured of UNet2DConditionModel.* in {past}$"
    with pytest.raises(ValueError, match=message):
        model.generate(samples)
    with pytest.raises(ValueError, match=f"was not seen .{past}.*PastTorch"):
        model._choose_sites()
    handle.remove()
    model.network.set_attn_processor(before)
    assert len(calls) == 1 + 1 and hooks() == 0


class PastTorch:
    """An attention processor that does without F.scaled_dot_product_attention."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        probabilities = Explicit.probabilities(attn, hidden_states, context)
        values = attn.to_v(context).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return attn.to_out[0]((probabilities @ values).transpose(1, 2).flatten(2))


# From the place of a block among those of its kind to its level among the sides.
LEVELS = {"down_blocks": lambda i: i, "up_blocks": lambda i: -1 - i, "mid_block": lambda i: -1}


@pytest.mark.parametrize("latent", [16, 17, 18, 25])
def test_the_sides_are_those_that_the_layers_have(model, latent):
    """Level i of a UNet works at the latent halved i times, rounded up."""
    states, pooled = model.text_states(["a"]), model.family.text(["a"])["pooled"]
    added = None if pooled is None else {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
    given = torch.zeros(1, 4, latent, latent), torch.zeros(1), states
    sites = find_sites(
        model.network, model.layout, lambda: model.network(*given, added_cond_kwargs=added)
    )
    sides = [latent]
    for _ in model.network.config.down_block_types[1:]:
        sides.append((sides[-1] + 1) // 2)
    layers = {n: m for n, m in model.network.named_modules() if n.endswith((".attn1", ".attn2"))}
    assert sorted(site.name for site in sites) == sorted(layers)
    for site in sites:
        block, place = site.name.split(".")[:2]
        assert site.side == sides[LEVELS[block](int(place) if place.isdigit() else 0)]
        assert site.kind == ("self" if site.name.endswith("attn1") else "cross")
        assert site.heads == layers[site.name].heads
    assert sites == sites_of(model.network, latent)


def unet_of(levels, attention, **more):
    """A UNet without numbers, with the layers of the real one at full width left out."""
    blocks = [f"{'CrossAttn' if a else ''}DownBlock2D" for a in attention]
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=levels,
            down_block_types=blocks,
            norm_num_groups=8,
            attention_head_dim=8,
            up_block_types=[b.replace("Down", "Up") for b in reversed(blocks)],
            cross_attention_dim=16,
            **more,
        )


@pytest.mark.parametrize(
    ("levels", "attention", "latent", "expected", "read"),
    [
        (
            [16, 16, 16, 16],
            [1, 1, 1, 0],
            64,
            [8, 16, 32, 64],
            (16, 32),
        ),  # Stable Diffusion 1.x, 2.x at 512 px: the paper's
        ([16, 16, 16, 16], [1, 1, 1, 0], 96, [12, 24, 48, 96], (24, 48)),  # 2.1 at 768 px
        ([16, 16, 16], [0, 1, 1], 128, [32, 64], (32, 64)),  # XL at 1024 px
    ],
)
def test_real_models_are_read_at_a_quarter_and_a_half_of_their_latent(
    levels, attention, latent, expected, read
):
    sites = sites_of(unet_of(levels, attention), latent)
    for kind in ("cross", "self"):
        assert sorted({site.side for site in sites if site.kind == kind}) == expected
    assert (
        choose_side("cross", None, expected, latent),
        choose_side("self", None, expected, latent),
    ) == read


def test_where_there_is_none_the_nearest_in_ratio_is_read():
    assert (
        choose_side("cross", None, [8, 64], 64) == 8
    )  # 16 is wanted: half of it is nearer than four times
    assert choose_side("cross", None, [8, 32], 64) == 32  # equally near: the finer one
    assert choose_side("self", None, [16, 8], 16) == 8
    assert choose_side("self", 16, [16, 8], 16) == 16


@pytest.mark.parametrize(("wanted", "sides"), [(7, [8, 16]), (None, [])])
def test_a_side_that_cannot_be(wanted, sides):
    with pytest.raises(
        ValueError,
        match=rf"diffusion\.self_resolution={wanted}: .*has no self-attention there.*64x64.*1/2",
    ):
        choose_side("self", wanted, sides, 64)
