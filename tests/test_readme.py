"""README.md says what was measured and what exists."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_result_tables_are_those_of_the_results_file():
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    summary = json.loads((ROOT / "benchmarks" / "results" / "shapes.json").read_text())
    shown = README.split(tables["BEGIN"])[1].split(tables["END"])[0].strip()
    assert shown == tables["tables"](summary).strip()


@pytest.mark.parametrize("experiment", sorted(set(re.findall(r"experiment=(\w+)", README))))
def test_every_experiment_named_exists(experiment):
    assert (ROOT / "conf" / "experiment" / f"{experiment}.yaml").is_file()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", README))))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()
