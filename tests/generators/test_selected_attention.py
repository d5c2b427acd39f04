"""Some cross-attention layers or heads instead of all."""

import numpy as np
import pytest

from dd.generators import TextToImage
from dd.masks.from_heat import SOURCES
from dd.prompts.prompt import make_prompt
from dd.store.samples import Sample
from tests.generators.conftest import choose

SETTINGS = {"cross_resolution": 16, "self_resolution": 16, "max_power": 0, "full_prompt": True}
LAYERS = [
    "down_blocks.1.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
]  # the embedded ones at 16
PROMPT = make_prompt("a photo of a gold ring and an apple", ["apple", "gold ring"])
SAMPLE = Sample("0", PROMPT.text, PROMPT.class_prompt, PROMPT.classes, (1, 6), seed=3, unit=0)


@pytest.fixture(scope="module")
def embedded():
    return TextToImage(**SETTINGS)


@pytest.fixture
def read(embedded, monkeypatch):
    """``read(cross_layers=None, cross_heads=None)`` -> heat of one noisy image by source,
    float32."""

    def call(cross_layers=None, cross_heads=None):
        choose(embedded, monkeypatch, cross_layers=cross_layers, cross_heads=cross_heads)
        image = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), np.uint8)
        (heat,) = embedded.read_real(image, [SAMPLE], [200], seed=1)
        return {source: maps.astype(np.float32) for source, maps in heat.items()}

    return call


@pytest.mark.parametrize(
    "parts", [[{"cross_layers": [n]} for n in LAYERS], [{"cross_heads": [h]} for h in range(6)]]
)
def test_all_is_the_mean_of_the_parts(read, parts):
    whole, each = read(), [read(**part) for part in parts]
    for source in SOURCES[:3]:
        np.testing.assert_allclose(
            whole[source], np.mean([e[source] for e in each], 0), atol=2e-4, rtol=2e-3
        )
        assert np.abs(each[0][source] - each[1][source]).max() > 1e-3


def test_a_beginning_names_whole_parts_of_a_name(read):
    both = [read(cross_layers=[n])["class_prompt"] for n in LAYERS[1:]]
    np.testing.assert_allclose(
        read(cross_layers=["up_blocks"])["class_prompt"], np.mean(both, 0), atol=2e-4, rtol=2e-3
    )
    with pytest.raises(
        ValueError, match="begins with this: up_block.*Layers:\n.*down_blocks.1.attentions.0"
    ):
        read(cross_layers=["up_block"])


def test_a_layer_that_is_not_at_this_resolution(read):
    with pytest.raises(
        ValueError, match=r"layers=.*mid_block'\]: .*layer at 16 .*begins with this: mid_block"
    ):
        read(cross_layers=["down_blocks", "mid_block"])
    with pytest.raises(ValueError, match="nothing named"):
        read(cross_layers=[])


@pytest.mark.parametrize("heads", [[6], [], [0, -1]])
def test_heads_that_are_not_there(read, heads):
    with pytest.raises(
        ValueError, match=r"cross_heads=\[.*\]: the layers that are read have heads 0 to 5"
    ):
        read(cross_heads=heads)


def test_the_choice_is_part_of_the_identity_only_if_there_is_one(embedded):
    assert not {"cross_layers", "cross_heads"} & embedded.identity().keys()
    identity = TextToImage(**SETTINGS, cross_layers=["up_blocks"], cross_heads=[0]).identity()
    assert (identity["cross_layers"], identity["cross_heads"]) == (["up_blocks"], [0])
