"""The attention of a UNet, observed with hooks on its layers' projections: no processor is
replaced and nothing is projected twice, so the image with capture is bit-identical to the image
without. Which resolutions a UNet has, and which are read."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias

import torch
from diffusers.models.attention_processor import Attention

from dd.attention import maths as attention

# Bytes of queries and keys that are held until they are read at once: starting a kernel for each
# layer takes longer than its work where batches are small. They are views of what their layers
# projected, two to three times as much (the unconditional half, fused values). Elsewhere each layer
# is read by itself.
TOGETHER = {"cuda": 2**27}
# of the latent's side: 32 and 16 of Stable Diffusion's 64, as in the paper
PARTS = {"self": 2, "cross": 4}
# From the place of a block among those of its kind to its level among the sides.
LEVELS: dict[str, Callable[[int], int]] = {
    "down_blocks": lambda i: i,
    "up_blocks": lambda i: -1 - i,
    "mid_block": lambda i: -1,
}
Observer: TypeAlias = tuple[torch.nn.Module, Callable[..., None]]


@dataclass(frozen=True)
class Reading:
    """Which attention is read. ``full_prompt``: that of the prompt the image is made from, too;
    ``cross_layers``: the cross-attention layers, by the beginning of their names (``up_blocks.1``),
    and ``cross_heads`` their heads by number; None = all. ``every``: one call of the UNet of
    so many is read, from the first on."""

    full_prompt: bool = False
    cross_layers: list[str] | None = None
    cross_heads: list[int] | None = None
    every: int = 1

    def takes(self, layer: str) -> bool:
        """Whether a cross-attention layer is read."""
        return self.cross_layers is None or any(begins(layer, c) for c in self.cross_layers)


def begins(layer: str, name: str) -> bool:
    """Whether the name of a layer begins with whole parts of ``name``."""
    return f"{layer}.".startswith(f"{name}.")


def attention_layers(unet: torch.nn.Module) -> Iterator[tuple[str, Attention]]:
    """(name, layer) of the self-attention (attn1) and cross-attention (attn2) of a UNet."""
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith((".attn1", ".attn2")):
            yield name, module


def attention_sides(unet: torch.nn.Module, latent: int) -> dict[str, list[int]]:
    """Sides of the maps of a UNet's ``self`` and ``cross`` attention for square latents of side
    ``latent``.

    From where its layers stand: level i of the UNet works at the latent halved i times, rounded up.
    """
    sides = [latent]
    for _ in unet.config.down_block_types[1:]:
        sides.append((sides[-1] + 1) // 2)
    found: dict[str, set[int]] = {"self": set(), "cross": set()}
    for name, module in attention_layers(unet):
        block, place = name.split(".")[:2]
        level = LEVELS[block](int(place) if place.isdigit() else 0)
        found["cross" if module.is_cross_attention else "self"].add(sides[level])
    return {kind: sorted(each) for kind, each in found.items()}


def choose_side(kind: str, wanted: int | None, sides: list[int], latent: int) -> int:
    """The side at which ``kind`` attention is read: ``wanted``, or for None the one nearest (in
    ratio) to the paper's share of the latent, a quarter for cross- and a half for self-attention;
    of two equally near the finer one.

    ValueError names the sides that there are.
    """
    if wanted is not None and wanted in sides:
        return wanted
    if wanted is not None or not sides:
        raise ValueError(
            f"diffusion.{kind}_resolution={wanted}: this model has no {kind}-attention there; it "
            f"has {sides} for latents of {latent}x{latent}. null takes the one nearest to "
            f"1/{PARTS[kind]} of the latent"
        )
    return min(sides, key=lambda side: (abs(math.log2(side * PARTS[kind] / latent)), -side))


EVERYTHING = Reading()


class AttentionRecorder:
    """Records, while active, the mean attention of a UNet over heads, layers and steps, per sample.

    ``cross[source]`` [B, N, T] at ``cross_resolution`` for the sources ``class_prompt`` (keys from
    ``class_states`` [B, T, C], the text encoder's states of the class prompts; queries from the
    image being made) and, if ``reading`` says so, ``full_prompt`` (the prompt the image is made
    from); ``self_attention`` [B, M, M] at ``self_resolution``. Only the conditional half of a
    guided batch is read.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        class_states: torch.Tensor,
        cross_resolution: int,
        self_resolution: int,
        reading: Reading = EVERYTHING,
    ) -> None:
        self.unet, self.class_states, self.reading = unet, class_states, reading
        self.cross_resolution, self.self_resolution = cross_resolution, self_resolution
        self.calls = 0
        self.seen: dict[str, int] = {}  # pixels of each layer
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._class_keys: dict[str, torch.Tensor] = {}
        self._queries: dict[str, torch.Tensor] = {}
        self._held: dict[str, tuple[tuple[Any, ...], list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        self._handles: dict[str | None, list[Any]] = {}
        self._read: set[str] = set()

    def __enter__(self) -> Self:
        try:
            self._handles[None] = [self.unet.register_forward_hook(self._called)]
            for name, module in attention_layers(self.unet):
                handles = self._handles[name] = []
                for projection, observe in self._observers(name, module):
                    handles.append(projection.register_forward_hook(observe))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._handles):
            self._remove(name)
        self._queries.clear()
        self._held.clear()
        self._class_keys.clear()

    def _remove(self, name: str | None) -> None:
        for handle in self._handles.pop(name):
            handle.remove()

    def _called(self, *_: object) -> None:
        for source in list(self._held):
            self._sum_up(source)
        self._queries.clear()
        if not self.calls:  # layers at other resolutions need not be observed any longer
            for name in [n for n in self._handles if n is not None and n not in self._read]:
                self._remove(name)
        self.calls += 1

    def _observers(self, name: str, module: Attention) -> Iterator[Observer]:
        """(projection, forward hook) of what a layer projects: queries, then keys, or several at
        once where they are fused."""
        if module.is_cross_attention:
            full = partial(self._keys, "full_prompt", name, module)
            yield module.to_q, lambda _, __, queries: self._cross(name, module, queries)
            if self.reading.full_prompt and module.fused_projections:
                yield module.to_kv, lambda _, __, both: full(both.chunk(2, -1)[0])
            elif self.reading.full_prompt:
                yield module.to_k, lambda _, __, keys: full(keys)
        elif module.fused_projections:
            own = partial(self._self, name, module)
            yield module.to_qkv, lambda _, __, three: own(*three.chunk(3, -1)[:2])
        else:
            yield module.to_q, lambda _, __, queries: self._self(name, module, queries)
            yield module.to_k, lambda _, __, keys: self._keys("self", name, module, keys)

    def _reads(self, name: str, queries: torch.Tensor, resolution: int) -> bool:
        """Whether a layer is read this time; which layers there are is noted anyway."""
        self.seen[name] = queries.shape[1]
        if self.calls % self.reading.every or queries.shape[1] != resolution**2:
            return False
        self._read.add(name)
        return True

    def _self(
        self,
        name: str,
        module: Attention,
        queries: torch.Tensor,
        keys: torch.Tensor | None = None,
    ) -> None:
        if self._reads(name, queries, self.self_resolution):
            self._queries[name] = self._conditional(queries)
            if keys is not None:
                self._keys("self", name, module, keys)

    @torch.no_grad()
    def _cross(self, name: str, module: Attention, queries: torch.Tensor) -> None:
        if self._reads(name, queries, self.cross_resolution) and self.reading.takes(name):
            queries = self._conditional(queries)
            if name not in self._class_keys:
                self._class_keys[name] = module.to_k(self.class_states.to(queries.dtype))
            self._add("class_prompt", module, queries, self._class_keys[name])
            if self.reading.full_prompt:
                self._queries[name] = queries

    def _keys(self, source: str, name: str, module: Attention, keys: torch.Tensor) -> None:
        """The keys that follow the queries of a layer that is read; those of the class prompt
        follow none."""
        if (queries := self._queries.pop(name, None)) is not None:
            self._add(source, module, queries, self._conditional(keys))

    def _conditional(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[-len(self.class_states) :]

    @torch.no_grad()
    def _add(
        self, source: str, module: Attention, queries: torch.Tensor, keys: torch.Tensor
    ) -> None:
        kind = module.heads, module.scale, queries.shape, keys.shape
        if source in self._held and self._held[source][0] != kind:
            self._sum_up(source)
        _, held = self._held.setdefault(source, (kind, []))
        held.append((queries, keys))
        if len(held) * (queries.nbytes + keys.nbytes) >= TOGETHER.get(queries.device.type, 0):
            self._sum_up(source)

    @torch.no_grad()
    def _sum_up(self, source: str) -> None:
        """Add the attention of the layers that are held, as if they were one layer with the
        heads of all."""
        (heads, scale, *_), held = self._held.pop(source)
        layers, chosen = len(held), None if source == "self" else self.reading.cross_heads
        queries, keys = (x[0] if layers == 1 else torch.cat(x, 2) for x in zip(*held, strict=True))
        queries, keys = (attention.split_heads(x, heads * layers) for x in (queries, keys))
        if chosen is not None:
            if not chosen or not set(chosen) <= set(range(heads)):
                raise ValueError(
                    f"diffusion.cross_heads={chosen}: a layer that is read has the heads 0 to "
                    f"{heads - 1}"
                )
            each = [layer * heads + head for layer in range(layers) for head in chosen]
            queries, keys = queries[:, each], keys[:, each]
        self._sums[source] = attention.mean_attention(
            queries, keys, scale, self._sums.get(source), layers
        )
        self._counts[source] = self._counts.get(source, 0) + layers

    def check(self) -> None:
        """ValueError naming the layers and resolutions that exist if a wanted one was not seen."""
        if not self.seen:
            raise ValueError(
                f"no attention was captured: {type(self.unet).__name__} ran no attention layer"
            )
        self._check_layers()
        for kind, part, wanted in (
            ("self", "attn1", self.self_resolution),
            ("class_prompt", "attn2", self.cross_resolution),
        ):
            if kind not in self._sums:
                sides = {layer: round(pixels**0.5) for layer, pixels in self.seen.items()}
                there = sorted({side for layer, side in sides.items() if layer.endswith(part)})
                layers = "\n  ".join(f"{layer} at {side}" for layer, side in sides.items())
                name = "self" if kind == "self" else "cross"
                raise ValueError(
                    f"diffusion.{name}_resolution={wanted}: this model has no {name}-attention "
                    f"there; it has {there}. Layers:\n  {layers}"
                )

    def _check_layers(self) -> None:
        """ValueError for names of ``cross_layers`` that no layer at that resolution begins with."""
        wanted, pixels = self.reading.cross_layers, self.cross_resolution**2
        here = [n for n, seen in self.seen.items() if n.endswith("attn2") and seen == pixels]
        unused = [w for w in wanted or [] if not any(begins(layer, w) for layer in here)]
        if here and (unused or wanted == []):
            raise ValueError(
                f"diffusion.cross_layers={wanted}: no cross-attention layer at "
                f"{self.cross_resolution} has a name that begins so "
                f"({', '.join(unused) or 'nothing named'}). Layers:\n  " + "\n  ".join(here)
            )

    @property
    def cross(self) -> dict[str, torch.Tensor]:
        return {k: v / self._counts[k] for k, v in self._sums.items() if k != "self"}

    @property
    def self_attention(self) -> torch.Tensor:
        return self._sums["self"] / self._counts["self"]
