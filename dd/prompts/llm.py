"""Prompts by a language model: captions of a site that name their classes, each answer kept in a
file."""

from collections import Counter
from pathlib import Path

import numpy as np

from dd.prompts.answers import Answers, question, read_answer, schema
from dd.prompts.coco import plain
from dd.prompts.duplicates import Earlier
from dd.prompts.endpoint import Endpoint
from dd.prompts.nouns import ClassNouns
from dd.prompts.prompt import Prompt, Prompts, find_words, make_prompt
from dd.store.progress import Progress
from dd.store.samples import sample_seed


class LanguageModelPrompts:
    """Captions that an OpenAI-compatible endpoint writes (:class:`dd.prompts.endpoint.Endpoint`),
    checked.

    Each request asks for ``per_request`` captions, each of one to ``len(counts)`` classes by the
    weights ``counts``, first of those that few captions name so far. ``conditions``: the site in
    free text (lighting, camera, background). A caption is used if it has at most ``max_words``
    words and names each of its classes by name, synonym or plural; a class that it names beside
    them is one of its classes too (``other_meanings``: see :class:`dd.prompts.nouns.ClassNouns`).
    Of captions with equal classes those at least as similar as ``drop_similar`` to an earlier one
    are left out. ``max_requests``: answers that are looked at, None: three times those that
    faultless ones would need, and five more. ``seed``, ``temperature``: sent unless None.

    ``cache``: file of JSON lines where each answer is kept under the hash of its request; what is
    there is never asked again, and needs no key, network or client. The prompts of a smaller number
    are the first of those of a larger one.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        cache: str,
        conditions: str = "",
        counts=(0.4, 0.4, 0.2),
        per_request: int = 20,
        temperature: float | None = 1.0,
        seed: int | None = 0,
        json_schema: bool = True,
        max_words: int = 30,
        drop_similar: float | None = 0.8,
        max_requests: int | None = None,
        max_retries: int = 5,
        timeout: float = 120,
        api_key_env: str | None = "OPENAI_API_KEY",
        append: bool = True,
        other_meanings=(),
    ):
        self.endpoint = Endpoint(base_url, api_key_env, max_retries, timeout)
        for name, value in (("model", model), ("cache", cache)):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"prompts.{name}={value!r}: expected a text that is not empty")
        if not isinstance(conditions, str):
            raise ValueError(
                f"prompts.conditions: the site in words, as one text; got {conditions!r:.100}"
            )
        limits = {"per_request": per_request, "max_words": max_words}
        limits |= {} if max_requests is None else {"max_requests": max_requests}
        for name, value in limits.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"prompts.{name}={value!r}: expected a whole number of 1 or more")
        if not counts or min(counts) < 0 or not sum(counts):
            raise ValueError(f"prompts.counts={list(counts)}: weights of 0 or more, not all 0")
        if drop_similar is not None:
            Earlier(drop_similar)  # its check of the threshold
        self.model, self.cache, self.conditions, self.counts = (
            model,
            Path(cache),
            conditions.strip(),
            tuple(counts),
        )
        self.per_request, self.temperature, self.seed, self.json_schema = (
            per_request,
            temperature,
            seed,
            json_schema,
        )
        self.max_words, self.drop_similar, self.max_requests = max_words, drop_similar, max_requests
        self.append, self.other_meanings = append, tuple(other_meanings)

    def __call__(self, taxonomy, number: int | None, seed: int) -> Prompts:
        if not number:
            raise ValueError(
                "prompts: a language model never ends; say how many prompts (num_images=...)"
            )
        limit = self.max_requests or 5 + 3 * -(-number // self.per_request)
        nouns, answers, texts = ClassNouns(taxonomy, self.other_meanings), Answers(self.cache), {}
        prompts, dropped, asked, cached = [], [], 0, 0
        with Progress(f"prompts of {self.model}", number, unit="prompts") as progress:
            while len(prompts) < number and asked < limit:
                request = self._request(taxonomy, prompts, seed, asked)
                if request in answers:
                    cached += 1
                else:
                    answers.keep(request, self.endpoint.url, self.endpoint.ask(request))
                rows, reason = read_answer(answers[request])
                dropped += [_left_out(answers[request]["text"], reason)] if reason else []
                before = len(prompts)
                for row in rows:
                    prompt, reason = self._prompt(row, taxonomy, nouns)
                    if prompt and self._repeats(prompt, texts):
                        prompt, reason = None, "similar to an earlier caption"
                    prompts += [prompt] if prompt else []
                    dropped += (
                        []
                        if prompt
                        else [_left_out(row["text"] if _is_text(row) else str(row), reason)]
                    )
                asked += 1
                progress.advance(min(len(prompts), number) - before)
        if len(prompts) < number:
            raise ValueError(self._too_few(len(prompts), number, asked, cached, dropped))
        return Prompts(prompts[:number], dropped)

    def _request(self, taxonomy, prompts: list[Prompt], seed: int, number: int) -> dict:
        """Request ``number`` as the client takes it: a function of the settings, the seed and
        the prompts so far."""
        rng = np.random.default_rng([seed, 7, number])
        used, weights, wanted = (
            Counter(c for p in prompts for c in p.classes),
            np.asarray(self.counts, float),
            [],
        )
        for _ in range(self.per_request):
            size = min(
                int(rng.choice(len(weights), p=weights / weights.sum())) + 1, len(taxonomy.names)
            )
            order = sorted(rng.permutation(taxonomy.names).tolist(), key=used.__getitem__)[:size]
            used.update(order)
            wanted.append(order)
        messages = question(taxonomy, wanted, self.conditions, self.max_words, number)
        request = {"model": self.model, "messages": messages, "temperature": self.temperature}
        request["seed"] = (
            None if self.seed is None else sample_seed(self.seed, f"request {number}") % 2**31
        )
        request["response_format"] = schema(taxonomy) if self.json_schema else None
        return {key: value for key, value in request.items() if value is not None}

    def _prompt(self, row, taxonomy, nouns) -> tuple[Prompt | None, str | None]:
        """(prompt, None) of an entry of an answer, or (None, why it is not used)."""
        listed = row.get("classes") if _is_text(row) else None
        if not isinstance(listed, list) or any(not isinstance(name, str) for name in listed):
            return None, "not of the form {text, classes}"
        text = plain(row["text"])
        if not text or not text.isprintable():
            return None, "text is empty or holds control characters"
        if len(text.split()) > self.max_words:
            return None, f"longer than {self.max_words} words"
        named, by_word = nouns.find(text), taxonomy.words
        classes = [by_word.get(c.strip().lower()) for c in listed]
        if None in classes:
            return None, f"unknown class {listed[classes.index(None)]!r:.60}"
        missing = [c for c in classes if c not in named]
        if missing or not named:
            return None, f"does not name its class {missing[0]!r}" if missing else "names no class"
        prompt = make_prompt(text, named, self.append)
        try:
            find_words(prompt.text, named)  # without appended words, a synonym alone would not do
        except ValueError:
            return None, "names a class by a synonym alone, and append is off"
        return prompt, None

    def _repeats(self, prompt: Prompt, texts: dict) -> bool:
        """Whether an earlier caption of the same classes is as similar as drop_similar; a
        caption that is new is added."""
        if self.drop_similar is None:
            return False
        return texts.setdefault(frozenset(prompt.classes), Earlier(self.drop_similar)).repeats(
            prompt.text
        )

    def _too_few(
        self, found: int, number: int, asked: int, cached: int, dropped: list[dict]
    ) -> str:
        """``asked``: answers that were looked at, ``cached`` of which nobody was asked for now."""
        reasons = Counter(row["reason"] for row in dropped).most_common(8)
        counts = ", ".join(f"{n} x {reason}" for reason, n in reasons) or "few captions in each"
        where, kept = f" at {self.endpoint.url}", f"The answers are in {self.cache}"
        if cached:
            where = (
                f", {asked - cached} of them asked for now{where}"
                if cached < asked
                else ", none asked for now"
            )
            kept = f"{cached} of the {asked} answers were already in {self.cache}"
        if 2 * cached > asked:
            kept += "; to ask anew, move that file away or give another prompts.cache=..."
        return (
            f"{found} of {number} prompts after {asked} answers of {self.model}{where}; left out: "
            f"{counts}. {kept}. "
            f"Ask more often (prompts.max_requests={2 * asked}), for fewer (num_images), or "
            "another model or other "
            "prompts.conditions"
        )


def _is_text(row) -> bool:
    return isinstance(row, dict) and isinstance(row.get("text"), str)


def _left_out(text: str, reason: str) -> dict:
    return {
        "reason": reason,
        "filename": None,
        "caption": text[:300].encode("utf-8", "replace").decode(),
    }
