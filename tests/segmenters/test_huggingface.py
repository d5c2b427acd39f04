import json
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

from dd.segmenters.huggingface import Mask2Former, SegFormer
from dd.store.checkpoints import weights_sha256

TINY = {
    "depth": 18,
    "num_queries": 10,
    "channels": 32,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_feedforward": 32,
    "decoder_feedforward": 32,
    "num_points": 300,
}


def mask2former(num_classes=4, **kwargs):
    torch.manual_seed(0)
    return Mask2Former(num_classes, **{**TINY, **kwargs})


def segformer(num_classes=4, **kwargs):
    torch.manual_seed(0)
    return SegFormer(num_classes, **kwargs)


def batch(size=(64, 72)):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (2, size[0] // 8 + 1, size[1] // 8 + 1), generator=generator)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, : size[0], : size[1]].clone()
    labels[:, : size[0] // 3] = 255
    return images, labels


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# The architectures


def test_sizes_are_the_published_ones():
    """For ADE20K's 150 classes the papers say 3.8 M and 27.5 M for SegFormer-B0 and -B2, and 44
    M for Mask2Former R50."""
    with torch.device("meta"):
        b0, b2, r50 = SegFormer(150, size="b0"), SegFormer(150, size="b2"), Mask2Former(150)
    assert parameters(b0) == 3_752_694 and parameters(b0.net.segformer) == 3_319_392
    assert parameters(b2) == 27_461_974 and parameters(b2.net.segformer) == 24_196_288
    assert parameters(r50) == 44_041_367
    assert (
        parameters(r50.backbone) == 25_557_032 - 2_049_000
    )  # torchvision's ResNet-50 without its classifier
    assert len(r50.net.model.transformer_module.decoder.layers) == 9


@pytest.mark.parametrize("make", [mask2former, segformer])
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (70, 51)])
def test_logits_have_the_size_of_the_input(make, size):
    model, (images, _) = make().eval(), batch(size)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, 4, *size) and logits.dtype == torch.float32
        torch.testing.assert_close(model(images[:1].float()), logits[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [mask2former, segformer])
def test_images_are_normalised_in_rgb_order(make):
    model, seen = make().eval(), []
    model.net.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    assert not {"mean", "std"} & set(model.state_dict())
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1)
        for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    )
    with torch.no_grad():
        model((mean + std * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)).expand(2, 3, 64, 64))
    torch.testing.assert_close(seen[0][0, :, 5, 5], torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("make", [mask2former, segformer])
def test_one_image_is_too_few_for_a_training_step(make):
    with pytest.raises(ValueError, match="one image in training mode"):
        make().loss(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"values \[9\]; allowed: 0..3, and 255"):
        make().loss(torch.zeros(2, 3, 64, 64), torch.full((2, 64, 64), 9))


def test_wrong_arguments():
    for call, message in (
        (lambda: mask2former(depth=34), "depth=34.*18, 50"),
        (lambda: mask2former(channels=48), "channels=48.*multiple of 32"),
        (lambda: segformer(size="b9"), "size='b9': expected b0, b2"),
        (lambda: segformer(1), "num_classes=1.*background included"),
        (lambda: segformer(256), "ignore_index=255 is also one of the 256 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Mask2Former


def test_scores_are_the_papers_semantic_inference():
    model, (images, _) = mask2former().eval(), batch()
    with torch.no_grad():
        logits = model(images)
        found = model.net(pixel_values=model.normalise(images))
    share = found.class_queries_logits.softmax(2)
    masks = F.interpolate(found.masks_queries_logits, size=(64, 72), mode="bilinear").sigmoid()
    expected = sum(share[:, q, :4, None, None] * masks[:, q, None] for q in range(10))
    torch.testing.assert_close(logits.exp(), expected.clamp(min=1e-6))
    torch.testing.assert_close(
        logits.softmax(1), expected / expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-5
    )


def test_the_ignored_content_of_a_label_changes_no_target():
    """Two labels that differ only where both are ignored afterwards give the same loss,
    gradients included."""
    model, (images, labels) = mask2former(), batch()
    labels[labels == 255] = 1
    hidden = labels.clone()
    hidden[:, 20:40] = (hidden[:, 20:40] + 1) % 4
    found = []
    for label in (labels, hidden):
        label[:, 20:40] = 255
        model.zero_grad()
        torch.manual_seed(5)
        losses = model.loss(images, label)
        losses["loss"].backward()
        found.append((losses["loss"].detach(), model.net.class_predictor.weight.grad.clone()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_every_part_learns_and_the_loss_is_in_float32_under_autocast():
    model, (images, labels) = mask2former(), batch()
    torch.manual_seed(2)
    losses = model.loss(images, labels)
    assert set(losses) == {"decode.loss_class", "decode.loss_mask", "decode.loss_dice", "loss"}
    losses["loss"].backward()
    assert not [
        name for name, p in model.named_parameters() if p.grad is None
    ]  # DDP would wait for them
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.loss(images, labels)
    assert all(v.dtype == torch.float32 for v in half.values())
    torch.testing.assert_close(half["loss"], losses["loss"], rtol=0.05, atol=0)


def test_mask2former_learns_two_halves():
    model = mask2former(2)
    images, labels = torch.full((2, 3, 64, 64), 40.0), torch.zeros(2, 64, 64, dtype=torch.int64)
    images[:, 0, :, 32:], labels[:, :, 32:] = 220.0, 1
    labels[:, 20:40] = 255
    optimizer = torch.optim.AdamW(model.parameter_groups(2e-3, 1e-4, 1.0))
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(images, labels)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        predicted = model.eval()(images).argmax(1)
    assert (predicted == (torch.arange(64) >= 32)).float().mean() > 0.9


def test_mask2former_groups():
    model = mask2former()
    groups = {g["name"]: g for g in model.parameter_groups(1e-4, 0.05, 0.1)}
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "backbone": (pytest.approx(1e-5), 0.05),
        "backbone_no_decay": (pytest.approx(1e-5), 0.0),
        "heads": (1e-4, 0.05),
        "heads_no_decay": (1e-4, 0.0),
    }
    where = {id(p): name for name, g in groups.items() for p in g["params"]}
    assert (
        len(where)
        == sum(len(g["params"]) for g in groups.values())
        == len(list(model.parameters()))
    )
    for name, p in model.named_parameters():
        inside = "pixel_level_module.encoder" in name
        norms = r"norm|input_projections\.\d\.1\.|decoder\.(adapter|layer)_1\.1\."
        light = re.search(norms + r"|queries_(embedder|features)\.|level_embed", name) is not None
        assert where[id(p)] == ("backbone" if inside else "heads") + "_no_decay" * light, name


# SegFormer


def test_segformer_loss_is_that_of_transformers():
    model, (images, labels) = segformer(), batch()
    reference = SegformerForSemanticSegmentation(SegformerConfig(num_labels=4))
    reference.load_state_dict(model.net.state_dict())
    torch.manual_seed(0)
    expected = reference.train()(pixel_values=model.normalise(images), labels=labels).loss
    torch.manual_seed(0)
    losses = model.loss(images, labels)
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-5, atol=1e-6)
    assert losses.keys() == {"decode.loss_ce", "loss"}
    assert model.loss(images, torch.full_like(labels, 255))["loss"] == 0
    losses["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_segformer_groups():
    model = segformer()
    groups = {g["name"]: g for g in model.parameter_groups(1e-4, 0.01, 0.1)}
    where = {
        id(p): (name, g["lr"], g["weight_decay"]) for name, g in groups.items() for p in g["params"]
    }
    assert len(where) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        part, light = (
            ("backbone", 1e-5) if ".segformer." in name else ("heads", 1e-4),
            "norm" in name,
        )
        assert where[id(p)] == (
            part[0] + "_no_decay" * light,
            pytest.approx(part[1]),
            0.0 if light else 0.01,
        ), name


# Weights


def resnet18():
    return ResNetForImageClassification(
        ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    )


@pytest.mark.parametrize("kind", ["resnet", "mit"])
def test_encoders_from_a_folder_as_the_hub_has_it(tmp_path, kind):
    if kind == "resnet":
        source = resnet18()
        theirs = source.resnet
    else:
        source = SegformerForImageClassification(SegformerConfig(num_labels=10))
        theirs = source.segformer
    source.half().save_pretrained(tmp_path)
    model = (
        mask2former(pretrained=str(tmp_path))
        if kind == "resnet"
        else segformer(pretrained=str(tmp_path))
    )
    ours = model.backbone if kind == "resnet" else model.net.segformer
    states = theirs.float().state_dict(), ours.state_dict()
    assert all(
        torch.equal(states[1][k], states[0][k]) and states[1][k].dtype == states[0][k].dtype
        for k in states[1]
    )
    assert all(module.training for module in model.modules())
    assert model.files == {"pretrained": weights_sha256(ours.state_dict())}


def test_weights_that_do_not_fit(tmp_path):
    source = resnet18()
    source.save_pretrained(tmp_path / "resnet18")
    with pytest.raises(
        ValueError,
        match=r"is another model \(depths \[2, 2, 2, 2\], expected \[3, 4, 6, 3\].*same size",
    ):
        mask2former(depth=50, pretrained=str(tmp_path / "resnet18"))
    with pytest.raises(ValueError, match="is another model"):
        segformer(pretrained=str(tmp_path / "resnet18"))
    weights = {k: w for k, w in source.state_dict().items() if "stages.3" not in k}
    source.save_pretrained(tmp_path / "cut", state_dict=weights)
    with pytest.raises(ValueError, match="lacks 25 tensors of this model .*stages.3"):
        mask2former(pretrained=str(tmp_path / "cut"))


def test_only_safetensors_are_read(tmp_path):
    source = resnet18()
    (tmp_path / "config.json").write_text(json.dumps(source.config.to_dict()))
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError,
        match="model.safetensors were not found in this folder.*pytorch_model.bin",
    ):
        mask2former(pretrained=str(tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match="pretrained='/no/such/folder'.*Give a local folder.*pretrained=null",
    ):
        segformer(pretrained="/no/such/folder")


def test_an_unreachable_hub_id_says_what_to_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match=r"'nobody/no-such-model'.*may be offline.*pretrained=/path/to/folder",
    ):
        mask2former(pretrained="nobody/no-such-model")
