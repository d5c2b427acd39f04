"""Caption files: with classes, and with classes by nouns, balanced as in the paper."""

import json
from collections import Counter

import pytest

from dd.prompts.captions import CaptionFile, NounCaptions, stem
from dd.prompts.prompt import Prompt, make_prompt
from dd.taxonomy import taxonomy

VOC, SHAPES = taxonomy("voc"), taxonomy("shapes")


# Prompt files


def caption_file(tmp_path, content, **kwargs):
    path = tmp_path / "prompts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return CaptionFile(str(path), **kwargs)


ROWS = [
    {"caption": "a man at a table", "classes": ["person", "dining table"]},
    {"caption": "a brown dog", "classes": ["dog"]},
    {
        "filename": "x.jpg",
        "caption": "two men on a sofa; person person sofa",
        "class_prompt": "person person sofa",
    },
]
READ = {
    Prompt(
        "a man at a table; person dining table", "person dining table", ("person", "dining table")
    ),
    Prompt("a brown dog; dog", "dog", ("dog",)),
    Prompt("two men on a sofa; person person sofa", "person sofa", ("person", "sofa")),
}


def test_repeated_classes_of_a_file_are_kept_where_they_are_asked_for(tmp_path):
    found = set(caption_file(tmp_path, ROWS, repeat_classes=True)(VOC, 3, 0))
    assert len(found - READ) == 1
    text = "two men on a sofa; person person sofa"
    assert found - READ == {Prompt(text, "person person sofa", ("person", "sofa"))}


def test_a_list_and_lines_are_read_alike(tmp_path):
    as_list = caption_file(tmp_path, ROWS)(VOC, 3, 0)
    as_lines = caption_file(tmp_path, "\n".join(json.dumps(row) for row in ROWS) + "\n")(VOC, 3, 0)
    assert as_list == as_lines and set(as_list) == READ


def test_a_file_is_drawn_from_round_and_round_in_an_order_of_the_seed(tmp_path):
    prompts = caption_file(tmp_path, ROWS)
    assert Counter(prompts(VOC, 7, 0)).most_common()[0][1] == 3
    assert set(Counter(prompts(VOC, 6, 0)).values()) == {2}
    assert prompts(VOC, 7, 0)[:3] == prompts(VOC, 3, 0) == prompts(VOC, 6, 0)[3:]
    assert len({tuple(prompts(VOC, 3, seed)) for seed in range(8)}) > 1


