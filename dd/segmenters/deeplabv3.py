"""DeepLabV3 (Chen et al., 2017, arXiv:1706.05587) built from mmsegmentation's own parts, without
its Runner."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, MinLen, MultipleOf

from dd.segmenters._compiled_ops import install_placeholder

install_placeholder()  # before the first import of mmseg

import mmseg.models  # noqa: E402, F401  fills the registry
from mmengine.logging import MMLogger  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402

from dd.segmenters.base import (  # noqa: E402
    SYNC_BN,
    SegmenterModule,
    SegmenterSettings,
    synchronise,
)
from dd.segmenters.weights import load_pretrained, local_file  # noqa: E402
from dd.store.provenance import sha256  # noqa: E402
from dd.store.settings import Count, Hint  # noqa: E402

CHANNELS = {  # depth: input and inner channels of the decode head, then of the auxiliary head
    18: (512, 128, 256, 64),
    50: (2048, 512, 1024, 256),
    101: (2048, 512, 1024, 256),
}


class DeepLabV3Settings(SegmenterSettings):
    """``pretrained``: see :func:`dd.segmenters.weights.load_pretrained`; the paper starts from
    ``open-mmlab://resnet50_v1c`` (``resnet101_v1c`` for 101). ``ignore_index``: the label without a
    loss. ``avg_non_ignore``: see :meth:`DeepLabV3.loss`. ``auxiliary_weight``: factor of the
    auxiliary loss.

    ``base_channels``: of the backbone's first stage (mmsegmentation's name). With a number other
    than the published 64, every layer, including the heads', is scaled by ``base_channels / 64``.
    ``dilations``: of the ASPP module's branches, in cells of 8 pixels. If they exceed the feature
    map, all but the centre of a 3x3 kernel sees only padding.
    """

    depth: Literal[18, 50, 101] = 50
    sync_bn: Annotated[bool | Literal["auto"], SYNC_BN] = False
    ignore_index: int = 255
    avg_non_ignore: bool = False
    auxiliary_weight: Annotated[float, Ge(0), Hint("as the paper's 0.4")] = 0.4
    base_channels: Annotated[
        int, Ge(8), MultipleOf(8), Hint("a multiple of 8, such as 32 or the published 64")
    ] = 64
    dilations: Annotated[Sequence[Count], MinLen(1), Hint("as the published [1, 12, 24, 36]")] = (
        1,
        12,
        24,
        36,
    )


def deeplabv3_config(num_classes: int, settings: DeepLabV3Settings) -> dict[str, Any]:
    """mmsegmentation's ``_base_/models/deeplabv3_r50-d8.py`` (18: its r18-d8 files) with our
    classes and batch norm."""
    width = settings.base_channels
    decode_in, decode_channels, auxiliary_in, auxiliary_channels = (
        n * width // 64 for n in CHANNELS[settings.depth]
    )
    norm = {"type": "BN", "requires_grad": True}

    def head(loss_weight: float, **kwargs: Any) -> dict[str, Any]:
        loss = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": loss_weight}
        return {
            "dropout_ratio": 0.1,
            "num_classes": num_classes,
            # mmsegmentation's default; set explicitly, it no longer warns for two classes
            "out_channels": num_classes,
            "norm_cfg": norm,
            "align_corners": False,
            "ignore_index": settings.ignore_index,
            "loss_decode": {**loss, "avg_non_ignore": settings.avg_non_ignore},
            **kwargs,
        }

    return {
        "type": "EncoderDecoder",
        "backbone": {
            "type": "ResNetV1c",
            "depth": settings.depth,
            "num_stages": 4,
            "out_indices": (0, 1, 2, 3),
            "dilations": (1, 1, 2, 4),
            "strides": (1, 2, 1, 1),
            "norm_cfg": norm,
            "norm_eval": False,
            "style": "pytorch",
            "contract_dilation": True,
            **({} if width == 64 else {"stem_channels": width, "base_channels": width}),
        },
        "decode_head": head(
            1.0,
            type="ASPPHead",
            in_channels=decode_in,
            in_index=3,
            channels=decode_channels,
            dilations=tuple(settings.dilations),
        ),
        "auxiliary_head": head(
            settings.auxiliary_weight,
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
def quiet_construction() -> Iterator[None]:
    """Hide three kinds of output: a warning about a choice made here on purpose, mmsegmentation's
    warning about a function that only it calls, and a console line for each initialised
    parameter."""
    logger = MMLogger.get_current_instance()
    level, handlers = logger.level, logger.handlers
    with warnings.catch_warnings():
        for message in (
            "Default ``avg_non_ignore`` is False",
            "``build_loss`` would be deprecated",
        ):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        logger.setLevel(logging.WARNING)
        # mmengine writes to the log file of a Runner of the same process, even a closed one
        logger.handlers = []
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.handlers = handlers


class DeepLabV3(SegmenterModule):
    """DeepLabV3 on a ResNetV1c with output stride 8, and the auxiliary FCN head that helps it
    train.

    The keys of ``state_dict()`` are those of mmsegmentation's EncoderDecoder: weights can be
    exchanged both ways.

    ``num_classes``: background included. ``settings``: :class:`DeepLabV3Settings`.
    """

    Settings = DeepLabV3Settings

    def __init__(self, num_classes: int, **settings: Any) -> None:
        chosen = DeepLabV3Settings(**settings)
        super().__init__(num_classes, chosen.ignore_index)
        with quiet_construction():
            net = MODELS.build(deeplabv3_config(num_classes, chosen))
            net.init_weights()
        net = synchronise(net, chosen.sync_bn)
        self.backbone, self.decode_head = net.backbone, net.decode_head
        self.auxiliary_head = net.auxiliary_head
        if chosen.pretrained is not None:
            load_pretrained(self, chosen.pretrained)
            self.files["pretrained"] = sha256(local_file(chosen.pretrained))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], RGB, 0..255, uint8 or float -> logits [B, num_classes, H, W] (before
        the softmax)."""
        logits = self.decode_head(self.backbone(self.normalise(images)))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross-entropy of both heads, equal to mmsegmentation's: ``decode.loss_ce``,
        ``aux.loss_ce``, ``loss``.

        ``labels``: int64 [B, H, W], 0..num_classes-1 or ``ignore_index``. ``aux.loss_ce`` is
        already multiplied by ``auxiliary_weight``; ``loss`` is the sum of the two. Pixels with
        ``ignore_index`` add nothing to the sum over pixels. The sum is divided by the number of
        **all** pixels, ignored ones included (mmsegmentation's default: a half ignored batch has
        half the loss). With ``avg_non_ignore=True`` it is divided by that of the others (PyTorch's
        default; 0 if all are ignored).
        """
        self.check_labels(images, labels)
        features = self.backbone(self.normalise(images))
        losses = {}
        for name, head in (("decode", self.decode_head), ("aux", self.auxiliary_head)):
            logits = F.interpolate(
                head(features), size=labels.shape[1:], mode="bilinear", align_corners=False
            )
            losses[f"{name}.loss_ce"] = head.loss_decode(
                logits, labels, ignore_index=self.ignore_index
            )
        losses["loss"] = losses["decode.loss_ce"] + losses["aux.loss_ce"]
        return losses
