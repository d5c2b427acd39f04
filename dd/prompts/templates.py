"""Prompts from templates over the class list, every class equally often, with the conditions of
a site."""

import re
from collections import Counter
from collections.abc import Mapping
from string import Formatter

import numpy as np

from dd.prompts.groups import read_groups
from dd.prompts.nouns import is_plural, plurals
from dd.prompts.prompt import Prompts, check_classes, make_prompt

NUMBER_WORDS = dict(
    enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], 2)
)


class TemplatePrompts:
    """Prompts from templates over the class list, every class equally often.

    ``templates`` hold ``{things}`` and any name of ``conditions`` ({name: list of words});
    ``counts`` are the relative weights of prompts with 1, 2, 3 ... different classes. ``groups``:
    only classes that occur together share a prompt (:func:`dd.prompts.groups.read_groups`); a
    prompt has fewer classes where equal numbers ask for it. ``amounts``: how many of each thing,
    drawn from this list of numbers or words (2: "two apples", "several": "several apples").
    ``materials``: {class: adjectives}, one is drawn for each thing of the class. ``plural_names``:
    {class: plural} where the rules of English (:func:`dd.prompts.nouns.plurals`) are wrong.
    ``article``: a single thing has "a" or "an". ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        templates: list[str],
        conditions: Mapping[str, list[str]],
        counts: list[float],
        append: bool = True,
        groups: list[list[str]] | str | None = None,
        amounts: list[int | str] | None = None,
        materials: Mapping[str, list[str]] | None = None,
        plural_names: Mapping[str, str] | None = None,
        article: bool = True,
    ):
        if not templates or not counts:
            raise ValueError("prompts: templates and counts must not be empty")
        if min(counts) < 0 or not sum(counts):
            raise ValueError(f"prompts.counts={list(counts)}: weights of 0 or more, not all 0")
        for part, lists in (("conditions", conditions), ("materials", materials or {})):
            for name, words in lists.items():
                if (
                    not isinstance(words, list | tuple)
                    or not words
                    or any(not isinstance(word, str) for word in words)
                ):
                    raise ValueError(
                        f"prompts.{part}.{name}: a list of words is needed (on, off, yes, no in "
                        f"quotes), got {words!r:.100}"
                    )
        for amount in amounts or []:
            if isinstance(amount, bool) or not (
                amount.strip() if isinstance(amount, str) else amount in range(1, 1000)
            ):
                raise ValueError(
                    "prompts.amounts: whole numbers from 1 on, or words such as several; got "
                    f"{amount!r}"
                )
        for template in templates:
            _check_template(template, conditions)
        self.templates, self.conditions, self.counts, self.append = (
            templates,
            conditions,
            counts,
            append,
        )
        self.groups, self.amounts, self.article = groups, amounts, article
        self.materials, self.plural_names = materials or {}, plural_names or {}

    def __call__(self, taxonomy, number: int | None, seed: int) -> Prompts:
        if not number:
            raise ValueError("prompts: templates never end; say how many prompts (num_images=...)")
        taxonomy.ids([*self.materials, *self.plural_names])
        rng = np.random.default_rng([seed, 1])
        weights = np.asarray(self.counts, float) / sum(self.counts)
        choose = (
            Deck(taxonomy.names)
            if self.groups is None
            else Groups(taxonomy.names, read_groups(self.groups, taxonomy))
        )
        prompts = []
        for _ in range(number):
            wanted = int(rng.choice(len(weights), p=weights)) + 1
            classes = choose(min(wanted, len(taxonomy.names)), rng)
            things = [self._thing(name, rng) for name in classes]
            listed = enumerated(things)
            words = {
                name: values[rng.integers(len(values))] for name, values in self.conditions.items()
            }
            caption = self.templates[rng.integers(len(self.templates))].format(
                things=listed, **words
            )
            caption = re.sub(r"\s+(?=[,.;])", "", " ".join(caption.split())).strip(
                " ,"
            )  # where a condition is an empty word
            prompts.append(make_prompt(caption, classes, self.append))
        return Prompts(check_classes(prompts, taxonomy))

    def _thing(self, name: str, rng) -> str:
        """ "a gold ring", "two wooden pallets", "several pine trees", "skis"."""
        material = self.materials.get(name)
        adjective = material[rng.integers(len(material))] + " " if material else ""
        amount = self.amounts[rng.integers(len(self.amounts))] if self.amounts else 1
        if amount != 1:
            return (
                f"{NUMBER_WORDS.get(amount, amount)} "
                f"{adjective}{self.plural_names.get(name) or plurals(name)[0]}"
            )
        return indefinite(adjective + name) if self.article else adjective + name


def indefinite(noun: str) -> str:
    """ "an apple", "a wooden pallet", "skis", "scratches"."""
    if is_plural(noun):
        return noun
    return ("an " if noun.lstrip()[0].lower() in "aeiou" else "a ") + noun.lstrip()


def enumerated(things: list[str]) -> str:
    """ "an apple, a leaf and a tire"."""
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


def _check_template(template: str, conditions) -> None:
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
    """``choose(wanted, rng)``: classes from a shuffled deck, so that all are drawn equally
    often."""

    def __init__(self, names):
        self.names, self.deck = names, []

    def __call__(self, wanted: int, rng) -> list[str]:
        classes = []
        while len(classes) < wanted:
            name = next((n for n in self.deck if n not in classes), None)
            if name is None:
                self.deck += rng.permutation(self.names).tolist()
            else:  # a name that this prompt has already stays in the deck for the next one
                self.deck.remove(name)
                classes.append(name)
        return classes


class Groups:
    """``choose(wanted, rng)``: up to ``wanted`` classes that stand together in a group, drawn by
    its weight.

    The first is a class that was drawn least often, others only if no more than once ahead of it:
    how often any two classes were drawn differs by at most 2.
    """

    def __init__(self, names, groups: Counter):
        self.names, self.groups, self.drawn, self._partners = list(names), groups, Counter(), {}

    def __call__(self, wanted: int, rng) -> list[str]:
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

    def _together(self, chosen: frozenset) -> list[tuple[str, int]]:
        """[(class, weight)] of the classes that share a group with all of ``chosen``, in the
        taxonomy's order."""
        if chosen not in self._partners:
            weights = Counter()
            for group, weight in self.groups.items():
                if chosen < group:
                    weights.update(dict.fromkeys(group - chosen, weight))
            self._partners[chosen] = [(name, weights[name]) for name in self.names if weights[name]]
        return self._partners[chosen]
