"""Batch-norm statistics of other images in a trained segmenter (AdaBN, Li et al. 2016, arXiv:1603.04779). No I/O, no label."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch

BatchNorm = torch.nn.modules.batchnorm._BatchNorm


class _Enough(Exception):
    """The layer that is measured has seen its input; the rest of the network need not run."""


class Moments:
    """Mean and variance of each channel over all values that were added, in float64.

    ``add(x)``: [B, C, ...]. What is added alike in other batches gives the same numbers up to rounding: each image counts with
    its number of values.
    """

    def __init__(self):
        self.count, self.total, self.square = 0, 0.0, 0.0

    def add(self, x: torch.Tensor) -> None:
        x = x.detach().float().flatten(2) if x.ndim > 2 else x.detach().float()[..., None]
        variance, mean = torch.var_mean(x, dim=2, correction=0)  # [B, C]
        mean, number = mean.double().cpu(), x.shape[2]
        self.count += number * len(x)
        self.total = self.total + number * mean.sum(0)
        self.square = self.square + number * (variance.double().cpu() + mean.square()).sum(0)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, variance), float64 [C] each; the variance is divided by the number of values. ValueError for one value."""
        if self.count < 2:
            raise ValueError("a variance needs two values or more: give at least two photographs")
        mean = self.total / self.count
        return mean, (self.square / self.count - mean.square()).clamp(min=0)


def layers(segmenter: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """{name: batch norm with running statistics}. ValueError for a segmenter without any."""
    found = {n: m for n, m in segmenter.named_modules() if isinstance(m, BatchNorm) and m.running_mean is not None}
    if not found:
        raise ValueError(
            f"{type(segmenter).__name__} has no batch norm with running statistics: there is nothing to measure on photographs"
        )
    return found


def check_share(share) -> None:
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise ValueError(f"share={share!r}: expected a number from 0 (the old statistics) to 1 (those of the photographs)")


@torch.no_grad()
def adapt(
    segmenter: torch.nn.Module, batches: Callable[[], Iterable[torch.Tensor]], share: float = 1.0, on_layer=lambda *_: None
) -> list[str]:
    """Replace the running means and variances of ``segmenter`` by those of images; returns the names of the layers changed.

    ``batches()`` gives the images anew each time: tensors [B, 3, h, w], of one size in a batch. The layers are measured one
    after the other, in the order in which the network runs them, in evaluation mode (no dropout): the mean and the variance
    of a layer's input over all positions of all images, while the layers before it already normalise with their new
    statistics. With them the network computes what it would in training mode on one batch of all images, without having to
    hold it in memory (PyTorch would keep n / (n - 1) times the variance of n values). How the images are divided into batches
    changes the result by rounding alone. The price: one reading of the images and about half a forward pass for each layer.

    ``share``: the new statistics are share * measured + (1 - share) * old. Layers that ``forward`` does not run (auxiliary
    heads) keep theirs. ``on_layer(done, total)`` hears of progress. ValueError for a ``share`` outside 0..1, for a segmenter
    without batch norm, and for a single image.
    """
    check_share(share)
    names = {module: name for name, module in layers(segmenter).items()}
    segmenter.eval()
    calls = _order(segmenter, list(names), next(iter(batches())))
    for done, (layer, times) in enumerate(calls.items()):
        on_layer(done, len(calls))
        mean, variance = _measured(segmenter, layer, times, batches())
        for old, new in ((layer.running_mean, mean), (layer.running_var, variance)):
            old.copy_(share * new.to(old.device) + (1 - share) * old.double())
    on_layer(len(calls), len(calls))
    return [names[layer] for layer in calls]


def _order(segmenter, found, images) -> Counter:
    """{layer: how often it runs in a forward pass}, in order of the first time."""
    calls = Counter()
    with _hooked(found, lambda layer, _: calls.update([layer])):
        segmenter(images)
    return calls


def _measured(segmenter, layer, times: int, batches) -> tuple[torch.Tensor, torch.Tensor]:
    moments, seen = Moments(), 0

    def hook(_, inputs):
        nonlocal seen
        moments.add(inputs[0])
        seen += 1
        if seen % times == 0:
            raise _Enough

    with _hooked([layer], hook):
        for images in batches:
            try:
                segmenter(images)
            except _Enough:
                continue
    return moments.result()


@contextmanager
def _hooked(found, hook):
    handles = [layer.register_forward_pre_hook(hook) for layer in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
