"""Unlabelled images -> a caption file that prompts are made from."""

import json

import numpy as np
import pytest
from PIL import Image

from dd.prompts.captioner import Captioner
from dd.prompts.captions import NounCaptions
from dd.stages.caption import caption
from dd.store.provenance import read_json
from dd.taxonomy import taxonomy


class FakeCaptioner:
    """Says how bright an image is; stops like a killed process after ``crash_after`` batches."""

    def __init__(self, crash_after=None, name="fake"):
        self.crash_after, self.name, self.batches = crash_after, name, []

    def identity(self):
        return {"model": self.name}

    def __call__(self, images):
        if len(self.batches) == self.crash_after:
            raise KeyboardInterrupt
        self.batches.append(len(images))
        return [f"a dog of brightness {int(i[0, 0, 0])}" for i in images]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for i in range(7):
        name = f"deep/{i}.JPG" if i == 4 else f"{i}.png"
        Image.fromarray(np.full((5 + i, 6, 3), i, np.uint8)).save(folder / name, "PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def test_every_image_has_its_caption(tmp_path, images):
    captioner = FakeCaptioner()
    done = caption(tmp_path / "out", captioner, images, 3)
    assert done == {"captions": 7, "made_now": 7, "unreadable": []} and captioner.batches == [
        3,
        3,
        1,
    ]
    names = [f"{i}.png" for i in (0, 1, 2, 3, 5, 6)] + ["deep/4.JPG"]
    assert rows(tmp_path / "out") == [
        {"filename": name, "caption": f"a dog of brightness {name.split('/')[-1][0]}"}
        for name in names
    ]
    run = read_json(tmp_path / "out/run.json")
    assert run["identity"]["captioner"] == {"model": "fake"} and "versions" in run
    prompts = NounCaptions(str(tmp_path / "out/captions.jsonl"), at_least=1)(
        taxonomy("voc"), None, 0
    )
    assert {p.classes for p in prompts} == {("dog",)} and len(prompts) == 7


@pytest.mark.parametrize("crash_after", [0, 1, 2])
@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_file_goes_on(tmp_path, images, crash_after, torn):
    caption(tmp_path / "whole", FakeCaptioner(), images, 3)
    with pytest.raises(KeyboardInterrupt):
        caption(tmp_path / "out", FakeCaptioner(crash_after), images, 3)
    path, made = tmp_path / "out/captions.jsonl", 3 * crash_after
    if torn and made:
        path.write_bytes(path.read_bytes()[:-9])
        made -= 1
    captioner = FakeCaptioner()
    done = caption(tmp_path / "out", captioner, images, 3)
    assert done["made_now"] == sum(captioner.batches) == 7 - made
    assert path.read_bytes() == (tmp_path / "whole/captions.jsonl").read_bytes()
    again = FakeCaptioner()
    assert caption(tmp_path / "out", again, images, 3)["made_now"] == 0 and again.batches == []


def test_new_images_are_added_and_nothing_is_made_again(tmp_path, images):
    caption(tmp_path / "out", FakeCaptioner(), images, 3)
    Image.new("L", (4, 4)).save(images / "00.png")
    assert caption(tmp_path / "out", FakeCaptioner(), images, 3)["made_now"] == 1
    assert [r["filename"] for r in rows(tmp_path / "out")][:2] == ["0.png", "00.png"]


def test_unreadable_images_are_listed_and_passed_over(tmp_path, images):
    whole = (images / "2.png").read_bytes()
    (images / "2.png").write_bytes(b"no image")
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:-30])
    done = caption(tmp_path / "out", FakeCaptioner(), images, 2)
    assert done == {"captions": 5, "made_now": 5, "unreadable": ["2.png", "3.png"]}
    assert [r["filename"] for r in rows(tmp_path / "out")] == [
        "0.png",
        "1.png",
        "5.png",
        "6.png",
        "deep/4.JPG",
    ]
    listed = (tmp_path / "out/unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["2.png", "3.png"] and all(
        line.split("\t")[1] for line in listed
    )
    (images / "2.png").write_bytes(whole)
    (images / "3.png").unlink()
    assert caption(tmp_path / "out", FakeCaptioner(), images, 2) == {
        "captions": 6,
        "made_now": 1,
        "unreadable": [],
    }
    assert not (tmp_path / "out/unreadable.txt").exists()


