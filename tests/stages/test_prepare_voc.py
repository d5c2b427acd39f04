import io
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dd.__main__ import main
from dd.data.datasets import SegmentationFolder, encode_image, encode_mask, read_mask, read_split
from dd.data.sbd_masks import read_sbd_mask
from dd.stages.prepare_voc import ARCHIVES, prepare_voc, prepare_voc_aug
from dd.store import downloads
from dd.taxonomy import taxonomy

LISTS = {"train": ["2007_01", "2007_02"], "val": ["2007_03", "2007_04"]}
LISTS["trainval"] = sorted(LISTS["train"] + LISTS["val"])
SBD = {"train": ["2007_01", "2008_01", "2008_02", "2007_03"], "val": ["2008_03", "2007_04"]}


def picture(name):
    rng = np.random.default_rng(sum(map(ord, name)))
    height, width = rng.integers(8, 14, 2)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), rng.integers(
        0, 21, (height, width)
    ).astype(np.uint8)


@pytest.fixture
def devkit(tmp_path):
    """VOC 2012 as it is unpacked: JPEGs, palette masks with 255, lists."""
    root = tmp_path / "real/VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "Annotations"):
        (root / name).mkdir(parents=True)
    for name in sorted({*LISTS["trainval"], *SBD["train"], *SBD["val"]}):
        image, mask = picture(name)
        (root / f"JPEGImages/{name}.jpg").write_bytes(encode_image(image, ".jpg"))
        if name in LISTS["trainval"]:
            mask[0] = 255
            (root / f"SegmentationClass/{name}.png").write_bytes(encode_mask(mask))
    for split, ids in LISTS.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{i}\n" for i in ids))
    return root


@pytest.fixture
def sbd(tmp_path):
    """SBD's dataset folder, with MATLAB files as Berkeley's."""
    root = tmp_path / "real/benchmark_RELEASE/dataset"
    (root / "cls").mkdir(parents=True)
    kind = [("Boundaries", object), ("Segmentation", object), ("CategoriesPresent", object)]
    for split, ids in SBD.items():
        (root / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for name in ids:
            mask, record = picture(name)[1], np.empty((1, 1), kind)
            record[0, 0] = (np.zeros((3, 3)), mask, np.unique(mask[mask > 0]))
            savemat(root / f"cls/{name}.mat", {"GTcls": record}, do_compression=True)
    return root


def files(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def packed(root, top, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        archive.add(root, top)
    return buffer.getvalue()


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda _: None)


def test_an_existing_copy_is_checked_and_left_alone(devkit, tmp_path):
    before = files(devkit)
    root, notes = prepare_voc(tmp_path / "data", existing=devkit)
    assert root == devkit and files(devkit) == before and not (tmp_path / "data").exists()
    assert notes == [
        "train holds 2 images, the published data 1464",
        "val holds 2 images, the published data 1449",
        "trainval holds 4 images, the published data 2913",
    ]
    assert prepare_voc(devkit.parents[1])[0] == devkit
    data = SegmentationFolder(root, "trainval", taxonomy("voc"))
    assert [data[i][1].shape for i in range(4)] == [picture(n)[1].shape for n in LISTS["trainval"]]


@pytest.mark.parametrize(
    "lost",
    [
        "JPEGImages/2007_02.jpg",
        "SegmentationClass/2007_04.png",
        "ImageSets/Segmentation/val.txt",
        "empty",
    ],
)
def test_an_incomplete_copy(devkit, tmp_path, lost):
    if lost == "empty":
        lost = "JPEGImages/2007_01.jpg"
        (devkit / lost).write_bytes(b"")
    else:
        (devkit / lost).unlink()
    with pytest.raises(
        FileNotFoundError,
        match="is not complete: 1 of 8 files are missing or empty|has no ImageSets",
    ):
        prepare_voc(tmp_path, existing=devkit)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        prepare_voc(tmp_path, existing=tmp_path / "nowhere")


def test_masks_of_sbd(sbd, tmp_path):
    for name in ("2008_01", "2008_03"):
        mask = read_sbd_mask(sbd / f"cls/{name}.mat")
        assert (
            mask.dtype == np.uint8
            and mask.flags.c_contiguous
            and np.array_equal(mask, picture(name)[1])
        )
    savemat(tmp_path / "other.mat", {"GTinst": 1})
    (tmp_path / "text.mat").write_text("no matlab file" * 100)
    (tmp_path / "half.mat").write_bytes((sbd / "cls/2008_01.mat").read_bytes()[:300])
    for name in ("other", "text", "half"):
        with pytest.raises(ValueError, match=rf"{name}\.mat is not an SBD class mask"):
            read_sbd_mask(tmp_path / f"{name}.mat")


def test_train_aug_is_the_union_without_val(devkit, sbd, tmp_path):
    before = files(tmp_path / "real")
    root, notes = prepare_voc_aug(tmp_path / "data", existing=devkit, sbd=sbd, workers=0)
    assert root == tmp_path / "data/voc_aug" and files(tmp_path / "real") == before
    assert read_split(root, "train_aug") == ["2007_01", "2007_02", "2008_01", "2008_02", "2008_03"]
    assert {s: read_split(root, s) for s in LISTS} == LISTS
    assert notes[-1] == "train_aug holds 5 images, the published data 10582"
    data = SegmentationFolder(root, "train_aug", taxonomy("voc"))
    for i, name in enumerate(data.ids):
        image, mask = data[i]
        expected = picture(name)[1]
        expected[0] = (
            255 if name in LISTS["trainval"] else expected[0]
        )  # VOC's own mask where there is one
        assert (
            np.array_equal(mask, expected)
            and data.image_path(name).resolve().parent == (devkit / "JPEGImages").resolve()
        )
        with Image.open(root / f"SegmentationClass/{name}.png") as stored:
            assert stored.mode == "P"
    assert all(
        (SegmentationFolder(root, "val", taxonomy("voc"))[i][1][0] == 255).all() for i in (0, 1)
    )
    made = files(root)
    assert (
        prepare_voc_aug(tmp_path / "data", existing=devkit, sbd=sbd) == (root, notes)
        and files(root) == made
    )


def test_images_that_only_sbd_has(devkit, sbd, tmp_path):
    (sbd / "img").mkdir()
    shutil.move(devkit / "JPEGImages/2008_02.jpg", sbd / "img/2008_02.jpg")
    root, _ = prepare_voc_aug(tmp_path / "data", existing=devkit, sbd=sbd)
    assert len(list(SegmentationFolder(root, "train_aug", taxonomy("voc")))) == 5
    (sbd / "img/2008_02.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no image 2008_02\.jpg in .*JPEGImages or .*img, whose mask is"
    ):
        prepare_voc_aug(tmp_path / "other", existing=devkit, sbd=sbd)


def test_damaged_masks_of_sbd_are_listed(devkit, sbd, tmp_path):
    (sbd / "cls/2008_03.mat").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"1 of 7 masks could not be made .*\n  .*2008_03\.mat"):
        prepare_voc_aug(tmp_path / "data", existing=devkit, sbd=sbd)
    (sbd / "cls/2008_02.mat").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"dataset is not complete: 1 of 3 files .*2008_02\.mat"
    ):
        prepare_voc_aug(tmp_path / "data", existing=devkit, sbd=sbd)


