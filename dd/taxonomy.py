"""Classes and their colours: the vocabulary shared by prompts, masks, segmenters and metrics."""

from dataclasses import dataclass, field

BACKGROUND = "background"
IGNORE = 255  # "uncertain" in a mask: no loss, no score

# Words the paper uses for the VOC classes (its prompts say "dining table", not "diningtable").
VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
SHAPES_NAMES = ("apple", "banana", "leaf", "brick", "tire", "gold ring", "heart", "pine tree")


@dataclass(frozen=True)
class Taxonomy:
    """Object classes in mask order: class ``i`` of ``names`` is pixel value ``i + 1``, background is 0, ignored is 255.

    Raises ValueError for an empty or repeated name and for more than 254 classes (PNG masks hold one byte).
    """

    name: str
    names: tuple[str, ...]
    all_names: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or any(not n.strip() for n in self.names):
            raise ValueError(f"taxonomy {self.name!r}: got an empty list of classes or an empty class name")
        if len(set(self.names)) != len(self.names):
            twice = sorted({n for n in self.names if self.names.count(n) > 1})
            raise ValueError(f"taxonomy {self.name!r}: class names must be unique, got {twice} more than once")
        if BACKGROUND in self.names:
            raise ValueError(f"taxonomy {self.name!r}: {BACKGROUND!r} is always class 0; leave it out of the names")
        if len(self.names) > 254:
            raise ValueError(f"taxonomy {self.name!r}: got {len(self.names)} classes, a mask holds at most 254")
        object.__setattr__(self, "all_names", (BACKGROUND, *self.names))

    def __len__(self) -> int:
        """Number of segmenter outputs, background included."""
        return len(self.all_names)

    def ids(self, names) -> list[int]:
        """Pixel values of class names, in the order given. ValueError names the unknown ones and the allowed ones."""
        unknown = [n for n in names if n not in self.names]
        if unknown:
            raise ValueError(f"unknown class {unknown} in taxonomy {self.name!r}; allowed: {', '.join(self.names)}")
        return [self.all_names.index(n) for n in names]


TAXONOMIES = {t.name: t for t in (Taxonomy("voc", VOC_NAMES), Taxonomy("shapes", SHAPES_NAMES))}


def taxonomy(name: str) -> Taxonomy:
    """A built-in taxonomy by name."""
    if name not in TAXONOMIES:
        raise ValueError(f"unknown taxonomy {name!r}; allowed: {', '.join(TAXONOMIES)}")
    return TAXONOMIES[name]


def voc_palette(n: int = 256) -> list[int]:
    """The PASCAL VOC colour map as a flat list ``[r, g, b] * n``: colours from the bits of the id (VOC devkit)."""
    flat = []
    for i in range(n):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((i >> (3 * bit + channel)) & 1) << (7 - bit)
        flat += rgb
    return flat
