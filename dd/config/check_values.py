"""Checks every value before any work starts: by the model of its script
(:mod:`dd.config.settings`) or, for a node with a ``_target_``, by the annotations of its
constructor or its own model."""

import inspect
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError

from dd.config.settings import SCRIPTS, Common, Evaluate, Generate
from dd.store.names import is_text
from dd.store.settings import Settings, check_kind, shown


def check_settings(script: str, cfg: Any) -> None:
    """ValueError for a value that the model of a script does not allow, for a required key that was
    removed, and for an interpolation of a missing key. Whole numbers become text where text is
    expected (``mask_set=1``)."""
    try:
        _check_settings(SCRIPTS[script], cfg)
    except InterpolationKeyError as error:  # names the first key that refers to a missing one
        if found := re.search(r"key '([^']*)'", str(error)):
            wanted = re.compile(rf"\$\{{\s*{re.escape(found[1])}\s*\}}")
            for key, value in _leaves(OmegaConf.to_container(cfg), ""):
                if isinstance(value, str) and wanted.search(value):
                    said = f"{key}={shown(value)}: there is no key {found[1]!r}"
                    raise ValueError(said) from None
        raise


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _check_settings(model: type[Common], cfg: Any) -> None:
    OmegaConf.select(cfg, "name", throw_on_missing=True)  # other keys refer to it
    given: Any = OmegaConf.to_container(cfg)
    for key, value in given.items():
        # groups first: many keys refer to their content
        group = key in model.model_fields and _is_group(model.model_fields[key].annotation)
        if group and not (isinstance(value, str) and "${" in value):
            check_kind(key, value, dict)
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    _check_texts(values)
    if model is Evaluate:  # the experiment of a set holds keys that only generating it needs
        others = Generate.model_fields.keys() - Evaluate.model_fields.keys()
        values = {key: value for key, value in values.items() if key not in others}
    checked = model(**values)
    for key, value in _leaves(checked.model_dump(), ""):
        if isinstance(value, str) and type(OmegaConf.select(cfg, key)) is int:
            OmegaConf.update(cfg, key, value)


def _is_group(annotation: Any) -> bool:
    is_model = isinstance(annotation, type) and issubclass(annotation, Settings)
    return is_model or typing.get_origin(annotation) is dict


def _check_texts(values: dict[str, Any]) -> None:
    """ValueError for text that file names, prompts or records cannot hold."""
    for key, value in _leaves(values, ""):
        if isinstance(value, str) and not is_text(value):
            raise ValueError(
                f"{key}={shown(value)}: expected text without NUL and unpaired surrogates"
            )


def check_arguments(key: str, target: Any, node: dict[str, Any]) -> None:
    """ValueError for an argument of ``node`` that the constructor of ``target`` does not take, or
    whose value has the wrong kind."""
    accepted = dict(inspect.signature(target).parameters)
    hints = typing.get_type_hints(target.__init__, include_extras=True)
    model = target if issubclass(target, Settings) else getattr(target, "Settings", Settings)
    fields = model.model_fields
    for field, info in fields.items():  # the bounds in Annotated apply as well
        hints[field] = Annotated[info.annotation, *info.metadata, "of the model"]
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values()) and not fields
    for name, value in node.items():
        if (name.startswith("_") and name.endswith("_")) or name == "chosen_on":
            continue  # keys of Hydra, and chosen_on (dd.evaluation.supervision)
        known = name in accepted or name in fields
        if not known and not anything:
            allowed = [*fields, *(n for n in accepted if n != "settings")]
            raise ValueError(
                f"{key}{name}: {target.__name__} takes no such setting; allowed: "
                f"{', '.join(allowed)}"
            )
        if known and name in hints and not _nested(value):
            check_kind(f"{key}{name}", value, hints[name])


def _nested(value: Any) -> bool:
    """Whether a value holds nodes that become objects."""
    if isinstance(value, dict):
        return "_target_" in value or any(_nested(v) for v in value.values())
    return isinstance(value, list) and any(_nested(v) for v in value)
