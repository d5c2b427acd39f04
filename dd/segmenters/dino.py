"""Segmenters on a self-supervised vision transformer, DINOv2 (Oquab et al., 2024, arXiv:2304.07193)
or DINOv3 (Simeoni et al., 2025, arXiv:2508.10104): a linear head, and the neck and head of DPT.

An image is padded on the right and bottom to a multiple of the patch with the mean colour, and its
logits are cropped back.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import nn
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.dpt.modeling_dpt import DPTNeck, DPTSemanticSegmentationHead

from dd.segmenters.base import NORMS, SegmenterModule, padded, synchronise
from dd.segmenters.huggingface import EncoderSettings, load_encoder
from dd.store.checkpoints import weights_sha256
from dd.store.settings import Count, Hint

SIZES = {  # channels, layers, heads
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "giant": (1536, 40, 24),
}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "dinov2": (Dinov2Config, Dinov2Backbone),
    "dinov3": (DINOv3ViTConfig, DINOv3ViTBackbone),
}
PATCH = {"dinov2": 14, "dinov3": 16}
IMAGE = 518  # side of the images that DINOv2's position embeddings were made for
ARCHITECTURE = (  # keys of a config.json that define which tensors exist and what they compute
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "mlp_ratio",
    "intermediate_size",
    "use_swiglu_ffn",
    "use_gated_mlp",
    "qkv_bias",
    "query_bias",
    "key_bias",
    "value_bias",
    "num_register_tokens",
    "hidden_act",
    "layer_norm_eps",
    "rope_theta",
)
UNDECAYED = ("lambda1", "cls_token", "register_tokens", "position_embeddings")
READ_AT = {
    24: (5, 12, 18, 24)
}  # layers that DPT reads, for models where DINOv2's authors do not use quarters
REASSEMBLE = (4, 2, 1, 0.5)  # sizes of DPT's four maps in patches: the earliest layer is the finest


class VitSettings(EncoderSettings):
    """``size``: of the vision transformer. ``hidden_size``, ``layers``, ``heads``, ``patch_size``,
    ``image_size`` (side of the images that its position embeddings were made for): for models of
    other than the published sizes, such as tiny ones; None = as published."""

    size: Literal["small", "base", "large", "giant"] = "base"
    hidden_size: Count | None = None
    layers: Count | None = None
    heads: Count | None = None
    patch_size: Count | None = None
    image_size: Count | None = None

    def dimensions(self) -> dict[str, Any]:
        """Arguments of transformers' configurations. ValueError if the heads cannot share the
        channels evenly."""
        hidden, layers, heads = SIZES[self.size]
        hidden, layers = self.hidden_size or hidden, self.layers or layers
        heads = self.heads or heads
        if hidden % heads:
            raise ValueError(
                f"segmenter.hidden_size={hidden}: expected a multiple of the {heads} heads"
            )
        return {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }

    def side(self, patch: int) -> int:
        """``image_size``; ValueError if it is smaller than a patch."""
        side = self.image_size or IMAGE
        if side < patch:
            raise ValueError(
                f"segmenter.image_size={side}: expected at least the patch's {patch} pixels"
            )
        return side


class DinoSettings(VitSettings):
    """``family``: of the weights. ``frozen``: do not train the backbone."""

    family: Literal["dinov2", "dinov3"] = "dinov2"
    frozen: Annotated[bool, Hint("whether the backbone stays as it is")] = False

    def config(self, **reading: Any) -> PreTrainedConfig:
        """transformers' configuration of the backbone. ``reading``: which feature maps it returns.
        ValueError for sizes that the family does not have."""
        patch = self.patch_size or PATCH[self.family]
        given = {**self.dimensions(), "patch_size": patch, **reading}
        if self.family == "dinov2":
            # no mask token: images are not masked here, and a parameter without a gradient would
            # stop a training on several GPUs
            return Dinov2Config(
                **given,
                image_size=self.side(patch),
                use_swiglu_ffn=self.size == "giant",
                use_mask_token=False,
            )
        if self.size == "giant":
            raise ValueError(
                "segmenter.size='giant': DINOv3 has no such model; expected small, base, large"
            )
        if self.image_size is not None:
            raise ValueError(
                f"segmenter.image_size={self.image_size} has no effect on DINOv3, whose positions "
                "are rotary; leave it null"
            )
        if given["hidden_size"] // given["num_attention_heads"] % 4:
            raise ValueError(
                f"segmenter.hidden_size={given['hidden_size']}: DINOv3's rotary positions need a "
                f"multiple of 4 channels for each of the {given['num_attention_heads']} heads"
            )
        return DINOv3ViTConfig(
            **given, intermediate_size=4 * given["hidden_size"], num_register_tokens=4
        )


class DinoModule(SegmenterModule):
    """A segmenter on a DINO backbone, except for its head (``logits_of``). Norms, layer scales,
    tokens and positions have no weight decay. A frozen backbone is in evaluation mode, has no
    gradient and belongs to no parameter group."""

    undecayed, undecayed_names = NORMS, UNDECAYED
    multiple: ClassVar[int] = 1  # number of patches to whose multiples images are padded

    def __init__(self, num_classes: int, chosen: DinoSettings, **reading: Any) -> None:
        super().__init__(num_classes, chosen.ignore_index)
        config = chosen.config(**reading)
        kind = FAMILIES[chosen.family][1]
        self.patch, self.frozen = config.patch_size, chosen.frozen
        if chosen.pretrained is None:
            self.backbone = kind(config)
        else:
            keys = (*ARCHITECTURE, "image_size") if chosen.family == "dinov2" else ARCHITECTURE
            advice = (
                "choose segmenter.size and segmenter.family (dinov2, dinov3) as those of the "
                "weights"
            )
            self.backbone = load_encoder(
                kind, config, chosen.pretrained, chosen.revision, keys, advice
            )
            self.files["pretrained"] = weights_sha256(self.backbone.state_dict())
        self.backbone.embeddings.mask_token = None  # DINOv3's; see above
        self.backbone.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    @abstractmethod
    def logits_of(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes, h, w] of normalised and padded images [B, 3, H, W], at any
        resolution."""

    def maps(self, images: torch.Tensor) -> Any:
        """The backbone's output for normalised and padded images."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.backbone(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], RGB, 0..255, uint8 or float -> logits [B, num_classes, H, W]."""
        height, width = images.shape[2:]
        shown = padded(self.normalise(images), self.patch * self.multiple)
        logits = F.interpolate(
            self.logits_of(shown), size=shown.shape[2:], mode="bilinear", align_corners=False
        )
        return logits[:, :, :height, :width]

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """See :meth:`SegmenterModule.pixel_loss`; padding has no label, and so no loss."""
        return self.pixel_loss(images, labels)


