"""Training batches whose order depends only on the position, so that a training can resume at any
step."""

from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class ResumableSampler(Sampler):
    """Positions ``first`` to ``length - 1``: the remaining draws of a resumed training. Its length
    stays ``length``, because Lightning counts the batches of a resumed epoch from the epoch's
    start."""

    def __init__(self, length: int, first: int) -> None:
        self.length, self.first = length, first

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.length))


class ResumableLoader(DataLoader):
    """``max_steps`` steps of ``batch_size`` draws of this process as one long epoch, starting at
    the step that ``trainer`` has reached.

    Its state tells Lightning to resume inside an epoch. It also refuses to resume with another
    batch size or number of processes (ValueError), because some images would be seen twice and
    others never.
    """

    def __init__(
        self, data: Dataset, trainer: pl.Trainer, batch_size: int, num_workers: int = 0
    ) -> None:
        per_step = batch_size * trainer.accumulate_grad_batches
        super().__init__(
            data,
            batch_size,
            sampler=ResumableSampler(trainer.max_steps * per_step, trainer.global_step * per_step),
            num_workers=num_workers,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
        )
        self.drawn = {
            "batch_size": batch_size * trainer.world_size,
            "processes": trainer.world_size,
            "accumulate": trainer.accumulate_grad_batches,
        }

    def state_dict(self) -> dict[str, int]:
        return self.drawn

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state != self.drawn:
            theirs, ours = (
                ", ".join(f"{key}={value}" for key, value in drawn.items())
                for drawn in (state, self.drawn)
            )
            raise ValueError(
                f"the checkpoint was written by a training with {theirs}; this one has {ours}. "
                "Resume with the same number (trainer.devices times trainer.num_nodes), or give "
                "another name=..."
            )


class Draws(pl.LightningDataModule):
    """Batches of ``dataset(number)``, which holds as many draws as the training takes; a resumed
    training takes the remaining ones."""

    def __init__(
        self, dataset: Callable[[int], Any], batch_size: int, num_workers: int, seed: int
    ) -> None:
        super().__init__()
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.seed = seed

    def train_dataloader(self) -> ResumableLoader:
        trainer = self.trainer
        number = trainer.max_steps * trainer.accumulate_grad_batches * self.batch_size
        return ResumableLoader(self.dataset(number), trainer, self.batch_size, self.num_workers)
