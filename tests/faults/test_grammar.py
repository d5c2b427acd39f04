"""Every setting with values of every kind, every file of ours with wrong content: a command works,
or says on one screen what is wrong. No foreign traceback, signal, hang, or 3 GB; and no result of
damaged files that looks like a sound one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from dd.stages.prepare_shapes import prepare_shapes
from tests.faults import grammar

ROOT = Path(__file__).parents[2]
LOOK = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
NUMBER = [pytest.param(25, id="some"), pytest.param(700, marks=pytest.mark.full, id="many")]


class Commands:
    """A sound folder, and commands in copies of it, which all lie at the place where it was
    made."""

    def __init__(self, folder: Path, process):
        self.case, self.world, self.process = folder / "case", folder / "world", process

    def run(self, argv: list[str]) -> dict:
        self.process.stdin.write(json.dumps({"argv": argv, "folder": str(self.case)}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def copy(self) -> Path:
        shutil.rmtree(self.case, ignore_errors=True)
        return Path(shutil.copytree(self.world, self.case))


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grammar")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment |= {"PYTHONWARNINGS": "ignore::FutureWarning"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.commands"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        made = Commands(folder, process)
        made.case.mkdir()
        prepare_shapes(made.case / "data", sizes={"train": 6, "tune": 4, "test": 5})
        for argv in grammar.WORLD:
            done = made.run(argv)
            assert done["code"] == 0, (argv, done)
        made.case.rename(made.world)
        yield made
        process.stdin.close()


def check(done: dict) -> None:
    assert done["code"] in range(6), done
    assert "Traceback (most recent call last)" not in done["said"], done
    assert done["code"] == 0 or done["said"].strip(), done
    assert max(map(len, done["said"].splitlines()), default=0) < 3000, done
    assert done["mebibytes"] < 3 << 10, done


def results(folder: Path) -> dict[str, bytes]:
    """What a command leaves that somebody would use: masks, scores, records of trainings."""
    files = [*folder.glob("data/synthetic/*/masks/*/*.png"), *folder.glob("outputs/new/run.json")]
    files += [
        *folder.glob("outputs/**/metrics.json"),
        *folder.glob("data/synthetic/*/sweeps/*.json"),
    ]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("examples", NUMBER)
def test_settings(commands, examples):
    @given(grammar.typed())
    @settings(max_examples=examples, **LOOK)
    def run(case):
        name, argument = case
        folder = commands.copy()
        argument = argument.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        done = commands.run([*grammar.COMMANDS[name], argument])
        check(done)
        key, equals, value = argument.partition("=")
        if (
            done["code"] == 0
            and name == "train"
            and equals
            and value.isdecimal()
            and (folder / "outputs/new/config.yaml").is_file()
        ):
            assert str(grammar.recorded(folder, key)) == value, (argument, done)

    run()


@pytest.mark.parametrize("examples", NUMBER)
def test_content(commands, examples):
    @given(grammar.content())
    @settings(max_examples=examples, **LOOK)
    def run(case):
        name, pattern, change, _ = case
        folder = commands.copy()
        for path in folder.glob(pattern):
            path.write_bytes(change(path.read_bytes()))
        check(commands.run(grammar.COMMANDS[name]))

    run()


@pytest.mark.parametrize("examples", NUMBER)
def test_bytes(commands, examples):
    sound = {}

    @given(grammar.flipped())
    @settings(max_examples=examples, **LOOK)
    def run(case):
        name, pattern, change = case
        if name not in sound:
            folder = commands.copy()
            assert commands.run(grammar.COMMANDS[name])["code"] == 0
            sound[name] = results(folder)
        folder = commands.copy()
        path = sorted(folder.glob(pattern))[0]
        path.write_bytes(change(path.read_bytes()))
        done = commands.run(grammar.COMMANDS[name])
        check(done)
        if done["code"] == 0 and name in (
            "label",
            "sweep",
            "chosen",
            "self_train",
            "evaluate",
            "audit",
        ):
            assert results(folder) == sound[name], (name, path, done)

    run()


def test_every_pattern_is_of_a_file(commands):
    """What is changed above is there, and what reads it works on the sound folder."""
    lost = [p for p in [*grammar.FILES, *grammar.BYTES] if not any(commands.world.glob(p))]
    assert lost == []
    for name, argv in grammar.COMMANDS.items():
        commands.copy()
        done = commands.run(argv)
        check(done)
        assert done["code"] == 0, (name, done)
