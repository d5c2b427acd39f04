"""``import dd``: the verbs of Python make what the commands make."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dd
from dd import config
from dd.data.datasets import read_image, read_mask, stored_heat
from dd.stages.prepare_shapes import prepare_shapes
from dd.store.samples import read_whole_plan
from dd.taxonomy import TAXONOMIES

ROOT = Path(__file__).parent.parent
TEXTS = ["two red apples on grass", "a photo of a leaf and a brick", "a brick"]
SHAPES = TAXONOMIES["shapes"].names
TINY = {"segmenter.base_channels": 8, "scale": 64}
NOTEBOOK = ROOT / "examples/quickstart.ipynb"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(working folder, drawings, run) of small calls; scenes lie in real/."""
    root = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        data = dd.generate(TEXTS, "shapes", to="sets/mine", seed=4, steps=2, number=4)
        run = dd.train(data, to="runs/mine", steps=2, batch_size=2, device="cpu", settings=TINY)
        prepare_shapes("real", sizes={"train": 3, "tune": 1, "test": 4})
        yield root, data, run


def test_a_drawing_is_what_lies_on_disk(made):
    _, data, _ = made
    plan = read_whole_plan(data.folder)
    assert len(data) + len(data.left_out) == 4 and data.classes == ("background", *SHAPES)
    assert [s.prompt.split(";")[0] for s in plan] == [*TEXTS, TEXTS[0]]  # round and round
    assert [s.classes for s in plan[:3]] == [("apple",), ("leaf", "brick"), ("brick",)]
    for drawn in data:
        maps = stored_heat(data.folder, drawn.id)["class_prompt"]
        assert np.array_equal(np.stack([*drawn.heat.values()]), maps)
        assert all(m.dtype == np.float64 and m.shape == (9, 32, 32) for m in drawn.heat.values())
        stored = read_image(data.folder / f"JPEGImages/{drawn.id}.png")
        assert np.array_equal(np.asarray(drawn.image), stored)
        mask = read_mask(data.folder / f"SegmentationClass/{drawn.id}.png")
        assert np.array_equal(drawn.mask, mask) and mask.shape == (128, 128)
        assert drawn.shares["apple"] == (mask == 1).mean()
        assert drawn.picture.size == ((2 + len(drawn.heat)) * 260 - 4, 256)
        assert drawn._repr_png_().startswith(b"\x89PNG")
    assert data[-1].id == data[len(data) - 1].id and [d.id for d in data[:2]] == [
        "000000",
        "000001",
    ]


def test_the_command_makes_the_same_bytes(made, run):
    """The same prompts from a file, drawn by the stage of generate.py."""
    root, data, _ = made
    rows = [
        {"caption": t, "classes": c}
        for t, c in zip(TEXTS, (["apple"], ["leaf", "brick"], ["brick"]), strict=True)
    ]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = ["prompts=file", f"prompts.path={root}/prompts.jsonl", "+prompts.in_order=true"]
    how = ["num_images=4", "seed=4", "unit_size=4", "diffusion.steps=2", "image_format=png"]
    run("generate", *prompts, *how, "masks=refined", "data=shapes", f"folder={root}/sets/command")
    for place in ("JPEGImages", "SegmentationClass", "heat"):
        files = sorted((data.folder / place).iterdir())
        assert len(files) >= 3
        for file in files:
            if file.name != "masks.json":
                assert (root / "sets/command" / place / file.name).read_bytes() == file.read_bytes()


def test_without_a_folder_the_same_is_drawn_and_goes_with_what_is_returned(made):
    _, data, _ = made
    lent = dd.generate(TEXTS, "shapes", seed=4, steps=2, number=4)
    place = lent.folder
    assert place.is_dir() and np.array_equal(lent[0].mask, data[0].mask)
    kept = lent[0].image
    del lent
    assert not place.exists() and kept.size == (128, 128)


