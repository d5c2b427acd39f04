"""Finds where a network's attention can be read, by a forward pass; chooses by side and name."""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch

from dd.attention.observer import Attended, Observer

Kind: TypeAlias = Literal["cross", "self", "joint"]
# fractions of the latent's side: 1/2 and 1/4 of Stable Diffusion's 64 are the paper's 32 and 16
PARTS = {"self": 2, "cross": 4}


@dataclass(frozen=True)
class Layout:
    """Where the text rows are among the keys. ``text`` "apart": in cross-attention layers, which
    alternate with self-attention of the image. ``text`` "first" or "last": in joint attention,
    before or after ``image_rows`` of the image, of which the first ``pixels`` are pixels and the
    rest is padding."""

    text: Literal["apart", "first", "last"]
    pixels: int = 0
    image_rows: int = 0

    @property
    def joint(self) -> bool:
        return self.text != "apart"

    def kind(self, attended: Attended) -> Kind | None:
        """None for attention of the text to itself."""
        queries, keys = attended.q.shape[2], attended.k.shape[2]
        if not self.joint:
            return "self" if queries == keys else "cross"
        if queries != keys or keys < self.image_rows:
            return None
        return "self" if keys == self.image_rows else "joint"

    def image(self, rows: int) -> slice:
        """The pixels among ``rows`` queries or keys."""
        first = rows - self.image_rows if self.text == "first" else 0
        return slice(first, first + self.pixels)

    def first_word(self) -> int:
        """The key row of the text's first token."""
        return self.image_rows if self.text == "last" else 0


@dataclass(frozen=True)
class Site:
    """One attention layer: ``name`` of its module, ``side`` of the square of its pixels."""

    name: str
    kind: Kind
    heads: int
    side: int


def find_sites(
    network: torch.nn.Module,
    layout: Layout,
    forward: Callable[[], Any],
    ignored: Sequence[str] = (),
) -> list[Site]:
    """The sites of ``network`` in the order in which ``forward()`` calls them. Modules whose names
    begin with one of ``ignored`` are left out, whether they are seen or not.

    ValueError if nothing is seen, if a module attends without being seen, or if an image is not
    square.
    """
    found: dict[str, Site] = {}

    def see(name: str, attended: Attended) -> None:
        seen.add(name)
        kind = None if any(begins(name, i) for i in ignored) else layout.kind(attended)
        if kind is None:
            return
        pixels = layout.pixels if layout.joint else attended.q.shape[2]
        side = math.isqrt(pixels)
        if side * side != pixels:
            raise ValueError(
                f"{name} attends to {pixels} pixels, which do not form a square; only square "
                "images can be read: give one diffusion.size"
            )
        found.setdefault(name, Site(name, kind, attended.q.shape[1], side))

    seen: set[str] = set()
    with torch.no_grad(), Observer(network, see) as observer:
        forward()
    # a module that contains a seen one does not attend itself
    around = {name for name in observer.ran if any(begins(other, name) for other in seen)}
    unread = {name for name in observer.ran if any(begins(name, i) for i in ignored)}
    unseen = sorted(observer.ran - around - unread)
    if not found or unseen:
        missed = ", ".join(unseen[:4]) or "none ran"
        raise ValueError(
            f"attention of {type(network).__name__} was not seen ({missed}): {_backend(network)}. "
            "It is read at torch's F.scaled_dot_product_attention: unset DIFFUSERS_ATTN_BACKEND, "
            'choose the backend "native", and turn off xformers, flash and sage attention'
        )
    return list(found.values())


def _backend(network: torch.nn.Module) -> str:
    """What computes a network's attention, according to its processors."""
    processors = {getattr(m, "processor", None) for m in network.modules()} - {None}
    named = {getattr(p, "_attention_backend", None) for p in processors} - {None}
    kinds = sorted({type(p).__name__ for p in processors})
    backend = ", ".join(sorted(str(getattr(b, "value", b)) for b in named)) or "the default"
    return f"its attention backend is {backend}, its processors {', '.join(kinds) or 'unknown'}"


