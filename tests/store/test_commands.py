"""How a command is recorded and named: as the user types it."""

import shlex
import sys
from pathlib import Path

import pytest

from dd.store import commands
from dd.store.commands import repeated, same_commands, spelled, typed

TEXT = "run generate.py stage=label (python -m dd verify), python train.py; my_train.py, a/train.py"
MODULE = str(Path(commands.__file__).parents[1] / "__main__.py")


@pytest.mark.parametrize(
    ("argv", "recorded"),
    [
        (["generate.py", "seed=1"], "python generate.py seed=1"),
        (["../dd/train.py", "-m", "a=1,2"], "python ../dd/train.py -m a=1,2"),
        (["/v/bin/dataset-diffusion", "train", "seed=1"], "dataset-diffusion train seed=1"),
        ([r"C:/v/dataset-diffusion.exe", "runs"], "dataset-diffusion runs"),
        ([MODULE, "verify", "my set"], "python -m dd verify 'my set'"),
        (["train.py", 'name="a_b"'], 'python train.py name="a_b"'),
        (["train.py", 'run="o/shots=16,seed=0"'], "python train.py 'run=\"o/shots=16,seed=0\"'"),
    ],
)
def test_a_command_is_recorded_as_it_is_typed(monkeypatch, argv, recorded):
    monkeypatch.setattr(sys, "argv", argv)
    assert typed() == recorded
    given = [a.replace('"', "") for a in argv[1:]]  # quotes that the command puts there itself
    assert [a.replace('"', "") for a in shlex.split(recorded)][-len(given) :] == given


def test_the_folder_that_the_command_found_itself_is_not_recorded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found, other = (f'hydra.searchpath=["file://{tmp_path}/{f}"]' for f in ("conf", "mine"))
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", found])
    assert typed() == "python train.py seed=1"
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", other])
    assert str(tmp_path / "mine") in typed()


def test_commands_of_first_versions_are_repeated_with_python():
    assert repeated("generate.py seed=1") == "python generate.py seed=1"
    for same in ("python generate.py seed=1", "dataset-diffusion generate seed=1"):
        assert repeated(same) == same


@pytest.mark.parametrize("argv", [["generate.py"], [MODULE, "verify"]])
def test_in_a_checkout_messages_name_the_scripts(monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", argv)
    assert spelled(TEXT) == TEXT


@pytest.mark.parametrize(
    ("argv", "word", "checkout"),
    [
        (["/v/bin/dataset-diffusion", "verify"], "dataset-diffusion", True),
        ([MODULE, "generate", "seed=1"], "python -m dd", True),
        ([MODULE, "verify"], "python -m dd", False),
        (["ipykernel_launcher.py"], "python -m dd", False),
    ],
)
def test_elsewhere_they_name_what_is_there(monkeypatch, tmp_path, argv, word, checkout):
    monkeypatch.setattr(sys, "argv", argv)
    if not checkout:
        monkeypatch.setattr(commands, "CHECKOUT", tmp_path)
    said = spelled(TEXT)
    assert said == (
        f"run {word} generate stage=label ({word} verify), {word} train; my_train.py, a/train.py"
    )
    assert same_commands(said) == same_commands(TEXT) != TEXT
