import io
import json
import zipfile

import numpy as np
import pytest

from dd.__main__ import main
from dd.data.datasets import SegmentationFolder, encode_image, read_split
from dd.stages.prepare_coco import prepare_coco
from dd.store import downloads
from dd.store.provenance import read_json
from dd.taxonomy import COCO_NAMES, taxonomy

IDS = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]
SIZES = {"val": [(8, 10), (12, 7), (9, 9)], "train": [(10, 10), (6, 11)]}


def polygon(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


def instances(split):
    """An annotation file as COCO's, whose first image has a person (id 1), a toothbrush (90) on
    it and a crowd of them."""
    images = [
        {
            "id": 100 + i,
            "file_name": f"{split[0]}{i:012d}.jpg",
            "height": h,
            "width": w,
            "license": 1,
        }
        for i, (h, w) in enumerate(SIZES[split])
    ]
    crowd = np.zeros(SIZES[split][0], int)
    crowd[:, -3:] = 1
    height, width = crowd.shape
    rows = [
        {
            "id": 1,
            "image_id": 100,
            "category_id": 90,
            "segmentation": polygon(2, 2, 4, 4),
            "area": 4,
            "iscrowd": 0,
        },
        {
            "id": 2,
            "image_id": 100,
            "category_id": 1,
            "segmentation": polygon(0, 0, 8, 5),
            "area": 40,
            "iscrowd": 0,
        },
        {
            "id": 3,
            "image_id": 100,
            "category_id": 1,
            "iscrowd": 1,
            "area": 3 * height,
            "segmentation": {"counts": [height * (width - 3), 3 * height], "size": [height, width]},
        },
    ]
    return {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": rows,
        "categories": [
            {"id": i, "name": n, "supercategory": "thing"}
            for i, n in zip(IDS, COCO_NAMES, strict=True)
        ],
    }


@pytest.fixture
def coco2017(tmp_path):
    root = tmp_path / "real/coco2017"
    for name in ("annotations", "train2017", "val2017"):
        (root / name).mkdir(parents=True)
    for split in SIZES:
        content = instances(split)
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
        for image in content["images"]:
            pixels = np.random.default_rng(image["id"]).integers(
                0, 256, (image["height"], image["width"], 3), dtype=np.uint8
            )
            (root / f"{split}2017" / image["file_name"]).write_bytes(encode_image(pixels, ".jpg"))
    return root


def files(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def change(root, split, edit):
    path = root / f"annotations/instances_{split}2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_masks_of_both_splits(coco2017, tmp_path):
    before = files(coco2017)
    root, notes = prepare_coco(tmp_path / "data", existing=coco2017, workers=0)
    assert root == tmp_path / "data/coco" and files(coco2017) == before
    for split, sizes in SIZES.items():
        data = SegmentationFolder(root, split, taxonomy("coco"))
        assert [data[i][1].shape for i in range(len(data))] == sizes
        assert data.ids == [f"{split[0]}{i:012d}" for i in range(len(sizes))]
        height, width = sizes[0]
        expected = np.zeros((height, width), int)
        expected[:, -3:] = 255
        expected[0:5, 0:8] = 1
        expected[2:4, 2:4] = 80
        assert np.array_equal(data[0][1], expected)
        assert not any(
            data[i][1].any() for i in range(1, len(data))
        )  # no objects: background, and kept
    assert "val: 1 crowd annotations (iscrowd=1) are 255 where no object covers them" in notes
    assert "val: val holds 3 images, the published data 5000" in notes
    record = read_json(root / "dataset.json")["parts"]["val"]["classes"]
    assert record["person"] == {"images": 1, "pixels": 36} and record["toothbrush"] == {
        "images": 1,
        "pixels": 4,
    }


def test_splits_one_after_the_other(coco2017, tmp_path):
    root, _ = prepare_coco(tmp_path / "data", existing=coco2017, splits=["val"])
    made = files(root / "SegmentationClass")
    with pytest.raises(FileNotFoundError, match="has no split 'train'"):
        read_split(root, "train")
    prepare_coco(tmp_path / "data", existing=coco2017)
    assert made.items() < files(root / "SegmentationClass").items()
    assert len(read_json(root / "dataset.json")["images"]) == 2
    for split, sizes in SIZES.items():
        data = SegmentationFolder(root, split, taxonomy("coco"))
        assert [data[i][0].shape[:2] for i in range(len(data))] == sizes
    everything = files(root)
    prepare_coco(tmp_path / "data", existing=coco2017)
    assert files(root) == everything


def test_other_annotations_are_refused(coco2017, tmp_path):
    root, _ = prepare_coco(tmp_path / "data", existing=coco2017)
    everything = files(root)
    change(coco2017, "val", lambda c: c["annotations"].pop())
    with pytest.raises(
        FileExistsError, match="coco was made with other settings:\n  annotations_sha256"
    ):
        prepare_coco(tmp_path / "data", existing=coco2017)
    assert files(root) == everything


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: c["images"].append(
                {"id": 1, "file_name": "gone.jpg", "height": 4, "width": 4}
            ),
            r"does not match the images: 1 of the 4 it lists are not in .*val2017, such as "
            r"gone\.jpg",
        ),
        (
            lambda c: c["images"][1].update(height=99),
            r"v0+1\.jpg is 7x12 \(width x height\), its mask 7x99",
        ),
        (
            lambda c: c["annotations"][0].update(category_id=12),
            r"val2017\.json: 1 annotations .* \[12\]; defined: \[1, 2",
        ),
        (
            lambda c: c["annotations"][0].update(image_id=5),
            r"belong to images that the file does not list, .* \[5\]",
        ),
        (
            lambda c: c["categories"].append({"id": 91, "name": "hat"}),
            r"1 categories are not a class .*: hat \(id 91\)",
        ),
        (
            lambda c: c["annotations"][2]["segmentation"].update(size=[3, 3]),
            "not be made .*\n.*annotation 3: its run le",
        ),
    ],
)
def test_annotations_that_do_not_fit(coco2017, tmp_path, edit, message):
    change(coco2017, "val", edit)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_coco(tmp_path / "data", existing=coco2017, splits=["val"])
    assert not (tmp_path / "data/coco/dataset.json").exists()


