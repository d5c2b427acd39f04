"""The attention of a generator, recorded while it draws or in one forward: running means over
heads, sites and steps. Shape letters as in :mod:`dd.attention.maths`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch

from dd.attention import maths as attention
from dd.attention.observer import Attended, Observer
from dd.attention.sites import Layout, Site

# Bytes of queries and keys that are held until they are read at once: starting a kernel for each
# layer takes longer than its work where batches are small. They are views of what their layers
# projected, two to three times as much (the unconditional half, fused values). Elsewhere each layer
# is read by itself.
TOGETHER = {"cuda": 2**27}
CLASS_PROMPT = "class_prompt"
Spans: TypeAlias = Mapping[str, list[list[int]]]  # token positions of each class by source
# From the arguments of the network to the conditional half of their batch; None: it has none.
Half: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], slice | None]


@dataclass(frozen=True)
class Reading:
    """Which attention is read: that of ``cross`` sites to the words, that of ``self`` sites among
    the pixels (a joint site may be both). ``cross_heads``: numbers of the heads of the former,
    None = all; ``every``: only each n-th call of the network is read, from the first on; ``pool``:
    the image-image attention is averaged over patches of ``pool`` x ``pool`` pixels.
    ``as_operator``: it is kept as the queries and keys of what was read and applied to maps, for
    one forward; else as the mean matrix."""

    layout: Layout
    cross: Sequence[Site]
    self: Sequence[Site]
    cross_heads: Sequence[int] | None = None
    every: int = 1
    pool: int = 1
    as_operator: bool = False

    def __post_init__(self) -> None:
        heads, chosen = min((s.heads for s in self.cross), default=0), self.cross_heads
        if chosen is not None and (not chosen or not set(chosen) <= set(range(heads))):
            raise ValueError(
                f"diffusion.cross_heads={list(chosen)}: a layer that is read has the heads 0 to "
                f"{heads - 1}"
            )

    @property
    def side(self) -> int:
        """That of the heat."""
        return self.self[0].side // self.pool


@dataclass(frozen=True)
class Words:
    """What is read of each sample: ``spans`` [B]. Where the text stands apart, ``class_states``
    [B, T, C], what the layers are given of the class prompts, and their ``class_mask`` [B, T] (or
    None) make the keys of the source ``class_prompt``."""

    spans: Sequence[Spans]
    class_states: torch.Tensor | None = None
    class_mask: torch.Tensor | None = None

    @property
    def sources(self) -> list[str]:
        return list(self.spans[0])

    def columns(self, layout: Layout, rows: int) -> torch.Tensor:
        """The classes of all sources among ``rows`` keys of joint attention: [B, rows, K]."""
        every = [[at for source in each.values() for at in source] for each in self.spans]
        return attention.indicators(every, rows, layout.first_word())


class AttentionRecorder:
    """Records, while active, what ``reading`` says of the attention of ``network`` to ``words``.

    Only the conditional half of a guided batch is read: the last of it, or what ``half`` says.
    Then :meth:`maps` and :meth:`heat` give what was seen of a sample.
    """

    def __init__(
        self, network: torch.nn.Module, reading: Reading, words: Words, half: Half | None = None
    ) -> None:
        self.network, self.reading, self.words, self.calls = network, reading, words, 0
        last = slice(-len(words.spans), None)
        self._half: Half = half or (lambda *_: last)
        self._rows: slice | None = None
        self._cross, self._self = ({s.name for s in each} for each in (reading.cross, reading.self))
        self._modules: dict[str, Any] = dict(network.named_modules())
        self._class_keys: dict[str, torch.Tensor] = {}
        self._columns: torch.Tensor | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._held: dict[str, list[Attended]] = {}
        self._seen: set[str] = set()
        self._operator: list[Attended] = []
        self._handles: list[Any] = []
        self._observer = Observer(network, self._see, self._cross | self._self)

    def __enter__(self) -> Self:
        self._observer.__enter__()  # which leaves no hook behind if it fails
        self._handles = [
            self.network.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.network.register_forward_hook(self._called),
        ]
        return self

    def __exit__(self, *given: object) -> None:
        self._observer.__exit__(*given)
        for handle in self._handles:
            handle.remove()
        self._held.clear()
        self._class_keys.clear()

    def _begin(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._rows = self._half(args, kwargs)

    def _called(self, *_: object) -> None:
        for source in list(self._held):
            self._sum_up(source)
        self.calls += self._rows is not None

    @torch.no_grad()
    def _see(self, name: str, seen: Attended) -> None:
        if self._rows is None or self.calls % self.reading.every:
            return
        self._seen.add(name)
        mask = seen.mask[self._rows] if seen.mask is not None and len(seen.mask) > 1 else seen.mask
        a = Attended(seen.q[self._rows], seen.k[self._rows], seen.scale, mask)
        layout = self.reading.layout
        q, k = (x[:, :, layout.image(x.shape[2])] if layout.joint else x for x in (a.q, a.k))
        both = layout.joint and name in self._self & self._cross
        if both and not self.reading.as_operator and self._at_once(q):
            self._add_both(q, a)
            return
        if name in self._self:
            image = Attended(q, k, a.scale)
            if self.reading.as_operator:
                self._operator.append(image)
            else:
                self._hold("self", image)
        if name in self._cross and layout.joint:
            self._add_words(self._heads(Attended(q, a.k, a.scale, mask)))
        elif name in self._cross:
            self._add_cross(name, a)

    def _add_cross(self, name: str, a: Attended) -> None:
        """Attention to text that stands apart."""
        if CLASS_PROMPT in self.words.sources:
            masked, keys = self.words.class_mask, self._keys_of_classes(name, a.q.dtype)
            masked = None if masked is None else masked[:, None, None].bool()
            self._hold(CLASS_PROMPT, self._heads(Attended(a.q, keys, a.scale, masked)))
        if any(source != CLASS_PROMPT for source in self.words.sources):
            self._hold("full_prompt", self._heads(a))

    def _at_once(self, q_BHND: torch.Tensor) -> bool:
        """Whether both readings of a joint site share their exponentials: not on a GPU, whose
        fused kernels hold none."""
        return q_BHND.device.type not in attention.FUSED_ON and self.reading.cross_heads is None

    def _add_both(self, q_BHND: torch.Tensor, a: Attended) -> None:
        """Joint attention of the pixels, among them and to the words of each class."""
        rows = a.k.shape[2]
        image, columns = self.reading.layout.image(rows), self._columns_of(rows, a.k)
        own, words = attention.joint_means(q_BHND, a.k, image, columns, a.scale, a.mask)
        self._add("self", attention.pool(own, self.reading.pool), 1)
        self._add("words", words, 1)

    def _columns_of(self, rows: int, k: torch.Tensor) -> torch.Tensor:
        if self._columns is None or self._columns.shape[1] != rows:
            self._columns = self.words.columns(self.reading.layout, rows).to(k.device)
        return self._columns

    def _add_words(self, a: Attended) -> None:
        """Joint attention of the pixels to the words of each class."""
        columns = self._columns_of(a.k.shape[2], a.k)
        self._add("words", attention.mean_columns(a.q, a.k, columns, a.scale, a.mask), 1)

    def _heads(self, a: Attended) -> Attended:
        """Of a cross site, the heads that are read."""
        chosen = self.reading.cross_heads
        if chosen is None:
            return a
        q, k = (x[:, [*chosen]] for x in (a.q, a.k))
        mask = a.mask
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:  # one for each head
            mask = mask[:, [*chosen]]
        return Attended(q, k, a.scale, mask)

    def _keys_of_classes(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The keys [B, H, T, D] that a layer makes of the class prompts."""
        if name not in self._class_keys:
            layer, states = self._modules[name], self.words.class_states
            if states is None:
                raise ValueError("words that stand apart are read by the states of class prompts")
            keys, norm = layer.to_k(states.to(dtype)), getattr(layer, "norm_k", None)
            keys = attention.split_heads(keys, layer.heads)
            self._class_keys[name] = keys if norm is None else norm(keys)
        return self._class_keys[name]

    def _hold(self, source: str, a: Attended) -> None:
        held = self._held.setdefault(source, [])
        if held and (held[0].q.shape, held[0].k.shape) != (a.q.shape, a.k.shape):
            self._sum_up(source)
            held = self._held.setdefault(source, [])
        held.append(a)
        if len(held) * (a.q.nbytes + a.k.nbytes) >= TOGETHER.get(a.q.device.type, 0):
            self._sum_up(source)

    @torch.no_grad()
    def _sum_up(self, source: str) -> None:
        """Add the attention of the layers that are held, as if they were one layer with the
        heads of all."""
        held = self._held.pop(source)
        first, layers = held[0], len(held)
        queries, keys = first.q, first.k
        if layers > 1:
            queries, keys = (torch.cat(x, 1) for x in zip(*((a.q, a.k) for a in held), strict=True))
        before = self._sums.get(source)
        if source == "self" and self.reading.pool > 1:
            whole = attention.mean_attention(queries, keys, first.scale, None, layers)
            self._add(source, attention.pool(whole, self.reading.pool), layers)
            return
        mask = first.mask  # equal in each layer
        self._sums[source] = attention.mean_attention(
            queries, keys, first.scale, before, layers, mask
        )
        self._counts[source] = self._counts.get(source, 0) + layers

    def _add(self, source: str, tensor: torch.Tensor, layers: int) -> None:
        before = self._sums.get(source)
        self._sums[source] = tensor if before is None else before.add_(tensor)
        self._counts[source] = self._counts.get(source, 0) + layers

    def check(self) -> None:
        """ValueError if a site that is to be read was not seen."""
        missed = sorted((self._cross | self._self) - self._seen)
        if missed or not self._seen:
            raise ValueError(
                f"no attention was captured of {type(self.network).__name__}: its attention went "
                "past torch's F.scaled_dot_product_attention since the start (a compiled graph, "
                f"another attention backend) in {', '.join(missed[:4]) or 'all it has'}"
            )

    @property
    def cross(self) -> dict[str, torch.Tensor]:
        """Mean attention [B, N, T] to text that stands apart, by the text."""
        return {k: v / self._counts[k] for k, v in self._sums.items() if k not in ("self", "words")}

    @property
    def self_attention(self) -> torch.Tensor:
        """Mean attention among the pixels [B, M, M]."""
        return self._sums["self"] / self._counts["self"]

    def maps(self, i: int) -> dict[str, torch.Tensor]:
        """Mean attention of the pixels to each class of sample ``i`` by source: [K, N]."""
        spans = self.words.spans[i]
        if self.reading.layout.joint:
            sizes = [len(at) for at in spans.values()]
            maps_KN = (self._sums["words"][i, :, : sum(sizes)] / self._counts["words"]).T
            return dict(zip(spans, maps_KN.split(sizes), strict=True))
        texts = {s: CLASS_PROMPT if s == CLASS_PROMPT else "full_prompt" for s in spans}
        return {
            s: attention.class_maps(self._sums[text][i] / self._counts[text], spans[s])
            for s, text in texts.items()
        }

    def spread(self, i: int) -> torch.Tensor | attention.Spread:
        """The mean image-image attention of sample ``i``, as a matrix [M, M] or as what it does to
        maps [K, M]."""
        if not self.reading.as_operator:
            return self._sums["self"][i] / self._counts["self"]
        sites, pool = self._operator, self.reading.pool

        def applied(maps_KN: torch.Tensor) -> torch.Tensor:
            columns = attention.enlarge(maps_KN, pool).T[None]
            each = (
                attention.mean_columns(a.q[i : i + 1], a.k[i : i + 1], columns, a.scale)
                for a in sites
            )
            return attention.shrink(sum(each)[0].T / len(sites), pool)

        return applied

    def heat(self, i: int, max_power: int) -> dict[str, torch.Tensor]:
        """Refined heat of sample ``i`` by source: float64 [K, P, r, r]."""
        spread, side = self.spread(i), self.reading.side
        return {
            source: attention.refine(maps_KN, spread, side, max_power)
            for source, maps_KN in self.maps(i).items()
        }