def test_a_file_without_appending(tmp_path):
    assert {p.text for p in caption_file(tmp_path, ROWS, append=False)(VOC, 3, 0)} == {
        "a man at a table",
        "a brown dog",
        "two men on a sofa",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("[]", "holds no prompts"),
        ("[1, 2", "neither a JSON list nor JSON lines"),
        (
            '{"caption": "a dog", "classes": ["dog"]}\nnot json',
            "neither a JSON list nor JSON lines",
        ),
        ("[1, 2]", "entry 0: need 'caption'"),
        (
            [ROWS[1], {"caption": "a dog"}],
            "entry 1: need 'caption' and 'classes' .*got .*a dog.*prompts=paper_voc",
        ),
        ([{"classes": ["dog"]}], "entry 0: need 'caption'"),
        (
            [ROWS[1], {"caption": "a cow and a unicorn", "classes": ["cow", "unicorn"]}],
            r"entry 1: unknown class \['unicorn'\] in taxonomy 'voc'; allowed: aeroplane, ",
        ),
        (
            [{"caption": "a unicorn", "class_prompt": "cow unicorn"}],
            "unknown class at 'unicorn'; allowed: aeroplane, ",
        ),
        (
            [{"caption": "a dog", "classes": []}],
            r"none of 1 captions is left to use \(1 x names no class\), such as 'a dog'",
        ),
        (
            [{"caption": "a dog", "class_prompt": ""}, {"caption": " ", "classes": ["dog"]}],
            "none of 2 captions is left",
        ),
        (
            [ROWS[1], {"caption": "a dog", "classes": "dog"}],
            "entry 1: 'classes' must be a list of class names, got 'dog'",
        ),
        (
            [{"caption": "a dog", "classes": ["dog"], "filename": 7}],
            "entry 0: 'filename' must be text, got 7",
        ),
        (
            [ROWS[1], {"caption": "a dog\0", "classes": ["dog"]}],
            r"entry 1: 'caption' holds a NUL .*got 'a dog\\x00'",
        ),
        (
            [{"caption": "a \ud800 dog", "classes": ["dog"]}],
            r"entry 0: 'caption' holds .*got 'a \\ud800 dog'",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        caption_file(tmp_path, content)(VOC, 1, 0)


@pytest.mark.parametrize(
    "row", [{"caption": 5, "classes": ["dog"]}, {"caption": "a dog", "class_prompt": None}]
)
def test_values_of_another_kind_name_their_entry(tmp_path, row):
    with pytest.raises(ValueError, match="entry 1"):
        caption_file(tmp_path, [ROWS[1], row])(VOC, 1, 0)


@pytest.mark.parametrize("text", ["a dog\0", "a \udfff dog"])
def test_no_prompt_is_made_of_what_no_file_can_hold(text):
    with pytest.raises(ValueError, match="expected text without NUL and unpaired surrogates"):
        make_prompt(text, ["dog"])
    assert (
        make_prompt("a 😀 dog", ["dog"]).text == "a 😀 dog; dog"
    )  # a whole character beyond 16 bits


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompts\.path: no file .*nowhere\.json"):
        CaptionFile(str(tmp_path / "nowhere.json"))(VOC, 1, 0)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "p.json").write_bytes(b'[{"caption": "caf\xe9", "classes": ["dog"]}]')
    with pytest.raises(ValueError, match="in UTF-8"):
        CaptionFile(str(tmp_path / "p.json"))(VOC, 1, 0)


def test_byte_order_marks_and_odd_line_ends_are_read(tmp_path):
    rows = [
        {"caption": "a dog\u2028here", "classes": ["dog"]},
        {"caption": "a cat\x85", "classes": ["cat"]},
    ]
    (tmp_path / "p.jsonl").write_text(
        "\ufeff" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8"
    )
    assert sorted(p.class_prompt for p in CaptionFile(str(tmp_path / "p.jsonl"))(VOC, None, 0)) == [
        "cat",
        "dog",
    ]


@pytest.mark.parametrize("number", [None, 0])
def test_all_of_a_file(tmp_path, number):
    found = caption_file(tmp_path, ROWS)(VOC, number, 0)
    assert len(found) == 3 and set(found) == READ


def test_captions_without_a_class_never_shift_the_labels_of_others(tmp_path):
    rows = [
        ROWS[0],
        {"caption": "the blue sky", "classes": []},
        ROWS[1],
        {"caption": "", "class_prompt": "dog"},
        ROWS[2],
    ]
    found = caption_file(tmp_path, rows)(VOC, None, 0)
    assert set(found) == READ and len(found) == 3
    assert [d["caption"] for d in found.dropped] == ["the blue sky", ""]
    assert {d["reason"] for d in found.dropped} == {"names no class"}


def test_a_large_file_in_the_format_in_circulation(tmp_path):
    words = "person person sofa"
    rows = [
        {"filename": f"{i}.jpg", "caption": f"picture {i % 8411}; {words}", "class_prompt": words}
        for i in range(44426)
    ]
    found = caption_file(tmp_path, rows)(VOC, None, 0)
    assert len(found) == 44426 and len({p.text for p in found}) == 8411
    assert {(p.class_prompt, p.classes) for p in found} == {("person sofa", ("person", "sofa"))}
    assert all(p.text.count(";") == 1 for p in found)


# Left out: images of the test set, captions that say the same


NAMED = [
    {"filename": "2007_000032.jpg", "caption": "a jet", "class_prompt": "aeroplane"},
    {"filename": "JPEGImages/2007_000033.jpg", "caption": "a plane", "class_prompt": "aeroplane"},
    {"filename": "2007_000039.png", "caption": "a screen", "class_prompt": "tv monitor"},
]


def split_list(tmp_path, *lines):
    (tmp_path / "val.txt").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "val.txt")


