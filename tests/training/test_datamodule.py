from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dd.taxonomy import Taxonomy
from dd.training.datamodule import (
    MixedSchedule,
    Mixture,
    Schedule,
    SegmentationData,
    Whole,
    hold_out,
    whole_loader,
)
from dd.training.loaders import ResumableSampler


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
    return torch.tensor([int(image[0, 0, 0]), seed]), torch.from_numpy(
        mask[:4, :4].astype(np.int64)
    )


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
    assert list(ResumableSampler(30, first)) == list(range(30))[first:]
    assert len(ResumableSampler(30, first)) == 30


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
        assert mask.dtype == torch.int64 and mask.shape == image.shape[1:] == (
            8 + i % 3,
            10 + i % 2,
        )


def test_whole_loader_takes_pictures_of_different_sizes():
    batches = list(whole_loader(Pictures(5), eval_transform, batch_size=2))
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    images = [image for batch, _ in batches for image in batch]
    masks = [mask for _, batch in batches for mask in batch]
    assert [int(image[0, 0, 0]) for image in images] == list(range(5))
    assert [m.shape for m in masks] == [i.shape[1:] for i in images]
    assert len({m.shape for m in masks}) > 2


def module(
    max_steps=4,
    global_step=0,
    world_size=1,
    global_rank=0,
    tune=None,
    train=None,
    batch_size=3,
    accumulate=1,
    **kwargs,
):
    train = train or Pictures(7)
    data = SegmentationData(
        train, tune, train_transform, eval_transform, batch_size=batch_size, seed=3, **kwargs
    )
    data.trainer = SimpleNamespace(
        max_steps=max_steps,
        global_step=global_step,
        world_size=world_size,
        global_rank=global_rank,
        accumulate_grad_batches=accumulate,
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


def test_a_step_of_several_batches_is_resumed_at_its_first():
    found = batches(module(accumulate=2))
    assert len(found) == 8 and batches(module(accumulate=2, global_step=3)) == found[6:]


@pytest.mark.parametrize("change", [{"world_size": 2}, {"batch_size": 2}, {"accumulate": 2}])
def test_a_training_does_not_go_on_with_other_draws(change):
    state = module(batch_size=4).train_dataloader().state_dict()
    module(global_step=3, batch_size=4).train_dataloader().load_state_dict(state)
    wrong = r"written by a training with batch_size=4, processes=1.*Resume with the same number"
    with pytest.raises(ValueError, match=wrong):
        module(**{"batch_size": 4, **change}).train_dataloader().load_state_dict(state)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_batch_is_that_of_all_processes_together(processes, accumulate):
    def steps(processes, **kwargs):
        how = {"world_size": processes, "batch_size": 12, **kwargs}
        each = [batches(module(global_rank=rank, **how)) for rank in range(processes)]
        return [sorted(draw for part in step for draw in part) for step in zip(*each, strict=True)]

    whole = steps(1, accumulate=accumulate)
    assert [len(step) for step in whole] == [12] * 4 * accumulate
    assert steps(processes, accumulate=accumulate) == whole
    assert steps(processes, accumulate=accumulate, global_step=3) == whole[3 * accumulate :]


@pytest.mark.parametrize(("batch_size", "processes"), [(8, 3), (3, 2), (2, 2), (4, 3), (1, 2)])
def test_a_batch_that_does_not_divide_is_refused(batch_size, processes):
    data = module(batch_size=batch_size, world_size=processes, tune=Pictures(3))
    least = rf"{processes} processes.*a multiple of {processes} from {2 * processes} on"
    for loader in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(ValueError, match=rf"batch_size={batch_size}: .*{least}"):
            loader()


def test_one_process_may_have_one_image():
    assert [len(batch) for batch in batches(module(batch_size=1))] == [1] * 4


@pytest.mark.parametrize(("images", "processes"), [(7, 2), (7, 3), (2, 3), (1, 2), (5, 1)])
def test_processes_share_the_images_that_are_validated(images, processes):
    how = {"world_size": processes, "batch_size": 2 * processes}
    modules = [module(tune=Pictures(images), global_rank=r, **how) for r in range(processes)]
    parts = [each.val_dataloader() for each in modules]
    found = [[int(image[0, 0, 0]) for batch, _ in part for image in batch] for part in parts]
    assert [i for part in found for i in part] == list(range(images))
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes)


def test_two_processes_see_different_batches():
    first, second = (batches(module(world_size=2, global_rank=r, batch_size=6)) for r in (0, 1))
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


# Mixed training


class Named(Pictures):
    """Pictures of a data set: with classes, ids and a fingerprint."""

    def __init__(self, count, name="real", classes=("cat", "dog")):
        super().__init__(count)
        self.taxonomy, self.ids, self.name = (
            Taxonomy("pets", classes),
            [f"{name}{i}" for i in range(count)],
            name,
        )

    def __len__(self):
        return len(self.ids)

    def fingerprint(self):
        return {"root": self.name, "images": len(self)}


def mixture(share=0.5, real=5, synthetic=9):
    return Mixture(Named(real), Named(synthetic, "synthetic"), share)


