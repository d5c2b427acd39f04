import json

import pytest
import torch
from httpx import Request, Response
from huggingface_hub.errors import GatedRepoError
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DPTConfig,
    DPTForDepthEstimation,
    ResNetConfig,
    ResNetModel,
)
from transformers.utils import hub

from dd.segmenters.base import padded
from dd.segmenters.dino import DinoDPT, DinoLinear
from dd.store.checkpoints import weights_sha256

TINY = {"hidden_size": 16, "layers": 4, "heads": 2, "image_size": 56}
DINOV3 = {**TINY, "family": "dinov3", "image_size": None}
PUBLISHED = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}


def linear(num_classes=4, **given):
    torch.manual_seed(0)
    return DinoLinear(num_classes, **{**TINY, **given})


def dpt(num_classes=4, **given):
    torch.manual_seed(0)
    return DinoDPT(num_classes, **{**TINY, "channels": 8, **given})


MADE = {
    "linear": linear,
    "linear of DINOv3": lambda *a, **k: linear(*a, **{**DINOV3, **k}),
    "dpt": dpt,
    "dpt of DINOv3": lambda *a, **k: dpt(*a, **{**DINOV3, **k}),
}
every = pytest.mark.parametrize("make", MADE.values(), ids=MADE)


def batch(size=(45, 61)):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (2, *size), generator=generator)
    return images, labels


# The architectures


def test_sizes_are_the_published_ones():
    """Of ViT-B/14 86,580,480 and ViT-g/14 1,136,480,768, of DINOv3's ViT-B/16 85,660,416: here
    without the mask token (768, 1536, 768)."""
    with torch.device("meta"):
        base, giant = DinoLinear(21), DinoLinear(21, size="giant")
        third = DinoLinear(21, family="dinov3")
        large = DinoDPT(21, size="large")
    number = [sum(p.numel() for p in m.backbone.parameters()) for m in (base, giant, third)]
    assert number == [86_579_712, 1_136_479_232, 85_659_648]
    assert sum(p.numel() for p in base.head.parameters()) == 2 * 768 + 769 * 21
    assert large.backbone.config.out_indices == [5, 12, 18, 24]
    assert third.backbone.embeddings.register_tokens.shape[1] == 4


@every
@pytest.mark.parametrize("size", [(14, 14), (56, 56), (45, 61), (97, 33)])
def test_logits_have_the_size_of_the_input(make, size):
    model, (images, _) = make().eval(), batch(size)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, 4, *size) and logits.dtype == torch.float32
        torch.testing.assert_close(model(images[1:].float()), logits[1:], rtol=1e-4, atol=1e-5)


def test_the_linear_head_reads_the_last_normalised_patch_tokens():
    model, (images, _) = linear().eval(), batch((42, 70))
    config = Dinov2Config(**PUBLISHED, image_size=56, patch_size=14, use_mask_token=False)
    theirs = Dinov2Model(config).eval()
    theirs.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        tokens = theirs(model.normalise(images)).last_hidden_state[:, 1:]
        maps = tokens.transpose(1, 2).unflatten(2, (3, 5))
        expected = torch.nn.functional.interpolate(model.head(maps), (42, 70), mode="bilinear")
        torch.testing.assert_close(model(images), expected)


def test_dpt_reads_the_layers_and_sizes_of_transformers_own():
    """As DPTForDepthEstimation on a DINOv2 backbone, configured as the published heads for depth
    are: the same four maps leave the neck. Reassembled they have 4, 2, 1 and 0.5 cells a patch."""
    model, (images, _) = dpt(layers=8).eval(), batch((56, 84))
    assert model.backbone.config.out_indices == [2, 4, 6, 8]
    assert list(model.neck.config.neck_hidden_sizes) == [2, 4, 8, 16]
    backbone = Dinov2Config(
        **{**PUBLISHED, "num_hidden_layers": 8},
        image_size=56,
        patch_size=14,
        out_indices=[2, 4, 6, 8],
        apply_layernorm=False,
        reshape_hidden_states=False,
    )
    config = DPTConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[2, 4, 8, 16],
        fusion_hidden_size=8,
        use_bias_in_fusion_residual=False,
    )
    theirs = DPTForDepthEstimation(config).eval()
    assert isinstance(theirs.backbone, Dinov2Backbone)
    theirs.backbone.load_state_dict(model.backbone.state_dict(), strict=False)
    theirs.neck.load_state_dict(model.neck.state_dict(), strict=False)
    seen = []
    theirs.neck.register_forward_hook(lambda *args: seen.append(args[-1]))
    model.neck.register_forward_hook(lambda *args: seen.append(args[-1]))
    reassembled = []
    model.neck.reassemble_stage.register_forward_hook(lambda *args: reassembled.append(args[-1]))
    with torch.no_grad():
        theirs(model.normalise(images))
        model(images)
    assert [tuple(m.shape[2:]) for m in reassembled[0]] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for ours, expected in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_readout_of_dinov3_is_its_class_token():
    model, (images, _) = MADE["dpt of DINOv3"]().eval(), batch((32, 64))
    with torch.no_grad():
        shown = model.normalise(images)
        tokens = model.tokens(shown)
        states = model.backbone(shown, output_hidden_states=True).hidden_states
    assert [t.shape for t in tokens] == [(2, 1 + 8, 16)] * 4
    for found, state in zip(tokens[:3], states[1:4], strict=True):
        torch.testing.assert_close(found, torch.cat([state[:, :1], state[:, 5:]], 1))


