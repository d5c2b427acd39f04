from collections import Counter

import numpy as np
import pytest

from dd.generators import train_tokenizer
from dd.prompts.prompt import (
    Prompt,
    appended_from,
    check_classes,
    class_words,
    find_words,
    make_prompt,
    repeats,
    split_class_prompt,
    token_spans,
    trim_caption,
    word_places,
)
from dd.taxonomy import Taxonomy, taxonomy

VOC, SHAPES = taxonomy("voc"), taxonomy("shapes")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A real tokenizer in CLIP's format with few merges: class names take several tokens each."""
    captions = [
        "a photo of a gold ring and a pine tree",
        "a car on a carpet",
        "an apple, a tire and a dining table",
    ] * 20
    return train_tokenizer(captions, 30, tmp_path_factory.mktemp("tokenizer"))


def offsets(tokenizer, text, limit=77):
    return tokenizer(
        text, truncation=True, max_length=limit, return_offsets_mapping=True
    ).offset_mapping


# Class-prompt appending


def test_class_words_are_appended_once():
    expected = Prompt(
        "a man at a table; person dining table", "person dining table", ("person", "dining table")
    )
    assert make_prompt("  a man at a table ", ["person", "dining table"]) == expected
    assert make_prompt(expected.text, expected.classes) == expected


def test_repeated_classes_count_once():
    assert (
        make_prompt("two men", ["person", "person", "sofa", "person"]).class_prompt == "person sofa"
    )


def test_repeated_classes_are_kept_where_they_are_asked_for():
    words, classes = "person person sofa", ("person", "sofa")
    expected = Prompt(f"two men on a couch; {words}", words, classes)
    assert make_prompt("two men on a couch", words.split(), repeat=True) == expected
    assert make_prompt(expected.text, words.split(), repeat=True) == expected
    without = make_prompt(expected.text, words.split(), append=False, repeat=True)
    assert without == Prompt("two men on a couch", words, classes)


def test_captions_in_circulation_repeat_their_classes_and_are_not_appended_to():
    prompt = make_prompt("two men on a couch; person person sofa", ["person", "person", "sofa"])
    assert prompt == Prompt(
        "two men on a couch; person person sofa", "person sofa", ("person", "sofa")
    )


def test_a_semicolon_of_the_caption_itself_is_no_appending():
    assert make_prompt("a dog; it barks", ["dog"]).text == "a dog; it barks; dog"


def test_some_of_the_class_words_are_not_all_of_them():
    assert (
        make_prompt("a man beside a car; person", ["person", "car"]).text
        == "a man beside a car; person; person car"
    )


def test_without_appending_the_words_are_taken_off():
    plain = Prompt("a man at a table", "person dining table", ("person", "dining table"))
    assert make_prompt("a man at a table", plain.classes, append=False) == plain
    assert (
        make_prompt("a man at a table; person dining table", plain.classes, append=False) == plain
    )


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
    [
        ("a car on a carpet", "car"),
        ("on a carpet a car", "car"),
        ("a bush, a bus", "bus"),
        ("scar car", "car"),
        ("car", "car"),
        ("A Car!", "car"),
        ("(car)", "car"),
        ("a gold ring", "gold ring"),
        ("rings, goldring, gold ring", "gold ring"),
    ],
)
def test_classes_are_found_as_whole_words(text, name):
    ((begin, end),) = find_words(text, [name])
    assert text[begin:end].lower() == name
    assert all(not c.isalnum() for c in text[:begin][-1:] + text[end:][:1])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a carpet", "car"),
        ("a bush", "bus"),
        ("a scar", "car"),
        ("gold ringed", "gold ring"),
        ("", "car"),
        ("a dog-friendly car", "dog"),
    ],
)
def test_parts_of_words_are_not_the_class(text, name):
    with pytest.raises(
        ValueError, match=rf"class \['{name}'\] is missing from its prompt.*append=true"
    ):
        find_words(text, [name])


def test_every_missing_class_is_named():
    with pytest.raises(ValueError, match=r"class \['dog', 'cow'\] is missing"):
        find_words("a cat", ["dog", "cat", "cow"])


