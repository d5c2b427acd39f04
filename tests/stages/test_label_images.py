"""Labelers make mask sets that lie side by side: by the command, resumed, refused, joined."""

import json
import shutil

import numpy as np
import pytest

from dd.data.datasets import (
    SegmentationFolder,
    encode_mask,
    read_image,
    read_mask,
    synthetic_image,
)
from dd.evaluation.supervision import class_of_masks
from dd.exports.card import used_labels
from dd.labelers.base import Labelled, Ready
from dd.labelers.folder import MaskFolder
from dd.labelers.joined import Joined
from dd.stages.label_images import label_images
from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.verify import verify
from dd.store.provenance import read_json, sha256, write_json
from dd.store.samples import append_records, read_plan
from tests.doors import exit_status
from tests.labelers import tiny
from tests.labelers.conftest import CLASSES, PETS, SIZES, write_set

LABELS = {"what": "masks", "data": "pets/tune", "labels": 4}
IDS = [f"{i:06d}" for i in range(5)]


@pytest.fixture
def synthetic(tmp_path):
    return write_set(tmp_path / "synthetic/pets")


class Bright:
    """Class 1 where an image is bright; ends after some batches."""

    name, batch_size, reads = "bright", 2, None

    def __init__(self, calls=99, above=128, supervision="D"):
        self.calls, self.above, self.supervision = calls, above, supervision

    def ready(self, images):
        def label(batch):
            self.calls -= 1
            if self.calls < 0:
                raise RuntimeError("the lights went out")
            masks = [(a.image.mean(2) > self.above).astype(np.uint8) for a in batch]
            return [Labelled(m, {"ties": int(m[0, 0])}) for m in masks]

        return Ready(label, self.supervision, {"weights_sha256": "0" * 64}, {"above": self.above})


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def own_masks(root, values, size=None):
    """A folder of masks, each of one value."""
    root.mkdir(parents=True)
    for name, value, own in zip(IDS, values, SIZES, strict=True):
        (root / f"{name}.png").write_bytes(encode_mask(np.full(size or own, value, np.uint8)))
    return root


# A mask set


def test_a_set_says_who_made_it(synthetic, capsys):
    before = contents(synthetic)
    target = label_images(synthetic, Bright(), "bright", chosen_on=[LABELS])
    made = read_json(target / "masks.json")
    assert made["identity"]["labeler"] == {
        "name": "bright",
        "supervision": "D",
        "weights_sha256": "0" * 64,
    }
    assert made["identity"]["settings"] == {"above": 128}
    assert made["chosen_on"] == [LABELS]
    masks = [read_mask(target / f"{i}.png") for i in IDS]
    for name, mask in zip(IDS, masks, strict=True):
        image = read_image(synthetic_image(synthetic, name))
        assert np.array_equal(mask, image.mean(2) > 128)
    assert made["sha256"] == {i: sha256(target / f"{i}.png") for i in IDS}
    pixels = np.bincount(np.concatenate([m.ravel() for m in masks]))
    assert made["pixels"] == {"0": pixels[0], "1": pixels[1]}
    assert made["counts"] == {"ties": sum(int(m[0, 0]) for m in masks)}
    said = capsys.readouterr().out
    assert "4 classes of 4 samples have no pixel" in said and "000000: dog" in said
    after = contents(synthetic)
    assert {k: v for k, v in after.items() if not k.startswith("masks/bright/")} == before
    SegmentationFolder(synthetic, "train", PETS, "masks/bright")[4]  # what a training reads
    assert class_of_masks(made) == "D"


def test_a_finished_set_is_left_alone(synthetic, capsys):
    target = label_images(synthetic, Bright(), "bright")
    before = contents(target)
    assert label_images(synthetic, Bright(calls=0), "bright") == target
    assert contents(target) == before


