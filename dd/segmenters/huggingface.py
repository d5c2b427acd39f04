"""Mask2Former and SegFormer as built by transformers, on backbones trained on ImageNet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, MultipleOf
from huggingface_hub.errors import GatedRepoError
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetBackbone,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerModel,
)

from dd.segmenters.base import NORMS, SegmenterModule, SegmenterSettings, synchronise
from dd.segmenters.mask_loss import mask2former_loss
from dd.store.checkpoints import weights_sha256
from dd.store.settings import Count, Hint

RESNETS = {  # depth: kind of block, blocks and channels of each stage
    18: ("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    50: ("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048)),
}
SEGFORMERS = {  # size: blocks and channels of each stage (Mix Transformer), channels of the decoder
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768),
}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
ARCHITECTURE = (  # keys of a config.json that define which tensors exist
    "depths",
    "hidden_sizes",
    "layer_type",
    "downsample_in_bottleneck",
    "sr_ratios",
    "patch_sizes",
)


def load_encoder(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    source: str,
    revision: str | None = None,
    keys: Sequence[str] = ARCHITECTURE,
    advice: str = "use the weights of the same size",
) -> PreTrainedModel:
    """An encoder of class ``kind`` from a hub id or a local folder in transformers' format,
    safetensors only.

    Its config.json must describe the same architecture as ``config`` (``keys``), and every tensor
    must be there. FileNotFoundError for a source that cannot be reached or whose licence was not
    accepted; ValueError, with ``advice``, for weights that do not fit.
    """
    try:
        there = PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("model_type")
        if there != config.model_type:
            raise ValueError(
                f"pretrained={source!r} is another model ({there}, expected {config.model_type}); "
                f"{advice}"
            )
        stored = type(config).from_pretrained(source, revision=revision)
        _check_architecture(stored, config, source, keys, advice)
        encoder, loaded = kind.from_pretrained(
            source,
            config=config,
            revision=revision,
            use_safetensors=True,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except OSError as error:
        if isinstance(error.__cause__, GatedRepoError):
            raise FileNotFoundError(
                f"pretrained={source!r}: its licence must be accepted first. Do so "
                f"on https://huggingface.co/{source}, then set the variable HF_TOKEN to a token of "
                "your account"
            ) from None
        first = str(error).strip().partition("\n")[0]
        hub = "on the hub, and this machine may be offline"
        where = "in this folder" if Path(source).is_dir() else hub
        raise FileNotFoundError(
            f"pretrained={source!r}: config.json and model.safetensors were not found {where} "
            f"({first}). Give a local folder that holds both, "
            "segmenter.pretrained=/path/to/folder; transformers' save_pretrained converts a model "
            "with pytorch_model.bin only; pretrained=null starts from random weights"
        ) from error
    missing = sorted(k for k in loaded["missing_keys"] if not k.endswith("num_batches_tracked"))
    if missing:
        raise ValueError(
            f"pretrained={source!r} lacks {len(missing)} tensors of this model "
            f"({', '.join(missing[:3])}, ...)"
        )
    return encoder


def _check_architecture(
    stored: PreTrainedConfig,
    config: PreTrainedConfig,
    source: str,
    keys: Sequence[str],
    advice: str,
) -> None:
    """ValueError if ``stored`` describes another network than ``config``."""

    def value(of: PreTrainedConfig, key: str) -> Any:
        found = getattr(of, key, None)
        return list(found) if isinstance(found, tuple) else found

    differing = [
        f"{key} {value(stored, key)}, expected {value(config, key)}"
        for key in keys
        if hasattr(config, key) and value(stored, key) != value(config, key)
    ]
    if differing:
        raise ValueError(
            f"pretrained={source!r} is another model ({'; '.join(differing)}); {advice}"
        )


class EncoderSettings(SegmenterSettings):
    """``pretrained``: weights of the encoder; a hub id (``microsoft/resnet-50``,
    ``nvidia/mit-b0``) or a local folder. ``revision``: commit of the hub id. ``ignore_index``: the
    label without a loss."""

    revision: str | None = None
    ignore_index: int = 255


class Mask2FormerSettings(EncoderSettings):
    """``depth``: of the ResNet. ``decoder_layers``: number of predictions; the first one comes
    before the first layer, as in the paper's 10. ``num_points``: points at which a mask's loss is
    measured."""

    depth: Literal[18, 50] = 50
    num_queries: Count = 100
    channels: Annotated[int, Ge(32), MultipleOf(32), Hint("a multiple of 32")] = 256
    encoder_layers: Count = 6
    decoder_layers: Annotated[int, Ge(2)] = 10
    encoder_feedforward: Count = 1024
    decoder_feedforward: Count = 2048
    num_points: Count = 12544


class SegFormerSettings(EncoderSettings):
    """``size``: of the Mix Transformer and its decoder."""

    size: Literal["b0", "b2"] = "b0"


def class_scores(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, size: Sequence[int]
) -> torch.Tensor:
    """Logarithms of scores [B, C, H, W], float32, from queries: class logits [B, Q, C+1] and mask
    logits [B, Q, h, w], which are enlarged bilinearly to ``size`` (H, W).

    The score of a class is the sum over the queries of P(class), without "no object", times the
    sigmoid of the query's mask: the semantic inference of Mask2Former's paper. Its argmax is the
    prediction. The softmax of the logarithms (of at least 1e-6) is the share of each class.
    """
    classes, masks = class_logits.float().softmax(2)[:, :, :-1], mask_logits.float()

    def scores(some_classes: torch.Tensor, some_masks: torch.Tensor) -> torch.Tensor:
        large = F.interpolate(some_masks, size=tuple(size), mode="bilinear", align_corners=False)
        return torch.einsum("bqc,bqhw->bchw", some_classes, large.sigmoid())

    if torch.compiler.is_exporting():  # a loop would fix the number of images
        found = scores(classes, masks)
    else:  # one by one, because 100 masks at full size are large
        pairs = zip(classes.split(1), masks.split(1), strict=True)
        found = torch.cat([scores(*pair) for pair in pairs])
    return found.clamp(min=1e-6).log()


class Mask2Former(SegmenterModule):
    """Mask2Former (Cheng et al., 2022, arXiv:2112.01527) on a ResNet; each class, background
    included, is a class of queries. ``settings``: :class:`Mask2FormerSettings`; ``sync_bn`` applies
    to the backbone. Norms and embeddings of queries and levels have no weight decay."""

    Settings = Mask2FormerSettings
    undecayed, undecayed_names = (*NORMS, torch.nn.Embedding), ("level_embed",)

    def __init__(self, num_classes: int, **settings: Any) -> None:
        chosen = Mask2FormerSettings(**settings)
        super().__init__(num_classes, chosen.ignore_index)
        block, blocks, widths = RESNETS[chosen.depth]
        resnet = ResNetConfig(
            layer_type=block, depths=list(blocks), hidden_sizes=list(widths), out_features=STAGES
        )
        self.num_points = chosen.num_points
        self.net = Mask2FormerForUniversalSegmentation(
            Mask2FormerConfig(
                backbone_config=resnet,
                num_labels=num_classes,
                num_queries=chosen.num_queries,
                feature_size=chosen.channels,
                mask_feature_size=chosen.channels,
                hidden_dim=chosen.channels,
                encoder_layers=chosen.encoder_layers,
                decoder_layers=chosen.decoder_layers,
                encoder_feedforward_dim=chosen.encoder_feedforward,
                dim_feedforward=chosen.decoder_feedforward,
            )
        )
        backbone = ResNetBackbone(resnet)
        if chosen.pretrained is not None:
            backbone = load_encoder(ResNetBackbone, resnet, chosen.pretrained, chosen.revision)
            self.files["pretrained"] = weights_sha256(backbone.state_dict())
        self.net.model.pixel_level_module.encoder = synchronise(backbone, chosen.sync_bn)
        self.train()

    @property
    def backbone(self) -> torch.nn.Module:
        return self.net.model.pixel_level_module.encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], RGB, 0..255 -> logarithms of scores [B, num_classes, H, W], see
        :func:`class_scores`."""
        found = self.net(pixel_values=self.normalise(images))
        return class_scores(
            found.class_queries_logits, found.masks_queries_logits, images.shape[2:]
        )

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sums over the decoder's layers: ``decode.loss_class``, ``decode.loss_mask``,
        ``decode.loss_dice``, and ``loss``, all of them; see
        :func:`dd.segmenters.mask_loss.mask2former_loss`. ``labels``: int64 [B, H, W]."""
        self.check_labels(images, labels)
        found = self.net(pixel_values=self.normalise(images), output_auxiliary_logits=True)
        layers = [(found.class_queries_logits, found.masks_queries_logits)]
        layers += [
            (layer["class_queries_logits"], layer["masks_queries_logits"])
            for layer in found.auxiliary_logits
        ]
        with torch.autocast(images.device.type, enabled=False):
            layers = [(classes.float(), masks.float()) for classes, masks in layers]
            return mask2former_loss(layers, labels, self.ignore_index, self.num_points)


class SegFormer(SegmenterModule):
    """SegFormer (Xie et al., 2021, arXiv:2105.15203): a Mix Transformer and a decoder of linear
    layers. ``settings``: :class:`SegFormerSettings`. Norms have no weight decay."""

    Settings = SegFormerSettings
    undecayed = NORMS

    def __init__(self, num_classes: int, **settings: Any) -> None:
        chosen = SegFormerSettings(**settings)
        super().__init__(num_classes, chosen.ignore_index)
        depths, widths, decoder = SEGFORMERS[chosen.size]
        config = SegformerConfig(
            depths=list(depths),
            hidden_sizes=list(widths),
            decoder_hidden_size=decoder,
            num_labels=num_classes,
        )
        self.net = SegformerForSemanticSegmentation(config)
        if chosen.pretrained is not None:
            self.net.segformer = load_encoder(
                SegformerModel, config, chosen.pretrained, chosen.revision
            )
            self.files["pretrained"] = weights_sha256(self.backbone.state_dict())
        self.net = synchronise(self.net, chosen.sync_bn)
        self.train()

    @property
    def backbone(self) -> torch.nn.Module:
        return self.net.segformer

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], RGB, 0..255, uint8 or float -> logits [B, num_classes, H, W]."""
        logits = self.net(pixel_values=self.normalise(images)).logits
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """See :meth:`SegmenterModule.pixel_loss`."""
        return self.pixel_loss(images, labels)