# Padding and the loss


@every
def test_padding_is_the_mean_colour_and_has_no_loss(make):
    """The loss is that of an image that was padded by hand, with ignored labels there."""
    model, (images, labels) = make(), batch()
    # the positions of DINOv3 are scaled by chance in training
    model.backbone.eval()
    multiple = model.patch * model.multiple
    shown = padded(model.normalise(images), multiple)
    assert not shown[:, :, 45:].any() and not shown[:, :, :, 61:].any()
    assert all(side % multiple == 0 for side in shown.shape[2:])
    by_hand = torch.nn.functional.pad(
        labels, (0, shown.shape[3] - 61, 0, shown.shape[2] - 45), value=255
    )
    torch.manual_seed(3)
    loss = model.loss(images, labels)["loss"]
    torch.manual_seed(3)
    expected = model.loss(shown * model.std + model.mean, by_hand)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@every
def test_the_ignored_content_of_a_label_changes_nothing(make):
    model, (images, labels) = make(), batch()
    model.head.eval()  # dropout
    model.backbone.eval()
    expected = torch.nn.functional.cross_entropy(model(images)[:, :, 20:], labels[:, 20:])
    labels[:, :20] = 255
    losses = model.loss(images, labels)
    torch.testing.assert_close(losses["loss"], expected)
    assert losses.keys() == {"decode.loss_ce", "loss"}
    assert model.loss(images, torch.full_like(labels, 255))["loss"] == 0


@every
def test_each_learns_two_halves(make):
    model = make(2)
    images, labels = torch.full((2, 3, 60, 64), 40.0), torch.zeros(2, 60, 64, dtype=torch.int64)
    images[:, 0, :, 32:], labels[:, :, 32:] = 220.0, 1
    optimizer = torch.optim.AdamW(model.parameter_groups(3e-3, 1e-4, 1.0))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    with torch.no_grad():
        predicted = model.eval()(images).argmax(1)
    assert (predicted == (torch.arange(64) >= 32)).float().mean() > 0.9


# What learns


@pytest.mark.parametrize("make", [linear, dpt])
def test_a_frozen_backbone_stays_as_it_is(make):
    model, (images, labels) = make(frozen=True), batch()
    before = weights_sha256(model.backbone.state_dict())
    assert model.training and not any(m.training for m in model.backbone.modules())
    groups = model.parameter_groups(1e-2, 0.1)
    assert {g["name"].removesuffix("_no_decay") for g in groups} == {"heads"}
    model.loss(images, labels)["loss"].backward()
    torch.optim.AdamW(groups).step()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert weights_sha256(model.backbone.state_dict()) == before
    assert not any(m.training for m in model.train().backbone.modules())


def test_what_has_no_decay():
    model = dpt()
    groups = {g["name"]: g for g in model.parameter_groups(1e-4, 0.05, 0.1)}
    where = {id(p): name for name, g in groups.items() for p in g["params"]}
    for name, p in model.named_parameters():
        words = ("norm", "lambda1", "cls_token", "position_embeddings", "head.head.1.")
        light = any(word in name for word in words)
        part = "backbone" if name.startswith("backbone.") else "heads"
        assert where[id(p)] == part + "_no_decay" * light, name


