"""SAM 2 and SAM 3 in the format of the hub, shrunk, with random weights that are large enough for
their masks to have edges."""

import torch
import transformers
from transformers import (
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2PromptEncoderConfig,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VisionConfig,
    Sam3Config,
    Sam3Model,
)

from dd import generators as diffusion

SIDE2, SIDE3 = 64, 56


def sam2_parts():
    hiera = Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[SIDE2, SIDE2],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 4, 4],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2],
    )
    return {
        "vision_config": Sam2VisionConfig(
            backbone_config=hiera,
            backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[SIDE2 // n] * 2 for n in (4, 8, 16)],
            fpn_hidden_size=32,
        ),
        "prompt_encoder_config": Sam2PromptEncoderConfig(
            hidden_size=32, image_size=SIDE2, patch_size=16
        ),
        "mask_decoder_config": Sam2MaskDecoderConfig(
            hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    }


def seeded(build, seed=0):
    """A model whose buffers and vectors are those of the seed too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def loud(model, std, seed=0):
    """Weights far from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = std if "embed" not in name else 1.0
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model.eval()


def save_sam2(folder, seed=0):
    model = loud(seeded(lambda: Sam2Model(Sam2Config(**sam2_parts())), seed), 0.3, seed)
    model.save_pretrained(folder)
    return model


def save_sam2_video(folder):
    """As Meta's repositories are: a video model, which holds the one for images."""
    config = Sam2VideoConfig(
        **sam2_parts(),
        image_size=SIDE2,
        memory_attention_hidden_size=32,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_downsample_rate=1,
        memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=32,
        memory_encoder_output_channels=8,
        mask_downsampler_embed_dim=32,
        memory_fuser_embed_dim=32,
        memory_fuser_intermediate_dim=32,
        memory_fuser_num_layers=1,
    )
    model = loud(seeded(lambda: Sam2VideoModel(config)), 0.3)
    model.save_pretrained(folder)
    return model


def save_sam3(folder, captions=("a photo of an apple and a gold ring",), seed=0):
    words = diffusion.train_tokenizer(list(captions) * 10, 30, folder, max_length=32)
    small = {"hidden_size": 32, "num_attention_heads": 2}
    deep = {**small, "num_layers": 1, "intermediate_size": 32}
    backbone = {
        "model_type": "sam3_vit_model",
        **small,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "image_size": SIDE3,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [1],
        "pretrain_image_size": 28,
    }
    text = {
        "model_type": "clip_text_model",
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 16,
        "projection_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "hidden_act": "gelu",
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    cells = SIDE3 // 14
    config = Sam3Config(
        vision_config={
            "backbone_config": backbone,
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[4 * cells] * 2, [2 * cells] * 2, [cells] * 2],
        },
        text_config=text,
        geometry_encoder_config=deep,
        detr_encoder_config=deep,
        detr_decoder_config={**deep, "num_queries": 6},
        mask_decoder_config={**small, "num_upsampling_stages": 2},
    )
    model = loud(seeded(lambda: Sam3Model(config), seed), 0.2, seed)
    model.save_pretrained(folder)
    return model


def save_clip(folder):
    """Of another kind."""
    config = transformers.CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    transformers.CLIPTextModel(config).save_pretrained(folder)
