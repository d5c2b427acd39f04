"""Batch-norm statistics of other images: equal to a direct computation, however the images are divided into batches."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dd.batch_norm import Moments, adapt, layers
from dd.segmenters.huggingface import SegFormer
from dd.segmenters.mmsegmentation import DeepLabV3

SIZES = [(24, 30), (24, 30), (33, 17), (24, 30), (40, 40)]


def pictures(sizes=SIZES):
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8)) for size in sizes]


def in_batches(images, size=1):
    """``batches()`` of neighbours of one size, at most ``size`` together."""

    def batches():
        group = []
        for image in images:
            if group and (len(group) == size or group[0].shape != image.shape):
                yield torch.stack(group)
                group = []
            group.append(image)
        yield torch.stack(group)

    return batches


def statistics(segmenter):
    return {n: v.clone() for n, v in segmenter.state_dict().items() if n.endswith(("running_mean", "running_var"))}


@pytest.fixture(scope="module")
def deeplab():
    torch.manual_seed(0)
    segmenter = DeepLabV3(3, depth=18, base_channels=8, dilations=(1, 2, 3))
    for layer in layers(segmenter).values():  # as if trained
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias, std=0.3)
        layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    return segmenter.eval()


def close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        scale = b[name].abs().max()
        assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


def test_moments_are_those_of_all_values_together():
    parts = [torch.randn(2, 4, 5, 6) * 3 + 50, torch.randn(1, 4, 7, 3) + 10, torch.randn(3, 4, 1, 1)]
    moments = Moments()
    for part in parts:
        moments.add(part)
    values = torch.cat([p.movedim(1, 0).flatten(1) for p in parts], 1).double()
    mean, variance = moments.result()
    assert torch.allclose(mean, values.mean(1), rtol=1e-6) and torch.allclose(variance, values.var(1, correction=0), rtol=1e-6)
    assert mean.dtype == torch.float64


def test_one_image_without_extent_has_no_variance():
    moments = Moments()
    moments.add(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match="at least two photographs"):
        moments.result()


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_statistics_are_those_of_one_batch_of_all_images(deeplab, batch):
    """PyTorch's own batch norm in training mode, shown everything at once."""
    images = pictures([(32, 40)] * 5)
    direct = copy.deepcopy(deeplab)
    used, values = {n: m for n, m in layers(direct).items() if not n.startswith("auxiliary_head")}, {}
    for layer in used.values():
        layer.register_forward_pre_hook(lambda m, inputs: values.update({m: inputs[0].numel() / inputs[0].shape[1]}))
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    with torch.no_grad():
        expected = direct(torch.stack(images))
    for layer in used.values():  # PyTorch keeps the unbiased variance, and normalises a batch with the other one
        layer.running_var *= (values[layer] - 1) / values[layer]
    ours = copy.deepcopy(deeplab)
    changed = adapt(ours, in_batches(images, batch))
    assert set(changed) == set(used) and len(changed) == len(set(changed)) < len(layers(ours))
    close(statistics(ours), statistics(direct), 1e-4)
    auxiliary = [n for n in statistics(ours) if n.startswith("auxiliary_head")]
    assert auxiliary and all(torch.equal(statistics(ours)[n], statistics(deeplab)[n]) for n in auxiliary)
    with torch.no_grad():
        shown = torch.stack(images)
        assert (ours(shown) - expected).abs().max() < 1e-3 * expected.abs().max()
        assert (deeplab(shown) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_batches_and_sizes_change_the_result_by_rounding_alone(deeplab):
    found = []
    for size in (1, 2, 8):
        segmenter = copy.deepcopy(deeplab)
        adapt(segmenter, in_batches(pictures(), size))
        found.append(statistics(segmenter))
    close(found[1], found[0], 1e-4)
    close(found[2], found[0], 1e-4)


def test_each_pixel_counts_once(tiny_segmenter):
    segmenter = tiny_segmenter()
    changed = adapt(segmenter, in_batches(pictures(), 2))
    with torch.no_grad():
        seen = [segmenter.backbone[0](image[None].float() / 255)[0].flatten(1) for image in pictures()]
    values = torch.cat(seen, 1).double()
    assert changed == ["backbone.1"]
    assert torch.allclose(segmenter.backbone[1].running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-7)
    assert torch.allclose(segmenter.backbone[1].running_var.double(), values.var(1, correction=0), rtol=1e-5)


def test_only_statistics_change_and_the_network_is_left_ready(deeplab):
    segmenter = copy.deepcopy(deeplab).train()
    heard = []
    adapt(segmenter, in_batches(pictures(), 2), on_layer=lambda *x: heard.append(x))
    total = heard[-1][1]
    assert heard == [(i, total) for i in range(total + 1)] and total > 20
    changed = {n for n, v in segmenter.state_dict().items() if not torch.equal(v, deeplab.state_dict()[n])}
    assert changed and all(n.endswith(("running_mean", "running_var")) for n in changed)
    assert not any(m.training or m._forward_pre_hooks for m in segmenter.modules())


def test_the_share_mixes_old_and_new(tiny_segmenter, deeplab):
    old, new, half = tiny_segmenter(), tiny_segmenter(), tiny_segmenter()
    adapt(new, in_batches(pictures()))
    adapt(half, in_batches(pictures()), 0.25)
    for name, value in statistics(half).items():
        assert torch.allclose(value, 0.25 * statistics(new)[name] + 0.75 * statistics(old)[name])
    same = copy.deepcopy(deeplab)
    adapt(same, in_batches(pictures()), 0)
    assert all(torch.equal(v, statistics(deeplab)[n]) for n, v in statistics(same).items())


@pytest.mark.parametrize("share", [-0.1, 1.1, None, "1", True, float("nan")])
def test_wrong_shares(tiny_segmenter, share):
    with pytest.raises(ValueError, match=r"share=.*expected a number from 0"):
        adapt(tiny_segmenter(), in_batches(pictures()), share)


def test_segformer_has_one_layer():
    torch.manual_seed(0)
    segmenter = SegFormer(3)
    (name,) = adapt(segmenter, in_batches(pictures([(64, 64)] * 2), 2))
    assert isinstance(dict(segmenter.named_modules())[name], nn.SyncBatchNorm)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)])
def test_a_segmenter_without_statistics_is_refused(norm):
    with pytest.raises(ValueError, match="Sequential has no batch norm with running statistics"):
        adapt(nn.Sequential(nn.Conv2d(3, 4, 1), norm), in_batches(pictures()))


def test_a_layer_that_runs_twice_is_measured_on_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x.float()) + self.norm(x.float() * 2)

    segmenter = Twice()
    adapt(segmenter, in_batches(pictures()))
    values = torch.cat([i.flatten(1) for i in pictures()], 1).double()
    assert torch.allclose(segmenter.norm.running_mean.double(), 1.5 * values.mean(1), rtol=1e-5)
