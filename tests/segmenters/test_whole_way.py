"""The students on vision transformers, tiny, through training, scores, masks of photographs and one
ONNX file, as their presets and the commands have it."""

import pytest

from dd import __main__ as door
from dd.stages.prepare_shapes import prepare_shapes
from dd.store.provenance import read_json

DEEPLAB = [f"~segmenter.{key}" for key in ("depth", "base_channels", "dilations")]
SIZES = [f"segmenter.{key}" for key in ("hidden_size=16", "layers=4", "heads=2")]
POSITIONS = "segmenter.image_size=56"
STUDENTS = {
    "dinov2_linear": [POSITIONS],
    "dinov2_linear of DINOv3": ["segmenter.family=dinov3", "segmenter.frozen=false"],
    "dinov2_dpt": [POSITIONS, "segmenter.channels=8"],
    "eomt": [POSITIONS, "segmenter.num_queries=8", "segmenter.num_points=100"],
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    prepare_shapes(root / "data", sizes={"train": 6, "tune": 4, "test": 5})
    return root


@pytest.fixture(scope="module", params=STUDENTS)
def trained(request, shapes, run, tmp_path_factory):
    """(data root, folder of the run)."""
    out = tmp_path_factory.mktemp("outputs")
    where = [f"data_root={shapes}/data", f"output_root={out}"]
    name = request.param.partition(" ")[0]
    run(
        "train",
        "experiment=shapes_real",
        "shots=4",
        "name=student",
        f"segmenter={name}",
        "segmenter.pretrained=null",
        *DEEPLAB,  # what the experiment sets for its own
        *SIZES,
        *STUDENTS[request.param],
        *where,
        "batch_size=2",
        "trainer.max_steps=2",
        "trainer.precision=32-true",
        "trainer.enable_progress_bar=false",
        "trainer.accelerator=cpu",
    )
    [folder] = [path.parent for path in out.rglob("run.json")]
    return shapes / "data", folder


def test_training_scores_and_masks(trained, run):
    data, folder = trained
    run("evaluate", f"run={folder}", "data=shapes", f"data_root={data}", "device=cpu")
    [metrics] = folder.rglob("metrics.json")
    assert 0 <= read_json(metrics)["miou"] <= 100
    images = data / "shapes/JPEGImages"
    run("evaluate", "stage=predict", f"run={folder}", f"images={images}", "device=cpu")
    assert len(list((folder / "predictions").rglob("masks/*.png"))) == len(list(images.iterdir()))


@pytest.mark.full
def test_one_onnx_file(trained):
    data, folder = trained
    assert door.main(["deploy", f"run={folder}", f"data_root={data}"]) == 0
    assert read_json(folder / "segmenter.json")["agreement"] >= 0.999
