"""A recorder for a UNet by itself, without the generator around it."""

import torch

from dd.attention.recorder import CLASS_PROMPT, AttentionRecorder, Reading, Words
from dd.attention.sites import Layout, Site, choose_sites, find_sites

LAYOUT = Layout("apart")


def sites_of(unet: torch.nn.Module, latent: int | None = None) -> list[Site]:
    """Where a UNet attends for latents of side ``latent`` (None = its own size), as a copy of it
    without numbers shows: a forward that costs nothing."""
    config = unet.config
    side, width = latent or config.sample_size, config.cross_attention_dim
    with torch.device("meta"):
        copy, added = type(unet).from_config(config), None
        if config.addition_embed_type == "text_time":
            times = 6 * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - times
            added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        latents = torch.zeros(1, config.in_channels, side, side)
        given = latents, torch.zeros(1), torch.zeros(1, 77, width)
        return find_sites(copy, LAYOUT, lambda: copy(*given, added_cond_kwargs=added))


def reading_of(unet: torch.nn.Module, cross_side: int, self_side: int) -> Reading:
    """Of all layers at these sides."""
    sites = sites_of(unet)
    cross = choose_sites("cross", sites, cross_side, None)
    return Reading(LAYOUT, cross, choose_sites("self", sites, self_side, None))


def words_of(class_states: torch.Tensor, full_prompt: bool = False) -> Words:
    """Class prompts of these states [B, T, C]; with ``full_prompt`` also the prompts that the UNet
    is given."""
    sources = [CLASS_PROMPT, *(["full_prompt_caption"] if full_prompt else [])]
    return Words([dict.fromkeys(sources, [[1]])] * len(class_states), class_states)


def means(recorder: AttentionRecorder, source: str) -> torch.Tensor:
    """Mean attention of all samples."""
    return torch.stack([recorder.mean(source, i) for i in range(len(recorder.words.spans))])


def recorder_of(
    unet: torch.nn.Module,
    class_states: torch.Tensor,
    cross_side: int,
    self_side: int,
    full_prompt: bool = False,
) -> AttentionRecorder:
    """Of the attention to those words and among the pixels."""
    reading = reading_of(unet, cross_side, self_side)
    return AttentionRecorder(unet, reading, words_of(class_states, full_prompt))
