"""Masks of other tools: values against colours."""

import numpy as np
import pytest
from PIL import Image

from dd.data.datasets import (
    SegmentationFolder,
    encode_mask,
    read_coloured_mask,
    read_mask,
    write_split,
)
from dd.stages.export import export
from dd.taxonomy import Taxonomy, taxonomy, voc_palette

COLOURED = Taxonomy(
    "site", ["scratch", "dent"], colours={"scratch": (255, 0, 0), "dent": (0, 255, 0)}
)
PLAIN = Taxonomy("site", ["scratch", "dent"])
WHITE = Taxonomy("site", ["scratch"], colours={"scratch": (255, 255, 255)})
IDS = np.array([[0, 1, 2, 2], [1, 1, 0, 0], [2, 0, 0, 1]], np.uint8)


def with_palette(path, order, colours):
    """IDS with value ``order[i]`` for class i, each in the colour of its class, as tools write
    that sort palettes."""
    values = np.zeros(256, np.uint8)
    values[list(order)] = range(len(order))
    image = Image.fromarray(values[IDS])
    image.putpalette([v for i in order for v in colours[i]])
    image.save(path)
    return path


@pytest.mark.parametrize("classes", [COLOURED, PLAIN])
def test_a_palette_in_another_order_is_refused_with_both_readings(tmp_path, classes):
    colours = [tuple(classes.palette[3 * i : 3 * i + 3]) for i in range(3)]
    assert np.array_equal(
        read_mask(with_palette(tmp_path / "same.png", (0, 1, 2), colours), classes), IDS
    )
    other = with_palette(tmp_path / "other.png", (2, 0, 1), colours)
    with pytest.raises(
        ValueError,
        match=r"other\.png: values and colours name different classes: value 0 is 'background', ",
    ):
        read_mask(other, classes)
    with pytest.raises(
        ValueError, match=rf"value 1 is 'scratch', its colour \[{colours[0][0]}, .* 'background'"
    ):
        read_mask(other, classes)


def test_colours_of_no_class_say_nothing(tmp_path):
    foreign = [
        (0, 255, 0),
        (255, 0, 0),
        (1, 2, 3),
    ]  # two of them are the taxonomy's, the third is nobody's
    for classes in (COLOURED, PLAIN):
        path = with_palette(tmp_path / "foreign.png", (0, 1, 2), foreign)
        assert np.array_equal(read_mask(path, classes), IDS)
    grey = with_palette(tmp_path / "ramp.png", (0, 1, 2), [(i, i, i) for i in range(3)])
    assert np.array_equal(read_mask(grey, PLAIN), IDS)


def test_a_grey_value_that_is_the_colour_of_a_class(tmp_path):
    Image.fromarray((IDS > 0).astype(np.uint8) * 255).save(tmp_path / "white.png")
    with pytest.raises(
        ValueError, match=r"value 255 is ignored, its colour \[255, 255, 255\] 'scratch'"
    ):
        read_mask(tmp_path / "white.png", WHITE)
    assert (
        read_mask(tmp_path / "white.png", COLOURED).max() == 255
    )  # no class has this grey: 255 is ignored


def folder(tmp_path):
    root = tmp_path / "voc"
    for part in ("JPEGImages", "SegmentationClass"):
        (root / part).mkdir(parents=True)
    Image.new("RGB", (4, 3)).save(root / "JPEGImages/a.png")
    with_palette(root / "SegmentationClass/a.png", (2, 0, 1), [(0, 0, 0), (255, 0, 0), (0, 255, 0)])
    write_split(root, "train", ["a"])
    return root


def test_folders_that_are_read_as_they_are_and_their_export(tmp_path):
    root = folder(tmp_path)
    with pytest.raises(ValueError, match=r"a\.png: values and colours name different classes"):
        SegmentationFolder(root, "train", COLOURED)[0]
    with pytest.raises(ValueError, match=r"a\.png: values and colours name different classes"):
        export("coco", root, tmp_path / "exported", classes=COLOURED)


def test_masks_of_our_own_are_ids_whatever_the_colours(tmp_path):
    """Synthetic masks have VOC's colours, which a taxonomy may give to other classes."""
    swapped = Taxonomy(
        "site", ["scratch", "dent"], colours={"scratch": (0, 128, 0), "dent": (128, 0, 0)}
    )
    root = folder(tmp_path)
    (root / "SegmentationClass/a.png").write_bytes(encode_mask(IDS))
    with pytest.raises(ValueError, match="different classes"):
        SegmentationFolder(root, "train", swapped)[0]
    (root / "run.json").write_text('{"identity": {}}')
    assert np.array_equal(SegmentationFolder(root, "train", swapped)[0][1], IDS)


SAVED = {
    "1": Image.fromarray(IDS == 1),
    "I;16": Image.fromarray(IDS.astype(np.uint16)),
    "I": Image.fromarray(IDS.astype(np.int32)),
    "LA": Image.fromarray(IDS).convert("LA"),
}


@pytest.mark.parametrize("mode", SAVED)
def test_whole_numbers_in_other_modes_are_ids(tmp_path, mode):
    path = tmp_path / ("mask.tif" if mode == "I" else "mask.png")
    SAVED[mode].save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    found = read_mask(path, PLAIN)
    assert found.dtype == np.uint8 and np.array_equal(found, IDS == 1 if mode == "1" else IDS)


def test_numbers_that_are_no_ids_and_transparent_masks(tmp_path):
    Image.fromarray(IDS.astype(np.uint16) * 1000).save(tmp_path / "instances.png")
    with pytest.raises(
        ValueError, match=r"instances\.png holds values from 0 to 2000, class ids end at 255"
    ):
        read_mask(tmp_path / "instances.png")
    clear = SAVED["LA"].copy()
    clear.putpixel((0, 0), (0, 9))
    clear.save(tmp_path / "clear.png")
    with pytest.raises(ValueError, match=r"clear\.png is transparent in places"):
        read_mask(tmp_path / "clear.png")


def test_an_export_copies_bytes_that_others_read(tmp_path):
    root = folder(tmp_path)
    SAVED["1"].save(root / "SegmentationClass/a.png")
    with pytest.raises(
        ValueError, match=r"a\.png has mode 1; exports copy masks in grey of 8 bits"
    ):
        export("mmseg", root, tmp_path / "exported", classes=COLOURED)


def test_grey_ids_in_three_channels_are_named(tmp_path):
    Image.fromarray(IDS).convert("RGB").save(tmp_path / "three.png")
    with pytest.raises(
        ValueError, match="Its channels are equal: if they are class ids, save one of them"
    ):
        read_coloured_mask(tmp_path / "three.png", COLOURED)


def test_the_classes_of_voc_have_its_colours(tmp_path):
    Image.fromarray(np.array(voc_palette(), np.uint8).reshape(256, 3)[IDS]).save(
        tmp_path / "voc.png"
    )
    assert np.array_equal(read_coloured_mask(tmp_path / "voc.png", taxonomy("voc")), IDS)
    with pytest.raises(ValueError, match="They are VOC's for 'scratch', 'dent'"):
        read_coloured_mask(tmp_path / "voc.png", PLAIN)
