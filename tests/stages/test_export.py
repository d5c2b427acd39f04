import json
import os
from functools import partial

import numpy as np
import pytest

from benchmarks.synthesis import synthesize
from dd.__main__ import main
from dd.data.datasets import encode_mask
from dd.exports.target import Target
from dd.masks.from_heat import MaskSettings
from dd.stages.export import FORMATS, export
from dd.stages.label import label
from dd.store.locks import Lock
from dd.taxonomy import Taxonomy
from tests.faults import fake

PETS = Taxonomy("pets", ["cat", "dog", "cow"])


@pytest.fixture
def folder(tmp_path):
    synthesize(
        tmp_path / "set",
        fake.FakeGenerator(),
        fake.prompts,
        PETS,
        5,
        1,
        2,
        "png",
        build=partial(fake.build),
    )
    label(tmp_path / "set", MaskSettings(power=1, threshold=0.5, band=0.1))
    label(tmp_path / "set", MaskSettings(power=0, threshold=0.7, band=0.0), "sharp")
    return tmp_path / "set"


def contents(root):
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and p.name != "export.json"
    }


@pytest.mark.parametrize("form", FORMATS)
def test_the_command_writes_an_export_and_keeps_a_finished_one(folder, tmp_path, form, capsys):
    before, command = contents(folder), ["export", form, str(folder), str(tmp_path / "out")]
    assert main(command) == 0 and "ready" in capsys.readouterr().out
    done = json.loads((tmp_path / "out/export.json").read_text())
    files = contents(tmp_path / "out")
    assert {name: len(data) for name, data in files.items()} == done[
        "files"
    ]  # and nothing else lies there
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert main(command) == 0 and "kept" in capsys.readouterr().out
    assert {
        p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p != tmp_path / "out"
    } == {p: t for p, t in times.items() if p != tmp_path / "out"}
    assert contents(folder) == before


@pytest.mark.parametrize("form", FORMATS)
def test_an_interrupted_export_never_looks_finished_and_goes_on(
    folder, tmp_path, form, monkeypatch
):
    export(form, folder, tmp_path / "whole")
    calls, replace = [], os.replace

    def interrupted(old, new):
        calls.append(new)
        if len(calls) == interrupted.at and "out" in str(new):
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", interrupted)
    for interrupted.at in (2, 3):  # the first file is what says that an export was begun
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            export(form, folder, tmp_path / "out")
        assert not (tmp_path / "out/export.json").exists() and not list(
            (tmp_path / "out").rglob(".*.tmp")
        )
    monkeypatch.undo()
    (tmp_path / "out/.data.parquet.99999.tmp").write_bytes(b"of a killed writer")
    export(form, folder, tmp_path / "out")
    assert (tmp_path / "out/export.json").exists() and contents(tmp_path / "out") == contents(
        tmp_path / "whole"
    )


