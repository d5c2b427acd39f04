"""The stage batch_norm: a new finished run that every reader of runs takes, whole or not at all."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dd import batch_norm, config, photos
from dd.checkpoints import weights_sha256
from dd.datasets import encode_image
from dd.locks import Busy, Lock
from dd.provenance import read_json, write_json
from dd.report.recipes import arm_of, unlabelled_steps
from dd.report.rows import arrange
from dd.report.summary import collect
from dd.segmentation import Views
from dd.stages import batch_norm as stage
from dd.stages.prepare import prepare_shapes
from dd.stages.train import load_weights
from dd.supervision import real_labels, supervision
from dd.taxonomy import SHAPES_NAMES


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Photographs of three sizes, one of them turned by EXIF."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(2)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, size in enumerate([(40, 50, 3), (40, 50, 3), (60, 33, 3), (40, 50, 3), (50, 40, 3)]):
        pixels = rng.integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png", **({"exif": exif} if i == 4 else {}))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory, finished_run):
    """Output root with the finished run ``old``."""
    root = tmp_path_factory.mktemp("outputs")
    finished_run(root / "old", names=SHAPES_NAMES)
    run = read_json(root / "old/run.json")
    trained_on = {"source": "synthetic", "root": "shapes", "split": "train", "masks": "SegmentationClass", "images": 5,
                  "mask_settings": {"settings": {"power": 4}}, "shots": None, "seed": 0, "after": None}  # fmt: skip
    write_json(root / "old/run.json", run | {"trained_on": trained_on, "seconds": 3.0, "identity": {}, "chosen_on": [CHOSEN]})
    return root


CHOSEN = {"what": "masks", "data": "here/tune", "labels": 8}


@pytest.fixture
def adapt(run, site, root):
    """``adapt(*overrides, images=site, name="new")``: the command."""

    def command(*overrides, images=site, init_from="old", name="new"):
        run(
            "train", "stage=batch_norm", f"output_root={root}", f"name={name}", f"init_from={root}/{init_from}",
            f"unlabelled.images={images}", "device=cpu", *overrides,
        )  # fmt: skip
        return root / name

    return command


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_new_run_has_the_photographs_statistics_and_all_else_of_the_old_one(adapt, root, site, capsys):
    folder = adapt(name="whole")
    _, expected, views = config.trained_run(root / "old")
    shown = [views(photos.read_photo(p))[0][None] for p in sorted(site.iterdir())]
    assert len({s.shape for s in shown}) == 2 and shown[4].shape == shown[0].shape  # upright
    changed = batch_norm.adapt(expected, lambda: shown)
    found, old = load_weights(folder), load_weights(root / "old")
    assert found.keys() == old.keys()
    for name, value in expected.state_dict().items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-4), name
        layer, _, what = name.rpartition(".")
        assert torch.equal(found[name], old[name]) != (layer in changed and what in ("running_mean", "running_var")), name
    assert all(torch.equal(v, load_weights(folder, "raw")[k]) for k, v in found.items())
    run, before = read_json(folder / "run.json"), read_json(root / "old/run.json")
    assert {k: run[k] for k in stage.KEPT} == {k: before[k] for k in stage.KEPT}
    assert run["trained_on"]["after"] == before["trained_on"] and run["trained_on"]["source"] == "unlabelled"
    assert run["trained_on"]["photographs"] == photos.Unlabelled(site).fingerprint()
    assert run["weights_sha256"] == weights_sha256(load_weights(folder))
    assert run["batch_norm"]["layers"] == len(changed) and all(n.startswith("auxiliary") for n in run["batch_norm"]["kept"])
    assert {"versions", "command", "seconds"} <= run.keys() and "init_from" in (folder / "config.yaml").read_text()
    assert f"{len(changed)} batch-norm layers have the statistics of 5 photographs (1 that" in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"run.json", "settings.json", "config.yaml", "checkpoints"}


def test_the_batch_size_changes_rounding_alone(adapt):
    one, other = (load_weights(adapt(f"batch_size={n}", name=f"batch{n}")) for n in (1, 4))
    assert all(torch.allclose(one[k], other[k], rtol=1e-3, atol=1e-4) for k in one)


def test_a_finished_run_is_left_alone_and_another_refused(adapt, tmp_path):
    folder = adapt()
    before = files(folder)
    assert adapt() == folder and adapt("batch_size=3") == folder and files(folder) == before
    with pytest.raises(FileExistsError, match=r"run .*new was made with other settings:\n.*batch_norm.share: 1.0 -> 0.5"):
        adapt("batch_norm.share=0.5")
    (tmp_path / "list.txt").write_text("0\n1\n")
    with pytest.raises(FileExistsError, match="photographs.number: 5 -> 2"):
        adapt(f"unlabelled.list={tmp_path}/list.txt")
    assert files(folder) == before
    half = load_weights(adapt("batch_norm.share=0.5", name="half"))
    assert any(not torch.equal(v, load_weights(folder)[k]) for k, v in half.items())


@pytest.mark.parametrize("when", ["measuring", "writing"])
def test_what_was_interrupted_is_no_run_and_begins_again(adapt, root, monkeypatch, when):
    name = f"stopped_{when}"
    with monkeypatch.context() as patch:

        def stop(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(*((stage, "adapt") if when == "measuring" else (stage, "made_by")), stop)
        with pytest.raises(KeyboardInterrupt):
            adapt(name=name)
    assert not (root / name / "run.json").exists() and not (root / name / ".lock").exists()
    with pytest.raises(FileNotFoundError, match="no run.json|no finished training run"):
        config.trained_run(root / name)
    if when == "writing":
        with pytest.raises(FileExistsError, match="other settings"):
            adapt("batch_norm.share=0.5", name=name)
    found = load_weights(adapt(name=name))
    assert all(torch.equal(v, load_weights(adapt())[k]) for k, v in found.items())


def test_a_folder_at_work_is_left_alone(adapt, root):
    (root / "busy").mkdir()
    with Lock(root / "busy"), pytest.raises(Busy, match="Runs of another name are made beside it"):
        adapt(name="busy")


def test_what_is_missing_or_damaged(adapt, run, root, site, tmp_path, monkeypatch):
    for given, error, message in (
        ({"images": "null"}, ValueError, "stage=batch_norm needs photographs of the site: unlabelled.images="),
        ({"images": tmp_path / "nowhere"}, FileNotFoundError, "no such folder"),
        ({"init_from": "nowhere"}, FileNotFoundError, "no finished training run there"),
        ({"name": "old"}, ValueError, "name=old is the run of init_from"),
    ):
        with pytest.raises(error, match=message):
            adapt(**{"name": "bad", **given})
    with pytest.raises(ValueError, match="stage=batch_norm changes a finished run: init_from="):
        run("train", "stage=batch_norm", "name=bad", f"output_root={root}", f"unlabelled.images={site}")
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.png").write_bytes((site / "0.png").read_bytes())
    with pytest.raises(ValueError, match="one photograph; a variance needs two or more"):
        adapt(images=tmp_path / "one", name="bad")
    with pytest.raises(ValueError, match="share=2.*expected a number from 0"):
        adapt("batch_norm.share=2", name="bad")
    noise = encode_image(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8), ".png")
    (tmp_path / "one/b.png").write_bytes(noise[:-3000])
    with pytest.raises(ValueError, match=r"1 of 2 images cannot be read; .*\n.*b.png is damaged"):
        adapt(images=tmp_path / "one", name="torn")
    for name in ("bad", "torn"):
        assert not (root / name / "run.json").exists()
    (tmp_path / "one/b.png").write_bytes(noise)
    assert (adapt(images=tmp_path / "one", name="torn") / "run.json").is_file()  # once it is whole
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "convert_sync_batchnorm", lambda m: m)
    without = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))
    with pytest.raises(ValueError, match="Sequential has no batch norm"):
        stage.batch_norm(root / "bare", read_json(root / "old/run.json"), without, Views(32), photos.Unlabelled(site))
    assert not (root / "bare/run.json").exists()


def test_such_a_run_is_evaluated_predicts_and_is_reviewed_and_deployed(adapt, run, root, site, tmp_path):
    folder, data = adapt(), tmp_path / "data"
    prepare_shapes(data, {"train": 3, "tune": 2, "test": 3})
    where = [f"data_root={data}", f"output_root={root}", "device=cpu"]
    scores = {}
    for name in ("old", "new"):
        run("evaluate", f"run={root}/{name}", "data=shapes_shift", *where)
        scores[name] = read_json(root / name / "eval/shapes_shift/metrics.json")
    assert scores["new"]["supervision"] == "A" and scores["new"]["trained_on"]["after"] == scores["old"]["trained_on"]
    assert scores["new"]["confusion"] != scores["old"]["confusion"]
    run("evaluate", "stage=predict", f"run={folder}", f"images={site}", *where)
    assert len(list((folder / "predictions").rglob("4.png"))) >= 1
    run("evaluate", "stage=review", f"run={folder}", f"images={site}", "number=2", f"output={tmp_path}/queue", *where)
    assert (tmp_path / "queue").is_dir()
    (data / "synthetic/shapes/JPEGImages").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(data / "synthetic/shapes/JPEGImages/a.jpg")
    defaults = {"images": None, "output": None, "weights": "ema", "taxonomy": None, "trusted": "false"}
    given = config.deploy_arguments({**defaults, "run": folder, "data_root": data})
    assert given["run"] == read_json(folder / "run.json") and len(given["pictures"].items) == 1  # of the old run's data


def test_reports_list_it_as_a_recipe_of_its_own(adapt, root):
    adapt(), adapt("batch_norm.share=0.5", name="half")
    entries, left_out = collect([root / "old", root / "new", root / "half"])
    rows, twice = arrange(entries)
    assert not left_out and not twice and {row.recipe.arm for row in rows} == {"synthetic_only"}
    assert {row.runs[0]["name"]: row.variant for row in rows} == {
        "old": None, "new": "batch norm of photographs", "half": "batch norm of photographs (share 0.5)",
    }  # fmt: skip
    assert len({row.recipe.steps for row in rows}) == 1 and {tuple(row.seeds) for row in rows} == {(0,)}


def test_words_and_classes_of_what_follows():
    synthetic = {"source": "synthetic", "mask_settings": {}, "after": None, "shots": None, "seed": 1}
    style = {"kind": "fourier", "share": 0.5, "bandwidth": 0.05, "photographs": {"number": 7}}
    site = {"source": "unlabelled", "photographs": {"number": 9}, "batch_norm": {"share": 1.0}, "shots": None}
    assert unlabelled_steps(synthetic) == []
    normed = {**site, "after": {**synthetic, "style": style}}
    assert arm_of(normed) == "synthetic_only"
    steps = ["fourier style of photographs (bandwidth 0.05, share 0.5)", "batch norm of photographs"]
    assert unlabelled_steps(normed) == steps
    tuned = {"source": "real", "shots": 16, "after": normed}
    assert arm_of(tuned) == "finetuned" and unlabelled_steps(tuned) == steps
    assert real_labels(normed) == [] and supervision(tuned, [], "A") == "A" and real_labels(tuned) == [16]
    assert real_labels({**site, "after": {"source": "real", "shots": None, "after": None}}) == ["all"]
    assert json.dumps(tuned)
