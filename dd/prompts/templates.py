"""Prompts from templates over the class list, every class equally often, with the conditions of a
site."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from string import Formatter
from typing import Annotated, Any, Self, TypeVar

import numpy as np
from annotated_types import Ge, Le, MinLen
from pydantic import BeforeValidator, model_validator

from dd.prompts.base import Text, Weights
from dd.prompts.groups import Group, read_groups
from dd.prompts.nouns import is_plural, plurals
from dd.prompts.prompt import Prompts, check_classes, make_prompt
from dd.store.settings import Hint, Settings
from dd.taxonomy import Taxonomy

T = TypeVar("T")
NUMBER_WORDS = dict(
    enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], 2)
)


def _word_lists(given: Any) -> Any:
    for name, words in given.items() if isinstance(given, Mapping) else ():
        listed = isinstance(words, list) and words
        if not listed or any(not isinstance(word, str) for word in words):
            raise ValueError(
                f"{name}: a list of words is needed (on, off, yes, no in quotes), "
                f"got {words!r:.100}"
            )
    return given


WordLists = Annotated[dict[str, list[str]], BeforeValidator(_word_lists)]


class TemplateSettings(Settings):
    """What :class:`TemplatePrompts` says."""

    noun = "prompts"
    templates: Annotated[list[str], MinLen(1)]
    conditions: WordLists
    counts: Weights
    append: bool = True
    groups: Annotated[
        list[list[str]] | str | None,
        Hint("a list of lists of class names, or the path of a caption file or folder of masks"),
    ] = None
    amounts: Annotated[
        list[Annotated[int, Ge(1), Le(999)] | Text] | None, Hint("such as 2 or several")
    ] = None
    materials: WordLists | None = None
    plural_names: dict[str, str] | None = None
    article: bool = True

    @model_validator(mode="after")
    def _templates_ask_for_what_is_there(self) -> Self:
        for template in self.templates:
            _check_template(template, self.conditions)
        return self


class TemplatePrompts:
    """Prompts from templates over the class list, every class equally often.

    ``templates`` hold ``{things}`` and any name of ``conditions`` ({name: list of words});
    ``counts`` are the relative weights of prompts with 1, 2, 3 ... different classes. ``groups``:
    only classes that occur together share a prompt (:func:`dd.prompts.groups.read_groups`); a
    prompt has fewer classes if equal counts require it. ``amounts``: number of each object, drawn
    from this list of numbers or words (2: "two apples", "several": "several apples").
    ``materials``: {class: adjectives}; one is drawn for each object of the class. ``plural_names``:
    {class: plural} where the rules of English (:func:`dd.prompts.nouns.plurals`) are wrong.
    ``article``: a single object has "a" or "an". ValueError for settings that do not fit together.
    """

    Settings = TemplateSettings

    def __init__(self, **settings: Any) -> None:
        self.settings = TemplateSettings(**settings)
        self.append = self.settings.append

    def __call__(self, taxonomy: Taxonomy, number: int | None, seed: int) -> Prompts:
        if not number:
            raise ValueError("prompts: templates never end; say how many prompts (num_images=...)")
        s = self.settings
        taxonomy.ids([*(s.materials or ()), *(s.plural_names or ())])
        rng = np.random.default_rng([seed, 1])
        weights = np.asarray(s.counts, float) / sum(s.counts)
        groups = None if s.groups is None else read_groups(s.groups, taxonomy)
        choose = Deck(taxonomy.names) if groups is None else Groups(taxonomy.names, groups)
        prompts = []
        for _ in range(number):
            wanted = int(rng.choice(len(weights), p=weights)) + 1
            classes = choose(min(wanted, len(taxonomy.names)), rng)
            things = enumerated([self._thing(name, rng) for name in classes])
            words = {name: _one_of(values, rng) for name, values in s.conditions.items()}
            caption = _one_of(s.templates, rng).format(things=things, **words)
            # if a condition is an empty word
            caption = re.sub(r"\s+(?=[,.;])", "", " ".join(caption.split())).strip(" ,")
            prompts.append(make_prompt(caption, classes, self.append))
        return Prompts(check_classes(prompts, taxonomy))

    def _thing(self, name: str, rng: np.random.Generator) -> str:
        """ "a gold ring", "two wooden pallets", "several pine trees", "skis"."""
        s = self.settings
        material = (s.materials or {}).get(name)
        adjective = _one_of(material, rng) + " " if material else ""
        amount = _one_of(s.amounts, rng) if s.amounts else 1
        if amount != 1:
            number = NUMBER_WORDS.get(amount, amount) if isinstance(amount, int) else amount
            return f"{number} {adjective}{(s.plural_names or {}).get(name) or plurals(name)[0]}"
        return indefinite(adjective + name) if s.article else adjective + name


def _one_of(values: Sequence[T], rng: np.random.Generator) -> T:
    return values[int(rng.integers(len(values)))]


def indefinite(noun: str) -> str:
    """ "an apple", "a wooden pallet", "skis", "scratches"."""
    if is_plural(noun):
        return noun
    return ("an " if noun.lstrip()[0].lower() in "aeiou" else "a ") + noun.lstrip()


def enumerated(things: list[str]) -> str:
    """ "an apple, a leaf and a tire"."""
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


def _check_template(template: str, conditions: Collection[str]) -> None:
    known = ", ".join(["things", *conditions])
    try:
        asked = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"prompts: template {template!r}: {error}; known: {known}") from None
    for name in sorted(asked - {"things", *conditions}):
        raise ValueError(f"prompts: template {template!r} asks for {name!r}; known: {known}")
    if "things" not in asked:
        raise ValueError(
            f"prompts: template {template!r} names no class; {{things}} stands for the classes"
        )


class Deck:
    """``choose(wanted, rng)``: draws classes from a shuffled deck, so that all are drawn equally
    often."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.deck: list[str] = []

    def __call__(self, wanted: int, rng: np.random.Generator) -> list[str]:
        classes: list[str] = []
        while len(classes) < wanted:
            name = next((n for n in self.deck if n not in classes), None)
            if name is None:
                self.deck += rng.permutation(self.names).tolist()
            else:  # a class that this prompt already has stays in the deck for the next prompt
                self.deck.remove(name)
                classes.append(name)
        return classes


