"""Prompts from a caption file, which gives the classes of each caption, or from captions alone,
whose classes are found among the nouns."""

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dd.prompts.duplicates import similar_to
from dd.prompts.nouns import ClassNouns
from dd.prompts.prompt import Prompt, Prompts, make_prompt, repeats, split_class_prompt
from dd.store.names import is_text
from dd.store.provenance import read_lines, read_text
from dd.taxonomy import Taxonomy

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Caption:
    """One caption, its classes in prompt order (a class that is named twice may occur twice), and
    the image it describes if the source says so."""

    text: str
    classes: tuple[str, ...]
    filename: str | None = None


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Entries of a JSON list or of JSON lines, each with a ``caption``. FileNotFoundError, or
    ValueError that names the entry."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts.path: no file {path}. "
            "generate.py stage=caption makes captions of unlabelled images"
        )
    try:
        text = read_text(path).strip()
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is neither a JSON list nor JSON lines in UTF-8: {error!s:.300}"
        ) from None
    if not rows:
        raise ValueError(
            f"{path} holds no prompts; expected entries such as "
            '{"caption": "a dog on grass", "classes": ["dog"]}, as a JSON list or one a line'
        )
    for i, row in enumerate(rows):
        if wrong := _wrong_entry(row):
            raise ValueError(f"{path}, entry {i}: {wrong}")
    return rows


def _wrong_entry(row: Any) -> str | None:
    """What is wrong with an entry of a caption file; None if nothing is."""
    if not isinstance(row, dict) or not isinstance(row.get("caption"), str):
        return f"need 'caption' (text) in each entry, got {row!r:.200}"
    if not is_text(row["caption"]):
        return f"'caption' holds a NUL or an unpaired surrogate, got {row['caption']!r:.200}"
    if not isinstance(row.get("filename", ""), str):
        return f"'filename' must be text, got {row['filename']!r:.200}"
    return None


def row_classes(row: dict[str, Any], taxonomy: Taxonomy) -> tuple[str, ...]:
    """Class names of an entry, from ``classes`` [...] or ``class_prompt`` "..."; ValueError for
    another form or an unknown class."""
    if not row.keys() & {"classes", "class_prompt"}:
        raise ValueError(
            f"need 'caption' and 'classes' (or 'class_prompt'), got {row!r:.200}. "
            "For captions alone use prompts=paper_voc, which finds classes by their nouns"
        )
    listed = "classes" in row
    key, kind = ("classes", "a list of class names") if listed else ("class_prompt", "text")
    if not isinstance(row[key], list if listed else str):
        raise ValueError(f"{key!r} must be {kind}, got {row[key]!r:.200}")
    classes = row[key] if listed else split_class_prompt(row[key], taxonomy)
    taxonomy.ids(classes)
    return tuple(classes)


def nouns_alone(row: dict[str, Any]) -> str:
    """The caption of an entry without the class words that the published file format appends to
    it."""
    words, listed = row.get("class_prompt"), row.get("classes")
    if not isinstance(words, str):
        words = " ".join(map(str, listed)) if isinstance(listed, list) else listed or ""
    if not words.split() or not row["caption"].strip():
        return row["caption"]
    return make_prompt(row["caption"], words.split(), append=False).text


def keep(
    captions: Iterable[Caption], exclude_split: str | None, drop_similar: float | None
) -> tuple[list[Caption], list[dict[str, Any]]]:
    """(captions to use, [{"reason", "filename", "caption"}] of the others). Left out are captions
    of images listed in ``exclude_split``, those without a class and, among captions of equal
    classes, those at least as similar as ``drop_similar`` to an earlier one. ValueError if none is
    left."""
    captions, kept, dropped = list(captions), [], []
    excluded = _excluded(captions, exclude_split)
    for caption in captions:
        if caption.filename is not None and stem(caption.filename) in excluded:
            dropped.append(_left_out(caption, "image is in exclude_split"))
        elif not caption.classes or not caption.text.strip():
            dropped.append(_left_out(caption, "names no class"))
        else:
            kept.append(caption)
    if drop_similar is not None:
        repeated = _repeated(kept, drop_similar)
        dropped += [_left_out(kept[i], "similar to an earlier caption") for i in sorted(repeated)]
        kept = [caption for i, caption in enumerate(kept) if i not in repeated]
    if not kept:
        reasons = Counter(row["reason"] for row in dropped)
        counts = ", ".join(f"{n} x {reason}" for reason, n in reasons.items())
        raise ValueError(
            f"none of {len(captions)} captions is left to use ({counts}), "
            f"such as {captions[0].text!r:.200}"
        )
    return kept, dropped


def _excluded(captions: list[Caption], exclude_split: str | None) -> set[str]:
    """Stems of the images whose captions are left out; each caption must name its image."""
    if exclude_split is None:
        return set()
    excluded = read_stems(exclude_split)
    if nameless := [i for i, c in enumerate(captions) if c.filename is None]:
        raise ValueError(
            f"prompts.exclude_split={exclude_split}: {len(nameless)} captions have no 'filename' "
            f"(the first is entry {nameless[0]}), so those of the listed images cannot be found. "
            "prompts.exclude_split=null keeps all"
        )
    return excluded


