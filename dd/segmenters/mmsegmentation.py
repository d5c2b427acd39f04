"""DeepLabV3 (Chen et al., 2017, arXiv:1706.05587) built from mmsegmentation's own parts, without its Runner."""

import difflib
import json
import logging
import pickle
import warnings
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from dd.segmenters._compiled_ops import install_placeholder

install_placeholder()  # before the first import of mmseg

import mmseg.models  # noqa: E402, F401  fills the registry
from mmengine.logging import MMLogger  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402

log = logging.getLogger(__name__)

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet in RGB, 0..255
CHANNELS = {  # depth: input and inner channels of the decode head, then of the auxiliary head
    18: (512, 128, 256, 64),
    50: (2048, 512, 1024, 256),
    101: (2048, 512, 1024, 256),
}


def deeplabv3_config(
    num_classes: int,
    depth: int = 50,
    sync_bn: bool = False,
    ignore_index: int = 255,
    avg_non_ignore: bool = False,
    auxiliary_weight: float = 0.4,
) -> dict:
    """mmsegmentation's ``_base_/models/deeplabv3_r50-d8.py`` (18: its r18-d8 files) with our classes and batch norm."""
    if depth not in CHANNELS:
        raise ValueError(f"depth={depth!r}: there is DeepLabV3 with a ResNet of depth {', '.join(map(str, CHANNELS))}")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: at least 2 are needed, background included")
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index={ignore_index} is also one of the {num_classes} classes (0..{num_classes - 1}); "
            f"choose a value outside them, as 255, and at most 255 classes for 8-bit masks"
        )
    if auxiliary_weight < 0:
        raise ValueError(f"auxiliary_weight={auxiliary_weight}: it multiplies a loss; use 0 or more (the paper: 0.4)")
    decode_in, decode_channels, auxiliary_in, auxiliary_channels = CHANNELS[depth]
    norm = {"type": "SyncBN" if sync_bn else "BN", "requires_grad": True}

    def head(loss_weight: float, **kwargs) -> dict:
        loss = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": loss_weight}
        return {
            "dropout_ratio": 0.1,
            "num_classes": num_classes,
            "out_channels": num_classes,  # mmsegmentation's default; said aloud, it no longer warns for two classes
            "norm_cfg": norm,
            "align_corners": False,
            "ignore_index": ignore_index,
            "loss_decode": {**loss, "avg_non_ignore": avg_non_ignore},
            **kwargs,
        }

    return {
        "type": "EncoderDecoder",
        "backbone": {
            "type": "ResNetV1c",
            "depth": depth,
            "num_stages": 4,
            "out_indices": (0, 1, 2, 3),
            "dilations": (1, 1, 2, 4),
            "strides": (1, 2, 1, 1),
            "norm_cfg": norm,
            "norm_eval": False,
            "style": "pytorch",
            "contract_dilation": True,
        },
        "decode_head": head(
            1.0, type="ASPPHead", in_channels=decode_in, in_index=3, channels=decode_channels, dilations=(1, 12, 24, 36)
        ),
        "auxiliary_head": head(
            auxiliary_weight,
            type="FCNHead",
            in_channels=auxiliary_in,
            in_index=2,
            channels=auxiliary_channels,
            num_convs=1,
            concat_input=False,
        ),
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }


