"""The captioner with a BLIP in the format of the hub, tiny and with random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BlipForConditionalGeneration

from dd.prompts.captioner import Captioner


@pytest.fixture(scope="module")
def folder(tiny_blip, tmp_path_factory):
    return tiny_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def captioner(folder):
    return Captioner(str(folder), max_new_tokens=6, num_beams=2)


def pictures(count=3):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8) for i in range(count)]


def test_captions_are_those_of_the_model_itself(folder, captioner):
    model, tokenizer = (
        BlipForConditionalGeneration.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    texts = captioner(pictures())
    for image, text in zip(pictures(), texts, strict=True):
        resized = (
            np.asarray(
                Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC), np.float32
            )
            / 255
        )
        mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
        pixels = torch.tensor((resized - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            tokens = model.generate(
                pixel_values=pixels, num_beams=2, max_new_tokens=6, do_sample=False
            )
        assert (
            text
            == tokenizer.decode(tokens[0], skip_special_tokens=True).removeprefix("[DEC]").strip()
        )
    assert any(texts) and captioner(pictures()) == texts


def test_a_batch_gives_what_single_images_give(captioner):
    assert captioner(pictures()) == [captioner([p])[0] for p in pictures()]


def test_the_identity_is_plain_and_knows_the_weights(folder, captioner, tiny_blip, tmp_path):
    identity = captioner.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert {
        "model",
        "revision",
        "weights_sha256",
        "num_beams",
        "max_new_tokens",
        "dtype",
        "device",
    } == identity.keys()
    other = Captioner(str(tiny_blip(tmp_path, seed=1))).identity()
    assert other["weights_sha256"] != identity["weights_sha256"]


def test_pickles_are_refused(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"no safetensors weights, only pickles \['pytorch_model.bin'\]"
    ):
        Captioner(str(tmp_path))


def test_code_of_a_repository_is_not_run(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises((ValueError, FileNotFoundError), match="could not be loaded"):
        Captioner(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/blip", "blip", "a/b/c"])
def test_no_such_folder(model):
    with pytest.raises(
        FileNotFoundError, match="no such folder. Give a local folder in transformers format"
    ):
        Captioner(model)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        Captioner(str(tmp_path))


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setattr("dd.prompts.captioner.AutoImageProcessor.from_pretrained", offline)
    with pytest.raises(
        FileNotFoundError, match=r"couldn't connect(.|\n)*captioner.model=/path/to/folder"
    ):
        Captioner("Salesforce/blip-image-captioning-base")


def test_a_model_that_wants_more_than_pixels(captioner, monkeypatch):
    def ask(**_):
        raise ValueError("You must specify input_ids")

    monkeypatch.setattr(captioner.model, "generate", ask)
    with pytest.raises(
        ValueError, match="does not caption from pixels alone: You must specify input_ids"
    ):
        captioner(pictures(1))


@pytest.mark.parametrize("change", [{"dtype": "int8"}, {"num_beams": 0}, {"max_new_tokens": 0}])
def test_impossible_settings(change, folder):
    with pytest.raises(ValueError, match="allowed: float32|must be at least 1"):
        Captioner(str(folder), **change)
