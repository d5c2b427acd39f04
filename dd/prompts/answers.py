"""Questions to a language model and its answers: how it is asked, what is read, where an answer
is kept."""

import json
from collections.abc import Iterable
from pathlib import Path

from dd.store.provenance import fingerprint
from dd.store.samples import append_lines

TASK = (
    "You write captions of photographs for a text-to-image model that makes training images. Each "
    "caption is one plain "
    "English sentence about what the camera sees. It names its objects by words of their classes, "
    "and no object of another."
)
MAX_TRIES = 500  # braces of an answer at which no JSON begins, before it counts as none
FORM = (
    'Answer with JSON alone: {"prompts": [{"text": "<caption>", "classes": ["<class>", ...]}, ...]}'
)


def question(
    taxonomy, wanted: Iterable[Iterable[str]], conditions: str, max_words: int, number: int
) -> list[dict]:
    """Messages that ask for one caption of each list of classes in ``wanted``; ``number`` tells
    the questions apart."""
    others = {
        name: f" (or: {', '.join(words)})" for name, words in taxonomy.synonyms.items() if words
    }
    known = "; ".join(name + others.get(name, "") for name in taxonomy.names)
    lists = "\n".join(f"{i}. {', '.join(classes)}" for i, classes in enumerate(wanted, 1))
    parts = [
        f"Classes: {known}.",
        f"The site: {conditions}" if conditions else "",
        f"Write list {number + 1} of captions, all different, also from those of other lists. "
        "Vary the scene, the number of "
        f"objects and how they stand. At most {max_words} words each. One caption for each line "
        "of classes:",
        lists,
        FORM,
    ]
    return [
        {"role": "system", "content": TASK},
        {"role": "user", "content": "\n".join(p for p in parts if p)},
    ]


def schema(taxonomy) -> dict:
    """``response_format`` of a chat completion: the JSON schema of an answer."""
    entry = {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "classes": {"type": "array", "items": {"type": "string", "enum": list(taxonomy.names)}},
        },
        "required": ["text", "classes"],
        "additionalProperties": False,
    }
    answer = {
        "type": "object",
        "properties": {"prompts": {"type": "array", "items": entry}},
        "required": ["prompts"],
        "additionalProperties": False,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": "prompts", "strict": True, "schema": answer},
    }


def read_answer(answer: dict) -> tuple[list, str | None]:
    """(entries, what is wrong with the whole answer or None). JSON may stand between other
    words, which may hold braces."""
    text = answer["text"].strip()
    if not text:
        return [], "empty answer"
    content = _content(text)
    if content is None:
        cut = answer.get("finish") == "length"
        return (
            [],
            "answer cut off (fewer prompts.per_request make it shorter)"
            if cut
            else "answer is not JSON",
        )
    if not isinstance(content.get("prompts"), list):
        return [], "answer has no list 'prompts'"
    return content["prompts"], None if content["prompts"] else "answer without captions"


def _content(text: str) -> dict | None:
    """The JSON object from the first brace to the last; or else, behind a model's thinking, the
    first one with a list 'prompts'; or None."""
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
    """Answers in the JSON lines of ``path``, found by the hash of the request; of two with one
    hash the first one counts, so that runs at the same time end with the same prompts. Lines
    torn by a crash are passed over."""

    def __init__(self, path: Path):
        self.path, self.found, self._end = path, {}, 0
        self._read()

    def __contains__(self, request: dict) -> bool:
        return fingerprint(request) in self.found

    def __getitem__(self, request: dict) -> dict:
        return self.found[fingerprint(request)]

    def keep(self, request: dict, url: str, answer: dict) -> None:
        """Append an answer, whole and synced, with its request and the address that gave it."""
        append_lines(
            self.path,
            [{"key": fingerprint(request), "url": url, "request": request, "answer": answer}],
        )
        self._read()

    def _read(self) -> None:
        """What was appended since the last time, by whatever process."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._end += len(line)
                try:
                    row = json.loads(line)
                    if isinstance(row["key"], str) and isinstance(row["answer"]["text"], str):
                        self.found.setdefault(row["key"], row["answer"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