def test_unlisted_images_are_counted(coco2017, tmp_path):
    change(coco2017, "val", lambda c: c["images"].pop())
    _, notes = prepare_coco(tmp_path / "data", existing=coco2017, splits=["val"])
    assert any(
        "1 images in" in n and "not listed in instances_val2017.json: left out" in n for n in notes
    )


def test_folders_that_are_not_there(coco2017, tmp_path):
    (coco2017 / "val2017").rename(coco2017 / "val")
    with pytest.raises(FileNotFoundError, match="has no folder val2017"):
        prepare_coco(tmp_path / "data", existing=coco2017)
    (coco2017 / "annotations/instances_val2017.json").unlink()
    (coco2017 / "val").rename(coco2017 / "val2017")
    with pytest.raises(FileNotFoundError, match=r"no .*instances_val2017\.json"):
        prepare_coco(tmp_path / "data", existing=coco2017)
    with pytest.raises(ValueError, match=r"splits \['test'\]; allowed: train, val"):
        prepare_coco(tmp_path / "data", existing=coco2017, splits=["test"])


def test_a_real_tree_is_not_mixed_with_ours(coco2017, tmp_path):
    (tmp_path / "data").mkdir()
    coco2017.rename(tmp_path / "data/coco")
    before = files(tmp_path / "data")
    with pytest.raises(FileExistsError, match="holds other data and is not written to"):
        prepare_coco(tmp_path / "data", existing=tmp_path / "data/coco")
    assert files(tmp_path / "data") == before


def test_the_command_line_from_the_web_to_masks(coco2017, tmp_path, web, monkeypatch, capsys):
    monkeypatch.setattr(downloads.time, "sleep", lambda _: None)
    for name in ("annotations", "val2017"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for path in sorted((coco2017 / name).iterdir()):
                archive.write(path, f"{name}/{path.name}")
        web.files[f"{name}.zip"] = buffer.getvalue()
    web.cuts = [500, 0, 200]
    command = ["prepare", "coco", "--root", str(tmp_path / "data"), "--splits", "val"]
    urls = [
        "--url",
        f"annotations={web.url('annotations.zip')}",
        "--url",
        f"val={web.url('val2017.zip')}",
    ]
    assert main([*command, *urls]) == 0
    assert capsys.readouterr().out == f"ready: {tmp_path / 'data/coco'}\n"
    data = SegmentationFolder(tmp_path / "data/coco", "val", taxonomy("coco"))
    assert [data[i][1].shape for i in range(3)] == SIZES["val"] and set(np.unique(data[0][1])) == {
        0,
        1,
        80,
        255,
    }
    asked = len(web.asked)
    assert main([*command, *urls]) == 0 and len(web.asked) == asked
