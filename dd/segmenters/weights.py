"""Weights of mmsegmentation's models and backbones: found by name or URL, downloaded once, read
without executing anything."""

import difflib
import json
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

log = logging.getLogger(__name__)

HUBS = {  # lists that mmengine ships
    "open-mmlab://": "openmmlab.json",
    "torchvision://": "torchvision_0.12.json",
}
# blocks in each stage: depth
RESNETS = {(2, 2, 2, 2): "18", (3, 4, 6, 3): "50", (3, 4, 23, 3): "101"}


class _Discarded:
    """Replaces every object of a training log in an mmengine checkpoint: accepts any arguments,
    does nothing and keeps nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What mmengine's Runner saves beside the weights, in its HistoryBuffers. torch.load resolves these
# names to _Discarded, never to the real objects.
LOG_TYPES = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "_codecs.encode",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
)

# errors when a file is not a complete and harmless checkpoint
DAMAGE = (SafetensorError, pickle.UnpicklingError, AttributeError, RuntimeError, EOFError)


def weights_url(source: str) -> str:
    """The URL of ``open-mmlab://<name>`` or ``torchvision://<name>`` in mmengine's own list; other
    sources unchanged."""
    for prefix, listed in HUBS.items():
        if source.startswith(prefix):
            known = json.loads((files("mmengine") / "hub" / listed).read_text())
            name = source.removeprefix(prefix)
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3) or list(known)[:3]
                raise ValueError(
                    f"pretrained={source!r}: mmengine knows no such weights; "
                    f"did you mean {', '.join(near)}?"
                )
            return known[name]
    return source


def local_file(source: str) -> Path:
    """The file that ``source`` names. A hub name or a URL is downloaded once, to torch.hub's cache,
    and must have the SHA-256 that its name ends with (``-2cccc1ad.pth``)."""
    url = weights_url(source)
    if not url.startswith(("https://", "http://")):
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"pretrained={source!r}: no such file; allowed: a .safetensors or .pth file, "
                "open-mmlab://<name>, a URL"
            )
        return Path(source)
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.\w+$", target.name)
        by_hand = (
            "bring the file there yourself and give its path, "
            f"segmenter.pretrained=/path/to/{target.name}"
        )
        try:
            torch.hub.download_url_to_file(
                url, str(target), hash_prefix=digest and digest[1], progress=False
            )
        except OSError as error:
            raise FileNotFoundError(
                f"pretrained={source!r}: cannot download {url} ({error}). On a machine without "
                f"network, {by_hand}, or place it at {target}"
            ) from error
        except RuntimeError as error:  # the hash
            raise ValueError(
                f"pretrained={source!r}: the download from {url} is not the file that its name "
                f"promises ({error}). Try again, or {by_hand}"
            ) from error
    return target


def read_weights(source: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, on the CPU; nothing in the file is executed.

    ``source``: a .safetensors or .pth file, ``open-mmlab://<name>``, ``torchvision://<name>``, or a
    URL. Checkpoints of mmengine's Runner are read, and their training logs discarded. ValueError
    for a .pth that holds objects other than tensors.
    """
    path = local_file(source)
    try:
        if path.suffix == ".safetensors":
            return _plain(load_file(path), source)
        with torch.serialization.safe_globals([(_Discarded, name) for name in LOG_TYPES]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        keys = ("state_dict", "model", "model_state_dict")
        weights = next((content[k] for k in keys if isinstance(content.get(k), dict)), content)
    except DAMAGE as error:
        raise ValueError(
            f"{source}: refused, because it is damaged, not a state dict, or holds objects that "
            f"could execute code on loading ({str(error).strip().partition(chr(10))[0]}). If you "
            "trust it, save its tensors as .safetensors instead"
        ) from error
    return _plain({name: w for name, w in weights.items() if isinstance(w, torch.Tensor)}, source)


def _plain(weights: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Weights without name prefixes from wrapped models. ValueError for numbers that are not
    finite."""
    for wrapper in ("module.", "model."):
        if weights and all(name.startswith(wrapper) for name in weights):
            weights = {name.removeprefix(wrapper): w for name, w in weights.items()}
    numbers = {name: w for name, w in weights.items() if w.is_floating_point() and not w.is_meta}
    wrong = [name for name, w in numbers.items() if not torch.isfinite(w).all()]
    if wrong:
        raise ValueError(
            f"{source}: {len(wrong)} of its {len(weights)} tensors hold numbers that are not "
            f"finite, such as {wrong[0]}: the training that made it went wrong, "
            "or the file is damaged"
        )
    return weights


def _resnet_in(weights: Mapping[str, torch.Tensor]) -> str:
    """What a backbone's file holds, for an error: ``, which holds a ResNet of depth 50``; empty if
    unknown."""
    blocks = {m.groups() for name in weights if (m := re.match(r"layer(\d)\.(\d+)\.", name))}
    depth = RESNETS.get(tuple(sum(stage == str(i) for stage, _ in blocks) for i in (1, 2, 3, 4)))
    if depth == "50" and "layer1.0.conv3.weight" not in weights:
        depth = "34"
    stems = {"stem.0.weight": "V1c", "conv1.weight": " (v1b, torchvision's)"}
    variant = next((said for name, said in stems.items() if name in weights), "")
    return f", which holds a ResNet{variant} of depth {depth}," if depth else ""


def load_pretrained(model: torch.nn.Module, source: str) -> list[str]:
    """Load a backbone or a whole EncoderDecoder from ``source`` (see :func:`read_weights`); returns
    the names that stayed random.

    A backbone file (ImageNet; its classifier is not used) must match in every tensor. In a whole
    model only the last layer of each head (``conv_seg``) may differ in its number of classes, and
    then stays random. Anything else, such as weights of another depth, raises ValueError with the
    names.
    """
    weights, unused = read_weights(source), []
    whole = any(name.startswith("decode_head.") for name in weights)
    if not whole:
        weights = {name.removeprefix("backbone."): w for name, w in weights.items()}
        unused = [name for name in weights if name.startswith(("fc.", "head."))]  # the classifier
    target = model if whole else model.backbone
    own = target.state_dict()
    problems, left_random = _compare(own, weights, unused)
    if any(problems.values()):
        raise ValueError(f"{source}{_resnet_in(weights)} {_misfit(model, whole, problems)}")
    target.load_state_dict(
        {n: w for n, w in weights.items() if n in own and n not in left_random}, strict=False
    )
    what = "whole model" if whole else "backbone"
    log.info("%s: loaded the %s; not used: %s", source, what, unused or "nothing")
    if left_random:
        log.warning("%s: made for another number of classes; left random: %s", source, left_random)
    return left_random


def _compare(
    own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], unused: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """({what is wrong: names of a file's weights}, last layers for other classes)."""
    differing = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    missing = [n for n in own if n not in weights and not n.endswith("num_batches_tracked")]
    problems = {
        "missing in the file": missing,
        "unexpected": [n for n in weights if n not in own and n not in unused],
        "of another shape": [n for n in differing if ".conv_seg." not in n],
    }
    return problems, [n for n in differing if ".conv_seg." in n]


def _misfit(model: torch.nn.Module, whole: bool, problems: Mapping[str, Sequence[str]]) -> str:
    """Why a file does not fit, and which weights would."""
    kind, depth = type(model.backbone).__name__, getattr(model.backbone, "depth", None)
    listed = "; ".join(
        f"{len(ns)} {what} ({', '.join(ns[:3])}, ...)" for what, ns in problems.items() if ns
    )
    wanted = f"this {type(model).__name__}" if whole else f"a {kind}"
    if depth and not whole:
        wanted += f" of depth {depth}"
    advice = f"Use weights of the same {'depth and variant' if depth else 'model'}"
    if kind == "ResNetV1c":
        advice += f", such as open-mmlab://resnet{depth}_v1c"
    return f"does not fit {wanted}: {listed}. {advice}"
