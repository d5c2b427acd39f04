"""What the pixels of a mask file mean: class ids by their values, or by their colours."""

import numpy as np
from PIL import Image

from dd.taxonomy import BACKGROUND, IGNORE, Taxonomy


def check_colours(image: Image.Image, mask: np.ndarray, taxonomy: Taxonomy, path) -> None:
    """ValueError if the colours of ``image`` name other classes than its values, ``mask`` [H, W].

    Tools that make PNGs small sort the entries of a palette anew, and so lose ids. A palette speaks
    where all of its entries in use have colours of the taxonomy; a grey value where the taxonomy
    gives its colour to an object. Else values are ids, whatever the colours.
    """
    palette = image.getpalette() if image.mode == "P" else [v for v in range(256) for _ in range(3)]
    colours = {v: tuple(palette[3 * v : 3 * v + 3]) for v in np.unique(mask).tolist()}
    if all(colour == (v, v, v) for v, colour in colours.items()):
        given = {tuple(c): k for k, c in (taxonomy.colours or {}).items() if k != BACKGROUND}
        told = {v: _id(taxonomy, given[c]) for v, c in colours.items() if c in given}
    else:
        ids = (*range(len(taxonomy)), IGNORE)
        known = {tuple(taxonomy.palette[3 * i : 3 * i + 3]): i for i in ids}
        speaks = all(colour in known for colour in colours.values())
        told = {v: known[c] for v, c in colours.items()} if speaks else {}
    wrong = [v for v, i in told.items() if i != v]
    if wrong:
        shown = "; ".join(
            f"value {v} is {_name(taxonomy, v)}, its colour {list(colours[v])} {_name(taxonomy, told[v])}" for v in wrong[:3]
        )
        raise ValueError(
            f"mask {path}: values and colours name different classes: {shown}. Save it in grey if "
            "its values are the ids, in RGB if its colours are right (python -m dd prepare own "
            "reads both, and its --map VALUE=CLASS says what values mean)"
        )


def _id(taxonomy: Taxonomy, key) -> int:
    return key if key == IGNORE else taxonomy.all_names.index(key)


def _name(taxonomy: Taxonomy, value: int) -> str:
    if value == IGNORE:
        return "ignored"
    return repr(taxonomy.all_names[value]) if value < len(taxonomy) else "no class"
