"""Training batches whose order is a function of the position, so that a training goes on at any
step."""

import torch
from torch.utils.data import DataLoader, Sampler


class ResumableSampler(Sampler):
    """Positions ``first`` to ``length - 1``: the draws that a resumed training has left. Its
    length stays ``length``, because Lightning counts the batches of a resumed epoch from the
    epoch's start."""

    def __init__(self, length: int, first: int):
        self.length, self.first = length, first

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        return iter(range(self.first, self.length))


class ResumableLoader(DataLoader):
    """``max_steps`` steps of ``batch_size`` draws of this process as one long epoch, from the step
    on that ``trainer`` has reached.

    Its state says to Lightning that it goes on inside an epoch, and keeps a training from going on
    with another batch size or number of processes (ValueError): it would see some images twice and
    others never.
    """

    def __init__(self, data, trainer, batch_size: int, num_workers: int = 0):
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

    def state_dict(self) -> dict:
        return self.drawn

    def load_state_dict(self, state: dict) -> None:
        if state != self.drawn:
            raise ValueError(
                f"the checkpoint was written by a training with {_listed(state)}; this one has "
                f"{_listed(self.drawn)}. Go on "
                "with the same number (trainer.devices times trainer.num_nodes), or give another "
                "name=..."
            )


def _listed(state: dict) -> str:
    return ", ".join(f"{key}={value}" for key, value in state.items())
