"""Self-training: a trained segmenter labels the synthetic images again, and what a run trained
on these labels is called."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dd.data.datasets import (
    SegmentationFolder,
    encode_image,
    encode_mask,
    read_image,
    read_mask,
    write_split,
)
from dd.stages.label_by_run import LabelerSettings, Teacher, label_by_run
from dd.store.provenance import read_json, sha256, write_json
from dd.store.samples import append_records
from dd.taxonomy import Taxonomy
from dd.training.segmentation import Views

ROOT = Path(__file__).parents[2]
PETS = Taxonomy("pets", ["cat", "dog"])
FIRST_MASKS = {"settings": {"power": 4}, "heat": "1" * 64}
TEACHER = {
    "taxonomy": {"name": "pets", "names": ["cat", "dog"]},
    "weights_sha256": "0" * 64,
    "supervision": "A",
    "trained_on": {
        "source": "synthetic",
        "mask_settings": FIRST_MASKS,
        "shots": None,
        "after": None,
    },
}
SIZES = [(12, 9), (7, 15), (8, 8), (12, 9), (10, 11)]


@pytest.fixture
def synthetic(tmp_path):
    """A synthetic set as generate.py leaves it, of images of several sizes."""
    root, rng = tmp_path / "synthetic/pets", np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for i, size in enumerate(SIZES):
        data = encode_image(rng.integers(0, 256, (*size, 3), dtype=np.uint8), ".png")
        (root / "JPEGImages" / f"{i}.png").write_bytes(data)
        (root / "SegmentationClass" / f"{i}.png").write_bytes(encode_mask(np.zeros(size, np.uint8)))
        append_records(root, "0", [{"id": str(i), "image_sha256": sha256(data), "heat_sha256": ""}])
    write_json(root / "SegmentationClass/masks.json", {"identity": FIRST_MASKS})
    write_json(
        root / "run.json", {"identity": {"taxonomy": {"name": "pets", "names": ["cat", "dog"]}}}
    )
    write_split(root, "train", [str(i) for i in range(len(SIZES))])
    return root


@pytest.fixture
def label_again(synthetic):
    def call(run=TEACHER, views=None, mask_set="self_training", segmenter=None, **kwargs):
        teacher = Teacher(run, segmenter or Colours(), views or Views(16))
        given = {"mask_set": mask_set, "batch_size": 2, **kwargs}
        return label_by_run(synthetic, teacher, LabelerSettings(**given))

    return call


class Colours(torch.nn.Module):
    """The brightest channel is the class, but class 1 has the left side and 2 the right: a
    mirror that is not undone shows."""

    def forward(self, images):
        side = torch.linspace(1, -1, images.shape[3]).expand(len(images), images.shape[2], -1)
        return (images.float() - 128) / 32 + torch.stack([0 * side, side, -side], 1)


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


class Dies(torch.nn.Module):
    """A segmenter that is interrupted after some batches (images of different sizes are shown
    one by one)."""

    def __init__(self, segmenter, calls):
        super().__init__()
        self.segmenter, self.calls = segmenter, calls

    def forward(self, images):
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("the lights went out")
        return self.segmenter(images)


# What is written


@pytest.mark.parametrize(
    "views", [Views(16), Views(16, [0.5, 1.0], True)], ids=["single", "augmented"]
)
def test_masks_are_the_teachers_predictions(label_again, synthetic, views):
    target = label_again(views=views)
    assert target == synthetic / "masks/self_training"
    teacher, seen = Colours(), set()
    for i, size in enumerate(SIZES):
        image, mask = read_image(synthetic / f"JPEGImages/{i}.png"), read_mask(target / f"{i}.png")
        with torch.no_grad():
            (expected,) = views.predict(teacher, [views(image)], [size])
        assert np.array_equal(mask, expected.numpy())
        with Image.open(target / f"{i}.png") as picture:
            assert picture.mode == "P" and picture.getpalette()[3:6] == [128, 0, 0]
        seen |= set(np.unique(mask).tolist())
    assert seen == {0, 1, 2}
    SegmentationFolder(synthetic, "train", PETS, "masks/self_training")[
        4
    ]  # what the training reads


def test_masks_json_says_who_labelled_and_from_what(label_again):
    target = label_again(views=Views(16, [0.5, 1.0], True), confidence=0.6, weights="raw")
    done = read_json(target / "masks.json")
    assert done["identity"]["settings"] == {
        "scales": [0.5, 1.0],
        "flip": True,
        "resize": 16,
        "confidence": 0.6,
        "weights": "raw",
    }
    teacher = {k: TEACHER[k] for k in ("weights_sha256", "supervision", "trained_on")}
    assert (
        done["identity"]["teacher"] == teacher
        and teacher["trained_on"]["mask_settings"] == FIRST_MASKS
    )
    assert done["sha256"] == {str(i): sha256(target / f"{i}.png") for i in range(len(SIZES))}
    masks = [read_mask(target / f"{i}.png") for i in range(len(SIZES))]
    values, counts = np.unique(np.concatenate([m.ravel() for m in masks]), return_counts=True)
    assert {int(k): v for k, v in done["pixels"].items()} == dict(
        zip(values.tolist(), counts.tolist(), strict=True)
    )


def test_uncertain_pixels_stay_255(label_again):
    hard = label_again(mask_set="hard")
    soft = label_again(mask_set="soft", confidence=0.6)
    masks = [
        (read_mask(hard / f"{i}.png"), read_mask(soft / f"{i}.png")) for i in range(len(SIZES))
    ]
    uncertain = sum((b == 255).sum() for _, b in masks)
    assert 0 < uncertain < sum(b.size for _, b in masks)
    assert all((a[b != 255] == b[b != 255]).all() for a, b in masks) and not any(
        (a == 255).any() for a, _ in masks
    )


def test_the_first_masks_and_images_are_not_touched(label_again, synthetic):
    before = contents(synthetic)
    label_again()
    assert {
        k: v for k, v in contents(synthetic).items() if not k.startswith("masks/self_training/")
    } == before


# Again, interrupted, refused


def test_a_finished_set_is_left_alone(label_again):
    target = label_again()
    before = contents(target)
    assert label_again(segmenter=Dies(None, 0)) == target
    assert contents(target) == before


def test_what_a_killed_writer_left_is_swept(label_again, synthetic):
    left = synthetic / "masks/self_training/.4.png.18431.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    label_again()
    assert not left.exists() and not list(left.parent.glob(".*"))


@pytest.mark.parametrize("calls", [0, 1, 3, 4])
def test_an_interrupted_set_goes_on_as_if_it_had_not_been(label_again, synthetic, calls):
    whole = contents(label_again(mask_set="whole"))
    with pytest.raises(RuntimeError, match="lights went out"):
        label_again(segmenter=Dies(Colours(), calls))
    target = synthetic / "masks/self_training"
    assert not (target / "masks.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in target.glob("*.png")}
    assert len(kept) == 2 * (calls // 2)  # whole batches of two
    label_again()
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert contents(target) == whole


def test_a_mask_that_was_changed_is_made_again(label_again, synthetic):
    whole = contents(label_again(mask_set="whole"))
    with pytest.raises(RuntimeError):
        label_again(segmenter=Dies(Colours(), 4))
    target = synthetic / "masks/self_training"
    (target / "0.png").write_bytes(encode_mask(np.full(SIZES[0], 2, np.uint8)))
    (target / "2.png").unlink()
    label_again()
    found = contents(target)
    assert {k: v for k, v in found.items() if "records" not in k} == {
        k: v for k, v in whole.items() if "records" not in k
    }


OTHER_TEACHER = {**TEACHER, "weights_sha256": "5" * 64}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"run": OTHER_TEACHER}, r"teacher\.weights_sha256: 0000.* -> 5555"),
        ({"confidence": 0.7}, r"settings\.confidence: None -> 0\.7"),
        ({"views": Views(16, [1.0], True)}, r"settings\.flip: False -> True"),
        ({"weights": "raw"}, r"settings\.weights: ema -> raw"),
    ],
    ids=["teacher", "confidence", "flip", "weights"],
)
def test_a_set_of_another_teacher_is_refused(label_again, synthetic, finished, other, named):
    if finished:
        label_again()
    else:
        with pytest.raises(RuntimeError):
            label_again(segmenter=Dies(Colours(), 3))
    before = contents(synthetic)
    with pytest.raises(
        FileExistsError, match=rf"(?s)masks.self_training was made .*{named}.*mask_set="
    ) as error:
        label_again(**other)
    assert contents(synthetic) == before and len(str(error.value).splitlines()) < 20
    assert label_again(mask_set="another", **other).name == "another"


def test_a_set_of_the_label_stage_is_not_replaced(label_again, synthetic):
    write_json(
        synthetic / "masks/p2/masks.json",
        {"identity": {"settings": {"power": 2}, "heat": "1" * 64}},
    )
    before = contents(synthetic)
    with pytest.raises(
        FileExistsError, match="masks.p2 was made by another teacher or with other settings"
    ):
        label_again(mask_set="p2")
    assert contents(synthetic) == before


def test_other_images_are_another_set(label_again, synthetic):
    label_again()
    append_records(synthetic, "0", [{"id": "3", "image_sha256": "9" * 64, "heat_sha256": ""}])
    with pytest.raises(FileExistsError, match="images: "):
        label_again()


# Bad input


@pytest.mark.parametrize("names", [["dog", "cat"], ["cat"], ["cow", "pig"]])
def test_a_teacher_of_other_classes_is_refused(label_again, synthetic, names):
    before = contents(synthetic)
    with pytest.raises(
        ValueError,
        match="teacher was trained for the classes .* has .'cat', 'dog'.: a teacher labels",
    ):
        label_again({**TEACHER, "taxonomy": {"name": "other", "names": names}})
    assert contents(synthetic) == before


@pytest.mark.parametrize("mask_set", ["SegmentationClass", "", "..", "../x", "a/b", "a\\b"])
def test_the_first_set_and_other_folders_are_safe(label_again, synthetic, mask_set):
    before = contents(synthetic)
    with pytest.raises(ValueError, match="mask_set=.*expected the name of a (new set|folder)"):
        label_again(mask_set=mask_set)
    assert contents(synthetic) == before


@pytest.mark.parametrize("confidence", [-0.1, 1.1, "0.5", True, float("nan")])
def test_an_impossible_confidence_is_refused(label_again, confidence):
    with pytest.raises(ValueError, match="confidence=.*from 0 to 1, or null"):
        label_again(confidence=confidence)


def test_what_is_not_a_finished_synthetic_set_is_refused(label_again, synthetic):
    (synthetic / "records/0.jsonl").unlink()
    with pytest.raises(ValueError, match="5 of 5 images have no record; run generate.py again"):
        label_again()
    (synthetic / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="not a synthetic data set .no run.json."):
        label_again()


# The whole chain on the embedded world


def test_teacher_student_and_mixed_training(tmp_path, run):
    from dd.stages.prepare_shapes import prepare_shapes

    where = [f"data_root={tmp_path}/data", f"output_root={tmp_path}/out"]
    small = [
        "batch_size=2",
        "scale=64",
        "transform.crop_size=32",
        "segmenter.base_channels=8",
        "trainer.precision=32-true",
        "trainer.enable_progress_bar=false",
        "trainer.max_steps=1",
    ]
    small += ["trainer.accelerator=cpu", *where]
    prepare_shapes(tmp_path / "data", sizes={"train": 6, "tune": 2, "test": 2})
    run("generate", "experiment=shapes", "num_images=2", "unit_size=2", "diffusion.steps=1", *where)
    run("train", "experiment=shapes_synthetic", "name=teacher", *small)
    teach = ["stage=label", f"folder={tmp_path}/data/synthetic/shapes", *where]
    run("generate", f"labeler.run={tmp_path}/out/teacher", *teach, "labeler.confidence=0.1")
    student = ["experiment=shapes_synthetic", "synthetic_masks=masks/self_training"]
    run("train", *student, "name=student", *small)
    mixed = ["experiment=shapes_synthetic", "source=mixed", "real_share=0.5", "shots=4"]
    validated = ["hold_out=2", "trainer.limit_val_batches=1.0", "trainer.val_check_interval=1"]
    run("train", *mixed, *validated, "name=mixed", *small)
    augmented = ["scales=[0.5,1.0]", "flip=true", *where]
    run("evaluate", f"run={tmp_path}/out/*", *augmented)
    run("evaluate", f"run={tmp_path}/out/*", *where)

    runs = {
        name: json.loads((tmp_path / f"out/{name}/run.json").read_text())
        for name in ("teacher", "student", "mixed")
    }
    labelled_by = runs["student"]["trained_on"]["mask_settings"]["teacher"]
    assert labelled_by["weights_sha256"] == runs["teacher"]["weights_sha256"]
    assert labelled_by["trained_on"] == runs["teacher"]["trained_on"]
    assert [runs[name]["supervision"] for name in ("teacher", "student", "mixed")] == [
        "B",
        "B",
        "B",
    ]
    assert {c["what"] for c in runs["student"]["chosen_on"]} == {"recipe", "learning_rate"}
    masks = read_json(tmp_path / "data/synthetic/shapes/masks/self_training/masks.json")
    assert masks["chosen_on"] == runs["teacher"]["chosen_on"] and "chosen_on" not in json.dumps(
        masks["identity"]
    )
    assert "chosen_on" not in json.dumps(runs["student"]["identity"])  # it decides no weight
    trained_on = runs["mixed"]["trained_on"]
    assert (trained_on["real_share"], trained_on["shots"], trained_on["hold_out"]) == (0.5, 4, 2)
    assert trained_on["real"]["images"] == 2 and trained_on["synthetic"]["images"] == 2
    assert (
        len(runs["mixed"]["validated_on"]["ids"]) == 2 and runs["teacher"]["validated_on"] is None
    )
    assert "tune/miou" in (tmp_path / "out/mixed/metrics.csv").read_text()
    for name in runs:
        for folder, flip in (("eval/shapes", False), ("eval/shapes/scales_0.5-1_flip", True)):
            assert (
                read_json(tmp_path / "out" / name / folder / "metrics.json")["protocol"]["flip"]
                is flip
            )
    again = [
        "experiment=shapes",
        "num_images=2",
        "unit_size=2",
        "diffusion.steps=1",
        "stage=label",
        *where,
    ]
    with pytest.raises(FileExistsError, match="masks of self-training"):
        run("generate", *again, "mask_set=self_training")
    with pytest.raises(ValueError, match="a mask set has one teacher, got 3 runs"):
        run("generate", f"labeler.run={tmp_path}/out/*", *teach)
    run("generate", f"labeler.run={tmp_path}/out/mixed", *teach, "mask_set=from_mixed")
    run("train", *student[:1], "synthetic_masks=masks/from_mixed", "name=student_of_mixed", *small)
    assert read_json(tmp_path / "out/student_of_mixed/run.json")["supervision"] == "B"
