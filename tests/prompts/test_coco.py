"""COCO captions with the classes of their images' annotations."""

import json
from collections import Counter

import pytest

from dd.prompts.coco import CocoCaptions, rounds
from dd.taxonomy import taxonomy

COCO, VOC = taxonomy("coco"), taxonomy("voc")
CATEGORIES = [
    {"id": 1, "name": "person"},
    {"id": 5, "name": "airplane"},
    {"id": 67, "name": "dining table"},
    {"id": 90, "name": "toothbrush"},
]
IMAGES = [{"id": i, "file_name": f"{i:012}.jpg"} for i in (7, 9, 30, 41)]
ANNOTATIONS = [(7, 67), (7, 1), (7, 1), (9, 90), (41, 5), (41, 1)]
CAPTIONS = [
    (7, "A man at\n a table. "),
    (9, "A brush."),
    (30, "An empty street"),
    (7, "Two people eat"),
    (41, "A plane"),
]


def source(tmp_path, captions=CAPTIONS, annotations=ANNOTATIONS, categories=CATEGORIES, **kwargs):
    rows = [{"image_id": i, "category_id": c, "iscrowd": 0} for i, c in annotations]
    files = {
        "captions.json": {
            "images": IMAGES,
            "annotations": [{"image_id": i, "id": 0, "caption": c} for i, c in captions],
        },
        "instances.json": {"images": IMAGES, "annotations": rows, "categories": categories},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    return CocoCaptions(str(tmp_path / "captions.json"), str(tmp_path / "instances.json"), **kwargs)


def test_classes_are_those_of_the_image_in_category_order(tmp_path):
    found = source(tmp_path)(COCO, None, 0)
    assert Counter((p.text, p.classes) for p in found) == {
        ("A man at a table; person dining table", ("person", "dining table")): 1,
        ("Two people eat; person dining table", ("person", "dining table")): 1,
        ("A brush; toothbrush", ("toothbrush",)): 1,
        ("A plane; person airplane", ("person", "airplane")): 1,
    }
    assert found.dropped == [
        {"reason": "names no class", "filename": "000000000030.jpg", "caption": "An empty street"}
    ]


def test_ids_that_another_program_wrote_as_floats(tmp_path):
    rows = [(float(i), c) for i, c in CAPTIONS]
    assert list(source(tmp_path, rows)(COCO, None, 0)) == list(source(tmp_path)(COCO, None, 0))
    with pytest.raises(
        ValueError,
        match=r"captions.json: image_id of an entry of annotations must be a number or a text",
    ):
        source(tmp_path, [(7.5, "A man")])(COCO, None, 0)


@pytest.mark.parametrize("caption", [None, 5, ["A man"], "A\0man", "A \ud800 man"])
def test_captions_that_are_no_text(tmp_path, caption):
    with pytest.raises(ValueError, match=r"captions.json: a caption must be text"):
        source(tmp_path, [*CAPTIONS, (7, caption)])(COCO, None, 0)


def test_full_stops_stay_where_that_is_asked_for(tmp_path):
    captions = [(7, "A man at\n a table. "), (9, "A brush"), (41, "A residence."), (41, "Up...")]
    texts = {p.text for p in source(tmp_path, captions, full_stop=True)(COCO, None, 0)}
    assert texts == {
        "A man at a table.; person dining table",
        "A brush; toothbrush",
        "A residence.; person airplane",
        "Up...; person airplane",
    }


def test_categories_are_mapped_by_name_and_synonym(tmp_path):
    found = source(tmp_path)(VOC, None, 0)
    assert {p.class_prompt for p in found} == {"dining table person", "aeroplane person"}
    assert len(found.dropped) == 2  # a toothbrush is no class of VOC


def test_every_image_speaks_once_before_one_speaks_twice(tmp_path):
    for seed in range(6):
        first = source(tmp_path)(COCO, 3, seed)
        assert Counter(p.classes for p in first) == {
            ("person", "dining table"): 1,
            ("toothbrush",): 1,
            ("person", "airplane"): 1,
        }
    assert len({tuple(source(tmp_path)(COCO, 4, seed)) for seed in range(6)}) > 1
    assert source(tmp_path)(COCO, 9, 2) == source(tmp_path)(COCO, 9, 2)
    assert len(source(tmp_path)(COCO, 9, 2)) == 9


def test_rounds():
    groups = [[0, 1, 2], [3], [4, 5]]
    order = rounds(groups, 0)
    assert sorted(order) == list(range(6)) and order[-1] in (0, 1, 2)
    of_group = [next(k for k, g in enumerate(groups) if i in g) for i in order]
    assert sorted(of_group[:3]) == [0, 1, 2] and sorted(of_group[3:5]) == [0, 2]
    assert groups == [[0, 1, 2], [3], [4, 5]]


def test_excluded_images_and_similar_captions(tmp_path):
    (tmp_path / "list.txt").write_text("000000000041\n")
    found = source(tmp_path, exclude_split=str(tmp_path / "list.txt"))(COCO, None, 0)
    assert "person airplane" not in {p.class_prompt for p in found}
    found = source(tmp_path, [(7, "a man"), (7, "A man."), (41, "A man")], drop_similar=1.0)(
        COCO, None, 0
    )
    assert len(found) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"captions": [(7, "a"), (8, "b"), (12, "c")]},
            r"does not match .*2 images with captions are not listed there, such as image_id "
            r"\[12, 8\]",
        ),
        ({"captions": []}, "lists no captions"),
        ({"annotations": [(7, 3)]}, "category_id 3, which the file does not define"),
        ({"annotations": [(99, 1)]}, "image_id 99, which the file does not define"),
        ({"annotations": []}, "none of 5 captions is left to use"),
        (
            {"categories": [{"id": 1, "name": "thing"}]},
            "no category is a class of taxonomy 'coco'; categories: thing",
        ),
        ({"categories": [{"id": 1}]}, "an entry of categories has no 'name'"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        source(tmp_path, **change)(COCO, None, 0)


def test_files_that_are_not_there_or_not_whole(tmp_path):
    prompts = source(tmp_path)
    (tmp_path / "instances.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="instances.json is not valid JSON"):
        prompts(COCO, None, 0)
    (tmp_path / "instances.json").write_text("[]")
    with pytest.raises(ValueError, match="instances.json has no list 'images'"):
        prompts(COCO, None, 0)
    (tmp_path / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match="instances.json.*prepare coco"):
        prompts(COCO, None, 0)
