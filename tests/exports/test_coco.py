import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dd.stages.prepare_own import OwnData, prepare_own


@pytest.fixture
def root(hall, exported):
    return exported("coco", hall.root)


@pytest.mark.parametrize("split", ["train", "train_small", "val"])
def test_pycocotools_paints_the_same_masks(hall, root, split):
    coco = COCO(str(root / f"semantic_{split}.json"))
    assert {c["id"]: c["name"] for c in coco.dataset["categories"]} == dict(
        enumerate(hall.classes.all_names)
    )
    assert [i["file_name"].rpartition(".")[0] for i in coco.dataset["images"]] == hall.splits[split]
    for image in coco.dataset["images"]:
        name, painted = (
            image["file_name"].rpartition(".")[0],
            np.full((image["height"], image["width"]), 255, np.uint8),
        )
        rows = coco.imgToAnns[image["id"]]
        for row in rows:
            region = coco.annToMask(row) > 0
            assert (
                region.sum() == row["area"] and (painted[region] == 255).all()
            )  # regions do not overlap
            ys, xs = np.nonzero(region)
            assert row["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            painted[region] = row["category_id"]
        assert np.array_equal(painted, hall.masks[name])
        assert len({row["category_id"] for row in rows}) == len(rows)
        assert (root / "images" / image["file_name"]).read_bytes() == hall.image(name).read_bytes()
    assert len({a["id"] for a in coco.dataset["annotations"]}) == len(coco.dataset["annotations"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_panoptic_pngs_hold_the_same_masks(hall, root, split):
    content = json.loads((root / f"panoptic_{split}.json").read_text())
    files = {i["id"]: i["file_name"].rpartition(".")[0] for i in content["images"]}
    assert (
        all(c["isthing"] == 0 for c in content["categories"])
        and "not real" in content["info"]["description"]
    )
    for row in content["annotations"]:
        image = Image.open(root / "panoptic" / row["file_name"])
        assert image.mode == "RGB"
        ids = np.asarray(image).astype(int) @ np.array([1, 256, 65536])
        painted = np.full(ids.shape, 255, np.uint8)
        for segment in row["segments_info"]:
            region = ids == segment["id"]
            assert region.sum() == segment["area"] > 0 and segment["id"] > 0
            painted[region] = segment["category_id"]
        assert set(np.unique(ids)) - {0} == {s["id"] for s in row["segments_info"]}
        assert np.array_equal(painted, hall.masks[files[row["image_id"]]]) and (ids == 0).any()


def test_an_image_in_two_splits_is_one_file_with_one_number(hall, root):
    numbers = [
        {
            i["file_name"]: i["id"]
            for i in json.loads((root / f"semantic_{s}.json").read_text())["images"]
        }
        for s in ("train", "train_small")
    ]
    assert numbers[1].items() <= numbers[0].items()
    assert sum(path.is_file() for path in (root / "images").rglob("*")) == 5


def test_prompts_go_with_the_images(pets, exported, prompts):
    images = COCO(str(exported("coco", pets) / "semantic_train.json")).dataset["images"]
    assert [i["prompt"] for i in images] == prompts and [i["classes"] for i in images][:2] == [
        ["cat"],
        ["dog"],
    ]


def test_what_is_exported_can_be_prepared_again(hall, root, tmp_path):
    again, _ = prepare_own(
        tmp_path / "data",
        hall.root / "taxonomy.yaml",
        "again",
        OwnData(root / "images", coco_file=root / "semantic_train.json", shares={"val": 0.4}),
    )
    for name in hall.splits["train"]:
        mask = np.asarray(Image.open(again / f"SegmentationClass/{name}.png"))
        assert np.array_equal(
            mask, np.where(hall.masks[name] == 255, 0, hall.masks[name])
        )  # COCO has no word for 255
