"""Any segmenter of mmsegmentation's model zoo, by the name of its configuration file; its Runner is
not used."""

import difflib
import json
import logging
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dd.segmenters._compiled_ops import NAME, Placeholder, install_placeholder

install_placeholder()  # before the first import of mmseg

import mmseg  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.models.backbones import ResNet  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

from dd.segmenters.base import (  # noqa: E402
    SegmenterModule,
    SegmenterSettings,
    synchronise,
)
from dd.segmenters.deeplabv3 import quiet_construction  # noqa: E402
from dd.segmenters.weights import load_pretrained, local_file, read_weights  # noqa: E402
from dd.store.provenance import fingerprint, sha256  # noqa: E402

log = logging.getLogger(__name__)

CONFIGS = Path(mmseg.__file__).parent / ".mim/configs"
LIBRARIES = ("mmseg", "mmengine", "mmcv", "torch", "dd")  # a run records their versions
KINDS = ("EncoderDecoder", "CascadeEncoderDecoder")
PACKAGES = "(mmdet, mmpretrain and full mmcv are not part of this package)"


def config_file(name: str, trusted: bool = False) -> Path:
    """The configuration ``<model>/<file>`` (the folder and ``.py`` may be left out) among those
    that come with mmsegmentation. Another file only if ``trusted``, because reading a configuration
    executes it."""
    known = {f"{path.parent.name}/{path.stem}": path for path in sorted(CONFIGS.glob("[!_]*/*.py"))}
    wanted = str(name).removesuffix(".py")
    found = [path for key, path in known.items() if wanted in (key, key.partition("/")[2])]
    if len(found) == 1:
        return found[0]
    if Path(name).is_file():
        if trusted:
            return Path(name)
        raise ValueError(
            f"config={name!r} is a file outside mmsegmentation, and reading a configuration "
            "executes it as Python. If you have read it and trust it, add segmenter.trusted=true "
            "to train.py, trusted=true to other commands"
        )
    near = [key for key in known if key.startswith(f"{wanted}/")] or difflib.get_close_matches(
        wanted, known, n=5, cutoff=0.3
    )
    raise ValueError(
        f"config={name!r}: mmsegmentation {mmseg.__version__} has no such configuration among its "
        f"{len(known)}; near: {', '.join(near[:5]) or 'none'}. Names are <model>/<file>; models: "
        f"{', '.join(sorted({key.partition('/')[0] for key in known}))}"
    )


def read_config(name: str, trusted: bool = False) -> dict[str, Any]:
    """The ``model`` part of a configuration as a plain dictionary. ValueError if this package
    cannot run it."""
    try:
        config = Config.fromfile(config_file(name, trusted))
    except ImportError as error:
        what = str(error).partition(", the current")[0]
        raise ValueError(
            f"config={name!r} needs a package that is not installed: {what} {PACKAGES}"
        ) from error
    model = config.get("model")
    kind = model and model.get("type")
    if kind not in KINDS:
        raise ValueError(
            f"config={name!r} describes a model of type {kind!r}; allowed: {', '.join(KINDS)}"
        )
    if isinstance(model.decode_head, dict) and model.decode_head.get("type") == "PIDHead":
        raise ValueError(
            f"config={name!r} is trained on edge maps beside the masks (PIDHead), "
            "which the data here do not have"
        )
    return model.to_dict()


def config_sha256(model: Mapping[str, Any]) -> str:
    """SHA-256 of the ``model`` part of a configuration, including all that it inherits: it
    identifies what is built from the file."""
    return fingerprint(json.loads(json.dumps(model, default=_named)))


