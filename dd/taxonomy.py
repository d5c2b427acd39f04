"""Classes, their words and colours: the vocabulary shared by prompts, masks, segmenters and
metrics."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dd.store.provenance import fault, read_yaml

BACKGROUND = "background"
IGNORE = 255  # "uncertain" in a mask: no loss, no score

Colour = tuple[int, int, int]

# Words the paper uses for the VOC classes (its prompts say "dining table", not "diningtable").
VOC_NAMES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "dining table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "potted plant",
    "sheep",
    "sofa",
    "train",
    "tv monitor",
)
# Caption nouns for them in the authors' prompt list, read off the published prompts. Which makes of
# car theirs holds is not known; the makes here build almost only cars. Ours: "police car" does not
# name a person.
VOC_SYNONYMS = {
    "aeroplane": ("plane", "jet", "airplane"),
    "bicycle": ("bike",),
    "bird": ("duck", "owl", "parrot", "swan", "pigeon"),
    "boat": ("ship", "canoe", "kayak", "sailboat", "ferry", "police boat"),
    "bus": ("police bus",),
    "car": (
        "van",
        "jeep",
        "suv",
        "police car",
        "police van",
        "audi",
        "cadillac",
        "ferrari",
        "lamborghini",
        "maserati",
        "porsche",
    ),
    "cat": ("kitten",),
    "chair": ("stool",),
    "cow": ("bull", "cattle", "ox"),
    "dining table": ("table",),
    "dog": ("puppy", "pug", "police dog"),
    "horse": ("pony", "police horse"),
    "motorbike": ("motorcycle", "dirt bike", "police motorcycle"),
    "person": (
        "man",
        "woman",
        "people",
        "boy",
        "girl",
        "baby",
        "child",
        "rider",
        "couple",
        "kid",
        "bride",
        "groom",
        "police",
        "cyclist",
    ),
    "potted plant": ("plant", "potted flower"),
    "sheep": ("lamb",),
    "sofa": ("couch",),
    "train": ("tram", "train car"),
    "tv monitor": ("television", "tv", "monitor", "screen"),
}
# The 80 thing categories of COCO 2017 in the order of their ids (1 to 90 with ten gaps).
COCO_NAMES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
OTHER_COLOURS: dict[str | int, str] = {  # further colour keys of a file
    BACKGROUND: "background_colour",
    IGNORE: "ignored_colour",
}
SHAPES_NAMES = (
    "apple",
    "banana",
    "leaf",
    "brick",
    "tire",
    "gold ring",
    "heart",
    "pine tree",
    "mug",
    "jar",
)


@dataclass(frozen=True)
class Taxonomy:
    """Object classes in mask order: class ``i`` of ``names`` is pixel value ``i + 1``, background
    is 0, ignored is 255.

    ``synonyms``: {class: singular nouns that mean it}. ``colours``: {class, "background" or 255:
    (r, g, b)}; a class without one has VOC's. Raises ValueError for an empty or repeated name, for
    more than 254 classes (PNG masks hold one byte), for a word of two classes and for a colour used
    twice.
    """

    name: str
    names: tuple[str, ...]
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict, hash=False)
    colours: Mapping[str | int, Colour] | None = field(default=None, hash=False)
    all_names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if wrong := _wrong_names(self.names):
            raise ValueError(f"taxonomy {self.name!r}: {wrong}")
        object.__setattr__(self, "all_names", (BACKGROUND, *self.names))
        object.__setattr__(self, "synonyms", _synonyms(self))
        object.__setattr__(self, "colours", _colours(self))

    def __len__(self) -> int:
        """Number of segmenter outputs, background included."""
        return len(self.all_names)

    def ids(self, names: Iterable[str | int]) -> list[int]:
        """Pixel values of class names, in the given order. ValueError lists unknown and allowed
        names."""
        names = list(names)
        if unknown := [n for n in names if n not in self.names]:
            raise ValueError(
                f"unknown class {unknown} in taxonomy {self.name!r}; "
                f"allowed: {', '.join(self.names)}"
            )
        return [self.all_names.index(n) for n in names]

    @property
    def words(self) -> dict[str, str]:
        """{lower-case noun: class} of all names and synonyms."""
        return {
            word.lower(): name
            for name in self.names
            for word in (name, *self.synonyms.get(name, ()))
        }

    def find(self, label: object) -> str | None:
        """The class that a label of another program names: a name or synonym, in any Unicode form
        (NFC or NFD), case and spacing of words (``gold_ring``, ``diningtable``). None for no class,
        or if only spacing distinguishes two."""
        keys: tuple[Callable[[object], str], ...] = (_label, lambda t: _label(t).replace(" ", ""))
        for key in keys:
            found = {name for word, name in self.words.items() if key(word) == key(label)}
            if len(found) == 1:
                return found.pop()
        return None

    @property
    def given_colours(self) -> dict[Colour, int]:
        """{colour: id} of the classes with a given colour, and always of background (black) and 255
        (VOC's). The classes of VOC have VOC's."""
        everything = [*range(len(self)), IGNORE]
        given = {0, IGNORE, *map(self.value, self.colours or ())}
        wanted = everything if self.names == VOC_NAMES else [i for i in everything if i in given]
        return {nth_colour(self.palette, i): i for i in wanted}

    def value(self, key: str | int) -> int:
        """The pixel value of a key of ``colours``: a class, "background" or 255."""
        return IGNORE if key == IGNORE else self.all_names.index(str(key))

    @property
    def palette(self) -> list[int]:
        """256 colours as a flat list ``[r, g, b, ...]``: the taxonomy's own over VOC's."""
        flat = voc_palette()
        for key, colour in (self.colours or {}).items():
            i = self.value(key)
            flat[3 * i : 3 * i + 3] = colour
        return flat


def nth_colour(palette: Sequence[int], i: int) -> Colour:
    """Colour ``i`` of a flat list ``[r, g, b, ...]``."""
    return palette[3 * i], palette[3 * i + 1], palette[3 * i + 2]


def _label(text: object) -> str:
    plain = unicodedata.normalize("NFC", str(text)).casefold()
    return re.sub(r"[\s_-]+", " ", plain).strip()


def _wrong_names(names: tuple[str, ...]) -> str | None:
    """What is wrong with the names of classes, None if nothing is."""
    if not names or any(not n.strip() for n in names):
        return "got an empty list of classes or an empty class name"
    number = Counter(n.lower() for n in names)
    if twice := sorted({n for n in names if number[n.lower()] > 1}):
        return f"class names must be unique, got {twice} more than once"
    if reserved := [n for n in names if n.lower() in (BACKGROUND, "_background_", "__ignore__")]:
        return (
            f"{BACKGROUND!r} is always class 0 and ignored pixels are {IGNORE}; "
            f"leave {reserved[0]!r} out of the names"
        )
    if len(names) > 254:
        return f"got {len(names)} classes, a mask holds at most 254"
    return None


def _synonyms(taxonomy: Taxonomy) -> dict[str, tuple[str, ...]]:
    """Checked synonyms. Two classes never share a word, in any spelling."""
    taxonomy.ids(taxonomy.synonyms)
    owner = {name.lower(): name for name in taxonomy.names}
    for name, words in taxonomy.synonyms.items():
        listed = isinstance(words, list | tuple)
        if not listed or any(not isinstance(w, str) or not w.strip() for w in words):
            raise ValueError(
                f"taxonomy {taxonomy.name!r}: synonyms of {name!r} must be a list of words, "
                f"got {words!r}"
            )
        for word in words:
            if (other := owner.setdefault(word.lower(), name)) != name:
                raise ValueError(
                    f"taxonomy {taxonomy.name!r}: the word {word!r} means both {other!r} "
                    f"and {name!r}; remove it from one of them"
                )
    return {name: tuple(words) for name, words in taxonomy.synonyms.items()}


def _colours(taxonomy: Taxonomy) -> dict[str | int, Colour] | None:
    """Checked colours: bytes, all different among the classes, background and 255."""
    if not taxonomy.colours:
        return None
    taxonomy.ids(key for key in taxonomy.colours if key not in (BACKGROUND, IGNORE))
    for key, colour in taxonomy.colours.items():
        if len(colour) != 3 or any(type(c) is not int or not 0 <= c <= 255 for c in colour):
            raise ValueError(
                f"taxonomy {taxonomy.name!r}: colour of {key!r} must be [red, green, blue], "
                f"0 to 255; got {list(colour)}"
            )
    colours = {key: nth_colour(colour, 0) for key, colour in taxonomy.colours.items()}
    voc = voc_palette()
    seen: dict[Colour, str | int] = {}
    keys: tuple[str | int, ...] = (*taxonomy.all_names, IGNORE)
    for key in keys:
        colour = colours.get(key) or nth_colour(voc, taxonomy.value(key))
        if (other := seen.setdefault(colour, key)) != key:
            raise ValueError(
                f"taxonomy {taxonomy.name!r}: {other!r} and {key!r} have the same colour "
                f"{list(colour)} (a class without one has VOC's); give one of them another"
            )
    return colours


TAXONOMIES = {
    t.name: t
    for t in (
        Taxonomy("voc", VOC_NAMES, VOC_SYNONYMS),
        Taxonomy("coco", COCO_NAMES),
        Taxonomy("shapes", SHAPES_NAMES),
    )
}


def taxonomy(name_or_path: str | Path) -> Taxonomy:
    """A built-in taxonomy by name, or one read from a YAML file (:func:`read_taxonomy`)."""
    if str(name_or_path) in TAXONOMIES:
        return TAXONOMIES[str(name_or_path)]
    if Path(name_or_path).suffix in (".yaml", ".yml"):
        return read_taxonomy(name_or_path)
    raise ValueError(
        f"unknown taxonomy {str(name_or_path)!r}; "
        f"allowed: {', '.join(TAXONOMIES)}, or the path of a YAML file"
    )


def read_taxonomy(path: str | Path) -> Taxonomy:
    """``name`` and ``classes`` (names, or mappings of name, synonyms, colour) of a YAML file.

    ``background_colour`` and ``ignored_colour`` are optional. FileNotFoundError, or ValueError with
    the file and what was expected.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no taxonomy file {path} (from {Path.cwd()}): docs/data.md shows one; "
            "python -m dd prepare own --taxonomy copies yours to the data set, "
            "which data_root=... and data.name=... then find"
        )
    content = read_yaml(path)
    if fault(content, {"name": str, "classes": list}):
        raise ValueError(
            f"{path}: a taxonomy has the keys name (text) and classes (a list); "
            "docs/data.md shows one"
        )
    _allow(path, "the file", content, ("name", "classes", *OTHER_COLOURS.values()))
    classes = [row if isinstance(row, dict) else {"name": row} for row in content["classes"]]
    for row in classes:
        _allow(path, f"class {row.get('name')!r}", row, ("name", "synonyms", "colour"))
        if not isinstance(row.get("name"), str):
            raise ValueError(
                f"{path}: a class name must be text, got {row.get('name')!r} "
                "(put yes, no, on, off, 1 in quotes)"
            )
    colours = {row["name"]: row["colour"] for row in classes if row.get("colour") is not None}
    colours |= {k: content[key] for k, key in OTHER_COLOURS.items() if key in content}
    if wrong := [key for key, colour in colours.items() if not isinstance(colour, list)]:
        raise ValueError(
            f"{path}: colour of {wrong[0]!r} must be a list [red, green, blue], "
            f"got {colours[wrong[0]]!r}"
        )
    synonyms = {row["name"]: row["synonyms"] for row in classes if row.get("synonyms")}
    names = tuple(row["name"] for row in classes)
    try:
        return Taxonomy(content["name"], names, synonyms, colours or None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def taxonomy_yaml(taxonomy: Taxonomy) -> str:
    """The text of a file from which :func:`read_taxonomy` reads an equal taxonomy."""
    colours = {key: list(colour) for key, colour in (taxonomy.colours or {}).items()}
    given = [(n, list(taxonomy.synonyms.get(n, ())), colours.get(n)) for n in taxonomy.names]
    rows = [{"name": n, "synonyms": words, "colour": colour} for n, words, colour in given]
    classes = [{k: v for k, v in row.items() if v} for row in rows]
    others = {key: colours[k] for k, key in OTHER_COLOURS.items() if k in colours}
    content = {"name": taxonomy.name, "classes": classes, **others}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _allow(path: str | Path, where: str, mapping: Mapping[str, Any], keys: Collection[str]) -> None:
    if unknown := [k for k in mapping if k not in keys]:
        raise ValueError(
            f"{path}: unknown key {unknown[0]!r} in {where}; allowed: {', '.join(keys)}"
        )


def voc_palette(n: int = 256) -> list[int]:
    """The PASCAL VOC colour map as a flat list ``[r, g, b] * n``: colours from the bits of the
    id (VOC devkit)."""
    flat = []
    for i in range(n):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((i >> (3 * bit + channel)) & 1) << (7 - bit)
        flat += rgb
    return flat
