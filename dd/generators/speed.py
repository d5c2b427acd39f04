"""Options that make a pipeline faster and its pixels no different beyond rounding."""

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D

RECOMPILED = 128


def channels_last(pipe: DiffusionPipeline) -> None:
    """UNet and VAE in the memory layout that convolutions on a GPU with tensor cores want."""
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)


def fuse_projections(pipe: DiffusionPipeline) -> None:
    """One matrix product for queries, keys and values of each attention layer of the UNet; keys
    and values of a prompt. The single matrices stay: with them the keys of class prompts are
    made."""
    pipe.fuse_qkv_projections(unet=True, vae=False)


def compile_blocks(pipe: DiffusionPipeline) -> None:
    """Compile the residual and feed-forward blocks of UNet and VAE (torch.compile). The
    attention between them stays as it is, where hooks observe it: a compiled graph would not
    call hooks that come later."""
    import torch._dynamo  # here, since it takes seconds

    # blocks share their code and differ in their sizes: more of them than dynamo expects
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILED)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * RECOMPILED)
    for network in (pipe.unet, pipe.vae.decoder):
        for module in network.modules():
            if isinstance(module, ResnetBlock2D | FeedForward):
                module.compile()
