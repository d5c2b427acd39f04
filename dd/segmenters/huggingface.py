"""Mask2Former and SegFormer as transformers builds them, on backbones that were trained on
ImageNet."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetBackbone,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerModel,
)

from dd.segmenters.base import NORMS, Segmenter, parameter_groups, synchronise
from dd.segmenters.mask_loss import mask2former_loss
from dd.store.checkpoints import weights_sha256

RESNETS = {  # depth: kind of block, blocks and channels of each stage
    18: ("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    50: ("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048)),
}
SEGFORMERS = {  # size: blocks and channels of each stage (Mix Transformer), channels of the decoder
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768),
}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def load_encoder(kind, config, source: str, revision: str | None = None):
    """An encoder of class ``kind`` from a hub id or a local folder in transformers' format,
    safetensors only.

    Its config.json must describe the same architecture as ``config``, and every tensor must be
    there. FileNotFoundError for what cannot be reached, ValueError for what does not fit.
    """
    try:
        stored = type(config).from_pretrained(source, revision=revision)
        keys = (
            "depths",
            "hidden_sizes",
            "layer_type",
            "downsample_in_bottleneck",
            "sr_ratios",
            "patch_sizes",
        )
        both = {
            key: [_listed(getattr(c, key, None)) for c in (stored, config)]
            for key in keys
            if hasattr(config, key)
        }
        differing = {key: values for key, values in both.items() if values[0] != values[1]}
        if differing or stored.model_type != config.model_type:
            listed = "; ".join(
                f"{key} {theirs}, expected {ours}" for key, (theirs, ours) in differing.items()
            )
            raise ValueError(
                f"pretrained={source!r} is another model ({listed or stored.model_type}); use the "
                "weights of the same size"
            )
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
        first = str(error).strip().partition("\n")[0]
        where = (
            "in this folder"
            if Path(source).is_dir()
            else "on the hub, and this machine may be offline"
        )
        raise FileNotFoundError(
            f"pretrained={source!r}: config.json and model.safetensors were not found {where} "
            f"({first}). Pass a local folder "
            "that holds both, segmenter.pretrained=/path/to/folder; a model with "
            "pytorch_model.bin only is converted by "
            "transformers' save_pretrained; pretrained=null starts from random weights"
        ) from error
    if missing := sorted(
        k for k in loaded["missing_keys"] if not k.endswith("num_batches_tracked")
    ):
        raise ValueError(
            f"pretrained={source!r} lacks {len(missing)} tensors of this model "
            f"({', '.join(missing[:3])}, ...)"
        )
    return encoder


class Mask2Former(Segmenter):
    """Mask2Former (Cheng et al., 2022, arXiv:2112.01527) on a ResNet; each class, background
    included, is a class of queries.

    ``depth``: 18 or 50. ``pretrained``: None, a hub id (``microsoft/resnet-50``) or a local folder;
    ``revision`` of the hub id. ``sync_bn``: of the backbone, see
    :func:`dd.segmenters.base.synchronise`. ``decoder_layers``: one of them is the prediction before
    the first layer, as in the paper's 10. ``num_points``: on which a mask's loss is measured.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 50,
        pretrained: str | None = None,
        revision: str | None = None,
        sync_bn: bool | str = "auto",
        ignore_index: int = 255,
        num_queries: int = 100,
        channels: int = 256,
        encoder_layers: int = 6,
        decoder_layers: int = 10,
        encoder_feedforward: int = 1024,
        decoder_feedforward: int = 2048,
        num_points: int = 12544,
    ):
        super().__init__(num_classes, ignore_index)
        if depth not in RESNETS:
            raise ValueError(
                f"depth={depth!r}: there is Mask2Former with a ResNet of depth "
                f"{', '.join(map(str, RESNETS))}"
            )
        if channels % 32 or decoder_layers < 2:
            raise ValueError(
                f"{channels=}, {decoder_layers=}: expected a multiple of 32, and 2 or more"
            )
        block, blocks, widths = RESNETS[depth]
        resnet = ResNetConfig(
            layer_type=block, depths=list(blocks), hidden_sizes=list(widths), out_features=STAGES
        )
        self.num_points = num_points
        self.net = Mask2FormerForUniversalSegmentation(
            Mask2FormerConfig(
                backbone_config=resnet,
                num_labels=num_classes,
                num_queries=num_queries,
                feature_size=channels,
                mask_feature_size=channels,
                hidden_dim=channels,
                encoder_layers=encoder_layers,
                decoder_layers=decoder_layers,
                encoder_feedforward_dim=encoder_feedforward,
                dim_feedforward=decoder_feedforward,
            )
        )
        backbone = ResNetBackbone(resnet)
        if pretrained is not None:
            backbone = load_encoder(ResNetBackbone, resnet, pretrained, revision)
            self.files["pretrained"] = weights_sha256(backbone.state_dict())
        self.net.model.pixel_level_module.encoder = synchronise(backbone, sync_bn)
        self.train()

    @property
    def backbone(self) -> torch.nn.Module:
        return self.net.model.pixel_level_module.encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], RGB, 0..255 -> logarithms of scores [B, num_classes, H, W].

        The score of a class is the sum over the queries of P(class), without "no object", times the
        sigmoid of the query's mask, enlarged to the image: the paper's semantic inference. Its
        argmax is the prediction, and as a logarithm (of 1e-6 at least) its softmax is the share of
        each class.
        """
        found = self.net(pixel_values=self.normalise(images))
        classes = found.class_queries_logits.float().softmax(2)[:, :, :-1]
        masks = found.masks_queries_logits.float()
        scores = []
        for image_classes, image_masks in zip(
            classes, masks, strict=True
        ):  # one by one: 100 masks at full size are large
            large = F.interpolate(
                image_masks[None], size=images.shape[2:], mode="bilinear", align_corners=False
            )[0]
            scores.append(torch.einsum("qc,qhw->chw", image_classes, large.sigmoid()))
        return torch.stack(scores).clamp(min=1e-6).log()

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

    def parameter_groups(
        self, learning_rate: float, weight_decay: float, backbone_multiplier: float = 0.1
    ) -> list[dict]:
        """Groups for a torch optimiser: a smaller rate for the backbone, no decay of norms and
        of queries' and levels' embeddings."""
        kinds, names = (*NORMS, torch.nn.Embedding), ("level_embed",)
        return parameter_groups(
            self, self.backbone, learning_rate, weight_decay, backbone_multiplier, kinds, names
        )


class SegFormer(Segmenter):
    """SegFormer (Xie et al., 2021, arXiv:2105.15203): a Mix Transformer and a decoder of linear
    layers.

    ``size``: b0 or b2. ``pretrained``: None, a hub id (``nvidia/mit-b0``) or a local folder;
    ``revision`` of the hub id.
    """

    def __init__(
        self,
        num_classes: int,
        size: str = "b0",
        pretrained: str | None = None,
        revision: str | None = None,
        sync_bn: bool | str = "auto",
        ignore_index: int = 255,
    ):
        super().__init__(num_classes, ignore_index)
        if size not in SEGFORMERS:
            raise ValueError(f"size={size!r}; allowed: {', '.join(SEGFORMERS)}")
        depths, widths, decoder = SEGFORMERS[size]
        config = SegformerConfig(
            depths=list(depths),
            hidden_sizes=list(widths),
            decoder_hidden_size=decoder,
            num_labels=num_classes,
        )
        self.net = SegformerForSemanticSegmentation(config)
        if pretrained is not None:
            self.net.segformer = load_encoder(SegformerModel, config, pretrained, revision)
            self.files["pretrained"] = weights_sha256(self.net.segformer.state_dict())
        self.net = synchronise(self.net, sync_bn)
        self.train()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], RGB, 0..255, uint8 or float -> logits [B, num_classes, H, W]."""
        logits = self.net(pixel_values=self.normalise(images)).logits
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross-entropy, the mean over the pixels that are not ignored (0 if all are):
        ``decode.loss_ce`` and ``loss``."""
        self.check_labels(images, labels)
        total = F.cross_entropy(
            self(images).float(), labels, ignore_index=self.ignore_index, reduction="sum"
        )
        loss = total / (labels != self.ignore_index).sum().clamp(min=1)
        return {"decode.loss_ce": loss, "loss": loss}

    def parameter_groups(
        self, learning_rate: float, weight_decay: float, backbone_multiplier: float = 0.1
    ) -> list[dict]:
        """Groups for a torch optimiser: a smaller rate for the encoder, no decay of norms."""
        encoder = self.net.segformer
        return parameter_groups(
            self, encoder, learning_rate, weight_decay, backbone_multiplier, NORMS
        )