@contextmanager
def _quiet_construction():
    """Keep back a warning about a choice made here on purpose, mmsegmentation's warning about a function that only it
    calls, and one console line for each parameter initialised."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Default ``avg_non_ignore`` is False", category=UserWarning)
        warnings.filterwarnings("ignore", message="``build_loss`` would be deprecated", category=UserWarning)
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)


class DeepLabV3(torch.nn.Module):
    """DeepLabV3 on a ResNetV1c with output stride 8, and the auxiliary FCN head that helps it train.

    The keys of ``state_dict()`` are those of mmsegmentation's EncoderDecoder: weights go either way.

    ``num_classes``: background included. ``depth``: 18, 50 or 101.
    ``pretrained``: None for random weights, else see :func:`load_pretrained`; the paper starts from
    ``open-mmlab://resnet50_v1c`` (``resnet101_v1c`` for 101).
    ``sync_bn``: batch norm over all processes; for training on more than one GPU.
    ``ignore_index``: the label without a loss. ``avg_non_ignore``: see :meth:`loss`.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 50,
        pretrained: str | None = None,
        sync_bn: bool = False,
        ignore_index: int = 255,
        avg_non_ignore: bool = False,
        auxiliary_weight: float = 0.4,
    ):
        super().__init__()
        self.num_classes, self.sync_bn, self.ignore_index = num_classes, sync_bn, ignore_index
        config = deeplabv3_config(num_classes, depth, sync_bn, ignore_index, avg_non_ignore, auxiliary_weight)
        with _quiet_construction():
            net = MODELS.build(config)
            net.init_weights()
        self.backbone, self.decode_head, self.auxiliary_head = net.backbone, net.decode_head, net.auxiliary_head
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        if pretrained is not None:
            load_pretrained(self, pretrained)

    def _features(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)}: expected [B, 3, H, W], RGB, 0..255")
        if self.training and len(images) == 1 and not self.sync_bn:
            raise ValueError(
                "got a batch of one image in training mode: ASPP pools an image to one pixel, and batch norm needs two "
                "or more; use a larger batch (with drop_last), sync_bn=True on several GPUs, or model.eval()"
            )
        return self.backbone((images.to(self.mean.dtype) - self.mean) / self.std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], RGB, 0..255, uint8 or float -> logits [B, num_classes, H, W] (not yet a softmax)."""
        logits = self.decode_head(self._features(images))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross-entropy of both heads, equal to mmsegmentation's: ``decode.loss_ce``, ``aux.loss_ce``, ``loss``.

        ``labels``: int64 [B, H, W], 0..num_classes-1 or ``ignore_index``. ``aux.loss_ce`` is already multiplied by
        ``auxiliary_weight``; ``loss`` is the sum of the two. Pixels with ``ignore_index`` add nothing to the sum over
        pixels, which is then divided by the number of **all** pixels, ignored ones included (mmsegmentation's
        default, so a half ignored batch has half the loss), or by that of the others with ``avg_non_ignore=True``
        (PyTorch's way; 0 where all are ignored).
        """
        self._check_labels(images, labels)
        features = self._features(images)
        losses = {}
        for name, head in (("decode", self.decode_head), ("aux", self.auxiliary_head)):
            logits = F.interpolate(head(features), size=labels.shape[1:], mode="bilinear", align_corners=False)
            losses[f"{name}.loss_ce"] = head.loss_decode(logits, labels, ignore_index=self.ignore_index)
        losses["loss"] = losses["decode.loss_ce"] + losses["aux.loss_ce"]
        return losses

    def _check_labels(self, images, labels):
        expected = (len(images), *images.shape[2:])
        if labels.dtype != torch.int64 or tuple(labels.shape) != expected:
            raise ValueError(f"labels: expected int64 {expected}, got {labels.dtype} {tuple(labels.shape)}")
        wrong = ((labels < 0) | (labels >= self.num_classes)) & (labels != self.ignore_index)
        if wrong.any():  # on a GPU an unchecked label is an assertion in the device, after which nothing works
            raise ValueError(
                f"labels hold the values {labels[wrong].unique()[:8].tolist()}; allowed: 0..{self.num_classes - 1}, "
                f"and {self.ignore_index} to ignore a pixel. Do the masks belong to this model's classes?"
            )

    def parameter_groups(
        self,
        learning_rate: float,
        weight_decay: float,
        backbone_multiplier: float = 0.1,
    ) -> list[dict]:
        """Groups for a torch optimiser: the backbone learns at ``backbone_multiplier`` times the rate of the heads."""
        heads = [*self.decode_head.parameters(), *self.auxiliary_head.parameters()]
        return [
            {
                "name": "backbone",
                "params": list(self.backbone.parameters()),
                "lr": learning_rate * backbone_multiplier,
                "weight_decay": weight_decay,
            },
            {"name": "heads", "params": heads, "lr": learning_rate, "weight_decay": weight_decay},
        ]


