import json
from collections import Counter

import numpy as np
import pytest

from dd.diffusion import train_tokenizer
from dd.prompts import (
    CaptionFile,
    Prompt,
    TemplatePrompts,
    appended_from,
    check_classes,
    find_words,
    make_prompt,
    split_class_prompt,
    token_spans,
)
from dd.taxonomy import Taxonomy, taxonomy

VOC, SHAPES = taxonomy("voc"), taxonomy("shapes")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A real tokenizer in CLIP's format with few merges: class names take several tokens each."""
    captions = ["a photo of a gold ring and a pine tree", "a car on a carpet", "an apple, a tire and a dining table"] * 20
    return train_tokenizer(captions, 30, tmp_path_factory.mktemp("tokenizer"))


def offsets(tokenizer, text, limit=77):
    return tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True).offset_mapping


# Class-prompt appending


def test_class_words_are_appended_once():
    expected = Prompt("a man at a table; person dining table", "person dining table", ("person", "dining table"))
    assert make_prompt("  a man at a table ", ["person", "dining table"]) == expected
    assert make_prompt(expected.text, expected.classes) == expected


def test_repeated_classes_count_once():
    assert make_prompt("two men", ["person", "person", "sofa", "person"]).class_prompt == "person sofa"


def test_captions_in_circulation_repeat_their_classes_and_are_not_appended_to():
    prompt = make_prompt("two men on a couch; person person sofa", ["person", "person", "sofa"])
    assert prompt == Prompt("two men on a couch; person person sofa", "person sofa", ("person", "sofa"))


def test_a_semicolon_of_the_caption_itself_is_no_appending():
    assert make_prompt("a dog; it barks", ["dog"]).text == "a dog; it barks; dog"


def test_some_of_the_class_words_are_not_all_of_them():
    assert make_prompt("a man beside a car; person", ["person", "car"]).text == "a man beside a car; person; person car"


def test_without_appending_the_words_are_taken_off():
    plain = Prompt("a man at a table", "person dining table", ("person", "dining table"))
    assert make_prompt("a man at a table", plain.classes, append=False) == plain
    assert make_prompt("a man at a table; person dining table", plain.classes, append=False) == plain


@pytest.mark.parametrize(("caption", "classes"), [("", ["dog"]), ("   ", ["dog"]), ("a dog", [])])
def test_a_prompt_needs_a_caption_and_a_class(caption, classes):
    with pytest.raises(ValueError, match="needs a caption and at least one class"):
        make_prompt(caption, classes)


def test_where_the_appended_words_begin():
    prompt = make_prompt("a car and a dog", ["dog", "car"])
    assert prompt.text[appended_from(prompt.text, prompt.class_prompt) :] == "dog car"
    assert appended_from("a car and a dog", "dog car") == 0
    assert appended_from("a car and a dog car", "dog car") == 0


def test_where_repeated_class_words_begin():
    prompt = make_prompt("a person on a sofa; person person sofa", ["person", "sofa"])
    start = appended_from(prompt.text, prompt.class_prompt)
    assert prompt.text.index(";") < start <= prompt.text.index("; person") + 2


# Class words in the text


@pytest.mark.parametrize(
    ("text", "name"),
    [("a car on a carpet", "car"), ("on a carpet a car", "car"), ("a bush, a bus", "bus"), ("scar car", "car"), ("car", "car"),
     ("A Car!", "car"), ("(car)", "car"), ("a gold ring", "gold ring"), ("rings, goldring, gold ring", "gold ring")],
)  # fmt: skip
def test_classes_are_found_as_whole_words(text, name):
    ((begin, end),) = find_words(text, [name])
    assert text[begin:end].lower() == name
    assert all(not c.isalnum() for c in text[:begin][-1:] + text[end:][:1])


@pytest.mark.parametrize(
    ("text", "name"),
    [("a carpet", "car"), ("a bush", "bus"), ("a scar", "car"), ("gold rings", "gold ring"), ("", "car")],
)
def test_parts_of_words_are_not_the_class(text, name):
    with pytest.raises(ValueError, match=rf"class \['{name}'\] is missing from its prompt.*append=true"):
        find_words(text, [name])


def test_every_missing_class_is_named():
    with pytest.raises(ValueError, match=r"class \['dog', 'cow'\] is missing"):
        find_words("a cat", ["dog", "cat", "cow"])


