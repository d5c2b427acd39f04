"""Prompts by a language model: it writes captions of a site that name their classes. Each answer is
kept in a file."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le

from dd.prompts.answers import Answers, question, read_answer, schema
from dd.prompts.base import Text, Weights
from dd.prompts.coco import plain
from dd.prompts.duplicates import SeenCaptions
from dd.prompts.endpoint import Endpoint
from dd.prompts.nouns import ClassNouns
from dd.prompts.prompt import Prompt, Prompts, find_words, make_prompt
from dd.store.progress import Progress
from dd.store.provenance import fault
from dd.store.samples import sample_seed
from dd.store.settings import Count, Hint, Natural, Settings
from dd.taxonomy import Taxonomy

Row = dict[str, Any]  # {"reason", "filename", "caption"} of a caption that is left out
Seen = defaultdict[frozenset[str], SeenCaptions | None]  # by the classes of the captions


class LanguageModelSettings(Settings):
    """Settings of :class:`LanguageModelPrompts`; ``base_url``, ``api_key_env``, ``max_retries`` and
    ``timeout`` belong to the endpoint."""

    noun = "prompts"
    base_url: str
    model: Text
    cache: Text
    conditions: Annotated[str, Hint("the site in words")] = ""
    counts: Weights = [0.4, 0.4, 0.2]
    per_request: Count = 20
    temperature: float | None = 1.0
    seed: int | None = 0
    json_schema: bool = True
    max_words: Count = 30
    drop_similar: Annotated[
        Annotated[float, Ge(0.5), Le(1)] | None, Hint("1 = equal but for case and punctuation")
    ] = 0.8
    max_requests: Count | None = None
    max_retries: Natural = 5
    timeout: Annotated[float, Gt(0), Hint("seconds")] = 120
    api_key_env: str | None = "OPENAI_API_KEY"
    append: bool = True
    other_meanings: list[str] = []


class LanguageModelPrompts:
    """Captions written by an OpenAI-compatible endpoint (:class:`dd.prompts.endpoint.Endpoint`),
    then checked.

    Each request asks for ``per_request`` captions, each of one to ``len(counts)`` classes by the
    weights ``counts``; classes that few captions name so far come first. ``conditions``: the site
    in free text (lighting, camera, background). A caption is used if it has at most ``max_words``
    words and names each of its classes by name, synonym or plural. Further classes that it names
    become its classes too (``other_meanings``: see :class:`dd.prompts.nouns.ClassNouns`). Among
    captions with equal classes, those at least as similar as ``drop_similar`` to an earlier one are
    left out. ``max_requests``: most answers to use; None: three times as many as faultless answers
    would need, plus five. ``seed``, ``temperature``: sent unless None.

    ``cache``: file of JSON lines that keeps each answer under the hash of its request. A cached
    request is never sent again, and needs no key, network or client. The prompts of a smaller
    number are the first ones of a larger number.
    """

    Settings = LanguageModelSettings

    def __init__(self, **settings: Any) -> None:
        self.settings = s = LanguageModelSettings(**settings)
        self.endpoint = Endpoint(s.base_url, s.api_key_env, s.max_retries, s.timeout)
        self.append, self.cache = s.append, Path(s.cache)

    def __call__(self, taxonomy: Taxonomy, number: int | None, seed: int) -> Prompts:
        if not number:
            raise ValueError(
                "prompts: a language model never ends; say how many prompts (num_images=...)"
            )
        limit = self.settings.max_requests or 5 + 3 * -(-number // self.settings.per_request)
        nouns, answers = ClassNouns(taxonomy, self.settings.other_meanings), Answers(self.cache)
        seen: Seen = defaultdict(self._none_seen)
        prompts: list[Prompt] = []
        dropped: list[Row] = []
        asked, cached = 0, 0
        with Progress(f"prompts of {self.settings.model}", number, unit="prompts") as progress:
            while len(prompts) < number and asked < limit:
                request = self._request(taxonomy, prompts, seed, asked)
                if request in answers:
                    cached += 1
                else:
                    answers.keep(request, self.endpoint.url, self.endpoint.ask(request))
                before = len(prompts)
                for found in self._read(answers[request], taxonomy, nouns, seen):
                    if isinstance(found, Prompt):
                        prompts.append(found)
                    else:
                        dropped.append(found)
                asked += 1
                progress.advance(min(len(prompts), number) - before)
        if len(prompts) < number:
            raise ValueError(self._too_few(len(prompts), number, asked, cached, dropped))
        return Prompts(prompts[:number], dropped)

    def _none_seen(self) -> SeenCaptions | None:
        similar = self.settings.drop_similar
        return None if similar is None else SeenCaptions(similar)

    def _read(
        self, answer: dict[str, Any], taxonomy: Taxonomy, nouns: ClassNouns, seen: Seen
    ) -> Iterator[Prompt | Row]:
        """The prompts of an answer, and what is left out of it, in its order. New captions are
        added to ``seen``."""
        rows, reason = read_answer(answer)
        if reason:
            yield _left_out(answer["text"], reason)
        for row in rows:
            found = self._prompt(row, taxonomy, nouns)
            if isinstance(found, Prompt):
                others = seen[frozenset(found.classes)]
                if others is not None and others.repeats(found.text):
                    found = "similar to an earlier caption"
            text = row["text"] if _is_text(row) else str(row)
            yield found if isinstance(found, Prompt) else _left_out(text, found)

    def _request(
        self, taxonomy: Taxonomy, prompts: list[Prompt], seed: int, number: int
    ) -> dict[str, Any]:
        """Request ``number`` in the client's form: a function of the settings, the seed and the
        prompts so far."""
        s, rng, wanted = self.settings, np.random.default_rng([seed, 7, number]), []
        used = Counter(c for p in prompts for c in p.classes)
        weights = np.asarray(s.counts, float)
        for _ in range(s.per_request):
            drawn = int(rng.choice(len(weights), p=weights / weights.sum()))
            size = min(drawn + 1, len(taxonomy.names))
            order = sorted(rng.permutation(taxonomy.names).tolist(), key=used.__getitem__)[:size]
            used.update(order)
            wanted.append(order)
        request = {
            "model": s.model,
            "messages": question(taxonomy, wanted, s.conditions.strip(), s.max_words, number),
            "temperature": s.temperature,
            "seed": None if s.seed is None else sample_seed(s.seed, f"request {number}") % 2**31,
            "response_format": schema(taxonomy) if s.json_schema else None,
        }
        return {key: value for key, value in request.items() if value is not None}

    def _prompt(self, row: Any, taxonomy: Taxonomy, nouns: ClassNouns) -> Prompt | str:
        """The prompt of an entry of an answer, or why it is not used."""
        if fault(row, {"text": str, "classes": [str]}):
            return "not of the form {text, classes}"
        text, listed = plain(row["text"]), row["classes"]
        if not text or not text.isprintable():
            return "text is empty or holds control characters"
        if len(text.split()) > self.settings.max_words:
            return f"longer than {self.settings.max_words} words"
        named, by_word = nouns.find(text), taxonomy.words
        classes = [by_word.get(c.strip().lower()) for c in listed]
        if None in classes:
            return f"unknown class {listed[classes.index(None)]!r:.60}"
        missing = [c for c in classes if c not in named]
        if missing or not named:
            return f"does not name its class {missing[0]!r}" if missing else "names no class"
        prompt = make_prompt(text, named, self.append)
        try:
            find_words(prompt.text, named)  # without appended words, a synonym alone is not enough
        except ValueError:
            return "names a class by a synonym alone, and append is off"
        return prompt

    def _too_few(self, found: int, number: int, asked: int, cached: int, dropped: list[Row]) -> str:
        """``asked``: answers that were used; ``cached`` of them came from the cache."""
        reasons = Counter(row["reason"] for row in dropped).most_common(8)
        counts = ", ".join(f"{n} x {reason}" for reason, n in reasons) or "few captions in each"
        where, kept = f" at {self.endpoint.url}", f"The answers are in {self.cache}"
        if cached:
            some = f", {asked - cached} of them asked for now{where}"
            where = some if cached < asked else ", none asked for now"
            kept = f"{cached} of the {asked} answers were already in {self.cache}"
        if 2 * cached > asked:
            kept += "; to ask again, move that file away or give another prompts.cache=..."
        return (
            f"{found} of {number} prompts after {asked} answers of {self.settings.model}{where}; "
            f"left out: {counts}. {kept}. "
            f"Ask more often (prompts.max_requests={2 * asked}), ask for fewer (num_images), "
            "or try another model or other prompts.conditions"
        )


def _is_text(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("text"), str)


def _left_out(text: str, reason: str) -> Row:
    caption = text[:300].encode("utf-8", "replace").decode()
    return {"reason": reason, "filename": None, "caption": caption}
