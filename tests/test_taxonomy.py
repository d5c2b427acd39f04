import dataclasses

import pytest

from dd.taxonomy import IGNORE, SHAPES_NAMES, TAXONOMIES, VOC_NAMES, Taxonomy, taxonomy, voc_palette

# The colour map as the VOC devkit prints it, class by class.
VOC_COLOURS = [
    (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128), (64, 0, 0),
    (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128), (64, 128, 128), (192, 128, 128), (0, 64, 0),
    (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128),
]  # fmt: skip


def test_pixel_values_begin_after_background():
    pets = Taxonomy("pets", ["cat", "dog", "guinea pig"])
    assert pets.names == ("cat", "dog", "guinea pig")
    assert pets.all_names == ("background", "cat", "dog", "guinea pig")
    assert len(pets) == 4
    assert pets.ids(["guinea pig", "cat"]) == [3, 1]
    assert pets.ids([]) == []


def test_a_taxonomy_is_a_value():
    assert Taxonomy("pets", ["cat"]) == Taxonomy("pets", ("cat",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Taxonomy("pets", ["cat"]).name = "other"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "empty"),
        (["cat", "  "], "empty"),
        (["cat", "dog", "cat"], r"unique, got \['cat'\]"),
        (["cat", "background"], "always class 0"),
        ([f"class {i}" for i in range(255)], "255 classes, a mask holds at most 254"),
    ],
)
def test_impossible_class_lists_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy("pets", names)


def test_254_classes_leave_255_free():
    largest = Taxonomy("many", [f"class {i}" for i in range(254)])
    assert max(largest.ids(largest.names)) == 254 < IGNORE


def test_unknown_names_are_answered_with_the_allowed_ones():
    with pytest.raises(ValueError, match=r"unknown class \['cow', 'background'\].*allowed: cat, dog"):
        Taxonomy("pets", ["cat", "dog"]).ids(["cat", "cow", "background"])
    with pytest.raises(ValueError, match="unknown taxonomy 'vox'; allowed: voc, shapes"):
        taxonomy("vox")


def test_the_built_in_taxonomies():
    assert taxonomy("voc").names == VOC_NAMES and len(taxonomy("voc")) == 21
    assert taxonomy("shapes").names == SHAPES_NAMES and len(SHAPES_NAMES) >= 8
    assert any(" " in name for name in SHAPES_NAMES)
    assert all(TAXONOMIES[name].name == name for name in TAXONOMIES)


def test_the_palette_is_that_of_the_voc_devkit():
    flat = voc_palette()
    colours = [tuple(flat[i : i + 3]) for i in range(0, len(flat), 3)]
    assert colours[:21] == VOC_COLOURS
    assert colours[IGNORE] == (224, 224, 192)  # the cream of VOC's boundaries
    assert len(set(colours)) == 256
    assert voc_palette(3) == flat[:9]
