"""Prompts of several sources in given shares."""

from collections.abc import Callable, Mapping

import numpy as np

from dd.prompts.prompt import Prompts


class MixedPrompts:
    """``shares`` {source: weight} of the prompts of ``sources`` {source: callable}, shuffled by the
    seed.

    ``append``: that of every source. ValueError if the names or ``append`` differ, for weights that
    are not positive, and without a number of prompts.
    """

    def __init__(
        self, sources: Mapping[str, Callable], shares: Mapping[str, float], append: bool = True
    ):
        if sources.keys() != shares.keys():
            raise ValueError(
                f"prompts: sources {', '.join(sources)} and shares {', '.join(shares)} must have "
                "the same names"
            )
        if not shares or min(shares.values()) <= 0:
            raise ValueError(f"prompts.shares={dict(shares)}: a positive weight for each source")
        other = [name for name, source in sources.items() if source.append != append]
        if other:
            raise ValueError(
                f"prompts: append={append}, but source {other[0]} has append={not append}; a "
                "mixture has one"
            )
        self.sources, self.shares = dict(sources), dict(shares)

    def __call__(self, taxonomy, number: int | None, seed: int) -> Prompts:
        if not number:
            raise ValueError("prompts: a mixture needs the number of prompts (num_images=...)")
        total, ends = sum(self.shares.values()), [0]
        for share in self.shares.values():
            ends.append(ends[-1] + share)
        numbers = [
            round(number * b / total) - round(number * a / total)
            for a, b in zip(ends, ends[1:], strict=False)
        ]
        parts = [
            s(taxonomy, n, seed) if n else Prompts()
            for s, n in zip(self.sources.values(), numbers, strict=True)
        ]
        prompts = [prompt for part in parts for prompt in part]
        dropped = [row for part in parts for row in getattr(part, "dropped", [])]
        return Prompts(
            [prompts[i] for i in np.random.default_rng([seed, 6]).permutation(number)], dropped
        )