def test_each_class_is_sought_after_the_one_before_it():
    text = "a dog and a cat; cat dog"
    assert [text[a:b] for a, b in find_words(text, ["cat", "dog"])] == ["cat", "dog"]
    assert find_words(text, ["cat", "dog"]) == [(12, 15), (21, 24)]
    assert find_words(text, ["cat", "dog"], start=17) == [(17, 20), (21, 24)]
    assert find_words("a dog and a cat", ["cat", "dog"]) == [(12, 15), (2, 5)]


def test_letters_that_grow_when_lowered_do_not_move_the_words():
    assert find_words("İstanbul, a car", ["car"]) == [(12, 15)]


# Token positions


@pytest.mark.parametrize("classes", [("gold ring",), ("apple", "gold ring", "pine tree"), ("tire", "brick"), ("heart",)])
@pytest.mark.parametrize("caption", ["a photo of things", "Gold RINGS on a carpet, 3 of them!"])
def test_token_spans_spell_the_class_names(tokenizer, classes, caption):
    prompt = make_prompt(caption, classes)
    for text, start in ((prompt.class_prompt, 0), (prompt.text, appended_from(prompt.text, prompt.class_prompt))):
        ids = tokenizer(text).input_ids
        spans = token_spans(text, classes, offsets(tokenizer, text), start)
        for name, positions in zip(classes, spans, strict=True):
            spelled = "".join(tokenizer.convert_ids_to_tokens([ids[p] for p in positions]))
            assert spelled.replace("</w>", " ").strip() == name
            assert positions == list(range(positions[0], positions[-1] + 1))
        flat = [p for positions in spans for p in positions]
        assert flat == sorted(set(flat)) and 0 not in flat and flat[-1] == len(ids) - 2  # neither start nor end token


def test_words_of_several_tokens_are_the_case_that_is_tested(tokenizer):
    lengths = {name: len(tokenizer.tokenize(name)) for name in ("gold ring", "heart", "car")}
    assert lengths == {"gold ring": 3, "heart": 5, "car": 1}


def test_a_class_inside_another_word_gets_no_token(tokenizer):
    text = "a carpet under a car"
    ((position, *rest),) = token_spans(text, ["car"], offsets(tokenizer, text))
    begin, end = offsets(tokenizer, text)[position]
    assert begin >= 17 and end <= 20 and all(offsets(tokenizer, text)[p][0] >= 17 for p in rest)


def test_a_class_cut_off_by_the_limit_is_refused(tokenizer):
    text = "a photo of a very nice red apple and a gold ring"
    whole = offsets(tokenizer, text)
    for limit in range(4, len(whole)):
        cut = offsets(tokenizer, text, limit)
        if cut[-2][1] == len(text):
            continue
        with pytest.raises(
            ValueError, match=f"'gold ring' is cut off: .*longer than the text encoder's {limit} tokens. Shorten"
        ):
            token_spans(text, ["gold ring"], cut)
    assert len(token_spans(text, ["gold ring"], whole)[0]) >= 2


# Template prompts


def template_prompts(**kwargs):
    settings = {
        "templates": ["a photo of {things} in {light} light", "{things}, {light}"],
        "conditions": {"light": ["dark", "bright"]},
        "counts": [0.4, 0.4, 0.2],
    }
    return TemplatePrompts(**{**settings, **kwargs})


def test_templates_name_their_classes_and_conditions():
    prompts = template_prompts()(SHAPES, 60, 0)
    assert len(prompts) == 60
    for prompt in prompts:
        find_words(prompt.text.rpartition(";")[0], prompt.classes)
        assert prompt.text.endswith("; " + " ".join(prompt.classes))
        assert ("dark" in prompt.text) != ("bright" in prompt.text)
        assert "an apple" in prompt.text or "apple" not in prompt.classes
    assert {"photo" in p.text for p in prompts} == {True, False}


def test_template_prompts_follow_the_seed():
    assert template_prompts()(SHAPES, 20, 1) == template_prompts()(SHAPES, 20, 1)
    assert template_prompts()(SHAPES, 20, 1) != template_prompts()(SHAPES, 20, 2)
    assert template_prompts()(SHAPES, 50, 1)[:20] == template_prompts()(SHAPES, 20, 1)