def test_captions_of_listed_images_are_left_out(tmp_path):
    split = split_list(tmp_path, "2007_000033", "2007_000039 ", "2007_00003")
    found = caption_file(tmp_path, NAMED, exclude_split=split)(VOC, None, 0)
    assert [p.text for p in found] == ["a jet; aeroplane"]
    assert [(d["filename"], d["reason"]) for d in found.dropped] == [
        ("JPEGImages/2007_000033.jpg", "image is in exclude_split"),
        ("2007_000039.png", "image is in exclude_split"),
    ]
    assert len(caption_file(tmp_path, NAMED)(VOC, None, 0)) == 3


def test_what_hinders_the_exclusion_is_said(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"exclude_split: no file .*nowhere.*exclude_split=null keeps all"
    ):
        caption_file(tmp_path, NAMED, exclude_split=str(tmp_path / "nowhere"))(VOC, None, 0)
    split = split_list(tmp_path, "2007_000033")
    with pytest.raises(ValueError, match=r"2 captions have no 'filename' \(the first is entry 0\)"):
        caption_file(tmp_path, ROWS, exclude_split=split)(VOC, None, 0)
    with pytest.raises(
        ValueError, match="none of 1 captions is left to use .1 x image is in exclude_split"
    ):
        caption_file(tmp_path, NAMED[1:2], exclude_split=split)(VOC, None, 0)


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("a/b/x.jpg", "x"),
        ("C:\\pics\\x.PNG", "x"),
        ("x", "x"),
        ("cam.2024", "cam.2024"),
        ("cam.24.jpeg", "cam.24"),
        ("x.y\r", "x.y"),
    ],
)
def test_stems(filename, expected):
    assert stem(filename) == expected


def test_similar_captions_of_equal_classes_are_left_out(tmp_path):
    rows = [
        {"caption": "a train on the tracks", "classes": ["train"]},
        {"caption": "A train on the tracks.", "classes": ["train"]},
        {"caption": "a red train on the tracks", "classes": ["train"]},
        {"caption": "a train on the tracks", "classes": ["train", "person"]},
    ]
    texts = [
        sorted(p.text for p in caption_file(tmp_path, rows, drop_similar=d)(VOC, None, 0))
        for d in (None, 1.0, 0.8)
    ]
    assert [len(t) for t in texts] == [4, 3, 2]
    assert texts[1] == [
        "a red train on the tracks; train",
        "a train on the tracks; train",
        "a train on the tracks; train person",
    ]
    assert texts[2] == ["a train on the tracks; train", "a train on the tracks; train person"]
    dropped = caption_file(tmp_path, rows, drop_similar=1.0)(VOC, None, 0).dropped
    assert dropped == [
        {
            "reason": "similar to an earlier caption",
            "filename": None,
            "caption": "A train on the tracks.",
        }
    ]


# The paper's recipe


