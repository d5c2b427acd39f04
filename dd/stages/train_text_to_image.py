"""Stage: train the embedded Stable Diffusion from scratch on captioned scenes. Each finished part is kept and skipped."""

from pathlib import Path

import torch

from dd import diffusion
from dd.shapes import scene
from dd.text_to_image import Autoencoder, TextToImage, caption_loader


def _captions(count: int, seed: int):
    for index in range(count):
        s = scene("shapes", "generator", index, seed)
        yield s.caption
        yield f"{s.caption}; {' '.join(s.classes)}"


def _images(count: int, seed: int) -> torch.Tensor:
    stack = torch.stack([torch.from_numpy(scene("shapes", "generator", i, seed).image) for i in range(count)])
    return stack.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_text_to_image(
    folder, trainer, models: dict, autoencoder: dict, text_to_image: dict, batch_size: int, num_workers: int, seed: int
) -> Path:
    """Tokenizer, VAE, then UNet with text encoder; writes ``folder/model``, a complete Stable Diffusion folder.

    ``trainer(max_steps, root)`` makes a Lightning trainer (``conf/trainer/text_to_image.yaml``). ``models`` holds
    the sizes, ``autoencoder`` and ``text_to_image`` the settings and ``max_steps`` of the two trainings. An interrupted
    run goes on from its last checkpoint; a finished part is not trained again.
    """
    folder = Path(folder)
    vae_settings, t2i_settings = dict(autoencoder), dict(text_to_image)
    vae_steps, t2i_steps = vae_settings.pop("max_steps"), t2i_settings.pop("max_steps")
    tokenizer = diffusion.train_tokenizer(_captions(3000, seed), models["tokenizer_merges"], folder / "tokenizer")

    torch.manual_seed(seed)
    vae = diffusion.build_vae(**models["vae"])
    vae_done = folder / "vae"
    if not vae_done.exists():
        module = Autoencoder(vae, **vae_settings)
        fit = trainer(max_steps=vae_steps, default_root_dir=folder / "vae_training")
        fit.fit(module, caption_loader(vae_steps * batch_size, batch_size, num_workers, seed=seed), ckpt_path="last")
        vae.register_to_config(scaling_factor=diffusion.latent_scale(vae, _images(256, seed)))
        vae.save_pretrained(folder / "vae.tmp")
        (folder / "vae.tmp").rename(vae_done)
    vae = diffusion.load_vae(vae_done)

    text_encoder, unet = diffusion.build_text_and_unet(tokenizer, models["text_encoder"], models["unet"])
    scheduler = diffusion.training_scheduler(models["prediction_type"])
    module = TextToImage(unet, text_encoder, vae, tokenizer, scheduler, seed=seed, **t2i_settings)
    fit = trainer(max_steps=t2i_steps, default_root_dir=folder / "training")
    loader = caption_loader(t2i_steps * batch_size, batch_size, num_workers, seed=seed, first=vae_steps * batch_size)
    fit.fit(module, loader, ckpt_path="last")
    diffusion.save_pipeline(folder / "model", vae, text_encoder, tokenizer, unet, scheduler)
    return folder / "model"
