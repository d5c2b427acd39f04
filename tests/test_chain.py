"""The whole chain once at small size, with the embedded generator: prompts to metrics.json,
report and summary."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dd.report.rows import arrange
from dd.report.summary import collect
from tests.doors import exit_status

ROOT = Path(__file__).parent.parent
SMALL_SEGMENTER = [
    "batch_size=2",
    "scale=64",
    "segmenter.base_channels=8",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory, run):
    """Folder in which every stage of the demo ran once, at small size."""
    from dd.stages.prepare_shapes import prepare_shapes

    root = tmp_path_factory.mktemp("chain")
    where = [f"data_root={root}/data", f"output_root={root}/outputs"]
    prepare_shapes(root / "data", sizes={"train": 6, "tune": 4, "test": 5})
    small = ["experiment=shapes", "num_images=6", "unit_size=3", "diffusion.steps=2"]
    run("generate", *small, *where)
    run(
        "generate", *small, *where, "stage=label", "mask_set=power0", "masks=paper", "masks.power=0"
    )
    run("evaluate", "experiment=shapes", *where, "stage=probe", "probe.split=test", "probe.limit=3")
    run("train", "experiment=shapes_synthetic", *SMALL_SEGMENTER, *where, "trainer.max_steps=2")
    run(
        "train",
        "experiment=shapes_finetune",
        "shots=4",
        *SMALL_SEGMENTER,
        *where,
        "trainer.max_steps=1",
    )
    run(
        "train",
        "experiment=shapes_real",
        "shots=4",
        *SMALL_SEGMENTER,
        *where,
        "trainer.max_steps=3",
    )
    for data in ("shapes", "shapes_shift"):
        run("evaluate", f"run={root}/outputs/shapes/*/*", f"data={data}", *where)
    run("evaluate", "stage=audit", f'run="{root}/outputs/shapes/real_shapes/*"', *where)
    run(
        "evaluate",
        "stage=report",
        f"report.runs={root}/outputs",
        "name=shapes",
        "report.domains=[shapes,shapes_shift]",
        *where,
    )
    return root


def test_summary_has_every_number_of_the_demo(chain):
    summary = json.loads((chain / "outputs/shapes/summary.json").read_text())
    assert summary["shots_from"] == "shapes"
    assert set(summary["seconds"]) >= {
        "generate",
        "train_synthetic_only",
        "train_finetuned",
        "train_real_only",
    }
    for value in (
        summary["mask_miou"],
        *summary["synthetic_only"].values(),
        *summary["finetuned"]["4"].values(),
        *summary["real_only"]["4"].values(),
    ):
        assert 0 <= value <= 100
    assert set(summary["synthetic_only"]) == {"shapes", "shapes_shift"}


def test_metrics_agree_with_their_own_confusion_matrix(chain):
    files = sorted(chain.glob("outputs/shapes/*/*/eval/*/metrics.json"))
    assert len(files) == 6
    for file in files:
        m = json.loads(file.read_text())
        assert sum(map(sum, m["confusion"])) == m["num_images"] * 128 * 128
        ious = []
        for c, row in enumerate(m["confusion"]):
            union = sum(row) + sum(r[c] for r in m["confusion"]) - row[c]
            if union:
                ious.append(100 * row[c] / union)
        assert m["miou"] == pytest.approx(sum(ious) / len(ious))


def test_supervision_and_history_are_recorded(chain):
    finetuned = json.loads(
        (chain / "outputs/shapes/finetune_shapes/shots=4,seed=0/run.json").read_text()
    )
    assert (
        finetuned["supervision"] == "B"
    )  # what made the synthetic images: labels chose their settings
    assert "chosen_on" not in json.dumps(finetuned["identity"])
    choices = {(c["what"], c["data"], c["labels"]) for c in finetuned["chosen_on"]}
    assert {("recipe", "shapes/tune", 128), ("learning_rate", "shapes/train", 64)} <= choices
    synthetic = json.loads((chain / "outputs/shapes/synthetic/seed=0/run.json").read_text())
    assert all(c in finetuned["chosen_on"] for c in synthetic["chosen_on"])
    folder = chain / "outputs/shapes/finetune_shapes/shots=4,seed=0"
    scored = json.loads((folder / "eval/shapes/metrics.json").read_text())
    assert (scored["supervision"], scored["chosen_on"]) == ("B", finetuned["chosen_on"])
    assert finetuned["trained_on"]["shots"] == 4
    assert finetuned["trained_on"]["after"]["source"] == "synthetic"
    real = json.loads((chain / "outputs/shapes/real_shapes/shots=4,seed=0/run.json").read_text())
    assert real["supervision"] == "real" and real["trained_on"]["after"] is None


def test_self_training_on_photographs_is_a_run_like_any_other(chain, run, tmp_path):
    """On top of the synthetic-only run, with the photographs of a list; recorded, in a row of
    its own, gone on from."""
    where = [f"data_root={chain}/data", f"output_root={chain}/outputs", *SMALL_SEGMENTER]
    site = chain / "data/shapes_shift"
    photos = [
        f"unlabelled.images={site}/JPEGImages",
        f"unlabelled.list={site}/ImageSets/Segmentation/train.txt",
    ]
    adapt = ["experiment=shapes_adapt_segmenter", *where, "trainer.max_steps=2"]
    with pytest.raises(
        ValueError, match=r"self_training needs photographs of the site: unlabelled.images=<folder>"
    ):
        run("train", *adapt)
    with pytest.raises(ValueError, match=r"leave trainer.callbacks.ema on"):
        run("train", *adapt, *photos, "trainer.callbacks.ema=null")
    with pytest.raises(ValueError, match=r"self_training.teacher.confidence=2"):
        run("train", *adapt, *photos, "self_training.teacher.confidence=2")
    assert not (chain / "outputs/shapes/adapt_segmenter").exists()
    run("train", *adapt, *photos)
    done = json.loads((chain / "outputs/shapes/adapt_segmenter/seed=0/run.json").read_text())
    assert done["supervision"] == "B" and done["trained_on"]["after"]["source"] == "synthetic"
    taught = done["trained_on"]["self_training"]
    assert taught["photographs"]["number"] == 6 and taught["teacher"]["confidence"] == 0.9
    before = json.loads((chain / "outputs/shapes/synthetic/seed=0/run.json").read_text())
    assert "self_training" not in before["trained_on"] and "self_training" not in before["identity"]
    (chain / "one.txt").write_text("train_00000\n")
    with pytest.raises(FileExistsError, match=r"photographs.number: 6 -> 1"):
        run("train", *adapt, photos[0], f"unlabelled.list={chain}/one.txt")
    start = f'init_from="{chain}/outputs/shapes/adapt_segmenter/seed=0"'
    run(
        "train",
        "experiment=shapes_finetune",
        "shots=4",
        start,
        "name=shapes/after",
        *where,
        "trainer.max_steps=1",
    )
    entries, _ = collect(
        [
            chain / "outputs/shapes" / name
            for name in ("synthetic/seed=0", "adapt_segmenter/seed=0", "after")
        ]
    )
    rows, twice = arrange(entries, "shapes")
    step = "self-training on photographs"
    found = {(row.name, row.recipe.steps) for row in rows}
    assert not twice and found == {
        ("synthetic only", 2),
        (f"synthetic only; {step}", 4),
        (f"synthetic, then 4 real; {step}", 5),
    }


def test_report_is_one_self_contained_file(chain):
    html = (chain / "outputs/shapes/report.html").read_text()
    assert "synthetic only" in html and "shapes_shift" in html
    assert "Labels behind the runs" in html and "128 of shapes/tune (" in html
    assert "<script" not in html and 'src="http' not in html


def test_everything_again_changes_nothing(chain, run):
    where = [f"data_root={chain}/data", f"output_root={chain}/outputs"]
    kept = {
        p: p.stat().st_mtime_ns
        for p in chain.rglob("*")
        if p.is_file() and p.suffix in (".png", ".safetensors", ".ckpt")
    }
    run("generate", "experiment=shapes", "num_images=6", "unit_size=3", "diffusion.steps=2", *where)
    run("train", "experiment=shapes_synthetic", *SMALL_SEGMENTER, *where, "trainer.max_steps=2")
    run("evaluate", f"run={chain}/outputs/shapes/*/*", *where)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}


def test_other_settings_are_refused_and_named(chain, run):
    where = [f"data_root={chain}/data", f"output_root={chain}/outputs"]
    with pytest.raises(FileExistsError, match=r"generator\.steps: 2 -> 3"):
        run(
            "generate",
            "experiment=shapes",
            "num_images=6",
            "unit_size=3",
            "diffusion.steps=3",
            *where,
        )
    with pytest.raises(FileExistsError, match="max_steps"):
        run("train", "experiment=shapes_synthetic", *SMALL_SEGMENTER, *where, "trainer.max_steps=4")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["generate", "experiment=shapes", "masks.bnad=3"], "Did you mean 'band'"),
        (["train", "experiment=shapes_syntetic"], "Did you mean 'shapes_synthetic'"),
        (["evaluate", "run=outputs/nowhere"], "no finished training run"),
        (["generate", "experiment=shapes", "diffusion.model=./missing"], "no such folder"),
        (
            ["train", "experiment=shapes_real", "data_root=nowhere"],
            "python -m dd prepare shapes",
        ),
    ],
)
def test_bad_input_is_answered_on_one_screen(tmp_path, monkeypatch, capsys, command, expected):
    monkeypatch.chdir(tmp_path)
    script, *overrides = command
    given = [*overrides, f"output_root={tmp_path}/outputs"]
    assert exit_status(script, *given) == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said
    assert len(said.splitlines()) < 24


def test_nor_does_a_process_of_its_own_say_more(tmp_path):
    script = [sys.executable, str(ROOT / "train.py"), "experiment=shapes_syntetic"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Did you mean 'shapes_synthetic'" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 24
