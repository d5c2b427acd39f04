from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from dd import generators as diffusion
from dd.embedded.scenes import scene
from dd.training.text_to_image import (
    Autoencoder,
    CaptionedData,
    CaptionedScenes,
    JointTextToImage,
    TextToImage,
    edges,
    prompt_variant,
)


def test_scenes_are_those_of_the_generators_split():
    data = CaptionedScenes(3, seed=1, first=10)
    assert len(data) == 3
    for i in range(3):
        image, caption, words = data[i]
        drawn = scene("shapes", "generator", 10 + i, 1)
        assert image.shape == (3, 128, 128) and image.min() >= -1 and image.max() <= 1
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
        assert images.shape == (2, 3, 128, 128) and images.dtype == torch.float32
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
    return unet, text, tokenizer


def task(parts, prediction="v_prediction", **kwargs):
    scheduler = diffusion.training_scheduler(prediction)
    return TextToImage(*parts, scheduler, **kwargs)


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
    unet = parts[0]
    module = task(parts, prediction, seed=3, caption_dropout=1.0, hide_after_end=0.0)
    latents = torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    logged = []
    module.log = lambda name, value, **_: logged.append((name, float(value)))
    with torch.no_grad():
        loss = module.training_step((latents, ["a tire"] * 4, ["tire"] * 4), 0)
        rng = np.random.default_rng([3, 0, 0])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
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


def test_noise_is_logit_normal_about_its_mean(parts):
    """Three quarters of the shares of a mean of 1 and a deviation of 1 lie above 0.58."""
    module = task(parts, noise_mean=1.0)
    shares = module.noise_shares(20_000, torch.Generator().manual_seed(0))
    logits = shares.logit()
    assert float(logits.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(logits.std()) == pytest.approx(1.0, abs=0.03)
    assert float((shares > 0.5827).float().mean()) == pytest.approx(0.7475, abs=0.01)


@torch.no_grad()
def test_a_mean_moves_the_timesteps_of_a_unet(parts):
    seen = {}
    for mean in (None, 1.0, -1.0):
        module = task(parts, noise_mean=mean)
        forward = parts[0].forward

        def watched(noisy, t, states, mean=mean, forward=forward):
            seen[mean] = t
            return forward(noisy, t, states)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.unet, "forward", watched)
            rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
            module.loss(torch.zeros(200, 4, 2, 2), [""] * 200, rng, generator)
    for t in seen.values():
        assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    middle = {mean: float(t.float().median()) / 1000 for mean, t in seen.items()}
    assert middle[None] == pytest.approx(0.5, abs=0.06)
    assert middle[1.0] == pytest.approx(0.731, abs=0.03) and middle[-1.0] < 0.3


# The VAE's training


def test_edges_are_the_differences_of_neighbours():
    image = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])[None, None]
    assert edges(image).tolist() == [1.0, 2.0, 0.0, 0.0, 2.0, 1.0, -1.0]


def test_the_autoencoder_learns_from_crops_and_edges():
    torch.manual_seed(0)
    vae = diffusion.build_vae(
        16, block_out_channels=[4, 4], norm_num_groups=2, mid_block_add_attention=False
    )
    images = torch.rand(3, 3, 16, 24)
    seen, losses = [], {}
    for weight in (0.0, 1.0):
        module = Autoencoder(vae, crop=8, edge_weight=weight, kl_weight=0.0)
        module.log_dict = lambda *_, **__: None
        encode = vae.encode
        vae.encode = lambda x, encode=encode: (seen.append(x), encode(x))[1]
        torch.manual_seed(1)
        with torch.no_grad():
            losses[weight] = float(module.training_step((images,), 0))
        vae.encode = encode
    assert losses[1.0] > losses[0.0] and torch.equal(*seen)
    windows = images.unfold(2, 8, 1).unfold(3, 8, 1)  # [3, 3, 9, 17, 8, 8]
    for part, own in zip(seen[0], windows, strict=True):
        places = own.permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert (places == part).flatten(1).all(1).sum() == 1
    whole = Autoencoder(vae)
    assert whole._cropped(images) is images


