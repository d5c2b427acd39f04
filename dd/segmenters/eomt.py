"""EoMT, the Encoder-only Mask Transformer (Kerssies et al., 2025, arXiv:2503.19108), built from
transformers' parts: a vision transformer whose last blocks see queries beside the patches."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    EomtConfig,
    EomtForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)

from dd.segmenters.base import NORMS, SegmenterModule, padded
from dd.segmenters.dino import ARCHITECTURE, PATCH, UNDECAYED, VitSettings
from dd.segmenters.huggingface import class_scores, load_encoder
from dd.segmenters.mask_loss import mask2former_loss
from dd.store.checkpoints import weights_sha256
from dd.store.settings import Count, Natural

SHARED = (  # keys with the same name in DINOv2's configuration
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "image_size",
    "use_swiglu_ffn",
)
BLOCKS = {"small": 3, "base": 3, "large": 4, "giant": 5}  # with queries, as in the paper
POWER = 0.9  # exponent of a block's falling probability, the paper's
HEADS = ("query.", "upscale_block.", "mask_head.", "class_predictor.")


class EoMTSettings(VitSettings):
    """``pretrained``: weights of DINOv2 with ``registers`` tokens (0: the plain one).
    ``num_queries``: seen by the last ``blocks`` (None: as published). ``num_points``: points at
    which a mask's loss is measured."""

    registers: Natural = 4
    num_queries: Count = 100
    blocks: Count | None = None
    upscale_blocks: Annotated[int, Ge(0)] = 2
    num_points: Count = 12544

    def config(self, num_classes: int) -> EomtConfig:
        """transformers' configuration. ValueError for more blocks with queries than layers."""
        dimensions, blocks = self.dimensions(), self.blocks or BLOCKS[self.size]
        if blocks > dimensions["num_hidden_layers"]:
            raise ValueError(
                f"segmenter.blocks={blocks}: expected at most the "
                f"{dimensions['num_hidden_layers']} layers"
            )
        patch = self.patch_size or PATCH["dinov2"]
        return EomtConfig(
            **dimensions,
            patch_size=patch,
            image_size=self.side(patch),
            use_swiglu_ffn=self.size == "giant",
            num_labels=num_classes,
            num_register_tokens=self.registers,
            num_queries=self.num_queries,
            num_blocks=blocks,
            num_upscale_blocks=self.upscale_blocks,
        )


def annealed(block: int, blocks: int, share: float) -> float:
    """Probability that the attention of a query in ``block`` (of ``blocks``, from 0) is masked,
    when ``share`` (0..1) of the training is done.

    It falls from 1 to 0 as (1 - x)^0.9 within a sixth of the training, as in the authors'
    configurations: in the first block from 1/6 of the training on, in the last one from 4/6, in
    those between at even distances. In the last sixth nothing is masked.
    """
    start = 1 / 6 + block / (2 * max(1, blocks - 1))
    return min(1.0, max(0.0, 1 - 6 * (share - start))) ** POWER


