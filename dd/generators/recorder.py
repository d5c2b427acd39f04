"""The attention of a UNet, observed with hooks on its layers' projections: no processor is
replaced and nothing is projected twice, so the image with capture is bit-identical to the image
without. Which resolutions a UNet has, and which are read."""

import math

import torch
from diffusers.models.attention_processor import Attention

from dd.attention import maths as attention

# Bytes of queries and keys that are held until they are read at once: starting a kernel for each
# layer takes longer than its work where batches are small. They are views of what their layers
# projected, two to three times as much (the unconditional half, fused values). Elsewhere each layer
# is read by itself.
TOGETHER = {"cuda": 2**27}
PARTS = {
    "self": 2,
    "cross": 4,
}  # of the latent's side: 32 and 16 of Stable Diffusion's 64, as in the paper


def attention_sides(unet, latent: int) -> dict[str, list[int]]:
    """Sides of the maps of a UNet's ``self`` and ``cross`` attention for square latents of side
    ``latent``.

    From where its layers stand: level i of the UNet works at the latent halved i times, rounded up.
    """
    sides = [latent]
    for _ in unet.config.down_block_types[1:]:
        sides.append((sides[-1] + 1) // 2)
    found = {"self": set(), "cross": set()}
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith((".attn1", ".attn2")):
            block, place = name.split(".")[:2]
            level = {
                "down_blocks": lambda i: i,
                "up_blocks": lambda i: -1 - i,
                "mid_block": lambda _: -1,
            }[block]
            found["cross" if module.is_cross_attention else "self"].add(
                sides[level(int(place) if place.isdigit() else 0)]
            )
    return {kind: sorted(each) for kind, each in found.items()}


def choose_side(kind: str, wanted: int | None, sides: list[int], latent: int) -> int:
    """The side at which ``kind`` attention is read: ``wanted``, or for None the one nearest (in
    ratio) to the paper's share of the latent, a quarter for cross- and a half for self-attention;
    of two equally near the finer one.

    ValueError names the sides that there are.
    """
    if wanted in sides:
        return wanted
    if wanted is not None or not sides:
        raise ValueError(
            f"diffusion.{kind}_resolution={wanted}: this model has no {kind}-attention there; it "
            f"has {sides} for latents of "
            f"{latent}x{latent}. null takes the one nearest to 1/{PARTS[kind]} of the latent"
        )
    return min(sides, key=lambda side: (abs(math.log2(side * PARTS[kind] / latent)), -side))


class AttentionRecorder:
    """Records, while active, the mean attention of a UNet over heads, layers and steps, per sample.

    ``cross[source]`` [B, N, T] at ``cross_resolution`` for the sources ``class_prompt`` (keys from
    ``class_states`` [B, T, C], the text encoder's states of the class prompts; queries from the
    image being made) and, if ``full_prompt``, ``full_prompt`` (the prompt the image is made from);
    ``self_attention`` [B, M, M] at ``self_resolution``. Only the conditional half of a guided batch
    is read. ``cross_layers``: the cross-attention layers that are read, by the beginning of their
    names (``up_blocks.1``), and ``cross_heads`` their heads by number; None = all. ``every``: only
    each so-manieth call of the UNet is read, from the first on.
    """

    def __init__(
        self,
        unet,
        class_states,
        cross_resolution: int,
        self_resolution: int,
        full_prompt: bool = False,
        cross_layers: list[str] | None = None,
        cross_heads: list[int] | None = None,
        every: int = 1,
    ):
        self.unet, self.class_states, self.full_prompt = unet, class_states, full_prompt
        self.cross_resolution, self.self_resolution = cross_resolution, self_resolution
        self.cross_layers, self.cross_heads = cross_layers, cross_heads
        self.every, self.calls, self.seen = every, 0, {}
        self._sums, self._counts, self._class_keys, self._queries, self._held = {}, {}, {}, {}, {}
        self._handles, self._read = {}, set()

    def __enter__(self):
        try:
            self._handles[None] = [self.unet.register_forward_hook(self._called)]
            for name, module in self.unet.named_modules():
                if isinstance(module, Attention) and name.endswith((".attn1", ".attn2")):
                    handles = self._handles[name] = []
                    for projection, observe in self._observers(name, module):
                        handles.append(projection.register_forward_hook(observe))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in list(self._handles):
            self._remove(name)
        for kept in (self._queries, self._held, self._class_keys):
            kept.clear()

    def _remove(self, name):
        for handle in self._handles.pop(name):
            handle.remove()

    def _called(self, *_):
        for source in list(self._held):
            self._sum_up(source)
        self._queries.clear()
        if not self.calls:  # layers at other resolutions need not be observed any longer
            for name in self._handles.keys() - self._read - {None}:
                self._remove(name)
        self.calls += 1

    def _observers(self, name, module):
        """(projection, forward hook) of what a layer projects: queries, then keys, or several at
        once where they are fused."""
        if module.is_cross_attention:
            yield module.to_q, lambda _, __, queries: self._cross(name, module, queries)
            if self.full_prompt and module.fused_projections:
                yield (
                    module.to_kv,
                    lambda _, __, both: self._keys(
                        "full_prompt", name, module, both.chunk(2, -1)[0]
                    ),
                )
            elif self.full_prompt:
                yield module.to_k, lambda _, __, keys: self._keys("full_prompt", name, module, keys)
        elif module.fused_projections:
            yield (
                module.to_qkv,
                lambda _, __, three: self._self(name, module, *three.chunk(3, -1)[:2]),
            )
        else:
            yield module.to_q, lambda _, __, queries: self._self(name, module, queries)
            yield module.to_k, lambda _, __, keys: self._keys("self", name, module, keys)

    def _reads(self, name, queries, resolution) -> bool:
        """Whether a layer is read this time; which layers there are is noted anyway."""
        self.seen[name] = queries.shape[1]
        if self.calls % self.every or queries.shape[1] != resolution**2:
            return False
        self._read.add(name)
        return True

    def _self(self, name, module, queries, keys=None):
        if self._reads(name, queries, self.self_resolution):
            self._queries[name] = self._conditional(queries)
            if keys is not None:
                self._keys("self", name, module, keys)

    @torch.no_grad()
    def _cross(self, name, module, queries):
        if self._reads(name, queries, self.cross_resolution) and self._chosen(name):
            queries = self._conditional(queries)
            if name not in self._class_keys:
                self._class_keys[name] = module.to_k(self.class_states.to(queries.dtype))
            self._add("class_prompt", module, queries, self._class_keys[name])
            if self.full_prompt:
                self._queries[name] = queries

    def _keys(self, source, name, module, keys):
        """The keys that follow the queries of a layer that is read; those of the class prompt
        follow none."""
        if (queries := self._queries.pop(name, None)) is not None:
            self._add(source, module, queries, self._conditional(keys))

    def _chosen(self, name):
        return self.cross_layers is None or any(
            f"{name}.".startswith(f"{layer}.") for layer in self.cross_layers
        )

    def _conditional(self, tensor):
        return tensor[-len(self.class_states) :]

    @torch.no_grad()
    def _add(self, source, module, queries, keys):
        kind = module.heads, module.scale, queries.shape, keys.shape
        if source in self._held and self._held[source][0] != kind:
            self._sum_up(source)
        _, held = self._held.setdefault(source, (kind, []))
        held.append((queries, keys))
        if len(held) * (queries.nbytes + keys.nbytes) >= TOGETHER.get(queries.device.type, 0):
            self._sum_up(source)

    @torch.no_grad()
    def _sum_up(self, source):
        """Add the attention of the layers that are held, as if they were one layer with the
        heads of all."""
        (heads, scale, *_), held = self._held.pop(source)
        layers, chosen = len(held), None if source == "self" else self.cross_heads
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

    def check(self):
        """ValueError naming the layers and resolutions that exist if a wanted one was not seen."""
        if not self.seen:
            raise ValueError(
                f"no attention was captured: {type(self.unet).__name__} ran no attention layer"
            )
        here = [
            n
            for n, pixels in self.seen.items()
            if n.endswith("attn2") and pixels == self.cross_resolution**2
        ]
        unused = [
            layer
            for layer in self.cross_layers or []
            if not any(f"{n}.".startswith(f"{layer}.") for n in here)
        ]
        if here and (unused or self.cross_layers == []):
            raise ValueError(
                f"diffusion.cross_layers={self.cross_layers}: no cross-attention layer at "
                f"{self.cross_resolution} has a name "
                f"that begins so ({', '.join(unused) or 'nothing named'}). Layers:\n  "
                + "\n  ".join(here)
            )
        for kind, part, wanted in (
            ("self", "attn1", self.self_resolution),
            ("class_prompt", "attn2", self.cross_resolution),
        ):
            if kind not in self._sums:
                there = sorted(
                    {round(n**0.5) for layer, n in self.seen.items() if layer.endswith(part)}
                )
                layers = "\n  ".join(
                    f"{layer} at {round(n**0.5)}" for layer, n in self.seen.items()
                )
                name = "self" if kind == "self" else "cross"
                raise ValueError(
                    f"diffusion.{name}_resolution={wanted}: this model has no {name}-attention "
                    f"there; it has {there}. "
                    f"Layers:\n  {layers}"
                )

    @property
    def cross(self) -> dict[str, torch.Tensor]:
        return {k: v / self._counts[k] for k, v in self._sums.items() if k != "self"}

    @property
    def self_attention(self) -> torch.Tensor:
        return self._sums["self"] / self._counts["self"]
