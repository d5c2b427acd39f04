"""Finds class names in captions: nouns -> classes through the synonyms of a taxonomy and their
plurals.

Words are compared by spelling: without a tagger, "men train in a gym" names a train. Phrases that
contain a class word but mean something else (a hot dog) are given as ``other_meanings``.
"""

import re
from collections.abc import Iterable

from dd.taxonomy import Taxonomy

IRREGULAR = {
    "man": ("men",),
    "person": ("people", "persons"),
    "child": ("children",),
    "ox": ("oxen",),
    "mouse": ("mice", "mouses"),
    "louse": ("lice",),
    "goose": ("geese",),
    "foot": ("feet",),
    "tooth": ("teeth",),
    "die": ("dice",),
}
# also matches policeman, but not human
LIKE_MAN = re.compile(r"(?<!hu)(?<!ger)(?<!ro)(?<!otto)(?<!sha)(?<!talis)(?<!cai)man$")
TO_VES = (
    "knife",
    "leaf",
    "loaf",
    "wolf",
    "calf",
    "shelf",
    "half",
    "wife",
    "life",
    "scarf",
    "hoof",
    "thief",
    "elf",
)
TO_OES = (
    "potato",
    "tomato",
    "buffalo",
    "mosquito",
    "mango",
    "volcano",
    "torpedo",
    "cargo",
    "hero",
    "domino",
)
SAME = (
    "sheep",
    "deer",
    "fish",
    "moose",
    "bison",
    "salmon",
    "aircraft",
    "spacecraft",
    "hovercraft",
    "series",
    "species",
)
PLURAL_ONLY = (
    "skis",
    "scissors",
    "people",
    "cattle",
    "stairs",
    "trousers",
    "jeans",
    "shorts",
    "goggles",
    "tongs",
    "pliers",
    "headphones",
    "police",
)
NUMBERS = ("couple of",)  # "a couple of dogs" does not name a couple
SINGULAR = (  # singular words that end like plurals
    "gas",
    "canvas",
    "atlas",
    "lens",
    "bias",
    "alias",
    "pancreas",
    "chaos",
    "cosmos",
    "rhinoceros",
    "asbestos",
    "christmas",
    "news",
    "specimen",
    "regimen",
    "abdomen",
    "omen",
    "stamen",
    "acumen",
    "semen",
    "lumen",
    "bitumen",
    "ramen",
    "cyclamen",
)
# phrases that contain a class word of VOC but name no class
OTHER_MEANINGS = ("hot dog", "power plant", "screen door", "table tennis")
SEPARATOR = r"[\s_-]+"  # "dining-table" and "dining_table" are "dining table"


def plurals(noun: str) -> tuple[str, ...]:
    """Plural forms of an English noun, the usual one first. In a name of several words the last
    word is inflected."""
    *before, word = re.split(r"(?<=[\s_-])(?=[^\s_-])", noun)
    head, low = "".join(before), word.lower()
    forms: tuple[str, ...]
    if low in SAME or is_plural(low):
        forms = (word,)
    elif low in IRREGULAR:
        forms = IRREGULAR[low]
    elif LIKE_MAN.search(low):
        forms = (word[:-2] + "en",)
    elif low.endswith(TO_VES):
        forms = (re.sub("fe?$", "ves", word), word + "s")
    elif low.endswith(TO_OES):
        forms = (word + "es", word + "s")
    elif re.search("[^aeiou]y$", low):
        forms = (word[:-1] + "ies",)
    elif re.search("(s|x|z|ch|sh)$", low):
        forms = (word + "es", word + "ses") if low in ("bus", "gas") else (word + "es",)
    else:
        forms = (word + "s",)
    return tuple(head + form for form in forms)


def is_plural(noun: str) -> bool:
    """Whether an English noun is a plural, judged by its last word: scratches, knives, men; not
    lens, bus."""
    word = re.split(r"[\s_-]+", noun.strip().lower())[-1]
    if word in SAME or word in SINGULAR:
        return False
    if word in PLURAL_ONLY or any(word in forms for forms in IRREGULAR.values()):
        return True
    return len(word) > 3 and bool(re.search(r"men$|[^siu]s$", word))


class ClassNouns:
    """``find(caption)``: the classes of a taxonomy that a caption names, in caption order, each
    once; ``mentions(caption)``: as often as it names them.

    Names, synonyms and their plurals match as whole words in any case, the longest first: in "a
    train car" the synonym "train car" hides "car". ``other_meanings``: phrases that name no class,
    matched in the same way. ValueError if such a phrase is a class's own word.
    """

    def __init__(self, taxonomy: Taxonomy, other_meanings: Iterable[str] = ()) -> None:
        own = {_spelling(word): name for word, name in taxonomy.words.items()}
        self.classes: dict[str, str | None] = dict.fromkeys(NUMBERS) | own
        for phrase in other_meanings:
            if _spelling(phrase) in own:
                raise ValueError(
                    f"other_meanings: {phrase!r} is a word of class {own[_spelling(phrase)]!r} "
                    f"of taxonomy {taxonomy.name!r}; remove it from one of them"
                )
            self.classes |= dict.fromkeys(map(_spelling, (phrase, *plurals(phrase))))
        for word, name in own.items():  # a name that is another's plural keeps its own class
            for form in plurals(word):
                self.classes.setdefault(_spelling(form), name)
        words = sorted(self.classes, key=len, reverse=True)
        either = "|".join(re.escape(w).replace(r"\ ", SEPARATOR) for w in words)
        # no part of "man-made" matches
        self._words = re.compile(rf"(?<!\w)(?<!\w-)(?:{either})(?!-?\w)", re.IGNORECASE)

    def find(self, caption: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.mentions(caption)))

    def mentions(self, caption: str) -> tuple[str, ...]:
        found = (self.classes[_spelling(match.group())] for match in self._words.finditer(caption))
        return tuple(name for name in found if name is not None)


def _spelling(word: str) -> str:
    return re.sub(SEPARATOR, " ", word.strip()).lower()