def own_code(net: torch.nn.Module, file: Path) -> dict[str, str]:
    """{module: SHA-256} of the code behind a network that comes from no installed library: the
    modules of its layers' classes, and the modules that these import or use names from. Classes
    that the configuration ``file`` defines itself are covered by that file."""
    found: dict[str, str] = {}
    waiting = {type(layer).__module__ for layer in net.modules()}
    while waiting:
        name = waiting.pop()
        if name in found or name.partition(".")[0] in LIBRARIES:
            continue
        module = sys.modules.get(name)
        path = getattr(module, "__file__", None)
        found[name] = sha256(Path(path) if path and Path(path).is_file() else file)
        used = {
            v.__name__ if isinstance(v, ModuleType) else getattr(v, "__module__", None)
            for v in vars(module or net).values()
        }
        waiting |= {n for n in used if isinstance(n, str) and _is_own(n)}
    return found


def _is_own(name: str) -> bool:
    """Whether a module lies outside Python's and the installed packages' folders."""
    path = getattr(sys.modules.get(name), "__file__", None)
    places = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")]
    return path is not None and not any(place in Path(path).resolve().parents for place in places)


def _named(value: Any) -> str:
    """The name of a class or function in a configuration; TypeError for anything else that is not a
    plain value."""
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else json.dumps(value)


