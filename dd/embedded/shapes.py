"""The embedded world: captioned scenes of everyday things with pixel-exact masks, a pure function
of (seed, index).

It is to this package what PASCAL VOC and Stable Diffusion's training images are to the paper, in
miniature. Each class is a *thing* with its own outline, texture and colours; apple, heart and brick
share reds, banana and gold ring yellows, leaf and pine tree greens, so that colour alone does not
give the class, and tire and gold ring share an outline.

Two domains: ``shapes`` (what the generator is trained on) and ``shapes_shift`` (a domain gap: other
backgrounds, side light, colour cast, blur and sensor noise). Splits are disjoint by construction:
every (domain, split) has its own stream of random numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dd.taxonomy import SHAPES_NAMES

SIZE = 64  # pixels, square
DOMAINS = ("shapes", "shapes_shift")
# "generator": scenes for the text-to-image model, never for segmenters
SPLITS = ("generator", "train", "tune", "test")
BACKGROUNDS = ("plain", "striped", "gradient")
LIGHTS = ("dark", "normal", "bright")
Array: TypeAlias = np.ndarray
Generator: TypeAlias = np.random.Generator
RGB: TypeAlias = tuple[float, float, float]
Point: TypeAlias = tuple[float, float]
COLOURS = {
    "grey": (0.55, 0.55, 0.56),
    "white": (0.90, 0.90, 0.88),
    "blue": (0.30, 0.45, 0.78),
    "purple": (0.52, 0.36, 0.66),
    "pink": (0.87, 0.62, 0.72),
    "beige": (0.80, 0.73, 0.60),
}
LIGHT_GAIN = {"dark": 0.55, "normal": 1.0, "bright": 1.4}
UPRIGHT = ("pine tree", "apple", "heart")  # things that are turned little
MIN_VISIBLE = 0.45  # share of an object that must stay visible under the ones drawn later


@dataclass(frozen=True)
class Scene:
    """``image`` uint8 [size, size, 3]; ``mask`` uint8 [size, size] of class ids, 0 = background;
    ``classes`` in the order in which the caption names them (also the order of drawing, the last
    one in front)."""

    image: np.ndarray
    mask: np.ndarray
    caption: str
    classes: tuple[str, ...]
    background: str
    colour: str
    light: str


# ----------------------------------------------------------------------------------------- outlines
# Each thing maps object coordinates (u right, v down, about [-1, 1]) to (inside, rgb): ``inside``
# is positive inside the outline and falls by about one per unit of length, ``rgb`` is [3, H, W] in
# [0, 1].
Thing: TypeAlias = tuple[Array, Array]


def _flat(colour: RGB, like: Array) -> Array:
    return np.asarray(colour, np.float32)[:, None, None] * np.ones_like(like)[None]


def _blend(base: Array, top: Array, weight: Array) -> Array:
    return base + (top - base) * np.clip(weight, 0, 1)[None]


def _ball(u: Array, v: Array) -> Array:
    """Soft shading of a round body lit from the upper left."""
    return 0.72 + 0.38 * np.exp(-((u + 0.35) ** 2 + (v + 0.4) ** 2) / 0.35)


def _segment(u: Array, v: Array, a: Point, b: Point, r: float) -> Array:
    """Capsule from a to b with radius r."""
    d = np.subtract(b, a)
    t = np.clip(((u - a[0]) * d[0] + (v - a[1]) * d[1]) / (d @ d), 0, 1)
    return r - np.hypot(u - a[0] - t * d[0], v - a[1] - t * d[1])


def _apple(u: Array, v: Array, rng: Generator) -> Thing:
    angle = np.abs(np.arctan2(u, -(v - 0.1)))
    body = 0.84 * (1 - 0.22 * np.exp(-((angle / 0.42) ** 2))) - np.hypot(u, (v - 0.1) * 1.04)
    stem = _segment(u, v, (0.02, -0.5), (0.16, -0.95), 0.09)
    red = _flat((0.80 + 0.1 * rng.random(), 0.10 + 0.08 * rng.random(), 0.10), u) * _ball(u, v)
    return np.maximum(body, stem), _blend(red, _flat((0.35, 0.22, 0.08), u), (stem > body) * 1.0)


def _banana(u: Array, v: Array, rng: Generator) -> Thing:
    outer = 1.02 - np.hypot(u, v + 0.42)
    inner = np.hypot(u * 0.92, v + 0.98) - 1.02
    yellow = _flat((0.95, 0.82 + 0.06 * rng.random(), 0.16), u) * (1.02 - 0.25 * np.clip(v, 0, 1))
    tips = np.clip((np.abs(u) - 0.74) * 9, 0, 1)
    return np.minimum(np.minimum(outer, inner), 0.93 - np.abs(u)), _blend(
        yellow, _flat((0.35, 0.24, 0.08), u), tips
    )


def _leaf(u: Array, v: Array, rng: Generator) -> Thing:
    half = 0.56 * np.clip(1 - (v / 0.98) ** 2, 0, 1) ** 0.8
    inside = np.minimum(half - np.abs(u), 0.98 - np.abs(v)) * 0.85
    stem = _segment(u, v, (0, 0.9), (0.06, 1.12), 0.06)
    veins = (np.abs(u) < 0.055) | (np.abs(((v - np.abs(u) * 0.9) * 3.2) % 1 - 0.5) < 0.11)
    green = _flat((0.28 + 0.1 * rng.random(), 0.62 + 0.1 * rng.random(), 0.18), u)
    return np.maximum(inside, stem), _blend(green, _flat((0.62, 0.82, 0.40), u), veins * 0.8)


def _brick(u: Array, v: Array, rng: Generator) -> Thing:
    inside = np.minimum(1.0 - np.abs(u), 0.52 - np.abs(v))
    clay = _flat((0.66 + 0.08 * rng.random(), 0.30 + 0.05 * rng.random(), 0.20), u)
    clay = clay * (1 + 0.16 * (rng.random(u.shape, np.float32) - 0.5))
    holes = np.min([np.hypot(u - c, v) for c in (-0.55, 0.0, 0.55)], axis=0) < 0.19
    edge = (np.abs(v) > 0.40) | (np.abs(u) > 0.88)
    return inside, _blend(
        _blend(clay, clay * 0.72, edge * 1.0), _flat((0.22, 0.09, 0.07), u), holes * 1.0
    )


def _tire(u: Array, v: Array, _: Generator) -> Thing:
    r = np.hypot(u, v)
    tread = (np.abs((np.arctan2(v, u) * 16 / (2 * np.pi)) % 1 - 0.5) < 0.22) & (r > 0.78)
    rubber = _flat((0.13, 0.13, 0.14), u) * (1 + 0.5 * np.exp(-(((r - 0.66) / 0.08) ** 2)))
    return np.minimum(0.96 - r, r - 0.40), _blend(rubber, _flat((0.30, 0.30, 0.31), u), tread * 0.9)


def _gold_ring(u: Array, v: Array, rng: Generator) -> Thing:
    r = np.hypot(u, v)
    shine = np.cos(2 * (np.arctan2(v, u) + 0.8)) * 0.5 + 0.5
    gold = _flat((0.80 + 0.06 * rng.random(), 0.62, 0.14), u) * (0.72 + 0.3 * shine)
    glint = np.exp(-(((r - 0.72) / 0.08) ** 2)) * shine**3
    return np.minimum(0.94 - r, r - 0.50), _blend(gold, _flat((1.0, 0.96, 0.72), u), glint)


def _heart(u: Array, v: Array, rng: Generator) -> Thing:
    point = (0.72 - np.abs(u) - np.abs(v - 0.22)) / 2**0.5
    lobes = 0.515 - np.hypot(np.abs(u) - 0.37, v + 0.15)
    pink = _flat((0.88 + 0.08 * rng.random(), 0.13, 0.28 + 0.06 * rng.random()), u)
    gloss = np.exp(-(((u + 0.4) / 0.2) ** 2) - ((v + 0.42) / 0.16) ** 2)
    return np.maximum(point, lobes), _blend(pink, _flat((1.0, 0.8, 0.86), u), gloss)


def _pine_tree(u: Array, v: Array, rng: Generator) -> Thing:
    slopes = ((-1.0, 0.72), (-0.62, 0.72), (-0.22, 0.78))
    tiers = [0.72 * ((v - top) * slope - np.abs(u)) for top, slope in slopes]
    ends = (-0.28, 0.16, 0.66)
    crown = np.max([np.minimum(t, end - v) for t, end in zip(tiers, ends, strict=True)], axis=0)
    trunk = np.minimum(np.minimum(0.15 - np.abs(u), 1.0 - v), v - 0.4)
    needles = rng.random(u.shape, np.float32)
    green = _flat((0.06, 0.34 + 0.06 * rng.random(), 0.16), u) * (0.8 + 0.45 * needles)
    return np.maximum(crown, trunk), _blend(
        green, _flat((0.38, 0.24, 0.12), u), (trunk > crown) * 1.0
    )


OUTLINES = (_apple, _banana, _leaf, _brick, _tire, _gold_ring, _heart, _pine_tree)
THINGS = dict(zip(SHAPES_NAMES, OUTLINES, strict=True))


# ------------------------------------------------------------------------------------------- scenes


def _smooth_noise(rng: Generator, size: int, cells: int) -> Array:
    """Value noise in [-1, 1]: random values on a coarse grid, interpolated bilinearly."""
    grid = rng.random((cells + 1, cells + 1)).astype(np.float32) * 2 - 1
    t = np.linspace(0, cells, size, endpoint=False, dtype=np.float32)
    i = t.astype(int)
    f = t - i
    rows = grid[i] * (1 - f)[:, None] + grid[i + 1] * f[:, None]
    return rows[:, i] * (1 - f) + rows[:, i + 1] * f


def _background(rng: Generator, kind: str, colour: str, xx: Array, yy: Array, shift: bool) -> Array:
    size = xx.shape[0]
    base = np.asarray(COLOURS[colour], np.float32) + rng.normal(0, 0.025, 3).astype(np.float32)
    angle = rng.uniform(0, np.pi)
    along = (xx * np.cos(angle) + yy * np.sin(angle)) / size
    if kind == "striped":
        shade = np.where((along * rng.uniform(6, 10) + rng.random()) % 1 < 0.5, 1.0, 0.74)
    elif kind == "gradient":
        shade = np.clip(0.62 + 0.5 * (along - along.min()) / np.ptp(along), 0, 1.1)
    else:
        shade = np.ones_like(xx)
    if shift:  # textures that the generator's world does not have
        across = (-xx * np.sin(angle) + yy * np.cos(angle)) / size
        if rng.random() < 0.5:
            shade = shade * (1 + 0.16 * np.sin(across * 60 + 7 * _smooth_noise(rng, size, 5)))
        else:
            shade = shade * np.where(((along * 7) % 1 < 0.5) ^ ((across * 7) % 1 < 0.5), 1.0, 0.84)
    noise = _smooth_noise(rng, size, 16)
    grain = 1 + 0.05 * noise + 0.03 * (rng.random(xx.shape, np.float32) - 0.5)
    return base[:, None, None] * (shade * grain)[None]


def _draw(
    rng: Generator,
    image: Array,
    mask: Array,
    names: Sequence[str],
    ids: Sequence[int],
    xx: Array,
    yy: Array,
) -> list[float]:
    """Paint the things back to front; returns the share of each that stays visible."""
    size, areas = xx.shape[0], []
    for name, value in zip(names, ids, strict=True):
        radius = size * rng.uniform(0.18, 0.28)
        cx, cy = rng.uniform(radius * 0.75, size - radius * 0.75, 2)
        most = 0.35 if name in UPRIGHT else np.pi
        turn = rng.uniform(-most, most)
        cos, sin = np.cos(turn) / radius, np.sin(turn) / radius
        u, v = (xx - cx) * cos + (yy - cy) * sin, -(xx - cx) * sin + (yy - cy) * cos
        inside, rgb = THINGS[name](u, v, rng)
        alpha = np.clip(inside * radius + 0.5, 0, 1)
        image[:] = image * (1 - alpha) + rgb * alpha
        mask[inside > 0] = value
        areas.append(int((inside > 0).sum()))
    return [(mask == value).sum() / max(area, 1) for value, area in zip(ids, areas, strict=True)]


def _sensor(rng: Generator, image: Array, xx: Array, yy: Array) -> Array:
    """The domain gap: side light, colour cast, blur and noise (image float [3, H, W])."""
    size, angle = xx.shape[0], rng.uniform(0, 2 * np.pi)
    along = (xx - size / 2) * np.cos(angle) + (yy - size / 2) * np.sin(angle)
    side = 1 + rng.uniform(0.15, 0.4) * along / (size / 2)
    image = image * side[None] * rng.uniform(0.85, 1.15, 3).astype(np.float32)[:, None, None]
    sigma = rng.uniform(0.4, 1.1)
    taps = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (1, 2):
        margins = [(3, 3) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(image, margins, mode="edge")
        parts = (t * np.take(padded, range(k, k + size), axis) for k, t in enumerate(taps))
        image = np.asarray(sum(parts))
    return image + rng.normal(0, rng.uniform(0.02, 0.07), image.shape)


def article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def caption_of(
    rng: Generator, classes: Sequence[str], background: str, colour: str, light: str
) -> str:
    """One caption that names the objects, the background and the light, in one of several
    wordings."""
    things = [article(c) for c in classes]
    listed = things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
    start = ("a photo of ", "", "a picture of ")[rng.integers(3)]
    where = (" on a ", ", ")[rng.integers(2)] + f"{background} {colour} background"
    return start + listed + where + (" in ", ", ")[rng.integers(2)] + f"{light} light"


def scene(domain: str, split: str, index: int, seed: int = 0, size: int = SIZE) -> Scene:
    """Scene ``index`` of a split: the same arguments give the same pixels, on any machine with the
    same numpy.

    Raises ValueError for an unknown domain or split and for a negative index.
    """
    if domain not in DOMAINS or split not in SPLITS or index < 0:
        raise ValueError(
            f"no scene {domain!r}/{split!r}/{index}; domains {DOMAINS}, splits {SPLITS}, index >= 0"
        )
    rng = np.random.default_rng([seed, DOMAINS.index(domain), SPLITS.index(split), index])
    yy, xx = np.meshgrid(*[np.arange(size, dtype=np.float32) + 0.5] * 2, indexing="ij")
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
    light = LIGHTS[rng.integers(len(LIGHTS))]
    order = rng.permutation(len(SHAPES_NAMES))[: rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])]
    classes = tuple(SHAPES_NAMES[i] for i in order)
    ids = [int(i) + 1 for i in order]
    shift = domain == "shapes_shift"
    while True:  # until nobody is hidden by the things in front
        image = _background(rng, background, colour, xx, yy, shift)
        mask = np.zeros((size, size), np.uint8)
        if min(_draw(rng, image, mask, classes, ids, xx, yy)) >= MIN_VISIBLE:
            break
    image = image * LIGHT_GAIN[light] * rng.uniform(0.94, 1.06)
    image = _sensor(rng, image, xx, yy) if shift else image + rng.normal(0, 0.008, image.shape)
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    caption = caption_of(rng, classes, background, colour, light)
    pixels = np.ascontiguousarray(pixels)
    return Scene(pixels, mask, caption, classes, background, colour, light)