def test_a_mask_that_was_removed_is_made_again(synthetic):
    target = label_images(synthetic, Bright(), "bright")
    before = contents(target)
    (target / f"{IDS[1]}.png").unlink()
    label_images(synthetic, Bright(), "bright")
    found = contents(target)
    assert {k: v for k, v in found.items() if "records" not in k} == {
        k: v for k, v in before.items() if "records" not in k
    }


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_killed_set_goes_on_with_what_is_finished(synthetic, calls):
    whole = contents(label_images(synthetic, Bright(), "whole"))
    with pytest.raises(RuntimeError, match="lights went out"):
        label_images(synthetic, Bright(calls), "bright")
    target = synthetic / "masks/bright"
    kept = {p: p.stat().st_mtime_ns for p in target.glob("*.png")}
    assert len(kept) == 2 * calls and not (target / "masks.json").exists()
    if calls == 2:  # one of them was damaged: its batch is made again
        (target / f"{IDS[0]}.png").write_bytes(b"half")
        kept = {p: t for p, t in kept.items() if p.stem in IDS[2:4]}
    again = Bright()
    label_images(synthetic, again, "bright")
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert 99 - again.calls == {0: 3, 1: 2, 2: 2}[calls]
    found = contents(target)
    assert {k: v for k, v in found.items() if "records" not in k} == {
        k: v for k, v in whole.items() if "records" not in k
    }


@pytest.mark.parametrize("finished", [True, False])
def test_another_labeler_is_another_set(synthetic, finished):
    if finished:
        label_images(synthetic, Bright(), "bright")
    else:
        with pytest.raises(RuntimeError):
            label_images(synthetic, Bright(1), "bright")
    before = contents(synthetic)
    others = {
        "settings.above: 128 -> 9": Bright(above=9),
        "supervision: D -> A": Bright(supervision="A"),
    }
    for named, other in others.items():
        with pytest.raises(FileExistsError, match=f"(?s){named}.*mask_set="):
            label_images(synthetic, other, "bright")
    assert contents(synthetic) == before


def test_other_images_are_another_set(synthetic):
    label_images(synthetic, Bright(), "bright")
    append_records(synthetic, "0", [{"id": IDS[3], "unit": 1, "image_sha256": "9" * 64}])
    with pytest.raises(FileExistsError, match="images: "):
        label_images(synthetic, Bright(), "bright")


@pytest.mark.parametrize("mask_set", ["SegmentationClass", "", "..", "a/b"])
def test_other_folders_are_safe(synthetic, mask_set):
    before = contents(synthetic)
    with pytest.raises(ValueError, match="mask_set=.*expected the name of a"):
        label_images(synthetic, Bright(), mask_set)
    assert contents(synthetic) == before


# Masks of any origin


def test_given_masks_are_of_the_class_that_is_stated(synthetic, tmp_path):
    given = own_masks(tmp_path / "drawn", [1, 2, 3, 0, 255])
    labeler = MaskFolder(folder=str(given), supervision="C")
    target = label_images(synthetic, labeler, "drawn")
    assert [read_mask(target / f"{i}.png")[0, 0] for i in IDS] == [1, 2, 3, 0, 255]
    made = read_json(target / "masks.json")
    assert made["identity"]["labeler"]["supervision"] == "C" == class_of_masks(made)
    (given / f"{IDS[0]}.png").write_bytes(encode_mask(np.full(SIZES[0], 2, np.uint8)))
    with pytest.raises(FileExistsError, match="labeler.content"):
        label_images(synthetic, MaskFolder(folder=str(given), supervision="C"), "drawn")


def test_masks_that_do_not_belong_are_refused(synthetic, tmp_path):
    def made(name, *given):
        folder = own_masks(tmp_path / name, *given)
        return MaskFolder(folder=str(folder), supervision="D"), folder

    labeler, folder = made("classes", [1, 2, 4, 9, 1])
    with pytest.raises(ValueError, match=r"holds values \[4\] outside the 4 classes"):
        label_images(synthetic, labeler, "classes")
    labeler, folder = made("sizes", [1] * 5, (10, 10))
    with pytest.raises(ValueError, match="is 10x10, its image 48x40"):
        label_images(synthetic, labeler, "sizes")
    for name, size in zip(IDS, SIZES, strict=True):  # what was mended is taken
        (folder / f"{name}.png").write_bytes(encode_mask(np.full(size, 1, np.uint8)))
    assert (label_images(synthetic, labeler, "sizes") / "masks.json").is_file()
    labeler, folder = made("others", [1] * 5)
    (folder / f"{IDS[2]}.png").unlink()
    with pytest.raises(ValueError, match="masks of other images: 1 of 5 .*000002.png"):
        label_images(synthetic, labeler, "others")
    assert not (synthetic / "masks/others").exists()
    for given in ({"folder": str(folder)}, {"supervision": "A"}, {}):
        with pytest.raises(ValueError, match="needs labeler.folder=.* labeler.supervision: A"):
            MaskFolder(**given)
    with pytest.raises(ValueError, match="labeler.supervision='real': expected A, B, C, D"):
        MaskFolder(folder=str(folder), supervision="real")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        MaskFolder(folder=str(tmp_path / "none"), supervision="A")


