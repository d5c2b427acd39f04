"""The attention of a UNet, observed with forward pre-hooks: no processor is replaced, so the image with capture is
bit-identical to the image without. Which resolutions a UNet has, and which of them are read."""

import math

import torch
from diffusers.models.attention_processor import Attention

from dd import attention

PARTS = {"self": 2, "cross": 4}  # of the latent's side: 32 and 16 of Stable Diffusion's 64, as in the paper


def attention_sides(unet, latent: int) -> dict[str, list[int]]:
    """Sides of the maps of a UNet's ``self`` and ``cross`` attention for square latents of side ``latent``.

    From where its layers stand: level i of the UNet works at the latent halved i times, rounded up.
    """
    sides = [latent]
    for _ in unet.config.down_block_types[1:]:
        sides.append((sides[-1] + 1) // 2)
    found = {"self": set(), "cross": set()}
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith((".attn1", ".attn2")):
            block, place = name.split(".")[:2]
            level = {"down_blocks": lambda i: i, "up_blocks": lambda i: -1 - i, "mid_block": lambda _: -1}[block]
            found["cross" if module.is_cross_attention else "self"].add(sides[level(int(place) if place.isdigit() else 0)])
    return {kind: sorted(each) for kind, each in found.items()}


def choose_side(kind: str, wanted: int | None, sides: list[int], latent: int) -> int:
    """The side at which ``kind`` attention is read: ``wanted``, or for None the one nearest (in ratio) to the paper's share
    of the latent, a quarter for cross- and a half for self-attention; of two equally near the finer one.

    ValueError names the sides that there are.
    """
    if wanted in sides:
        return wanted
    if wanted is not None or not sides:
        raise ValueError(
            f"diffusion.{kind}_resolution={wanted}: this model has no {kind}-attention there; it has {sides} for latents of "
            f"{latent}x{latent}. null takes the one nearest to 1/{PARTS[kind]} of the latent"
        )
    return min(sides, key=lambda side: (abs(math.log2(side * PARTS[kind] / latent)), -side))


class AttentionRecorder:
    """Records, while active, the mean attention of a UNet over heads, layers and steps, per sample.

    ``cross[source]`` [B, N, T] at ``cross_resolution`` for the sources ``class_prompt`` (keys from ``class_states``
    [B, T, C], the text encoder's states of the class prompts; queries from the image being made) and, if
    ``full_prompt``, ``full_prompt`` (the prompt the image is made from); ``self_attention`` [B, M, M] at
    ``self_resolution``. Only the conditional half of a guided batch is read. ``cross_layers``: the cross-attention layers
    that are read, by the beginning of their names (``up_blocks.1``), and ``cross_heads`` their heads by number; None = all.
    ``every``: only each so-manieth call of the UNet is read, from the first on.
    """

    def __init__(
        self, unet, class_states, cross_resolution: int, self_resolution: int, full_prompt: bool = False,
        cross_layers: list[str] | None = None, cross_heads: list[int] | None = None, every: int = 1,
    ):  # fmt: skip
        self.unet, self.class_states, self.full_prompt = unet, class_states, full_prompt
        self.cross_resolution, self.self_resolution = cross_resolution, self_resolution
        self.cross_layers, self.cross_heads = cross_layers, cross_heads
        self.every, self.calls, self.seen = every, 0, {}
        self._sums, self._counts, self._class_keys, self._handles = {}, {}, {}, []

    def __enter__(self):
        self._handles.append(self.unet.register_forward_hook(self._called))
        for name, module in self.unet.named_modules():
            if isinstance(module, Attention):
                hook = self._hook(name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _called(self, *_):
        self.calls += 1

    def _hook(self, name):
        @torch.no_grad()
        def observe(module, args, kwargs):
            if self.calls % self.every:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.ndim != 3:
                return
            prompt = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            self.seen[name] = hidden.shape[1]
            if prompt is None and hidden.shape[1] == self.self_resolution**2:
                self._add("self", self._probabilities(module, self._conditional(hidden)))
            elif prompt is not None and hidden.shape[1] == self.cross_resolution**2 and self._chosen(name):
                hidden = self._conditional(hidden)
                if name not in self._class_keys:
                    self._class_keys[name] = module.to_k(self.class_states.to(hidden.dtype))
                self._add("class_prompt", self._probabilities(module, hidden, self._class_keys[name], self.cross_heads))
                if self.full_prompt:
                    states = self._conditional(prompt)
                    self._add("full_prompt", self._probabilities(module, hidden, module.to_k(states), self.cross_heads))

        return observe

    def _chosen(self, name):
        return self.cross_layers is None or any(f"{name}.".startswith(f"{layer}.") for layer in self.cross_layers)

    def _conditional(self, tensor):
        return tensor[-len(self.class_states) :]

    @staticmethod
    def _probabilities(module, hidden, keys=None, heads=None):
        queries = attention.split_heads(module.to_q(hidden), module.heads)
        keys = attention.split_heads(module.to_k(hidden) if keys is None else keys, module.heads)
        if heads is not None:
            if not heads or not set(heads) <= set(range(module.heads)):
                raise ValueError(f"diffusion.cross_heads={heads}: a layer that is read has the heads 0 to {module.heads - 1}")
            queries, keys = queries[:, heads], keys[:, heads]
        return attention.mean_attention(queries, keys, module.scale)

    def _add(self, key, value):
        self._sums[key] = self._sums[key].add_(value) if key in self._sums else value
        self._counts[key] = self._counts.get(key, 0) + 1

    def check(self):
        """ValueError naming the layers and resolutions that exist if a wanted one was not seen."""
        if not self.seen:
            raise ValueError(f"no attention was captured: {type(self.unet).__name__} ran no attention layer")
        here = [n for n, pixels in self.seen.items() if n.endswith("attn2") and pixels == self.cross_resolution**2]
        unused = [layer for layer in self.cross_layers or [] if not any(f"{n}.".startswith(f"{layer}.") for n in here)]
        if here and (unused or self.cross_layers == []):
            raise ValueError(
                f"diffusion.cross_layers={self.cross_layers}: no cross-attention layer at {self.cross_resolution} has a name "
                f"that begins so ({', '.join(unused) or 'nothing named'}). Layers:\n  " + "\n  ".join(here)
            )
        for kind, part, wanted in (("self", "attn1", self.self_resolution), ("class_prompt", "attn2", self.cross_resolution)):
            if kind not in self._sums:
                there = sorted({round(n**0.5) for layer, n in self.seen.items() if layer.endswith(part)})
                layers = "\n  ".join(f"{layer} at {round(n**0.5)}" for layer, n in self.seen.items())
                name = "self" if kind == "self" else "cross"
                raise ValueError(
                    f"diffusion.{name}_resolution={wanted}: this model has no {name}-attention there; it has {there}. "
                    f"Layers:\n  {layers}"
                )

    @property
    def cross(self) -> dict[str, torch.Tensor]:
        return {k: v / self._counts[k] for k, v in self._sums.items() if k != "self"}

    @property
    def self_attention(self) -> torch.Tensor:
        return self._sums["self"] / self._counts["self"]
