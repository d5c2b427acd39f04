"""Templates over the class list: balance, conditions, amounts, classes that occur together."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from dd.data.datasets import encode_mask
from dd.prompts.groups import read_groups
from dd.prompts.mixed import MixedPrompts
from dd.prompts.prompt import find_words
from dd.prompts.templates import TemplatePrompts
from dd.store.provenance import sha256
from dd.store.samples import make_plan, plan_lines
from dd.taxonomy import Taxonomy, taxonomy

CONF = Path(__file__).parents[2] / "conf" / "prompts"
SHAPES, VOC = taxonomy("shapes"), taxonomy("voc")


def from_conf(name, **changes):
    settings = {
        k: v
        for k, v in yaml.safe_load((CONF / f"{name}.yaml").read_text()).items()
        if k != "_target_"
    }
    return TemplatePrompts(**{**settings, **changes})


@pytest.mark.parametrize(
    ("number", "seed", "expected"),
    [
        (64, 0, "a436acda7d24ee71f7b6280b754e5cdf315bb06998a23640e8101a33c19b5991"),
        (64, 1, "c985ee0609774060cbc172762c882ed634c0d7f17ba14e95ba7fe083693b351d"),
        (512, 0, "37ee63b6c340e4c542c1ab76c04d87070ef3270d628428ca07cbe0b17fc478b8"),
    ],
)
def test_the_plan_of_the_embedded_benchmark_stays_what_it_was(number, seed, expected):
    plan = make_plan(from_conf("shapes")(SHAPES, number, seed), SHAPES, seed, 32)
    assert sha256("".join(plan_lines(plan)).encode()) == expected


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


def test_templates_without_an_article():
    settings = {"templates": ["a photo of {things}"], "conditions": {}, "article": False}
    found = Counter(p.text for p in template_prompts(**settings, counts=[1.0])(SHAPES, 20, 0))
    assert found == {f"a photo of {name}; {name}": 2 for name in SHAPES.names}
    settings |= {"counts": [0, 1], "materials": {name: ["old"] for name in SHAPES.names}}
    for prompt in template_prompts(**settings)(SHAPES, 8, 0):
        first, second = prompt.classes
        assert prompt.text == f"a photo of old {first} and old {second}; {first} {second}"


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
    with pytest.raises(ValueError, match=rf"prompts\.{empty}.*(one at least|not all 0)"):
        template_prompts(**{empty: []})


def test_a_mistyped_placeholder_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'\{thing\} in \{light\}' asks for 'thing'; known: things, light"
    ):
        template_prompts(templates=["{thing} in {light}"])(SHAPES, 1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": ["a {light} photo"]}, "names no class; {things} stands for the classes"),
        ({"templates": ["{things} {"]}, "template '{things} {'"),
        ({"templates": ["{things.x}"]}, "asks for 'things.x'"),
        ({"counts": [0, 0]}, "not all 0"),
        ({"counts": [1, -1]}, "weights of 0 or more"),
        ({"conditions": {"light": []}}, "prompts.conditions: light: a list of words"),
        ({"conditions": {"light": [True, "dark"]}}, "prompts.conditions: light: .*in quotes"),
        ({"conditions": {"light": "dark"}}, "prompts.conditions: light: a list of words"),
        ({"materials": {"apple": "red"}}, "prompts.materials: apple: a list of words"),
        ({"amounts": [0]}, "prompts.amounts.*whole number from 1 to 999, or text, .*such as 2"),
        ({"amounts": [1.5]}, "prompts.amounts"),
        ({"amounts": [True]}, "prompts.amounts"),
        ({"amounts": [" "]}, "prompts.amounts"),
    ],
)
def test_settings_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        template_prompts(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"materials": {"pear": ["ripe"]}}, r"unknown class \['pear'\]"),
        ({"plural_names": {"pear": "pears"}}, r"unknown class \['pear'\]"),
        ({"groups": [["apple", "pear"]]}, r"unknown class \['pear'\]"),
        ({"groups": ["apple", "tire"]}, "a list of lists of class names"),
        ({"groups": [[]]}, "holds no class"),
    ],
)
def test_classes_that_the_taxonomy_does_not_have(change, message):
    with pytest.raises(ValueError, match=message):
        template_prompts(**change)(SHAPES, 1, 0)


def test_templates_need_a_number():
    with pytest.raises(ValueError, match="num_images"):
        template_prompts()(SHAPES, None, 0)


# A site: empty conditions, amounts, materials


def test_empty_words_leave_no_gap():
    prompts = template_prompts(
        templates=["{things} {light}, outside"], conditions={"light": ["", "at night"]}
    )(SHAPES, 30, 0)
    captions = [p.text.partition(";")[0] for p in prompts]
    assert not any("  " in c or " ," in c for c in captions)
    assert {"night" in c for c in captions} == {True, False}


def test_amounts_bring_the_plural():
    names = Taxonomy(
        "n", ["pine tree", "knife", "sheep", "bus", "skis", "apple", "worker", "safety goggles"]
    )
    source = template_prompts(
        templates=["{things}"],
        conditions={},
        counts=[1],
        amounts=[1, 2, 12, "several"],
        plural_names={"worker": "crew members"},
    )
    found = {p.text.partition(";")[0] for p in source(names, 600, 0)}
    assert found == {
        *("a pine tree", "two pine trees", "12 pine trees", "several pine trees"),
        *("a knife", "two knives", "12 knives", "several knives"),
        *("a sheep", "two sheep", "12 sheep", "several sheep"),
        *("a bus", "two buses", "12 buses", "several buses"),
        *("skis", "two skis", "12 skis", "several skis"),
        *("safety goggles", "two safety goggles", "12 safety goggles", "several safety goggles"),
        *("an apple", "two apples", "12 apples", "several apples"),
        *("a worker", "two crew members", "12 crew members", "several crew members"),
    }


def test_materials_belong_to_their_class():
    source = template_prompts(
        counts=[0, 1], materials={"tire": ["old", "worn"], "brick": ["old"]}, amounts=[1, 2]
    )
    text = " ".join(p.text for p in source(SHAPES, 200, 0))
    assert all(
        re.search(rf"\b{words}\b", text)
        for words in ("an old tire", "a worn tire", "two old bricks")
    )
    assert not re.search(
        r"\b(a|two) (tires?|bricks?)\b|\b(old|worn) (?!tire|brick)|worn brick", text
    )


def test_the_site_file_is_balanced_and_follows_its_conditions():
    prompts = from_conf("site")(SHAPES, 400, 3)
    asked = Counter(name for p in prompts for name in p.classes)
    assert asked.keys() == set(SHAPES.names) and max(asked.values()) - min(asked.values()) <= 2
    text = " ".join(p.text for p in prompts)
    for words in yaml.safe_load((CONF / "site.yaml").read_text())["conditions"].values():
        assert all(word in text for word in words)
    assert "several" in text and "three" in text
    assert all(p.text.endswith("; " + p.class_prompt) for p in prompts)


# Classes that occur together


GROUPS = [["apple", "banana", "leaf"], ["leaf", "pine tree"], ["brick", "tire"]]


def test_only_classes_of_a_group_share_a_prompt():
    prompts = template_prompts(groups=GROUPS, counts=[0.2, 0.4, 0.4])(SHAPES, 300, 0)
    together = {frozenset(p.classes) for p in prompts if len(p.classes) > 1}
    assert together and all(any(t <= set(g) for g in GROUPS) for t in together)
    assert {"apple", "banana", "leaf"} in together and {"brick", "tire"} in together
    assert {p.classes for p in prompts if {"heart", "gold ring"} & set(p.classes)} == {
        ("heart",),
        ("gold ring",),
    }


@pytest.mark.parametrize(
    "groups", [GROUPS, [["apple", n] for n in SHAPES.names[1:]], [list(SHAPES.names)]]
)
@pytest.mark.parametrize("counts", [[1.0], [0.4, 0.4, 0.2], [0, 0, 1]])
def test_groups_leave_the_classes_balanced(groups, counts):
    prompts = template_prompts(groups=groups, counts=counts)(SHAPES, 400, 1)
    asked = Counter(name for p in prompts for name in p.classes)
    assert asked.keys() == set(SHAPES.names) and max(asked.values()) - min(asked.values()) <= 2
    assert all(len(set(p.classes)) == len(p.classes) for p in prompts)


def test_groups_are_drawn_by_their_weight():
    often = [["apple", "banana"]] * 9 + [["apple", "leaf"]]
    source = template_prompts(groups=[*often, list(SHAPES.names)], counts=[0, 1])
    pairs = Counter(p.classes[1] for p in source(SHAPES, 2000, 0) if p.classes[0] == "apple")
    assert pairs["banana"] > 2 * pairs["leaf"] > 0


def test_groups_are_read_from_a_caption_file(tmp_path):
    rows = [
        {"caption": "two men on a couch"},
        {"caption": "a woman on a sofa"},
        {"caption": "sky"},
        {"caption": "x; cat dog", "class_prompt": "cat dog"},
        {"caption": "y", "classes": ["cow"]},
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_groups(str(tmp_path / "captions.jsonl"), VOC) == {
        frozenset({"person", "sofa"}): 2,
        frozenset(): 1,
        frozenset({"cat", "dog"}): 1,
        frozenset({"cow"}): 1,
    }
    (tmp_path / "captions.jsonl").write_text('{"caption": "x", "classes": ["unicorn"]}')
    with pytest.raises(ValueError, match=r"entry 0: unknown class \['unicorn'\]"):
        read_groups(str(tmp_path / "captions.jsonl"), VOC)


def test_groups_are_counted_in_masks(tmp_path):
    for i, values in enumerate([[0, 1, 3], [1, 3, 255], [0, 8]]):
        (tmp_path / f"{i}.png").write_bytes(encode_mask(np.array([values], np.uint8)))
    found = read_groups(str(tmp_path), SHAPES)
    assert found == {frozenset({"apple", "leaf"}): 2, frozenset({"pine tree"}): 1}
    prompts = template_prompts(groups=str(tmp_path), counts=[0, 1])(SHAPES, 100, 0)
    assert {frozenset(p.classes) for p in prompts if len(p.classes) == 2} == {
        frozenset({"apple", "leaf"})
    }


def test_masks_and_files_that_cannot_be_counted(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such caption file or folder of masks"):
        read_groups(str(tmp_path / "nowhere"), SHAPES)
    with pytest.raises(FileNotFoundError, match="no masks"):
        read_groups(str(tmp_path), SHAPES)
    (tmp_path / "a.png").write_bytes(encode_mask(np.array([[11]], np.uint8)))
    with pytest.raises(
        ValueError, match=r"a\.png has the value 11; taxonomy 'shapes' has classes 0 to 10"
    ):
        read_groups(str(tmp_path), SHAPES)


# Mixtures


def test_a_mixture_has_its_shares():
    sources = {n: template_prompts(templates=[f"{n} {{things}}"]) for n in ("first", "second")}
    mixed = MixedPrompts(sources, {"first": 3, "second": 1})
    for number in (1, 2, 7, 100):
        starts = Counter(p.text.split()[0] for p in mixed(SHAPES, number, 0))
        assert sum(starts.values()) == number and abs(starts["first"] - 0.75 * number) <= 0.5
    assert mixed(SHAPES, 20, 0) == mixed(SHAPES, 20, 0) != mixed(SHAPES, 20, 1)
    order = [p.text.split()[0] for p in mixed(SHAPES, 100, 0)]
    assert len(set(order[:20])) == 2  # shuffled


def test_mixtures_that_make_no_sense():
    source = template_prompts()
    with pytest.raises(ValueError, match="the same names"):
        MixedPrompts({"a": source}, {"b": 1})
    with pytest.raises(ValueError, match="a positive weight"):
        MixedPrompts({"a": source}, {"a": 0})
    with pytest.raises(ValueError, match="append=False, but source a has append=True"):
        MixedPrompts({"a": source}, {"a": 1}, append=False)
    with pytest.raises(ValueError, match="num_images"):
        MixedPrompts({"a": source}, {"a": 1})(SHAPES, None, 0)
