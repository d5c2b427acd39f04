"""Observes what a network's attention computes at ``F.scaled_dot_product_attention``: queries and
keys after norms and rotary embeddings, by the name of the module. Nothing is replaced, so outputs
are bit-identical."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Attended:
    """One call: ``q`` [B, H, N, D], ``k`` [B, H, T, D], ``scale`` of their products; ``mask``:
    added to the products or, if boolean, True where they are kept (broadcast to [B, H, N, T]), or
    None; ``out`` [B, H, N, D]: the result."""

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    mask: torch.Tensor | None = None
    out: torch.Tensor | None = None


def attention_modules(network: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of the modules that diffusers uses for attention."""
    for name, module in network.named_modules():
        if hasattr(module, "processor") or type(module).__name__.endswith("Attention"):
            yield name, module


class Observer(TorchFunctionMode):
    """While active, calls ``see(name, attended)`` for each attention of the modules ``names`` of
    ``network`` (None = all of :func:`attention_modules`).

    Attention backends that bypass ``F.scaled_dot_product_attention`` (flash, sage, compiled graphs)
    are not seen: a caller that expects a call has to check that it came.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        see: Callable[[str, Attended], None],
        names: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self._network, self._see, self._names = network, see, names
        self.ran: set[str] = set()  # modules that ran, whether seen or not
        self._inside: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        try:
            for name, module in attention_modules(self._network):
                if self._names is None or name in self._names:
                    begin, end = partial(self._begin, name), self._end
                    self._hooks.append(module.register_forward_pre_hook(begin))
                    self._hooks.append(module.register_forward_hook(end, always_call=True))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._inside:  # always_call covers an Exception, but not KeyboardInterrupt
            self._inside.clear()
            super().__exit__(None, None, None)

    # The mode is on only inside attention: while it is on, each call of a torch function passes
    # through Python.

    def _begin(self, name: str, *_: object) -> None:
        if not self._inside:
            super().__enter__()
        self._inside.append(name)
        self.ran.add(name)

    def _end(self, *_: object) -> None:
        if self._inside:  # false if a hook before ours has failed
            self._inside.pop()
            if not self._inside:
                super().__exit__(None, None, None)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._see(self._inside[-1], replace(_attended(*args, **kwargs), out=result.detach()))
        return result


@torch.no_grad()
def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attended:
    """ValueError for causal attention, which no image generator has."""
    if is_causal:
        raise ValueError("found causal attention in an image generator; it cannot be read")
    if key.shape[1] != query.shape[1]:  # several heads share one key
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return Attended(query.detach(), key.detach(), scale, attn_mask)