def test_the_same_call_goes_on_and_another_one_is_refused(made):
    _, data, run = made
    before = {p: p.stat().st_mtime_ns for p in data.folder.rglob("*.png")}
    again = dd.generate(TEXTS, "shapes", to="sets/mine", seed=4, steps=2, number=4)
    assert len(again) == len(data) and before == {p: p.stat().st_mtime_ns for p in before}
    with pytest.raises(FileExistsError, match=r"steps: 2 -> 3"):
        dd.generate(TEXTS, "shapes", to="sets/mine", seed=4, steps=3, number=4)
    with pytest.raises(FileExistsError, match="made for other classes"):
        dd.generate(TEXTS, ["apple", "leaf", "brick"], to="sets/mine", seed=4, steps=2, number=4)
    then = (run.folder / "run.json").stat().st_mtime_ns
    same = dd.train("sets/mine", to="runs/mine", steps=2, batch_size=2, device="cpu", settings=TINY)
    assert same == run and (run.folder / "run.json").stat().st_mtime_ns == then


def test_results_say_which_call_made_them(made):
    _, data, run = made
    command = json.loads((data.folder / "run.json").read_text())["command"]
    assert command.startswith("dd.generate(prompts=a list of 3, classes='shapes'")
    assert "to='sets/mine'" in command and "steps=2" in command
    assert run.record["command"].startswith("dd.train(data='sets/mine', to='runs/mine', steps=2")
    assert run.record["trained_on"]["source"] == "synthetic" and run.record["steps"] == 2
    assert run.classes == data.classes


def test_a_score_is_that_of_the_command(made, run):
    root, _, trained = made
    scores = dd.score(trained, "real/shapes", batch_size=2, device="cpu")
    total = scores.confusion.sum()
    assert scores.num_images == 4 and total == 4 * 128 * 128
    ious = []
    for i, row in enumerate(scores.confusion):
        union = row.sum() + scores.confusion[:, i].sum() - row[i]
        ious += [100 * row[i] / union] if union else []
    assert scores.miou == pytest.approx(np.mean(ious))
    assert scores.pixel_accuracy == pytest.approx(100 * np.trace(scores.confusion) / total)
    assert scores.file == Path("runs/mine/eval/shapes/metrics.json") and scores.file.is_file()
    where = [f"data_root={root}/real", "batch_size=2", "device=cpu"]
    assert run("evaluate", "run=runs/mine", "data=shapes", *where) == scores.miou
    other = dd.score("runs/mine", "real/shapes", "tune", flip=True, device="cpu")
    assert other.num_images == 1 and other.file.parts[:4] == ("runs", "mine", "eval", "shapes-tune")


def test_a_prediction_is_that_of_the_command(made, run):
    root, _, trained = made
    (root / "photos").mkdir(exist_ok=True)
    file = sorted((root / "real/shapes/JPEGImages").glob("test*"))[0]
    pixels = read_image(file)
    Image.fromarray(pixels).save(root / "photos/one.png")
    run("evaluate", "stage=predict", "run=runs/mine", "images=photos", "data=shapes", "device=cpu")
    expected = np.asarray(Image.open(root / "runs/mine/predictions/photos/masks/one.png"))
    for image in (pixels, Image.fromarray(pixels), root / "photos/one.png", "photos/one.png"):
        shown = dd.predict(trained, image, device="cpu")
        assert np.array_equal(shown.mask, expected) and np.array_equal(shown.image, pixels)
    assert sum(shown.shares.values()) == pytest.approx(1) and shown.overlay.size == (128, 128)
    with pytest.raises(ValueError, match=r"an image is uint8 \[H, W, 3\], got float64 \[2, 2\]"):
        dd.predict(trained, np.zeros((2, 2)))


def test_labelled_images_go_on_from_a_run(made):
    _, _, trained = made
    how = {"steps": 1, "batch_size": 2, "device": "cpu", "settings": TINY}
    tuned = dd.train("real/shapes", to="runs/tuned", start=trained, shots=2, **how)
    assert tuned.record["trained_on"]["shots"] == 2
    assert tuned.record["trained_on"]["after"]["source"] == "synthetic"
    assert dd.train("real/shapes", to="runs/tuned", start="runs/mine", shots=2, **how) == tuned


