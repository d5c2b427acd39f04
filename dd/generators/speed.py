"""Options that make a pipeline faster and change its pixels by rounding only."""

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D

RECOMPILED = 128


def channels_last(network: Any, vae: Any) -> None:
    """Put both into the memory layout that convolutions on a GPU with tensor cores prefer."""
    for part in (network, vae):
        for module in part.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.to(memory_format=torch.channels_last)


def fuse_projections(network: Any, vae: Any) -> None:  # the VAE has one attention or none
    """Use one matrix product for queries, keys and values of each attention layer of the network,
    and one for keys and values of a prompt. The single matrices stay, since the keys of class
    prompts need them."""
    if not hasattr(network, "fuse_qkv_projections"):
        raise ValueError(
            f"diffusion.fused_projections=true: {type(network).__name__} cannot do that; leave it "
            "false"
        )
    if any(getattr(module, "attn2", None) is not None for module in network.modules()) and (
        type(network).__name__ == "SD3Transformer2DModel"
    ):
        raise ValueError(
            "diffusion.fused_projections=true: diffusers cannot fuse the image-only attention of "
            "Stable Diffusion 3.5; leave it false"
        )
    network.fuse_qkv_projections()
    if not any(name.endswith((".to_qkv", ".to_kv")) for name, _ in network.named_modules()):
        raise ValueError(
            f"diffusion.fused_projections=true: no layer of {type(network).__name__} was fused; "
            "leave it false"
        )


def compile_blocks(network: Any, vae: Any) -> None:
    """Compile the residual and feed-forward blocks of both (torch.compile). The attention between
    them is not compiled, because hooks observe it and a compiled graph would not call hooks that
    are added later."""
    import torch._dynamo  # here, since it takes seconds

    # blocks share their code but differ in size: more variants than dynamo expects
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILED)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * RECOMPILED)
    blocks = [m for m in network.modules() if isinstance(m, ResnetBlock2D | FeedForward)]
    if not blocks:
        raise ValueError(
            f"diffusion.compile=true: {type(network).__name__} has no block that can be compiled "
            "here; leave it false"
        )
    blocks += [m for m in vae.decoder.modules() if isinstance(m, ResnetBlock2D | FeedForward)]
    for block in blocks:
        block.compile()
