"""Latents on disk: the same bytes however often the work was interrupted, a scene once a turn."""

import numpy as np
import pytest
import torch

from dd import generators as diffusion
from dd.store.provenance import sha256
from dd.training import latents as cache
from dd.training.latents import CachedLatents, write_latents

IDENTITY = {"vae_sha256": "a", "world": "b"}


class Scenes:
    """``count`` random images [3, 16, 16]; a number that raises an error when it is drawn."""

    def __init__(self, count=7, fails_at=None):
        self.count, self.fails_at, self.drawn = count, fails_at, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.fails_at:
            raise KeyboardInterrupt
        self.drawn.append(index)
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index)) * 2 - 1
        return image, f"caption {index}", f"words {index}"


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return diffusion.build_vae(
        16, block_out_channels=[4, 4], norm_num_groups=2, mid_block_add_attention=False
    ).eval()


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 3)
    monkeypatch.setattr(cache, "BATCH", 2)


def content(folder):
    return {f.name: sha256(f) for f in folder.iterdir()}


def test_an_interrupted_window_has_the_same_bytes(vae, tmp_path):
    whole = write_latents(tmp_path / "whole", vae, Scenes(), IDENTITY)
    assert set(content(whole)) == {*(f"0000{k}.safetensors" for k in range(3)), "window.json"}
    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path / "parts", vae, Scenes(fails_at=4), IDENTITY)
    assert [f.name for f in (tmp_path / "parts").iterdir()] == ["00000.safetensors"]
    scenes = Scenes()
    write_latents(tmp_path / "parts", vae, scenes, IDENTITY)
    assert scenes.drawn == [3, 4, 5, 6] and content(tmp_path / "parts") == content(whole)
    back = write_latents(tmp_path / "back", vae, Scenes(), IDENTITY, backwards=True)
    assert content(back) == content(whole)
    untouched = Scenes()
    write_latents(whole, vae, untouched, IDENTITY)
    assert untouched.drawn == []


def test_latents_of_another_world_are_refused(vae, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path, vae, Scenes(fails_at=4), IDENTITY)
    with pytest.raises(ValueError, match="another window or world .world: b -> c"):
        write_latents(tmp_path, vae, Scenes(), {**IDENTITY, "world": "c"})
    write_latents(tmp_path, vae, Scenes(), IDENTITY)
    with pytest.raises(ValueError, match="vae_sha256: a -> z"):
        write_latents(tmp_path, vae, Scenes(), {**IDENTITY, "vae_sha256": "z"})
    file = tmp_path / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"00001.safetensors is missing or damaged. Remove it"):
        write_latents(tmp_path, vae, Scenes(), IDENTITY)


def test_each_scene_comes_once_a_pass_with_its_own_text(vae, tmp_path):
    scenes = Scenes()
    write_latents(tmp_path, vae, scenes, IDENTITY)
    data = CachedLatents(21, tmp_path, seed=3)
    drawn = [data[i] for i in range(21)]
    numbers = [int(caption.split()[1]) for _, caption, _ in drawn]
    for turn in range(3):
        assert sorted(numbers[turn * 7 : turn * 7 + 7]) == list(range(7))
    assert len({tuple(numbers[t * 7 : t * 7 + 7]) for t in range(3)}) == 3
    for (latent, _, words), number in zip(drawn, numbers, strict=True):
        with torch.no_grad():
            mean = vae.encode(scenes[number][0][None]).latent_dist.mean[0]
        assert words == f"words {number}" and latent.dtype == torch.float32
        torch.testing.assert_close(latent, mean * vae.config.scaling_factor, rtol=2e-3, atol=2e-3)
    # a draw is a function of its number, whatever was drawn before
    again = CachedLatents(21, tmp_path, seed=3)
    assert [again[i][1] for i in (20, 0, 13)] == [drawn[i][1] for i in (20, 0, 13)]
    assert [CachedLatents(21, tmp_path, seed=4)[i][1] for i in range(7)] != [
        caption for _, caption, _ in drawn[:7]
    ]
    with pytest.raises(IndexError):
        data[21]
    assert np.isfinite(data.latents.float().numpy()).all()
