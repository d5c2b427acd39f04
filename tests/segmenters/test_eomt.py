from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    EomtForUniversalSegmentation,
)

from dd.segmenters.base import Annealed
from dd.segmenters.eomt import EoMT, annealed
from dd.segmenters.mask_loss import semantic_targets
from dd.store.checkpoints import load, weights_sha256
from dd.training.fitting import Reseed
from dd.training.segmentation import EMA, LastCheckpoint, Segmentation

TINY = {
    "hidden_size": 16,
    "layers": 4,
    "heads": 2,
    "image_size": 56,
    "blocks": 2,
    "num_queries": 10,
    "num_points": 300,
}
PUBLISHED = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def eomt(num_classes=4, **given):
    torch.manual_seed(0)
    return EoMT(num_classes, **{**TINY, **given})


def batch(size=(45, 61)):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (2, size[0] // 8 + 1, size[1] // 8 + 1), generator=generator)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, : size[0], : size[1]].clone()
    return images, labels


def transformers_own(model):
    theirs = EomtForUniversalSegmentation(model.net.config)
    theirs.load_state_dict(model.net.state_dict(), strict=False)
    theirs.criterion.num_points = theirs.criterion.matcher.num_points = model.num_points
    theirs.attn_mask_probs.copy_(model.net.attn_mask_probs)
    return theirs


# The network


def test_sizes_are_the_published_ones():
    with torch.device("meta"):
        made = {size: EoMT(150, size=size) for size in ("small", "base", "large", "giant")}
    found = {size: len(model.net.attn_mask_probs) for size, model in made.items()}
    assert found == {"small": 3, "base": 3, "large": 4, "giant": 5}
    config = made["large"].net.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        1024,
        24,
        16,
    )


