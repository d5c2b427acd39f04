"""Tokenizer, VAE and noise schedule of a Stable Diffusion that is built from scratch."""

import numpy as np
import torch
from transformers import CLIPTokenizer

from dd import generators as diffusion


def test_the_tokenizer_is_the_same_every_time(tmp_path, captions):
    words = [caption for caption, _ in captions]
    for name in "abc":
        diffusion.train_tokenizer(words, 20, tmp_path / name)
    for file in ("vocab.json", "merges.txt"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1


def test_the_tokenizer_reads_like_clips(tmp_path, captions):
    made = diffusion.train_tokenizer(
        [caption for caption, _ in captions], 20, tmp_path, max_length=12
    )
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("A Photo of  an APPLE!", "it's 42 猫é", ""):
        assert loaded(text).input_ids == made(text).input_ids
    ids = loaded("an apple", padding="max_length").input_ids
    assert (
        len(ids) == 12
        and ids[0] == loaded.bos_token_id
        and ids[-1] == loaded.eos_token_id == loaded.pad_token_id
    )
    assert loaded.decode(ids, skip_special_tokens=True).strip() == "an apple"
    assert max(loaded.get_vocab().values()) + 1 == len(loaded) == 2 * 256 + 20 + 2


def test_the_noise_schedule_is_that_of_stable_diffusion():
    scheduler = diffusion.training_scheduler("epsilon")
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4)
    assert scheduler.config.prediction_type == "epsilon"


def test_latents_are_standardised_and_pictures_stay():
    torch.manual_seed(0)
    vae = diffusion.build_vae(
        16, block_out_channels=[8, 8], norm_num_groups=4, mid_block_add_attention=False
    )
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        picture = vae.decode(before.mean).sample
        diffusion.standardise_latents(vae, images)
        after = vae.encode(images).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, picture, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-2)
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)
    # the spread of a latent around its mean is scaled like the latents
    scale = (after.std / before.std).mean((0, 2, 3))
    torch.testing.assert_close(scale * before.mean.std((0, 2, 3)), torch.ones(4), rtol=1e-2, atol=0)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.0)
