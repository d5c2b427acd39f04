"""Training and validation batches. The order of samples and their augmentation are functions of (seed, position)."""

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class Schedule(Dataset):
    """A fixed number of draws from ``data`` as one long epoch: every image once per pass, each pass in its own order.

    Position p belongs to pass p // n; its sample and augmentation seed depend on (seed, p) alone. Process ``offset`` of
    ``stride`` takes every stride-th position. An item is (image [3, h, w], label [h, w]).
    """

    def __init__(self, data, transform, length: int, seed: int, stride: int = 1, offset: int = 0):
        self.data, self.transform, self.length, self.seed = data, transform, length, seed
        self.stride, self.offset = stride, offset

    def __len__(self) -> int:
        return self.length

    def draw(self, index: int) -> tuple[int, int]:
        """(sample, augmentation seed) of a position counted over all processes."""
        position = index * self.stride + self.offset
        lap, place = divmod(position, len(self.data))
        order = np.random.default_rng([self.seed, 4, lap]).permutation(len(self.data))
        return int(order[place]), int(np.random.default_rng([self.seed, 5, position]).integers(2**32))

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample, seed = self.draw(index)
        image, mask = self.data[sample]
        return self.transform(image, mask, seed)


class Onward(Sampler):
    """Positions ``first`` to ``length - 1``: the draws that a resumed training has left. Its length stays ``length``, because
    Lightning counts the batches of a resumed epoch from the epoch's start."""

    def __init__(self, length: int, first: int):
        self.length, self.first = length, first

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        return iter(range(self.first, self.length))


class Whole(Dataset):
    """Every image once for evaluation: (resized image [3, h, w], mask [H, W] at original size)."""

    def __init__(self, data, transform):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        image, mask = self.data[index]
        return self.transform(image), torch.from_numpy(mask.astype(np.int64))


def whole_loader(data, transform, batch_size: int = 16, num_workers: int = 0) -> DataLoader:
    """Batches (list of images, list of masks); sizes may differ within a batch."""
    return DataLoader(
        Whole(data, transform),
        batch_size,
        num_workers=num_workers,
        collate_fn=lambda rows: tuple(map(list, zip(*rows, strict=True))),
    )


class SegmentationData(pl.LightningDataModule):
    """``train`` for ``max_steps`` batches, ``tune`` (or None) for validation; both are indexable (image, mask) data."""

    def __init__(self, train, tune, train_transform, eval_transform, batch_size: int, num_workers: int = 0, seed: int = 0):
        super().__init__()
        if not len(train):
            raise ValueError("the training set is empty")
        self.train, self.tune = train, tune
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def train_dataloader(self):
        trainer = self.trainer
        length, done = trainer.max_steps * self.batch_size, trainer.global_step * self.batch_size
        schedule = Schedule(
            self.train, self.train_transform, length, self.seed, stride=trainer.world_size, offset=trainer.global_rank
        )  # fmt: skip
        return DataLoader(
            schedule, self.batch_size, sampler=Onward(length, done), num_workers=self.num_workers, drop_last=True,
            pin_memory=torch.cuda.is_available(), persistent_workers=self.num_workers > 0,
        )  # fmt: skip

    def val_dataloader(self):
        return [] if self.tune is None else whole_loader(self.tune, self.eval_transform, self.batch_size, self.num_workers)
