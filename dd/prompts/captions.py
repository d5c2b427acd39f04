"""Prompts from a caption file: with the classes of each caption, or with classes found among its
nouns."""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from dd.prompts.duplicates import similar_to
from dd.prompts.nouns import ClassNouns
from dd.prompts.prompt import Prompts, make_prompt, repeats, split_class_prompt
from dd.store.names import is_text
from dd.store.provenance import read_lines, read_text

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Caption:
    """One caption, its classes in prompt order (one that is named twice may stand there twice), and
    the image it describes where the source says so."""

    text: str
    classes: tuple[str, ...]
    filename: str | None = None


def read_rows(path: str | Path) -> list[dict]:
    """Entries of a JSON list or of JSON lines, each with a ``caption``; FileNotFoundError, or
    ValueError with the entry."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts.path: no file {path}. generate.py stage=caption makes captions of "
            "unlabelled images"
        )
    try:
        text = read_text(path).strip()
        rows = (
            json.loads(text)
            if text.startswith("[")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is neither a JSON list nor JSON lines in UTF-8: {error!s:.300}"
        ) from None
    if not rows:
        raise ValueError(
            f'{path} holds no prompts; expected entries such as {{"caption": "a dog on grass", '
            f'"classes": ["dog"]}}, as a '
            "JSON list or one a line"
        )
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("caption"), str):
            raise ValueError(
                f"{path}, entry {i}: need 'caption' (text) in each entry, got {row!r:.200}"
            )
        if not is_text(row["caption"]):
            raise ValueError(
                f"{path}, entry {i}: 'caption' holds a NUL or half of a character, got "
                f"{row['caption']!r:.200}"
            )
        if not isinstance(row.get("filename", ""), str):
            raise ValueError(
                f"{path}, entry {i}: 'filename' must be text, got {row['filename']!r:.200}"
            )
    return rows


def row_classes(row: dict, taxonomy) -> tuple[str, ...]:
    """Class names of an entry, out of ``classes`` [...] or ``class_prompt`` "..."; ValueError
    for another form or class."""
    if not row.keys() & {"classes", "class_prompt"}:
        raise ValueError(
            f"need 'caption' and 'classes' (or 'class_prompt'), got {row!r:.200}. Captions alone "
            "go with prompts=paper_voc, "
            "which finds classes by their nouns"
        )
    kind, key = (list, "classes") if "classes" in row else (str, "class_prompt")
    if not isinstance(row[key], kind):
        raise ValueError(
            f"{key!r} must be {'a list of class names' if kind is list else 'text'}, got "
            f"{row[key]!r:.200}"
        )
    classes = row[key] if kind is list else split_class_prompt(row[key], taxonomy)
    taxonomy.ids(classes)
    return tuple(classes)


def nouns_alone(row: dict) -> str:
    """The caption of an entry without the class words that the format in circulation appends to
    it."""
    appended = (
        row.get("class_prompt") if isinstance(row.get("class_prompt"), str) else row.get("classes")
    )
    words = " ".join(map(str, appended)) if isinstance(appended, list) else appended or ""
    if not words.split() or not row["caption"].strip():
        return row["caption"]
    return make_prompt(row["caption"], words.split(), append=False).text


def keep(
    captions: Iterable[Caption], exclude_split: str | None, drop_similar: float | None
) -> tuple[list[Caption], list]:
    """(captions to use, [{"reason", "filename", "caption"}] of the others): those of images
    listed in ``exclude_split``, those without a class and, among captions of equal classes,
    those at least as similar as ``drop_similar`` to an earlier one are left out. ValueError if
    none is left."""
    captions, dropped = list(captions), []
    excluded = read_stems(exclude_split) if exclude_split is not None else set()
    if exclude_split is not None and (
        nameless := [i for i, c in enumerate(captions) if c.filename is None]
    ):
        raise ValueError(
            f"prompts.exclude_split={exclude_split}: {len(nameless)} captions have no 'filename' "
            "(the first is entry "
            f"{nameless[0]}), so those of the listed images cannot be found. "
            "prompts.exclude_split=null keeps all"
        )
    kept, groups = [], defaultdict(list)
    for caption in captions:
        if caption.filename is not None and stem(caption.filename) in excluded:
            dropped.append(_left_out(caption, "image is in exclude_split"))
        elif not caption.classes or not caption.text.strip():
            dropped.append(_left_out(caption, "names no class"))
        else:
            kept.append(caption)
    if drop_similar is not None:
        for i, caption in enumerate(kept):
            groups[tuple(dict.fromkeys(caption.classes))].append(i)
        answers = {}
        for members in groups.values():
            answers |= zip(
                members, similar_to([kept[i].text for i in members], drop_similar), strict=True
            )
        dropped += [
            _left_out(kept[i], "similar to an earlier caption")
            for i in sorted(answers)
            if answers[i] is not None
        ]
        kept = [caption for i, caption in enumerate(kept) if answers[i] is None]
    if not kept:
        reasons = {d["reason"]: sum(e["reason"] == d["reason"] for e in dropped) for d in dropped}
        counts = ", ".join(f"{n} x {reason}" for reason, n in reasons.items())
        raise ValueError(
            f"none of {len(captions)} captions is left to use ({counts}), such as "
            f"{captions[0].text!r:.200}"
        )
    return kept, dropped


def _left_out(caption: Caption, reason: str) -> dict:
    return {"reason": reason, "filename": caption.filename, "caption": caption.text}


def read_stems(path: str | Path) -> set[str]:
    """Stems of the images that a split list names, one a line."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"prompts.exclude_split: no file {path}. It lists the images whose captions are left "
            "out, so that nothing of "
            "the test set reaches the prompts; prompts.exclude_split=null keeps all captions (the "
            "paper's setting, a leak)"
        )
    return {stem(line) for line in read_lines(path)}


