import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dd.segmenters.transforms import MEAN, EvalTransform, TrainTransform

import mmseg  # isort: skip  (after the placeholder)
from mmengine.config import Config  # isort: skip
from mmengine.registry import DefaultScope  # isort: skip
from mmseg.models import SegDataPreProcessor  # isort: skip
from mmseg.registry import TRANSFORMS  # isort: skip

VOC = Path(mmseg.__file__).parent / ".mim/configs/_base_/datasets/pascal_voc12.py"
PALETTE = np.array(
    [[10, 20, 30], [200, 40, 60], [30, 180, 90], [60, 70, 250]], np.uint8
)  # RGB of each class


def sample(height=80, width=112, seed=0):
    """An image whose colour is its mask: blocks of 8 pixels in the colours of PALETTE."""
    blocks = np.random.default_rng(seed).integers(
        0, len(PALETTE), (height // 8 + 1, width // 8 + 1)
    )
    mask = blocks.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)
    return PALETTE[mask], mask


def classes(image):
    """The class of the nearest colour in PALETTE, [H, W]."""
    distance = (
        (image.permute(1, 2, 0)[:, :, None] - torch.from_numpy(PALETTE).float()).abs().sum(-1)
    )
    return distance.argmin(-1)


@pytest.mark.parametrize("size", [(80, 112), (40, 150), (30, 30)])
def test_equals_the_pipeline_of_mmsegmentation(size):
    """Its VOC configuration, smaller, through its own loader's and preprocessor's conventions."""
    image, mask = sample(*size)
    steps = Config.fromfile(VOC).train_pipeline[2:]
    steps[0].scale, steps[1].crop_size = (256, 64), (64, 64)
    with DefaultScope.overwrite_default_scope("mmseg"):
        pipeline = [TRANSFORMS.build(step) for step in steps]
    preprocess = SegDataPreProcessor(
        mean=MEAN,
        std=(58.395, 57.12, 57.375),
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(64, 64),
    )
    transform = TrainTransform(scale=64, crop_size=64)
    for seed in range(12):
        np.random.seed(np.random.SeedSequence(seed).generate_state(4))
        results = {
            "img": image[:, :, ::-1].copy(),
            "gt_seg_map": mask.copy(),
            "seg_fields": ["gt_seg_map"],
        }
        for step in pipeline:
            results = step(results)
        data = {"inputs": [results["inputs"]], "data_samples": [results["data_samples"]]}
        expected = preprocess(data, training=True)
        ours, labels = transform(image, mask, seed)
        normalised = (ours - preprocess.mean) / preprocess.std
        assert torch.equal(normalised, expected["inputs"][0])
        assert torch.equal(labels[None], expected["data_samples"][0].gt_sem_seg.data)


def test_same_seed_same_result_and_global_states_untouched():
    image, mask = sample()
    before = image.copy(), mask.copy()
    transform = TrainTransform(scale=96, crop_size=64)
    np.random.seed(5), random.seed(5)
    first = transform(image, mask, seed=2**62 + 1)
    drawn = np.random.random(), random.random()
    np.random.seed(5), random.seed(5)
    assert drawn == (np.random.random(), random.random())
    second = pickle.loads(pickle.dumps(transform))(image, mask, seed=2**62 + 1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    results = [transform(image, mask, seed)[0] for seed in range(6)]
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])
    assert np.array_equal(image, before[0]) and np.array_equal(mask, before[1])


