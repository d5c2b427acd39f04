"""python -m dd deploy: one ONNX file that gives the pipeline's masks, to a program that knows
nothing of the pipeline."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from dd import __main__ as door
from dd.cli.deploy import DEPLOY
from dd.data.photos import read_photo, source
from dd.deploy.onnx_model import Session, exported, metadata
from dd.stages import deploy as stage
from dd.stages.deploy import deploy
from dd.stages.train_segmenter import load_weights
from dd.store.checkpoints import weights_sha256
from dd.store.provenance import read_json, sha256
from dd.taxonomy import Taxonomy, voc_palette
from dd.training.segmentation import Predictor, Views

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/onnx_predict.py"
NAMES = ["background", "cat", "dog"]
HEAVY = {
    "torch",
    "pytorch_lightning",
    "mmseg",
    "mmcv",
    "mmengine",
    "transformers",
    "onnx",
    "cv2",
    "dd",
    "hydra",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures with large spots, so that a mask has regions; of several sizes, one of them
    turned by EXIF."""
    folder, rng, turned = (
        tmp_path_factory.mktemp("pictures"),
        np.random.default_rng(0),
        Image.Exif(),
    )
    turned[0x0112] = 6
    for i, (height, width) in enumerate([(40, 56), (64, 33), (32, 32), (101, 150)]):
        spots = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        spots.save(folder / f"{i}.png", **({"exif": turned} if i == 1 else {}))
    return folder


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, finished_run, pictures):
    """(run's folder, run.json, segmenter, the ONNX file that the command wrote)."""
    folder, run, segmenter = finished_run(tmp_path_factory.mktemp("runs") / "run")
    assert door.main(["deploy", f"run={folder}", f"images={pictures}"]) == 0
    return folder, run, segmenter, folder / "segmenter.onnx"


@pytest.fixture
def exports(deployed, monkeypatch):
    """An export takes seconds: from here on each gives the bytes of the one that was made, and
    its metadata are added to this list. They have to be those of that file."""
    asked, data, known = [], deployed[3].read_bytes(), metadata(deployed[3])

    def again(_, facts):
        assert facts.items() <= known.items()
        asked.append(facts)
        return data

    monkeypatch.setattr(stage, "exported", again)
    return asked


def test_the_file_says_what_it_is(deployed):
    folder, run, _, file = deployed
    facts = metadata(file)
    assert json.loads(facts["classes"]) == NAMES and json.loads(facts["palette"]) == voc_palette()
    assert facts["weights_sha256"] == weights_sha256(load_weights(folder)) == run["weights_sha256"]
    size, normalisation = json.loads(facts["size"]), json.loads(facts["normalisation"])
    assert (size["short_side"], size["max_long"]) == (32, 2048) and normalisation["mean"] == [
        123.675,
        116.28,
        103.53,
    ]
    graph = onnx.load(file).graph
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }
    assert shapes["images"] == ["batch", 3, "height", "width"] and shapes["size"] == [2]
    assert shapes["mask"] == ["batch", "mask_height", "mask_width"] and shapes["logits"] == [
        "batch",
        3,
        "height",
        "width",
    ]


def test_the_check_is_written_beside_it(deployed):
    check = read_json(deployed[3].with_suffix(".json"))
    assert check["agreement"] >= 0.999 and check["images"] == 4 and len(check["classes_seen"]) == 3
    assert (
        check["onnx_sha256"] == sha256(deployed[3])
        and check["weights_sha256"] == deployed[1]["weights_sha256"]
    )


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 40, 57), (2, 97, 33)])
def test_any_number_and_size_of_images(deployed, shape):
    _, _, segmenter, file = deployed
    images = torch.from_numpy(
        np.random.default_rng(1).integers(0, 256, (shape[0], 3, *shape[1:]), dtype=np.uint8)
    )
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(
            segmenter(images), size=(50, 61), mode="bilinear", align_corners=False
        )
    masks = Session(file)(images.numpy(), (50, 61))
    assert masks.dtype == np.uint8 and len(np.unique(masks)) > 1
    assert (masks == logits.argmax(1).numpy()).mean() > 0.999


def test_the_example_needs_the_file_alone(deployed, pictures, tmp_path):
    _, run, segmenter, file = deployed
    predictor = Predictor(run, segmenter, Views(32))
    for i in range(4):
        call = (
            f"import json, runpy, sys; sys.argv = ['x', {str(file)!r}, "
            f"{str(pictures / f'{i}.png')!r}, 'mask.png']; "
        )
        call += (
            f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__'); "
            "print(json.dumps(sorted(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", call], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
        assert done.returncode == 0, done.stderr
        *areas, modules = done.stdout.splitlines()
        assert "onnxruntime" in json.loads(modules) and not HEAVY & set(json.loads(modules))
        image = read_photo(pictures / f"{i}.png")
        [expected] = predictor([image])
        with Image.open(tmp_path / "mask.png") as mask:
            assert mask.mode == "P" and mask.getpalette() == voc_palette()
            assert np.array_equal(np.asarray(mask), expected)
        assert areas == [
            f"{NAMES[v]}: {100 * (expected == v).mean():.2f} %" for v in np.unique(expected)
        ]