@pytest.mark.parametrize("counts", [[1.0], [0.4, 0.4, 0.2], [0, 0, 1]])
def test_every_class_is_asked_for_equally_often(counts):
    for seed in range(5):
        prompts = template_prompts(counts=counts)(SHAPES, 400, seed)
        asked = Counter(name for prompt in prompts for name in prompt.classes)
        assert asked.keys() == set(SHAPES.names)
        assert max(asked.values()) - min(asked.values()) <= 2


def test_numbers_of_classes_follow_their_weights():
    numbers = Counter(len(p.classes) for p in template_prompts(counts=[2, 2, 1])(SHAPES, 1000, 0))
    np.testing.assert_allclose([numbers[n] for n in (1, 2, 3)], [400, 400, 200], atol=60)


def test_more_classes_than_there_are():
    prompts = template_prompts(counts=[0, 0, 1])(Taxonomy("two", ["cat", "dog"]), 5, 0)
    assert all(sorted(p.classes) == ["cat", "dog"] for p in prompts)


def test_without_appending_the_template_stands_alone():
    assert all(";" not in p.text for p in template_prompts(append=False)(SHAPES, 10, 0))


@pytest.mark.parametrize("empty", ["templates", "counts"])
def test_empty_template_settings_are_refused(empty):
    with pytest.raises(ValueError, match="templates and counts must not be empty"):
        template_prompts(**{empty: []})


def test_a_mistyped_placeholder_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'\{thing\} in \{light\}' asks for 'thing'; known: things, light"):
        template_prompts(templates=["{thing} in {light}"])(SHAPES, 1, 0)


# Prompt files


def caption_file(tmp_path, content, **kwargs):
    path = tmp_path / "prompts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return CaptionFile(str(path), **kwargs)


ROWS = [
    {"caption": "a man at a table", "classes": ["person", "dining table"]},
    {"caption": "a brown dog", "classes": ["dog"]},
    {"filename": "x.jpg", "caption": "two men on a sofa; person person sofa", "class_prompt": "person person sofa"},
]
READ = {
    Prompt("a man at a table; person dining table", "person dining table", ("person", "dining table")),
    Prompt("a brown dog; dog", "dog", ("dog",)),
    Prompt("two men on a sofa; person person sofa", "person sofa", ("person", "sofa")),
}


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
        "a man at a table", "a brown dog", "two men on a sofa"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("[]", "holds no prompts"),
        ("[1, 2", "neither a JSON list nor JSON lines"),
        ('{"caption": "a dog", "classes": ["dog"]}\nnot json', "neither a JSON list nor JSON lines"),
        ("[1, 2]", "entry 0: need 'caption' and 'classes'"),
        ([ROWS[1], {"caption": "a dog"}], "entry 1: need 'caption' and 'classes' .*got .*a dog"),
        ([{"classes": ["dog"]}], "entry 0: need 'caption'"),
        ([ROWS[1], {"caption": "a cow and a unicorn", "classes": ["cow", "unicorn"]}],
         r"prompt 1 .*unknown class \['unicorn'\]; taxonomy 'voc' allows: aeroplane, "),
        ([{"caption": "a unicorn", "class_prompt": "cow unicorn"}], "unknown class at 'unicorn'; allowed: aeroplane, "),
        ([{"caption": "a dog", "classes": []}], "at least one class"),
        ([{"caption": "a dog", "class_prompt": ""}], "at least one class"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        caption_file(tmp_path, content)(VOC, 1, 0)


@pytest.mark.parametrize("row", [{"caption": 5, "classes": ["dog"]}, {"caption": "a dog", "class_prompt": None}])
def test_values_of_another_kind_name_their_entry(tmp_path, row):
    with pytest.raises(ValueError, match="entry 1"):
        caption_file(tmp_path, [ROWS[1], row])(VOC, 1, 0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompts\.path: no file .*nowhere\.json"):
        CaptionFile(str(tmp_path / "nowhere.json"))(VOC, 1, 0)


def test_class_prompts_are_split_by_the_longest_name():
    names = Taxonomy("nested", ["table", "dining table", "dining", "tv monitor"])
    assert split_class_prompt("dining table table dining tv monitor", names) == [
        "dining table",
        "table",
        "dining",
        "tv monitor",
    ]
    assert split_class_prompt("  person   dining table ", VOC) == ["person", "dining table"]
    with pytest.raises(ValueError, match="unknown class at 'tv set'"):
        split_class_prompt("person tv set", VOC)


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="no prompts"):
        check_classes([], VOC)