def test_states_come_back_after_an_error():
    image, mask = sample()
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    transform = TrainTransform(scale=64, crop_size=64)
    transform.transforms.append(lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        transform(image, mask, 0)
    assert np.random.random() == expected


def test_image_and_mask_move_together_and_channels_stay_rgb():
    image, mask = sample(80, 80)
    transform = TrainTransform(
        scale=80, ratio_range=(1, 1), crop_size=64, flip=0.5, photometric=False
    )
    corners = set()
    for seed in range(12):
        cropped, labels = transform(image, mask, seed)
        assert cropped.dtype == torch.float32 and labels.dtype == torch.int64
        assert cropped.shape == (3, 64, 64) and labels.shape == (64, 64)
        assert torch.equal(cropped, torch.from_numpy(PALETTE)[labels].permute(2, 0, 1).float())
        corners.add(tuple(labels[0, :20].tolist()))
    assert len(corners) > 6


def test_image_and_mask_are_resized_alike():
    image, mask = sample(64, 64)
    transform = TrainTransform(scale=64, ratio_range=(1.5, 2.0), crop_size=96, photometric=False)
    for seed in range(4):
        resized, labels = transform(image, mask, seed)
        assert labels.max() < len(PALETTE)
        assert (
            classes(resized) == labels
        ).float().mean() > 0.85  # colours mix at the edges of the blocks only


@pytest.mark.parametrize(("flip", "mirrored"), [(0.0, False), (1.0, True)])
def test_flip(flip, mirrored):
    image, mask = sample(64, 64)
    settings = {"ratio_range": (1, 1), "crop_size": 64, "photometric": False}
    flipped, labels = TrainTransform(scale=64, flip=flip, **settings)(image, mask, 0)
    expected = torch.from_numpy(mask).long()
    assert torch.equal(labels, expected.flip(1) if mirrored else expected)
    assert torch.equal(classes(flipped), labels)


def test_padding_is_the_mean_colour_and_ignored():
    image, mask = sample(48, 48)
    for ignore_index in (255, 254):
        transform = TrainTransform(
            scale=24, ratio_range=(1, 1), crop_size=32, ignore_index=ignore_index
        )
        padded, labels = transform(image, mask, 0)
        outside = torch.ones(32, 32, dtype=torch.bool)
        outside[:24, :24] = False
        assert torch.equal(labels == ignore_index, outside)
        assert torch.equal(
            padded[:, outside], torch.tensor(MEAN)[:, None].expand(3, int(outside.sum()))
        )


def test_the_long_side_is_held_to_four_short_sides():
    image, mask = sample(20, 160)
    transform = TrainTransform(scale=16, ratio_range=(1, 1), crop_size=80, flip=0)
    _, labels = transform(image, mask, 0)
    assert (labels != 255).nonzero().max(0).values.tolist() == [7, 63]


def test_photometric_changes_colours_within_range_and_never_the_mask():
    image, mask = sample(64, 64)
    plain = TrainTransform(scale=64, crop_size=48, photometric=False)
    distorted = TrainTransform(scale=64, crop_size=48)
    changed = 0
    for seed in range(6):
        (a, labels_a), (b, labels_b) = plain(image, mask, seed), distorted(image, mask, seed)
        assert torch.equal(labels_a, labels_b)
        assert b.min() >= 0 and b.max() <= 255
        changed += not torch.equal(a, b)
    assert changed >= 4


def test_cat_max_ratio_avoids_crops_of_one_class():
    mask = np.zeros((64, 256), np.uint8)
    mask[:, 240:] = 1
    image = PALETTE[mask]
    mixed = {}
    for limit in (1.0, 0.9):
        transform = TrainTransform(
            scale=64, ratio_range=(1, 1), crop_size=32, cat_max_ratio=limit, flip=0
        )
        mixed[limit] = sum(len(transform(image, mask, seed)[1].unique()) > 1 for seed in range(30))
    assert mixed[0.9] > mixed[1.0]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((60, 90), (32, 48)), ((90, 60), (48, 32)), ((20, 400), (6, 128)), ((32, 32), (32, 32))],
)
def test_eval_transform_keeps_the_ratio(size, expected):
    image, _ = sample(*size)
    resized = EvalTransform(short_side=32, max_long=128)(image)
    assert resized.dtype == torch.uint8 and resized.shape == (3, *expected)
    colour = EvalTransform(32)(np.broadcast_to(np.array([1, 2, 3], np.uint8), (40, 50, 3)))
    assert colour[:, 0, 0].tolist() == [1, 2, 3]


def test_eval_transform_at_the_same_size_changes_nothing():
    image, _ = sample(64, 96)
    assert torch.equal(EvalTransform(64)(image), torch.from_numpy(image).permute(2, 0, 1))


def test_wrong_inputs():
    image, mask = sample()
    transform = TrainTransform(scale=64, crop_size=64)
    with pytest.raises(ValueError, match=r"expected uint8 RGB \[H, W, 3\], got float32"):
        transform(image.astype(np.float32), mask, 0)
    with pytest.raises(ValueError, match=r"image: .* got uint8 \(80, 112\)"):
        EvalTransform(64)(mask)
    with pytest.raises(ValueError, match=r"mask: expected uint8 \(80, 112\).*got int64"):
        transform(image, mask.astype(np.int64), 0)
    with pytest.raises(ValueError, match=r"got uint8 \(79, 112\)"):
        transform(image, mask[1:], 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 0},
        {"ratio_range": (2.0, 0.5)},
        {"crop_size": 0},
        {"cat_max_ratio": 0},
        {"flip": 1.5},
    ],
)
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match=rf"transform\.{next(iter(settings))}[=:].*expected"):
        TrainTransform(**{"scale": 64, **settings})
    with pytest.raises(ValueError, match="short_side=64, max_long=32: expected"):
        EvalTransform(64, 32)