def test_the_example_says_how_it_is_called():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode == 1 and "onnx_predict.py segmenter.onnx photo.jpg mask.png" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_the_example_resizes_as_opencv_does():
    resized, rng = runpy.run_path(str(EXAMPLE))["resized"], np.random.default_rng(2)
    for old_height, old_width, height, width in [
        (64, 64, 128, 128),
        (64, 64, 32, 32),
        *rng.integers(1, 200, (60, 4)).tolist(),
    ]:
        image = rng.integers(0, 256, (old_height, old_width, 3), dtype=np.uint8)
        expected = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(resized(image, height, width), expected), (
            old_height,
            old_width,
            height,
            width,
        )


def test_the_same_export_is_kept_and_checked_again(deployed, pictures, capsys):
    folder, _, _, file = deployed
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert door.main(["deploy", f"run={folder}", f"images={pictures}"]) == 0
    assert (
        file.read_bytes(),
        file.stat().st_mtime_ns,
    ) == before and f"kept: {file}" in capsys.readouterr().out


def test_images_that_cannot_be_read_are_told(deployed, exports, pictures, tmp_path, capsys):
    folder, _, _, _ = deployed
    some = Path(shutil.copytree(pictures, tmp_path / "some"))
    data = bytearray((some / "0.png").read_bytes())
    data[len(data) * 3 // 5] ^= 1
    (some / "0.png").write_bytes(data)
    (some / "x.jpg").write_bytes(b"no image")
    assert (
        door.main(["deploy", f"run={folder}", f"images={some}", f"output={tmp_path}/new.onnx"]) == 0
    )
    said = capsys.readouterr()
    assert "of 3 images are as PyTorch's" in said.out
    assert "warning: 2 of 5 images could not be read: " in said.err
    assert f"{some}/0.png is damaged" in said.err and f"{some}/x.jpg is damaged" in said.err
    assert len(exports) == 1 and (tmp_path / "new.onnx").is_file()


def test_a_damaged_export_is_not_kept_and_one_without_its_check_is_made_again(
    deployed, exports, pictures, tmp_path, capsys
):
    folder, _, _, file = deployed
    copy = tmp_path / "copy.onnx"
    given = ["deploy", f"run={folder}", f"images={pictures}", f"output={copy}"]
    assert door.main(given) == 0
    sound = bytearray(copy.read_bytes())
    damaged = bytearray(sound)
    damaged[len(sound) // 2] ^= 1
    copy.write_bytes(damaged)
    capsys.readouterr()
    assert door.main(given) == 2
    assert "does not match copy.json beside it" in capsys.readouterr().err
    assert copy.read_bytes() == damaged and len(exports) == 1
    copy.with_suffix(".json").unlink()
    assert door.main(given) == 0 and read_json(copy.with_suffix(".json"))["onnx_sha256"] == sha256(
        copy
    )
    assert len(exports) == 2 and copy.read_bytes() == sound == file.read_bytes()


def test_what_the_command_refuses(deployed, finished_run, pictures, tmp_path, capsys):
    folder, _, _, file = deployed
    other, _, _ = finished_run(tmp_path / "other", seed=1)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/settings.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.onnx").write_text("no onnx")
    (tmp_path / "bird.yaml").write_text("name: bird\nclasses: [bird]\n")
    before, images = file.read_bytes(), f"images={pictures}"
    for given, message in [
        ([f"run={other}", images, f"output={file}"], "was exported otherwise (weights_sha256"),
        ([f"run={other}", images, f"output={tmp_path}/text.onnx"], "not an export of this package"),
        ([f"run={other}", images, f"output={tmp_path}/a.pt"], "ends with .onnx"),
        (
            [f"run={other}", images, f"output={tmp_path}/text.onnx/a.onnx"],
            "is a file, or lies below one",
        ),
        ([f"run={other}", f"images={tmp_path}/empty"], "no file"),
        ([f"run={other}", f"images={tmp_path}/gone"], "nothing is there"),
        ([f"run={other}", f"data_root={tmp_path}/gone"], "the run's own images are not at"),
        ([f"run={tmp_path}/gone"], "no finished training run there"),
        ([f"run={tmp_path}/begun"], "has begun and is not finished"),
        ([f"run={other}", images, f"taxonomy={tmp_path}/bird.yaml"], "has the classes ['bird']"),
        ([images], "run=... is missing"),
        ([f"run={other}", "imges=x"], "Did you mean 'images'?"),
        ([f"run={other}", images, "trusted=yes"], "allowed: true, false"),
    ]:
        assert door.main(["deploy", *given]) == 2, given
        assert message in capsys.readouterr().err, given
    assert file.read_bytes() == before and not (other / "segmenter.onnx").exists()


def test_a_network_that_disagrees_is_not_written(deployed, pictures, tmp_path, monkeypatch):
    folder, run, segmenter, file = deployed
    monkeypatch.setattr(stage, "exported", lambda *_: file.read_bytes())
    shuffled = torch.nn.Module.__new__(type(segmenter))
    shuffled.__dict__ = {**segmenter.__dict__}
    shuffled.forward = lambda images: type(segmenter).forward(segmenter, images).roll(1, 1)
    given = run, shuffled, Views(32), source(pictures), NAMES, voc_palette()
    with pytest.raises(
        ValueError, match=r"only .* % of the pixels of 4 images .* 99\.9 % are needed"
    ):
        deploy(tmp_path / "new/a.onnx", *given)
    assert list((tmp_path / "new").iterdir()) == []


def test_an_unwritable_folder(deployed, pictures, tmp_path, monkeypatch):
    _, run, segmenter, _ = deployed
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="you may not write to"):
        deploy(
            tmp_path / "a.onnx", run, segmenter, Views(32), source(pictures), NAMES, voc_palette()
        )


def test_pictures_that_cannot_be_read(deployed, tmp_path):
    _, run, segmenter, file = deployed
    (tmp_path / "a.png").write_bytes(b"?")
    with pytest.raises(ValueError, match="no image to compare .*a.png is damaged"):
        deploy(file, run, segmenter, Views(32), source(tmp_path), NAMES, voc_palette())


def test_colours_and_classes_of_a_taxonomy(finished_run, pictures, tmp_path, monkeypatch):
    """Without an export: what would be written."""
    from dd import config

    folder, _, segmenter = finished_run(tmp_path / "run")
    (tmp_path / "pets.yaml").write_text(
        "name: pets\nclasses: [{name: cat, colour: [1, 2, 3]}, dog]\n"
    )
    chosen = config.key_values(
        [f"run={folder}", f"images={pictures}", f"taxonomy={tmp_path}/pets.yaml"], DEPLOY
    )
    given = config.deploy_arguments(chosen)
    assert given["palette"] == Taxonomy("pets", ["cat", "dog"], colours={"cat": (1, 2, 3)}).palette
    found = stage.facts(
        given["run"], segmenter, given["views"], given["names"], given["palette"], "raw"
    )
    assert json.loads(found["palette"])[3:6] == [1, 2, 3] and found["weights"] == "raw"


def test_a_network_that_looks_at_values_is_refused():
    class Looking(torch.nn.Module):
        def forward(self, images):
            return images.float() if images.sum() > 3 else images.float() / 2

    with pytest.raises(ValueError, match="Looking cannot be exported .*torch.onnx says: "):
        exported(Looking(), {})


@pytest.mark.full
def test_segformer_too(finished_run, pictures, tmp_path):
    folder, run, _ = finished_run(
        tmp_path / "run",
        {"_target_": "dd.segmenters.huggingface.SegFormer", "size": "b0"},
        scale=64,
    )
    assert door.main(["deploy", f"run={folder}", f"images={pictures}"]) == 0
    assert read_json(folder / "segmenter.json")["agreement"] >= 0.999


@pytest.mark.full
def test_mask2former_is_refused(finished_run, pictures, tmp_path, capsys):
    small = {
        "depth": 18,
        "channels": 32,
        "num_queries": 6,
        "encoder_layers": 1,
        "decoder_layers": 2,
    }
    node = {"_target_": "dd.segmenters.huggingface.Mask2Former", **small}
    folder, _, _ = finished_run(tmp_path / "run", node)
    assert door.main(["deploy", f"run={folder}", f"images={pictures}"]) == 2
    assert (
        "Mask2Former cannot be exported with a free number and size of images"
        in capsys.readouterr().err
    )
    assert not (folder / "segmenter.onnx").exists()


def test_a_folder_of_turned_copies_is_not_all_that_a_run_was_trained_on(
    finished_run, pictures, tmp_path
):
    """Upright copies lie in the data set; the photographs they were made from, and others,
    elsewhere."""
    from dd import config

    folder, run, _ = finished_run(tmp_path / "run")
    trained_on = {"source": "real", "root": "site", "split": "train"}
    (folder / "run.json").write_text(json.dumps({**run, "trained_on": trained_on}))
    copies = tmp_path / "data/site/JPEGImages"
    copies.mkdir(parents=True)
    Image.fromarray(read_photo(pictures / "1.png")).save(copies / "1.png")
    (copies.parent / "dataset.json").write_text(
        json.dumps({"images": [str(pictures)], "parts": {}})
    )
    chosen = config.key_values([f"run={folder}", f"data_root={tmp_path}/data"], DEPLOY)
    found = config.deploy_arguments(chosen)["pictures"]
    assert [item.id for item in found.items] == ["0", "1", "2", "3"]
    assert found.files["1"] == copies / "1.png" and found.files["0"] == pictures / "0.png"
    assert all(image.shape[2] == 3 for _, image in found.read(found.items))
