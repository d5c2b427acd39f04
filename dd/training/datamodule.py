"""Training and validation batches. The order of samples and their augmentation depend only on
(seed, position)."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from dd.data.datasets import SegmentationFolder
from dd.store.samples import sample_seed
from dd.training.loaders import ResumableLoader

TrainTransform = Callable[[np.ndarray, np.ndarray, int], tuple[torch.Tensor, torch.Tensor]]
Element = TypeVar("Element", covariant=True)
EvalTransform = Callable[[np.ndarray], Any]  # an image, or a list of views


class Numbered(Protocol[Element]):
    """Elements by number, from 0 on."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Element: ...


Labelled = Numbered[tuple[np.ndarray, np.ndarray]]  # images uint8 [H, W, 3], masks uint8 [H, W]
Photographs = Numbered[np.ndarray]  # images uint8 [H, W, 3]


@dataclass(frozen=True)
class Order:
    """Passes over ``number`` images, each image once per pass, each pass in its own order.

    Position p belongs to pass p // number; its image and augmentation seed depend on (seed, p)
    alone. Process ``offset`` of ``stride`` takes every stride-th position.
    """

    number: int
    seed: int
    stride: int = 1
    offset: int = 0

    def draw(self, index: int) -> tuple[int, int]:
        """(image, augmentation seed) of this process's draw ``index``."""
        position = index * self.stride + self.offset
        lap, place = divmod(position, self.number)
        order = np.random.default_rng([self.seed, 4, lap]).permutation(self.number)
        augmentation = np.random.default_rng([self.seed, 5, position]).integers(2**32)
        return int(order[place]), int(augmentation)


class Schedule(Dataset):
    """A fixed number of draws from ``data``, in an :class:`Order`, as one long epoch. An item is
    (image [3, h, w], label [h, w])."""

    def __init__(
        self,
        data: Labelled,
        transform: TrainTransform,
        length: int,
        seed: int,
        stride: int = 1,
        offset: int = 0,
    ) -> None:
        self.data, self.transform, self.length = data, transform, length
        self.order = Order(len(data), seed, stride, offset)

    def __len__(self) -> int:
        return self.length

    def draw(self, index: int) -> tuple[int, int]:
        return self.order.draw(index)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample, seed = self.draw(index)
        image, mask = self.data[sample]
        return self.transform(image, mask, seed)


class Mixture(Dataset):
    """Real and synthetic images of one training: ``real`` first, then ``synthetic``, both indexable
    (image, mask) data.

    ``real_share``: the share of real images among the draws, strictly between 0 and 1.
    """

    def __init__(
        self, real: SegmentationFolder, synthetic: SegmentationFolder, real_share: float
    ) -> None:
        if real.taxonomy != synthetic.taxonomy:
            raise ValueError(
                f"real images have the classes {real.taxonomy.names}, "
                f"synthetic ones {synthetic.taxonomy.names}"
            )
        self.real, self.synthetic, self.real_share = real, synthetic, real_share
        self.taxonomy = real.taxonomy

    def __len__(self) -> int:
        return len(self.real) + len(self.synthetic)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        real = len(self.real)
        return self.real[index] if index < real else self.synthetic[index - real]

    def unchecked(self) -> int:
        return self.real.unchecked() + self.synthetic.unchecked()

    def fingerprint(self) -> dict[str, Any]:
        """What a run records of its data."""
        return {
            "real_share": self.real_share,
            "real": self.real.fingerprint(),
            "synthetic": self.synthetic.fingerprint(),
        }


class MixedSchedule(Schedule):
    """Draws from a :class:`Mixture`: of the first n draws of each process, floor(n * real_share)
    are real, evenly spread. A batch therefore holds the share ``real_share`` of real images, to
    within one image.

    Each part has its own :class:`Order` with its own seed, independent of the other part.
    """

    def __init__(
        self,
        data: Mixture,
        transform: TrainTransform,
        length: int,
        seed: int,
        stride: int = 1,
        offset: int = 0,
    ) -> None:
        super().__init__(data, transform, length, seed, stride, offset)
        self.real, self.synthetic = (
            Order(len(part), sample_seed(seed, name), stride, offset)
            for name, part in (("real", data.real), ("synthetic", data.synthetic))
        )
        self.share = Fraction(str(data.real_share))  # exact: 0.29 of 100 draws are 29

    def draw(self, index: int) -> tuple[int, int]:
        before = index * self.share // 1  # real draws of this process so far
        if (index + 1) * self.share // 1 > before:
            return self.real.draw(before)
        sample, seed = self.synthetic.draw(index - before)
        return self.real.number + sample, seed


