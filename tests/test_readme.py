"""README.md says what was measured and what exists."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from dd import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_result_tables_are_those_of_the_results_files(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    assert tables["main"]() == 0, "python benchmarks/tables.py writes the tables of benchmarks/results/ into README.md"
    changed = {**json.loads((ROOT / "benchmarks/results/shapes.json").read_text()), "mask_miou": 1.25}
    assert tables["tables"](changed) not in README and "1.2" in tables["tables"](changed)


@pytest.mark.parametrize("experiment", sorted(set(re.findall(r"experiment=(\w+)", README))))
def test_every_experiment_named_exists(experiment):
    assert (ROOT / "conf" / "experiment" / f"{experiment}.yaml").is_file()


def commands():
    """The root scripts' commands in README and docs; templates ("...", <a>, $A) left out."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```(?:bash)?\n(.*?)```", path.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s#\s.*", "", line).strip()
                if (found := re.match(r"python (generate|train|evaluate)\.py (.*)", line)) and not re.search(
                    "\\.\\.\\.|…|<|\\$", line
                ):
                    yield found[1], found[2]


@pytest.mark.parametrize("command", sorted(set(commands())), ids=lambda c: f"{c[0]} {c[1]:.60}")
def test_every_command_shown_exists(command):
    root, arguments = command
    config.check_overrides(root, [config.quoted(a) for a in shlex.split(arguments) if a != "-m"])


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", README))))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()
