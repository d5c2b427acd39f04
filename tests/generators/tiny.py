"""Tiny checkpoints with random weights, one of each family, in the folder layout of the real ones
and with tokenizers of their kind: they go through the same code."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dd import generators as diffusion

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_words(captions, folder):
    return diffusion.train_tokenizer(list(captions) * 10, 30, folder)


def t5_words(captions, folder):
    """A unigram vocabulary with T5's special tokens."""
    folder = Path(folder)
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=180, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    unigram.train_from_iterator(list(captions) * 10, trainer)
    vocabulary = [tuple(pair) for pair in json.loads(unigram.to_str())["model"]["vocab"]]
    words = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    words.save_pretrained(folder)
    return words


def qwen_words(captions, folder, chat=None):
    """A byte-pair vocabulary with the special tokens of Qwen's chats."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    bpe.train_from_iterator(list(captions) * 10, trainer)
    model = json.loads(bpe.to_str())["model"]
    words = Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], chat_template=chat
    )
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words.save_pretrained(folder)
    return words


def vae(channels, **config):
    return AutoencoderKL(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
        **config,
    )


def clip(words, kind, width=32, **config):
    return kind(
        CLIPTextConfig(
            **{**TEXT, "hidden_size": width},
            vocab_size=len(words),
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            **config,
        )
    )


def t5(words, width=32):
    return T5EncoderModel(
        T5Config(
            vocab_size=len(words) + 4, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        )
    )


def lively(network):
    """Queries and keys are enlarged and what a training begins at zero with is not: attention of a
    fresh network is nearly uniform, and its modulation does nothing."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.abs().sum() == 0:
                weight.normal_(0, 0.02, generator=random)
            if name.endswith(
                ("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")
            ):
                weight.mul_(4)
    return network.eval()


def sd3(root, captions, medium35=False):
    words = clip_words(captions, root / "clip")
    long = t5_words(captions, root / "t5")
    torch.manual_seed(0)
    extra = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if medium35 else {}
    network = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=40,
        pos_embed_max_size=32,
        **extra,
    )
    return StableDiffusion3Pipeline(
        transformer=lively(network),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4),
        text_encoder=clip(words, CLIPTextModelWithProjection, projection_dim=16),
        tokenizer=words,
        text_encoder_2=clip(words, CLIPTextModelWithProjection, projection_dim=24),
        tokenizer_2=words,
        text_encoder_3=t5(long, 64),
        tokenizer_3=long,
    )


def flux(root, captions, guided=True):
    words = clip_words(captions, root / "clip")
    long = t5_words(captions, root / "t5")
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guided,
    )
    return FluxPipeline(
        transformer=lively(network),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided),
        vae=vae(4),
        text_encoder=clip(words, CLIPTextModel),
        tokenizer=words,
        text_encoder_2=t5(long),
        tokenizer_2=long,
    )


def pixart(root, captions):
    long = t5_words(captions, root / "t5")
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        transformer=lively(network),
        scheduler=DPMSolverMultistepScheduler(),
        vae=vae(4),
        text_encoder=t5(long),
        tokenizer=long,
    )


def qwen(root, captions):
    words = qwen_words(captions, root / "qwen")
    torch.manual_seed(0)
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "mrope_section": [1, 1, 2],
            "rope_type": "default",
            "type": "default",
            "rope_theta": 10000.0,
        },
        "vocab_size": len(words) + 5,
    }
    seen = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "window_size": 16,
    }
    network = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    return QwenImagePipeline(
        transformer=lively(network),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.1, 0.2, 0.0],
            latents_std=[1.0, 2.0, 1.5, 1.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=seen)
        ),
        tokenizer=words,
    )


def z_image(root, captions):
    words = qwen_words(captions, root / "qwen", CHAT)
    torch.manual_seed(0)
    network = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # they are not initialised
        network.x_pad_token.fill_(0.1)
        network.cap_pad_token.fill_(0.1)
    return ZImagePipeline(
        transformer=lively(network),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(words) + 5,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
            )
        ),
        tokenizer=words,
    )


def gemma_words(captions, folder):
    """A byte-pair vocabulary with Gemma's special tokens."""
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    words, marks = pre_tokenizers.Split("\u2581", "merged_with_next"), pre_tokenizers.Punctuation()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, marks])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special)
    bpe.train_from_iterator(list(captions) * 10, trainer)
    model = json.loads(bpe.to_str())["model"]
    words = GemmaTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    words.save_pretrained(folder)
    return words


def sana(root, captions):
    words = gemma_words(captions, root / "gemma")
    torch.manual_seed(0)
    network = SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    squeezed = {
        "latent_channels": 4,
        "attention_head_dim": 2,
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "encoder_qkv_multiscales": ((), (), ()),
        "decoder_qkv_multiscales": ((), (), ()),
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "upsample_block_type": "interpolate",
        "downsample_block_type": "stride_conv",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41,
    }
    return SanaPipeline(
        transformer=lively(network),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderDC(in_channels=3, **squeezed),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(words) + 5,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
            )
        ),
        tokenizer=words,
    )


def flux2_klein(root, captions):
    words = qwen_words(captions, root / "qwen", CHAT)
    torch.manual_seed(0)
    network = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    statistics = AutoencoderKLFlux2(
        sample_size=64,
        latent_channels=4,
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        statistics.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
        statistics.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    return Flux2KleinPipeline(
        transformer=lively(network),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=statistics,
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(words) + 5,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=28,  # states of the 9th, 18th and 27th are read
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
            )
        ),
        tokenizer=words,
    )


BUILDERS = {
    "pixart_sigma": pixart,
    "sana": sana,
    "sd3_medium": sd3,
    "sd35_medium": lambda *given: sd3(*given, medium35=True),
    "flux_dev": flux,
    "flux_schnell": lambda *given: flux(*given, guided=False),
    "flux2_klein": flux2_klein,
    "qwen_image": qwen,
    "z_image": z_image,
}


def save(family, root, captions):
    """The folder of a tiny checkpoint of a family."""
    BUILDERS[family](root, captions).save_pretrained(root / "model", safe_serialization=True)
    return root / "model"
