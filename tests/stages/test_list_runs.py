"""python -m dd runs: finished, unfinished and damaged runs, and what is none."""

import pytest

from dd.__main__ import main
from dd.stages.list_runs import list_runs
from dd.store.provenance import SETTINGS, write_json

TRAINED = {"source": "synthetic", "root": "pets"}


@pytest.fixture
def outputs(tmp_path):
    write_json(
        tmp_path / "a/seed=0/run.json", {"trained_on": TRAINED, "steps": 540, "supervision": "A"}
    )
    scored = {"data": "pets", "split": "test", "miou": 77.43}
    write_json(tmp_path / "a/seed=0/eval/pets/metrics.json", scored)
    write_json(
        tmp_path / "a/seed=1" / SETTINGS,
        {"identity": {"trained_on": {"source": "real", "root": "cats"}}},
    )
    write_json(
        tmp_path / "b/run.json", {"trained_on": TRAINED, "steps": 5, "supervision": 3, "seconds": 1}
    )
    (tmp_path / "b/run.json").write_text("{")
    write_json(tmp_path / "generator/run.json", {"identity": {}})
    return tmp_path


def test_runs_are_listed_with_what_is_known_of_them(outputs):
    first, second, third = list_runs(outputs)
    assert first == {
        "run": "a/seed=0",
        "trained_on": "synthetic + pets",
        "steps": 540,
        "supervision": "A",
        "scores": {"pets/test": 77.43},
        "unfinished": None,
    }
    assert (second["run"], second["trained_on"]) == ("a/seed=1", "real + cats")
    assert second["unfinished"] == "stopped before its end" and second["steps"] is None
    assert third["run"] == "b" and "is not valid JSON" in third["unfinished"]


def test_the_command(outputs, capsys):
    assert main(["runs", str(outputs)]) == 0
    said = capsys.readouterr().out
    assert (
        "a/seed=0" in said
        and "pets/test 77.4" in said
        and "stopped before" in said
        and "generator" not in said
    )
    (outputs / "empty").mkdir()
    assert (
        main(["runs", str(outputs / "empty")]) == 0
        and "no training run below" in capsys.readouterr().out
    )
    assert main(["runs", str(outputs / "nowhere")]) == 2 and "no folder" in capsys.readouterr().err
