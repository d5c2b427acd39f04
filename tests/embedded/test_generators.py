"""The generators of the 128-px world: states of trainings that are under way, kept in the package
so that a training can go on from them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dd import embedded

ASSETS = Path(embedded.__file__).parent / "assets"
PARTS = {
    "unet": {"vae", "unet", "text_encoder"},
    "mmdit": {"vae", "transformer", "text_encoder", "text_encoder_2"},
}
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", PARTS)
def test_weights_are_small_half_precision_safetensors(kind):
    folder = ASSETS / f"shapes_{kind}"
    weights = list(folder.rglob("*.safetensors"))
    assert {f.parent.name for f in weights} == PARTS[kind]
    assert sum(f.stat().st_size for f in weights) <= 16 * 2**20
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in sorted(file.keys())} == {"F16"}, path


@pytest.mark.parametrize("kind", PARTS)
def test_the_card_says_how_far_the_training_is(kind):
    folder = ASSETS / f"shapes_{kind}"
    card, parts = (
        (folder / "README.md").read_text(),
        json.loads((folder / "training.json").read_text()),
    )
    pieces = [part for part in parts if part["part"] == kind]
    assert pieces and all(f"{part['reached']:,}" in card for part in pieces)
    for word in ("Licence", "no mask was read", f"shapes_{kind}.yaml", "samples.png", "loss.svg"):
        assert word in card
    assert (folder / "samples.png").is_file() and (folder / "loss.svg").is_file()


def test_both_stand_on_the_autoencoder_that_is_kept():
    own = load_file(ASSETS / "shapes_autoencoder" / VAE)
    for kind in PARTS:
        copy = load_file(ASSETS / f"shapes_{kind}" / VAE)
        assert own.keys() == copy.keys() and all(torch.equal(own[k], copy[k]) for k in own)
        words = (ASSETS / f"shapes_{kind}/tokenizer/merges.txt").read_bytes()
        assert words == (ASSETS / "shapes_autoencoder/tokenizer/merges.txt").read_bytes()
