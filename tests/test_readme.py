"""README.md and the page of results say what was measured and what exists."""

import itertools
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from dd import config
from dd.evaluation.budget import Prices
from dd.evaluation.budget_results import Measured, differences, skipped, target_costs
from dd.evaluation.statistics import Score, interval

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text() + "<!-- the end -->"
FIRST_WORLD = (ROOT / "docs" / "first-world.md").read_text()


def test_the_result_tables_are_those_of_the_results_files(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    assert tables["main"]() == 0, (
        "python -m benchmarks.tables writes the tables of benchmarks/results/ into README.md, "
        "docs/results.md and docs/first-world.md"
    )
    changed = {
        **json.loads((ROOT / "benchmarks/results/first_world_shapes.json").read_text()),
        "mask_miou": 1.25,
    }
    assert tables["tables"](changed) not in FIRST_WORLD and "1.2" in tables["tables"](changed)


def results(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def test_what_a_study_says_follows_from_what_it_measured():
    study = results("first_world_budget")
    found = Measured(study["arms"], study["domains"], study["seeds"], study["draws"])
    prices = Prices(**study["cost"]["prices"])
    targets = target_costs(found, study["cost"]["seconds"], prices)
    again = {"differences": differences(found), "skipped": skipped(found), "targets": targets}
    again = json.loads(json.dumps(again))
    stored = {**study, **study["cost"]}
    assert again == {key: stored[key] for key in again}
    assert not any(row["images"] for row in again["differences"]), "the page says: seeds alone"


def test_tables_pair_the_seeds():
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    found = tables["ablations"](results("first_world_shapes"), ["shapes", "shapes_shift"])
    rows = {row[0]: row for row in found}
    assert rows["ema=off"][-2:] == ["−0.9 [−1.2, −0.6]", "−0.8 [−0.8, −0.7] †"]  # 0.87, 0.76
    assert rows["band=off"][-2] == "+0.1 [−0.7, 0.9]" and rows["as shipped"][-2:] == ["-", "-"]
    skip = tables["skip"]
    exact = {"low": 60.0, "high": 60.0}
    runs = [exact, {"low": 64.0, "high": None}]
    found = {"runs": runs, "median": exact, "interval": None, "shown": True}
    assert skip(found) == "60 (60, at least 64)"
    assert (
        skip({**found, "interval": {"low": 20.0, "high": 70.4}}) == "60 [20, 70] (60, at least 64)"
    )
    assert skip({**found, "shown": False}) == "not shown (60, at least 64)" and skip(None) == "-"
    exact = {"low": -60.0, "high": -60.0}
    found |= {"runs": [exact], "median": exact, "interval": {"low": -70.0, "high": -20.0}}
    assert skip(found) == "costs 60 [20, 70] (costs 60)"


def measured_groups():
    """Lists of arms, {seed: mIoU} each, that were scored on the same images."""
    shapes, site, study = (
        results("first_world_shapes"),
        results("first_world_site"),
        results("first_world_budget"),
    )
    parts = [shapes, shapes["shots_from_shapes_shift"]]
    for domain in shapes["synthetic_only"]:
        arms = [shapes["synthetic_only"], *shapes["ablations"].values()]
        arms += [
            {d: [run["miou"][d] for run in r["runs"]] for d in shapes["synthetic_only"]}
            for r in shapes["recipes"]
        ]
        arms += [at for part in parts for at in part["finetuned"].values()]
        arms += [at for part in parts for at in part["real_only"].values()]
        yield [dict(enumerate(at[domain])) for at in arms]
        arms = [at for arm in study["arms"].values() for at in arm.values()]
        yield [dict(enumerate(at[domain])) for at in arms]
    yield [arm["miou"] for arm in site["arms"].values()]


def said_between(text: str, begin: str, end: str) -> list[tuple[str, ...]]:
    """(difference, low, high) of each interval in the sentences, tables left out."""
    lines = text[text.index(begin) : text.index(end)].replace("−", "-").splitlines()
    sentences = "\n".join(line for line in lines if not line.startswith("|"))
    return re.findall(r"([-+]?\d+\.\d)(?: mIoU)?\s\[(-?\d+\.\d),\s+(-?\d+\.\d)\]", sentences)


def test_every_interval_in_the_sentences_is_that_of_a_pair_of_arms():
    known = set()
    for arms in measured_groups():
        for one, other in itertools.permutations(arms, 2):
            pair = [{k: Score(v) for k, v in runs.items()} for runs in (one, other)]
            at = interval(*pair)
            if at.low is not None:
                ends = (at.value, at.low, at.high)
                known.add(tuple(f"{v:.1f}".replace("-0.0", "0.0") for v in ends))
    page = said_between(FIRST_WORLD, "**How to read the differences**", "![photographs of the site")
    retold = said_between(RESULTS, "## The study of the first world", "<!-- the end -->")
    assert len(page) > 40 and retold
    wrong = [found for found in page + retold if (found[0].lstrip("+"), *found[1:]) not in known]
    assert not wrong, wrong


@pytest.mark.parametrize("experiment", sorted(set(re.findall(r"experiment=(\w+)", README))))
def test_every_experiment_named_exists(experiment):
    assert (ROOT / "conf" / "experiment" / f"{experiment}.yaml").is_file()


def commands():
    """The root scripts' commands in README and docs; templates ("...", <a>, $A) left out."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```(?:bash)?\n(.*?)```", path.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s#\s.*", "", line).strip()
                if (
                    found := re.match(r"python (generate|train|evaluate)\.py (.*)", line)
                ) and not re.search("\\.\\.\\.|…|<|\\$", line):
                    yield found[1], found[2]


@pytest.mark.parametrize("command", sorted(set(commands())), ids=lambda c: f"{c[0]} {c[1]:.60}")
def test_every_command_shown_exists(command):
    root, arguments = command
    config.check_overrides(root, [config.quoted(a) for a in shlex.split(arguments) if a != "-m"])


def links():
    """(page, link) of each link in README and docs that leads to a file or to a place in one."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text()):
            yield str(page.relative_to(ROOT)), link


@pytest.mark.parametrize(("page", "link"), sorted(set(links())))
def test_every_link_leads_somewhere(page, link):
    file, _, place = link.partition("#")
    target = (ROOT / page).parent / file if file else ROOT / page
    assert target.exists()
    heads = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if place else []
    assert not place or place in [
        re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads
    ]
