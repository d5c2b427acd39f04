from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dd.datamodule import Onward, Schedule, SegmentationData, Whole, whole_loader


class Pictures:
    """``count`` images of different sizes; pixel (0, 0) is the image's number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        image = np.full((8 + i % 3, 10 + i % 2, 3), i, np.uint8)
        return image, np.full(image.shape[:2], i % 5, np.uint8)


def train_transform(image, mask, seed):
    return torch.tensor([int(image[0, 0, 0]), seed]), torch.from_numpy(mask[:4, :4].astype(np.int64))


def eval_transform(image):
    return torch.from_numpy(image.transpose(2, 0, 1)).float()


def draws(**kwargs):
    schedule = Schedule(Pictures(7), train_transform, **{"length": 30, "seed": 3, **kwargs})
    return [schedule.draw(i) for i in range(len(schedule))]


def test_each_pass_visits_every_image_once_in_its_own_order():
    samples = [sample for sample, _ in draws()]
    passes = [samples[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(p) == list(range(7)) for p in passes)
    assert len({tuple(p) for p in passes}) == 4
    assert samples != [sample for sample, _ in draws(seed=4)]


def test_each_draw_is_augmented_in_its_own_way():
    seeds = [seed for _, seed in draws()]
    assert len(set(seeds)) == 30 and all(0 <= s < 2**32 for s in seeds)


def test_draws_do_not_depend_on_anything_else():
    np.random.seed(1)
    first = draws()
    np.random.seed(2)
    assert draws() == first
    schedule = Schedule(Pictures(7), train_transform, 30, 3)
    assert [schedule.draw(i) for i in reversed(range(30))] == first[::-1]


@pytest.mark.parametrize("first", [0, 1, 13, 29, 30, 40])
def test_a_resumed_schedule_is_the_tail_and_keeps_its_length(first):
    assert list(Onward(30, first)) == list(range(30))[first:]
    assert len(Onward(30, first)) == 30


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_the_draws(ranks):
    parts = [draws(length=10, stride=ranks, offset=rank) for rank in range(ranks)]
    together = [draw for step in zip(*parts, strict=True) for draw in step]
    assert together == draws(length=10 * ranks)
    assert Counter(sample for sample, _ in together[:7]) == dict.fromkeys(range(7), 1)


def test_an_item_is_the_drawn_picture():
    schedule = Schedule(Pictures(7), train_transform, 30, 3)
    for i in (0, 29):
        image, label = schedule[i]
        assert tuple(image.tolist()) == schedule.draw(i)
        assert (label == image[0] % 5).all()
    for i in (30, -1):
        with pytest.raises(IndexError):
            schedule[i]


def test_the_whole_set_at_original_size():
    data = Whole(Pictures(5), eval_transform)
    assert len(data) == 5
    for i in range(5):
        image, mask = data[i]
        assert mask.dtype == torch.int64 and mask.shape == image.shape[1:] == (8 + i % 3, 10 + i % 2)


def test_whole_loader_takes_pictures_of_different_sizes():
    batches = list(whole_loader(Pictures(5), eval_transform, batch_size=2))
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    images = [image for batch, _ in batches for image in batch]
    masks = [mask for _, batch in batches for mask in batch]
    assert [int(image[0, 0, 0]) for image in images] == list(range(5))
    assert [m.shape for m in masks] == [i.shape[1:] for i in images]
    assert len({m.shape for m in masks}) > 2


def module(max_steps=4, global_step=0, world_size=1, global_rank=0, tune=None, **kwargs):
    data = SegmentationData(Pictures(7), tune, train_transform, eval_transform, batch_size=3, seed=3, **kwargs)
    data.trainer = SimpleNamespace(
        max_steps=max_steps, global_step=global_step, world_size=world_size, global_rank=global_rank
    )
    return data


def batches(data):
    return [tuple(map(tuple, images.tolist())) for images, _ in data.train_dataloader()]


def test_training_is_one_long_epoch_of_max_steps():
    found = batches(module())
    assert len(found) == 4 and all(len(b) == 3 for b in found)
    assert [draw for b in found for draw in b] == draws(length=12)


def test_a_resumed_training_sees_the_batches_that_were_left():
    assert batches(module(global_step=3)) == batches(module())[3:]
    assert batches(module(global_step=4)) == []


def test_two_processes_see_different_batches():
    first, second = (batches(module(world_size=2, global_rank=rank)) for rank in (0, 1))
    assert len(first) == len(second) == 4
    assert sorted(d for b in first + second for d in b) == sorted(draws(length=24))


def test_workers_change_nothing():
    assert batches(module(num_workers=1)) == batches(module())


def test_no_tune_set_means_no_validation():
    assert module().val_dataloader() == []
    ((images, masks), *_) = module(tune=Pictures(2)).val_dataloader()
    assert len(images) == len(masks) == 2


def test_an_empty_training_set_is_refused():
    with pytest.raises(ValueError, match="training set is empty"):
        SegmentationData(Pictures(0), None, train_transform, eval_transform, 2)