def _dictionaries(node: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary inside ``node``, itself included."""
    inner: Iterable[Any] = node if isinstance(node, list | tuple) else ()
    if isinstance(node, dict):
        yield node
        inner = node.values()
    for child in inner:
        yield from _dictionaries(child)


def for_classes(model: dict[str, Any], num_classes: int) -> None:
    """Write ``num_classes`` into every head (single, in a list or nested), in place. Drops class
    weights of another data set."""
    heads = [model.get("decode_head"), model.get("auxiliary_head")]
    for node in _dictionaries(heads):
        if "num_classes" in node:
            node["num_classes"] = num_classes
            if node.get("type", "").endswith("Head") and node.get("out_channels") == 1:
                # binary, with a threshold
                node.update(out_channels=num_classes, threshold=None)
        weights = node.get("class_weight")
        if isinstance(weights, list | tuple) and len(weights) != num_classes:
            log.warning("class_weight of %d other classes dropped", len(weights))
            node["class_weight"] = None


def take_weights(model: dict[str, Any]) -> str | None:
    """Remove every mention of pre-trained weights, in place; returns those of the backbone, or
    None."""
    nodes = [model, *_dictionaries(model.get("backbone"))]
    named = [node["pretrained"] for node in nodes if isinstance(node.get("pretrained"), str)]
    for node in _dictionaries(model):
        if "pretrained" in node:
            node["pretrained"] = None
        inits = node.get("init_cfg") or []
        inits = inits if isinstance(inits, list | tuple) else [inits]
        loaded = [init for init in inits if init.get("type") == "Pretrained"]
        if loaded:
            node["init_cfg"] = [init for init in inits if init not in loaded] or None
            named += [init["checkpoint"] for init in loaded if any(node is n for n in nodes)]
    return named[0] if named else None


def _build(name: str, model: dict[str, Any], num_classes: int) -> torch.nn.Module:
    """The network. ValueError if it needs another package, or if its outputs have another
    meaning."""
    with quiet_construction(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="For binary segmentation", category=UserWarning)
        try:
            with DefaultScope.overwrite_default_scope("mmseg"):  # for the parts that mmcv builds
                net = MODELS.build(ConfigDict(model))
        except (KeyError, ImportError, AssertionError) as error:
            raise ValueError(f"config={name!r} cannot be built: {error} {PACKAGES}") from error
    head = net.decode_head
    outputs = (head[-1] if isinstance(head, torch.nn.ModuleList) else head).out_channels
    if outputs != num_classes:
        raise ValueError(
            f"config={name!r} has {outputs} outputs for {num_classes} classes; "
            "expected one for each class"
        )
    parts = {type(m) for m in net.modules()}
    compiled = sorted(
        part.__name__ for part in parts if hasattr(sys.modules[part.__module__], "ext_module")
    )
    if compiled and isinstance(sys.modules[NAME], Placeholder):
        raise ValueError(
            f"config={name!r} uses {', '.join(compiled)}, of mmcv's compiled operations, and "
            "mmcv-lite has none of them. To use it, install full mmcv 2.1.0 in place of "
            "mmcv-lite 2.1.0"
        )
    return net


def _take_colours(model: dict[str, Any]) -> tuple[bool, list[float], list[float]]:
    """Remove a configuration's colour settings; returns (whether it wants BGR, mean and standard
    deviation in RGB)."""
    colours = model.pop("data_preprocessor", None) or {}
    bgr = not colours.get("bgr_to_rgb", False)
    mean, std = (list(colours.get(k) or [v] * 3) for k, v in (("mean", 0.0), ("std", 1.0)))
    return (bgr, mean[::-1], std[::-1]) if bgr else (bgr, mean, std)


class ModelZooSettings(SegmenterSettings):
    """``config``: a name such as ``pspnet/pspnet_r50-d8_4xb4-40k_voc12aug-512x512``; for this and
    ``trusted`` see :func:`config_file`. ``pretrained``: None for random weights, ``config`` for the
    backbone's weights that the configuration names, else a source of
    :func:`dd.segmenters.weights.load_pretrained`. ``sync_bn``: on one device every synchronised
    batch norm of the configuration becomes a plain one."""

    config: str
    trusted: bool = False


class ModelZoo(SegmenterModule):
    """A model of mmsegmentation's zoo with our classes; its colours, heads and losses are those of
    its configuration. Its schedule, optimiser and augmentation are not used, and 255 is ignored.
    ``settings``: :class:`ModelZooSettings`."""

    Settings = ModelZooSettings

    def __init__(self, num_classes: int, **settings: Any) -> None:
        chosen = ModelZooSettings(**settings)
        with quiet_construction():
            model = read_config(chosen.config, chosen.trusted)
        described = config_sha256(model)
        bgr, mean, std = _take_colours(model)
        super().__init__(num_classes, mean=mean, std=std)
        self.bgr, self.files["config"] = bgr, described
        for_classes(model, num_classes)
        named = take_weights(model)
        for node in _dictionaries(model):
            if node.get("type") == "SyncBN":
                node["type"] = "BN"
        net = _build(chosen.config, model, num_classes)
        if code := own_code(net, config_file(chosen.config, chosen.trusted)):
            self.files["code"] = fingerprint(code)
        from_config = chosen.pretrained == "config"
        source = named if from_config else chosen.pretrained
        if from_config and source is None:
            raise ValueError(
                f"pretrained='config': config={chosen.config!r} names no weights; "
                "use null or a file"
            )
        # transformers convert their checkpoints while loading them
        converts = from_config and not isinstance(net.backbone, ResNet)
        if source is not None and converts:
            read_weights(source)
            net.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(local_file(source))}
        with quiet_construction():
            net.init_weights()
        if source is not None:
            if not converts:
                load_pretrained(net, source)
            self.files["pretrained"] = sha256(local_file(source))
        self.net = synchronise(net, chosen.sync_bn)

    @property
    def backbone(self) -> torch.nn.Module:
        return self.net.backbone

    def _inputs(self, images: torch.Tensor) -> torch.Tensor:
        images = self.normalise(images)
        return images.flip(1) if self.bgr else images

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], RGB, 0..255 -> logits [B, num_classes, H, W], with sliding windows
        if the configuration uses them."""
        size = images.shape[2:]
        meta = {"ori_shape": size, "img_shape": size, "pad_shape": size, "padding_size": [0] * 4}
        return self.net.inference(self._inputs(images), [dict(meta) for _ in images])

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The configuration's own losses by mmsegmentation's names (``decode.loss_ce``, ...),
        and ``loss``, their sum."""
        self.check_labels(images, labels)
        size = tuple(images.shape[2:])
        meta = {"ori_shape": size, "img_shape": size, "pad_shape": size}
        samples = [
            SegDataSample(gt_sem_seg=PixelData(data=label[None]), metainfo=meta) for label in labels
        ]
        total, named = self.net.parse_losses(self.net.loss(self._inputs(images), samples))
        return {**named, "loss": total}
