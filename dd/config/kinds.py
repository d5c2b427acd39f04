"""Of what kind a setting is: that of its shipped default, a line of ``KINDS`` where the default
does not tell, or, of a node with a ``_target_``, the annotation in its constructor. Everything is
looked at before any work starts."""

import inspect
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError

from dd.store.names import is_text
from dd.store.settings import Count, Natural, check_kind, shown

Numbers, Names = list[float], list[str]
Class = Annotated[str, "of an object"]  # never a number that means text
# of keys whose default is null, is not the only kind, or leaves out values that make no sense
KINDS = {
    "seed": Natural,
    "labeler.run": str,
    "num_images": Count | None,
    "unit_size": Count | Literal["auto"],
    "redraw": Natural,
    "masks_from": str | None,
    "caption.images": str | None,
    "caption.batch_size": Count,
    "probe.timesteps": list[Natural],
    "probe.limit": Count | None,
    "sweep.power": list[Natural] | None,
    "sweep.source": Names | None,
    "sweep.masks": str | None,
    "sweep.run": str | None,
    "sweep.name": str | None,
    "sweep.limit": Count | None,
    "sweep.workers": Count | None,
    "calibrate.shots": Count,
    "calibrate.cross_resolution": list[int] | None,
    "calibrate.self_resolution": list[int] | None,
    "calibrate.cross_layers": list[Names | None] | None,
    "calibrate.cross_heads": list[list[int] | None] | None,
    "quality.rules": dict,
    "quality.clip.model": str | None,
    "prompts.append": bool,
    "diffusion.full_prompt": bool | Literal["appended", "caption"],
    "data.taxonomy": str,
    "data.images": str | Names | None,
    "data.tune_split": str | None,
    "data.synthetic": str | None,
    "shots": Count | Literal["all"] | None,
    "shots_list": str | None,
    "hold_out": Count | None,
    "init_from": str | None,
    "chosen_on": dict,
    "masks.chosen_on": dict | list[dict] | None,
    "diffusion.chosen_on": dict | list[dict] | None,
    "self_training.chosen_on": dict | list[dict] | None,
    "unlabelled.images": str | None,
    "unlabelled.list": str | None,
    "batch_size": Count,
    "num_workers": Natural,
    "scale": Count,
    "self_training.teacher": dict | None,
    "trainer.callbacks": dict[str, dict | None],
    "trainer.devices": int | str | list[int],
    "trainer.precision": int | str | None,
    "search.space": dict | str | None,
    "search.trials": Count,
    "search.pruner_settings": dict | None,
    "study.shots": list[int | str],
    "study.synthetic": Names | None,
    "study.arms": Names | None,
    "study.learning_rates": dict[str, Numbers | None] | None,
    "study.choose": dict | None,
    "study.prices": dict[str, float] | None,
    "study.targets": Numbers | None,
    "study.generation_seconds": float | None,
    "adapter.images": str | None,
    "adapter.list": str | None,
    "adapter.captions": str | None,
    "adapter.generator.size": Count | None,
    "adapter.training.min_snr_gamma": float | None,
    "run": str | None,
    "report.runs": str | None,
    "images": str | None,
    "output": str | None,
    "predict.every": Count,
    "max_pixels": Count,
    "review.number": Count,
    "review.leave_out": str | None,
    "review.distinct": Natural | None,
    "report.baseline": str | None,
    "labeler.confidence": float | None,
}


def check_kinds(cfg, default) -> None:
    """ValueError for a value of another kind than that of the shipped ``default`` (a configuration
    of the same choices), for a key that the command needs and that was taken away, and for an
    interpolation that leads nowhere. Whole numbers where text belongs become text
    (``mask_set=1``)."""
    try:
        _check_kinds(cfg, default)
    except InterpolationKeyError as error:  # of the first key that refers to a key that does
        found = re.search(r"key '([^']*)'", str(error))
        for key, value in _leaves(OmegaConf.to_container(cfg), "") if found else ():
            if isinstance(value, str) and re.search(rf"\$\{{\s*{re.escape(found[1])}\s*\}}", value):
                raise ValueError(f"{key}={shown(value)}: there is no key {found[1]!r}") from None
        raise


def _leaves(value, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _check_kinds(cfg, default) -> None:
    OmegaConf.select(cfg, "name", throw_on_missing=True)  # others refer to it
    for key, value in OmegaConf.to_container(
        cfg
    ).items():  # groups first: much refers to what is in them
        if OmegaConf.is_dict(default.get(key)) and not (isinstance(value, str) and "${" in value):
            check_kind(key, value, dict)
    OmegaConf.resolve(default)
    values = OmegaConf.to_container(cfg, resolve=True)
    _check_texts(values)
    _compare(cfg, values, OmegaConf.to_container(default), "")


def _check_texts(values: dict) -> None:
    """ValueError for text that no file name, prompt or record can hold."""
    for key, value in _leaves(values, ""):
        if isinstance(value, str) and not is_text(value):
            raise ValueError(
                f"{key}={shown(value)}: expected text without a NUL and without half characters"
            )


def _compare(cfg, values: dict, defaults: dict, prefix: str) -> None:
    foreign = "_target_" in defaults  # its constructor knows better: check_arguments
    for name, default in defaults.items():
        key = f"{prefix}{name}"
        kind = Class if name == "_target_" else KINDS.get(key, None if foreign else _kind(default))
        if name not in values:
            loose = (
                prefix and isinstance(default, dict) and "_target_" in default
            )  # one callback, one logger
            if (kind is not None or prefix == "trainer.") and not loose:
                raise ValueError(f"{key}: taken away, and the command needs it; leave ~{key} out")
            continue
        value = values[name]
        if value == "???":
            continue
        if kind is str and type(value) is int:
            OmegaConf.update(cfg, key, str(value))
        elif kind is not None:
            check_kind(key, value, kind)
        if (
            isinstance(value, dict) and isinstance(default, dict) and key not in KINDS
        ):  # they may be left out: null
            _compare(cfg, value, default, f"{key}.")


def _kind(default):
    """The kind of a default value; None where it tells nothing."""
    if isinstance(default, list):
        return list[tuple({_kind(v) or Any for v in default})] if default else list
    if isinstance(default, dict):
        return dict
    return None if default is None else type(default)


def check_arguments(key: str, target, node: dict) -> None:
    """ValueError for an argument of ``node`` that the constructor of ``target`` does not take, or
    not of that kind."""
    accepted = dict(inspect.signature(target).parameters)
    hints = typing.get_type_hints(target.__init__, include_extras=True)
    fields = target.Settings.model_fields if hasattr(target, "Settings") else {}
    for field, info in fields.items():  # Annotated takes the bounds back
        hints[field] = Annotated[info.annotation, *info.metadata, "of the model"]
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for name, value in node.items():
        if (name.startswith("_") and name.endswith("_")) or name == "chosen_on":
            continue  # of Hydra, and which labels chose the values (dd.evaluation.supervision)
        if name not in accepted and name not in fields and (fields or not anything):
            allowed = [*fields, *(n for n in accepted if n != "settings")]
            raise ValueError(
                f"{key}{name}: {target.__name__} takes no such setting; allowed: "
                f"{', '.join(allowed)}"
            )
        if name in hints and (name in accepted or name in fields) and not _nested(value):
            check_kind(f"{key}{name}", value, hints[name])


def _nested(value) -> bool:
    """Whether a value holds nodes that are made into objects."""
    if isinstance(value, dict):
        return "_target_" in value or any(_nested(v) for v in value.values())
    return isinstance(value, list) and any(_nested(v) for v in value)
