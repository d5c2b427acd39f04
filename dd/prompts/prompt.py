"""Prompts: a caption, its classes, appended class words, and where the class words are among the
tokens.

Dataset Diffusion, section on text prompts: ``"<caption>; <class> <class> ..."``, and a class prompt
of the class words alone.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dd.prompts.nouns import OTHER_MEANINGS, SEPARATOR, plurals
from dd.store.names import is_text
from dd.taxonomy import TAXONOMIES, Taxonomy


@dataclass(frozen=True)
class Prompt:
    """The image is generated from ``text``; the attention is read with ``class_prompt``.

    ``classes`` in prompt order, without repeats. This is the order of the words in
    ``class_prompt``, which may hold a class more than once (:func:`class_words`).
    """

    text: str
    class_prompt: str
    classes: tuple[str, ...]


class Prompts(list[Prompt]):
    """A list of :class:`Prompt`. ``dropped`` [{"reason", "filename", "caption"}]: captions that
    were left out; ``trimmed``: number of captions that were shortened."""

    def __init__(
        self,
        prompts: Iterable[Prompt] = (),
        dropped: Iterable[dict[str, Any]] = (),
        trimmed: int = 0,
    ) -> None:
        super().__init__(prompts)
        self.dropped, self.trimmed = list(dropped), trimmed


def make_prompt(
    caption: str, classes: Iterable[str], append: bool = True, repeat: bool = False
) -> Prompt:
    """Append the class words to a caption (unless it already ends in them) and make the class
    prompt.

    Repeated classes count once. With ``repeat`` their words are repeated as often as they are given
    ("person person sofa", as in the authors' prompts). ValueError for an empty caption, one that
    files cannot hold, or a prompt without classes.
    """
    mentions = list(classes)
    caption, names = caption.strip(), tuple(dict.fromkeys(mentions))
    if not caption or not names:
        raise ValueError(
            "a prompt needs a caption and at least one class, "
            f"got caption {caption!r}, classes {names}"
        )
    if not is_text(caption):
        raise ValueError(
            f"caption {caption!r:.200}: expected text without NUL and unpaired surrogates"
        )
    words = " ".join(mentions if repeat else names)
    head, semicolon, tail = caption.rpartition(";")
    appended = bool(semicolon) and set(tail.split()) == set(words.split())
    if append:
        return Prompt(caption if appended else f"{caption}; {words}", words, names)
    return Prompt(head.strip() if appended else caption, words, names)


def class_words(class_prompt: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """``classes``, as often and in the order in which a class prompt names them. ``classes``
    unchanged if it holds other words or has them in another order."""
    either = "|".join(map(re.escape, sorted(classes, key=len, reverse=True)))
    found = tuple(re.findall(rf"(?<!\S)(?:{either})(?!\S)", class_prompt))
    whole = " ".join(found) == class_prompt and tuple(dict.fromkeys(found)) == tuple(classes)
    return found if whole else classes


def find_words(
    text: str, classes: Sequence[str], start: int = 0, stop: int | None = None
) -> list[tuple[int, int]]:
    """Character span of each class name in ``text[start:stop]``; a name may be given more than
    once.

    If that text consists of the class words alone, they are counted off. Otherwise a class is at
    the first place where its name or plural is a whole word. Names match as in
    :class:`dd.prompts.nouns.ClassNouns`, the longest first, so that no class is found inside the
    name of another ("dog" in "hot dog"): one of ``classes``, of a built-in vocabulary, or a phrase
    with another meaning (OTHER_MEANINGS). A class that occurs only inside these is found there.
    ValueError names the classes that the text does not hold.
    """
    stop = len(text) if stop is None else stop
    if text[start:stop] == " ".join(classes):
        ends = [start + len(" ".join(classes[: i + 1])) for i in range(len(classes))]
        return [(end - len(name), end) for name, end in zip(classes, ends, strict=True)]
    found: dict[str | None, tuple[int, int]] = {}
    for hidden in (_phrases(), ()):
        if found.keys() >= set(classes):
            break
        names, words = _finder(tuple(classes), hidden)
        for match in words.finditer(text[:stop], start):
            found.setdefault(names[(match.lastindex or 0) - 1], match.span())
    if missing := [name for name in classes if name not in found]:
        raise ValueError(
            f"class {missing} is missing from its prompt {text[start:stop]!r}. "
            "Name the class in the caption. Or have class words appended (prompts.append=true) "
            "and, of the full prompt, read only these (diffusion.full_prompt=appended)"
        )
    return [found[name] for name in classes]


@lru_cache(maxsize=1)
def _phrases() -> tuple[str, ...]:
    """Phrases that may contain a class word: names of several words, and other meanings."""
    names = [name for known in TAXONOMIES.values() for name in known.names]
    return tuple(dict.fromkeys(name for name in (*names, *OTHER_MEANINGS) if " " in name))


@lru_cache(maxsize=1024)
def _finder(
    classes: tuple[str, ...], hidden: tuple[str, ...] = ()
) -> tuple[list[str | None], re.Pattern[str]]:
    """(class of each group, pattern). The pattern has a group for each name and plural, the longest
    first; ``hidden`` phrases have the class None."""
    forms: dict[str, str | None] = {
        " ".join(re.split(SEPARATOR, name)).lower(): name for name in classes
    }
    for name in classes:  # a name that is another's plural keeps its own class
        for form in plurals(name):
            forms.setdefault(" ".join(re.split(SEPARATOR, form)).lower(), name)
    for phrase in hidden:
        for form in (phrase, *plurals(phrase)):
            forms.setdefault(form.lower(), None)
    longest = sorted(forms, key=len, reverse=True)
    either = "|".join(f"({SEPARATOR.join(map(re.escape, form.split(' ')))})" for form in longest)
    pattern = re.compile(rf"(?<!\w)(?<!\w-)(?:{either})(?!-?\w)", re.IGNORECASE)
    return [forms[form] for form in longest], pattern


def token_spans(
    text: str,
    classes: Sequence[str],
    offsets: Sequence[tuple[int, int]],
    start: int = 0,
    stop: int | None = None,
) -> list[list[int]]:
    """Token positions of each class, from the tokenizer's character ``offsets`` [(begin, end), ...]
    of ``text`` (empty spans are special tokens); the words are those of :func:`find_words`.
    Handles names of several words and words of several tokens. A class that is given more than once
    has one list, with the tokens of all its words.

    ValueError if a class word was cut off by the tokenizer's length limit.
    """
    spans: dict[str, list[int]] = {name: [] for name in classes}
    for name, (begin, end) in zip(classes, find_words(text, classes, start, stop), strict=True):
        inside = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > begin]
        if not inside or max(offsets[i][1] for i in inside) < end:
            raise ValueError(
                f"class {name!r} is cut off: the prompt {text!r} is longer than "
                f"the text encoder's {len(offsets)} tokens. Shorten the caption"
            )
        spans[name] += [i for i in inside if i not in spans[name]]
    return list(spans.values())


def appended_from(text: str, class_prompt: str) -> int:
    """Where the appended class words begin in a prompt; 0 if none were appended."""
    head, separator, tail = text.rpartition("; ")
    appended = bool(separator) and set(tail.split()) == set(class_prompt.split())
    return len(head + separator) if appended else 0


def word_places(text: str, class_prompt: str) -> dict[str, tuple[int, int]]:
    """Where the parts of a prompt are: ``caption`` (begin, end) and, if class words were appended,
    ``appended``."""
    start = appended_from(text, class_prompt)
    if not start:
        return {"caption": (0, len(text))}
    return {"appended": (start, len(text)), "caption": (0, start - len("; "))}


def check_classes(prompts: list[Prompt], taxonomy: Taxonomy) -> list[Prompt]:
    """All prompts, unchanged; ValueError for none at all or for a class outside the taxonomy."""
    if not prompts:
        raise ValueError("no prompts: the prompt file or template list is empty")
    for i, prompt in enumerate(prompts):
        unknown = [c for c in prompt.classes if c not in taxonomy.names]
        if unknown:
            raise ValueError(
                f"prompt {i} ({prompt.text!r}): unknown class {unknown}; taxonomy "
                f"{taxonomy.name!r} allows: " + ", ".join(taxonomy.names)
            )
    return prompts


def split_class_prompt(words: str, taxonomy: Taxonomy) -> list[str]:
    """Class names of a class prompt such as ``"person dining table"``, matching the longest name
    first. ValueError for a word that does not begin a class."""
    tokens, found, i = words.split(), [], 0
    names = sorted((n.split() for n in taxonomy.names), key=len, reverse=True)
    while i < len(tokens):
        match = next((n for n in names if tokens[i : i + len(n)] == n), None)
        if match is None:
            raise ValueError(
                f"unknown class at {' '.join(tokens[i:])!r}; allowed: {', '.join(taxonomy.names)}"
            )
        found.append(" ".join(match))
        i += len(match)
    return found


def repeats(captions: list[tuple[str, ...]], at_least: int) -> list[int]:
    """How often each caption, given by its classes, is repeated so that each class has ``at_least``
    prompts.

    The paper's balancing: ``max over its classes k of ceil(at_least / n_k)``, n_k = number of
    captions with class k.
    """
    number = Counter(name for classes in captions for name in set(classes))
    return [max(-(-at_least // number[name]) for name in classes) for classes in captions]


def trim_caption(prompt: Prompt, fits: Callable[[str], bool]) -> Prompt | None:
    """The prompt with words removed from the end of its caption until ``fits(text)``; appended
    class words stay.

    None if even one word of caption is too much, or if a class that only the caption names would be
    lost.
    """
    end = word_places(prompt.text, prompt.class_prompt)["caption"][1]
    caption, appended = prompt.text[:end], prompt.text[end:]
    kept = [] if appended else [name for name in prompt.classes if _names(caption, name)]
    whole = [span for name in prompt.classes for span in _mentions(caption, name)]
    for end in reversed([word.end() for word in re.finditer(r"\S+", caption)][:-1]):
        if any(begin < end < stop for begin, stop in whole):  # between the words of a class name
            continue
        shorter = caption[:end].rstrip(" ,;:-")
        if not shorter or not all(_names(shorter, name) for name in kept):
            return None
        if fits(shorter + appended):
            return Prompt(shorter + appended, prompt.class_prompt, prompt.classes)
    return None


def _mentions(text: str, name: str) -> list[tuple[int, int]]:
    """Spans of a class name in a caption, its plural too."""
    words = SEPARATOR.join(map(re.escape, name.split()))
    return [m.span() for m in re.finditer(rf"(?<!\w){words}\w*", text, re.IGNORECASE)]


def _names(text: str, name: str) -> bool:
    try:
        return bool(find_words(text, [name]))
    except ValueError:
        return False
