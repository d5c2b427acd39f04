"""The check of a plan's prompts before the first image, against a generator that counts words."""

import io
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from dd.generators import TextToImage
from dd.prompts.captions import NounCaptions
from dd.prompts.check import check_spans, print_summary, summarise, within_limit
from dd.prompts.prompt import Prompts, make_prompt
from dd.prompts.templates import TemplatePrompts
from dd.store.samples import make_plan
from dd.taxonomy import taxonomy

VOC, SHAPES = taxonomy("voc"), taxonomy("shapes")


class WordCounter:
    """Each word a token, a start and an end token; ``full_prompt`` asks for the class words in
    the prompt itself."""

    def __init__(self, limit=10):
        self.token_limit, self.asked = limit, []

    def token_count(self, text):
        self.asked.append(text)
        return len(text.split()) + 2

    def spans(self, sample):
        missing = [name for name in sample.classes if name not in sample.prompt]
        if missing:
            raise ValueError(f"class {missing} is missing from its prompt {sample.prompt!r}")


def prompts(*captions, classes=("person", "dining table")):
    return Prompts([make_prompt(c, classes) for c in captions])


def test_prompts_at_the_limit_pass_as_they_are():
    given = prompts("a man at a", "a man")  # 4 + 3 words + 2
    assert within_limit(given, WordCounter(9)) == given


def test_all_long_prompts_are_counted_and_the_first_are_listed():
    given = prompts(
        *[f"number {i} of many long captions here" for i in range(8)],
        "short",
        "number 0 of many long captions here",
    )
    with pytest.raises(
        ValueError, match=r"9 of 10 prompts \(8 different\) are longer than the 10 tokens"
    ) as error:
        within_limit(given, WordCounter())
    message = str(error.value)
    assert (
        message.count("12 tokens: number") == 5
        and "number 0" in message
        and "number 7" not in message
    )
    assert (
        "prompts_over_limit=trim" in message
        and "short" not in message.split("The first:")[1].split("Shorten")[0]
    )


def test_a_prompt_whose_class_words_alone_would_be_cut_is_found():
    """The caption fits the limit; the class words at the end of the prompt do not."""
    given = prompts("a man at a long old table")
    assert WordCounter().token_count("a man at a long old table") <= 10
    with pytest.raises(ValueError, match="class words at their ends would be cut off"):
        within_limit(given, WordCounter())


def test_captions_are_trimmed_at_words_and_keep_their_classes():
    given = Prompts(
        prompts("a man at a long old table", "a man", "a man at a long old table"),
        [{"reason": "x"}],
    )
    found = within_limit(given, WordCounter(), "trim")
    assert [p.text for p in found] == [
        "a man at a long; person dining table",
        "a man; person dining table",
    ] + ["a man at a long; person dining table"]
    assert [p.classes for p in found] == [p.classes for p in given]
    assert (found.trimmed, found.dropped) == (2, [{"reason": "x"}])


@pytest.mark.parametrize("over_limit", ["refuse", "trim"])
def test_too_many_classes_are_refused_in_any_case(over_limit):
    given = prompts("x", classes=VOC.names)
    with pytest.raises(ValueError, match="1 of 1 prompts.*23 tokens|tokens of class words alone"):
        within_limit(given, WordCounter(), over_limit)


def test_what_cannot_be_trimmed_is_refused():
    with pytest.raises(ValueError, match="cannot be trimmed without losing a class"):
        within_limit(prompts("a man"), WordCounter(5), "trim")


def test_each_text_is_counted_once():
    generator = WordCounter()
    within_limit(prompts(*["a man"] * 50), generator)
    assert len(generator.asked) == 2


def test_missing_class_words_are_listed_together():
    given = [make_prompt(f"thing {i}", ["dog"], append=False) for i in range(7)] + [
        make_prompt("a dog", ["dog"])
    ]
    with pytest.raises(ValueError, match="7 different prompts cannot be used") as error:
        check_spans(make_plan(given, VOC, 0, 4), WordCounter())
    assert str(error.value).count("is missing") == 5
    check_spans(make_plan(given[-1:], VOC, 0, 4), WordCounter())


@pytest.fixture
def summary():
    given = prompts("a man", "a man", "A man!", classes=["person"]) + prompts(
        "two men on a couch", classes=["person", "sofa"]
    )
    dropped = [{"reason": "names no class", "filename": "7.jpg", "caption": "the [blue] sky"}] * 2
    dropped += [{"reason": "image is in exclude_split", "filename": "8.jpg", "caption": "a dog"}]
    return summarise(Prompts(given, dropped, 1), VOC, WordCounter())


