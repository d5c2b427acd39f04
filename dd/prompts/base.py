"""The interface of prompt sources: a file, templates, a language model, a mixture."""

from typing import Annotated, Protocol

from pydantic import AfterValidator

from dd.prompts.prompt import Prompts
from dd.taxonomy import Taxonomy


class PromptSource(Protocol):
    """``source(taxonomy, number, seed)`` -> the prompts of a plan.

    Returns ``number`` prompts, each with one or more classes of the taxonomy; the same arguments
    give the same prompts. Without a number (None or 0) a finite source returns all it has, once
    each or as often as its balancing requires; an endless one (templates, a language model, a
    mixture) raises ValueError. ``append``: whether class words are appended to the texts.

    Captions that were left out are listed in ``dropped`` of the
    :class:`dd.prompts.prompt.Prompts`. ValueError or FileNotFoundError say what is wrong with the
    source, and name its setting.
    """

    append: bool

    def __call__(self, taxonomy: Taxonomy, number: int | None, seed: int) -> Prompts: ...


def _weights(given: list[float]) -> list[float]:
    if not given or min(given) < 0 or not sum(given):
        raise ValueError(f"got {given}, expected weights of 0 or more, not all 0")
    return given


def _text(given: str) -> str:
    if not given.strip():
        raise ValueError(f"got {given!r}, expected a text that is not empty")
    return given


Weights = Annotated[list[float], AfterValidator(_weights)]
Text = Annotated[str, AfterValidator(_text)]
