import importlib.util
import sys
from pathlib import Path

import mmcv
import pytest
import torch
import torch.nn.functional as F

from dd.segmenters import _compiled_ops
from dd.segmenters import deeplabv3 as mmsegmentation
from dd.segmenters.deeplabv3 import DeepLabV3, DeepLabV3Settings, deeplabv3_config

# mmseg after the placeholder for compiled operations, which dd.segmenters installs
import mmseg  # isort: skip
from mmengine.config import Config  # isort: skip
from mmengine.structures import PixelData  # isort: skip
from mmseg.registry import MODELS  # isort: skip
from mmseg.structures import SegDataSample  # isort: skip

CONFIGS = Path(mmseg.__file__).parent / ".mim/configs"
SHIPPED = {
    18: CONFIGS / "deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py",
    50: CONFIGS / "_base_/models/deeplabv3_r50-d8.py",
    101: CONFIGS / "deeplabv3/deeplabv3_r101-d8_4xb4-20k_voc12aug-512x512.py",
}


def shipped_config(depth, num_classes):
    """mmsegmentation's own file, with plain batch norm and our number of classes."""
    config = Config.fromfile(SHIPPED[depth]).model
    config.pretrained = None
    for part in ("backbone", "decode_head", "auxiliary_head"):
        config[part].norm_cfg.type = "BN"
    config.decode_head.num_classes = config.auxiliary_head.num_classes = num_classes
    config.data_preprocessor.type = "mmseg.SegDataPreProcessor"
    return config


def batch(num_classes=4, size=(64, 72), seed=0, ignored=True):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, num_classes, (2, *size), generator=generator)
    if ignored:
        labels[:, : size[0] // 3] = 255
    return images, labels


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeepLabV3(4, depth=18)


# The placeholder for compiled operations


@pytest.fixture
def without_extension():
    before = sys.modules.pop(_compiled_ops.NAME, None)
    yield
    sys.modules.pop(_compiled_ops.NAME, None)
    if before is not None:
        sys.modules[_compiled_ops.NAME] = before


def test_placeholder_raises_when_called(without_extension, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _compiled_ops.install_placeholder()
    extension = importlib.import_module(_compiled_ops.NAME)
    with pytest.raises(RuntimeError, match=r"deform_conv_forward .* full mmcv 2\.1\.0"):
        extension.deform_conv_forward(1, output=2)
    with pytest.raises(AttributeError):
        _ = extension.__file__


def test_placeholder_steps_aside_for_full_mmcv(without_extension, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    _compiled_ops.install_placeholder()
    assert _compiled_ops.NAME not in sys.modules


@pytest.mark.skipif(
    not isinstance(sys.modules[_compiled_ops.NAME], _compiled_ops.Placeholder),
    reason="full mmcv is installed",
)
def test_an_operation_of_mmcv_raises_clearly():
    assert importlib.util.find_spec(_compiled_ops.NAME).loader is None
    with pytest.raises(RuntimeError, match="nms is one of mmcv's compiled operations"):
        mmcv.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1.0]), 0.5)


# The architecture


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_config_is_the_one_mmsegmentation_ships(depth):
    expected = shipped_config(depth, 21).to_dict()
    del expected["data_preprocessor"], expected["pretrained"]
    config = deeplabv3_config(21, DeepLabV3Settings(depth=depth))
    for head in ("decode_head", "auxiliary_head"):
        assert config[head].pop("out_channels") == 21  # defaults of mmsegmentation, written out
        assert config[head].pop("ignore_index") == 255
        assert config[head]["loss_decode"].pop("avg_non_ignore") is False
    assert config == expected


@pytest.mark.parametrize(("depth", "parameters"), [(50, 68_114_570), (101, 87_106_698)])
def test_large_models_on_the_meta_device(depth, parameters):
    with torch.device("meta"), mmsegmentation.quiet_construction():
        net = MODELS.build(deeplabv3_config(21, DeepLabV3Settings(depth=depth)))
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.backbone.layer4[1].conv2.dilation == (4, 4)
    assert [branch.conv.dilation[0] for branch in net.decode_head.aspp_modules] == [1, 12, 24, 36]