# Sets that agree


def given_set(synthetic, tmp_path, name, values, supervision):
    folder = own_masks(tmp_path / name, values)
    label_images(synthetic, MaskFolder(folder=str(folder), supervision=supervision), name)


def test_joined_sets_keep_what_they_agree_on(synthetic, tmp_path):
    given_set(synthetic, tmp_path, "a", [1, 2, 3, 255, 0], "A")
    given_set(synthetic, tmp_path, "d", [1, 3, 3, 255, 255], "D")
    target = label_images(synthetic, Joined(sets=["masks/a", "masks/d"]), "joined")
    assert [read_mask(target / f"{i}.png")[0, 0] for i in IDS] == [1, 255, 3, 255, 255]
    made = read_json(target / "masks.json")
    labeler = made["identity"]["labeler"]
    assert labeler["supervision"] == "D" == class_of_masks(made)
    assert [one["set"] for one in labeler["sets"]] == ["masks/a", "masks/d"]
    for one in labeler["sets"]:
        assert one["identity"] == read_json(synthetic / one["set"] / "masks.json")["identity"]
    assert made["counts"] == {"disagreement": sum(h * w for h, w in (SIZES[1], SIZES[4]))}


@pytest.mark.parametrize(
    ("classes", "expected"), [("AA", "A"), ("AB", "B"), ("BC", "C"), ("CD", "C/D"), ("DA", "D")]
)
def test_the_strongest_class_is_that_of_the_joined_set(synthetic, tmp_path, classes, expected):
    for name, supervision in zip("xy", classes, strict=True):
        given_set(synthetic, tmp_path, name, [1] * 5, supervision)
    target = label_images(synthetic, Joined(sets=["masks/x", "masks/y"]), "joined")
    assert class_of_masks(read_json(target / "masks.json")) == expected


def test_labels_behind_a_joined_set_are_those_behind_its_parts(synthetic, tmp_path):
    default = read_json(synthetic / "SegmentationClass/masks.json")
    default.pop("sha256_of_the_rest", None)
    write_json(synthetic / "SegmentationClass/masks.json", {**default, "chosen_on": [LABELS]})
    given_set(synthetic, tmp_path, "a", [1] * 5, "A")
    target = label_images(synthetic, Joined(sets=["SegmentationClass", "masks/a"]), "joined")
    made = read_json(target / "masks.json")
    assert made["chosen_on"] == [LABELS] and class_of_masks(made) == "B"


def test_sets_that_cannot_be_joined(synthetic, tmp_path):
    given_set(synthetic, tmp_path, "a", [1] * 5, "A")
    for sets in (None, [], ["masks/a"], ["masks/a", "masks/a"]):
        with pytest.raises(ValueError, match="needs two mask sets or more"):
            Joined(sets=sets)
    joined = Joined(sets=["masks/a", "masks/b"])
    with pytest.raises(
        FileNotFoundError, match="no finished mask set masks/b .*there: Seg.*masks/a"
    ):
        label_images(synthetic, joined, "joined")
    other = write_set(tmp_path / "synthetic/other")
    shutil.copytree(synthetic / "masks/a", synthetic / "masks/b")
    made = read_json(synthetic / "masks/b/masks.json")
    made.pop("sha256_of_the_rest", None)
    hashes = dict(list(made["sha256"].items())[:3])
    write_json(synthetic / "masks/b/masks.json", {**made, "sha256": hashes})
    with pytest.raises(ValueError, match="masks/b is of other images: it holds 3 masks, .* 5 im"):
        label_images(synthetic, joined, "joined")
    made["identity"]["images"] = "7" * 64
    write_json(synthetic / "masks/b/masks.json", made)
    with pytest.raises(ValueError, match="masks/b was made of other images than those"):
        label_images(synthetic, joined, "joined")
    assert not (synthetic / "masks/joined").exists() and other.is_dir()


