"""evaluate.py stage=predict: a folder or a video in, masks, overlays and areas out; resumed, and
never mixed."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
from PIL import Image

from dd.data.datasets import read_image, read_mask
from dd.data.photos import source
from dd.segmenters.transforms import EvalTransform
from dd.stages.predict import predict as predict_images
from dd.stages.predict import print_predictions
from dd.stages.train_segmenter import load_weights
from dd.store.checkpoints import weights_sha256
from dd.store.locks import Busy, Lock
from dd.store.provenance import read_json, write_json
from dd.taxonomy import Taxonomy, voc_palette
from dd.training.segmentation import Predictor, Views
from tests.doors import exit_status

ROOT = Path(__file__).parents[2]
NAMES = ["background", "cat", "dog, hot"]
IDENTITY = {
    "weights_sha256": "0" * 64,
    "weights": "ema",
    "protocol": {"scales": [1.0], "flip": False, "resize": 16},
}
SIZES = [(12, 9), (7, 15), (12, 9)]


@pytest.fixture
def images(tmp_path):
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for name, size in zip(("a.png", "b.bmp", "more/c.png"), SIZES, strict=True):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


class Seen:
    """The brightest channel is the class; counts the images it was shown."""

    def __init__(self):
        self.batches = []

    def __call__(self, shown):
        self.batches.append(len(shown))
        return [image.argmax(2).astype(np.uint8) for image in shown]


@pytest.fixture
def predict(tmp_path, images):
    def call(identity=IDENTITY, where=None, target=None, **more):
        seen = Seen()
        found = predict_images(
            target or tmp_path / "out",
            source(where or images),
            seen,
            identity,
            NAMES,
            voc_palette(),
            **more,
        )
        return found, seen.batches

    return call


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_masks_overlays_and_areas(predict, images, tmp_path):
    found, batches = predict(batch_size=2)
    assert (found["images"], found["kept"], found["unreadable"], batches) == (3, 0, {}, [2, 1])
    out = tmp_path / "out"
    for row, file in zip(rows(out / "areas.csv"), ("a.png", "b.bmp", "more/c.png"), strict=True):
        expected, name = read_image(images / file).argmax(2), file.rpartition(".")[0]
        assert np.array_equal(read_mask(out / "masks" / f"{name}.png"), expected)
        with (
            Image.open(out / "masks" / f"{name}.png") as mask,
            Image.open(out / "overlays" / f"{name}.jpg") as shown,
        ):
            assert mask.getpalette() == voc_palette() and shown.size == mask.size
        assert (row["file"], int(row["width"]), int(row["height"])) == (
            file,
            expected.shape[1],
            expected.shape[0],
        )
        for value, class_name in enumerate(NAMES):
            assert int(row[f"{class_name} pixels"]) == (expected == value).sum()
            assert float(row[f"{class_name} percent"]) == pytest.approx(
                100 * (expected == value).mean(), abs=1e-4
            )
    written = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert [row["filename"] for row in written] == ["a.png", "b.bmp", "more/c.png"]
    assert all(
        row["classes"]
        and row["caption"] in ("a photo of a cat and a dog, hot", "a photo of a dog, hot and a cat")
        for row in written
    )
    assert (
        read_json(out / "predictions.json")["identity"] == IDENTITY
        and not (out / "unreadable.csv").exists()
    )


def test_the_folder_opens_on_a_page_of_its_overlays(predict, tmp_path, capsys):
    found = predict()[0]
    page = (tmp_path / "out/index.html").read_text()
    shown = re.findall(r'<img src="([^"]+)" alt="([^"]+)"', page)
    assert [alt for _, alt in shown] == ["a.png", "b.bmp", "more/c.png"]
    assert all((tmp_path / "out" / unquote(path)).is_file() for path, _ in shown)
    assert all(f"</i>{name}" in page for name in NAMES) and "3 images" in page
    print_predictions(tmp_path / "out", found)
    assert f"to look at: {tmp_path / 'out/index.html'}" in capsys.readouterr().out


def test_a_single_image(predict, images, tmp_path):
    found, _ = predict(where=images / "more/c.png")
    assert found["images"] == 1
    expected = read_image(images / "more/c.png").argmax(2)
    assert np.array_equal(read_mask(tmp_path / "out/masks/c.png"), expected)


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_what_is_there_is_not_made_again(predict, images, tmp_path):
    predict()
    before = files(tmp_path / "out")
    found, batches = predict()
    assert (found["kept"], batches) == (3, []) and files(tmp_path / "out") == before
    (tmp_path / "out/masks/a.png").write_bytes(b"damaged")
    (tmp_path / "out/overlays/b.jpg").unlink()
    assert predict()[1] == [2]
    for name in ("masks/a.png", "overlays/b.jpg", "areas.csv"):
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    Image.fromarray(np.full((4, 4, 3), [0, 9, 0], np.uint8)).save(
        images / "a.png"
    )  # another picture of the same name
    assert predict()[1] == [1] and (read_mask(tmp_path / "out/masks/a.png") == 1).all()
    assert rows(tmp_path / "out/areas.csv")[0]["cat pixels"] == "16"


def test_an_interruption_loses_one_batch(predict, images, tmp_path):
    class Stopping(Seen):
        def __call__(self, shown):
            if self.batches:
                raise KeyboardInterrupt
            return super().__call__(shown)

    with pytest.raises(KeyboardInterrupt):
        predict_images(
            tmp_path / "out", source(images), Stopping(), IDENTITY, NAMES, voc_palette(), 1
        )
    assert predict()[1] == [2]
    assert len(rows(tmp_path / "out/areas.csv")) == 3


def test_what_cannot_be_read_is_listed_and_the_rest_is_made(predict, images, tmp_path, capsys):
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    found, _ = predict()
    assert found["images"] == 3 and list(found["unreadable"]) == ["broken.jpg"]
    [row] = rows(tmp_path / "out/unreadable.csv")
    assert row["file"] == "broken.jpg" and "damaged, or not an image" in row["why"]
    print_predictions(tmp_path / "out", found)
    shown = capsys.readouterr().out
    assert (
        "1 could not be read" in shown
        and "broken.jpg: " in shown
        and "predictions of 3 images" in shown
    )
    Image.new("RGB", (5, 5)).save(images / "broken.jpg")
    assert predict()[0]["images"] == 4 and rows(tmp_path / "out/unreadable.csv") == []


def test_nothing_that_can_be_read_is_an_error(predict, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"none of the 1 images could be read.*a\.jpg"):
        predict(where=tmp_path / "bad")
    assert len(rows(tmp_path / "out/unreadable.csv")) == 1


def test_two_runs_are_never_mixed(predict, tmp_path):
    predict()
    before = files(tmp_path / "out")
    with pytest.raises(FileExistsError, match="weights_sha256: 000.* -> 111.*\n.*output="):
        predict({**IDENTITY, "weights_sha256": "1" * 64})
    assert files(tmp_path / "out") == before


def test_folders_that_cannot_be_written(predict, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    for target, kind, message in [
        (tmp_path / "file", ValueError, "is a file, or lies below one"),
        (tmp_path / "file/below", ValueError, "is a file, or lies below one"),
        (tmp_path / "mine", FileExistsError, "holds files that are not predictions"),
    ]:
        with pytest.raises(kind, match=message):
            predict(target=target)
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="you may not write to"):
        predict(target=tmp_path / "out")


def test_one_at_a_time(predict, tmp_path):
    (tmp_path / "out").mkdir()
    with Lock(tmp_path / "out"), pytest.raises(Busy, match="output="):
        predict()
    assert predict()[0]["images"] == 3


def test_large_images_are_few_to_a_batch(predict, monkeypatch):
    monkeypatch.setattr("dd.stages.predict.BATCH_PIXELS", 220)
    assert predict()[1] == [2, 1]


def test_the_frames_of_a_video(predict, tmp_path):
    writer = cv2.VideoWriter(
        str(tmp_path / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (32, 24)
    )
    for colour in ([0, 0, 200], [0, 200, 0], [200, 0, 0]):  # BGR: red, green, blue
        writer.write(np.full((24, 32, 3), colour, np.uint8))
    writer.release()
    predict(where=tmp_path / "film.avi")
    for number in range(3):
        assert (read_mask(tmp_path / f"out/masks/frame_{number:06d}.png") == number).all()
    assert [row["file"] for row in rows(tmp_path / "out/areas.csv")] == [
        f"film.avi#{n}" for n in range(3)
    ]
    (tmp_path / "out/masks/frame_000001.png").unlink()
    assert predict(where=tmp_path / "film.avi")[1] == [1]
    assert (read_mask(tmp_path / "out/masks/frame_000001.png") == 1).all()


def test_the_predictor_predicts_as_an_image_is_evaluated(tiny_segmenter):
    import torch

    image, segmenter = (
        np.random.default_rng(1).integers(0, 256, (9, 14, 3), dtype=np.uint8),
        tiny_segmenter().eval(),
    )
    with torch.no_grad():
        logits = segmenter(EvalTransform(16)(image)[None])
        expected = torch.nn.functional.interpolate(logits, size=(9, 14), mode="bilinear")[0].argmax(
            0
        )
    [mask] = Predictor({}, segmenter, Views(16))([image])
    assert mask.dtype == np.uint8 and np.array_equal(mask, expected)


# The command


def command(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        "stage=predict",
        "device=cpu",
        *map(str, arguments),
    ]
    return subprocess.run(
        script, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT
    )


def test_the_command(finished_run, images, tmp_path, monkeypatch, capsys):
    folder, run, segmenter = finished_run(tmp_path / "run/seed=0")
    (images / "broken.png").write_bytes(b"")
    done = command(f"run={folder}", f"images={images}")
    assert done.returncode == 0, done.stderr
    assert "1 could not be read" in done.stdout
    out = folder / "predictions/photos"
    found = Predictor(run, segmenter, Views(32))([read_image(images / "a.png")])[0]
    assert np.array_equal(read_mask(out / "masks/a.png"), found)
    assert read_json(out / "predictions.json")["identity"]["weights_sha256"] == weights_sha256(
        load_weights(folder)
    )
    for name in ("a.png", "b.bmp", "more/c.png"):
        (images / name).unlink()
    monkeypatch.chdir(tmp_path)
    given = ["stage=predict", "device=cpu", f"run={folder}", f"images={images}", "output=none"]
    assert exit_status("evaluate", *given) == 2
    assert "none of the 1 images could be read" in capsys.readouterr().err


def test_what_the_command_refuses(finished_run, images, tmp_path, monkeypatch):
    """Through the same function as the command, in this process."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from dd import config

    folder, _, _ = finished_run(tmp_path / "run")
    (tmp_path / "begun").mkdir()
    write_json(tmp_path / "begun/settings.json", {})
    (tmp_path / "other").mkdir()
    write_json(tmp_path / "other/run.json", {"identity": {}})
    monkeypatch.chdir(tmp_path)

    def arguments(*given):
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
            return config.prediction_arguments(
                hydra.compose("evaluate", overrides=["stage=predict", *given])
            )

    for given, kind, message in [
        (["run=null"], ValueError, "needs the folder of a trained run"),
        (["run=nowhere"], FileNotFoundError, "no finished training run there"),
        (["run=begun"], FileNotFoundError, "has begun and is not finished"),
        (["run=other"], ValueError, "not a training run of a segmenter"),
        (["run=run"], FileNotFoundError, "images is not given"),
        (
            ["run=run", "images=photos", "output=photos/out"],
            ValueError,
            "its masks would be taken for images",
        ),
    ]:
        with pytest.raises(kind, match=message):
            arguments(*given)
    found = arguments("run=run", "images=photos", "flip=true", "weights=ema")
    assert (
        found["target"] == Path("run/predictions/photos-flip") and found["palette"] == voc_palette()
    )
    (tmp_path / "pets.yaml").write_text(
        "name: pets\nclasses: [{name: cat, colour: [1, 2, 3]}, dog]\n"
    )
    found = arguments(
        "run=run", "images=photos", "data=own", "data.taxonomy=pets.yaml", "data.name=x"
    )
    assert (
        found["palette"]
        == Taxonomy("pets", ["cat", "dog"], colours={"cat": (1, 2, 3)}).palette
        != voc_palette()
    )


def test_a_caption_names_what_covers_enough(tmp_path, images):
    """The largest class first; less than a hundredth of the image is no mention, and nothing
    found is a photo all the same."""
    masks = {
        (12, 9): [(2, 90), (1, 2)],
        (7, 15): [(1, 1)],
    }  # (class, pixels); one pixel of 105 is less than a hundredth

    def predictor(shown):
        found = []
        for image in shown:
            mask = np.zeros(image.shape[0] * image.shape[1], np.uint8)
            at = 0
            for value, count in masks[image.shape[:2]]:
                mask[at : at + count], at = value, at + count
            found.append(mask.reshape(image.shape[:2]))
        return found

    predict_images(tmp_path / "out", source(images), predictor, IDENTITY, NAMES, voc_palette())
    written = [
        json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()
    ]
    assert [row["caption"] for row in written] == [
        "a photo of a dog, hot and a cat",
        "a photo",
        "a photo of a dog, hot and a cat",
    ]
    assert written[1] == {"filename": "b.bmp", "caption": "a photo", "classes": []}
