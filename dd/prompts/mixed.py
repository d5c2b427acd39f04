"""Prompts of several sources in given shares."""

from collections.abc import Mapping
from itertools import accumulate, pairwise

import numpy as np

from dd.prompts.base import PromptSource
from dd.prompts.prompt import Prompts
from dd.taxonomy import Taxonomy


class MixedPrompts:
    """Takes prompts of ``sources`` {name: source} in the ``shares`` {name: weight}, shuffled by the
    seed.

    ``append`` is that of every source. ValueError if names or ``append`` differ, for weights that
    are not positive, and without a number of prompts.
    """

    def __init__(
        self,
        sources: Mapping[str, PromptSource],
        shares: Mapping[str, float],
        append: bool = True,
    ) -> None:
        if sources.keys() != shares.keys():
            raise ValueError(
                f"prompts: sources {', '.join(sources)} and shares {', '.join(shares)} "
                "must have the same names"
            )
        if not shares or min(shares.values()) <= 0:
            raise ValueError(f"prompts.shares={dict(shares)}: a positive weight for each source")
        other = [name for name, source in sources.items() if source.append != append]
        if other:
            raise ValueError(
                f"prompts: append={append}, but source {other[0]} has append={not append}; "
                "all sources of a mixture need the same"
            )
        self.sources, self.shares, self.append = dict(sources), dict(shares), append

    def __call__(self, taxonomy: Taxonomy, number: int | None, seed: int) -> Prompts:
        if not number:
            raise ValueError("prompts: a mixture needs the number of prompts (num_images=...)")
        total, ends = sum(self.shares.values()), accumulate(self.shares.values(), initial=0.0)
        places = [round(number * end / total) for end in ends]
        parts = [
            source(taxonomy, b - a, seed) if b > a else Prompts()
            for source, (a, b) in zip(self.sources.values(), pairwise(places), strict=True)
        ]
        prompts = [prompt for part in parts for prompt in part]
        dropped = [row for part in parts for row in part.dropped]
        order = np.random.default_rng([seed, 6]).permutation(number)
        return Prompts([prompts[i] for i in order], dropped)