# The command, on the embedded world


@pytest.fixture(scope="module")
def world(tmp_path_factory, run):
    """Images with heat, checkpoints, and where they lie."""
    root = tmp_path_factory.mktemp("world")
    where = [f"data_root={root}/data", f"output_root={root}/out", "device=cpu"]
    prepare_shapes(root / "data", sizes={"train": 4, "tune": 2, "test": 2})
    few = ["experiment=shapes", "num_images=3", "unit_size=3", "diffusion.steps=1"]
    run("generate", *few, *where)
    tiny.save_sam2(root / "sam2")
    tiny.save_sam3(root / "sam3", ["a photo of an apple, a brick, a heart and a gold ring"])
    return root, where


def command(world, *arguments):
    return exit_status("generate", "experiment=shapes", "stage=label", *arguments, *world[1])


def test_labelers_by_the_command(world, run, capsys):
    root, where = world
    folder = root / "data/synthetic/shapes"
    assert command(world, "labeler=sam2_refine", f"labeler.model={root}/sam2") == 0
    assert "masks in" in capsys.readouterr().out
    sam3 = ["labeler=sam3", f"labeler.model={root}/sam3", "labeler.score=0.01"]
    assert command(world, *sam3, "mask_set=by_name") == 0
    sets = "labeler.sets=[masks/sam2_refine,masks/by_name]"
    assert command(world, "labeler=joined", sets) == 0
    drawn = ["labeler=folder", f"labeler.folder={folder}/SegmentationClass"]
    behind = "labeler.chosen_on={data: shapes, split: tune, labels: 2}"
    assert command(world, *drawn, "labeler.supervision=B", behind) == 0
    assert command(world, "labeler=attention", "masks=paper", "mask_set=paper") == 0
    made = {p.parent.name: read_json(p) for p in folder.glob("masks/*/masks.json")}
    assert made.keys() == {"sam2_refine", "by_name", "joined", "folder", "paper"}
    classes = {name: class_of_masks(masks) for name, masks in made.items()}
    assert classes == {n: {"folder": "B", "paper": "A"}.get(n, "D") for n in made}
    assert {"what": "masks", "data": "shapes/tune", "labels": 2} in made["folder"]["chosen_on"]
    assert made["sam2_refine"]["made"]["model"] == f"{root}/sam2"
    assert made["sam2_refine"]["identity"]["settings"]["power"] == 4
    masks = {n: [read_mask(p) for p in sorted((folder / f"masks/{n}").glob("*.png"))] for n in made}
    for a, b, joined in zip(masks["sam2_refine"], masks["by_name"], masks["joined"], strict=True):
        assert np.array_equal(joined, np.where(a == b, a, 255))
    assert not verify(folder)


def test_all_stages_in_one_command(world):
    root, where = world
    few = ["experiment=shapes", "name=one", "num_images=1", "unit_size=1", "diffusion.steps=1"]
    sam3 = ["labeler=sam3", f"labeler.model={root}/sam3"]
    assert exit_status("generate", *few, *sam3, *where) == 0
    folder = root / "data/synthetic/one"
    assert (folder / "masks/sam3/masks.json").is_file()
    assert not (folder / "SegmentationClass").exists()
    gone = ["labeler=sam3", f"labeler.model={root}/none"]
    assert exit_status("generate", *few, *gone, "name=two", *where) != 0
    given = ["labeler=folder", f"labeler.folder={root}", "labeler.supervision=A"]
    assert exit_status("generate", *few, *given, "name=two", *where) != 0
    assert not (root / "data/synthetic/two").exists()  # refused before hours of work


def test_an_export_says_whose_masks_it_holds(world):
    from dd.execution.units import read_run
    from dd.exports.checked import _about

    root, _ = world
    folder = root / "data/synthetic/shapes"
    command(world, "labeler=sam3", f"labeler.model={root}/sam3", "mask_set=f")
    about = _about(folder, "masks/f", read_run(folder))
    assert about["supervision"] == "D" and "made by the labeler sam3" in about["labeler"]
    assert "supervision class D" in used_labels([], "D") and "No real label" in used_labels([])
    assert "which ones is not recorded" in used_labels([], "B")