@pytest.mark.parametrize(
    ("text", "classes", "words"),
    [
        ("a hot dog and a dog", ("dog", "hot dog"), ("16 dog", "2 hot dog")),
        ("a hot dog and a dog", ("dog",), ("16 dog",)),  # a VOC prompt: hot dog is no class there
        ("a power-plant behind potted plants and a plant", ("plant",), ("41 plant",)),
        (
            "two hot dogs",
            ("dog",),
            ("8 dogs",),
        ),  # nowhere else: whoever gave the class means this one
        ("a dog beside a hot dog", ("hot dog", "dog"), ("15 hot dog", "2 dog")),
        ("two hot dogs, three dogs", ("dog", "hot dog"), ("20 dogs", "4 hot dogs")),
        ("a gold ring, a ring", ("ring", "gold ring"), ("15 ring", "2 gold ring")),
        ("Gold Rings and Rings", ("ring", "gold ring"), ("15 Rings", "0 Gold Rings")),
        (
            "a person person and a person",
            ("person", "person person"),
            ("22 person", "2 person person"),
        ),
        ("people at dining-tables", ("dining table", "person"), ("10 dining-tables", "0 people")),
        (
            "a tv, a monitor and a tv monitor",
            ("tv monitor", "tv", "monitor"),
            ("22 tv monitor", "2 tv", "8 monitor"),
        ),
        ("dogs and a dog", ("dog",), ("0 dogs",)),
        ("sheep, mice", ("mouse", "sheep"), ("7 mice", "0 sheep")),
        ("glasses", ("glass", "glasses"), None),  # a name that is another's plural stays what it is
        ("a hot dog", ("dog", "hot dog"), None),
    ],
)
def test_each_class_stands_at_its_own_word_the_longest_name_first(text, classes, words):
    if words is None:
        with pytest.raises(ValueError, match=rf"class \['{classes[0]}'\] is missing"):
            find_words(text, classes)
        return
    assert tuple(f"{a} {text[a:b]}" for a, b in find_words(text, classes)) == words


def test_words_are_sought_in_a_part_of_the_text():
    text = "a dog and a cat; cat dog"
    assert (
        find_words(text, ["cat", "dog"])
        == find_words(text, ["cat", "dog"], 0, 15)
        == [(12, 15), (2, 5)]
    )
    assert find_words(text, ["cat", "dog"], start=17) == [(17, 20), (21, 24)]
    with pytest.raises(ValueError, match=r"\['cat'\] is missing from its prompt 'a dog and a '"):
        find_words(text, ["cat"], 0, 12)


@pytest.mark.parametrize(
    "classes",
    [
        ("dog", "hot dog"),
        ("hot dog", "dog"),
        ("dining", "table", "dining table"),
        ("person", "person person"),
    ],
)
def test_class_words_alone_are_counted_off(classes):
    """Names side by side may read as another name; their order says which is meant."""
    text = make_prompt("things", classes).class_prompt
    spans = find_words(text, classes)
    assert [text[a:b] for a, b in spans] == list(classes)
    assert spans == sorted(spans) and all(
        a[1] + 1 == b[0] for a, b in zip(spans, spans[1:], strict=False)
    )


def test_where_the_words_of_a_prompt_stand():
    prompt = make_prompt("a hot dog; and a dog", ["hot dog", "dog"])
    places = word_places(prompt.text, prompt.class_prompt)
    assert {k: prompt.text[a:b] for k, (a, b) in places.items()} == {
        "caption": "a hot dog; and a dog",
        "appended": "hot dog dog",
    }
    assert word_places("a hot dog and a dog", "hot dog dog") == {"caption": (0, 19)}


def test_letters_that_grow_when_lowered_do_not_move_the_words():
    assert find_words("İstanbul, a car", ["car"]) == [(12, 15)]


# Token positions


