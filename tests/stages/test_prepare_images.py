"""Images of any origin with captions -> a synthetic set without heat."""

import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from dd.__main__ import main
from dd.data.datasets import ORIENTATION, read_image, read_split
from dd.masks.from_heat import MaskSettings
from dd.stages import prepare_images as stage
from dd.stages.export import export
from dd.stages.label import label
from dd.stages.prepare_images import GivenImages, prepare_images
from dd.stages.report_dataset import report_dataset
from dd.stages.verify import verify
from dd.store.provenance import read_json, sha256
from dd.store.samples import read_plan, read_records
from tests.stages.test_read_heat import FakeReader, read
from tests.stages.test_synthesize_label import contents, make

MASKS = MaskSettings(power=1, threshold=0.4, band=0.1)
CAPTIONS = {
    "a.png": "an apple on a table",
    "b.png": "two tires and a leaf",
    "c.png": "a brick",
    "d.png": "the blue sky",
}


def draw(path, size=(16, 16), seed=0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return pixels


def tell(path, rows):
    rows = [{"filename": k, "caption": v} for k, v in rows.items()] if type(rows) is dict else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def images(tmp_path):
    for i, name in enumerate(CAPTIONS):
        draw(tmp_path / "images" / name, seed=i)
    tell(tmp_path / "captions.jsonl", CAPTIONS)
    return tmp_path / "images"


def prepare(images, name="given", **more):
    given = {"captions": images.parent / "captions.jsonl", **more}
    seed = given.pop("seed", 0)
    return prepare_images(
        images.parent / "data", "shapes", name, GivenImages(images, **given), seed
    )


def everything(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_images_with_captions_become_a_set(images):
    before = everything(images)
    folder, notes = prepare(images)
    assert folder == images.parent / "data/synthetic/given"
    assert notes == ["1 captions are left out: names no class"]
    plan, records = read_plan(folder), read_records(folder)
    assert [(s.prompt, s.classes, s.unit) for s in plan] == [
        (CAPTIONS["a.png"], ("apple",), 0),
        (CAPTIONS["b.png"], ("tire", "leaf"), 1),
        (CAPTIONS["c.png"], ("brick",), 2),
    ]
    assert read_split(folder, "train") == [s.id for s in plan] == sorted(records)
    for sample, name in zip(plan, CAPTIONS, strict=False):
        path = folder / f"JPEGImages/{sample.id}.png"
        assert np.array_equal(read_image(path), read_image(images / name))
        assert records[sample.id]["image_sha256"] == sha256(path)
        assert records[sample.id]["file"] == str(images / name)
    (dropped,) = map(json.loads, (folder / "dropped_captions.jsonl").read_text().splitlines())
    assert dropped == {"reason": "names no class", "filename": "d", "caption": "the blue sky"}
    run = read_json(folder / "run.json")
    assert run["identity"]["taxonomy"]["name"] == "shapes" and "command" in run
    assert everything(images) == before and verify(folder) == []


def test_a_given_set_is_read_labelled_shown_and_exported(images):
    folder, _ = prepare(images)
    with pytest.raises(ValueError, match="no heat from drawing them.*stage=read.*heat=<reader>"):
        label(folder, MASKS)
    read(folder)
    target = label(folder, MASKS, reading="one")
    assert len(list(target.glob("*.png"))) == 3 and verify(folder) == []
    card = (folder / "README.md").read_text()
    assert "3 images that were given" in card and "None" not in card
    assert str(images) in report_dataset(folder).read_text()
    export("huggingface", folder, images.parent / "hub")
    card = (images.parent / "hub/README.md").read_text()
    assert "the images were given" in card and "None" not in card


def test_damage_of_a_given_set_is_healed(images):
    folder, _ = prepare(images)
    read(folder)
    before = contents(folder)
    (folder / "JPEGImages/000001.png").write_bytes(b"x")
    verify(folder, repair=True)
    prepare(images)
    assert read(folder)["read_now"] == 1
    assert contents(folder) == before and verify(folder) == []


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_an_interrupted_preparation_goes_on(images, monkeypatch, stop):
    whole, _ = prepare(images, "whole")
    append, seen = stage.append_records, []

    def crash(folder, worker, rows):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(rows)
        append(folder, worker, rows)

    monkeypatch.setattr(stage, "append_records", crash)
    with pytest.raises(KeyboardInterrupt):
        prepare(images)
    monkeypatch.undo()
    folder = images.parent / "data/synthetic/given"
    assert len(read_records(folder)) == stop and not (folder / "ImageSets").exists()
    prepare(images)
    assert contents(folder) == contents(whole)
    before = everything(folder)
    prepare(images)
    assert everything(folder) == before


def test_classes_that_are_given_are_taken(images):
    rows = [
        {"filename": "a.png", "caption": "round", "classes": ["tire"]},
        {"id": "b", "caption": "long; leaf pine tree", "class_prompt": "leaf pine tree"},
    ]
    tell(images.parent / "captions.jsonl", rows)
    folder, _ = prepare(images)
    assert [s.classes for s in read_plan(folder)] == [("tire",), ("leaf", "pine tree")]


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("one/a.png", "one/a.png"),
        ("two\\a.png", "two/a.png"),
        ("/home/me/b.png", "b.png"),
        ("../../b.png", "b.png"),
        ("b", "b.png"),
        ("photo.v2", "photo.v2.png"),
        ("photo.v2.png", "photo.v2.png"),
        ("photo.png", "photo.png"),
        (unicodedata.normalize("NFD", "é.png"), "é.png"),
    ],
)
def test_images_are_found_by_their_path_or_their_stem(tmp_path, written, found):
    for i, name in enumerate(("one/a", "two/a", "b", "photo", "photo.v2", "é")):
        draw(tmp_path / f"images/{name}.png", seed=i)
    tell(tmp_path / "captions.jsonl", {written: "an apple"})
    folder, _ = prepare(tmp_path / "images")
    shown = read_image(folder / "JPEGImages/000000.png")
    assert np.array_equal(shown, read_image(tmp_path / "images" / found))


