"""Settings as typed models: each value is checked once, in one place, and refused with a message.

A noun of the configuration (a generator, masks, a segmenter) is a :class:`Settings`. Its fields
hold types and ranges. A refusal says what was got and what is allowed.
"""

import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)
from pydantic.errors import PydanticSchemaGenerationError
from pydantic.fields import FieldInfo

from dd.store.names import folder_name

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
# a whole number is accepted as text, as in mask_set=1
Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
# the name of a folder, or of one below another
Name = Annotated[Text, AfterValidator(lambda value, info: folder_name(value, info.field_name))]
Parts = Annotated[
    Text, AfterValidator(lambda value, info: folder_name(value, info.field_name, parts=True))
]
STRICT = ConfigDict(  # "3" is not a number, true is not 1
    strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
)
NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


class Hint(str):
    """``Annotated[float, Hint("such as 7.5")]``: added to the expected value in a refusal."""


class NoResult(str):
    """``Annotated[str, NoResult("where the run lies")]``: the field decides no result, and why."""


class Settings(BaseModel):
    """Base of all settings. Values are strict (``"3"`` is not a number), unknown names are refused,
    and nothing can be changed afterwards.

    ``noun``: the prefix of fields in messages, such as ``diffusion``. ValueError for a value that
    is not allowed.
    """

    model_config = ConfigDict(**STRICT, frozen=True, extra="forbid")
    noun: ClassVar[str] = ""
    missing: ClassVar[str] = "not given"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(self._said(error, values)) from None

    @classmethod
    def _said(cls, error: ValidationError, values: dict[str, Any]) -> str:
        """A message for the first error."""
        first = error.errors()[0]
        prefix = f"{cls.noun}." if cls.noun else ""
        name = (first["loc"] or ("",))[0]
        if first["type"] == "extra_forbidden":
            return f"{prefix}{name}: no such setting; allowed: {', '.join(cls.model_fields)}"
        if first["type"] == "missing":
            return f"{prefix}{name}: {cls.missing.format(key=f'{prefix}{name}')}"
        if first["type"] == "value_error":  # of one of our validators: keep its message
            said = str(first["ctx"]["error"])
            kind = cls.model_fields[str(name)].annotation if name else None
            inner = isinstance(kind, type) and issubclass(kind, Settings)
            if not name or inner or said.startswith(f"{name}."):  # the message names the key
                return said
            return prefix + (said if said.startswith(f"{name}=") else f"{name}: {said}")
        field = cls.model_fields[str(name)]
        return f"{prefix}{name}={shown(values.get(str(name)))}: expected {expected(field)}"

    def identity(self) -> dict[str, Any]:
        """The fields that decide a result: all but those marked :class:`NoResult`."""
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if not any(isinstance(mark, NoResult) for mark in field.metadata)
        }


def expected(field: FieldInfo) -> str:
    """The values that a field allows, in words."""
    kind = field.annotation
    marks = [m for m in field.metadata if not isinstance(m, str)]
    said = words(Annotated[kind, *marks] if marks else kind)
    hints = [m for m in field.metadata if isinstance(m, Hint)]
    return ", ".join([said, *hints])


def check_kind(key: str, value: Any, kind: Any) -> None:
    """ValueError, with what is allowed, for a plain ``value`` that is not of a ``kind`` (any
    annotation)."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind, config=STRICT)
        adapter.validate_json(json.dumps(value))  # as JSON, where a list is accepted as a tuple
    except (PydanticUserError, PydanticSchemaGenerationError):
        return  # an annotation that does not describe plain values
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # of one of our validators: keep its message
            said = str(first["ctx"]["error"])
            last = key.rpartition(".")[2]
            raise ValueError(f"{key}: {said.removeprefix(f'{last}: ')}") from None
        raise ValueError(f"{key}={shown(value)}: expected {words(kind)}") from error


def shown(value: Any) -> str:
    """A value as a user types it, at most 80 characters."""
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    )
    return text if len(text) <= 80 else f"{text[:80]}..."


def words(kind: Any) -> str:
    """An annotation in words: ``a whole number of 1 or more, or null``."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return words(parts[0]) + _range(parts[1:])
    if origin in (typing.Union, types.UnionType):
        each = dict.fromkeys(words(p) for p in sorted(parts, key=lambda p: p is type(None)))
        said = [word for word in each if word]
        return ", or ".join([", ".join(said[:-1])] * (len(said) > 1) + said[-1:])
    if origin is Literal:
        return ", ".join(str(p) for p in parts)
    if kind in NAMES:
        return NAMES[kind]
    if kind is dict or origin in (dict, Mapping):
        return "names with values, as {name: value}"
    if kind is list or origin in (list, tuple, Iterable, Sequence):
        inner = [p for p in parts if p not in (Ellipsis, Any)]
        return f"a list, each {words(inner[0])}" if inner else "a list"
    return ""


def _range(marks: Iterable[Any]) -> str:
    """`` from 1 to 1000``, `` of 1 or more``, `` above 0``; empty if no bound is given."""
    bounds = {
        type(m): getattr(m, type(m).__name__.lower())
        for m in marks
        if isinstance(m, Ge | Gt | Le | Lt)
    }
    if Ge in bounds and Le in bounds:
        return f" from {bounds[Ge]} to {bounds[Le]}"
    if Ge in bounds and Lt not in bounds:
        return f" of {bounds[Ge]} or more"
    said = {Ge: "of {} or more", Gt: "above {}", Le: "of {} or less", Lt: "below {}"}
    parts = [text.format(bounds[kind]) for kind, text in said.items() if kind in bounds]
    some = [" (one at least)" for m in marks if isinstance(m, MinLen) and m.min_length == 1]
    return (" " + ", ".join(parts) if parts else "") + "".join(some)
