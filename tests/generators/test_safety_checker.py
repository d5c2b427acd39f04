"""A checkpoint with diffusers' own safety checker (random weights, its thresholds moved so that
it flags all or nothing)."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from benchmarks.synthesis import synthesize
from dd.generators import TextToImage
from dd.prompts.prompt import Prompts, make_prompt
from dd.store.samples import read_records
from dd.taxonomy import taxonomy

SETTINGS = {"steps": 2, "guidance": 3.0, "max_power": 1}


@pytest.fixture
def guarded(edited):
    """``guarded(threshold)``: a checkpoint whose checker flags an image if a cosine exceeds the
    threshold."""

    def make(threshold):
        folder = edited(
            safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
            feature_extractor=["transformers", "CLIPImageProcessor"],
        )
        tiny = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        torch.manual_seed(0)
        checker = StableDiffusionSafetyChecker(
            CLIPConfig(
                text_config=tiny,
                vision_config={**tiny, "image_size": 16, "patch_size": 8},
                projection_dim=8,
            )
        )
        with torch.no_grad():
            checker.concept_embeds_weights.fill_(threshold)
            checker.special_care_embeds_weights.fill_(2)
        checker.save_pretrained(folder / "safety_checker", safe_serialization=True)
        sides = {"height": 16, "width": 16}
        CLIPImageProcessor(size=sides, crop_size=sides).save_pretrained(
            folder / "feature_extractor"
        )
        return str(folder)

    return make


@pytest.fixture
def plain(folders, samples):
    return TextToImage(model=str(folders["sd"]), **SETTINGS).generate(samples)


def test_what_is_flagged_comes_out_black_and_is_named(guarded, samples):
    model = TextToImage(model=guarded(-2), **SETTINGS, safety_checker="on")
    images, heat, bad = model.generate(samples)
    assert not images.any() and bad == ["safety checker"] * 3 and len(heat) == 3


def test_what_passes_is_the_same_image(guarded, samples, plain):
    model = TextToImage(model=guarded(2), **SETTINGS, safety_checker=True)
    images, heat, bad = model.generate(samples)
    assert bad == [None] * 3 and images.tobytes() == plain[0].tobytes()
    assert all(
        a["class_prompt"].tobytes() == b["class_prompt"].tobytes()
        for a, b in zip(heat, plain[1], strict=True)
    )


@pytest.mark.parametrize("switch", ["off", False])
def test_off_it_is_not_loaded(guarded, samples, plain, switch):
    model = TextToImage(model=guarded(-2), **SETTINGS, safety_checker=switch)
    images, _, bad = model.generate(samples)
    assert (
        model.pipe.safety_checker is None
        and bad == [None] * 3
        and images.tobytes() == plain[0].tobytes()
    )


def test_it_belongs_to_the_identity(guarded, folders):
    folder = guarded(2)
    off, on = (
        TextToImage(model=folder, **SETTINGS, safety_checker=s).identity() for s in ("off", "on")
    )
    assert "safety_checker" not in off and on["safety_checker"] == "on"
    assert off["weights_sha256"] != on["weights_sha256"]  # its weights count where it is used
    assert (
        off["weights_sha256"] == TextToImage(model=str(folders["sd"])).identity()["weights_sha256"]
    )


def test_a_set_without_one_good_image_is_an_error_with_a_record(guarded, tmp_path):
    model = TextToImage(model=guarded(-2), **SETTINGS, safety_checker="on")
    seeds, generate = [], model.generate

    def watched(samples):
        seeds.append([s.seed for s in samples])
        return generate(samples)

    model.generate = watched

    def prompts(*_):
        return Prompts([make_prompt("an apple", ["apple"]), make_prompt("a tire", ["tire"])])

    with pytest.raises(
        ValueError,
        match=r"each of its 2 images stayed bad after all attempts \(safety checker 6 times\)",
    ):
        synthesize(tmp_path / "set", model, prompts, taxonomy("shapes"), 2, 0, 2, redraw=2)
    assert [len(s) for s in seeds] == [2, 1, 1, 1, 1] and len(
        set(np.concatenate(seeds).tolist())
    ) == 6
    for record in read_records(tmp_path / "set").values():
        assert (
            record["failed"]
            and record["attempt"] == 2
            and record["faults"] == ["safety checker"] * 3
        )
    assert not (tmp_path / "set/JPEGImages").exists() and not (tmp_path / "set/ImageSets").exists()
