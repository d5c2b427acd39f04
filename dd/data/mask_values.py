"""The meaning of a mask file's pixels: class ids by their values, or by their colours."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from PIL import Image

from dd.taxonomy import BACKGROUND, IGNORE, Colour, Taxonomy, nth_colour

MODES = ("P", "L", "1", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")  # of whole numbers


def by_value(image: Image.Image, path: object) -> np.ndarray:
    """Ids uint8 [H, W] of a palette or grey image. ValueError for colours, and for numbers above
    255."""
    if image.mode not in MODES:
        raise ValueError(
            f"mask {path} has mode {image.mode}; a mask holds one class id per pixel: "
            "save it in grey of 8 bits or with a palette. "
            "Colours are read by python -m dd prepare own"
        )
    pixels = np.asarray(image)
    if image.mode == "LA":
        _opaque(pixels[..., 1], path)
        pixels = pixels[..., 0]
    if image.mode.startswith("I") and not (pixels.min() >= 0 and pixels.max() <= 255):
        raise ValueError(
            f"mask {path} holds values from {pixels.min()} to {pixels.max()}, "
            "class ids end at 255. Does it number objects (instances)? "
            "Take the masks of classes, or divide the numbers down to the classes' before"
        )
    return pixels.astype(np.uint8)


def by_colour(image: Image.Image, taxonomy: Taxonomy, path: object) -> np.ndarray:
    """Ids uint8 [H, W] of an RGB or RGBA image by the taxonomy's colours. Other colours might mean
    any class: ValueError names them."""
    pixels = np.asarray(image)
    if pixels.shape[2] == 4:
        _opaque(pixels[..., 3], path)
    colours, inverse = colours_of(pixels[..., :3])
    ids = taxonomy.given_colours
    if unknown := [c for c in colours if c not in ids]:
        raise ValueError(
            f"mask {path} has {len(unknown)} colours that taxonomy {taxonomy.name!r} gives to no "
            f"class, such as {[list(c) for c in unknown[:5]]}. "
            f"{_cure(colours, unknown, taxonomy)}"
        )
    return np.array([ids[c] for c in colours], np.uint8)[inverse]


def colours_of(pixels: np.ndarray) -> tuple[list[Colour], np.ndarray]:
    """(the sorted colours of an RGB picture; for each pixel [H, W] the number of its colour)."""
    codes = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    found, inverse = np.unique(codes, return_inverse=True)
    colours = [(c >> 16, c >> 8 & 255, c & 255) for c in found.tolist()]
    return colours, inverse.reshape(codes.shape)


def _cure(colours: list[Colour], unknown: list[Colour], taxonomy: Taxonomy) -> str:
    """What to do about colours without a class."""
    plain = taxonomy.palette
    likely = [n for i, n in enumerate(taxonomy.names, 1) if nth_colour(plain, i) in unknown]
    if all(len(set(c)) == 1 for c in colours):
        return "Its channels are equal: if they are class ids, save one of them, in grey"
    if likely:
        return (
            f"They are VOC's for {', '.join(map(repr, likely[:5]))}, but the taxonomy file "
            "does not say that these masks were drawn so: "
            "write colour: [red, green, blue] beside each class in it"
        )
    return "Give the classes their colours in the taxonomy file"


def _opaque(alpha: np.ndarray, path: object) -> None:
    if (alpha != 255).any():
        raise ValueError(f"mask {path} is transparent in places; a mask must be opaque")


class Renamed:
    """Mask values that mean another class than their number: ``mapping`` {value: class name,
    "background" or "ignore"}.

    Called with ids uint8 [H, W] and the file's name, it returns class ids. ValueError for an
    invalid mapping, and for an unmapped value that is also the target of a mapped one.
    """

    def __init__(self, mapping: Mapping[str, str], taxonomy: Taxonomy) -> None:
        targets = {BACKGROUND: 0, "ignore": IGNORE}
        targets |= {n: i for i, n in enumerate(taxonomy.names, 1)}
        for value, name in mapping.items():
            if not (value.isdecimal() and int(value) < 256):
                raise ValueError(
                    f"map: {value!r} is not a value of a mask; "
                    "expected 0 to 255, as in --map 11=ignore"
                )
            if name not in targets:
                raise ValueError(
                    f"map: class {name!r} is not in the taxonomy; allowed: {', '.join(targets)}"
                )
        self.ids = {int(value): targets[name] for value, name in mapping.items()}
        self.names = taxonomy.all_names
        self.table = np.arange(256, dtype=np.uint8)
        self.table[list(self.ids)] = list(self.ids.values())

    def __call__(self, mask: np.ndarray, path: object) -> np.ndarray:
        taken = {i: v for v, i in self.ids.items() if 0 < i < IGNORE}
        both = [v for v in np.unique(mask).tolist() if v in taken and v not in self.ids]
        if both:
            raise ValueError(
                f"{path} holds value {both[0]}, the place of {self.names[both[0]]!r}, "
                f"to which --map sends {taken[both[0]]}: "
                f"say what {both[0]} means too, as in --map {both[0]}=ignore"
            )
        return self.table[mask]


def check_colours(image: Image.Image, mask: np.ndarray, taxonomy: Taxonomy, path: object) -> None:
    """ValueError if the colours of ``image`` name other classes than its values, ``mask`` [H, W].

    Tools that make PNGs small sort the entries of a palette, and so lose ids. A palette is compared
    if all of its used entries have colours of the taxonomy; a grey value if the taxonomy gives its
    colour to an object. Else values are ids, whatever the colours.
    """
    palette = image.getpalette() if image.mode == "P" else None
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist()
    colours = {
        v: tuple(palette[3 * v : 3 * v + 3]) if palette is not None else (v, v, v) for v in values
    }
    if all(colour == (v, v, v) for v, colour in colours.items()):
        given = {tuple(c): k for k, c in (taxonomy.colours or {}).items() if k != BACKGROUND}
        told = {v: taxonomy.value(given[c]) for v, c in colours.items() if c in given}
    else:
        known = _colours(taxonomy)
        speaks = all(colour in known for colour in colours.values())
        told = {v: known[c] for v, c in colours.items()} if speaks else {}
    if wrong := [v for v, i in told.items() if i != v]:
        shown = "; ".join(
            f"value {v} is {_name(taxonomy, v)}, "
            f"its colour {list(colours[v])} {_name(taxonomy, told[v])}"
            for v in wrong[:3]
        )
        raise ValueError(
            f"mask {path}: values and colours name different classes: {shown}. "
            "Save it in grey if its values are the ids, in RGB if its colours are right "
            "(python -m dd prepare own reads both, "
            "and its --map VALUE=CLASS gives the meaning of values)"
        )


@lru_cache(maxsize=8)
def _colours(taxonomy: Taxonomy) -> dict[tuple[int, ...], int]:
    palette = taxonomy.palette
    return {nth_colour(palette, i): i for i in (*range(len(taxonomy)), IGNORE)}


def _name(taxonomy: Taxonomy, value: int) -> str:
    if value == IGNORE:
        return "ignored"
    return repr(taxonomy.all_names[value]) if value < len(taxonomy) else "no class"
