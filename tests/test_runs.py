"""The scripts in runs/: every command they give is one that exists, and none undoes another."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dd import config

ROOT = Path(__file__).parent.parent
# One write for each call: some scripts make several at a time.
STUB = '#!/usr/bin/env bash\n[ "$1" = -c ] || echo "$(printf "%q " "$@")" >>"$CALLS"\n'
FOUND = (
    "objective: 50.0\noverrides:\n- optimizer.learning_rate=0.003\n- "
    "++chosen_on.learning_rate=[]\nchosen_on: []\n"
)


@pytest.fixture
def calls(tmp_path):
    """``calls(script, **environment)``: the arguments of each ``python`` that a script of runs/
    calls, in a copy of that folder with nothing else beside it."""

    def run(script: str, **environment: str) -> list[list[str]]:
        shutil.copytree(ROOT / "runs", tmp_path / "runs")
        lists = "data/shapes_shift/ImageSets/Segmentation/train.txt"
        files = {"bin/python": STUB, "outputs/shapes_label_free_search/best.yaml": FOUND}
        results = ("outputs/shapes/summary.json", "benchmarks/results/shapes.json", lists)
        for file, content in {**dict.fromkeys(results, "{}"), **files}.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(content)
        (tmp_path / "bin/python").chmod(0o755)
        environment |= {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
        }
        script = str(tmp_path / "runs" / script)
        subprocess.run(
            ["bash", script], check=True, env=os.environ | environment, timeout=60, cwd=tmp_path
        )
        return [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return run


def check(made):
    """Each command is given once, and its keys and choices exist."""
    assert len({tuple(call) for call in made}) == len(made)
    for root in ("generate", "train", "evaluate"):
        kinds = {}  # one command of each kind: the same keys, the same experiment
        for call in (c for c in made if c[0] == f"{root}.py"):
            overrides = [config.quoted(a) for a in call[1:] if a != "-m"]
            kinds[
                tuple(
                    a.partition("=")[0] if not a.startswith("experiment") else a for a in overrides
                )
            ] = overrides
        assert kinds
        for overrides in kinds.values():
            config.check_overrides(root, overrides)


TRAININGS = {"demo.sh": 3, "shapes.sh": 3 + 2 * 2 * 4 * 3 + 11 * 3 + 1 + 3, "site.sh": 14 * 3 + 1}


@pytest.mark.parametrize(("script", "trainings"), TRAININGS.items())
def test_every_command_of_the_embedded_benchmark(calls, script, trainings):
    made = calls(script)
    assert sum(call[0] == "train.py" for call in made) == trainings
    check(made)


def test_published_lists_are_handed_to_the_trainings_with_few_images(calls):
    made = calls("voc.sh", MODEL="m", SEGMENTERS="deeplabv3_r50", LISTS="my lists", DATA="data")
    listed = [call for call in made if any(a.endswith("/my lists/${shots}.txt") for a in call)]
    assert {c[2] for c in listed} == {"experiment=paper_finetune", "experiment=paper_real"}
    assert all("shots=92,183,366,732" in call for call in listed) and len(listed) == 2
    check(made)


def test_the_rate_that_was_found_is_the_one_that_is_trained_with_and_says_how(calls):
    """The row without labels: what the search wrote stands in the commands of its trainings."""
    made = calls("shapes.sh", SEEDS="0 1")
    name = "experiment=shapes_label_free"
    search, *trained = [call for call in made if name in call]
    assert "stage=search" in search and "hold_out=64" in search
    found = ["optimizer.learning_rate=0.003", "++chosen_on.learning_rate=[]"]
    assert sorted(call[-4:] for call in trained) == [
        [name, f"seed={seed}", *found] for seed in (0, 1)
    ]


@pytest.mark.parametrize("data", ["voc", "coco"])
def test_every_command_of_the_papers_tables(calls, tmp_path, data):
    (tmp_path / "copy").mkdir()
    made = calls(
        f"{data}.sh",
        MODEL="someone/model",
        REVISION="0" * 40,
        VOC="copy",
        SBD="copy",
        COCO="copy",
        DATA="data",
    )
    assert (
        sum(call[0] == "train.py" for call in made) == 3 * 6
    )  # six recipes of each of three segmenters
    for place in {"voc": ("VOCdevkit/VOC2012", "SBD"), "coco": ("coco2017",)}[data]:
        assert (tmp_path / "data" / place).resolve() == tmp_path / "copy"
    check(made)
