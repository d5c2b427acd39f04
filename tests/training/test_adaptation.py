from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dd import generators as diffusion
from dd.data.photos import read_photo
from dd.training.adaptation import Adaptation, CaptionedPhotos, loss_weights, square


def picture(path, height, width):
    grid = np.stack(
        np.meshgrid(np.arange(width), np.arange(height)), -1
    )  # red says x, green says y
    Image.fromarray(
        np.concatenate([grid, np.full((height, width, 1), 7)], -1).astype(np.uint8)
    ).save(path)
    return path


def pixels(tensor):
    return ((tensor + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def test_a_photograph_is_cut_to_a_square_at_a_drawn_place(tmp_path):
    path, corners = picture(tmp_path / "p.png", 16, 60), set()
    for seed in range(20):
        image = square(read_photo(path), 16, np.random.default_rng(seed))
        assert image.shape == (3, 16, 16) and image.dtype == torch.float32
        x, y, _ = pixels(image)[0, 0]
        assert y == 0 and np.array_equal(
            pixels(image)[..., 0], np.tile(np.arange(x, x + 16), (16, 1))
        )
        corners.add(int(x))
    assert len(corners) > 5 and min(corners) >= 0 and max(corners) <= 44
    for size in (8, 32):
        assert square(read_photo(path), size, np.random.default_rng(0)).shape == (3, size, size)


def test_every_image_comes_once_a_round(tmp_path):
    photos = [read_photo(picture(tmp_path / f"{i}.png", 8, 8 + i)) for i in range(5)]
    captions = [[f"{i}", f"again {i}"] for i in range(5)]
    draws = CaptionedPhotos(photos, captions, 8, 15, seed=1)
    seen = [draws[i][1] for i in range(15)]
    rounds = [[text.split()[-1] for text in seen[i : i + 5]] for i in (0, 5, 10)]
    assert (
        all(sorted(each) == list("01234") for each in rounds)
        and len({tuple(each) for each in rounds}) > 1
    )
    assert any("again" in text for text in seen) and any("again" not in text for text in seen)
    other = CaptionedPhotos(photos, captions, 8, 15, seed=1)
    assert (
        torch.equal(other[13][0], draws[13][0]) and other[13][1] == seen[13]
    )  # whatever was drawn before
    with pytest.raises(IndexError):
        draws[15]


def test_weights_of_the_loss():
    snr = torch.tensor([0.1, 5.0, 80.0])
    assert loss_weights(snr, "epsilon", None).tolist() == [1, 1, 1]
    torch.testing.assert_close(loss_weights(snr, "epsilon", 5.0), torch.tensor([1, 1, 5 / 80]))
    torch.testing.assert_close(
        loss_weights(snr, "v_prediction", 5.0), torch.tensor([0.1 / 1.1, 5 / 6, 5 / 81])
    )


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_weighted_error_of_the_models_own_target(kind, gamma):
    """Against the formulas by hand, with a UNet that answers with half of what it sees."""
    latents = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = {}

    def unet(noisy, t, states):
        seen.update(noisy=noisy, t=t, states=states)
        return SimpleNamespace(sample=noisy / 2)

    def sample(generator):
        seen["state"] = generator.get_state()
        return latents / 0.5

    vae = SimpleNamespace(
        encode=lambda _: SimpleNamespace(latent_dist=SimpleNamespace(sample=sample))
    )
    vae.config = SimpleNamespace(scaling_factor=0.5)
    scheduler = diffusion.training_scheduler(kind)
    model = diffusion.Trainable.__new__(diffusion.Trainable)
    model._generator = SimpleNamespace(pipe=SimpleNamespace(vae=vae, unet=unet))
    model.parameters = [torch.nn.Parameter(torch.zeros(1))]
    model.encode, model.scheduler = lambda captions: captions, scheduler
    module = Adaptation(model, min_snr_gamma=gamma, caption_dropout=1.0)
    module._trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, global_rank=0)
    module.log = lambda *_, **__: None
    loss = module.training_step((torch.zeros(3, 3, 16, 16), ["a", "b", "c"]), 0)
    generator = torch.Generator()
    generator.set_state(seen["state"])
    noise = torch.randn(3, 4, 8, 8, generator=generator)
    a = scheduler.alphas_cumprod[seen["t"]].view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["noisy"], a.sqrt() * latents + (1 - a).sqrt() * noise)
    target = noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
    snr = a / (1 - a)
    weight = (
        1.0 if gamma is None else snr.clamp(max=gamma) / (snr if kind == "epsilon" else snr + 1)
    )
    torch.testing.assert_close(
        loss, (weight * (seen["noisy"] / 2 - target) ** 2).mean(), rtol=1e-4, atol=1e-6
    )
    assert seen["states"] == ["", "", ""]  # dropped
    assert list(module.state_dict()) == ["lora.0"]
