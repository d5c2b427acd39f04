"""Dataset Diffusion for Python (docs/python.md)::

    drawn = dd.generate(["a photo of an apple and a mug"], ["apple", "mug"], to="data/mine")
    run = dd.train(drawn, to="outputs/mine", steps=100)
    dd.score(run, "data/shapes").miou
    dd.predict(run, drawn[0].image).show()

The verbs are those of :mod:`dd.api`, which is imported at the first use of one.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dd.api import Drawings, Drawn, Run, Scores, Shown, generate, predict, score, train

__all__ = [
    "Drawings",
    "Drawn",
    "Run",
    "Scores",
    "Shown",
    "generate",
    "predict",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dd' has no attribute {name!r}; it offers {__all__}")
    from dd import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
