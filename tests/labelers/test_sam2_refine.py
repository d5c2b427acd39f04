"""SAM 2 on points from heat."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Sam2Model

from dd.data.datasets import read_image, read_mask, stored_heat
from dd.labelers.base import Asked, in_parts
from dd.labelers.pixels import SAM2, Look, at_size, seen
from dd.labelers.sam2_refine import Sam2Refine, prompt
from dd.masks.overlaps import resolve
from dd.masks.points import Points, points
from dd.stages.label_images import label_images
from dd.store.samples import read_plan
from tests.labelers import tiny


@pytest.fixture
def sam2(checkpoints):
    def make(model="sam2", **settings):
        return Sam2Refine(model=str(checkpoints / model), batch_size=2, **settings)

    return make


# Prompts


def test_points_lie_in_the_middle_of_their_cells_whatever_the_model_adds():
    xy, labels = prompt(Points(((0, 0), (1, 3)), ((3, 0),)), 4, 64)
    # a cell is 16 pixels, its middle 8; the model adds a half
    assert (xy[0, 0] + 0.5).tolist() == [[8, 8], [56, 24], [8, 56]]
    assert labels.tolist() == [[[1, 1, 0]]] and xy.dtype == torch.float32


def test_an_image_has_its_mask_whatever_stands_beside_it(sam2, synthetic):
    """Others have more classes and points; SAM 2 attends to points that pad a list."""
    labeler, plan = sam2(), read_plan(synthetic)
    asked = [
        Asked(
            read_image(synthetic / f"JPEGImages/{s.id}.png"),
            s,
            stored_heat(synthetic, s.id)["class_prompt"][:, 4],
        )
        for s in plan
    ]
    alone = [labeler.label([one])[0] for one in asked]
    for one, other in zip(alone, labeler.label(asked), strict=True):
        assert (one.mask != other.mask).mean() < 0.002  # rounding: a few pixels on edges


# The masks are those of the model


def test_masks_are_the_models_for_these_points(sam2, synthetic, checkpoints):
    target = label_images(synthetic, sam2(), "sam2_refine")
    model = Sam2Model.from_pretrained(checkpoints / "sam2").eval()
    seen_values = set()
    for sample in read_plan(synthetic):
        image = read_image(synthetic / f"JPEGImages/{sample.id}.png")
        heat = torch.from_numpy(stored_heat(synthetic, sample.id)["class_prompt"][:, 4])
        found = points(heat)
        scores = []
        for p in found:  # each class by itself
            cells = [*p.inside, *p.outside]
            xy = torch.tensor([[(x + 0.5) * 8 - 0.5, (y + 0.5) * 8 - 0.5] for y, x in cells])
            labels = torch.tensor([1] * len(p.inside) + [0] * len(p.outside))
            with torch.no_grad():
                out = model(
                    pixel_values=seen([image], Look(64, SAM2.mean, SAM2.std)),
                    input_points=xy[None, None],
                    input_labels=labels[None, None],
                    multimask_output=False,
                )
            logits = at_size(out.pred_masks[0, 0], image.shape[:2])[0]
            scores.append(((logits > 0) * out.iou_scores[0, 0, 0]).numpy())
        expected = resolve(np.stack(scores), sample.class_ids, image.shape[:2]).mask
        mask = read_mask(target / f"{sample.id}.png")
        assert (mask != expected).mean() < 0.01
        seen_values |= set(np.unique(mask).tolist())
    assert seen_values >= {0, 1, 2}


def test_a_video_model_holds_the_one_for_images(tmp_path, synthetic):
    """Meta's repositories are of that kind."""
    made = tiny.save_sam2_video(tmp_path / "video")
    assert json.loads((tmp_path / "video/config.json").read_text())["model_type"] == "sam2_video"
    labeler = Sam2Refine(model=str(tmp_path / "video"))
    own = labeler.loaded.model.state_dict()
    theirs = made.state_dict()
    assert own.keys() <= theirs.keys()
    assert all(torch.equal(own[k], theirs[k]) for k in own)
    label_images(synthetic, labeler, "video")


