"""DeepLabV3 (Chen et al., 2017, arXiv:1706.05587) built from mmsegmentation's own parts, without
its Runner."""

import logging
import warnings
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from dd.segmenters._compiled_ops import install_placeholder

install_placeholder()  # before the first import of mmseg

import mmseg.models  # noqa: E402, F401  fills the registry
from mmengine.logging import MMLogger  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402

from dd.segmenters.base import Segmenter, parameter_groups, synchronise  # noqa: E402
from dd.segmenters.weights import load_pretrained, local_file  # noqa: E402
from dd.store.provenance import sha256  # noqa: E402

CHANNELS = {  # depth: input and inner channels of the decode head, then of the auxiliary head
    18: (512, 128, 256, 64),
    50: (2048, 512, 1024, 256),
    101: (2048, 512, 1024, 256),
}


def deeplabv3_config(
    num_classes: int,
    depth: int = 50,
    ignore_index: int = 255,
    avg_non_ignore: bool = False,
    auxiliary_weight: float = 0.4,
    base_channels: int = 64,
    dilations: tuple[int, ...] = (1, 12, 24, 36),
) -> dict:
    """mmsegmentation's ``_base_/models/deeplabv3_r50-d8.py`` (18: its r18-d8 files) with our
    classes and batch norm.

    ``base_channels``: of the backbone's first stage, mmsegmentation's name; with another number
    than the 64 of the published networks every layer, the heads' too, is scaled by ``base_channels
    / 64``. ``dilations``: of the ASPP module's branches, in cells of 8 pixels; where they exceed
    the feature map, all but the centre of a 3x3 kernel looks at padding.
    """
    if depth not in CHANNELS:
        raise ValueError(
            f"depth={depth!r}: there is DeepLabV3 with a ResNet of depth "
            f"{', '.join(map(str, CHANNELS))}"
        )
    if auxiliary_weight < 0:
        raise ValueError(
            f"auxiliary_weight={auxiliary_weight}: it multiplies a loss; use 0 or more (the "
            "paper: 0.4)"
        )
    if type(base_channels) is not int or base_channels < 8 or base_channels % 8:
        raise ValueError(
            f"base_channels={base_channels!r}: expected a multiple of 8, as 32 or the published 64"
        )
    if not dilations or any(type(d) is not int or d < 1 for d in dilations):
        raise ValueError(
            f"dilations={dilations!r}: expected whole numbers of 1 or more, as the published [1, "
            "12, 24, 36]"
        )
    decode_in, decode_channels, auxiliary_in, auxiliary_channels = (
        n * base_channels // 64 for n in CHANNELS[depth]
    )
    norm = {"type": "BN", "requires_grad": True}

    def head(loss_weight: float, **kwargs) -> dict:
        loss = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": loss_weight}
        return {
            "dropout_ratio": 0.1,
            "num_classes": num_classes,
            # mmsegmentation's default; said aloud, it no longer warns for two classes
            "out_channels": num_classes,
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
            **(
                {}
                if base_channels == 64
                else {"stem_channels": base_channels, "base_channels": base_channels}
            ),
        },
        "decode_head": head(
            1.0,
            type="ASPPHead",
            in_channels=decode_in,
            in_index=3,
            channels=decode_channels,
            dilations=tuple(dilations),
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
def quiet_construction():
    """Keep back a warning about a choice made here on purpose, mmsegmentation's warning about a
    function that only it calls, and one console line for each parameter initialised."""
    logger = MMLogger.get_current_instance()
    level, handlers = logger.level, logger.handlers
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Default ``avg_non_ignore`` is False", category=UserWarning
        )
        warnings.filterwarnings(
            "ignore", message="``build_loss`` would be deprecated", category=UserWarning
        )
        logger.setLevel(logging.WARNING)
        # mmengine writes to the log file of a Runner of the same process, closed or not
        logger.handlers = []
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.handlers = handlers


class DeepLabV3(Segmenter):
    """DeepLabV3 on a ResNetV1c with output stride 8, and the auxiliary FCN head that helps it
    train.

    The keys of ``state_dict()`` are those of mmsegmentation's EncoderDecoder: weights go either
    way.

    ``num_classes``: background included. ``depth``: 18, 50 or 101. ``pretrained``: None for random
    weights, else see :func:`dd.segmenters.weights.load_pretrained`; the paper starts from
    ``open-mmlab://resnet50_v1c`` (``resnet101_v1c`` for 101). ``sync_bn``: see
    :func:`dd.segmenters.base.synchronise`. ``ignore_index``: the label without a loss.
    ``avg_non_ignore``: see :meth:`loss`. ``base_channels`` and ``dilations``: see
    :func:`deeplabv3_config`.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 50,
        pretrained: str | None = None,
        sync_bn: bool | str = False,
        ignore_index: int = 255,
        avg_non_ignore: bool = False,
        auxiliary_weight: float = 0.4,
        base_channels: int = 64,
        dilations: tuple[int, ...] = (1, 12, 24, 36),
    ):
        super().__init__(num_classes, ignore_index)
        config = deeplabv3_config(
            num_classes,
            depth,
            ignore_index,
            avg_non_ignore,
            auxiliary_weight,
            base_channels,
            dilations,
        )
        with quiet_construction():
            net = MODELS.build(config)
            net.init_weights()
        net = synchronise(net, sync_bn)
        self.backbone, self.decode_head, self.auxiliary_head = (
            net.backbone,
            net.decode_head,
            net.auxiliary_head,
        )
        if pretrained is not None:
            load_pretrained(self, pretrained)
            self.files["pretrained"] = sha256(local_file(pretrained))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], RGB, 0..255, uint8 or float -> logits [B, num_classes, H, W] (not
        yet a softmax)."""
        logits = self.decode_head(self.backbone(self.normalise(images)))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross-entropy of both heads, equal to mmsegmentation's: ``decode.loss_ce``,
        ``aux.loss_ce``, ``loss``.

        ``labels``: int64 [B, H, W], 0..num_classes-1 or ``ignore_index``. ``aux.loss_ce`` is
        already multiplied by ``auxiliary_weight``; ``loss`` is the sum of the two. Pixels with
        ``ignore_index`` add nothing to the sum over pixels, which is then divided by the number of
        **all** pixels, ignored ones included (mmsegmentation's default, so a half ignored batch has
        half the loss), or by that of the others with ``avg_non_ignore=True`` (PyTorch's way; 0
        where all are ignored).
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

    def parameter_groups(
        self, learning_rate: float, weight_decay: float, backbone_multiplier: float = 0.1
    ) -> list[dict]:
        """Groups for a torch optimiser: the backbone learns at ``backbone_multiplier`` times the
        rate of the heads."""
        return parameter_groups(
            self, self.backbone, learning_rate, weight_decay, backbone_multiplier
        )