def _repeated(captions: list[Caption], threshold: float) -> set[int]:
    """Indices of the captions that are similar to an earlier one of the same classes."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, caption in enumerate(captions):
        groups[tuple(dict.fromkeys(caption.classes))].append(i)
    found: set[int] = set()
    for members in groups.values():
        answers = similar_to([captions[i].text for i in members], threshold)
        found |= {i for i, near in zip(members, answers, strict=True) if near is not None}
    return found


def _left_out(caption: Caption, reason: str) -> dict[str, Any]:
    return {"reason": reason, "filename": caption.filename, "caption": caption.text}


def read_stems(path: str | Path) -> set[str]:
    """Stems of the images in a split list, one a line."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"prompts.exclude_split: no file {path}. It lists the images whose captions are left "
            "out, so that nothing of the test set reaches the prompts; "
            "prompts.exclude_split=null keeps all captions (the paper's setting, a leak)"
        )
    return {stem(line) for line in read_lines(path)}


def stem(filename: str) -> str:
    """File name without folders and image suffix. An id may contain dots."""
    name = unicodedata.normalize("NFC", PurePosixPath(filename.strip().replace("\\", "/")).name)
    return name[: name.rindex(".")] if name.lower().endswith(SUFFIXES) else name


def draw(prompts: list[Prompt], number: int | None, seed: int) -> list[Prompt]:
    """``number`` prompts in an order that depends on the seed, repeated in rounds if there are
    fewer; None or 0: each once."""
    order = np.random.default_rng([seed, 2]).permutation(len(prompts))
    return [prompts[order[i % len(order)]] for i in range(number or len(order))]


class CaptionFile:
    """Prompts from a JSON list or JSON lines of ``{"caption", "classes": [...]}``. Also reads the
    format in which the method's prompts are published, ``{"filename", "caption", "class_prompt"}``
    with the classes already appended.

    ``exclude_split``, ``drop_similar``: see :func:`keep`. ``repeat_classes``: if an entry names a
    class twice, its words are appended twice (:func:`dd.prompts.prompt.make_prompt`).
    ``in_order``: keep the order of the file instead of one drawn by the seed.
    """

    def __init__(
        self,
        path: str,
        append: bool = True,
        exclude_split: str | None = None,
        drop_similar: float | None = None,
        repeat_classes: bool = False,
        in_order: bool = False,
    ) -> None:
        self.path, self.append, self.repeat_classes = path, append, repeat_classes
        self.in_order = in_order
        self.exclude_split, self.drop_similar = exclude_split, drop_similar

    def __call__(self, taxonomy: Taxonomy, number: int | None, seed: int) -> Prompts:
        captions = []
        for i, row in enumerate(read_rows(self.path)):
            try:
                classes = row_classes(row, taxonomy)
            except ValueError as error:
                raise ValueError(f"{self.path}, entry {i}: {error}") from None
            captions.append(Caption(row["caption"], classes, row.get("filename")))
        captions, dropped = keep(captions, self.exclude_split, self.drop_similar)
        how = self.append, self.repeat_classes
        prompts = [make_prompt(c.text, c.classes, *how) for c in captions]
        if self.in_order:
            chosen = [prompts[i % len(prompts)] for i in range(number or len(prompts))]
            return Prompts(chosen, dropped)
        return Prompts(draw(prompts, number, seed), dropped)


class NounCaptions:
    """The paper's recipe for VOC: captions without labels. Classes are found by the nouns of each
    caption (:class:`dd.prompts.nouns.ClassNouns`), and captions are repeated until every class has
    ``at_least`` prompts (:func:`dd.prompts.prompt.repeats`).

    ``path``: JSON list or JSON lines of ``{"caption", "filename"}``. ``exclude_split``: file that
    lists the images whose captions are left out; None is the paper's setting, which used captions
    of validation images. ``drop_similar``: see :func:`keep`. ``repeat_classes``: append the words
    of each mention of a class, as in the authors' list; else each class once. ``number`` of the
    repeated prompts are chosen by the seed; None or 0: all.
    """

    def __init__(
        self,
        path: str,
        at_least: int = 2000,
        append: bool = True,
        exclude_split: str | None = None,
        drop_similar: float | None = None,
        other_meanings: Iterable[str] = (),
        repeat_classes: bool = False,
    ) -> None:
        if at_least < 1:
            raise ValueError(
                f"prompts.at_least={at_least}: 1 (no balancing) or more prompts of each class"
            )
        self.path, self.at_least, self.append = path, at_least, append
        self.exclude_split, self.drop_similar = exclude_split, drop_similar
        self.other_meanings, self.repeat_classes = other_meanings, repeat_classes

    def __call__(self, taxonomy: Taxonomy, number: int | None, seed: int) -> Prompts:
        nouns = ClassNouns(taxonomy, self.other_meanings)
        texts = [(nouns_alone(row), row.get("filename")) for row in read_rows(self.path)]
        told = [Caption(text, nouns.mentions(text), name) for text, name in texts]
        captions, dropped = keep(told, self.exclude_split, self.drop_similar)
        how = self.append, self.repeat_classes
        prompts = [make_prompt(c.text, c.classes, *how) for c in captions]
        times = repeats([c.classes for c in captions], self.at_least)
        repeated = [p for p, n in zip(prompts, times, strict=True) for _ in range(n)]
        return Prompts(draw(repeated, number, seed), dropped)
