"""Small fakes that several tests share."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F


class TinySegmenter(torch.nn.Module):
    """What the training asks of a segmenter, in two layers: no dropout, so that a training can be made again bit by bit."""

    def __init__(self, num_classes: int = 3, width: int = 4):
        super().__init__()
        convolution = torch.nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.backbone = torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(width), torch.nn.ReLU())
        self.head = torch.nn.Conv2d(width, num_classes, 1)

    def forward(self, images):
        logits = self.head(self.backbone(images.float() / 255))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear")

    def loss(self, images, labels):
        loss = F.cross_entropy(self(images), labels, ignore_index=255)
        return {"decode.loss_ce": loss, "loss": loss}

    def parameter_groups(self, learning_rate, weight_decay, backbone_multiplier):
        return [
            {"name": "backbone", "params": list(self.backbone.parameters()), "lr": learning_rate * backbone_multiplier,
             "weight_decay": weight_decay},
            {"name": "heads", "params": list(self.head.parameters()), "lr": learning_rate, "weight_decay": weight_decay},
        ]  # fmt: skip


class ToyPictures:
    """Images [8, 10, 3] whose brightness is the class, one third of the pixels ignored."""

    def __init__(self, count: int = 7, num_classes: int = 3):
        self.count, self.num_classes = count, num_classes

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng([index, 11])
        mask = rng.integers(0, self.num_classes, (4, 5)).repeat(2, 0).repeat(2, 1).astype(np.uint8)
        image = (mask[..., None] * 80 + rng.integers(0, 60, (8, 10, 3))).astype(np.uint8)
        return image, np.where(rng.random(mask.shape) < 0.3, 255, mask).astype(np.uint8)


def toy_train(image, mask, seed):
    """A 'transform' whose result depends on the seed: a shift of brightness."""
    shifted = image.astype(np.float32) + np.random.default_rng(seed).integers(0, 20)
    return torch.from_numpy(shifted.transpose(2, 0, 1)), torch.from_numpy(mask.astype(np.int64))


def toy_eval(image):
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def quiet_trainer(folder, max_steps, callbacks=(), **kwargs):
    """Lightning's trainer on one CPU core, without files and lines of its own."""
    return pl.Trainer(
        max_steps=max_steps, max_epochs=-1, accelerator="cpu", devices=1, default_root_dir=folder, callbacks=list(callbacks),
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
           "use_distributed_sampler": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, **kwargs},
    )  # fmt: skip


@pytest.fixture
def tiny_segmenter():
    """``make(num_classes=3, width=4, seed=0)``: a fresh :class:`TinySegmenter`."""

    def make(num_classes=3, width=4, seed=0):
        torch.manual_seed(seed)
        return TinySegmenter(num_classes, width)

    return make


@pytest.fixture
def toy_data():
    """``make(count=7, tune=None, batch_size=2, seed=0)``: a data module on :class:`ToyPictures`."""
    from dd.datamodule import SegmentationData

    def make(count=7, tune=None, batch_size=2, seed=0):
        validation = None if tune is None else ToyPictures(tune)
        return SegmentationData(ToyPictures(count), validation, toy_train, toy_eval, batch_size, 0, seed)

    return make


@pytest.fixture
def make_trainer():
    return quiet_trainer
