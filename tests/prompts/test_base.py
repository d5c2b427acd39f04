"""The contract of every source of prompts (:class:`dd.prompts.base.PromptSource`)."""

import json

import pytest

from dd.prompts.captions import CaptionFile, NounCaptions
from dd.prompts.coco import CocoCaptions
from dd.prompts.llm import LanguageModelPrompts
from dd.prompts.mixed import MixedPrompts
from dd.prompts.prompt import Prompts
from dd.prompts.templates import TemplatePrompts
from dd.taxonomy import Taxonomy

HALL = Taxonomy("hall", ("pallet", "worker"), {"worker": ("man",)})
ENDLESS = {"templates", "llm", "mixed"}


def written(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def captions(folder):
    rows = [
        {"caption": "a pallet by a wall", "classes": ["pallet"], "filename": "1.jpg"},
        {"caption": "a man and two pallets", "classes": ["worker", "pallet"], "filename": "2.jpg"},
        {"caption": "a red pallet", "classes": ["pallet"], "filename": "3.jpg"},
    ]
    return written(folder / "captions.json", rows)


def coco(folder, append):
    ids = [1, 2]
    instances = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in ids],
        "annotations": [{"image_id": i, "category_id": i} for i in ids],
        "categories": [{"id": 1, "name": "pallet"}, {"id": 2, "name": "worker"}],
    }
    told = {"annotations": [{"image_id": i, "caption": f"view {i} of a hall"} for i in ids]}
    files = written(folder / "told.json", told), written(folder / "instances.json", instances)
    return CocoCaptions(*files, append=append)


def templates(append):
    texts = ["a photo of {things}", "{things} in a hall"]
    return TemplatePrompts(templates=texts, conditions={}, counts=[0.6, 0.4], append=append)


SOURCES = {
    "file": lambda folder, url, append: CaptionFile(captions(folder), append=append),
    "nouns": lambda folder, url, append: NounCaptions(captions(folder), 3, append=append),
    "coco": lambda folder, url, append: coco(folder, append),
    "templates": lambda folder, url, append: templates(append),
    "llm": lambda folder, url, append: LanguageModelPrompts(
        base_url=url, model="tiny", cache=str(folder / "answers.jsonl"), append=append
    ),
    "mixed": lambda folder, url, append: MixedPrompts(
        {"a": templates(append), "b": CaptionFile(captions(folder), append=append)},
        {"a": 2, "b": 1},
        append,
    ),
}


@pytest.mark.parametrize("append", [True, False])
@pytest.mark.parametrize("name", SOURCES)
def test_a_source_keeps_its_contract(name, append, chat, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    source = SOURCES[name](tmp_path, chat.url, append)
    assert source.append is append
    found = source(HALL, 9, 0)
    assert isinstance(found, Prompts) and len(found) == 9
    assert found == SOURCES[name](tmp_path, chat.url, append)(HALL, 9, 0)
    for prompt in found:
        assert prompt.classes and set(prompt.classes) <= set(HALL.names)
        assert prompt.class_prompt == " ".join(prompt.classes)
        assert prompt.text.endswith(f"; {prompt.class_prompt}") is append
    for row in found.dropped:
        assert {"reason", "filename", "caption"} <= row.keys()
    for without in (None, 0):
        if name in ENDLESS:
            with pytest.raises(ValueError, match="num_images"):
                source(HALL, without, 0)
        else:
            assert set(source(HALL, without, 0)) >= set(found)
