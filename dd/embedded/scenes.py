"""The embedded world: captioned scenes of everyday things with pixel-exact masks, a pure function
of (domain, split, seed, index).

It plays the role that PASCAL VOC and Stable Diffusion's training images have in the paper, in
miniature and in the same regime: objects are some cells of the attention wide (8 px in the
cross-attention, 4 px in the self-attention) and have details finer than a cell
(:mod:`dd.embedded.things`).

Two domains: ``shapes`` (what the generator is trained on) and ``shapes_shift`` (a domain gap: other
backgrounds, side light, colour cast, blur and sensor noise). Splits are disjoint by construction:
every (domain, split) has its own stream of random numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dd.embedded.things import REACH, THINGS, UPRIGHT, Array, Look, Point

NAMES = tuple(THINGS)
SIZE = 128  # pixels, square
DOMAINS = ("shapes", "shapes_shift")
# "generator": scenes for the text-to-image model, never for segmenters
SPLITS = ("generator", "train", "tune", "test")
BACKGROUNDS = ("plain", "striped", "gradient", "checked", "spotted")
LIGHTS = ("dark", "normal", "bright")
COLOURS = {
    "grey": (0.55, 0.55, 0.56),
    "white": (0.90, 0.90, 0.88),
    "blue": (0.30, 0.45, 0.78),
    "purple": (0.52, 0.36, 0.66),
    "pink": (0.87, 0.62, 0.72),
    "beige": (0.80, 0.73, 0.60),
}
LIGHT_GAIN = {"dark": 0.55, "normal": 0.95, "bright": 1.35}
MIN_VISIBLE = 0.45  # share of an object that must stay visible under the ones drawn later
SMALLEST, LARGEST = 0.13, 0.30  # radius of a thing, as a share of the image's side
Generator: TypeAlias = np.random.Generator


@dataclass(frozen=True)
class Scene:
    """``image`` uint8 [size, size, 3]; ``mask`` uint8 [size, size] of class ids, 0 = background;
    ``classes`` in the order of the caption (also the drawing order, the last one in front)."""

    image: Array
    mask: Array
    caption: str
    classes: tuple[str, ...]
    background: str
    colour: str
    light: str


@dataclass(frozen=True)
class Piece:
    """An object in its place: ``inside`` [h, w] in pixels (positive on the object) and ``rgb``
    [3, h, w] of the box whose upper left pixel is (``top``, ``left``). The box lies within the
    image."""

    inside: Array
    rgb: Array
    top: int
    left: int

    @property
    def box(self) -> tuple[slice, slice]:
        h, w = self.inside.shape
        return slice(self.top, self.top + h), slice(self.left, self.left + w)


def _smooth_noise(rng: Generator, size: int, cells: int) -> Array:
    """Value noise in [-1, 1], [size, size]: random values on a coarse grid, interpolated
    bilinearly."""
    grid = rng.random((cells + 1, cells + 1), np.float32) * 2 - 1
    t = np.arange(size, dtype=np.float32) * np.float32(cells / size)
    i = t.astype(int)
    f = t - i
    rows = grid[i] * (1 - f)[:, None] + grid[i + 1] * f[:, None]
    return rows[:, i] * (1 - f) + rows[:, i + 1] * f


def _waves(x: Array, sharp: float) -> Array:
    """Square wave of period 1 in [0, 1] with edges ``1 / sharp`` of a period wide."""
    return np.clip((np.abs(x % 1 - 0.5) - 0.25) * sharp + 0.5, 0, 1)


def _pattern(rng: Generator, kind: str, along: Array, across: Array) -> Array:
    """How a kind of background varies the brightness of its colour, [size, size] around 1."""
    size = len(along)
    if kind == "plain":
        return np.ones_like(along)
    if kind == "gradient":
        return 0.60 + 0.5 * (along - along.min()) / np.ptp(along)
    count, depth = rng.uniform(5, 10), rng.uniform(0.18, 0.34)
    x, y = along * count + rng.random(), across * count + rng.random()
    sharp = size / count / 1.5
    if kind == "striped":
        return 1 - depth * _waves(x, sharp)
    if kind == "checked":
        a, b = _waves(x * 0.5, sharp * 2), _waves(y * 0.5, sharp * 2)
        return 1 - depth * (a + b - 2 * a * b)
    x = x + 0.5 * (np.floor(y) % 2)  # spotted: every other row is shifted by half a step
    spots = rng.uniform(0.2, 0.34) - np.hypot(x % 1 - 0.5, y % 1 - 0.5)
    return 1 - depth * np.clip(spots * size / count + 0.5, 0, 1)


def _texture(rng: Generator, along: Array, across: Array) -> Array:
    """Wood grain or woven cloth, which do not occur in the generator's world; [size, size]."""
    size, depth = len(along), rng.uniform(0.16, 0.34)
    if rng.random() < 0.5:
        bend = _smooth_noise(rng, size, 3)
        rings = np.sin(across * rng.uniform(25, 70) + rng.uniform(3, 8) * bend)
        fibres = rng.random(1024, np.float32)[(np.abs(across + 0.01 * bend) * 300).astype(int)]
        return 1 - depth * (0.5 + 0.3 * rings + 0.4 * (fibres - 0.5))
    count = rng.uniform(8, 22)
    x, y = along * count, across * count
    warp, weft = np.abs(np.sin(np.pi * x)), np.abs(np.sin(np.pi * y))
    over = (np.floor(x) + np.floor(y)) % 2
    return 1 - depth * (1 - np.where(over > 0, warp, weft * 0.8))


