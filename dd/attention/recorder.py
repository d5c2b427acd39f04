"""Records the attention of a generator, while it draws or in one forward pass: running means over
heads, sites and steps. Shape letters as in :mod:`dd.attention.maths`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch

from dd.attention import maths as attention
from dd.attention import weights
from dd.attention.observer import Attended, Observer
from dd.attention.sites import Layout, Site

# Bytes of queries and keys to hold before they are read together: for small batches, starting a
# kernel for each layer takes longer than its work. The held tensors are views of the layers'
# projections, which are two to three times as large (unconditional half, fused values). On other
# devices each layer is read by itself.
TOGETHER = {"cuda": 2**27}
CLASS_PROMPT = "class_prompt"
BACKGROUND = "background"  # background words, which follow those of the classes
BY_CLASS = (CLASS_PROMPT, BACKGROUND)  # read at the keys of the class prompt
Spans: TypeAlias = Mapping[str, list[list[int]]]  # token positions of each class by source
# Maps the network's arguments to the conditional half of their batch; None: there is none.
Half: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], slice | None]


@dataclass(frozen=True)
class Reading:
    """Which attention is read: of ``cross`` sites to the words, of ``self`` sites among the pixels
    (a joint site may be both).

    ``cross_heads``: numbers of the cross sites' heads to read, None = all; ``every``: record every
    ``every``-th call of the network, starting with the first; ``pool``: average the image-image
    attention over patches of ``pool`` x ``pool`` pixels. ``as_operator``: keep the image-image
    attention as queries and keys and apply it to maps (for one forward pass); else keep the mean
    matrix. ``head_weights``: weigh the heads of a cross site at each pixel by their share in its
    output; ``reference``: weigh the cross sites of a call by their agreement with this site
    (:mod:`dd.attention.weights`); without these, plain means. ``apart``: sides of ``cross`` sites
    whose maps are also stored separately, under ``<source>@<side>``; the source itself has the side
    of the first site."""

    layout: Layout
    cross: Sequence[Site]
    self: Sequence[Site]
    cross_heads: Sequence[int] | None = None
    every: int = 1
    pool: int = 1
    as_operator: bool = False
    head_weights: bool = False
    reference: Site | None = None
    apart: Sequence[int] = ()

    def __post_init__(self) -> None:
        heads, chosen = min((s.heads for s in self.cross), default=0), self.cross_heads
        if chosen is not None and (not chosen or not set(chosen) <= set(range(heads))):
            raise ValueError(
                f"diffusion.cross_heads={list(chosen)}: the layers that are read have heads 0 to "
                f"{heads - 1}"
            )

    @property
    def weighed(self) -> bool:
        """Whether the attention to words is more than a plain mean."""
        return self.head_weights or self.reference is not None

    @property
    def cross_side(self) -> int:
        """Side of the attention to words."""
        return self.cross[0].side

    @property
    def side(self) -> int:
        """Side of the heat: that of the attention among pixels, or to words if the former has no
        matrix."""
        return self.self[0].side // self.pool if self.self else self.cross_side


@dataclass(frozen=True)
class Words:
    """What is read for each sample: ``spans`` [B]. In models whose text has its own cross-attention
    layers, ``class_states`` [B, T, C] (what the layers get for the class prompts) and their
    ``class_mask`` [B, T] (or None) give the keys of the source ``class_prompt``."""

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
    """While active, records the attention of ``network`` to ``words`` as ``reading`` says.

    Only the conditional half of a guided batch is read: the last half, or what ``half`` says.
    Afterwards :meth:`maps` and :meth:`heat` return what was seen of a sample.
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
        self._counts: dict[str, Any] = {}  # divisor of each sum: one number, or one for each sample
        self._held: dict[str, list[Attended]] = {}
        self._seen: set[str] = set()
        self._operator: list[Attended] = []
        # (attention, output) of one call's layers, held until the layers' weights are known
        self._waiting: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
        self._features: torch.Tensor | None = None
        self._handles: list[Any] = []
        reference = reading.reference
        self._all = self._cross | self._self | ({reference.name} if reference else set())
        self._observer = Observer(network, self._see, self._all)

    def __enter__(self) -> Self:
        self._observer.__enter__()  # leaves no hook behind if it fails
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
        self._weigh_layers()
        self.calls += self._rows is not None

    @torch.no_grad()
    def _see(self, name: str, seen: Attended) -> None:
        if self._rows is None or self.calls % self.reading.every:
            return
        self._seen.add(name)
        mask = seen.mask[self._rows] if seen.mask is not None and len(seen.mask) > 1 else seen.mask
        out = None if seen.out is None else seen.out[self._rows]
        a = Attended(seen.q[self._rows], seen.k[self._rows], seen.scale, mask, out)
        layout, reading = self.reading.layout, self.reading
        q, k = (x[:, :, layout.image(x.shape[2])] if layout.joint else x for x in (a.q, a.k))
        if reading.reference is not None and name == reading.reference.name:
            self._features = q.transpose(1, 2).flatten(2)
        both = layout.joint and name in self._self & self._cross and not reading.weighed
        if both and not reading.as_operator and self._at_once(q):
            self._add_both(q, a)
            return
        if name in self._self:
            image = Attended(q, k, a.scale)
            if reading.as_operator:
                self._operator.append(image)
            else:
                self._hold("self", image)
        if name not in self._cross:
            return
        words = Attended(q, a.k, a.scale, mask, out)
        if reading.weighed:
            self._add_weighed(name, words)
        elif layout.joint:
            self._add_words(self._heads(words))
        else:
            side = math.isqrt(q.shape[2])
            for source, text in self._texts(name, words).items():
                self._hold(self._kept_as(source, side), self._heads(text))

    def _kept_as(self, source: str, side: int) -> str:
        return source if side == self.reading.cross_side else f"{source}@{side}"

    def _texts(self, name: str, a: Attended) -> dict[str, Attended]:
        """Attention to text in cross-attention layers, by text: that of the class prompts, computed
        from their own keys, and the observed one."""
        found = {}
        if CLASS_PROMPT in self.words.sources:
            masked, keys = self.words.class_mask, self._keys_of_classes(name, a.q.dtype)
            masked = None if masked is None else masked[:, None, None].bool()
            found[CLASS_PROMPT] = Attended(a.q, keys, a.scale, masked)
        if any(source not in BY_CLASS for source in self.words.sources):
            found["full_prompt"] = a
        return found

    def _add_weighed(self, name: str, a: Attended) -> None:
        """Add attention to words with the weights of the reading. Weights of layers are known only
        at the end of the call."""
        projection, layout = projection_of(name, self._modules[name]), self.reading.layout
        if a.out is None:
            raise ValueError(f"{name}: weights need the output of the attention")
        out = a.out[:, :, layout.image(a.out.shape[2])] if layout.joint else a.out
        shares = weights.head_weights(out, projection) if self.reading.head_weights else None
        if layout.joint:
            columns = self._columns_of(a.k.shape[2], a.k)
            thin = attention.mean_columns(a.q, a.k, columns, a.scale, a.mask, shares)
            found = {"words": thin}
        else:
            found = {
                source: attention.mean_attention_by_heads(t.q, t.k, t.scale, t.mask, shares)
                for source, t in self._texts(name, a).items()
            }
        if self.reading.reference is not None:
            self._waiting.append((found, weights.output_of(out, projection)))
            return
        for source, mean in found.items():
            self._add(source, mean, 1)

    def _weigh_layers(self) -> None:
        """Add the layers of a call with their weights; with equal weights for a sample none of
        whose layers agrees with the reference."""
        if not self._waiting:
            return
        if self._features is None:
            raise ValueError("diffusion.layer_weights: a call did not run the reference layer")
        alike = weights.reference(self._features, self.reading.cross_side)
        agree = torch.stack([weights.layer_weight(output, alike) for _, output in self._waiting])
        agree_LB = torch.where(agree.sum(0) > 0, agree, 1.0)
        for (found, _), agree_B in zip(self._waiting, agree_LB, strict=True):
            for source, mean in found.items():
                self._add(source, mean * agree_B[:, None, None], agree_B)
        self._waiting.clear()
        self._features = None

    def _at_once(self, q_BHND: torch.Tensor) -> bool:
        """Whether both readings of a joint site share their exponentials. Not on a GPU, whose fused
        kernels never hold them."""
        return q_BHND.device.type not in attention.FUSED_ON and self.reading.cross_heads is None

    def _add_both(self, q_BHND: torch.Tensor, a: Attended) -> None:
        """Add joint attention of the pixels: among them, and to the words of each class."""
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
        """Add joint attention of the pixels to the words of each class."""
        columns = self._columns_of(a.k.shape[2], a.k)
        self._add("words", attention.mean_columns(a.q, a.k, columns, a.scale, a.mask), 1)

    def _heads(self, a: Attended) -> Attended:
        """The heads of a cross site that are read."""
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
                raise ValueError("text in cross-attention layers needs class_states to be read")
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
        """Add the attention of the held layers, as if they were one layer with the heads of
        all."""
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

    def _add(self, source: str, tensor: torch.Tensor, weight: int | torch.Tensor) -> None:
        before = self._sums.get(source)
        self._sums[source] = tensor if before is None else before.add_(tensor)
        self._counts[source] = self._counts.get(source, 0) + weight

    def check(self) -> None:
        """ValueError if a site that should be read was not seen."""
        missed = sorted(self._all - self._seen)
        if missed or not self._seen:
            raise ValueError(
                f"no attention was captured of {type(self.network).__name__}: after the start its "
                "attention bypassed torch's F.scaled_dot_product_attention (a compiled graph, "
                f"another attention backend) in {', '.join(missed[:4]) or 'all its layers'}"
            )

    def mean(self, source: str, i: int) -> torch.Tensor:
        """Mean attention of sample ``i``: among the pixels ("self") [M, M]; in joint attention to
        the classes ("words") [N, K]; in cross-attention to a text ("class_prompt", "full_prompt")
        [N, T]."""
        count = self._counts[source]
        return self._sums[source][i] / (count[i] if isinstance(count, torch.Tensor) else count)

    def maps(self, i: int) -> dict[str, torch.Tensor]:
        """Mean attention of the pixels to each class of sample ``i`` by source: [K, N]."""
        spans = self.words.spans[i]
        if self.reading.layout.joint:
            sizes = [len(at) for at in spans.values()]
            maps_KN = self.mean("words", i)[:, : sum(sizes)].T
            return dict(zip(spans, maps_KN.split(sizes), strict=True))
        texts = {s: CLASS_PROMPT if s in BY_CLASS else "full_prompt" for s in spans}
        found = {s: attention.class_maps(self.mean(text, i), spans[s]) for s, text in texts.items()}
        for side in self.reading.apart:
            for source, text in texts.items():
                mean = self.mean(self._kept_as(text, side), i)
                found[f"{source}@{side}"] = attention.class_maps(mean, spans[source])
        return found

    def spread(self, i: int) -> torch.Tensor | attention.Spread:
        """The mean image-image attention of sample ``i``, as a matrix [M, M] or as a function of
        maps [K, M]."""
        if not self.reading.self:
            return lambda maps_KN: maps_KN  # linear attention: power 0 alone is kept
        if not self.reading.as_operator:
            return self.mean("self", i)
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


def projection_of(name: str, layer: torch.nn.Module) -> torch.Tensor:
    """The matrix [C, H*D] by which an attention layer adds its heads to the pixels. ValueError if
    it has none of its own, like the single blocks of FLUX, where GoCA takes the plain mean."""
    projection = getattr(layer, "to_out", None)
    if not isinstance(projection, torch.nn.ModuleList) or not len(projection):
        raise ValueError(
            f"diffusion.head_weights and diffusion.layer_weights: {name} projects its heads "
            "together with another part, so their shares are not known; choose other "
            "cross_layers, or set neither"
        )
    return projection[0].weight
