import dataclasses
import pickle
import unicodedata

import pytest

from dd.taxonomy import (
    COCO_NAMES,
    IGNORE,
    SHAPES_NAMES,
    TAXONOMIES,
    VOC_NAMES,
    Taxonomy,
    read_taxonomy,
    taxonomy,
    taxonomy_yaml,
    voc_palette,
)

# The colour map as the VOC devkit prints it, class by class.
VOC_COLOURS = [
    (0, 0, 0),
    (128, 0, 0),
    (0, 128, 0),
    (128, 128, 0),
    (0, 0, 128),
    (128, 0, 128),
    (0, 128, 128),
    (128, 128, 128),
    (64, 0, 0),
    (192, 0, 0),
    (64, 128, 0),
    (192, 128, 0),
    (64, 0, 128),
    (192, 0, 128),
    (64, 128, 128),
    (192, 128, 128),
    (0, 64, 0),
    (128, 64, 0),
    (0, 192, 0),
    (128, 192, 0),
    (0, 64, 128),
]


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
        (["Background", "cat"], "always class 0"),
        (["_background_", "cat"], "always class 0"),
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
    with pytest.raises(
        ValueError, match=r"unknown class \['cow', 'background'\].*allowed: cat, dog"
    ):
        Taxonomy("pets", ["cat", "dog"]).ids(["cat", "cow", "background"])
    with pytest.raises(
        ValueError,
        match="unknown taxonomy 'vox'; allowed: voc, coco, shapes, or the path of a YAML",
    ):
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


# Words


def test_words_lead_to_their_class():
    pets = Taxonomy("pets", ["Cat", "guinea pig"], {"guinea pig": ["cavy", "Cuy"]})
    assert pets.words == {
        "cat": "Cat",
        "guinea pig": "guinea pig",
        "cavy": "guinea pig",
        "cuy": "guinea pig",
    }
    assert (
        taxonomy("voc").words["dirt bike"] == "motorbike"
        and taxonomy("voc").words["bike"] == "bicycle"
    )
    assert set(taxonomy("voc").words.values()) == set(VOC_NAMES)


def test_a_taxonomy_is_hashable_and_can_be_sent_to_a_process():
    pets = Taxonomy("pets", ["cat"], {"cat": ["kitten"]}, {"cat": (1, 2, 3)})
    assert pickle.loads(pickle.dumps(pets)) == pets != Taxonomy("pets", ["cat"])
    assert hash(pets) == hash(Taxonomy("pets", ["cat"], {"cat": ["kitten"]}, {"cat": [1, 2, 3]}))


