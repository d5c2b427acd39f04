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
STUDENTS = ("deeplabv3", "segformer", "vit")
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
        students = (f"labelers_search_{name}" for name in STUDENTS)
        searches = ("shapes_label_free_search", *students)
        files = {"bin/python": STUB} | {f"outputs/{s}/best.yaml": FOUND for s in searches}
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


def check(made, doors=("generate", "train", "evaluate")):
    """Each command is given once, and its keys and choices exist."""
    assert len({tuple(call) for call in made}) == len(made)
    for root in doors:
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


# two teachers; for each of three students one search, and 6 trainings of each of three seeds
LABELERS = 2 + 3 * (1 + 3 * 6)
TRAININGS = {
    "demo.sh": 3,
    "labelers.sh": LABELERS,
    "shapes.sh": 3 + 2 * 2 * 4 * 3 + 11 * 3 + 1 + 3,
    "site.sh": 14 * 3 + 1,
}


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


def test_students_are_trained_on_every_mask_set_and_on_foundation_masks_where_weights_are_given(
    calls,
):
    made = calls(
        "labelers.sh", SEEDS="3", STUDENTS="vit", STEPS="7", SAM2="weights", SAM3_REVISION="x"
    )
    sets = ["SegmentationClass", *(f"masks/{n}" for n in ("paper", "run_16", "joined", "run_all"))]
    trained = [call for call in made if any(a.startswith("synthetic_masks=") for a in call)]
    assert [a for c in trained for a in c if a.startswith("synthetic_masks=")] == [
        f"synthetic_masks={s}" for s in [*sets, "masks/sam2_refine"]
    ]
    for call in trained:
        assert {"segmenter=dinov2_dpt", "optimizer.learning_rate=0.003", "seed=3"} <= {*call}
        assert "++chosen_on.learning_rate=[]" in call and "trainer.max_steps=7" in call
    assert not any("labeler=sam3" in call for call in made)
    check(made)


@pytest.mark.parametrize("data", ["voc", "coco"])
def test_further_masks_of_the_papers_images_are_rows_of_their_own(calls, data):
    given = {"MODEL": "m", "SEGMENTERS": "deeplabv3_r50", "DATA": "data"}
    made = calls(f"{data}.sh", CALIBRATE="50", SAM3="s", SAM3_REVISION="0" * 40, **given)
    folder = {"voc": "VOC2012", "coco": "coco"}[data]
    chosen = f"outputs/{data}/calibration_{folder}_train_50_seed0.yaml"
    (labelled,) = (call for call in made if f"masks_from={chosen}" in call)
    assert "mask_set=calibrated" in labelled
    (asked,) = (call for call in made if "stage=calibrate" in call)
    assert "calibrate.shots=50" in asked and "seed=0" in asked
    for name in ("calibrated", "sam3"):
        (trained,) = (call for call in made if f"synthetic_masks=masks/{name}" in call)
        assert trained[2] == "experiment=paper_synthetic"
        assert sum(f"run=outputs/{data}_{name}/*" in call for call in made) == 2
    check(made)


@pytest.mark.parametrize(("data", "images"), [("voc", 40000), ("coco", 80000)])
def test_a_pilot_ends_before_the_large_set_is_drawn(calls, data, images):
    made = calls(f"{data}.sh", MODEL="m", PILOT="200", DATA="data")
    drawn, asked = made[-2:]
    assert {f"experiment={data}", f"name={data}_pilot", "num_images=200"} <= {*drawn}
    assert {"stage=pilot", f"pilot.images={images}"} <= {*asked}
    assert any(a.endswith(f"data/synthetic/{data}_pilot") for a in asked)
    assert not any(call[0] == "train.py" for call in made)
    check(made, doors=("generate", "evaluate"))
