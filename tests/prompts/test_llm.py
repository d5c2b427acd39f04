"""Prompts by a language model, against an endpoint on this machine."""

import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from dd import config
from dd.prompts.answers import Answers, read_answer
from dd.prompts.endpoint import NoAnswer
from dd.prompts.llm import LanguageModelPrompts
from dd.prompts.prompt import find_words
from dd.taxonomy import Taxonomy

CONF = Path(__file__).parents[2] / "conf" / "prompts" / "llm.yaml"
SITE = Taxonomy("site", ("pallet", "forklift", "worker"), {"worker": ("man", "woman")})
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def source(chat, tmp_path, monkeypatch):
    """``make(**settings)``: the source with the settings of its file in conf/, asking the
    endpoint of the test."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    settings = {k: v for k, v in yaml.safe_load(CONF.read_text()).items() if k != "_target_"}
    settings |= {
        "base_url": chat.url,
        "model": "tiny",
        "cache": str(tmp_path / "answers.jsonl"),
        "per_request": 4,
        "seed": 0,
    }
    settings |= {"max_retries": 2, "timeout": 10}
    return lambda **changes: LanguageModelPrompts(**(settings | changes))


def answer(*rows):
    return json.dumps(
        {"prompts": [{"text": text, "classes": list(classes)} for text, *classes in rows]}
    )


# What is asked and what comes of it


def test_captions_are_asked_for_until_there_are_enough(chat, source, tmp_path):
    prompts = source(conditions="a hall, neon light")(SITE, 10, 0)
    assert len(prompts) == 10 and len(chat.asked) == 3 and not prompts.dropped
    for prompt in prompts:
        find_words(prompt.text.partition(";")[0], prompt.classes)
        assert prompt.text.endswith("; " + " ".join(prompt.classes))
    counts = Counter(name for prompt in prompts for name in prompt.classes)
    assert set(counts) == set(SITE.names) and max(counts.values()) - min(counts.values()) <= 2
    for body, headers in chat.asked:
        assert (
            headers["authorization"] == f"Bearer {KEY}"
            and body["model"] == "tiny"
            and body["temperature"] == 1.0
        )
        text = body["messages"][1]["content"]
        assert (
            "The site: a hall, neon light" in text
            and "worker (or: man, woman)" in text
            and "At most 30 words" in text
        )
        schema = body["response_format"]["json_schema"]
        assert schema["strict"] and '"enum": ["pallet", "forklift", "worker"]' in json.dumps(schema)
    assert len({body["seed"] for body, _ in chat.asked}) == 3
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["request"] for row in rows] == [body for body, _ in chat.asked] and {
        r["url"] for r in rows
    } == {chat.url}


def test_what_was_answered_is_not_asked_again(chat, source, monkeypatch):
    first = source()(SITE, 8, 0)
    assert len(chat.asked) == 2
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setitem(sys.modules, "openai", None)  # neither a key nor the client
    offline = source(base_url="http://127.0.0.1:9/v1")
    assert offline(SITE, 8, 0) == first and offline(SITE, 3, 0) == first[:3]
    with pytest.raises(ValueError, match=r"needs openai .*\.\[llm\]"):
        offline(SITE, 9, 0)
    monkeypatch.undo()
    assert source(base_url=chat.url)(SITE, 12, 0)[:8] == first and len(chat.asked) == 3
    assert source(base_url=chat.url)(SITE, 8, 1) != first  # another seed, other questions


def test_settings_that_are_null_are_not_sent(chat, source):
    source(seed=None, temperature=None, json_schema=False)(SITE, 8, 0)
    assert all(body.keys() == {"model", "messages"} for body, _ in chat.asked)
    assert chat.asked[0][0] != chat.asked[1][0]  # without a seed too, no question is asked twice


@pytest.mark.parametrize(
    ("text", "classes", "reason"),
    [
        ("a truck", ["truck"], "unknown class 'truck'"),
        ("a pallet", ["pallet", "forklift"], "does not name its class 'forklift'"),
        ("a dog", [], "names no class"),
        ("  ", ["pallet"], "empty"),
        ("a pallet \x07 \ud800", ["pallet"], "control characters"),
        ("a pallet " + "and so on " * 11, ["pallet"], "longer than 30 words"),
        ("a pallet", "pallet", "not of the form"),
        ("a pallet", [3], "not of the form"),
        (3, ["pallet"], "not of the form"),
    ],
)
def test_a_caption_that_does_not_fit_is_left_out_with_its_reason(
    chat, source, text, classes, reason
):
    rows = [
        {"text": text, "classes": classes},
        {"text": "two pallets in the rain", "classes": ["pallet"]},
    ]
    chat.script = [json.dumps({"prompts": rows})]
    prompts = source()(SITE, 1, 0)
    assert [p.text for p in prompts] == ["two pallets in the rain; pallet"]
    assert len(prompts.dropped) == 1 and reason in prompts.dropped[0]["reason"]
    json.dumps(prompts.dropped, ensure_ascii=False).encode()  # as it is written beside the plan


def test_classes_are_those_that_the_caption_names(chat, source):
    chat.script = [answer(("A woman drives a forklift past pallets.", "worker"), ("a man", "Man"))]
    prompts = source()(SITE, 2, 0)
    assert prompts[0].classes == ("worker", "forklift", "pallet") and prompts[0].text.endswith(
        "pallets; worker forklift pallet"
    )
    assert prompts[1].classes == ("worker",)
    chat.script = [answer(("a man", "worker"), ("a worker and a man", "worker"))]
    bare = source(append=False, model="other")(SITE, 1, 0)
    assert bare[0].text == "a worker and a man" and "append is off" in bare.dropped[0]["reason"]


def test_near_duplicates_are_left_out(chat, source):
    rows = [
        ("a pallet in a hall", "pallet"),
        ("A pallet in a hall!", "pallet"),
        ("a forklift in a hall", "forklift"),
    ]
    chat.script = [
        answer(*rows),
        answer(*rows),
        answer(("a pallet, in a hall", "pallet"), ("wet pallets outside", "pallet")),
    ]
    prompts = source(max_requests=3)(SITE, 3, 0)
    assert [p.text.partition(";")[0] for p in prompts] == [
        "a pallet in a hall",
        "a forklift in a hall",
        "wet pallets outside",
    ]
    assert {d["reason"] for d in prompts.dropped} == {"similar to an earlier caption"} and len(
        prompts.dropped
    ) == 5
    chat.script = [answer(*rows)]
    assert len(source(drop_similar=None, model="other")(SITE, 3, 0)) == 3


# Answers that are no answers

BAD = {
    "": "empty answer",
    "I would rather not.": "not JSON",
    '{"prompts": [{"te': "not JSON",
    "[1]": "not JSON",
    '{"captions": []}': "no list 'prompts'",
    '{"prompts": {}}': "no list 'prompts'",
    '{"prompts": []}': "without captions",
    '{"prompts": [' + "1" * 5000 + "]}": "not JSON",
    '{"prompts": ' + "[" * 100_000 + "}": "not JSON",
}


def test_malformed_answers_are_counted_and_asked_anew(chat, source):
    chat.script = list(BAD)
    prompts = source(max_requests=20)(SITE, 4, 0)
    assert len(prompts) == 4 and len(chat.asked) == len(BAD) + 1
    for dropped, expected in zip(prompts.dropped, BAD.values(), strict=True):
        assert expected in dropped["reason"] and len(dropped["caption"]) <= 300


def test_json_between_other_words_is_read():
    rows = [{"text": "a pallet", "classes": ["pallet"]}]
    fenced = f"Of course!\n```json\n{json.dumps({'prompts': rows})}\n```\nMore?"
    assert read_answer({"text": fenced}) == (rows, None)
    assert "cut off" in read_answer({"text": '{"prompts": [{', "finish": "length"})[1]


@pytest.mark.parametrize(
    "before",
    [
        '<think>hmm {"a": 1}</think>',
        "<think>{a {b} }</think>",
        '<think>first {"prompts": []}, or</think>\n```json\n',
        'As {"text", "classes"}, {"a": {"prompts": []}}: ',
        "{" * 100 + " ",
    ],
)
def test_braces_in_the_words_around_the_json_do_no_harm(before):
    rows = [{"text": "a pallet {of} wood", "classes": ["pallet"]}]
    assert read_answer({"text": f"{before}{json.dumps({'prompts': rows})}"}) == (rows, None)
    assert read_answer({"text": f"{before}{json.dumps({'prompts': rows})} {{done}}"}) == (
        rows,
        None,
    )


@pytest.mark.parametrize(
    "text", ["{" * 300_000, '{"a":' * 50_000, '{"a": "' * 50_000, '{"a": [' + "1, {" * 50_000]
)
def test_an_answer_of_braces_alone_is_given_up_soon(text):
    begin = time.process_time()
    assert read_answer({"text": text}) == ([], "answer is not JSON")
    assert time.process_time() - begin < 5


def test_the_limit_of_attempts_says_what_was_wrong(chat, source, tmp_path):
    chat.script = ["no", answer(("a truck", "truck"), ("a pallet", "pallet")), "no"]
    with pytest.raises(ValueError) as error:
        source(max_requests=3)(SITE, 5, 0)
    for part in (
        "1 of 5 prompts after 3 answers of tiny",
        "2 x answer is not JSON",
        "1 x unknown class 'truck'",
        "prompts.max_requests=6",
        chat.url,
        "answers.jsonl",
    ):
        assert part in str(error.value)
    assert (
        len(source(max_requests=6)(SITE, 5, 0)) == 5 and len(chat.asked) == 4
    )  # the three are not asked again


def test_answers_of_the_cache_are_not_laid_to_the_endpoint(chat, source, tmp_path):
    chat.script = ["no"] * 3
    with pytest.raises(
        ValueError, match=r"0 of 4 prompts after 3 answers of tiny at http.*The answers are in"
    ) as error:
        source(max_requests=3)(SITE, 4, 0)
    assert "already" not in str(error.value)
    cure = "to ask again, move that file away or give another prompts.cache="
    with pytest.raises(
        ValueError, match=f"3 of the 3 answers were already in .*answers.jsonl; {cure}"
    ) as error:
        source(max_requests=3)(SITE, 4, 0)
    assert "3 answers of tiny, none asked for now;" in str(error.value) and chat.url not in str(
        error.value
    )
    assert len(chat.asked) == 3
    chat.script = ["no"] * 5
    with pytest.raises(ValueError, match=f"3 of the 4 answers were already in .*{cure}") as error:
        source(max_requests=4)(SITE, 4, 0)
    assert f"4 answers of tiny, 1 of them asked for now at {chat.url};" in str(error.value)
    with pytest.raises(ValueError, match="4 of the 8 answers were already in") as error:
        source(max_requests=8)(SITE, 4, 0)
    assert "to ask again" not in str(error.value)
    (tmp_path / "answers.jsonl").rename(tmp_path / "away.jsonl")  # the cure
    assert len(source(max_requests=3)(SITE, 4, 0)) == 4


@pytest.mark.parametrize("body_type", ["text/html", "application/json"])
def test_an_address_that_is_no_endpoint(chat, source, tmp_path, body_type):
    chat.body_type = body_type
    bodies = (
        b"<html>welcome</html>",
        b"[]",
        b"null",
        b"",
        b" \n",
        b"\xff\xfe\xff",
        b'{"detail": "welcome"}',
    )
    for body in (*bodies, KEY.encode(), b"x" * 90 + KEY.encode()):
        chat.script = [body]
        with pytest.raises(
            NoAnswer, match=f"{chat.url} answers, but not as a chat completion.*prompts.base_url"
        ) as error:
            source()(SITE, 1, 0)
        assert KEY[:6] not in str(error.value) and ("an empty body" in str(error.value)) == (
            not body.strip()
        )
        assert ("welcome" in str(error.value)) == (b"welcome" in body)
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    "told",
    [{"message": f"overloaded, {KEY}"}, f"overloaded, {KEY}", {"code": f"overloaded, {KEY}"}],
)
def test_an_error_in_an_answer_of_status_200_is_shown(chat, source, tmp_path, told):
    chat.body_type, chat.script = "application/json", [json.dumps({"error": told}).encode()]
    with pytest.raises(
        NoAnswer, match="answers with an error: .*overloaded, <key>.*Answers so far are kept.*later"
    ) as error:
        source()(SITE, 1, 0)
    assert (
        chat.url in str(error.value)
        and "ChatCompletion" not in str(error.value)
        and KEY not in str(error.value)
    )
    assert not (tmp_path / "answers.jsonl").exists()


# The network


def test_too_many_requests_are_waited_for_as_long_as_the_endpoint_says(chat, source, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    chat.script = [(429, {"Retry-After": "7"}), 500]
    assert len(source()(SITE, 4, 0)) == 4 and len(chat.asked) == 3
    assert waits[0] == 7 and 0 < waits[1] < 7


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (
            [(429, {"Retry-After": "1"})] * 3,
            r"asks for fewer requests and to wait 1 s, tried 3 times.*kept.*later",
        ),
        ([500] * 3, r"fails, tried 3 times.*500.*kept"),
        ([0.7] * 3, r"no answer within 0\.2 s, tried 3 times.*prompts\.timeout"),
        ([401], r"refuses the key in OPENAI_API_KEY.*401"),
        ([404], r"404.*ends in /v1.*prompts\.model"),
        ([400], r"refuses the request.*json_schema=false.*seed=null"),
    ],
)
def test_an_endpoint_that_does_not_answer(
    chat, source, monkeypatch, caplog, capfd, tmp_path, steps, expected
):
    caplog.set_level(logging.DEBUG)
    if steps[0] != 0.7:
        monkeypatch.setattr("time.sleep", lambda _: None)
    chat.script = [*steps]
    with pytest.raises(NoAnswer, match=expected) as error:
        source(timeout=0.2 if steps[0] == 0.7 else 10)(SITE, 1, 0)
    assert chat.url in str(error.value) and len(chat.asked) == len(steps)
    seen = [
        str(error.value),
        caplog.text,
        *capfd.readouterr(),
        *(p.read_text() for p in tmp_path.rglob("*") if p.is_file()),
    ]
    assert KEY not in "".join(seen) and (steps[0] == 0.7 or "<key>" in str(error.value))


def test_an_endpoint_that_is_down(source, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    url = "http://127.0.0.1:9/v1"
    with pytest.raises(
        NoAnswer, match=r"http://127.0.0.1:9/v1: no connection, tried 3 times .*base_url"
    ) as error:
        source(base_url=url)(SITE, 1, 0)
    assert isinstance(error.value, ConnectionError) and config.exit_code(error.value) == 2


def test_an_interrupted_run_keeps_its_answers(chat, source, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    whole = source(cache=str(tmp_path / "whole.jsonl"))(SITE, 16, 0)
    chat.asked.clear()
    good = [
        json.loads(line)["answer"]["text"]
        for line in (tmp_path / "whole.jsonl").read_text().splitlines()
    ]
    chat.script = [*good[:2], 500, 500, 500]
    with pytest.raises(NoAnswer, match="Answers so far are kept"):
        source()(SITE, 16, 0)
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write('{"key": "torn')  # and killed while it wrote
    chat.asked.clear()
    assert source()(SITE, 16, 0) == whole and len(chat.asked) == 2


def test_of_two_answers_to_one_request_the_first_counts(tmp_path):
    mine, other = Answers(tmp_path / "a.jsonl"), Answers(tmp_path / "a.jsonl")
    other.keep({"q": 1}, "u", {"text": "theirs"})
    mine.keep({"q": 1}, "u", {"text": "ours"})
    assert mine[{"q": 1}] == other[{"q": 1}] == {"text": "theirs"}
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('3\n{"key": 3}\n{"key": "k", "answer": {"text": null}}\n\xff\n')
    assert Answers(tmp_path / "a.jsonl").found == mine.found


# The key, the address, the settings


@pytest.mark.parametrize("name", [None, "", "MY_KEY"])
def test_without_a_key_none_is_sent(chat, source, monkeypatch, name):
    source(api_key_env=name)(SITE, 1, 0)
    assert KEY not in chat.asked[0][1]["authorization"]
    monkeypatch.setattr("time.sleep", lambda _: None)
    chat.script = [401]
    with pytest.raises(NoAnswer, match="without a key"):
        source(api_key_env=name, model="other")(SITE, 1, 0)


def test_a_key_comes_from_the_variable_that_is_named(chat, source, monkeypatch):
    monkeypatch.setenv("MY_KEY", " mine \n")
    source(api_key_env="MY_KEY")(SITE, 1, 0)
    assert chat.asked[0][1]["authorization"] == "Bearer mine"
    for bad in ("schlüssel", "two words", "a\x07b"):
        monkeypatch.setenv("MY_KEY", bad)
        with pytest.raises(ValueError, match="MY_KEY holds characters") as error:
            source(api_key_env="MY_KEY", model="other")(SITE, 1, 0)
        assert bad not in str(error.value)


@pytest.mark.parametrize(
    "url", ["https://me:hidden@host/v1", "https://host/v1?api-key=hidden", "https://host/v1#hidden"]
)
def test_an_address_holds_no_secret(source, url):
    with pytest.raises(
        ValueError, match=r"base_url=https://host/v1: .*environment variable"
    ) as error:
        source(base_url=url)
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"base_url": "host/v1"}, "base_url"),
        ({"base_url": "ftp://host"}, "base_url"),
        ({"base_url": None}, "base_url"),
        ({"base_url": "http://[::1"}, "base_url"),
        ({"model": ""}, "model"),
        ({"cache": None}, "cache"),
        ({"per_request": 0}, "per_request"),
        ({"max_requests": 0}, "max_requests"),
        ({"max_words": True}, "max_words"),
        ({"max_retries": -1}, "max_retries"),
        ({"timeout": 0}, "timeout"),
        ({"counts": [0]}, "counts"),
        ({"drop_similar": 0.2}, "drop_similar"),
        ({"conditions": ["dark"]}, "conditions"),
    ],
)
def test_settings_that_do_not_fit(source, changes, expected):
    with pytest.raises(ValueError, match=expected):
        source(**changes)


def test_a_number_is_needed(source):
    with pytest.raises(ValueError, match="num_images"):
        source()(SITE, None, 0)


def test_images_of_what_was_written_and_no_trace_of_the_key(
    chat, run, tmp_path, monkeypatch, caplog, capfd
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    chat.script = [
        answer(
            ("an apple", "apple"),
            ("a leaf, a brick" + " and" * 30, "leaf", "brick"),
            ("two bricks", "brick"),
        )
    ]
    settings = (
        "prompts=llm",
        "prompts.model=tiny",
        f"prompts.base_url={chat.url}",
        "prompts.max_words=40",
        f"data_root={tmp_path}",
        "num_images=3",
        "unit_size=3",
        "diffusion.steps=1",
        "prompts_over_limit=trim",
        "device=cpu",
    )
    run("generate", *settings)
    plan = [
        json.loads(line)
        for line in (tmp_path / "synthetic/shapes/plan.jsonl").read_text().splitlines()
    ]
    assert [s["classes"] for s in plan] == [["apple"], ["leaf", "brick"], ["brick"]]
    assert plan[1]["prompt"].startswith("a leaf, a brick and") and plan[1]["prompt"].endswith(
        " and; leaf brick"
    )
    assert (tmp_path / "prompts/shapes/answers.jsonl").is_file() and len(chat.asked) == 1
    monkeypatch.delenv("OPENAI_API_KEY")
    run("generate", *settings)  # goes on with what is there
    assert len(chat.asked) == 1
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 5 and not any(KEY.encode() in p.read_bytes() for p in files)
    assert KEY not in caplog.text + "".join(capfd.readouterr())