@pytest.mark.parametrize(
    ("synonyms", "message"),
    [
        ({"cat": ["pet"], "dog": ["Pet"]}, "the word 'Pet' means both 'cat' and 'dog'"),
        ({"cat": ["Dog"]}, "the word 'Dog' means both 'dog' and 'cat'"),
        ({"cow": ["bull"]}, r"unknown class \['cow'\]"),
        ({"cat": "kitten"}, "must be a list of words"),
        ({"cat": [""]}, "must be a list of words"),
        ({"cat": [3]}, "must be a list of words"),
    ],
)
def test_words_that_are_not_clear(synonyms, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy("pets", ["cat", "dog"], synonyms)


# Colours


def test_colours_stand_over_those_of_voc():
    pets = Taxonomy(
        "pets",
        ["cat", "dog"],
        colours={"dog": [9, 8, 7], 255: (255, 255, 255), "background": (1, 1, 1)},
    )
    assert (
        pets.palette[:9] == [1, 1, 1, 128, 0, 0, 9, 8, 7]
        and pets.palette[-3:] == [255] * 3
        and len(pets.palette) == 768
    )
    assert Taxonomy("pets", ["cat"]).palette == voc_palette()


@pytest.mark.parametrize(
    ("colours", "message"),
    [
        ({"cat": (0, 128, 0)}, r"'cat' and 'dog' have the same colour \[0, 128, 0\]"),
        ({"cat": (0, 0, 0)}, "'background' and 'cat' have the same colour"),
        ({"cat": (224, 224, 192)}, "'cat' and 255 have the same colour"),
        ({"cat": (0, 0)}, "must be .red, green, blue."),
        ({"cat": (0, 0, 256)}, "must be .red, green, blue."),
        ({"cat": (0, 0, 1.5)}, "must be .red, green, blue."),
        ({"cow": (1, 2, 3)}, r"unknown class \['cow'\]"),
    ],
)
def test_colours_that_are_not_clear(colours, message):
    with pytest.raises(ValueError, match=message):
        Taxonomy("pets", ["cat", "dog"], colours=colours)


# COCO


def test_coco_has_80_things():
    assert len(COCO_NAMES) == 80 and len(taxonomy("coco")) == 81
    places = {
        "person": 1,
        "truck": 8,
        "stop sign": 12,
        "bird": 15,
        "skis": 31,
        "hot dog": 53,
        "tv": 63,
        "toothbrush": 80,
    }
    assert taxonomy("coco").ids(places) == list(places.values())


# Files


SITE = """
name: site
classes:
  - scratch
  - name: gold ring
    synonyms: [ring, band]
    colour: [255, 0, 0]
ignored_colour: [1, 1, 1]
"""


def test_a_taxonomy_from_a_file(tmp_path):
    (tmp_path / "site.yaml").write_text(SITE)
    site = taxonomy(tmp_path / "site.yaml")
    assert site == taxonomy(str(tmp_path / "site.yaml"))
    assert (site.name, site.names) == ("site", ("scratch", "gold ring"))
    assert site.synonyms == {"gold ring": ("ring", "band")} and site.colours == {
        "gold ring": (255, 0, 0),
        IGNORE: (1, 1, 1),
    }
    for other in (site, taxonomy("voc")):
        (tmp_path / "copy.yml").write_text(taxonomy_yaml(other))
        assert taxonomy(tmp_path / "copy.yml") == other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is not valid YAML"),
        ("- cat", "has the keys name .text. and classes .a list."),
        ("name: a\nclasses: cat", "has the keys name"),
        ("name: a\nclasses: [no, yes]", r"a class name must be text, got False \(put yes, no"),
        (
            "name: a\nclasses: [cat]\ncolors: 3",
            "unknown key 'colors' in the file; allowed: name, classes",
        ),
        (
            "name: a\nclasses: [{name: cat, color: [1, 2, 3]}]",
            "unknown key 'color' in class 'cat'; allowed: name, syn",
        ),
        (
            "name: a\nclasses: [{name: cat, colour: red}]",
            "colour of 'cat' must be a list .red, green, blue., got 'red'",
        ),
        ("name: a\nclasses: [cat]\nbackground_colour:", "colour of 'background' must be a list"),
        ("name: a\nclasses: [cat, Cat]", "class names must be unique"),
        ("name: a\nclasses: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_files_that_are_no_taxonomy(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"a.yaml.*{message}"):
        taxonomy(tmp_path / "a.yaml")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no taxonomy file .*docs/data.md"):
        taxonomy(tmp_path / "a.yaml")


def test_labels_of_other_programs():
    site = Taxonomy("site", ["gold ring", "hot dog", "hotdog", "Maß"], {"gold ring": ["band"]})
    for label, name in {
        "gold_ring": "gold ring",
        "Gold-Ring": "gold ring",
        "GOLDRING": "gold ring",
        " band ": "gold ring",
        "bands": None,
        "hot dog": "hot dog",
        "hotdog": "hotdog",
        "hot_dog": "hot dog",
        "h o t dog": None,
        "ring": None,
        7: None,
        unicodedata.normalize("NFD", "maß"): "Maß",
    }.items():
        assert site.find(label) == name, label
    assert [taxonomy("voc").find(n) for n in ("diningtable", "pottedplant", "tvmonitor")] == [
        "dining table",
        "potted plant",
        "tv monitor",
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_that_begins_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "t.yaml").write_bytes("name: t\nclasses: [Maß]\n".encode(encoding))
    assert read_taxonomy(tmp_path / "t.yaml").names == ("Maß",)