def test_the_captioner_sees_photographs_upright(tmp_path):
    (tmp_path / "images").mkdir()
    turned, seen = Image.Exif(), []
    turned[0x0112] = 6
    Image.new("RGB", (8, 5)).save(tmp_path / "images/a.jpg", exif=turned)

    class Looking(FakeCaptioner):
        def __call__(self, images):
            seen.extend(images)
            return ["a dog"]

    caption(tmp_path / "out", Looking(), tmp_path / "images", 2)
    assert [image.shape for image in seen] == [(8, 5, 3)]


def test_only_unreadable_images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images in .* can be read, such as a.png: "):
        caption(tmp_path / "out", FakeCaptioner(), tmp_path / "images", 2)


def test_captions_of_another_captioner_are_left_alone(tmp_path, images):
    caption(tmp_path / "out", FakeCaptioner(), images, 3)
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(FileExistsError, match="captioner.model: fake -> other"):
        caption(tmp_path / "out", FakeCaptioner(name="other"), images, 3)
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_what_cannot_be_captioned(tmp_path, images):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, error, message in (
        (None, ValueError, "give caption.images=<folder>"),
        (tmp_path / "nowhere", FileNotFoundError, "no such folder"),
        (empty, FileNotFoundError, "holds no images"),
    ):
        with pytest.raises(error, match=message):
            caption(tmp_path / "out", FakeCaptioner(), folder, 3)
    with pytest.raises(ValueError, match="which is never written to"):
        caption(images / "captions", FakeCaptioner(), images, 3)
    assert not (tmp_path / "out").exists()


def test_from_images_to_captions_with_a_model(tmp_path, images, tiny_blip):
    captioner = Captioner(str(tiny_blip(tmp_path / "blip")), max_new_tokens=4, num_beams=1)
    assert caption(tmp_path / "out", captioner, images, 4)["captions"] == 7
    assert all(isinstance(r["caption"], str) for r in rows(tmp_path / "out"))
    assert read_json(tmp_path / "out/run.json")["identity"]["captioner"] == captioner.identity()


def test_from_images_to_a_synthetic_set_by_commands(tmp_path, tiny_blip, run):
    """The paper's chain: captions of unlabelled images, their nouns, a balanced plan; the images
    of val stay out."""
    blip, root = tiny_blip(tmp_path / "blip", seed=3), tmp_path / "VOCdevkit/VOC2012"
    (root / "JPEGImages").mkdir(parents=True)
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"JPEGImages/2007_{i:06}.jpg")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000000\n2007_000001\n")
    common = ("data=voc", f"data_root={tmp_path}", f"output_root={tmp_path}/outputs", "device=cpu")
    run(
        "generate",
        "stage=caption",
        f"captioner.model={blip}",
        "captioner.max_new_tokens=6",
        "captioner.num_beams=1",
        f"caption.images={root}/JPEGImages",
        *common,
    )
    captions = {r["filename"]: r["caption"] for r in rows(tmp_path / "captions/voc")}
    assert len(captions) == 40 and all(len(text.split()) > 2 for text in captions.values())
    run(
        "generate",
        "stage=synthesize",
        "prompts=paper_voc",
        "prompts.at_least=3",
        "num_images=2",
        "unit_size=2",
        "diffusion.steps=2",
        "diffusion.max_power=4",  # after two steps of drawing, the heat of power 8 is flat
        *common,
    )
    folder = tmp_path / "synthetic/voc"
    plan = [json.loads(line) for line in (folder / "plan.jsonl").read_text().splitlines()]
    assert len(plan) == 2 and {s["prompt"].rpartition("; ")[0] for s in plan} <= set(
        captions.values()
    )
    assert len(list((folder / "JPEGImages").iterdir())) == 2
    left_out = [
        json.loads(line) for line in (folder / "dropped_captions.jsonl").read_text().splitlines()
    ]
    assert {"2007_000000.jpg", "2007_000001.jpg"} == {
        d["filename"] for d in left_out if d["reason"] == "image is in exclude_split"
    }
