"""Similar captions: equal except for case and punctuation, or with nearly the same words."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

KEY_WORDS = 4  # a larger number means fewer comparisons but more keys in memory


def normalised(text: str) -> str:
    """Lower-case words joined without punctuation and spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def similar_to(texts: list[str], threshold: float) -> list[int | None]:
    """For each text the index of an earlier, kept text that it resembles, or None if it is kept
    itself.

    ``threshold`` 1: equal after :func:`normalised`. Below: Jaccard index of the word sets, ``|a &
    b| / |a | b|``, at least the threshold. Only texts with a common key are compared
    (:func:`_keys`). ValueError for a threshold outside [0.5, 1].
    """
    _check(threshold)
    plain = [normalised(t) for t in texts]
    if threshold == 1:
        first: dict[str, int] = {}
        return [
            None if first.setdefault(text, i) == i else first[text] for i, text in enumerate(plain)
        ]
    sets = [frozenset(text.split()) for text in plain]
    number = Counter(word for words in sets for word in words)
    rarity = {word: i for i, word in enumerate(sorted(number, key=lambda w: (number[w], w)))}
    kept: dict[frozenset[str], int] = {}
    index: dict[int, list[int]] = defaultdict(list)
    answers: list[int | None] = []
    for i, words in enumerate(sets):
        near = kept.get(words)
        if near is None:
            keys = _keys(sorted(rarity[word] for word in words), threshold)
            candidates = {j for key in keys for j in index.get(key, ())}
            near = next(
                (j for j in sorted(candidates) if _jaccard(words, sets[j]) >= threshold - 1e-9),
                None,
            )
        answers.append(near)
        if near is None:
            kept[words] = i
            for key in keys:
                index[key].append(i)
    return answers


class SeenCaptions:
    """``repeats(text)``: whether a text resembles an earlier kept one, as in :func:`similar_to`,
    for texts that arrive one by one. Uses word length as a proxy for rarity; this affects speed
    only."""

    def __init__(self, threshold: float) -> None:
        _check(threshold)
        self.threshold = threshold
        self.kept: set[str | frozenset[str]] = set()
        self.index: dict[int, list[frozenset[str]]] = defaultdict(list)

    def repeats(self, text: str) -> bool:
        plain = normalised(text)
        words = frozenset(plain.split())
        said = plain if self.threshold == 1 else words
        if said in self.kept:
            return True
        if self.threshold < 1:
            keys = _keys(sorted(words, key=lambda w: (-len(w), w)), self.threshold)
            near = {other for key in keys for other in self.index.get(key, ())}
            if any(_jaccard(words, other) >= self.threshold - 1e-9 for other in near):
                return True
            for key in keys:
                self.index[key].append(words)
        self.kept.add(said)
        return False


def _check(threshold: float) -> None:
    if not 0.5 <= threshold <= 1:
        raise ValueError(
            f"drop_similar={threshold}: "
            "a similarity from 0.5 to 1 (equal but for case and punctuation), or null"
        )


def _keys(ranks: Sequence[int] | Sequence[str], threshold: float) -> list[int]:
    """Keys of a word set, given by ``ranks`` (or the words) from rare to frequent. Two similar sets
    share at least one key.

    Sets that share n words, at least ``m = ceil(threshold * size)`` of each, have the first ``k =
    min(n, KEY_WORDS)`` of these among their first ``size - m + k`` words. The keys are combinations
    of k words (prefix filtering, Bayardo, Ma, Srikant, WWW 2007, with longer prefixes as in Wang,
    Li, Feng, SIGMOD 2012).
    """
    m = math.ceil(threshold * len(ranks) - 1e-9)
    sizes = range(min(m, KEY_WORDS), KEY_WORDS + 1)
    return [hash(key) for n in sizes for key in combinations(ranks[: len(ranks) - m + n], n)]


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