class EoMT(SegmenterModule):
    """EoMT on DINOv2; each class, background included, is a class of queries. ``settings``:
    :class:`EoMTSettings`; there is no batch norm, so ``sync_bn`` has no effect.

    In training each block with queries is preceded by a prediction. The prediction has a loss, and
    it masks the queries' attention to patches outside their masks with a probability that
    :meth:`anneal` sets. In evaluation nothing is masked, as in the paper's finished model. Norms,
    layer scales, tokens, positions and queries have no weight decay.
    """

    Settings = EoMTSettings
    undecayed, undecayed_names = (*NORMS, nn.Embedding), UNDECAYED

    def __init__(self, num_classes: int, **settings: Any) -> None:
        chosen = EoMTSettings(**settings)
        super().__init__(num_classes, chosen.ignore_index)
        config = chosen.config(num_classes)
        self.patch, self.num_points = config.patch_size, chosen.num_points
        self.net = EomtForUniversalSegmentation(config)
        del self.net.criterion  # it would use ignored pixels as targets; we use mask2former_loss
        # a function of the step, so it is not saved with the weights
        self.net.register_buffer("attn_mask_probs", torch.ones(config.num_blocks), persistent=False)
        if chosen.pretrained is not None:
            self._load(chosen.pretrained, chosen.revision)
            self.files["pretrained"] = weights_sha256(self.backbone.state_dict())
        self.train()

    @property
    def backbone(self) -> nn.Module:
        """The parts that DINOv2 has too."""
        return nn.ModuleDict(
            {name: getattr(self.net, name) for name in ("embeddings", "layers", "layernorm")}
        )

    def _load(self, source: str, revision: str | None) -> None:
        """Load DINOv2's weights into the backbone."""
        config = self.net.config
        registers = config.num_register_tokens
        kinds: tuple[type[PreTrainedConfig], type[PreTrainedModel]] = (
            (Dinov2WithRegistersConfig, Dinov2WithRegistersModel)
            if registers
            else (Dinov2Config, Dinov2Model)
        )
        given = {name: getattr(config, name) for name in SHARED}
        given |= {"num_register_tokens": registers} if registers else {}
        theirs = kinds[0](**given)
        advice = (
            "choose segmenter.size as that of the weights, and segmenter.registers=0 for a DINOv2 "
            "without registers"
        )
        keys = (*ARCHITECTURE, "image_size")
        state = load_encoder(kinds[1], theirs, source, revision, keys, advice).state_dict()
        positions = state.pop("embeddings.position_embeddings")[0]
        # in this model the CLS token has no position, so DINOv2's is added to the token
        state["embeddings.cls_token"] = state["embeddings.cls_token"] + positions[0]
        state["embeddings.position_embeddings.weight"] = positions[1:]
        state.pop("embeddings.mask_token", None)
        if not registers:
            state["embeddings.register_tokens"] = self.net.embeddings.register_tokens
        ours = {
            name.replace("encoder.layer.", "layers.").replace(".o_proj.", ".out_proj."): tensor
            for name, tensor in state.items()
        }
        left = self.net.load_state_dict(ours, strict=False)
        missing = [name for name in left.missing_keys if not name.startswith(HEADS)]
        assert not missing and not left.unexpected_keys, (missing, left.unexpected_keys)

    def anneal(self, share: float) -> None:
        """Set the probabilities of masked attention, see :func:`annealed`."""
        blocks = len(self.net.attn_mask_probs)
        found = [annealed(block, blocks, share) for block in range(blocks)]
        self.net.attn_mask_probs.copy_(torch.tensor(found))

    def _embedded(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens [B, 1 + R + N, C] of images [B, 3, H, W]. Positions are interpolated as in DINOv2
        (with registers: antialiased), so any size works."""
        parts = self.net.embeddings
        side = self.net.grid_size[0]
        height, width = (length // self.patch for length in images.shape[2:])
        positions = parts.position_embeddings.weight.view(1, side, side, -1).permute(0, 3, 1, 2)
        if torch.compiler.is_exporting() or (height, width) != (side, side):
            positions = F.interpolate(
                positions.float(),
                size=(height, width),
                mode="bicubic",
                align_corners=False,
                antialias=self.net.config.num_register_tokens > 0,
            ).to(positions.dtype)
        patches = parts.patch_embeddings(images) + positions.flatten(2).transpose(1, 2)
        prefix = [parts.cls_token, parts.register_tokens]
        return torch.cat([*(p.expand(len(images), -1, -1) for p in prefix), patches], 1)

    def _predicted(
        self, tokens: torch.Tensor, grid: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(class logits [B, Q, C+1], mask logits [B, Q, h, w]) of tokens [B, Q + 1 + R + N, C] on a
        ``grid`` of patches."""
        net, number = self.net, self.net.config.num_queries
        tokens = net.layernorm(tokens)
        queries, patches = (
            tokens[:, :number],
            tokens[:, number + net.embeddings.num_prefix_tokens :],
        )
        maps = net.upscale_block(patches.transpose(1, 2).unflatten(2, grid))
        masks = torch.einsum("bqc,bchw->bqhw", net.mask_head(queries), maps)
        return net.class_predictor(queries), masks

    def _attention_mask(
        self, tokens: torch.Tensor, masks: torch.Tensor, grid: tuple[int, int], block: int
    ) -> torch.Tensor:
        """The mask added to the attention [B, 1, T, T]: a query does not see patches outside its
        mask, except queries that are randomly left unmasked."""
        number = self.net.config.num_queries
        first = number + self.net.embeddings.num_prefix_tokens
        inside = F.interpolate(masks, size=grid, mode="bilinear").flatten(2) > 0
        free = torch.rand(inside.shape[:2], device=inside.device) > self.net.attn_mask_probs[block]
        seen = torch.ones(
            (len(tokens), tokens.shape[1], tokens.shape[1]), dtype=torch.bool, device=tokens.device
        )
        seen[:, :number, first:] = inside | free[:, :, None]
        return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -1e9)[:, None]

    def _layers(self, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Predictions (see :meth:`_predicted`) of normalised and padded images, the last one first;
        in evaluation there is only one."""
        height, width = (side // self.patch for side in images.shape[2:])
        net, grid = self.net, (height, width)
        tokens, found = self._embedded(images), []
        first = len(net.layers) - net.config.num_blocks
        for place, layer in enumerate(net.layers):
            mask = None
            if place == first:
                queries = net.query.weight.expand(len(images), -1, -1)
                tokens = torch.cat([queries, tokens], 1)
            if place >= first and self.training:
                found.append(self._predicted(tokens, grid))
                with torch.no_grad():
                    mask = self._attention_mask(tokens, found[-1][1], grid, place - first)
            tokens = layer(tokens, mask)
        return [self._predicted(tokens, grid), *found]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], RGB, 0..255 -> logarithms of scores [B, num_classes, H, W], see
        :func:`dd.segmenters.huggingface.class_scores`."""
        height, width = images.shape[2:]
        shown = padded(self.normalise(images), self.patch)
        scores = class_scores(*self._layers(shown)[0], shown.shape[2:])
        return scores[:, :, :height, :width]

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sums over the predictions: ``decode.loss_class``, ``decode.loss_mask``,
        ``decode.loss_dice``, and ``loss``, all of them; see
        :func:`dd.segmenters.mask_loss.mask2former_loss`, whose weights are EoMT's too.
        ``labels``: int64 [B, H, W]; padding is ignored."""
        self.check_labels(images, labels)
        shown = padded(self.normalise(images), self.patch)
        below, right = (shown.shape[d] - images.shape[d] for d in (2, 3))
        known = F.pad(labels, (0, right, 0, below), value=self.ignore_index)
        layers = self._layers(shown)
        with torch.autocast(images.device.type, enabled=False):
            layers = [(classes.float(), masks.float()) for classes, masks in layers]
            return mask2former_loss(layers, known, self.ignore_index, self.num_points)