def mixed_draws(share=0.5, length=48, seed=3, real=5, synthetic=9, **kwargs):
    schedule = MixedSchedule(
        mixture(share, real, synthetic), train_transform, length, seed, **kwargs
    )
    return [schedule.draw(i) for i in range(length)]


def test_a_mixture_holds_both():
    data = mixture()
    assert len(data) == 14 and data.taxonomy.names == ("cat", "dog")
    assert [int(data[i][0][0, 0, 0]) for i in range(14)] == [*range(5), *range(9)]
    assert data.fingerprint() == {
        "real_share": 0.5,
        "real": {"root": "real", "images": 5},
        "synthetic": {"root": "synthetic", "images": 9},
    }


@pytest.mark.parametrize(
    ("share", "batch", "real"),
    [(0.5, 8, 4), (0.25, 8, 2), (0.29, 100, 29), (0.9, 10, 9), (0.1, 30, 3)],
)
def test_each_batch_has_the_stated_share(share, batch, real):
    found = [sample < 5 for sample, _ in mixed_draws(share, 6 * batch)]
    assert [sum(found[i : i + batch]) for i in range(0, len(found), batch)] == [real] * 6


def test_a_share_that_fits_no_batch_is_met_on_the_whole():
    found = [sample < 5 for sample, _ in mixed_draws(0.3, 80)]
    batches = [sum(found[i : i + 8]) for i in range(0, 80, 8)]
    assert sum(batches) == 24 and set(batches) == {2, 3}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_part_goes_through_its_own_passes(ranks):
    length = 90 // ranks
    parts = [mixed_draws(length=length, stride=ranks, offset=rank) for rank in range(ranks)]
    for part in parts:  # each process sees the share
        assert sum(sample < 5 for sample, _ in part) == length // 2
    order = [sample for step in zip(*parts, strict=True) for sample, _ in step]
    real, synthetic = [s for s in order if s < 5], [s - 5 for s in order if s >= 5]
    for samples, count in ((real, 5), (synthetic, 9)):
        laps = [samples[i : i + count] for i in range(0, len(samples) - count + 1, count)]
        assert len(laps) > 3 and all(sorted(lap) == list(range(count)) for lap in laps)
        assert len({tuple(lap) for lap in laps}) > 1
    seeds = [seed for part in parts for _, seed in part]
    assert len(set(seeds)) == len(seeds)


def test_a_part_does_not_depend_on_the_other():
    def part(of_real, **kwargs):
        n = kwargs.get("real", 5)
        return [
            (s if of_real else s - n, seed)
            for s, seed in mixed_draws(**kwargs)
            if (s < n) is of_real
        ]

    assert part(True, synthetic=9) == part(True, synthetic=20)
    assert part(False, real=5) == part(False, real=2)
    few, many = part(True, share=0.25, length=40), part(True, share=0.75, length=40)
    assert many[:10] == few and len(many) == 30
    assert part(True, seed=3) != part(True, seed=4) and part(False, seed=3) != part(False, seed=4)
    first = mixed_draws(length=90, real=9, synthetic=9)  # parts of one size are not drawn in step
    assert [s for s, _ in first if s < 9] != [s - 9 for s, _ in first if s >= 9]


def test_mixed_batches_are_a_function_of_seed_and_step():
    whole = batches(module(max_steps=6, train=mixture(), batch_size=4))
    np.random.seed(5)
    assert batches(module(max_steps=6, train=mixture(), batch_size=4)) == whole
    assert batches(module(max_steps=6, train=mixture(), batch_size=4, num_workers=1)) == whole
    assert (
        batches(module(max_steps=6, train=mixture(), batch_size=4, global_step=4)) == whole[4:]
    )  # resumed
    schedule = MixedSchedule(mixture(), train_transform, 24, 3)
    assert [seed for b in whole for _, seed in b] == [schedule.draw(i)[1] for i in range(24)]


def test_parts_with_other_classes_are_refused():
    with pytest.raises(
        ValueError, match="real images have the classes .*'cat', 'dog'.*synthetic ones .*'cow'"
    ):
        Mixture(Named(3), Named(3, "synthetic", ("cow",)), 0.5)


# Images held out for validation


def test_held_out_images_are_not_trained_on():
    data = Named(20)
    rest, held = hold_out(data, 6, seed=1)
    assert len(rest) == 14 and len(held) == 6 and len(data) == 20
    assert set(rest.ids).isdisjoint(held.ids) and sorted(rest.ids + held.ids) == sorted(data.ids)
    assert rest.ids == [i for i in data.ids if i in rest.ids] and held.ids == [
        i for i in data.ids if i in held.ids
    ]
    assert hold_out(Named(20), 6, seed=1)[1].ids == held.ids != hold_out(data, 6, seed=2)[1].ids


@pytest.mark.parametrize("number", [0, 20, 21, -1, 2.5, "3", True])
def test_something_must_be_left_to_train_on(number):
    with pytest.raises(ValueError, match=r"hold_out=.*holds 20 images .*choose 1 to 19, or null"):
        hold_out(Named(20), number, 0)
