"""SAM 3 on class names."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, Sam3Model

from dd.data.datasets import read_image, read_mask
from dd.labelers.base import Images
from dd.labelers.pixels import SAM3, Look, at_size, seen
from dd.labelers.sam3 import Sam3, class_scores
from dd.masks.overlaps import resolve
from dd.stages.label_images import label_images
from dd.store.provenance import read_json
from dd.store.samples import read_plan
from dd.taxonomy import Taxonomy
from tests.labelers.conftest import PETS


@pytest.fixture
def sam3(checkpoints):
    def make(**settings):
        given = {"model": str(checkpoints / "sam3"), "batch_size": 2, "score": 0.01, **settings}
        return Sam3(**given)

    return make


# Scores


def logit(p):
    return float(torch.logit(torch.tensor(p)))


def test_a_pixel_has_the_highest_score_of_the_objects_that_hold_it():
    masks = torch.full((1, 4, 1, 3), -9.0)
    masks[0, 0, 0, :2] = 9  # objects 0 and 1 share the middle
    masks[0, 1, 0, 1:] = 9
    masks[0, 2] = 9  # too low a score
    out = SimpleNamespace(
        pred_logits=torch.tensor([[logit(0.5), logit(0.9), logit(0.2), logit(0.999)]]),
        presence_logits=torch.tensor([[logit(0.8)]]),
        pred_masks=masks,
    )
    found = class_scores(out, (1, 3), 0.3, 0.5)
    assert torch.allclose(found, torch.tensor([[0.4, 0.72, 0.72]]))
    out.presence_logits = torch.tensor([[logit(0.1)]])  # the class is not there
    assert not class_scores(out, (1, 3), 0.3, 0.5).any()


# The masks are those of the model


def model_masks(checkpoints, image, texts, ids):
    """As the model's own forward and its processor's steps give them, class by class."""
    model = Sam3Model.from_pretrained(checkpoints / "sam3").eval()
    words = CLIPTokenizer.from_pretrained(checkpoints / "sam3")
    scores = []
    for text in texts:
        read = words(text, padding="max_length", max_length=32, return_tensors="pt")
        with torch.no_grad():
            out = model(
                pixel_values=seen([image], Look(56, SAM3.mean, SAM3.std)),
                input_ids=read["input_ids"],
                attention_mask=read["attention_mask"],
            )
        each = (out.pred_logits.sigmoid() * out.presence_logits.sigmoid())[0]
        masks = at_size(out.pred_masks[0].sigmoid(), image.shape[:2]) > 0.5
        claimed = [m * s for m, s in zip(masks, each, strict=True) if s > 0.01]
        scores.append(torch.stack(claimed).amax(0).numpy() if claimed else np.zeros(masks[0].shape))
    return resolve(np.stack(scores), ids, image.shape[:2])


def test_masks_are_the_models_for_the_names(sam3, synthetic, checkpoints):
    target = label_images(synthetic, sam3(), "sam3")
    values, ties = set(), 0
    for sample in read_plan(synthetic):
        image = read_image(synthetic / f"JPEGImages/{sample.id}.png")
        expected = model_masks(checkpoints, image, sample.classes, sample.class_ids)
        mask = read_mask(target / f"{sample.id}.png")
        assert (mask != expected.mask).mean() < 0.01
        values |= set(np.unique(mask).tolist())
        ties += expected.ties
    assert len(values - {0, 255}) >= 2
    assert read_json(target / "masks.json").get("counts", {}).get("ties", 0) == ties


def test_the_text_of_a_class_and_all_classes(sam3, synthetic, checkpoints):
    texts = {"gold ring": "a shiny ring"}
    target = label_images(synthetic, sam3(ask="all", texts=texts), "all")
    asked = ["cat", "dog", "a shiny ring"]
    for sample in read_plan(synthetic)[:2]:
        image = read_image(synthetic / f"JPEGImages/{sample.id}.png")
        expected = model_masks(checkpoints, image, asked, [1, 2, 3])
        assert (read_mask(target / f"{sample.id}.png") != expected.mask).mean() < 0.01
    identity = read_json(target / "masks.json")["identity"]
    assert identity["settings"]["texts"] == texts and identity["settings"]["ask"] == "all"


def test_no_heat_is_needed(sam3, without_heat):
    assert (label_images(without_heat, sam3(), "sam3") / "masks.json").is_file()


# Bad input


def test_a_text_that_is_too_long_is_refused_by_its_class(sam3, synthetic):
    long = "a ring of gold " * 12
    with pytest.raises(ValueError, match=r"class 'gold ring' is asked for .* \d+ tokens; SAM 3"):
        label_images(synthetic, sam3(texts={"gold ring": long}), "sam3")
    with pytest.raises(ValueError, match="class 'cat' is asked for by ' '"):
        label_images(synthetic, sam3(texts={"cat": " "}), "sam3")
    with pytest.raises(ValueError, match="labeler.texts names cow, which is not a class of"):
        label_images(synthetic, sam3(texts={"cow": "a cow"}), "sam3")
    assert not (synthetic / "masks").exists()


def test_exactly_32_tokens_are_read(sam3, synthetic):
    labeler = sam3()
    images = Images(synthetic, Taxonomy("pets", PETS.names), read_plan(synthetic))
    text = ""
    while len(labeler.words(text + "é ")["input_ids"]) <= 32:
        text += "é "
    while len(labeler.words(text + "!")["input_ids"]) <= 32 and len(text) < 200:
        text += "!"
    assert len(labeler.words(text)["input_ids"]) == 32
    sam3(texts={"cat": text}).ready(images)
    with pytest.raises(ValueError, match="class 'cat'"):
        sam3(texts={"cat": text + " cat"}).ready(images)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("sam2", 'a model of type "sam2", this labeler takes sam3 or sam3_video, such as face'),
        ("clip", "a model of type"),
    ],
)
def test_other_models_are_refused(checkpoints, model, said):
    with pytest.raises(ValueError, match=said):
        Sam3(model=str(checkpoints / model))


def test_a_gated_model_is_told_where_to_be_asked_for(monkeypatch):
    from huggingface_hub.errors import GatedRepoError
    from huggingface_hub.utils import httpx

    from dd.labelers import loading

    def gated(*_, **__):
        request = httpx.Request("GET", "https://huggingface.co/facebook/sam3")
        raise GatedRepoError("no", response=httpx.Response(403, request=request))

    monkeypatch.setattr(loading, "hf_hub_download", gated)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(
        FileNotFoundError, match=r"gated: accept .*co/facebook/sam3, .*HF_TOKEN"
    ) as e:
        Sam3(model="facebook/sam3", revision="0" * 40)
    assert "hf_secret" not in str(e.value) and "\n" not in str(e.value)


def test_without_a_network_a_folder_is_asked_for(monkeypatch):
    from dd.labelers import loading

    def nothing(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(loading, "hf_hub_download", nothing)
    with pytest.raises(FileNotFoundError, match="(?s)no route to host.*labeler.model=/path/to"):
        Sam3(model="facebook/sam3", revision="0" * 40)


def test_a_folder_without_its_words(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "sam3", tmp_path / "mute")
    for file in (
        *tmp_path.glob("mute/token*"),
        *tmp_path.glob("mute/vocab*"),
        *tmp_path.glob("mute/merges*"),
    ):
        file.unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        Sam3(model=str(tmp_path / "mute"))


def test_a_video_model_holds_the_one_for_images(checkpoints, tmp_path):
    """Meta's repository is of that kind: a detector, which is the model for images, and a
    tracker."""
    folder = shutil.copytree(checkpoints / "sam3", tmp_path / "video")
    config = json.loads((folder / "config.json").read_text())
    content = {"model_type": "sam3_video", "detector_config": config}
    (folder / "config.json").write_text(json.dumps(content))
    weights = load_file(folder / "model.safetensors")
    held = {f"detector_model.{k}": v for k, v in weights.items()}
    held["tracker_model.no_memory"] = torch.zeros(2)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    own, image = Sam3(model=str(folder)), Sam3(model=str(checkpoints / "sam3"))
    assert own.loaded.weights_sha256 == image.loaded.weights_sha256
    assert own.look.side == 56