def test_classes_may_have_synonyms_and_prompts_may_say_theirs():
    rows = dd.api._rows({"a picture": ["b"]}, dd.api._words(["a", "b"]))
    assert rows == [{"caption": "a picture", "classes": ["b"]}]
    words = dd.api._words({"forklift": ["lift truck"], "pallet": []})
    assert words.names == ("forklift", "pallet")
    rows = dd.api._rows(["two lift trucks and a Pallet"], words)
    assert rows[0]["classes"] == ["forklift", "pallet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "an apple"}, "expected a list of texts"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a dog"]}, "'a dog' names none of the classes apple: name one in it"),
        ({"prompts": {"a dog": ["dog"]}}, "dog"),
        ({"classes": "vok"}, "unknown taxonomy 'vok'; allowed: voc, coco, shapes"),
        ({"generator": "embeded"}, "no such diffusion; allowed: .*Did you mean 'embedded'"),
        ({"masks": "papr"}, "no such masks; allowed: paper, refined"),
        ({"steps": 0}, "diffusion.steps=0: expected a whole number from 1"),
        ({"seed": -1}, "seed=-1: expected a whole number of 0 or more"),
        ({"device": "gpu"}, "device='gpu'; allowed: auto"),
        ({"settings": {"masks.bnad": 1}}, "no key 'bnad' in masks.*Did you mean 'band'"),
        ({"settings": {"colour": 1}}, "no key 'colour' at the top level"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    given = {"prompts": ["an apple"], "classes": ["apple"], **arguments}
    with pytest.raises(ValueError, match=message):
        dd.generate(**given, to="mine")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_or_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished training run there"):
        dd.score(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a synthetic data set"):
        dd.Drawings(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no data set: no image"):
        dd.train(tmp_path, to=tmp_path / "run")


def test_settings_of_the_working_folder_are_read(tmp_path, monkeypatch):
    (tmp_path / "conf/masks").mkdir(parents=True)
    text = (config.CONF / "masks/paper.yaml").read_text().replace("power: 4", "power: 1")
    (tmp_path / "conf/masks/mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert config.composed("generate", {"masks": "mine"}).masks.power == 1


def test_the_import_is_light():
    """Nothing heavy before a verb is called; a name that is not there is said."""
    heavy = "[m for m in ('torch', 'hydra', 'numpy', 'PIL') if m in sys.modules]"
    code = (
        f"import sys, dd; print({heavy}, dir(dd)[-1]); dd.generate; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] train\nFalse\n"
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = dd.trian
    assert set(dd.__all__) <= set(dir(dd)) and all(getattr(dd, name) for name in dd.__all__)


# The notebook


def run_notebook(folder, monkeypatch, smaller=None):
    """The notebook with its outputs, after its cells were run in ``folder``; ``smaller``: the
    numbers in place of its own."""
    notebook = json.loads(NOTEBOOK.read_text())
    numbers = "IMAGES, SAMPLING, TRAINING, SCENES = "
    for cell in notebook["cells"]:
        if smaller and cell["cell_type"] == "code":
            lines = "".join(cell["source"]).split("\n")
            cell["source"] = [
                (f"{numbers}{smaller}" if line.startswith(numbers) else line) + "\n"
                for line in lines
            ]
    assert not smaller or str(smaller) in json.dumps(notebook)
    path = folder / "quickstart.ipynb"
    path.write_text(json.dumps(notebook))
    monkeypatch.chdir(folder)
    runpy.run_path(str(ROOT / "examples/run_notebook.py"))["main"](path)
    return json.loads(path.read_text())


def shown(notebook):
    """(all that was printed, number of pictures)."""
    found = [o for c in notebook["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    text = "".join("".join(o["text"]) for o in found if o["output_type"] == "stream")
    return text, sum("image/png" in o.get("data", {}) for o in found)


def test_the_notebook_runs(tmp_path, monkeypatch):
    text, pictures = shown(run_notebook(tmp_path, monkeypatch, (4, 2, 1, 2)))
    assert pictures == 3 and "% on 2 scenes" in text
    assert "{'leaf': (9, 32, 32), 'tire': (9, 32, 32)}" in text


def test_the_notebook_is_shown_with_what_it_prints_and_draws():
    text, pictures = shown(json.loads(NOTEBOOK.read_text()))
    assert pictures == 3 and "% on 16 scenes" in text


@pytest.mark.full
def test_the_notebook_takes_minutes(tmp_path, monkeypatch):
    """As it is: its processor time, since other programs may share the machine."""
    began = time.process_time()
    text, pictures = shown(run_notebook(tmp_path, monkeypatch))
    assert pictures == 3 and "% on 16 scenes" in text
    assert time.process_time() - began < 180