@pytest.mark.parametrize("size", [(14, 14), (56, 56), (45, 61), (97, 33)])
def test_logits_have_the_size_of_the_input(size):
    model, (images, _) = eomt().eval(), batch(size)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, 4, *size) and logits.dtype == torch.float32
        torch.testing.assert_close(model(images[1:].float()), logits[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_network_and_loss_are_those_of_transformers(share):
    """At the one size that theirs takes, with every pixel labelled and the same random numbers:
    in training, masked attention at whichever probability and every prediction's loss; in
    evaluation theirs as it is after its training."""
    model, (images, labels) = eomt(), batch((56, 56))
    model.anneal(share)
    theirs = transformers_own(model).train()
    # at a probability of 1 theirs draws no random number
    theirs.attn_mask_probs.clamp_(max=1 - 1e-6)
    targets, asked = semantic_targets(labels), []
    theirs.get_loss_dict = lambda **kwargs: asked.append(kwargs) or {}
    theirs.get_loss = lambda _: 0
    torch.manual_seed(7)
    theirs(
        pixel_values=model.normalise(images),
        mask_labels=[masks for _, masks in targets],
        class_labels=[classes for classes, _ in targets],
    )
    # ours begins with the loss of the last prediction
    parts = [theirs.criterion(**kwargs) for kwargs in [asked[-1], *asked[:-1]]]
    torch.manual_seed(7)
    losses = model.loss(images, labels)
    weights = {"cross_entropy": ("class", 2.0), "mask": ("mask", 5.0), "dice": ("dice", 5.0)}
    for name, (our_name, weight) in weights.items():
        expected = weight * sum(part[f"loss_{name}"] for part in parts)
        torch.testing.assert_close(
            losses[f"decode.loss_{our_name}"], expected, rtol=1e-5, atol=1e-5
        )
    theirs.attn_mask_probs.zero_()
    with torch.no_grad():
        expected = theirs.eval()(pixel_values=model.normalise(images))
        classes, masks = model.eval()._layers(model.normalise(images))[0]
    torch.testing.assert_close(classes, expected.class_queries_logits)
    torch.testing.assert_close(masks, expected.masks_queries_logits)


def test_scores_are_mask2formers_semantic_inference():
    model, (images, _) = eomt().eval(), batch((56, 56))
    with torch.no_grad():
        logits = model(images)
        classes, masks = model._layers(model.normalise(images))[0]
    large = F.interpolate(masks, size=(56, 56), mode="bilinear").sigmoid()
    expected = torch.einsum("bqc,bqhw->bchw", classes.softmax(2)[:, :, :4], large)
    torch.testing.assert_close(logits.exp(), expected.clamp(min=1e-6))


# Masked attention and its annealing


def test_annealing_is_the_published_one():
    """Steps of the authors' configurations: ViT-L, four blocks, COCO in 88,692 steps; ViT-B, three
    blocks, Cityscapes in 19,902."""
    for total, starts, ends in (
        (88_692, (14_782, 29_564, 44_346, 59_128), (29_564, 44_346, 59_128, 73_910)),
        (19_902, (3_317, 8_292.5, 13_268), (6_634, 11_609.5, 16_585)),
    ):
        for block, (start, end) in enumerate(zip(starts, ends, strict=True)):
            blocks = len(starts)
            assert annealed(block, blocks, 0.0) == 1
            assert annealed(block, blocks, start / total) == pytest.approx(1)
            assert annealed(block, blocks, end / total) == pytest.approx(0, abs=1e-9)
            middle = (start + 0.25 * (end - start)) / total
            assert annealed(block, blocks, middle) == pytest.approx(0.75**0.9)
            assert annealed(block, blocks, 1.0) == 0
    assert [annealed(0, 1, share) for share in (0.1, 0.5)] == [1, 0]


def test_a_masked_query_sees_its_own_patches_alone():
    model = eomt()
    tokens, grid = torch.zeros(2, 10 + 5 + 6, 16), (2, 3)
    masks = torch.randn(2, 10, 2, 3, generator=torch.Generator().manual_seed(2))
    model.anneal(0.0)
    added = model._attention_mask(tokens, masks, grid, 0)
    assert added.shape == (2, 1, 21, 21)
    assert torch.equal(added[:, 0, :10, 15:] == 0, masks.flatten(2) > 0)
    assert not added[:, :, 10:].any() and not added[:, :, :, :15].any()
    model.anneal(0.99)
    assert not model._attention_mask(tokens, masks, grid, 0).any()


def test_evaluation_masks_nothing_at_any_step():
    model, (images, _) = eomt().eval(), batch()
    with torch.no_grad():
        before = model(images)
        model.anneal(0.5)
        assert torch.equal(model(images), before)
    assert not [name for name in model.state_dict() if "attn_mask_probs" in name]


def test_a_training_sets_the_share_before_each_step_and_a_resumed_one_too(
    toy_data, make_trainer, tmp_path
):
    """Killed after two of six steps, it goes on with the shares that it would have had, and ends
    with the same weights."""

    def train(start=None, killed_after=None):
        model = eomt(3)
        shares, anneal = [], model.anneal

        def watched(share):
            if len(shares) == killed_after:
                raise InterruptedError
            shares.append(share)
            anneal(share)

        model.anneal = watched
        folder = tmp_path / ("part" if start or killed_after else "whole")
        callbacks = [Reseed(0), EMA(), LastCheckpoint(str(folder), every_n_steps=1)]
        trainer = make_trainer(folder, 6, callbacks)
        module = Segmentation(model, ["background", "a", "b"])
        with suppress(InterruptedError):
            trainer.fit(module, datamodule=toy_data(), ckpt_path=start, weights_only=True)
        return shares, weights_sha256(load(folder / "last.ckpt")["state_dict"])

    assert isinstance(eomt(), Annealed)
    shares, whole = train()
    assert shares == pytest.approx([step / 6 for step in range(6)])
    assert train(killed_after=2)[0] == pytest.approx([0, 1 / 6])
    again, resumed = train(str(tmp_path / "part/last.ckpt"))
    assert again == pytest.approx([step / 6 for step in range(2, 6)]) and resumed == whole


# The loss


def test_the_ignored_content_of_a_label_changes_no_target():
    model, (images, labels) = eomt(), batch()
    hidden = labels.clone()
    hidden[:, 20:40] = (hidden[:, 20:40] + 1) % 4
    found = []
    for label in (labels, hidden):
        label[:, 20:40] = 255
        model.zero_grad()
        torch.manual_seed(5)
        losses = model.loss(images, label)
        losses["loss"].backward()
        found.append((losses["loss"].detach(), model.net.query.weight.grad.clone()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert model.loss(images, torch.full_like(labels, 255))["loss"] == 0


def test_padding_has_no_loss():
    """The loss is that of an image that was padded by hand, with ignored labels there."""
    model, (images, labels) = eomt(), batch()
    by_hand = F.pad(model.normalise(images), (0, 9, 0, 11)) * model.std + model.mean
    torch.manual_seed(5)
    loss = model.loss(images, labels)["loss"]
    torch.manual_seed(5)
    expected = model.loss(by_hand, F.pad(labels, (0, 9, 0, 11), value=255))["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_the_loss_is_in_float32_under_autocast():
    model, (images, labels) = eomt(), batch()
    torch.manual_seed(2)
    losses = model.loss(images, labels)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.loss(images, labels)
    assert all(v.dtype == torch.float32 for v in half.values())
    torch.testing.assert_close(half["loss"], losses["loss"], rtol=0.05, atol=0)


def test_eomt_learns_two_halves():
    model = eomt(2, num_points=100)
    images, labels = torch.full((2, 3, 60, 64), 40.0), torch.zeros(2, 60, 64, dtype=torch.int64)
    images[:, 0, :, 32:], labels[:, :, 32:] = 220.0, 1
    labels[:, 20:40] = 255
    optimizer = torch.optim.AdamW(model.parameter_groups(3e-3, 1e-4, 1.0))
    losses = []
    for step in range(60):
        model.anneal(step / 60)
        optimizer.zero_grad()
        loss = model.loss(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    with torch.no_grad():
        predicted = model.eval()(images).argmax(1)
    assert (predicted == (torch.arange(64) >= 32)).float().mean() > 0.9


def test_what_has_no_decay():
    model = eomt()
    groups = {g["name"]: g for g in model.parameter_groups(1e-4, 0.05, 0.1)}
    where = {id(p): name for name, g in groups.items() for p in g["params"]}
    for name, p in model.named_parameters():
        inside = name.startswith(("net.embeddings.", "net.layers.", "net.layernorm."))
        words = ("norm", "lambda1", "_token", "position_embeddings", "query.")
        light = any(word in name for word in words)
        assert where[id(p)] == ("backbone" if inside else "heads") + "_no_decay" * light, name


# Weights


@pytest.mark.parametrize("registers", [0, 4])
def test_the_backbone_computes_what_dinov2_does(tmp_path, registers):
    """Tokens before the queries come are those of DINOv2 with the same weights, at an odd size
    too."""
    torch.manual_seed(4)
    if registers:
        config = Dinov2WithRegistersConfig(**PUBLISHED, num_register_tokens=4)
        source = Dinov2WithRegistersModel(config)
    else:
        source = Dinov2Model(Dinov2Config(**PUBLISHED))
    for p in source.parameters():  # zeros would hide what is left out
        torch.nn.init.normal_(p, std=0.2)
    source.save_pretrained(tmp_path)
    model = eomt(registers=registers, pretrained=str(tmp_path)).eval()
    assert set(model.files) == {"pretrained"}
    for size in ((56, 56), (42, 70)):
        images = model.normalise(batch(size)[0])
        with torch.no_grad():
            expected = source.eval()(images).last_hidden_state
            tokens = model._embedded(images)
            for layer in model.net.layers:
                tokens = layer(tokens, None)
            torch.testing.assert_close(model.net.layernorm(tokens), expected, rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit(tmp_path):
    def saved(name, kind, config):
        kind(config).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    plain = saved("plain", Dinov2Model, Dinov2Config(**PUBLISHED))
    message = r"\(dinov2, expected dinov2_with_registers\); .*segmenter.registers=0"
    with pytest.raises(ValueError, match=message):
        eomt(pretrained=plain)
    with pytest.raises(ValueError, match=r"another model \(patch_size 14, expected 7\)"):
        eomt(registers=0, patch_size=7, pretrained=plain)
    trained = saved("trained", EomtForUniversalSegmentation, eomt().net.config)
    with pytest.raises(ValueError, match=r"\(eomt, expected dinov2_with_registers\)"):
        eomt(pretrained=trained)
    whole = Dinov2Model(Dinov2Config(**PUBLISHED))
    kept = {k: w for k, w in whole.state_dict().items() if "layer.3" not in k}
    whole.save_pretrained(tmp_path / "cut", state_dict=kept)
    with pytest.raises(ValueError, match=r"lacks 18 tensors of this model \(encoder.layer.3"):
        eomt(registers=0, pretrained=str(tmp_path / "cut"))


def test_wrong_arguments():
    for call, message in (
        (lambda: eomt(blocks=5), "blocks=5: expected at most the 4 layers"),
        (lambda: eomt(heads=3), "hidden_size=16: expected a multiple of the 3 heads"),
        (lambda: eomt(num_queries=0), "num_queries=0: expected a whole number of 1 or more"),
        (lambda: eomt(family="dinov3"), "family: no such setting"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