def noun_captions(tmp_path, captions, **kwargs):
    path = tmp_path / "captions.jsonl"
    rows = [
        c if isinstance(c, dict) else {"filename": f"{i:03}.jpg", "caption": c}
        for i, c in enumerate(captions)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return NounCaptions(str(path), **kwargs)


CAPTIONS = ["two men at a table", "the blue sky", "a dog", "a woman with puppies", "", "a boy"]


def test_each_noun_of_a_class_is_a_mention_of_it(tmp_path):
    rows = ["a man and a woman on a couch", "a boy with two women", "a dog"]
    found = noun_captions(tmp_path, rows, at_least=2, repeat_classes=True)(VOC, None, 0)
    assert Counter((p.text, p.class_prompt, p.classes) for p in found) == {
        (f"{rows[0]}; person person sofa", "person person sofa", ("person", "sofa")): 2,
        (f"{rows[1]}; person person", "person person", ("person",)): 1,
        (f"{rows[2]}; dog", "dog", ("dog",)): 2,
    }
    once = noun_captions(tmp_path, rows, at_least=2)(VOC, None, 0)
    assert [p.classes for p in once] == [p.classes for p in found]
    assert {p.class_prompt for p in once} == {"person sofa", "person", "dog"}


def test_captions_of_equal_classes_are_compared_however_often_they_mention_them(tmp_path):
    rows = ["a small dog on the green grass", "a small dog, dog on the green grass"]
    found = noun_captions(tmp_path, rows, repeat_classes=True, at_least=1, drop_similar=0.8)
    assert [p.class_prompt for p in found(VOC, None, 0)] == ["dog"]


def test_classes_come_from_nouns_and_others_keep_theirs(tmp_path):
    found = noun_captions(tmp_path, CAPTIONS, at_least=1)(VOC, None, 0)
    assert set(found) == {
        make_prompt("two men at a table", ["person", "dining table"]),
        make_prompt("a dog", ["dog"]),
        make_prompt("a woman with puppies", ["person", "dog"]),
        make_prompt("a boy", ["person"]),
    }
    assert [(d["filename"], d["caption"], d["reason"]) for d in found.dropped] == [
        ("001.jpg", "the blue sky", "names no class"),
        ("004.jpg", "", "names no class"),
    ]


def test_captions_are_repeated_until_every_class_has_its_number(tmp_path):
    """person stands in 3 captions, dog in 2, dining table in 1."""
    found = Counter(
        p.text.partition(";")[0]
        for p in noun_captions(tmp_path, CAPTIONS, at_least=10)(VOC, None, 5)
    )
    assert found == {"two men at a table": 10, "a dog": 5, "a woman with puppies": 5, "a boy": 4}


def test_the_set_is_balanced_for_the_embedded_classes(tmp_path):
    captions = [
        f"picture {i} of {name}" for k, name in enumerate(SHAPES.names) for i in range(3 + 5 * k)
    ]
    captions += [f"an apple beside two bricks, {i}" for i in range(4)]
    found = noun_captions(tmp_path, captions, at_least=60)(SHAPES, None, 0)
    asked = Counter(name for p in found for name in p.classes)
    assert asked.keys() == set(SHAPES.names) and min(asked.values()) >= 60
    assert max(asked.values()) <= 1.7 * min(asked.values()), (
        asked
    )  # rounding up, and captions of two classes
    part = Counter(
        name
        for p in noun_captions(tmp_path, captions, at_least=60)(SHAPES, 240, 0)
        for name in p.classes
    )
    assert part.keys() == set(SHAPES.names) and min(part.values()) >= 15


def test_some_of_the_prompts_are_chosen_by_the_seed(tmp_path):
    source = noun_captions(tmp_path, CAPTIONS, at_least=20)
    assert source(VOC, 12, 3) == source(VOC, 12, 3) == source(VOC, None, 3)[:12]
    assert source(VOC, 12, 3) != source(VOC, 12, 4)
    assert Counter(source(VOC, None, 3)) == Counter(source(VOC, None, 4))


def test_appended_class_words_are_no_nouns_of_the_caption(tmp_path):
    rows = [
        {
            "filename": "a.jpg",
            "caption": "a boy with his dog; dog person",
            "class_prompt": "dog person",
        }
    ]
    assert noun_captions(tmp_path, rows, at_least=1)(VOC, None, 0) == [
        make_prompt("a boy with his dog", ["person", "dog"])
    ]


def test_validation_images_can_be_left_out_of_the_recipe(tmp_path):
    split = split_list(tmp_path, "000", "005")
    found = noun_captions(tmp_path, CAPTIONS, at_least=2, exclude_split=split)(VOC, None, 0)
    assert Counter(p.text for p in found) == {
        "a dog; dog": 1,
        "a woman with puppies; person dog": 2,
    }
    assert Counter(d["reason"] for d in found.dropped) == {
        "image is in exclude_split": 2,
        "names no class": 2,
    }


def test_phrases_without_a_class(tmp_path):
    found = noun_captions(tmp_path, ["a hot dog", "a dog"], at_least=1, other_meanings=["hot dog"])(
        VOC, None, 0
    )
    assert [p.text for p in found] == ["a dog; dog"] and len(found.dropped) == 1


def test_recipes_that_give_nothing(tmp_path):
    with pytest.raises(
        ValueError, match=r"none of 2 captions is left to use \(2 x names no class\), such as 'sky'"
    ):
        noun_captions(tmp_path, ["sky", "sea"])(VOC, None, 0)
    with pytest.raises(ValueError, match="prompts.at_least=0: 1 "):
        noun_captions(tmp_path, CAPTIONS, at_least=0)