# Stable Diffusion 3's training


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    tokenizer = diffusion.train_tokenizer(
        ["a photo of a tire"], 5, tmp_path_factory.mktemp("t"), max_length=12
    )
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    network = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "pos_embed_max_size": 4,
    }
    made = diffusion.build_texts_and_transformer(tokenizer, sizes, sizes, network)
    return *made, tokenizer


def flow(joint, **settings):
    first, second, transformer, tokenizer = joint
    scheduler = diffusion.flow_scheduler()
    return JointTextToImage(transformer, first, second, tokenizer, scheduler, **settings)


@torch.no_grad()
def test_the_text_is_laid_out_as_it_is_drawn(joint):
    first, second, transformer, tokenizer = joint
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusion.flow_scheduler(),
        vae=None,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    prompts = ["a tire", "a photo of a tire; tire", ""]
    states, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    module = flow(joint, hide_after_end=0.0)
    rows, vectors = module.encode_text(prompts, np.random.default_rng(0))
    torch.testing.assert_close(rows, states)
    torch.testing.assert_close(vectors, pooled)
    assert rows.shape == (3, 12 + 1, 32) and not rows[:, -1].any()


@torch.no_grad()
def test_what_holds_the_whole_sentence_is_hidden(joint):
    prompts = ["a tire", "", "a photo of a tire"]
    whole, hidden = (
        flow(joint, hide_after_end=share).encode_text(prompts, np.random.default_rng(0))
        for share in (0.0, 1.0)
    )
    for i, prompt in enumerate(prompts):
        end = len(joint[3](prompt).input_ids) - 1
        if not prompt:
            assert torch.equal(hidden[0][i], whole[0][i]) and torch.equal(hidden[1][i], whole[1][i])
            continue
        assert torch.equal(hidden[0][i, :end], whole[0][i, :end]) and whole[0][i, end:].any()
        assert not hidden[0][i, end:].any() and not hidden[1][i].any() and whole[1][i].any()


def test_the_loss_is_the_error_of_the_velocity(joint):
    transformer = joint[2]
    module = flow(joint, caption_dropout=1.0)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    rng, prompts = np.random.default_rng(0), [""] * 5
    with torch.no_grad():
        loss = module.loss(latents, prompts, rng, torch.Generator().manual_seed(7))
        generator = torch.Generator().manual_seed(7)
        noise = torch.randn(latents.shape, generator=generator)
        share = 1 / (1 + (-torch.randn(5, generator=generator)).exp())
        s = share.view(-1, 1, 1, 1)
        text = module.encode_text(prompts, rng)
        velocity = transformer((1 - s) * latents + s * noise, *text, share * 1000).sample
    expected = ((velocity - (noise - latents)) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    # a step along the velocity that was asked for leads back to the image
    noisy = (1 - s) * latents + s * noise
    torch.testing.assert_close(noisy - s * (noise - latents), latents, rtol=1e-4, atol=1e-5)


def test_every_part_of_the_joint_generator_is_trained(joint):
    module = flow(joint, caption_dropout=0.0, hide_after_end=0.0)
    module.log = lambda *_, **__: None
    torch.manual_seed(0)
    for weight in joint[2].parameters():  # what begins at zero hides the parts before it
        torch.nn.init.normal_(weight, 0, 0.1)
    latents = torch.randn(4, 4, 8, 8)
    module.training_step((latents, ["a photo of a tire"] * 4, ["tire"] * 4), 0).backward()
    for name, part in zip(("first", "second", "transformer"), joint, strict=False):
        moved = [p.grad is not None and bool(p.grad.any()) for p in part.parameters()]
        assert sum(moved) > 0.8 * len(moved), name


def test_the_rate_rises_and_falls_to_its_floor(joint):
    module = flow(joint, learning_rate=0.1, warmup=10, floor=0.5)
    module.trainer = SimpleNamespace(max_steps=110)
    (optimizer,), (schedule,) = module.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), schedule["scheduler"].step()
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.05)
