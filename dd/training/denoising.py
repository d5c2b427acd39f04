"""The step shared by every training of a diffusion model."""

from typing import Any

import torch


def noised(
    scheduler: Any,
    latents: torch.Tensor,
    generator: torch.Generator,
    timesteps: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noisy latents [B, C, H, W], their timesteps [B], the scheduler's own target, epsilon or v).
    ``timesteps`` [B], or None to draw them uniformly."""
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    steps = scheduler.config.num_train_timesteps
    if timesteps is None:
        timesteps = torch.randint(0, steps, (len(latents),), generator=generator)
    t = timesteps.to(latents.device)
    v_prediction = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, t) if v_prediction else noise
    return scheduler.add_noise(latents, noise, t), t, target
