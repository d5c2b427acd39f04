"""The scripts in runs/: every command they give is one that exists, and none undoes another."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from dd import config

ROOT = Path(__file__).parent.parent
STUB = '#!/usr/bin/env bash\n[ "$1" = -c ] || { printf "%q " "$@"; echo; } >>"$CALLS"\n'


@pytest.fixture
def calls(tmp_path):
    """``calls(script)``: the arguments of each ``python`` that a script of runs/ calls, in a copy with nothing else in it."""

    def run(script: str) -> list[list[str]]:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / script).write_bytes((ROOT / "runs" / script).read_bytes())
        for file in ("outputs/shapes/summary.json", "benchmarks/results/shapes.json", "bin/python"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(STUB if file == "bin/python" else "{}")
        (tmp_path / "bin/python").chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
        subprocess.run(["bash", str(tmp_path / "runs" / script)], check=True, env=environment, timeout=60)
        return [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return run


@pytest.mark.parametrize(("script", "trainings"), [("demo.sh", 3), ("shapes.sh", 3 + 2 * 2 * 4 * 3 + 7 * 3)])
def test_every_command_exists_and_none_is_given_twice(calls, script, trainings):
    made = calls(script)
    assert sum(call[0] == "train.py" for call in made) == trainings
    assert len({tuple(call) for call in made}) == len(made)
    for root in ("generate", "train", "evaluate"):
        kinds = {}  # one command of each kind: the same keys, the same experiment
        for call in (c for c in made if c[0] == f"{root}.py"):
            overrides = [config.quoted(a) for a in call[1:]]
            kinds[tuple(a.partition("=")[0] if not a.startswith("experiment") else a for a in overrides)] = overrides
        assert kinds
        for overrides in kinds.values():
            config.check_overrides(root, overrides)
