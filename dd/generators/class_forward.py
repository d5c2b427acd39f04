"""A second forward pass at each step of a drawing, with the class prompts as text. Joint attention
has no keys of the class prompt without it (docs/method.md)."""

from dataclasses import replace
from typing import Any, Self

from dd.attention.recorder import AttentionRecorder, Half, Reading, Words
from dd.generators.families import Family, Text


class ClassForward:
    """While active, shows the conditional input of each ``every``-th step to the network again with
    ``text``, the class prompts. ``recorder`` reads only these forward passes. ``drawing`` tells
    which half belongs to the drawing itself, and leaves them out."""

    def __init__(
        self,
        family: Family,
        text: Text,
        spans: list[dict[str, list[list[int]]]],
        reading: Reading,
        half: Half,
    ) -> None:
        self.family, self.text, self.half, self.every = family, text, half, reading.every
        self.steps, self.inside = 0, False
        words = Words(spans)
        self.recorder = AttentionRecorder(family.net, replace(reading, every=1), words, self._own)

    def _own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> slice | None:
        return slice(None) if self.inside else None

    def drawing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> slice | None:
        return None if self.inside else self.half(args, kwargs)

    def __enter__(self) -> Self:
        self.recorder.__enter__()
        self.handle = self.family.net.register_forward_hook(self._again, with_kwargs=True)
        return self

    def __exit__(self, *given: object) -> None:
        self.handle.remove()
        self.recorder.__exit__(*given)

    def _again(
        self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: object
    ) -> None:
        if self.inside or (rows := self.half(args, kwargs)) is None:
            return
        self.steps += 1
        if (self.steps - 1) % self.every:
            return
        self.inside = True
        try:
            args, kwargs = self.family.with_text(args, kwargs, rows, self.text)
            network(*args, **kwargs)
        finally:
            self.inside = False