def stem(filename: str) -> str:
    """File name without folders and without the suffix of an image: an id may hold dots."""
    name = unicodedata.normalize("NFC", PurePosixPath(filename.strip().replace("\\", "/")).name)
    return name[: name.rindex(".")] if name.lower().endswith(SUFFIXES) else name


def draw(prompts: list, number: int | None, seed: int) -> list:
    """``number`` prompts in an order of the seed, round and round if there are fewer; None or 0:
    each once."""
    order = np.random.default_rng([seed, 2]).permutation(len(prompts))
    return [prompts[order[i % len(order)]] for i in range(number or len(order))]


class CaptionFile:
    """Prompts from a JSON list or JSON lines of ``{"caption", "classes": [...]}``; the file format
    in circulation for the method, ``{"filename", "caption", "class_prompt"}`` with the classes
    already appended, is read too.

    ``exclude_split``, ``drop_similar``: see :func:`keep`. ``repeat_classes``: a class that an entry
    names twice has its words twice (:func:`dd.prompts.prompt.make_prompt`).
    """

    def __init__(
        self,
        path: str,
        append: bool = True,
        exclude_split: str | None = None,
        drop_similar: float | None = None,
        repeat_classes: bool = False,
    ):
        self.path, self.append, self.exclude_split, self.drop_similar = (
            path,
            append,
            exclude_split,
            drop_similar,
        )
        self.repeat_classes = repeat_classes

    def __call__(self, taxonomy, number: int | None, seed: int) -> Prompts:
        captions = []
        for i, row in enumerate(read_rows(self.path)):
            try:
                captions.append(
                    Caption(row["caption"], row_classes(row, taxonomy), row.get("filename"))
                )
            except ValueError as error:
                raise ValueError(f"{self.path}, entry {i}: {error}") from None
        captions, dropped = keep(captions, self.exclude_split, self.drop_similar)
        how = self.append, self.repeat_classes
        prompts = [make_prompt(c.text, c.classes, *how) for c in captions]
        return Prompts(draw(prompts, number, seed), dropped)


class NounCaptions:
    """The paper's recipe for VOC: captions without labels, classes by the nouns of each caption
    (:class:`dd.prompts.nouns.ClassNouns`), repeated until every class has ``at_least`` prompts
    (:func:`dd.prompts.prompt.repeats`).

    ``path``: JSON list or JSON lines of ``{"caption", "filename"}``. ``exclude_split``: file that
    lists the images whose captions are left out; None is the paper's setting, which used captions
    of validation images. ``drop_similar``: see :func:`keep`. ``repeat_classes``: each mention of a
    class has its words in the prompt, as in the authors' list; else each class once. ``number`` of
    the repeated prompts are chosen by the seed, None or 0: all.
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
    ):
        if at_least < 1:
            raise ValueError(
                f"prompts.at_least={at_least}: 1 (no balancing) or more prompts of each class"
            )
        self.path, self.at_least, self.append = path, at_least, append
        self.exclude_split, self.drop_similar, self.other_meanings = (
            exclude_split,
            drop_similar,
            other_meanings,
        )
        self.repeat_classes = repeat_classes

    def __call__(self, taxonomy, number: int | None, seed: int) -> Prompts:
        nouns, texts = (
            ClassNouns(taxonomy, self.other_meanings),
            [(nouns_alone(r), r) for r in read_rows(self.path)],
        )
        captions = (Caption(text, nouns.mentions(text), row.get("filename")) for text, row in texts)
        captions, dropped = keep(captions, self.exclude_split, self.drop_similar)
        how = self.append, self.repeat_classes
        prompts = [make_prompt(c.text, c.classes, *how) for c in captions]
        times = repeats([c.classes for c in captions], self.at_least)
        return Prompts(
            draw([p for p, n in zip(prompts, times, strict=True) for _ in range(n)], number, seed),
            dropped,
        )
