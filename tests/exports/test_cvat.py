import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from dd.stages.export import export
from dd.stages.prepare_own import OwnData, prepare_own
from dd.taxonomy import Taxonomy, voc_palette


def labelmap(archive):
    """{colour: label}, read as CVAT's own reader does: four fields between colons, # begins a
    comment."""
    found = {}
    for line in archive.read("labelmap.txt").decode("utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, colour, parts, actions = line.strip().split(":")
            assert name not in found.values() and parts == actions == ""
            found[tuple(int(c) for c in colour.split(","))] = name
    return found


def coloured(archive, name):
    image = Image.open(io.BytesIO(archive.read(name)))
    assert image.mode == "RGB"
    return np.asarray(image)


def test_the_zip_holds_the_same_masks_in_the_colours_of_its_labelmap(hall, exported):
    with zipfile.ZipFile(exported("cvat", hall.root) / "cvat.zip") as archive:
        assert archive.testzip() is None
        colours, names = labelmap(archive), hall.classes.all_names
        assert list(colours.values()) == [*names, "ignored"]
        numbers = {tuple(voc_palette()[3 * i : 3 * i + 3]): i for i in range(256)}
        for split, ids in hall.splits.items():
            assert archive.read(f"ImageSets/Segmentation/{split}.txt").decode().splitlines() == ids
        for name, mask in hall.masks.items():
            pixels, regions = (
                coloured(archive, f"Segmentation{kind}/{name}.png") for kind in ("Class", "Object")
            )
            read = np.array(
                [
                    [names.index(n) if (n := colours[tuple(p)]) in names else 255 for p in row]
                    for row in pixels
                ]
            )
            assert np.array_equal(read, mask)
            instances = np.array([[numbers[tuple(p)] for p in row] for row in regions])
            assert np.array_equal(instances == 0, mask == 0)  # CVAT draws nothing for background
            pairs = set(zip(instances.ravel().tolist(), mask.ravel().tolist(), strict=True))
            assert (
                len(pairs) == len(np.unique(mask)) == len(np.unique(instances))
            )  # one region for each class
            assert (
                archive.read(f"JPEGImages/{name}{hall.suffixes[name]}")
                == hall.image(name).read_bytes()
            )


def test_labels_for_a_new_project(hall, exported):
    rows = json.loads((exported("cvat", hall.root) / "labels.json").read_text())
    assert [row["name"] for row in rows] == [*hall.classes.names, "ignored"]
    assert rows[0]["color"] == "#fac80a" and rows[-1]["color"] == "#090909"


def test_what_is_exported_can_be_prepared_again(hall, exported, tmp_path):
    with zipfile.ZipFile(exported("cvat", hall.root) / "cvat.zip") as archive:
        archive.extractall(tmp_path / "voc")
    root, _ = prepare_own(
        tmp_path / "data",
        hall.root / "taxonomy.yaml",
        "again",
        OwnData(tmp_path / "voc/JPEGImages", tmp_path / "voc/SegmentationClass"),
    )
    for name, mask in hall.masks.items():
        assert np.array_equal(np.asarray(Image.open(root / f"SegmentationClass/{name}.png")), mask)


def test_the_bytes_depend_on_the_content_alone(hall, exported, tmp_path):
    first = exported("cvat", hall.root)
    first.rename(tmp_path / "first")
    assert (exported("cvat", hall.root) / "cvat.zip").read_bytes() == (
        tmp_path / "first/cvat.zip"
    ).read_bytes()


@pytest.mark.parametrize("name", ["a:b", "#one", "line\nbreak", " blank", "Ignored"])
def test_names_that_a_labelmap_cannot_hold(hall, tmp_path, name):
    (hall.root / "dataset.json").unlink()
    (hall.root / "ImageSets/Segmentation/train.txt").write_text("line/a\n")
    with pytest.raises(ValueError, match="rename the class"):
        export(
            "cvat",
            hall.root,
            tmp_path / "out",
            classes=Taxonomy("odd", (name, "two", "three", "four")),
        )
    assert not (tmp_path / "out").exists()