@pytest.mark.parametrize(
    "classes", [("gold ring",), ("apple", "gold ring", "pine tree"), ("tire", "brick"), ("heart",)]
)
@pytest.mark.parametrize("caption", ["a photo of things", "Gold RINGS on a carpet, 3 of them!"])
def test_token_spans_spell_the_class_names(tokenizer, classes, caption):
    prompt = make_prompt(caption, classes)
    for text, start in (
        (prompt.class_prompt, 0),
        (prompt.text, appended_from(prompt.text, prompt.class_prompt)),
    ):
        ids = tokenizer(text).input_ids
        spans = token_spans(text, classes, offsets(tokenizer, text), start)
        for name, positions in zip(classes, spans, strict=True):
            spelled = "".join(tokenizer.convert_ids_to_tokens([ids[p] for p in positions]))
            assert spelled.replace("</w>", " ").strip() == name
            assert positions == list(range(positions[0], positions[-1] + 1))
        flat = [p for positions in spans for p in positions]
        assert (
            flat == sorted(set(flat)) and 0 not in flat and flat[-1] == len(ids) - 2
        )  # neither start nor end token


@pytest.mark.parametrize("caption", ["gold rings beside a ring", "a ring of trees, a gold ring"])
def test_tokens_of_nested_names_of_a_caption(tokenizer, caption):
    classes = ("ring", "gold ring")
    prompt = make_prompt(caption, classes)
    ids, at = tokenizer(prompt.text).input_ids, offsets(tokenizer, prompt.text)
    spelled = {}
    for words, place in word_places(prompt.text, prompt.class_prompt).items():
        spans = token_spans(prompt.text, classes, at, *place)
        pieces = [
            "".join(tokenizer.convert_ids_to_tokens([ids[p] for p in span])) for span in spans
        ]
        spelled[words] = [p.replace("</w>", " ").strip() for p in pieces]
        assert not set(spans[0]) & set(spans[1]) and len(spans[1]) > len(spans[0])
    gold = "gold rings" if "rings" in caption else "gold ring"
    assert spelled == {"caption": ["ring", gold], "appended": ["ring", "gold ring"]}


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
            ValueError,
            match=f"'gold ring' is cut off: .*longer than the text encoder's {limit} tokens. "
            "Shorten",
        ):
            token_spans(text, ["gold ring"], cut)
    assert len(token_spans(text, ["gold ring"], whole)[0]) >= 2


def spelled(tokenizer, text, positions):
    ids = tokenizer(text).input_ids
    pieces = tokenizer.convert_ids_to_tokens([ids[p] for p in positions])
    return "".join(pieces).replace("</w>", " ").strip()


@pytest.mark.parametrize("caption", ["a photo of things", "two gold rings, a dog with a dog; nice"])
def test_each_mention_of_a_repeated_class_is_read(tokenizer, caption):
    mentions = ["gold ring", "dog", "gold ring", "hot dog", "dog", "dog"]
    prompt = make_prompt(caption, mentions, repeat=True)
    assert prompt.classes == ("gold ring", "dog", "hot dog")
    words = class_words(prompt.class_prompt, prompt.classes)
    assert list(words) == mentions
    for text, start in (
        (prompt.class_prompt, 0),
        (prompt.text, appended_from(prompt.text, prompt.class_prompt)),
    ):
        spans = token_spans(text, words, offsets(tokenizer, text), start)
        found = [spelled(tokenizer, text, positions) for positions in spans]
        assert found == ["gold ring gold ring", "dog dog dog", "hot dog"]
        assert all(len(set(positions)) == len(positions) for positions in spans)


def test_one_word_that_stands_for_two_mentions_counts_once(tokenizer):
    text = "a dog on a car"
    once = token_spans(text, ["dog", "car"], offsets(tokenizer, text))
    assert token_spans(text, ["dog", "dog", "car"], offsets(tokenizer, text)) == once


# Class prompts, lists of prompts


