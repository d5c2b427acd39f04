"""Prompts: a caption, its classes, class-prompt appending, and where the class words stand in the tokens.

Dataset Diffusion, section on text prompts: ``"<caption>; <class> <class> ..."`` beside a class prompt of the class words
alone.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """``text`` is what the image is generated from, ``class_prompt`` what the attention is read with.

    ``classes`` in prompt order, without repeats: the order of the words in ``class_prompt``.
    """

    text: str
    class_prompt: str
    classes: tuple[str, ...]


def make_prompt(caption: str, classes, append: bool = True) -> Prompt:
    """Append the class words to a caption (unless it ends in them already) and make the class prompt.

    Repeated classes count once. ValueError for an empty caption or a prompt without classes.
    """
    caption, classes = caption.strip(), tuple(dict.fromkeys(classes))
    if not caption or not classes:
        raise ValueError(f"a prompt needs a caption and at least one class, got caption {caption!r}, classes {classes}")
    words = " ".join(classes)
    head, semicolon, tail = caption.rpartition(";")
    appended = bool(semicolon) and set(tail.split()) == set(words.split())
    if append:
        return Prompt(caption if appended else f"{caption}; {words}", words, classes)
    return Prompt(head.strip() if appended else caption, words, classes)


def find_words(text: str, classes, start: int = 0) -> list[tuple[int, int]]:
    """Character span of each class name in ``text``, searched as whole words from ``start`` on, each after the one
    before it when possible. ValueError names the classes that the text does not hold."""
    spans, missing, position = [], [], start
    for name in classes:
        word = re.compile(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", re.IGNORECASE)
        found = word.search(text, position) or word.search(text, start)
        if found is None:
            missing.append(name)
            continue
        position = found.end()
        spans.append(found.span())
    if missing:
        raise ValueError(
            f"class {missing} is missing from its prompt {text!r}. Append the class words (prompts.append=true), or name "
            "the class in the caption"
        )
    return spans


def token_spans(text: str, classes, offsets, start: int = 0) -> list[list[int]]:
    """Token positions of each class, from the tokenizer's own character ``offsets`` [(begin, end), ...] of ``text`` (empty
    spans are special tokens). Handles names of several words and words of several tokens.

    ValueError if a class word was cut off by the tokenizer's length limit.
    """
    spans = []
    for name, (begin, end) in zip(classes, find_words(text, classes, start), strict=True):
        inside = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > begin]
        if not inside or max(offsets[i][1] for i in inside) < end:
            raise ValueError(
                f"class {name!r} is cut off: the prompt {text!r} is longer than the text encoder's {len(offsets)} tokens. "
                "Shorten the caption"
            )
        spans.append(inside)
    return spans


def appended_from(text: str, class_prompt: str) -> int:
    """Where the appended class words begin in a prompt, 0 if they were not appended."""
    head, separator, tail = text.rpartition("; ")
    return len(head + separator) if separator and set(tail.split()) == set(class_prompt.split()) else 0


def check_classes(prompts: list[Prompt], taxonomy) -> list[Prompt]:
    """All prompts as they came; ValueError for none at all or for a class outside the taxonomy."""
    if not prompts:
        raise ValueError("no prompts: the prompt file or template list is empty")
    for i, prompt in enumerate(prompts):
        unknown = [c for c in prompt.classes if c not in taxonomy.names]
        if unknown:
            raise ValueError(
                f"prompt {i} ({prompt.text!r}): unknown class {unknown}; taxonomy {taxonomy.name!r} allows: "
                + ", ".join(taxonomy.names)
            )
    return prompts


class TemplatePrompts:
    """Prompts from templates over the class list, every class equally often.

    ``templates`` hold ``{things}`` and any name of ``conditions`` ({name: list of words}); ``counts`` are the relative
    weights of prompts with 1, 2, 3 ... different classes.
    """

    def __init__(self, templates: list[str], conditions: dict[str, list[str]], counts: list[float], append: bool = True):
        if not templates or not counts:
            raise ValueError("prompts: templates and counts must not be empty")
        self.templates, self.conditions, self.counts, self.append = templates, conditions, counts, append

    def __call__(self, taxonomy, number: int, seed: int) -> list[Prompt]:
        rng = np.random.default_rng([seed, 1])
        weights = np.asarray(self.counts, float) / sum(self.counts)
        deck, prompts = [], []
        for _ in range(number):
            wanted, classes = int(rng.choice(len(weights), p=weights)) + 1, []
            while len(classes) < min(wanted, len(taxonomy.names)):
                name = next((n for n in deck if n not in classes), None)
                if name is None:
                    deck += rng.permutation(taxonomy.names).tolist()
                else:  # a name that this prompt has already stays in the deck for the next one
                    deck.remove(name)
                    classes.append(name)
            things = [("an " if c[0] in "aeiou" else "a ") + c for c in classes]
            listed = things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
            words = {name: values[rng.integers(len(values))] for name, values in self.conditions.items()}
            template = self.templates[rng.integers(len(self.templates))]
            try:
                caption = template.format(things=listed, **words)
            except KeyError as error:
                known = ", ".join(["things", *self.conditions])
                raise ValueError(f"prompts: template {template!r} asks for {error}; known: {known}") from None
            prompts.append(make_prompt(caption, classes, self.append))
        return check_classes(prompts, taxonomy)


class CaptionFile:
    """Prompts from a JSON list or JSON lines of ``{"caption", "classes": [...]}``; the file format in circulation for the
    method, ``{"filename", "caption", "class_prompt"}`` with the classes already appended, is read too."""

    def __init__(self, path: str, append: bool = True):
        self.path, self.append = path, append

    def __call__(self, taxonomy, number: int, seed: int) -> list[Prompt]:
        path = Path(self.path)
        if not path.is_file():
            raise FileNotFoundError(f"prompts.path: no file {path}")
        text = path.read_text().strip()
        try:
            rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}") from None
        if not rows:
            raise ValueError(f"{path} holds no prompts")
        prompts = []
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or "caption" not in row or not row.keys() & {"classes", "class_prompt"}:
                raise ValueError(f"{path}, entry {i}: need 'caption' and 'classes' (or 'class_prompt'), got {row!r:.200}")
            try:
                classes = row["classes"] if "classes" in row else split_class_prompt(row["class_prompt"], taxonomy)
                prompts.append(make_prompt(row["caption"], classes, self.append))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, entry {i}: {error}") from None
        check_classes(prompts, taxonomy)
        order = np.random.default_rng([seed, 2]).permutation(len(prompts))
        return [prompts[order[i % len(order)]] for i in range(number)]


def split_class_prompt(words: str, taxonomy) -> list[str]:
    """Class names out of a class prompt such as ``"person dining table"``, the longest name first. ValueError for a word
    that begins no class."""
    tokens, names = words.split(), sorted((n.split() for n in taxonomy.names), key=len, reverse=True)
    found, i = [], 0
    while i < len(tokens):
        match = next((n for n in names if tokens[i : i + len(n)] == n), None)
        if match is None:
            raise ValueError(f"unknown class at {' '.join(tokens[i:])!r}; allowed: {', '.join(taxonomy.names)}")
        found.append(" ".join(match))
        i += len(match)
    return found
