"""The text-to-image models that ship with the package."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dd import generators as diffusion
from dd.taxonomy import SHAPES_NAMES

FOLDERS = {"unet": diffusion.EMBEDDED["embedded"], "mmdit": diffusion.EMBEDDED["embedded_mmdit"]}
PARTS = {
    "unet": {"vae", "unet", "text_encoder"},
    "mmdit": {"vae", "transformer", "text_encoder", "text_encoder_2"},
}
OPENED = {
    "unet": {"model": "embedded"},
    "mmdit": {"model": "embedded_mmdit", "scheduler": None, "t5": False, "max_tokens": 1},
}
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", PARTS)
def test_weights_are_small_half_precision_safetensors(kind):
    folder = FOLDERS[kind]
    weights = list(folder.rglob("*.safetensors"))
    assert {f.parent.name for f in weights} == PARTS[kind]
    assert sum(f.stat().st_size for f in weights) <= 16 * 2**20
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in sorted(file.keys())} == {"F16"}, path
    assert not [f for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


@pytest.mark.parametrize("kind", PARTS)
def test_the_card_says_how_it_was_made(kind):
    folder = FOLDERS[kind]
    card = (folder / "README.md").read_text()
    parts = json.loads((folder / "training.json").read_text())
    pieces = [part for part in parts if part["part"] == kind]
    assert pieces and all(f"{part['reached']:,}" in card for part in pieces)
    for word in ("Licence", "no mask was read", f"shapes_{kind}.yaml", "samples.png", "loss.svg"):
        assert word in card
    assert (folder / "samples.png").is_file() and (folder / "loss.svg").is_file()


def test_both_have_one_autoencoder_and_one_tokenizer():
    one, other = (load_file(folder / VAE) for folder in FOLDERS.values())
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    merges = [(folder / "tokenizer/merges.txt").read_bytes() for folder in FOLDERS.values()]
    assert merges[0] == merges[1]


@pytest.fixture(scope="module")
def generators():
    return {kind: diffusion.TextToImage(**settings) for kind, settings in OPENED.items()}


@pytest.mark.parametrize("kind", PARTS)
def test_names_of_two_words_and_words_of_several_tokens(generators, kind):
    assert sum(" " in name for name in SHAPES_NAMES) >= 2
    words = [word for name in SHAPES_NAMES for word in name.split()]
    counts = {word: len(generators[kind].pipe.tokenizer(word).input_ids) - 2 for word in words}
    assert max(counts.values()) > 1 and min(counts.values()) == 1


def test_attention_is_where_the_paper_has_it(generators):
    """Words at a sixteenth of the side; pixels at a thirty-second, with four heads or more."""
    found = {kind: generator.sites for kind, generator in generators.items()}
    assert {s.side for s in found["unet"] if s.kind == "cross"} >= {16}
    fine = [s for s in found["unet"] if s.kind == "self" and s.side == 32]
    assert fine and all(site.heads >= 4 for site in fine)
    assert {(s.kind, s.side) for s in found["mmdit"]} == {("joint", 16)}