def test_the_summary_counts(summary):
    assert summary["prompts"] == 4 and summary["multi_class"] == 1
    assert {k: v for k, v in summary["classes"].items() if v} == {"person": 4, "sofa": 1}
    assert list(summary["classes"]) == list(VOC.names)
    assert (summary["different"], summary["different_words"]) == (3, 2)
    assert summary["most_frequent"] == ("a man; person", 2)
    assert (
        summary["longest"][0] == (9, "two men on a couch; person sofa")
        and summary["token_limit"] == 10
    )
    assert (
        summary["dropped"] == {"names no class": 2, "image is in exclude_split": 1}
        and summary["trimmed"] == 1
    )


@pytest.mark.parametrize("width", [40, 100, 200])
def test_the_summary_is_printed(summary, width):
    out = io.StringIO()
    print_summary(summary, Console(file=out, width=width))
    text = " ".join(out.getvalue().split())
    parts = (
        ["prompts 4", "25 %", "classes without a prompt"]
        if width == 40
        else [
            "with more than one class 25 %",
            "different 3, 1 of them but for case, punctuation",
            "most frequent 2 x a man; person",
            "longest 9 of 10 tokens: two men on a couch; person sofa",
            "caption trimmed to the limit 1",
            "captions left out 2: names no class",
            "7.jpg 'the [blue] sky'",
            "1: image is in exclude_split",
            "classes without a prompt aeroplane, bicycle",
            "person 4",
            "sofa 1",
        ]
    )
    assert all(part in text for part in parts), text


# With the embedded generator: plans of every kind of prompt are balanced, checked by counting


@pytest.fixture(scope="module")
def generator():
    return TextToImage(model="embedded", self_resolution=16, full_prompt="appended")


def balanced(found, generator):
    """{class: prompts} of the plan that is made from these prompts, after the check of every one
    of them."""
    plan = make_plan(within_limit(found, generator, "trim"), SHAPES, 0, 8)
    check_spans(plan, generator)
    return Counter(name for sample in plan for name in sample.classes)


def test_a_site_in_words_is_a_balanced_plan(generator):
    settings = yaml.safe_load((Path(__file__).parents[2] / "conf/prompts/site.yaml").read_text())
    settings.pop("_target_")
    groups = [["apple", "banana", "leaf"], ["brick", "tire"], ["leaf", "pine tree"]]
    for change in ({}, {"groups": groups}):
        asked = balanced(TemplatePrompts(**settings | change)(SHAPES, 200, 0), generator)
        assert asked.keys() == set(SHAPES.names) and max(asked.values()) - min(asked.values()) <= 2


def test_the_papers_recipe_is_a_balanced_plan(generator, tmp_path):
    captions = [
        f"a picture of {name}" for k, name in enumerate(SHAPES.names) for _ in range(1 + 3 * k)
    ]
    captions += ["two apples and a pine tree", "gold rings on a brick", "a grey background"]
    (tmp_path / "captions.json").write_text(json.dumps([{"caption": c} for c in captions]))
    found = NounCaptions(str(tmp_path / "captions.json"), at_least=40)(SHAPES, None, 0)
    asked = balanced(found, generator)
    assert [d["caption"] for d in found.dropped] == ["a grey background"]
    assert (
        asked.keys() == set(SHAPES.names)
        and min(asked.values()) >= 40
        and max(asked.values()) <= 100
    ), asked


def test_a_real_tokenizer_finds_class_words_that_would_be_cut(generator, monkeypatch):
    caption = "a photo of something " * 40
    given = Prompts([make_prompt(caption, ["gold ring", "tire"])])
    with pytest.raises(ValueError, match=f"longer than the {generator.token_limit} tokens"):
        within_limit(given, generator)
    (prompt,) = within_limit(given, generator, "trim")
    assert prompt.text.endswith("; gold ring tire") and len(prompt.text) > 50
    assert generator.token_limit - 8 <= generator.token_count(prompt.text) <= generator.token_limit
    check_spans(make_plan([prompt], SHAPES, 0, 1), generator)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="full_prompt_caption: class .*full_prompt=appended"),
    ):
        # the trimmed caption has no such words of its own
        both = generator.settings.model_copy(update={"full_prompt": True})
        patch.setattr(generator, "settings", both)
        check_spans(make_plan([prompt], SHAPES, 0, 1), generator)
    with pytest.raises(ValueError, match="is cut off"):
        check_spans(make_plan(given, SHAPES, 0, 1), generator)