class WithPhotos(Dataset):
    """Draws of ``schedule``, each with an unlabelled photograph: (image, label, the result of
    ``transform(photo, seed)``: the teacher's view, the student's, and which of their pixels belong
    to the photograph). Photographs have passes of their own."""

    def __init__(
        self,
        schedule: Schedule,
        photos: Photographs,
        transform: Callable[[np.ndarray, int], tuple[torch.Tensor, ...]],
    ) -> None:
        self.schedule, self.photos, self.transform = schedule, photos, transform
        seed = sample_seed(schedule.order.seed, "unlabelled")
        self.order = replace(schedule.order, number=len(photos), seed=seed)

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        labelled = self.schedule[index]
        photo, seed = self.order.draw(index)
        return *labelled, *self.transform(self.photos[photo], seed)


def hold_out(
    data: SegmentationFolder, number: int, seed: int
) -> tuple[SegmentationFolder, SegmentationFolder]:
    """(images to train on, ``number`` images held out of them for validation): copies of ``data``
    with other ``ids``, chosen by seed, in the order of ``data``. ValueError if none would be left
    to train on."""
    if type(number) is not int or not 1 <= number < len(data):
        raise ValueError(
            f"hold_out={number!r}, but the training set holds {len(data)} images and must keep "
            f"one: choose 1 to {len(data) - 1}, or null to hold out none"
        )
    chosen = set(np.random.default_rng([seed, 6]).permutation(len(data))[:number].tolist())
    rest, held = copy(data), copy(data)
    rest.ids = [name for i, name in enumerate(data.ids) if i not in chosen]
    held.ids = [name for i, name in enumerate(data.ids) if i in chosen]
    return rest, held


class Whole(Dataset):
    """Every image once, for evaluation: (the result of ``transform``: [3, h, w] or a list of views,
    mask [H, W])."""

    def __init__(self, data: Labelled, transform: EvalTransform) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        image, mask = self.data[index]
        return self.transform(image), torch.from_numpy(mask.astype(np.int64))


def whole_loader(
    data: Labelled, transform: EvalTransform, batch_size: int = 16, num_workers: int = 0
) -> DataLoader:
    """Batches (list of images or of lists of views, list of masks at original size); sizes may
    differ within a batch."""
    return DataLoader(
        Whole(data, transform),
        batch_size,
        num_workers=num_workers,
        collate_fn=lambda rows: tuple(map(list, zip(*rows, strict=True))),
    )


def per_process(batch_size: int, processes: int) -> int:
    """How many images of a batch each process of a training takes. ValueError if they do not divide
    evenly, or for one image a process, which is too few for batch norm."""
    if processes > 1 and (batch_size % processes or batch_size < 2 * processes):
        raise ValueError(
            f"batch_size={batch_size}: the images of a step are divided among the {processes} "
            f"processes of the training, two or more for each. Choose a multiple of {processes} "
            f"from {2 * processes} on, or fewer trainer.devices"
        )
    return batch_size // processes


class SegmentationData(pl.LightningDataModule):
    """``train`` (a :class:`Mixture` for mixed training) for ``max_steps`` batches, ``tune`` (or
    None) for validation; both are indexable (image, mask) data. ``batch_size`` is that of all
    processes together (:func:`per_process`); ``tune`` is divided among the processes, each image
    once. ``photos``: (unlabelled photographs, their transform) to train on beside the labelled
    images; a batch then has the form of :class:`WithPhotos`."""

    # with fewer images to validate than processes
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        train: Labelled,
        tune: Labelled | None,
        train_transform: TrainTransform,
        eval_transform: EvalTransform,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        photos: tuple[Photographs, Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        if not len(train):
            raise ValueError("the training set is empty")
        self.train, self.tune, self.photos = train, tune, photos
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def train_dataloader(self) -> ResumableLoader:
        trainer = self.trainer
        share = per_process(self.batch_size, trainer.world_size)
        length = trainer.max_steps * trainer.accumulate_grad_batches * share
        how = self.train_transform, length, self.seed, trainer.world_size, trainer.global_rank
        schedule: Dataset
        if isinstance(self.train, Mixture):
            schedule = MixedSchedule(self.train, *how)
        else:
            schedule = Schedule(self.train, *how)
        if self.photos:
            schedule = WithPhotos(schedule, *self.photos)
        return ResumableLoader(schedule, trainer, share, self.num_workers)

    def val_dataloader(self) -> DataLoader | list[Any]:
        if self.tune is None:
            return []
        number, processes, rank = len(self.tune), self.trainer.world_size, self.trainer.global_rank
        # the first process has the first images
        part = range(-(-rank * number // processes), -(-(rank + 1) * number // processes))
        share = per_process(self.batch_size, processes)
        return whole_loader(Subset(self.tune, part), self.eval_transform, share, self.num_workers)