def test_what_a_finished_export_has_lost_is_made_again(folder, tmp_path):
    export("mmseg", folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out/images/train/000001.png").unlink()
    (tmp_path / "out/annotations/train/000002.png").write_bytes(b"")
    assert not export("mmseg", folder, tmp_path / "out")["kept"]
    assert (
        contents(tmp_path / "out") == before and export("mmseg", folder, tmp_path / "out")["kept"]
    )


def test_a_target_with_something_else_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    assert (
        main(["export", "coco", str(folder), str(out)]) == 2
        and "holds other files" in capsys.readouterr().err
    )
    assert [p.name for p in out.iterdir()] == ["diary.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        export("coco", folder, out / "diary.txt")
    export("coco", folder, tmp_path / "coco")
    before = contents(tmp_path / "coco")
    with pytest.raises(FileExistsError, match="format: coco -> mmseg"):
        export("mmseg", folder, tmp_path / "coco")
    with pytest.raises(FileExistsError, match="masks: SegmentationClass -> masks/sharp"):
        export("coco", folder, tmp_path / "coco", "masks/sharp")
    label(folder, MaskSettings(power=1, threshold=0.8, band=0.0))
    with pytest.raises(FileExistsError, match="content: "):
        export("coco", folder, tmp_path / "coco")
    assert contents(tmp_path / "coco") == before


@pytest.mark.parametrize("inside", [".", "JPEGImages/new", "new"])
def test_a_target_within_the_data_set_is_refused(folder, inside):
    before = contents(folder)
    with pytest.raises(FileExistsError, match="not written to"):
        export("coco", folder, folder / inside)
    assert contents(folder) == before and not (folder / "new").exists()


def test_two_exports_never_share_a_target(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with Lock(tmp_path / "out"):
        assert main(["export", "coco", str(folder), str(tmp_path / "out")]) == 5
    assert (
        "is being written" in capsys.readouterr().err and list((tmp_path / "out").iterdir()) == []
    )


def test_a_mask_set_and_lists_are_chosen(folder, tmp_path):
    (folder / "ImageSets/Segmentation/two.txt").write_text("000003\n000001\n")
    assert (
        main(
            [
                "export",
                "mmseg",
                str(folder),
                str(tmp_path / "a"),
                "--masks",
                "masks/sharp",
                "--split",
                "two",
            ]
        )
        == 0
    )
    files = contents(tmp_path / "a")
    assert sorted(files) == [
        "annotations/two/000001.png",
        "annotations/two/000003.png",
        "dataset.py",
        "images/two/000001.png",
        "images/two/000003.png",
    ]
    assert files["annotations/two/000001.png"] == (folder / "masks/sharp/000001.png").read_bytes()
    assert (
        files["annotations/two/000001.png"]
        != (folder / "SegmentationClass/000001.png").read_bytes()
    )
    export("mmseg", folder, tmp_path / "all")
    assert {p.name for p in (tmp_path / "all/images").iterdir()} == {"train", "two"}


@pytest.mark.parametrize("form", FORMATS)
def test_links_hold_the_same_as_copies(folder, tmp_path, form):
    export(form, folder, tmp_path / "copies")
    notes = export(form, folder, tmp_path / "links", link=True)["notes"]
    assert contents(tmp_path / "copies") == contents(tmp_path / "links")
    images = {p.stat().st_ino for p in (folder / "JPEGImages").iterdir()}
    linked = {p.stat().st_ino for p in (tmp_path / "links").rglob("*") if p.is_file()} & images
    copied = {p.stat().st_ino for p in (tmp_path / "copies").rglob("*") if p.is_file()} & images
    assert not copied and len(linked) == (0 if form in ("webdataset", "cvat") else 5)
    assert any("--link changes nothing" in note for note in notes) == (
        form in ("webdataset", "cvat", "huggingface")
    )


def test_links_between_file_systems_are_refused_with_the_way_out(
    folder, tmp_path, monkeypatch, capsys
):
    def other_system(old, new):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_system)
    assert main(["export", "mmseg", str(folder), str(tmp_path / "out"), "--link"]) == 2
    assert "--copy" in capsys.readouterr().err
    assert main(["export", "mmseg", str(folder), str(tmp_path / "out"), "--copy"]) == 0


def test_a_full_disk_has_its_own_exit_code(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Target, "place", full)
    assert main(["export", "coco", str(folder), str(tmp_path / "out")]) == 4
    assert not (tmp_path / "out/export.json").exists()


def set_unfinished(folder):
    (folder / "SegmentationClass/masks.json").unlink()


def list_unfinished(folder):
    (folder / "ImageSets/Segmentation/train.txt").unlink()


def mask_changed(folder):
    path = folder / "SegmentationClass/000001.png"
    path.write_bytes((folder / "SegmentationClass/000002.png").read_bytes())


def image_changed(folder):
    data = bytearray((folder / "JPEGImages/000001.png").read_bytes())
    data[60] ^= 1
    (folder / "JPEGImages/000001.png").write_bytes(data)


def mask_gone(folder):
    (folder / "SegmentationClass/000001.png").unlink()


def image_gone(folder):
    (folder / "JPEGImages/000001.png").unlink()


def twice(folder):
    (folder / "ImageSets/Segmentation/train.txt").write_text("000001\n000001\n")


def outside(folder):
    (folder / "ImageSets/Segmentation/train.txt").write_text("../../secret\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_unfinished, "no finished mask set SegmentationClass.*masks/sharp"),
        (list_unfinished, "not finished"),
        (mask_changed, "000001.png does not match masks.json beside it"),
        (image_changed, "000001.png does not match its record"),
        (mask_gone, "no mask"),
        (image_gone, "no image 000001"),
        (twice, "train.txt lists 2 samples, SegmentationClass/masks.json holds"),
        (outside, "would leave"),
    ],
)
def test_a_set_that_is_unfinished_or_damaged_is_refused(folder, tmp_path, damage, message):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        export("coco", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SegmentationClass/../..", None, None], "--masks=.*expected the name of a folder"),
        (["masks/none", None, None], "finished ones: SegmentationClass, masks/sharp"),
        (["SegmentationClass", ["none"], None], "no split 'none'.*splits there: train"),
        (["SegmentationClass", None, "shapes"], "made for the classes"),
        (["SegmentationClass", None, "nothing"], "unknown taxonomy"),
    ],
)
def test_bad_options_are_named(folder, tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        export("coco", folder, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_no_data_set_and_no_format(tmp_path, capsys):
    assert main(["export", "coco", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "no data set" in capsys.readouterr().err
    with pytest.raises(ValueError, match="allowed: mmseg, coco"):
        export("yolo", tmp_path, tmp_path / "out")


class TestRealData:
    @pytest.fixture
    def voc(self, folder, tmp_path):
        """The images and masks alone, as a devkit has them."""
        for name in ("JPEGImages", "SegmentationClass", "ImageSets"):
            (tmp_path / "voc").mkdir(exist_ok=True)
            (folder / name).rename(tmp_path / "voc" / name)
        (tmp_path / "voc/SegmentationClass/masks.json").unlink()
        (tmp_path / "pets.yaml").write_text("name: pets\nclasses: [cat, dog, cow]\n")
        return tmp_path / "voc"

    def test_a_folder_that_does_not_tell_its_classes(self, voc, tmp_path, capsys):
        command = ["export", "coco", str(voc), str(tmp_path / "out")]
        assert main(command) == 2 and "--taxonomy" in capsys.readouterr().err
        assert main([*command, "--taxonomy", str(tmp_path / "pets.yaml")]) == 0

    def test_masks_of_other_classes_or_another_size(self, voc, tmp_path):
        (tmp_path / "one.yaml").write_text("name: one\nclasses: [cat]\n")
        with pytest.raises(ValueError, match="outside the 2 classes"):
            export("coco", voc, tmp_path / "out", classes=tmp_path / "one.yaml")
        (voc / "SegmentationClass/000001.png").write_bytes(encode_mask(np.zeros((4, 4), np.uint8)))
        with pytest.raises(ValueError, match="is 4x4, its image 16x16"):
            export("coco", voc, tmp_path / "out", classes=tmp_path / "pets.yaml")
        (voc / "JPEGImages/000001.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match="000001.png is damaged, or not an image"):
            export("coco", voc, tmp_path / "out", classes=tmp_path / "pets.yaml")

    def test_a_prepared_set_that_is_not_finished(self, voc, tmp_path):
        (voc / "settings_all.json").write_text('{"identity": {}}')
        with pytest.raises(FileNotFoundError, match="not finished"):
            export("coco", voc, tmp_path / "out", classes=tmp_path / "pets.yaml")
