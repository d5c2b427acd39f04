from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dd import generators as diffusion
from dd.embedded.shapes import scene
from dd.training.text_to_image import CaptionedData, CaptionedScenes, TextToImage, prompt_variant


def test_scenes_are_those_of_the_generators_split():
    data = CaptionedScenes(3, seed=1, first=10)
    assert len(data) == 3
    for i in range(3):
        image, caption, words = data[i]
        drawn = scene("shapes", "generator", 10 + i, 1)
        assert image.shape == (3, 64, 64) and image.min() >= -1 and image.max() <= 1
        assert np.array_equal(
            ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), drawn.image
        )
        assert (caption, words) == (drawn.caption, " ".join(drawn.classes))
    with pytest.raises(IndexError):
        data[3]


def test_batches_hold_no_mask():
    data = CaptionedData(2, first=3)
    for steps_done in (0, 4):  # a resumed training takes the next scenes
        data.trainer = SimpleNamespace(
            max_steps=6, global_step=steps_done, accumulate_grad_batches=1, world_size=1
        )
        batches = list(data.train_dataloader())
        assert len(batches) == 6 - steps_done
        images, captions, words = batches[0]
        assert images.shape == (2, 3, 64, 64) and images.dtype == torch.float32
        shown = [scene("shapes", "generator", 3 + 2 * steps_done + i).caption for i in range(2)]
        assert list(captions) == shown and len(words) == 2


def test_prompts_take_every_form_of_generation():
    rng = np.random.default_rng(0)
    forms = Counter(prompt_variant("a photo of a tire", "tire", rng) for _ in range(4000))
    expected = {"": 0.1, "a photo of a tire": 0.315, "a photo of a tire; tire": 0.315, "tire": 0.27}
    assert forms.keys() == expected.keys()
    for form, share in expected.items():
        assert forms[form] / 4000 == pytest.approx(share, abs=0.03)
    assert {prompt_variant("a", "b", rng, drop=1.0) for _ in range(20)} == {""}
    assert "" not in {prompt_variant("a", "b", rng, drop=0.0) for _ in range(200)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    tokenizer = diffusion.train_tokenizer(
        ["a photo of a tire"], 5, tmp_path_factory.mktemp("t"), max_length=24
    )
    torch.manual_seed(0)
    vae = diffusion.build_vae(
        64, block_out_channels=[8, 8], norm_num_groups=4, mid_block_add_attention=False
    )
    text, unet = diffusion.build_text_and_unet(
        tokenizer,
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": [8, 8],
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        },
    )
    return unet, text, vae, tokenizer


def task(parts, prediction="v_prediction", **kwargs):
    unet, text, vae, tokenizer = parts
    return TextToImage(
        unet, text, vae, tokenizer, diffusion.training_scheduler(prediction), **kwargs
    )


def test_states_are_hidden_from_the_end_token_on(parts):
    module, prompts = task(parts, hide_after_end=1.0), ["a tire", "", "a photo of a tire; tire"]
    with torch.no_grad():
        hidden = module.encode_text(prompts, np.random.default_rng(0))
        whole = task(parts, hide_after_end=0.0).encode_text(prompts, np.random.default_rng(0))
    for i, prompt in enumerate(prompts):
        end = len(module.tokenizer(prompt).input_ids) - 1
        if not prompt:
            assert torch.equal(
                hidden[i], whole[i]
            )  # the unconditional half of guidance keeps its states
            continue
        assert (
            torch.equal(hidden[i, :end], whole[i, :end])
            and not hidden[i, end:].any()
            and whole[i, end:].any()
        )


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_the_loss_is_the_error_of_the_schedulers_own_target(parts, prediction):
    unet, text, vae, _ = parts
    module = task(parts, prediction, seed=3, caption_dropout=1.0, hide_after_end=0.0)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    logged = []
    module.log = lambda name, value, **_: logged.append((name, float(value)))
    with torch.no_grad():
        loss = module.training_step((images, ["a tire"] * 4, ["tire"] * 4), 0)
        rng = np.random.default_rng([3, 0, 0])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(0, 1000, (4,), generator=generator)
        a = module.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        states = module.encode_text([""] * 4, rng)
        predicted = unet(noisy, t, states).sample
    target = a.sqrt() * noise - (1 - a).sqrt() * latents if prediction == "v_prediction" else noise
    expected = ((predicted - target) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert logged == [("text_to_image/loss", pytest.approx(float(loss)))]


def test_the_autoencoder_is_neither_trained_nor_saved(parts):
    module = task(parts)
    assert not any(p.requires_grad for p in parts[2].parameters())
    assert not any("vae" in name for name in module.state_dict())
    assert {"learning_rate", "seed"} <= dict(module.hparams).keys()
