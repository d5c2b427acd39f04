import hashlib
import json

import pytest

from dd.prompts.prompt import Prompt
from dd.store.samples import (
    Sample,
    append_records,
    make_plan,
    open_units,
    plan_lines,
    read_plan,
    read_records,
    sample_seed,
)
from dd.taxonomy import Taxonomy

PETS = Taxonomy("pets", ["cat", "dog", "guinea pig"])


def prompts(number):
    return [
        Prompt(
            f"a cat and a guinea pig {i}; cat guinea pig", "cat guinea pig", ("cat", "guinea pig")
        )
        for i in range(number)
    ]


def write(folder, plan):
    (folder / "plan.jsonl").write_text("".join(plan_lines(plan)), encoding="utf-8")


def test_seeds_are_the_first_63_bits_of_the_hash():
    digest = hashlib.sha256(b"7,000003").hexdigest()
    assert sample_seed(7, "000003") == int(digest, 16) >> (256 - 63)
    assert sample_seed(7, "000003", 2) == int(hashlib.sha256(b"7,000003,2").hexdigest(), 16) >> (
        256 - 63
    )


def test_seeds_differ_by_run_sample_and_attempt_and_fit_torch():
    seeds = {
        sample_seed(run, f"{i:06d}", attempt)
        for run in range(3)
        for i in range(200)
        for attempt in range(2)
    }
    assert len(seeds) == 3 * 200 * 2
    assert all(0 <= s < 2**63 for s in seeds)
    assert max(seeds) > 2**62


def test_a_plan_depends_on_nothing_but_its_arguments():
    plan = make_plan(prompts(5), PETS, 7, 2)
    assert plan == make_plan(prompts(5), PETS, 7, 2)
    assert plan[:3] == make_plan(prompts(3), PETS, 7, 2)
    assert [s.id for s in plan] == ["000000", "000001", "000002", "000003", "000004"]
    assert [s.unit for s in plan] == [0, 0, 1, 1, 2]
    assert [s.seed for s in plan] == [sample_seed(7, s.id) for s in plan]
    assert plan[1] == Sample(
        "000001",
        "a cat and a guinea pig 1; cat guinea pig",
        "cat guinea pig",
        ("cat", "guinea pig"),
        (1, 3),
        plan[1].seed,
        0,
    )


def test_another_unit_size_keeps_the_seeds():
    assert [s.seed for s in make_plan(prompts(5), PETS, 7, 1)] == [
        s.seed for s in make_plan(prompts(5), PETS, 7, 4)
    ]


def test_a_class_outside_the_taxonomy_is_refused():
    with pytest.raises(ValueError, match=r"unknown class \['cow'\]"):
        make_plan([Prompt("a cow; cow", "cow", ("cow",))], PETS, 0, 1)


# \x85 and \u2028 end a line for str.splitlines, and captions from the web hold them
@pytest.mark.parametrize(
    "caption",
    ["a cat", "ein Kätzchen 猫 🐈", 'a "cat" \\ {', "line\nbreak", "a\u2028cat", "a\x85cat"],
)
def test_a_plan_read_again_is_equal(tmp_path, caption):
    plan = make_plan([Prompt(f"{caption}; cat", "cat", ("cat",)), *prompts(2)], PETS, 3, 2)
    write(tmp_path, plan)
    assert read_plan(tmp_path) == plan


@pytest.mark.parametrize(
    "name", ["../../etc/cron", "/tmp/x", "a/b", "..", "a\\b", "", "a\0b", "x" * 300, ".hidden", 7]
)
def test_a_plan_whose_ids_would_leave_the_folder_is_refused(tmp_path, name):
    row = {
        "id": name,
        "prompt": "a",
        "class_prompt": "a",
        "classes": ["cat"],
        "class_ids": [1],
        "seed": 1,
        "unit": 0,
    }
    (tmp_path / "plan.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"plan\.jsonl, line 1 is damaged"):
        read_plan(tmp_path)


def test_a_folder_without_a_plan_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no plan.jsonl. Make one with generate.py"):
        read_plan(tmp_path)


def test_records_of_all_workers_are_read_by_id(tmp_path):
    assert read_records(tmp_path) == {}
    append_records(tmp_path, "0", [{"id": "000000", "unit": 0}, {"id": "000001", "unit": 0}])
    append_records(tmp_path, "1", [{"id": "000002", "unit": 1}])
    append_records(tmp_path, "0", [{"id": "000001", "unit": 0, "attempt": 1}])
    records = read_records(tmp_path)
    assert records == {
        "000000": {"id": "000000", "unit": 0},
        "000001": {"id": "000001", "unit": 0, "attempt": 1},
        "000002": {"id": "000002", "unit": 1},
    }


def test_a_torn_last_line_is_ignored_and_not_merged_with_the_next(tmp_path):
    lines = [
        json.dumps({"id": f"00000{i}", "name": "ä" * i}, ensure_ascii=False).encode() + b"\n"
        for i in range(3)
    ]
    whole = b"".join(lines)
    path = tmp_path / "records" / "0.jsonl"
    path.parent.mkdir()
    for cut in range(
        len(whole) - len(lines[2]), len(whole)
    ):  # a crash at any byte of the last record
        path.write_bytes(whole[:cut])
        torn = read_records(tmp_path)
        assert {"000000", "000001"} <= torn.keys()
        append_records(tmp_path, "0", [{"id": "000003"}])
        assert read_records(tmp_path) == {**torn, "000003": {"id": "000003"}}
        assert "000002" not in torn or cut == len(whole) - 1  # only the line's end is missing


def test_lines_that_are_no_records_are_ignored(tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "0.jsonl").write_bytes(
        b'[1]\n"text"\n3\n{"unit": 1}\n\xff\xfe\n\n{"id": "000001"}\n'
    )
    assert read_records(tmp_path) == {"000001": {"id": "000001"}}


def test_open_units_are_whole_and_do_not_depend_on_what_is_done():
    plan = make_plan(prompts(7), PETS, 0, 3)
    units = [plan[:3], plan[3:6], plan[6:]]
    assert open_units(plan, {}) == units
    for done in range(2 ** len(plan)):
        records = {s.id: {} for i, s in enumerate(plan) if done >> i & 1}
        assert open_units(plan, records) == [
            u for u in units if any(s.id not in records for s in u)
        ]
