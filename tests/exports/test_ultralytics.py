import numpy as np
import pytest
import yaml
from PIL import Image

from dd.stages.export import export


def test_pillow_and_yaml_read_the_same_pixels(hall, exported):
    root = exported("ultralytics", hall.root)
    content = yaml.safe_load((root / "data.yaml").read_text())
    assert content["names"] == dict(enumerate(hall.classes.all_names)) and content["nc"] == 5
    assert content["train"] == "images/train" and content["val"] == "images/val" and "path" not in content
    for split, ids in hall.splits.items():
        images = sorted(p.relative_to(root).as_posix() for p in (root / "images" / split).rglob("*") if p.is_file())
        assert images == sorted(f"images/{split}/{name}{hall.suffixes[name]}" for name in ids)
        for path in images:
            mask = (root / path.replace("images", content["masks_dir"], 1)).with_suffix(".png")
            name = path.removeprefix(f"images/{split}/").rpartition(".")[0]
            with Image.open(mask) as image:
                assert image.mode == "L" and np.array_equal(np.asarray(image), hall.masks[name])
            assert (root / path).read_bytes() == hall.image(name).read_bytes()


def test_a_missing_validation_set_is_told_of(pets, tmp_path):
    done = export("ultralytics", pets, tmp_path / "out")
    assert len(done["notes"]) == 1 and "no split for val" in done["notes"][0]
    assert "val" not in yaml.safe_load((tmp_path / "out/data.yaml").read_text())


def test_a_folder_that_would_be_replaced_in_paths(hall, tmp_path):
    for kind, suffix in (("JPEGImages", ".png"), ("SegmentationClass", ".png")):
        path = hall.root / kind / f"images/x{suffix}"
        path.parent.mkdir()
        path.write_bytes((hall.root / kind / f"photo 1{suffix}").read_bytes())
    (hall.root / "ImageSets/Segmentation/val.txt").write_text("images/x\n")
    with pytest.raises(ValueError, match="folder called images"):
        export("ultralytics", hall.root, tmp_path / "out")