def _background(rng: Generator, kind: str, colour: str, size: int, shift: bool) -> Array:
    """[3, size, size]."""
    base = np.asarray(COLOURS[colour], np.float32) + rng.normal(0, 0.025, 3).astype(np.float32)
    angle = rng.uniform(0, np.pi)
    cos, sin = np.float32(np.cos(angle) / size), np.float32(np.sin(angle) / size)
    t = np.arange(size, dtype=np.float32) - size / 2
    along = t[None] * cos + t[:, None] * sin
    across = t[:, None] * cos - t[None] * sin
    shade = _pattern(rng, kind, along, across)
    if shift:
        shade = shade * _texture(rng, across, along)
    shade = shade * (1 + 0.05 * _smooth_noise(rng, size, 12))
    return base[:, None, None] * shade[None]


def _place(rng: Generator, name: str, size: int, light: Point) -> Piece:
    """A thing of a random size and pose. ``light``: the direction to the light, (x, y)."""
    radius = size * rng.uniform(SMALLEST, LARGEST)
    cx, cy = rng.uniform(radius * 0.75, size - radius * 0.75, 2)
    turn = rng.uniform(-0.35, 0.35) if name in UPRIGHT else rng.uniform(-np.pi, np.pi)
    mirror = -1 if rng.random() < 0.5 else 1
    wide, high = rng.uniform(0.8, 1.25, 2)
    shear = rng.uniform(-0.15, 0.15)
    # the columns of this matrix are the object's axes in pixels: scaled, sheared, rotated
    cos, sin = np.cos(turn), np.sin(turn)
    form = radius * np.array([[wide * mirror, shear * high], [0, high]])
    form = np.array([[cos, -sin], [sin, cos]]) @ form
    reach = REACH * np.abs(form).sum(1) + 1
    left, top = (max(int(c - r), 0) for c, r in zip((cx, cy), reach, strict=True))
    right, bottom = (min(int(c + r) + 1, size) for c, r in zip((cx, cy), reach, strict=True))
    back = np.linalg.inv(form).astype(np.float32)
    x = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - cx)
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - cy)
    u, v = back[0, 0] * x + back[0, 1] * y, back[1, 0] * x + back[1, 1] * y
    scale = radius * float(np.sqrt(wide * high))  # pixels per unit
    lu, lv = back @ np.asarray(light) * scale
    inside, rgb = THINGS[name](u, v, Look(rng, 1 / scale, (float(lu), float(lv))))
    return Piece(inside * np.float32(scale), rgb, top, left)


def _arrange(
    rng: Generator, names: Sequence[str], ids: Sequence[int], size: int, light: Point
) -> tuple[list[Piece], Array]:
    """Objects in their places, back to front, and their mask. Drawn again until none is hidden by
    those in front."""
    while True:
        pieces = [_place(rng, name, size, light) for name in names]
        mask = np.zeros((size, size), np.uint8)
        for piece, value in zip(pieces, ids, strict=True):
            mask[piece.box][piece.inside > 0] = value
        areas = [max(int((piece.inside > 0).sum()), 1) for piece in pieces]
        seen = [int((mask == value).sum()) for value in ids]
        if all(s >= MIN_VISIBLE * a for s, a in zip(seen, areas, strict=True)):
            return pieces, mask


def _cast_shadow(image: Array, piece: Piece, shift: Point, softness: float, depth: float) -> None:
    """Darken the image behind an object: its outline shifted by ``shift`` (x, y) pixels."""
    size = image.shape[1]
    dx, dy = round(shift[0]), round(shift[1])
    h, w = piece.inside.shape
    top, left = max(piece.top + dy, 0), max(piece.left + dx, 0)
    bottom, right = min(piece.top + dy + h, size), min(piece.left + dx + w, size)
    if top >= bottom or left >= right:
        return
    inside = piece.inside[
        top - piece.top - dy : bottom - piece.top - dy,
        left - piece.left - dx : right - piece.left - dx,
    ]
    image[:, top:bottom, left:right] *= 1 - depth * np.clip(inside / softness + 0.5, 0, 1)


