"""The things of the embedded world: outline, texture and colours of each class.

Every object has parts finer than a cell of the attention (1/16 of the image's side in the
cross-attention): stems, veins, teeth, spokes, a handle, a knob, holes that show the background. No
class can be told by colour alone: apple, heart and brick share reds, banana and gold ring yellows,
leaf and pine tree greens, and the glazes of mug and jar come in all of these. Tire and gold ring
share an outline of two circles. Mug and jar share a body and differ only in their parts: a handle
at the side, a lid with a knob on top.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray
Point: TypeAlias = tuple[float, float]
RGB: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """Properties of one drawing: ``rng`` for colours and proportions; ``pixel``: the side of a
    pixel in object units; ``light``: the direction to the light in object coordinates (a vector of
    about unit length)."""

    rng: np.random.Generator
    pixel: float
    light: Point

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def thin(self, half: float) -> float:
        """Half the width of a thin part: at least 1.1 pixels, or it would break up."""
        return max(half, 1.1 * self.pixel)

    def soft(self, inside: Array) -> Array:
        """Coverage in [0, 1] of pixels by the region where ``inside`` > 0."""
        return np.clip(inside / self.pixel + 0.5, 0, 1)

    def one_of(self, *colours: RGB) -> Array:
        """One of the colours, float32 [3], with slightly varied brightness and hue."""
        colour = np.asarray(colours[self.rng.integers(len(colours))], np.float32)
        gain = self.rng.uniform(0.88, 1.12) + self.rng.uniform(-0.06, 0.06, 3)
        return (colour * gain).astype(np.float32)


# (inside, rgb): ``inside`` [H, W] is positive inside the outline and falls by about one per unit of
# length, ``rgb`` is [3, H, W] in [0, 1]. A thing maps object coordinates (u right, v down, the
# object within about [-1, 1]) to these.
Drawn: TypeAlias = tuple[Array, Array]
Thing: TypeAlias = Callable[[Array, Array, Look], Drawn]
REACH = 1.12  # largest extent of an object, in object units


def _paint(colour: Array, shade: Array) -> Array:
    return colour[:, None, None] * shade[None]


def _over(base: Array, colour: Array | RGB, weight: Array) -> Array:
    top = np.asarray(colour, np.float32)[:, None, None]
    return base + (top - base) * weight[None]


def _ball(u: Array, v: Array, look: Look) -> Array:
    """Soft shading of a round body."""
    x, y = look.light
    return 0.70 + 0.42 * np.exp(-((u - 0.45 * x) ** 2 + (v - 0.45 * y) ** 2) * 2.6)


def _gloss(u: Array, v: Array, look: Look, reach: float, radius: float) -> Array:
    """A highlight in [0, 1], towards the light."""
    x, y = look.light
    return np.exp(-((u - reach * x) ** 2 + (v - reach * y) ** 2) / radius**2)


def _segment(u: Array, v: Array, a: Point, b: Point, half: float) -> Array:
    """Capsule from a to b with half the width ``half``."""
    du, dv = b[0] - a[0], b[1] - a[1]
    x, y = u - a[0], v - a[1]
    t = np.clip((x * du + y * dv) / (du * du + dv * dv), 0, 1)
    return half - np.hypot(x - t * du, y - t * dv)


def _zigzag(x: Array) -> Array:
    """Triangle wave of period 1 in [-1, 1]."""
    return np.abs(x % 1 - 0.5) * 4 - 1


def _grain(like: Array, look: Look) -> Array:
    """White noise in [-1, 1]."""
    return look.rng.random(like.shape, np.float32) * 2 - 1


# ------------------------------------------------------------------------------------------- things


def _apple(u: Array, v: Array, look: Look) -> Drawn:
    w = v - 0.12
    x = u * (1 + 0.16 * w)
    angle = np.abs(np.arctan2(x, -w))
    dimples = 0.24 * np.exp(-((angle / 0.36) ** 2)) + 0.10 * np.exp(-(((angle - np.pi) / 0.3) ** 2))
    body = 0.84 * (1 - dimples) - np.hypot(x, w)
    tip = look.between(0.05, 0.22)
    stem = _segment(u, v, (0.0, -0.5), (tip, -1.0), look.thin(0.045))
    sepals = np.maximum(
        _segment(u, v, (0.0, 0.84), (-0.1, 0.96), look.thin(0.035)),
        _segment(u, v, (0.0, 0.84), (0.1, 0.96), look.thin(0.035)),
    )
    skin = look.one_of(
        (0.82, 0.10, 0.10), (0.72, 0.06, 0.12), (0.86, 0.22, 0.12), (0.56, 0.74, 0.18)
    )
    blush = np.exp(-((angle / 0.9) ** 2)) * look.between(0.0, 0.7)
    rgb = _paint(skin, _ball(u, v, look))
    rgb = _over(rgb, (0.85, 0.66, 0.20), blush * (0.7 + 0.3 * np.sin(angle * 21)))
    rgb = _over(rgb, (1.0, 0.95, 0.9), 0.6 * _gloss(u, w, look, 0.48, 0.17))
    rgb = _over(rgb, (0.30, 0.18, 0.07), look.soft(np.maximum(stem, sepals)))
    inside = np.maximum(np.maximum(body, stem), sepals)
    if look.rng.random() < 0.5:  # a small leaf at the stem
        along, across = (u - 0.08) * 0.87 - (v + 0.7) * 0.5, (u - 0.08) * 0.5 + (v + 0.7) * 0.87
        leaf = 0.13 * np.clip(1 - ((along - 0.27) / 0.27) ** 2, 0, 1) - np.abs(across)
        leaf = np.minimum(leaf, 0.27 - np.abs(along - 0.27))
        rgb = _over(rgb, (0.25, 0.55, 0.15), look.soft(leaf))
        inside = np.maximum(inside, leaf)
    return inside, rgb


def _banana(u: Array, v: Array, look: Look) -> Drawn:
    middle, w = 0.98, v + 0.58
    r, angle = np.hypot(u, w), np.arctan2(u, w)
    off = np.abs(r - middle)
    thick = look.between(0.24, 0.32)
    body = thick * np.clip(1 - (angle / 1.03) ** 2, 0, 1) ** 0.6 - off
    body = np.minimum(body, 1.05 - np.abs(angle))  # no hairline around the rest of the circle
    stem = np.minimum(look.thin(0.065) - off, np.minimum(1.26 - angle, angle - 0.7))
    tip = np.minimum(look.thin(0.055) - off, np.minimum(1.09 + angle, -angle - 0.7))
    skin = look.one_of((0.96, 0.82, 0.15), (0.93, 0.76, 0.20), (0.78, 0.80, 0.22))
    facet = look.soft(r - middle - 0.10 * np.cos(angle * 1.4))
    rgb = _paint(skin, 1.04 - 0.20 * facet - 0.16 * look.soft(middle - 0.12 - r))
    if look.rng.random() < 0.5:  # ripe
        a, b = look.rng.uniform(0, 6, 2)
        spots = np.sin(23 * angle + a) * np.sin(31 * r + b) - 0.75
        rgb = _over(rgb, (0.38, 0.24, 0.08), 0.8 * look.soft(spots * 0.06))
    brown = np.maximum(angle - 1.08, -angle - 0.97)
    rgb = _over(rgb, (0.30, 0.20, 0.07), look.soft(brown))
    return np.maximum(np.maximum(body, stem), tip), rgb


def _leaf(u: Array, v: Array, look: Look) -> Drawn:
    bend, teeth = look.between(-0.16, 0.16), look.rng.integers(7, 11)
    u = u - bend * (v * v - 0.35)
    t = (v + 0.98) / 1.64  # 0 at the tip, 1 where the stem begins
    s = np.clip(t, 0, 1)
    half = look.between(0.48, 0.62) * s**0.8 * (1 - s) ** 0.55 / 0.40
    saw = 0.5 - (s * teeth) % 1  # the teeth point to the tip
    half = half + 0.13 * saw * np.clip(half * 4, 0, 1)
    off = np.abs(u)
    blade = np.minimum((half - off) * 0.8, 1.64 * np.minimum(t, 1 - t))
    stem = _segment(u, v, (0.0, 0.60), (0.12 * np.sign(bend), 1.08), look.thin(0.04))
    green = look.one_of(
        (0.26, 0.58, 0.16), (0.40, 0.66, 0.20), (0.12, 0.42, 0.18), (0.82, 0.58, 0.14)
    )
    rgb = _paint(green, 1.0 + 0.10 * np.sign(u) * look.light[0] + 0.05 * _grain(u, look))
    side = np.abs((v + 0.8 * off) * 3.7 % 1 - 0.5) / 3.7 * 0.78
    veins = np.maximum(look.soft(look.thin(0.028) - off), 0.7 * look.soft(0.022 - side))
    rgb = _over(rgb, np.minimum(green * 0.6 + 0.36, 1), veins)
    rgb = _over(rgb, green * 0.75, look.soft(np.minimum(stem, v - 0.66)))
    return np.maximum(blade, stem), rgb


def _brick(u: Array, v: Array, look: Look) -> Drawn:
    height, count = look.between(0.44, 0.56), int(look.rng.integers(2, 5))
    radius = max(0.15, 2.3 * look.pixel)
    chips = 0.03 * np.sin(u * 11 + look.between(0, 6)) * np.sin(v * 13 + look.between(0, 6))
    slab = np.minimum(0.98 - np.abs(u), height - np.abs(v)) + np.minimum(chips, 0)
    pitch = 1.72 / count
    x = (u + 0.86) % pitch - pitch / 2
    x = np.where(np.abs(u) < 0.86, x, 9.0)
    mouth = radius - np.hypot(x, v)
    # the wall of a hole is seen on the side away from the light
    du, dv = 0.06 * look.light[0], 0.06 * look.light[1]
    hole = np.minimum(mouth, radius - np.hypot(x - du, v - dv))
    clay = look.one_of((0.70, 0.28, 0.19), (0.60, 0.22, 0.16), (0.74, 0.38, 0.22))
    rgb = _paint(clay, 1 + 0.13 * _grain(u, look) + 2.0 * chips)
    rgb = _over(rgb, clay * 0.42, look.soft(mouth))
    return np.minimum(slab, -hole), rgb


def _circles(look: Look) -> Point:
    """Outer and inner radius, shared by tires and gold rings."""
    return 0.94, look.between(0.58, 0.70)


def _tire(u: Array, v: Array, look: Look) -> Drawn:
    outer, inner = _circles(look)
    r, angle = np.hypot(u, v), np.arctan2(v, u) / (2 * np.pi)
    teeth, spokes = look.rng.integers(15, 23), look.rng.integers(4, 8)
    tread = np.clip(_zigzag(angle * teeth) * 2, -1, 1)
    edge = outer + 0.05 * tread
    band = np.minimum(edge - r, r - inner)
    fold = ((angle * spokes + look.rng.random()) % 1 - 0.5) * (2 * np.pi / spokes)
    spoke = np.minimum(look.thin(0.05) - r * np.abs(np.sin(fold)), inner + 0.04 - r)
    spoke = np.where(np.abs(fold) < 1.2, spoke, -r)
    nave = max(0.08, 1.6 * look.pixel)
    hub = np.minimum(nave + 0.13 - r, r - nave)
    rubber = look.one_of((0.13, 0.13, 0.14), (0.19, 0.18, 0.18), (0.11, 0.12, 0.16))
    wall = (inner + 0.1 + outer) / 2
    shade = 1 + 0.9 * np.exp(-(((r - wall) / 0.035) ** 2)) + 0.45 * look.soft(r - 0.84) * tread
    metal = look.one_of((0.62, 0.63, 0.66), (0.50, 0.51, 0.54), (0.78, 0.78, 0.78))
    rgb = _over(_paint(rubber, shade), metal, look.soft(inner + 0.085 - r))
    return np.maximum(band, np.maximum(np.minimum(spoke, r - nave), hub)), rgb


def _gold_ring(u: Array, v: Array, look: Look) -> Drawn:
    outer, inner = _circles(look)
    r = np.hypot(u, v)
    profile = (r - (outer + inner) / 2) * 2 / (outer - inner)  # -1 at the inner edge, 1 outside
    facing = (u * look.light[0] + v * look.light[1]) / np.maximum(r, 1e-3)
    gold = look.one_of((0.86, 0.66, 0.14), (0.80, 0.58, 0.16), (0.92, 0.74, 0.28))
    mirror = np.cos(3 * facing + 2 * profile)
    rgb = _paint(gold, 0.72 + 0.32 * profile * facing + 0.24 * mirror)
    rgb = _over(rgb, gold * 0.45, 0.7 * np.clip(-profile - 0.55, 0, 1))
    glint = np.exp(-(((profile - 0.25 * facing) / 0.3) ** 2)) * facing**4
    rgb = _over(rgb, (1.0, 0.97, 0.80), 0.95 * glint)
    if look.rng.random() < 0.4:  # an engraved line
        line = look.soft(look.thin(0.01) * 0.8 - np.abs(r - (outer + inner) / 2))
        rgb = _over(rgb, gold * 0.5, 0.8 * line)
    return np.minimum(outer - r, r - inner), rgb


def _heart(u: Array, v: Array, look: Look) -> Drawn:
    # distance to the heart of two arcs and a corner, narrowed towards its tip, with a deeper notch
    size = 1.62
    y = (0.92 - v) / size
    x = np.abs(u) / size
    x = x * (1 + look.between(0.25, 0.5) * np.clip(1 - y, 0, 1) ** 2)
    y = y + look.between(0.10, 0.18) * np.exp(-((x / 0.07) ** 2)) * (y > 0.5)
    lobe = 2**0.5 / 4 - np.hypot(x - 0.25, y - 0.75)
    foot = 0.5 * np.maximum(x + y, 0)
    flank = np.minimum(np.hypot(x, y - 1), np.hypot(x - foot, y - foot)) * np.sign(y - x)
    inside = np.where(x + y > 1, lobe, flank) * size
    red = look.one_of((0.86, 0.10, 0.16), (0.90, 0.18, 0.36), (0.70, 0.05, 0.14))
    dome = np.clip(inside / 0.4, 0, 1)
    rgb = _paint(red, 0.78 + 0.3 * dome * (2 - dome) * _ball(u, v, look))
    gloss = _gloss(np.abs(u) - 0.42, v + 0.36, look, 0.16, 0.15)
    return inside, _over(rgb, (1.0, 0.88, 0.92), 0.75 * gloss)


def _pine_tree(u: Array, v: Array, look: Look) -> Drawn:
    tiers, width = int(look.rng.integers(3, 6)), look.between(0.58, 0.72)
    off, teeth = np.abs(u), look.between(3.6, 5.0)
    jag = 0.055 * _zigzag(u * teeth + 0.25)
    trunk = np.minimum(look.thin(0.085) - off, np.minimum(1.04 - v, v - 0.4))
    green = look.one_of((0.07, 0.36, 0.16), (0.13, 0.44, 0.17), (0.08, 0.32, 0.26))
    crown, shade = np.full_like(u, -9.0), np.ones_like(u)
    for k in range(tiers, 0, -1):  # the upper ones in front
        end = -1.0 + 1.7 * k / tiers
        top = max(-1.02, end - 0.95)
        slope = width * (0.35 + 0.65 * k / tiers) / (end - top)
        tier = np.minimum(((v - top) * slope - off) * 0.85, end + jag - v)
        front = look.soft(tier)
        shade = shade + (0.62 + 0.55 * np.clip((v - top) / (end - top), 0, 1) - shade) * front
        crown = np.maximum(crown, tier)
    shade = shade * (1 + 0.22 * _grain(u, look) + 0.12 * np.sign(u) * look.light[0])
    rgb = _over(_paint(green, shade), (0.36, 0.23, 0.11), look.soft(np.minimum(trunk, -crown)))
    return np.maximum(crown, trunk), rgb


GLAZES = (
    (0.78, 0.14, 0.12),
    (0.90, 0.74, 0.18),
    (0.24, 0.50, 0.22),
    (0.20, 0.36, 0.66),
    (0.88, 0.86, 0.80),
    (0.50, 0.32, 0.60),
    (0.16, 0.50, 0.52),
    (0.46, 0.29, 0.18),
)
BODY_TOP = -0.50  # of mug and jar


def _body(u: Array, v: Array, look: Look) -> tuple[Array, Array, Array, float]:
    """The body shared by mug and jar: (inside, rgb, glaze [3], half its width at the top)."""
    bulge, taper, wide = look.between(0, 0.10), look.between(-0.08, 0.03), look.between(0.48, 0.58)
    w = (v - 0.2) / 0.7  # -1 at the top, 1 at the bottom
    half = wide + bulge * (1 - w * w) + taper * w
    half = half - 0.14 * np.clip((v - 0.74) / 0.16, 0, 1) ** 2
    x = np.clip(u / half, -1, 1)
    glaze, other = look.one_of(*GLAZES), look.one_of(*GLAZES)
    kind, place, pitch = look.rng.integers(4), look.between(0.1, 0.4), look.between(0.22, 0.3)
    decor = np.zeros_like(u)
    if kind == 1:  # bands
        decor = look.soft(0.13 - np.abs(v - place)) - look.soft(0.035 - np.abs(v - place))
    elif kind == 2:  # dipped
        decor = look.soft(v - place - 0.04 * np.sin(u * 9))
    elif kind == 3:  # dots, on a body that turns away at its sides
        across = np.arcsin(x * 0.98) * 0.55
        row = np.floor(v / pitch)
        du = (across / pitch + 0.5 * (row % 2)) % 1 - 0.5
        decor = look.soft((0.26 - np.hypot(du, v / pitch - row - 0.5)) * pitch)
    shade = _round(x, look)
    rgb = _over(_paint(glaze, shade), other, decor)
    rgb = np.where(decor[None] > 0, rgb * (1 + (shade - 1) * decor), rgb)
    lines = np.maximum(
        look.soft(0.022 - np.abs(v - BODY_TOP - 0.11)), look.soft(0.018 - np.abs(v - 0.80))
    )
    rgb = _over(rgb * (1 - 0.35 * lines), (1.0, 1.0, 1.0), _shine(x, look))
    inside = np.minimum((half - np.abs(u)) * 0.97, np.minimum(v - BODY_TOP, 0.9 - v))
    return inside, rgb, glaze, wide - taper


def _round(x: Array, look: Look) -> Array:
    """Shading of a round body seen from the side, x in [-1, 1] across it."""
    return 0.62 + 0.42 * np.sqrt(1 - 0.96 * x * x) + 0.18 * look.light[0] * x


def _shine(x: Array, look: Look) -> Array:
    return 0.45 * np.exp(-(((x - 0.55 * look.light[0]) / 0.13) ** 2))


def _mug(u: Array, v: Array, look: Look) -> Drawn:
    body, rgb, glaze, _ = _body(u, v, look)
    flat, half = look.between(0.95, 1.25), look.thin(0.062)
    r = np.hypot(u - 0.56, (v - 0.14) / flat)
    handle = np.minimum(half - np.abs(r - 0.36), u - 0.3)
    front = look.soft(np.minimum(handle, -body))
    return np.maximum(body, handle), _over(rgb, glaze * 0.86, front)


def _jar(u: Array, v: Array, look: Look) -> Drawn:
    body, rgb, glaze, top = _body(u, v, look)
    half, dome = top + 0.06, look.between(0.08, 0.16)
    x = np.clip(u / half, -1, 1)
    lid = np.minimum(half - np.abs(u), np.minimum(v + 0.62 + dome - dome * x * x, -0.45 - v))
    knob = look.thin(0.095) - np.hypot(u, v + 0.82)
    neck = np.minimum(look.thin(0.05) - np.abs(u), np.minimum(v + 0.85, -0.6 - v))
    knob = np.maximum(knob, neck)
    top_rgb = _over(_paint(glaze, _round(x, look) * 1.04), (1.0, 1.0, 1.0), _shine(x, look))
    top_rgb = top_rgb * (1 - 0.3 * look.soft(0.02 - np.abs(v + 0.53)))
    cover = look.soft(np.maximum(lid, knob))
    rgb = rgb * (1 - 0.3 * look.soft(np.minimum(0.05 - np.abs(v + 0.42), body)))  # under the lid
    return np.maximum(np.maximum(body, lid), knob), rgb + (top_rgb - rgb) * cover


THINGS: dict[str, Thing] = {
    "apple": _apple,
    "banana": _banana,
    "leaf": _leaf,
    "brick": _brick,
    "tire": _tire,
    "gold ring": _gold_ring,
    "heart": _heart,
    "pine tree": _pine_tree,
    "mug": _mug,
    "jar": _jar,
}
UPRIGHT = ("pine tree", "apple", "heart", "mug", "jar")  # objects that are tilted only a little