@pytest.mark.parametrize(
    ("class_prompt", "classes", "expected"),
    [
        ("person sofa", ("person", "sofa"), ["person", "sofa"]),
        ("person person sofa", ("person", "sofa"), ["person", "person", "sofa"]),
        ("hot dog dog hot dog", ("hot dog", "dog"), ["hot dog", "dog", "hot dog"]),
        ("dog hot dog dog", ("dog", "hot dog"), ["dog", "hot dog", "dog"]),
        ("dining table", ("dining", "table"), ["dining", "table"]),
        ("table dining table", ("dining table", "table"), ["dining table", "table"]),  # other order
        ("M8 bolt (steel) M8 bolt (steel)", ("M8 bolt (steel)",), ["M8 bolt (steel)"] * 2),
    ],
)
def test_classes_as_often_as_the_class_prompt_names_them(class_prompt, classes, expected):
    assert list(class_words(class_prompt, classes)) == expected


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


# Balancing


def test_captions_are_repeated_by_the_rarest_of_their_classes():
    captions = [("person",)] * 5 + [("person", "sofa")] * 2 + [("sofa",)] + [("dog",)]
    # n: person 7, sofa 3, dog 1; ceil(10 / n): 2, 4, 10
    assert repeats(captions, 10) == [2] * 5 + [4] * 2 + [4] + [10]
    assert repeats(captions, 1) == [1] * 9
    assert repeats([], 10) == []


def test_every_class_gets_its_number():
    rng = np.random.default_rng(0)
    captions = [tuple(rng.choice(VOC.names, rng.integers(1, 4), replace=False)) for _ in range(300)]
    times = repeats(captions, 50)
    asked = Counter(
        name for classes, n in zip(captions, times, strict=True) for name in classes * n
    )
    assert min(asked[name] for name in VOC.names) >= 50
    number = Counter(name for classes in captions for name in classes)
    for classes, n in zip(captions, times, strict=True):  # no more than the rarest class asks for
        assert (n - 1) * min(number[c] for c in classes) < 50 <= n * min(number[c] for c in classes)


# Trimming


def words_up_to(limit):
    return lambda text: len(text.split()) <= limit


@pytest.mark.parametrize("limit", range(4, 12))
def test_a_trimmed_caption_keeps_its_classes(limit):
    prompt = make_prompt("a man, a boy and a dog - at a table", ["person", "dining table"])
    trimmed = trim_caption(prompt, words_up_to(limit))
    assert trimmed.text.endswith("; person dining table") and len(trimmed.text.split()) <= limit
    assert prompt.text.startswith(trimmed.text.partition(";")[0])
    assert (trimmed.classes, trimmed.class_prompt) == (prompt.classes, prompt.class_prompt)


def test_no_comma_and_no_half_word_is_left():
    prompt = make_prompt("a man, a table", ["person"])
    assert trim_caption(prompt, words_up_to(4)).text == "a man, a; person"
    assert trim_caption(prompt, words_up_to(3)).text == "a man; person"
    assert trim_caption(prompt, lambda text: len(text) <= 15).text == "a man; person"


def test_a_class_name_is_not_cut_in_two():
    prompt = make_prompt("a man at a dining table in a room", ["person", "dining table"])
    seen = {
        trim_caption(prompt, words_up_to(limit)).text.partition(";")[0] for limit in range(4, 11)
    }
    assert {"a man at a dining table", "a man at a"} <= seen and not any(
        text.endswith("dining") for text in seen
    )


def test_what_cannot_be_trimmed():
    prompt = make_prompt("a man at a table", ["person", "dining table"])
    assert trim_caption(prompt, words_up_to(3)) is None
    assert trim_caption(make_prompt("x", ["person"]), words_up_to(1)) is None


def test_without_appending_a_class_of_the_caption_stays():
    prompt = make_prompt("a dog sits beside a cat on the grass", ["dog", "cat"], append=False)
    assert trim_caption(prompt, words_up_to(7)).text == "a dog sits beside a cat on"
    assert trim_caption(prompt, words_up_to(5)) is None


def test_repeated_class_words_are_class_words():
    prompt = make_prompt(
        "two men on a long couch; person person sofa", ["person", "person", "sofa"]
    )
    assert trim_caption(prompt, words_up_to(6)).text == "two men on; person person sofa"