# Weights


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
@pytest.mark.parametrize("make", [linear, dpt])
def test_weights_from_a_folder_as_the_hub_has_it(tmp_path, family, make):
    torch.manual_seed(5)
    if family == "dinov2":
        source = Dinov2Model(Dinov2Config(**PUBLISHED, image_size=56, patch_size=14))
    else:
        config = DINOv3ViTConfig(**PUBLISHED, intermediate_size=64, num_register_tokens=4)
        source = DINOv3ViTModel(config)
    source.half().save_pretrained(tmp_path)
    given = TINY if family == "dinov2" else DINOV3
    model = make(**given, pretrained=str(tmp_path))
    theirs, ours = source.float().state_dict(), model.backbone.state_dict()
    assert not any("mask_token" in name for name in ours)
    assert len(theirs) - len(ours) == (3 if family == "dinov2" and make is dpt else 1)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert set(model.files) == {"pretrained"} and model.training


def test_weights_that_do_not_fit(tmp_path):
    def saved(name, config, kind=Dinov2Model, **more):
        kind(config).save_pretrained(tmp_path / name, **more)
        return str(tmp_path / name)

    patch = saved("patch", Dinov2Config(**PUBLISHED, image_size=64, patch_size=16))
    with pytest.raises(ValueError, match=r"another model \(patch_size 16, expected 14; image_siz"):
        linear(pretrained=patch)
    other = Dinov2Config(**{**PUBLISHED, "hidden_size": 32}, image_size=56, patch_size=14)
    with pytest.raises(ValueError, match=r"hidden_size 32, expected 16\); choose segmenter.size"):
        dpt(pretrained=saved("wide", other))
    resnet = saved("resnet", ResNetConfig(), ResNetModel)
    with pytest.raises(ValueError, match=r"\(resnet, expected dinov2\); .*segmenter.family"):
        linear(pretrained=resnet)
    config = DINOv3ViTConfig(**PUBLISHED, intermediate_size=64, num_register_tokens=4)
    third = saved("third", config, DINOv3ViTModel)
    with pytest.raises(ValueError, match=r"\(dinov3_vit, expected dinov2\); .*segmenter.family"):
        linear(pretrained=third)
    whole = Dinov2Model(Dinov2Config(**PUBLISHED, image_size=56, patch_size=14))
    kept = {k: w for k, w in whole.state_dict().items() if "layer.3" not in k}
    whole.save_pretrained(tmp_path / "cut", state_dict=kept)
    with pytest.raises(ValueError, match=r"lacks 18 tensors of this model \(encoder.layer.3"):
        linear(pretrained=str(tmp_path / "cut"))


def test_only_safetensors_are_read(tmp_path):
    source = Dinov2Model(Dinov2Config(**PUBLISHED, image_size=56, patch_size=14))
    (tmp_path / "config.json").write_text(json.dumps(source.config.to_dict()))
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model.safetensors were not found in this folder"):
        linear(pretrained=str(tmp_path))


def test_a_licence_that_has_to_be_accepted(monkeypatch):
    def refused(*_, **__):
        answer = Response(401, request=Request("GET", "https://huggingface.co"))
        raise GatedRepoError("401 Client Error.\n\nAccess is gated", response=answer)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(hub, "hf_hub_download", refused, raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", refused)
    with pytest.raises(FileNotFoundError) as error:
        linear(**DINOV3, pretrained="facebook/dinov3-vits16-pretrain-lvd1689m")
    said = str(error.value)
    assert "https://huggingface.co/facebook/dinov3-vits16-pretrain-lvd1689m" in said
    assert "HF_TOKEN" in said and "hf_secret" not in said and "\n" not in said


def test_wrong_arguments():
    for call, message in (
        (lambda: linear(size="b"), "size='b': expected small, base, large, giant"),
        (lambda: linear(family="dinov1"), "family='dinov1': expected dinov2, dinov3"),
        (lambda: linear(heads=3), "hidden_size=16: expected a multiple of the 3 heads"),
        (lambda: linear(image_size=8), "image_size=8: expected at least the patch's 14"),
        (lambda: linear(family="dinov3"), "image_size=56 has no effect on DINOv3"),
        (lambda: linear(**{**DINOV3, "size": "giant"}), "DINOv3 has no such model"),
        (lambda: linear(**{**DINOV3, "heads": 8}), "hidden_size=16: DINOv3.* multiple of 4"),
        (lambda: dpt(layers=3), "layers=3: expected a whole number of 4 or more"),
        (lambda: linear(sizes={}), "sizes: no such setting; allowed: "),
    ):
        with pytest.raises(ValueError, match=message):
            call()