def begins(layer: str, name: str) -> bool:
    """Whether the name of a layer begins with whole parts of ``name``."""
    return f"{layer}.".startswith(f"{name}.")


def choose_side(kind: str, wanted: int | None, sides: Collection[int], latent: int) -> int:
    """The side at which ``kind`` attention is read: ``wanted`` or, for None, the side nearest (by
    ratio) to the paper's share of the latent, a quarter for cross- and a half for self-attention.
    Of two equally near sides, the finer one.

    ValueError lists the available sides.
    """
    if wanted is not None and wanted in sides:
        return wanted
    if wanted is not None or not sides:
        raise ValueError(
            f"diffusion.{kind}_resolution={wanted}: this model has no {kind}-attention there; it "
            f"has {sorted(sides)} for latents of {latent}x{latent}. null takes the one nearest to "
            f"1/{PARTS[kind]} of the latent"
        )
    return min(sides, key=lambda side: (abs(math.log2(side * PARTS[kind] / latent)), -side))


def choose_sites(
    kind: str, sites: Sequence[Site], side: int, layers: Sequence[str] | None
) -> list[Site]:
    """The sites of one side and ``kind`` ("cross" or "self"; joint attention is both) whose names
    begin with one of ``layers`` (None = all). ValueError for a name that matches no site."""
    here = [s for s in sites if s.kind in (kind, "joint") and s.side == side]
    unused = [w for w in layers or [] if not any(begins(s.name, w) for s in here)]
    if unused or layers == []:
        names = "\n  ".join(s.name for s in here)
        raise ValueError(
            f"diffusion.{kind}_layers={list(layers or [])}: no {kind}-attention layer at {side} "
            f"has a name that begins with this: {', '.join(unused) or 'nothing named'}. Layers:\n  "
            f"{names}"
        )
    return [s for s in here if layers is None or any(begins(s.name, w) for w in layers)]


def check_layout(
    network: torch.nn.Module,
    layout: Layout,
    site: str,
    forward: Callable[[int | None], Any],
    word: int,
    refined: bool = False,
) -> None:
    """ValueError unless a change of one text row (``forward(word)`` against ``forward(None)``)
    changes the keys that ``site`` sees most in the row of that word, and nowhere else.

    In a network whose refiners mix the words, no key belongs to one word alone. For a family that
    declares this (``refined``), other rows may change too, but less.
    """
    plain, changed = (_keys(network, site, partial(forward, row)) for row in (None, word))
    if plain.shape != changed.shape:
        raise ValueError(f"{type(network).__name__}: equal texts gave {site} different keys")
    change = (plain - changed).abs().amax((0, 1, 3))
    rows, expected = change.gt(0).nonzero().flatten().tolist(), layout.first_word() + word
    if not rows or int(change.argmax()) != expected:
        raise ValueError(
            f"{type(network).__name__}: word {word} of the text should be in key row {expected} "
            f"of {site}, but its change was seen in {rows[:4] or 'none'}: this version of "
            "diffusers orders its keys in another way than this package expects"
        )
    if len(rows) > 1 and not refined:
        raise ValueError(
            f"{type(network).__name__}: word {word} of the text changes {len(rows)} key rows of "
            f"{site}. Its text passes through layers that mix the words: no key belongs to one "
            "word, so its attention cannot be read"
        )


class _SeenError(Exception):
    """Ends a forward pass once its first site was seen."""


def _keys(network: torch.nn.Module, site: str, forward: Callable[[], Any]) -> torch.Tensor:
    kept: list[torch.Tensor] = []

    def see(_: str, attended: Attended) -> None:
        kept.append(attended.k.float())
        raise _SeenError

    with torch.no_grad(), Observer(network, see, {site}), suppress(_SeenError):
        forward()
    return kept[0]