def test_half_the_width_and_other_dilations():
    narrow, wide = (
        DeepLabV3(4, depth=18, base_channels=32, dilations=[1, 3, 6, 9]),
        DeepLabV3(4, depth=18),
    )
    shapes = {k: v.shape for k, v in narrow.state_dict().items()}
    assert shapes.keys() == wide.state_dict().keys()
    halved = {
        k for k, v in wide.state_dict().items() if v.ndim == 4 and 2 * shapes[k][0] == v.shape[0]
    }
    assert (
        len(halved) == sum(v.ndim == 4 for v in wide.state_dict().values()) - 2
    )  # all convolutions but the two classifiers
    assert [branch.conv.dilation[0] for branch in narrow.decode_head.aspp_modules] == [1, 3, 6, 9]
    assert narrow.eval()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 4, 64, 64)


def test_building_is_silent(recwarn, capfd):
    DeepLabV3(2, depth=18)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_random_weights_are_mmsegmentations(model):
    assert 0.005 < model.decode_head.conv_seg.weight.std() < 0.015
    assert all(
        block.norm2.weight.abs().max() == 0 for block in model.backbone.layer3
    )  # zero_init_residual


def test_sync_bn_everywhere_or_nowhere():
    for sync_bn, kind in (
        ("auto", torch.nn.SyncBatchNorm),
        (True, torch.nn.SyncBatchNorm),
        (False, torch.nn.BatchNorm2d),
    ):
        model = DeepLabV3(2, depth=18, sync_bn=sync_bn)
        assert {type(m) for m in model.modules() if "BatchNorm" in type(m).__name__} == {kind}
    with pytest.raises(
        ValueError, match="sync_bn='never': expected true or false, or auto, which is sync"
    ):
        DeepLabV3(2, depth=18, sync_bn="never")


def test_synchronised_batch_norm_is_the_plain_one_in_one_process(model):
    other = DeepLabV3(4, depth=18, sync_bn="auto")
    other.load_state_dict(model.state_dict())  # the same keys
    images, labels = batch()
    losses = []
    for net in (model, other):
        torch.manual_seed(3)
        losses.append(net.train().loss(images, labels)["loss"])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 21, "depth": 34}, "depth=34.*18, 50, 101"),
        ({"num_classes": 1, "depth": 18}, "num_classes=1.*background included"),
        ({"num_classes": 256, "depth": 18}, "ignore_index=255 is also one of the 256 classes"),
        ({"num_classes": 4, "depth": 18, "auxiliary_weight": -1}, "auxiliary_weight=-1"),
        (
            {"num_classes": 4, "depth": 18, "base_channels": 20},
            "base_channels=20: expected .* a multiple of 8",
        ),
        (
            {"num_classes": 4, "depth": 18, "dilations": [1, 0]},
            r"dilations=\[1, 0\]: expected a list, each a whole number of 1 or more",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepLabV3(**arguments)


# Forward


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (70, 51)])
def test_logits_have_the_size_of_the_input(model, size):
    images, _ = batch(size=size)
    with torch.no_grad():
        logits = model.eval()(images)
        assert logits.shape == (2, 4, *size)
        assert torch.equal(logits, model(images.float()))
        torch.testing.assert_close(
            model(images[:1]), logits[:1], rtol=1e-4, atol=1e-5
        )  # one image is fine in eval


def test_channels_are_normalised_in_rgb_order(model):
    assert not any(name in model.state_dict() for name in ("mean", "std"))
    seen = []
    handle = model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1).expand(2, 3, 64, 64)
    step = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)
    with torch.no_grad():
        model.eval()(mean + step * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1))
    handle.remove()
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([1.0, 2.0, 3.0]))


def test_wrong_images(model):
    with pytest.raises(ValueError, match=r"\(2, 64, 64, 3\): expected \[B, 3, H, W\]"):
        model(torch.zeros(2, 64, 64, 3))
    for net in (model, DeepLabV3(4, depth=18, sync_bn="auto")):
        with pytest.raises(ValueError, match="one image in training mode.*two or more on each GPU"):
            net.train()(torch.zeros(1, 3, 64, 64))


# Loss


