"""Requests to a language model and its answers: how to ask, how to read an answer, and where to
keep it."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dd.store.provenance import fault, fingerprint
from dd.store.samples import append_lines
from dd.taxonomy import Taxonomy

TASK = (
    "You write captions of photographs for a text-to-image model that makes training images. "
    "Each caption is one plain English sentence about what the camera sees. "
    "It names its objects by words of their classes, and no object of another."
)
MAX_TRIES = 500  # braces to try as the begin of JSON before an answer counts as not JSON
FORM = (
    'Answer with JSON alone: {"prompts": [{"text": "<caption>", "classes": ["<class>", ...]}, ...]}'
)


def question(
    taxonomy: Taxonomy,
    wanted: Iterable[Iterable[str]],
    conditions: str,
    max_words: int,
    number: int,
) -> list[dict[str, str]]:
    """Messages that ask for one caption for each list of classes in ``wanted``; ``number``
    distinguishes the requests."""
    others = {
        name: f" (or: {', '.join(words)})" for name, words in taxonomy.synonyms.items() if words
    }
    known = "; ".join(name + others.get(name, "") for name in taxonomy.names)
    lists = "\n".join(f"{i}. {', '.join(classes)}" for i, classes in enumerate(wanted, 1))
    parts = [
        f"Classes: {known}.",
        f"The site: {conditions}" if conditions else "",
        f"Write list {number + 1} of captions, all different, also from those of other lists. "
        "Vary the scene, the number of objects and how they stand. "
        f"At most {max_words} words each. One caption for each line of classes:",
        lists,
        FORM,
    ]
    return [
        {"role": "system", "content": TASK},
        {"role": "user", "content": "\n".join(p for p in parts if p)},
    ]


def schema(taxonomy: Taxonomy) -> dict[str, Any]:
    """``response_format`` of a chat completion: the JSON schema of an answer."""
    names = {"type": "array", "items": {"type": "string", "enum": list(taxonomy.names)}}
    entry = _object(text={"type": "string"}, classes=names)
    answer = _object(prompts={"type": "array", "items": entry})
    return {
        "type": "json_schema",
        "json_schema": {"name": "prompts", "strict": True, "schema": answer},
    }


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_answer(answer: Mapping[str, Any]) -> tuple[list[Any], str | None]:
    """(entries, what is wrong with the whole answer or None). The JSON may stand between other
    words, which may contain braces."""
    text = answer["text"].strip()
    if not text:
        return [], "empty answer"
    content = _content(text)
    if content is None:
        if answer.get("finish") == "length":
            return [], "answer cut off (fewer prompts.per_request make it shorter)"
        return [], "answer is not JSON"
    if not isinstance(content.get("prompts"), list):
        return [], "answer has no list 'prompts'"
    return content["prompts"], None if content["prompts"] else "answer without captions"


def _content(text: str) -> dict[str, Any] | None:
    """The JSON object from the first brace to the last. If that is none, the first object with a
    list 'prompts', as after a model's thinking; or None."""
    try:
        return json.loads(text[text.find("{") : text.rfind("}") + 1])
    except (ValueError, RecursionError):
        text = text.rpartition("</think>")[2]
    decoder, begin, tries = json.JSONDecoder(), text.find("{"), 0
    while begin >= 0 and tries < MAX_TRIES:
        try:
            content, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            tries, end = tries + 1, begin + 1
        else:
            if isinstance(content.get("prompts"), list):
                return content
        begin = text.find("{", end)
    return None


class Answers:
    """Answers in the JSON lines of ``path``, looked up by the hash of the request. If two have the
    same hash, the first counts, so that runs at the same time end with the same prompts. Lines torn
    by a crash are skipped."""

    def __init__(self, path: Path) -> None:
        self.path, self._end = path, 0
        self.found: dict[str, dict[str, Any]] = {}
        self._read()

    def __contains__(self, request: Mapping[str, Any]) -> bool:
        return fingerprint(request) in self.found

    def __getitem__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return self.found[fingerprint(request)]

    def keep(self, request: Mapping[str, Any], url: str, answer: Mapping[str, Any]) -> None:
        """Append an answer, whole and synced, with its request and the address that gave it."""
        row = {"key": fingerprint(request), "url": url, "request": request, "answer": answer}
        append_lines(self.path, [row])
        self._read()

    def _read(self) -> None:
        """Read what any process has appended since the last time."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._end += len(line)
                with suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if fault(row, {"key": str, "answer": {"text": str}}) is None:
                        self.found.setdefault(row["key"], row["answer"])