class Groups:
    """``choose(wanted, rng)``: up to ``wanted`` classes that occur together in a group, drawn by
    its weight.

    The first class is one that was drawn least often. Others are added only if they are at most
    once ahead of it: the counts of any two classes differ by at most 2.
    """

    def __init__(self, names: Sequence[str], groups: Counter[Group]) -> None:
        self.names, self.groups, self.drawn = list(names), groups, Counter[str]()
        self._partners: dict[Group, list[tuple[str, int]]] = {}

    def __call__(self, wanted: int, rng: np.random.Generator) -> list[str]:
        least = min(self.drawn[name] for name in self.names)
        first = [name for name in self.names if self.drawn[name] == least]
        classes = [first[rng.integers(len(first))]]
        while len(classes) < wanted:
            due = [
                (n, w) for n, w in self._together(frozenset(classes)) if self.drawn[n] <= least + 1
            ]
            if not due:
                break
            weights = np.array([weight for _, weight in due], float)
            classes.append(due[int(rng.choice(len(due), p=weights / weights.sum()))][0])
        self.drawn.update(classes)
        return classes

    def _together(self, chosen: Group) -> list[tuple[str, int]]:
        """[(class, weight)] of the classes that share a group with all of ``chosen``, in the
        taxonomy's order."""
        if chosen not in self._partners:
            weights = Counter[str]()
            for group, weight in self.groups.items():
                if chosen < group:
                    weights.update(dict.fromkeys(group - chosen, weight))
            self._partners[chosen] = [(name, weights[name]) for name in self.names if weights[name]]
        return self._partners[chosen]