def test_a_photograph_is_stored_upright(images):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    pixels = draw(images / "a.png", seed=0, exif=exif)
    folder, _ = prepare(images)
    shown = read_image(folder / "JPEGImages/000000.png")
    assert np.array_equal(shown, np.rot90(pixels, -1))


@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_images_of_any_shape_become_squares(images, fit):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    Image.fromarray(pixels).save(images / "a.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(images / "b.png")
    folder, _ = prepare(images, fit=fit, size=16)
    for name in ("000000", "000001"):
        shown = read_image(folder / f"JPEGImages/{name}.png")
        assert shown.shape == (16, 16, 3)
        assert (shown.min() == 255) == (fit == "crop")
    assert read_json(folder / "run.json")["identity"]["generator"]["fit"] == fit


def rows(*pairs):
    return [{"filename": name, "caption": caption} for name, caption in pairs]


BAD = {
    "no such folder": (lambda i: i.rename(i.with_name("gone")), {}, "no folder"),
    "no captions": (lambda i: (i.parent / "captions.jsonl").unlink(), {}, "captions.jsonl"),
    "no image": (
        lambda i: tell(i.parent / "captions.jsonl", rows(("z.png", "an apple"))),
        {},
        "entry 0: z.png: no such image in the folder",
    ),
    "no filename": (
        lambda i: tell(i.parent / "captions.jsonl", [{"caption": "an apple"}]),
        {},
        "need 'filename'",
    ),
    "no name": (
        lambda i: tell(i.parent / "captions.jsonl", rows(("..", "an apple"))),
        {},
        "entry 0: ..: no such image",
    ),
    "a number": (
        lambda i: tell(i.parent / "captions.jsonl", [{"id": 3, "caption": "an apple"}]),
        {},
        "need 'filename'",
    ),
    "no JSON": (lambda i: (i.parent / "captions.jsonl").write_text("{"), {}, "neither a JSON"),
    "two captions": (
        lambda i: tell(
            i.parent / "captions.jsonl", rows(("a.png", "an apple"), ("a.png", "a leaf"))
        ),
        {},
        "several captions of 1 images, such as a",
    ),
    "two images": (
        lambda i: (
            [draw(i / f"{n}/e.png") for n in ("x", "y")],
            tell(i.parent / "captions.jsonl", rows(("e.png", "an apple"))),
        ),
        {},
        "several images have that stem",
    ),
    "one stem": (lambda i: draw(i / "a.bmp"), {}, "same stem"),
    "two sizes": (lambda i: draw(i / "a.png", (8, 8)), {}, "not square or not of one size"),
    "not square": (lambda i: [draw(i / n, (8, 16)) for n in CAPTIONS], {}, "16x8"),
    "fit alone": (None, {"fit": "crop"}, "give both"),
    "size alone": (None, {"size": 16}, "give both"),
    "a tiny size": (None, {"fit": "crop", "size": 2}, "--size 2"),
    "no class": (
        lambda i: tell(i.parent / "captions.jsonl", rows(("a.png", "the sky"))),
        {},
        "none of 1 captions is left",
    ),
    "another class": (
        lambda i: tell(
            i.parent / "captions.jsonl",
            [{"filename": "a.png", "caption": "x", "classes": ["dragon"]}],
        ),
        {},
        "entry 0: .*dragon",
    ),
    "no image data": (lambda i: (i / "b.png").write_bytes(b"text"), {}, "b.png is damaged"),
    "damaged": (
        lambda i: (i / "b.png").write_bytes((i / "b.png").read_bytes()[:300]),
        {},
        "1 of 3 images cannot be read.*\n.*b.png is damaged",
    ),
    "outside": (None, {"name": "../out"}, "name='../out'"),
    "hidden": (None, {"name": ".x"}, "name='.x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_written(images, case):
    spoil, how, said = BAD[case]
    if spoil:
        spoil(images)
    before = everything(images.parent)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        prepare(images, **how)
    assert len(str(error.value)) < 1500
    assert everything(images.parent) == before and not (images.parent / "data").exists()


@pytest.mark.parametrize("case", ["damaged", "two sizes", "outside", "no captions"])
def test_the_command_says_so_without_a_traceback(images, capsys, case):
    spoil, how, _ = BAD[case]
    if spoil:
        spoil(images)
    command = ["prepare", "images", str(images), "--root", str(images.parent / "data")]
    command += ["--captions", str(images.parent / "captions.jsonl"), "--taxonomy", "shapes"]
    assert main([*command, "--name", how.get("name", "given")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_command_prepares(images, capsys):
    command = ["prepare", "images", str(images), "--root", str(images.parent / "data")]
    command += ["--captions", str(images.parent / "captions.jsonl"), "--taxonomy", "shapes"]
    assert main([*command, "--name", "x", "--fit", "squash", "--size", "8"]) == 0
    told = capsys.readouterr()
    assert "ready: " in told.out and "warning: 1 captions are left out" in told.err


def test_a_damaged_image_that_was_mended_is_no_other_set(images):
    whole = (images / "b.png").read_bytes()
    (images / "b.png").write_bytes(whole[:300])
    with pytest.raises(ValueError, match="cannot be read"):
        prepare(images)
    (images / "b.png").write_bytes(whole)
    assert len(read_records(prepare(images)[0])) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda i: tell(i.parent / "captions.jsonl", rows(("a.png", "an apple"))), "num_images"),
        (lambda i: draw(i / "a.png", seed=9), "generator.given"),
        (None, "seed: 0 -> 1"),
    ],
)
def test_another_set_under_the_same_name_is_refused(images, change, named):
    folder, _ = prepare(images)
    if change:
        change(images)
    before = everything(folder)
    with pytest.raises(FileExistsError, match=f"(?s){named}.*--name=") as error:
        prepare(images, **({} if change else {"seed": 1}))
    assert "Nothing was changed" in str(error.value) and everything(folder) == before


def test_a_drawn_set_and_a_given_one_keep_out_of_each_other(images):
    folder = images.parent / "data/synthetic/drawn"
    make(folder)
    before = everything(folder)
    with pytest.raises(FileExistsError, match="generator"):
        prepare(images, "drawn")
    assert everything(folder) == before
    folder, _ = prepare(images)
    before = everything(folder)
    with pytest.raises(FileExistsError, match="generator"):
        make(folder)
    assert everything(folder) == before


def test_a_file_in_the_place_of_the_set(images):
    (images.parent / "data/synthetic").mkdir(parents=True)
    (images.parent / "data/synthetic/given").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        prepare(images)


def test_an_image_of_another_size_is_read_all_the_same(images):
    folder, _ = prepare(images, fit="crop", size=24)
    read(folder, FakeReader(size=16))
    target = label(folder, MASKS, reading="one")
    with Image.open(target / "000000.png") as mask:
        assert mask.size == (24, 24)
