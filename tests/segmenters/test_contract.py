"""What :class:`dd.segmenters.base.Segmenter` promises, of every segmenter that needs no weights."""

import pytest
import torch

from dd.segmenters.base import Segmenter
from dd.segmenters.deeplabv3 import DeepLabV3
from dd.segmenters.dino import DinoDPT, DinoLinear
from dd.segmenters.eomt import EoMT
from dd.segmenters.huggingface import Mask2Former, SegFormer
from dd.segmenters.mmseg_config import ModelZoo

CLASSES, SIZE = 4, (65, 72)
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
VIT = {"hidden_size": 16, "layers": 4, "heads": 2}
QUERIES = {"num_queries": 10, "blocks": 2, "num_points": 300}
KINDS = {
    "DinoLinear": lambda _: DinoLinear(CLASSES, **VIT, image_size=56),
    "DinoLinear, frozen": lambda _: DinoLinear(CLASSES, **VIT, image_size=56, frozen=True),
    "DinoLinear of DINOv3": lambda _: DinoLinear(CLASSES, **VIT, family="dinov3"),
    "DinoDPT": lambda _: DinoDPT(CLASSES, **VIT, image_size=56, channels=8),
    "DinoDPT of DINOv3": lambda _: DinoDPT(CLASSES, **VIT, family="dinov3", channels=8),
    "EoMT": lambda _: EoMT(CLASSES, **VIT, **QUERIES, image_size=56),
    "DeepLabV3": lambda _: DeepLabV3(CLASSES, depth=18),
    "Mask2Former": lambda _: Mask2Former(CLASSES, **TINY),
    "SegFormer": lambda _: SegFormer(CLASSES),
    "ModelZoo": lambda _: ModelZoo(CLASSES, config="fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024"),
    "the fake of these tests": lambda tiny: tiny(CLASSES),
}


@pytest.fixture(params=KINDS)
def segmenter(request, tiny_segmenter):
    torch.manual_seed(0)
    return KINDS[request.param](tiny_segmenter)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, *SIZE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (2, *SIZE), generator=generator)
    labels[:, :20] = 255
    return images, labels


def test_logits_have_the_size_of_the_images_and_no_image_looks_at_another(segmenter, batch):
    images, before = batch[0], batch[0].clone()
    assert isinstance(segmenter, Segmenter)
    with torch.no_grad():
        logits = segmenter.eval()(images)
        assert logits.shape == (2, CLASSES, *SIZE) and logits.dtype == torch.float32
        assert torch.equal(segmenter(images.float()), logits)
        torch.testing.assert_close(segmenter(images[:1]), logits[:1], rtol=1e-3, atol=1e-4)
    assert torch.equal(images, before)


def test_the_loss_and_its_parts_reach_every_parameter(segmenter, batch):
    losses = segmenter.train().loss(*batch)
    assert losses["loss"].ndim == 0 and losses["loss"] > 0
    assert any(name.startswith("decode.") for name in losses)
    losses["loss"].backward()
    assert not [
        name for name, p in segmenter.named_parameters() if p.requires_grad == (p.grad is None)
    ]


def test_groups_hold_every_parameter_once_and_the_backbone_learns_slower(segmenter):
    groups = segmenter.parameter_groups(1e-3, 0.1, 0.5)
    held = [p for group in groups for p in group["params"]]
    trained = [p for p in segmenter.parameters() if p.requires_grad]
    assert sorted(map(id, held)) == sorted(map(id, trained))
    for group in groups:
        light = group["name"].endswith("_no_decay")
        assert group["name"].startswith(("backbone", "heads"))
        assert group["lr"] == (5e-4 if group["name"].startswith("backbone") else 1e-3)
        assert group["weight_decay"] == (0.0 if light else 0.1)


def test_files_are_sha256_of_what_was_read(segmenter):
    assert all(len(digest) == 64 for digest in segmenter.files.values())


def test_labels_of_other_values_are_refused(segmenter, batch):
    images, labels = batch
    labels[0, 30, 30] = 9
    with pytest.raises((ValueError, IndexError)):  # the fake leaves it to torch
        segmenter.loss(images, labels)