def test_losses_equal_those_of_mmsegmentation(model):
    config = shipped_config(18, 4)
    config.data_preprocessor.size = (64, 72)
    with mmsegmentation.quiet_construction():
        reference = MODELS.build(config)
    reference.load_state_dict(model.state_dict())  # strict: the same keys
    images, labels = batch()
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
    bgr = list(images.flip(1))
    data = reference.data_preprocessor({"inputs": bgr, "data_samples": samples}, training=True)
    torch.manual_seed(3)  # dropout
    expected = reference.train()(**data, mode="loss")
    torch.manual_seed(3)
    losses = model.train().loss(images, labels)
    assert set(losses) == {"decode.loss_ce", "aux.loss_ce", "loss"}
    assert torch.equal(losses["decode.loss_ce"], expected["decode.loss_ce"])
    assert torch.equal(losses["aux.loss_ce"], expected["aux.loss_ce"])
    assert torch.equal(losses["loss"], expected["decode.loss_ce"] + expected["aux.loss_ce"])


@pytest.mark.parametrize("avg_non_ignore", [False, True])
@pytest.mark.parametrize("auxiliary_weight", [0.4, 0.0])
def test_how_ignored_pixels_enter_the_average(avg_non_ignore, auxiliary_weight):
    torch.manual_seed(0)
    model = DeepLabV3(
        4, depth=18, avg_non_ignore=avg_non_ignore, auxiliary_weight=auxiliary_weight
    ).eval()
    images, labels = batch()
    valid = labels != 255
    pixels = valid.sum() if avg_non_ignore else labels.numel()
    with torch.no_grad():
        losses = model.loss(images, labels)
        features = model.backbone((images - model.mean) / model.std)
        for name, head, weight in (
            ("decode", model.decode_head, 1),
            ("aux", model.auxiliary_head, auxiliary_weight),
        ):
            logits = F.interpolate(head(features), size=labels.shape[1:], mode="bilinear")
            log_p = logits.log_softmax(1).permute(0, 2, 3, 1)[valid]
            nll = -log_p.gather(1, labels[valid][:, None]).double().sum()
            torch.testing.assert_close(
                losses[f"{name}.loss_ce"].double(), weight * nll / pixels, rtol=1e-5, atol=0
            )
        assert model.loss(images, torch.full_like(labels, 255))["loss"] == 0


def test_another_ignore_index():
    model = DeepLabV3(4, depth=18, ignore_index=-1).eval()
    images, labels = batch(ignored=False)
    labels[:, :10] = -1
    assert model.loss(images, labels)["loss"] > 0
    labels[0, 0, 0] = 255
    with pytest.raises(ValueError, match=r"\[255\]; allowed: 0..3, and -1"):
        model.loss(images, labels)


def test_wrong_labels(model):
    images, labels = batch()
    labels[0, -1, -1], labels[1, -1, -1] = 7, -2
    with pytest.raises(ValueError, match=r"values \[-2, 7\]; allowed: 0..3, and 255"):
        model.loss(images, labels)
    with pytest.raises(ValueError, match=r"int64 \(2, 64, 72\), got torch.uint8"):
        model.loss(images, labels.byte())
    with pytest.raises(ValueError, match=r"got torch.int64 \(2, 64, 71\)"):
        model.loss(images, labels[:, :, 1:])


def test_parameter_groups_hold_every_parameter_once(model):
    groups = model.parameter_groups(1e-4, 1e-2)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert (
        len(rates) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    )
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(
            1e-5 if name.startswith("backbone.") else 1e-4
        ), name
    assert {group["weight_decay"] for group in groups} == {1e-2}
    assert model.parameter_groups(1e-4, 0, backbone_multiplier=0.5)[0]["lr"] == pytest.approx(5e-5)


def test_a_few_steps_learn_a_colour():
    torch.manual_seed(0)
    model = DeepLabV3(2, depth=18)
    images = torch.full((2, 3, 64, 64), 40.0)
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    images[:, 0, :, 32:], labels[:, :, 32:] = 220.0, 1  # the right half is red
    optimizer = torch.optim.AdamW(model.parameter_groups(2e-3, 1e-4))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.loss(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0], losses