class DinoLinear(DinoModule):
    """Batch norm and a linear layer on the patch tokens of the last layer, as in the linear
    evaluation of DINOv2's paper (section 7.4). ``settings``: :class:`DinoSettings`; ``sync_bn``
    applies to the head."""

    Settings = DinoSettings

    def __init__(self, num_classes: int, **settings: Any) -> None:
        chosen = DinoSettings(**settings)
        super().__init__(num_classes, chosen)
        channels = self.backbone.config.hidden_size
        head = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, num_classes, 1))
        nn.init.normal_(head[1].weight, std=0.01)
        nn.init.zeros_(head[1].bias)
        self.head = synchronise(head, chosen.sync_bn)
        self.train()

    def logits_of(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.maps(images).feature_maps[-1])


class DinoDPTSettings(DinoSettings):
    """``channels``: number of channels of the fused maps."""

    layers: Annotated[int, Ge(4)] | None = None
    channels: Count = 256


class DinoDPT(DinoModule):
    """DPT's neck and head for semantic segmentation (Ranftl et al., 2021, arXiv:2103.13413) in
    transformers' version, on four layers of the backbone, each with its CLS token as readout.
    ``settings``: :class:`DinoDPTSettings`; ``sync_bn`` applies to the head.

    Layers, channels of the maps and fusion without biases are those of DINOv2's own DPT heads (for
    depth). Images are padded to a multiple of two patches, because a cell of the coarsest map
    covers two.
    """

    Settings = DinoDPTSettings
    multiple = 2

    def __init__(self, num_classes: int, **settings: Any) -> None:
        chosen = DinoDPTSettings(**settings)
        layers = chosen.dimensions()["num_hidden_layers"]
        read_at = READ_AT.get(layers, tuple(layers * i // 4 for i in (1, 2, 3, 4)))
        super().__init__(
            num_classes,
            chosen,
            out_indices=list(read_at),
            apply_layernorm=False,
            reshape_hidden_states=False,
            return_class_token=True,
        )
        if chosen.family == "dinov2":  # it returns tokens before its last norm
            self.backbone.layernorm = nn.Identity()
        channels = self.backbone.config.hidden_size
        config = DPTConfig(
            hidden_size=channels,
            num_labels=num_classes,
            neck_hidden_sizes=[max(1, channels // share) for share in (8, 4, 2, 1)],
            reassemble_factors=list(REASSEMBLE),
            readout_type="project",
            fusion_hidden_size=chosen.channels,
            use_bias_in_fusion_residual=False,
        )
        neck = DPTNeck(config)
        # the deepest map is not added to a coarser one, so this part is never used
        neck.fusion_stage.layers[0].residual_layer1 = nn.Identity()
        self.neck = neck
        self.head = synchronise(DPTSemanticSegmentationHead(config), chosen.sync_bn)
        self.train()

    def tokens(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """Tokens [B, 1 + N, C] of the four layers, the CLS token first and no register tokens."""
        found = self.maps(images)
        if getattr(found, "cls_tokens", None) is None:
            return found.feature_maps
        pairs = zip(found.cls_tokens, found.feature_maps, strict=True)
        return [torch.cat([cls[:, None], patches], 1) for cls, patches in pairs]

    def logits_of(self, images: torch.Tensor) -> torch.Tensor:
        height, width = (side // self.patch for side in images.shape[2:])
        return self.head(self.neck(list(self.tokens(images)), height, width))
