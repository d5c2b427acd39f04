"""The text-to-image model that ships with the package."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from dd import generators as diffusion
from dd.taxonomy import SHAPES_NAMES

MODEL = Path(diffusion.__file__).parents[1] / "embedded" / "assets" / "shapes_stable_diffusion"


def test_weights_are_small_half_precision_safetensors():
    weights = list(MODEL.rglob("*.safetensors"))
    assert {f.parent.name for f in weights} == {"vae", "unet", "text_encoder"}
    assert sum(f.stat().st_size for f in weights) <= 16 * 2**20
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in sorted(file.keys())} == {"F16"}, path
    assert not [f for f in MODEL.rglob("*") if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_the_card_says_how_it_was_made():
    card, parts = (
        (MODEL / "README.md").read_text(),
        json.loads((MODEL / "training.json").read_text()),
    )
    assert all(f"{part['steps']:,}" in card for part in parts)
    for word in ("Licence", "no mask was read", "Recipe", "samples.png", "loss.svg", "hardware"):
        assert word in card
    assert (MODEL / "samples.png").is_file() and (MODEL / "loss.svg").is_file()


@pytest.fixture(scope="module")
def generator():
    return diffusion.TextToImage(model="embedded")


def test_names_of_two_words_and_words_of_several_tokens(generator):
    assert sum(" " in name for name in SHAPES_NAMES) >= 2
    counts = {
        word: generator.token_count(word) - 2 for name in SHAPES_NAMES for word in name.split()
    }
    assert max(counts.values()) > 1 and min(counts.values()) == 1


def test_it_has_self_and_cross_attention_at_several_resolutions(generator):
    for kind in ("self", "cross"):
        assert len({site.side for site in generator.sites if site.kind == kind}) >= 2