def _relief(piece: Piece, light: Point) -> Array:
    """Brightness of an object's rounded edge, [h, w]: higher on the side of the light."""
    dy, dx = np.gradient(piece.inside)
    facing = -(dx * np.float32(light[0]) + dy * np.float32(light[1]))
    return 1 + 0.28 * np.clip(facing, -1, 1) * np.exp(-np.maximum(piece.inside, 0) / 2.5)


def _sensor(rng: Generator, image: Array) -> Array:
    """The domain gap: side light, colour cast, blur and noise; image [3, size, size]."""
    size, angle = image.shape[1], rng.uniform(0, 2 * np.pi)
    t = np.linspace(-1, 1, size, dtype=np.float32)
    side = t[None] * np.float32(np.cos(angle)) + t[:, None] * np.float32(np.sin(angle))
    image = image * (1 + np.float32(rng.uniform(0.15, 0.45)) * side)
    image = image * rng.uniform(0.82, 1.18, 3).astype(np.float32)[:, None, None]
    sigma = rng.uniform(0.5, 1.7)
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    padded = np.pad(image, ((0, 0), (4, 4), (0, 0)), mode="edge")
    image = np.asarray(sum(w * padded[:, k : k + size] for k, w in enumerate(taps)))
    padded = np.pad(image, ((0, 0), (0, 0), (4, 4)), mode="edge")
    image = np.asarray(sum(w * padded[:, :, k : k + size] for k, w in enumerate(taps)))
    noise = rng.standard_normal(image.shape, np.float32)
    return image + np.float32(rng.uniform(0.02, 0.08)) * noise


def article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def caption_of(
    rng: Generator, classes: Sequence[str], background: str, colour: str, light: str
) -> str:
    """A caption that names the objects, the background and the light, in one of several
    wordings."""
    things = [article(c) for c in classes]
    listed = things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
    start = ("a photo of ", "", "a picture of ")[rng.integers(3)]
    where = (" on a ", ", ")[rng.integers(2)] + f"{background} {colour} background"
    return start + listed + where + (" in ", ", ")[rng.integers(2)] + f"{light} light"


def scene(domain: str, split: str, index: int, seed: int = 0, size: int = SIZE) -> Scene:
    """Scene ``index`` of a split: the same arguments give the same pixels with the same numpy on
    the same kind of machine.

    Raises ValueError for an unknown domain or split and for a negative index.
    """
    if domain not in DOMAINS or split not in SPLITS or index < 0:
        raise ValueError(
            f"no scene {domain!r}/{split!r}/{index}; domains {DOMAINS}, splits {SPLITS}, index >= 0"
        )
    rng = np.random.default_rng([seed, DOMAINS.index(domain), SPLITS.index(split), index])
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
    light = LIGHTS[rng.integers(len(LIGHTS))]
    order = rng.permutation(len(NAMES))[: rng.choice([1, 2, 3], p=[0.35, 0.4, 0.25])]
    classes = tuple(NAMES[i] for i in order)
    shift = domain == "shapes_shift"
    above = rng.uniform(-0.8 * np.pi, -0.2 * np.pi)  # the light comes from above, left or right
    to_light = (float(np.cos(above)), float(np.sin(above)))
    pieces, mask = _arrange(rng, classes, [int(i) + 1 for i in order], size, to_light)
    image = _background(rng, background, colour, size, shift)
    length, softness = size * rng.uniform(0.02, 0.05), size * rng.uniform(0.012, 0.04)
    depth = rng.uniform(0.25, 0.55)
    for piece in pieces:
        _cast_shadow(image, piece, (-length * to_light[0], -length * to_light[1]), softness, depth)
        alpha = np.clip(piece.inside + 0.5, 0, 1)
        under = image[:, *piece.box]
        under += (piece.rgb * _relief(piece, to_light) - under) * alpha
    image *= np.float32(LIGHT_GAIN[light] * rng.uniform(0.94, 1.06))
    if shift:
        image = _sensor(rng, image)
    else:
        image += np.float32(0.008) * rng.standard_normal(image.shape, np.float32)
    # brightness above 0.75 is compressed, so that bright light keeps some structure
    image = np.where(image > 0.75, 1 - 0.0625 / np.maximum(image - 0.5, 0.25), image)
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    caption = caption_of(rng, classes, background, colour, light)
    return Scene(np.ascontiguousarray(pixels), mask, caption, classes, background, colour, light)