def test_the_command_line_from_the_web_to_masks(devkit, sbd, tmp_path, web, fast, capsys):
    web.files["voc.tar"] = packed(devkit.parent, "VOCdevkit", "w")
    web.files["sbd.tgz"] = packed(sbd.parent, "benchmark_RELEASE", "w:gz")
    web.cuts = [4000]
    root = tmp_path / "data"
    command = ["prepare", "voc_aug", "--root", str(root), "--url", f"trainval={web.url('voc.tar')}"]
    assert main([*command, "--url", f"sbd={web.url('sbd.tgz')}", "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert (
        shown.out == f"ready: {root / 'voc_aug'}\n"
        and "warning: train_aug holds 5 images" in shown.err
    )
    assert [path for path, _ in web.asked] == [
        "/voc.tar",
        "/voc.tar",
        "/sbd.tgz",
    ]  # the first was broken off
    assert files(root / "VOCdevkit/VOC2012").keys() == {
        root / "VOCdevkit/VOC2012" / p.relative_to(devkit) for p in files(devkit)
    }
    for name in read_split(root / "voc_aug", "trainval"):
        masks = [read_mask(r / f"SegmentationClass/{name}.png") for r in (root / "voc_aug", devkit)]
        assert np.array_equal(*masks)
    asked = len(web.asked)
    assert main(["prepare", "voc", "--root", str(root)]) == 0 and len(web.asked) == asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "train=http://x/a.tar"], "no archive 'train'; allowed: trainval"),
        (["--url", "http://x/a.tar"], "--url http://x/a.tar: expected NAME=VALUE"),
        (["--url", "trainval=/data/a.tar"], "expected http:// or https://"),
        (["--checksum", "trainval=12"], "expected md5: and 32 or sha256: and 64"),
        (["--existing", "nowhere"], "no folder nowhere"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, message, capsys):
    assert main(["prepare", "voc", "--root", str(tmp_path), *options]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and len(shown.splitlines()) == 1


def test_archives_that_are_wrong(devkit, tmp_path, web, fast, capsys):
    command = [
        "prepare",
        "voc",
        "--root",
        str(tmp_path / "data"),
        "--url",
        f"trainval={web.url('voc.tar')}",
    ]
    web.files["voc.tar"] = packed(devkit.parent, "VOCdevkit", "w")[:9000]
    assert main(command) == 2 and "is damaged or incomplete" in capsys.readouterr().err
    (tmp_path / "data/downloads/voc.tar").unlink()
    assert main([*command, "--checksum", "trainval=md5:" + "0" * 32]) == 2
    assert "has another checksum than md5:0000" in capsys.readouterr().err
    assert not (tmp_path / "data/VOCdevkit/VOC2012").exists()


def test_the_official_archives_are_complete():
    assert all(
        a.url.startswith("http") and a.checksum.startswith("md5:") for a in ARCHIVES.values()
    )