def test_a_class_without_heat_has_no_point_and_no_pixel(sam2, synthetic):
    sample = read_plan(synthetic)[0]
    heat = np.stack([np.full((8, 8), 3.0), np.eye(8)])
    image = read_image(synthetic / f"JPEGImages/{sample.id}.png")
    (found,) = sam2().label([Asked(image, sample, heat)])
    assert not (found.mask == sample.class_ids[0]).any()
    flat = np.full((2, 8, 8), 3.0)
    (found,) = sam2().label([Asked(image, sample, flat)])
    assert not found.mask.any()


# Memory


def test_what_does_not_fit_together_is_shown_one_by_one():
    calls = []

    def call(batch):
        calls.append(list(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        return batch

    assert in_parts(call, [1, 2, 3]) == [1, 2, 3]
    assert calls == [[1, 2, 3], [1], [2], [3]]

    def never(batch):
        raise torch.OutOfMemoryError

    with pytest.raises(ValueError, match="one image does not fit .*labeler.dtype"):
        in_parts(never, [1, 2])


# Bad input


def test_heat_that_is_missing_is_said(sam2, without_heat):
    with pytest.raises(ValueError, match="images were given, so there is no heat"):
        label_images(without_heat, sam2(), "a")
    assert not (without_heat / "masks").exists()


def test_a_power_or_source_that_is_not_stored(sam2, synthetic):
    with pytest.raises(ValueError, match=r"labeler.power=7 is not stored .*0 to 4"):
        label_images(synthetic, sam2(power=7), "a")
    with pytest.raises(ValueError, match="after is not stored"):
        label_images(synthetic, sam2(source="after"), "a")
    (synthetic / "records/0.jsonl").unlink()
    with pytest.raises(ValueError, match="5 of 5 samples are not generated yet"):
        label_images(synthetic, sam2(), "a")
    assert not (synthetic / "masks").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "labeler.model is not set: .*facebook/sam2.1-hiera-large with labeler.revision"),
        ({"model": "./nowhere"}, "no such folder. Give a local folder"),
        ({"model": "facebook/sam2.1-hiera-tiny"}, "revision=None: a hub id needs the commit"),
        ({"model": "facebook/sam2.1-hiera-tiny", "revision": "main"}, "needs the commit"),
        ({"model": "{}/clip"}, 'a model of type "clip_text_model", .* takes sam2 or sam2_video'),
        ({"model": "{}/sam3"}, 'a model of type "sam3", this labeler takes sam2 or sam2_video'),
        ({"model": "{}/pickled"}, "no safetensors weights .*pickles can run code"),
        ({"model": "{}"}, "has no config.json"),
        ({"model": "{}/sam2", "revision": "0" * 40}, "no effect on the folder"),
        ({"model": "{}/sam2", "peak": 0.1}, "cold=0.2: expected less than 0.1"),
        ({"model": "{}/sam2", "dtype": "int8"}, "labeler.dtype='int8': expected float32, "),
        ({"model": "{}/sam2", "inside": 0}, "labeler.inside=0: expected a whole number of 1 or"),
    ],
)
def test_what_cannot_be_a_labeler_is_refused(checkpoints, settings, said):
    given = {k: v.format(checkpoints) if k == "model" else v for k, v in settings.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        Sam2Refine(**given)
    assert "\n" not in str(error.value)


def test_half_a_model_is_refused_by_the_names_of_what_it_lacks(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "sam2", tmp_path / "half")
    weights = load_file(tmp_path / "half/model.safetensors")
    gone = sorted(weights)[:4]
    left = {k: v for k, v in weights.items() if k not in gone}
    save_file(left, tmp_path / "half/model.safetensors", {"format": "pt"})
    named = re.escape(", ".join(gone[:3]))
    with pytest.raises(ValueError, match=rf"lacks 4 of \d+ weights .*{named}: they would stay"):
        Sam2Refine(model=str(tmp_path / "half"))
    (tmp_path / "half/model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="could not be loaded; is it complete"):
        Sam2Refine(model=str(tmp_path / "half"))