SMALL = [
    "batch_size=2",
    "scale=64",
    "transform.crop_size=32",
    "segmenter.base_channels=8",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    "trainer.max_steps=1",
    "trainer.accelerator=cpu",
]


def test_the_class_goes_with_a_training_and_a_teacher(world, run):
    root, where = world
    command(world, "labeler=sam3", f"labeler.model={root}/sam3", "mask_set=d")
    train = ["experiment=shapes_synthetic", *SMALL, *where]
    run("train", *train, "synthetic_masks=masks/d", "name=student")
    student = read_json(root / "out/student/run.json")
    assert student["supervision"] == "D"
    labeler = student["trained_on"]["mask_settings"]["labeler"]
    assert (labeler["name"], labeler["supervision"]) == ("sam3", "D")
    # by both spellings of a trained run
    taught = f"labeler.run={root}/out/student"
    assert command(world, taught) == 0
    assert command(world, "labeler=run", taught, "mask_set=again") == 0
    folder = root / "data/synthetic/shapes/masks"
    made = [read_json(folder / name / "masks.json") for name in ("self_training", "again")]
    assert made[0] == made[1] and class_of_masks(made[0]) == "D"
    run("train", *train, "synthetic_masks=masks/again", "name=grandchild")
    assert read_json(root / "out/grandchild/run.json")["supervision"] == "D"
    json.dumps(made)


def test_two_sets_are_compared_by_the_command(world, run, capsys):
    root, where = world
    folder = root / "data/synthetic/shapes"
    command(world, "labeler=sam3", f"labeler.model={root}/sam3", "mask_set=e", "labeler.score=0.01")
    compare = ["experiment=shapes", "stage=agree", *where]
    assert exit_status("evaluate", *compare, "agree.b=masks/e") == 0
    found = read_json(folder / "agreement/SegmentationClass,masks_e.json")
    a, b = (
        np.concatenate([read_mask(folder / s / f"{x.id}.png").ravel() for x in read_plan(folder)])
        for s in ("SegmentationClass", "masks/e")
    )
    sure = (a != 255) & (b != 255)
    for i, value in enumerate(found["agreement"]["iou"]):
        union = ((a == i) | (b == i)) & sure
        hit = 100 * ((a == i) & (b == i)).sum() / union.sum() if union.any() else None
        assert value == pytest.approx(hit)
    expected = [100 * (a == 255).mean(), 100 * (b == 255).mean()]
    assert found["agreement"]["uncertain"] == pytest.approx(expected)
    assert [one["supervision"] for one in found["sets"]] == ["A", "D"]
    page = (folder / "agreement/SegmentationClass,masks_e.html").read_text()
    assert page.count("data:image/") >= 4 and "http" not in page.replace("http-equiv", "")
    assert "mean" in capsys.readouterr().out
    for given, said in (
        (["agree.b=null"], "agree.b"),
        (["agree.b=masks/none"], "no finished mask set masks/none"),
        (["agree.b=SegmentationClass"], "give two mask sets"),
        (["agree.b=../x"], "agree.b='../x'"),
    ):
        assert exit_status("evaluate", *compare, *given) != 0
        assert said in capsys.readouterr().err


def test_bad_input_is_one_line(world, capsys):
    root, _ = world
    for given, said in (
        (["labeler=sam3"], "labeler.model is not set"),
        (["labeler=sam4"], "no such labeler; allowed: attention, folder, joined, run, sam2_refine"),
        (["labeler=sam3", "labeler.scores=0.5"], "Did you mean 'score'"),
        (["labeler=sam2_refine", "labeler.peak=2"], "labeler.peak=2: expected a number from 0"),
        (["labeler=sam3", f"labeler.model={root}/sam3", "heat=near"], "heat=near has no effect"),
        (["labeler=run"], "labeler=run needs labeler.run="),
        (["labeler=joined"], "needs two mask sets"),
        (["labeler=sam3", f"labeler.model={root}/sam2"], 'a model of type "sam2"'),
        (["labeler=sam2_refine", f"labeler.model={root}/sam2", "heat=near"], "no such reading"),
    ):
        assert command(world, *given) != 0
        first = capsys.readouterr().err.splitlines()[0]
        assert said in first, first


def test_samples_have_the_classes_of_the_fixture(synthetic):
    assert [s.classes for s in read_plan(synthetic)] == CLASSES