class _Discarded:
    """Stands for everything of a training log in an mmengine checkpoint: made from anything, does and keeps nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# What mmengine's Runner saves beside the weights, in its HistoryBuffers. torch.load sees these names, but never them.
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


def _local_file(source: str) -> Path:
    """The file that ``source`` names; an open-mmlab:// name or a URL is downloaded once, to torch.hub's cache."""
    url = source
    if source.startswith("open-mmlab://"):
        known = json.loads((files("mmengine") / "hub/openmmlab.json").read_text())
        name = source.removeprefix("open-mmlab://")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or ["resnet18_v1c", "resnet50_v1c", "resnet101_v1c"]
            raise ValueError(f"pretrained={source!r}: mmengine knows no such weights; did you mean {', '.join(near)}?")
        url = known[name]
    if not url.startswith(("https://", "http://")):
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"pretrained={source!r}: no such file; allowed: a .safetensors or .pth file, open-mmlab://<name>, a URL"
            )
        return Path(source)
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target), progress=False)
        except OSError as error:
            raise ConnectionError(
                f"pretrained={source!r}: cannot download {url} ({error}). On a machine without network, bring the file "
                f"there yourself and pass its path, pretrained=/path/to/{target.name}, or place it at {target}"
            ) from error
    return target


def read_weights(source: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, on the CPU; nothing in the file is executed.

    ``source``: a .safetensors or .pth file, ``open-mmlab://<name>``, or a URL. Checkpoints of mmengine's Runner are
    read, and their training logs discarded. ValueError for a .pth that holds other objects than tensors.
    """
    path = _local_file(source)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(_Discarded, name) for name in LOG_TYPES]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content.get("state_dict", content)
    except (SafetensorError, pickle.UnpicklingError, AttributeError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{source}: refused, for it is damaged, no state dict, or holds objects that could execute code on loading "
            f"({str(error).strip().partition(chr(10))[0]}). If you trust it, save its tensors as .safetensors instead"
        ) from error
    return {name.removeprefix("module."): w for name, w in weights.items() if isinstance(w, torch.Tensor)}


def load_pretrained(model: DeepLabV3, source: str) -> list[str]:
    """Load a backbone or a whole DeepLabV3 from ``source`` (see :func:`read_weights`); returns what stayed random.

    A backbone file (ImageNet; its classifier is not used) must match in every tensor. In a whole DeepLabV3 only the
    last layer of each head (``conv_seg``) may differ in its number of classes; it then stays random. Anything else,
    as weights of another depth, raises ValueError with the names.
    """
    weights = read_weights(source)
    whole = any(name.startswith("decode_head.") for name in weights)
    if whole:
        target, unused = model, []
    else:
        target = model.backbone
        weights = {name.removeprefix("backbone."): w for name, w in weights.items()}
        unused = [name for name in weights if name.startswith(("fc.", "head."))]  # the ImageNet classifier
    own = target.state_dict()
    missing = [n for n in own if n not in weights and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in weights if n not in own and n not in unused]
    differing = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    left_random = [n for n in differing if ".conv_seg." in n]
    differing = [n for n in differing if n not in left_random]
    if missing or unexpected or differing:
        problems = {"missing in the file": missing, "unexpected": unexpected, "of another shape": differing}
        listed = "; ".join(f"{len(ns)} {what} ({', '.join(ns[:3])}, ...)" for what, ns in problems.items() if ns)
        raise ValueError(
            f"{source}: does not fit {'this DeepLabV3' if whole else f'a ResNetV1c of depth {model.backbone.depth}'}: "
            f"{listed}. Use weights of the same depth and variant (v1c), as open-mmlab://resnet{model.backbone.depth}_v1c"
        )
    target.load_state_dict({n: w for n, w in weights.items() if n in own and n not in left_random}, strict=False)
    log.info("%s: loaded the %s; not used: %s", source, "whole model" if whole else "backbone", unused or "nothing")
    if left_random:
        log.warning("%s: made for another number of classes; left random: %s", source, left_random)
    return left_random
