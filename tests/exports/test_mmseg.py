import shutil
from pathlib import Path

import numpy as np
import pytest

from dd.segmenters import deeplabv3  # noqa: F401 (installs a placeholder)

# mmseg after that
import mmseg  # isort: skip
import mmseg.datasets  # isort: skip  fills the registries
from mmengine.config import Config  # isort: skip
from mmengine.registry import init_default_scope  # isort: skip
from mmengine.dataset import ConcatDataset  # isort: skip
from mmseg.evaluation import IoUMetric  # isort: skip
from mmseg.registry import DATASETS, METRICS  # isort: skip


@pytest.fixture
def config(hall, exported, tmp_path):
    """The written configuration, read after the export was moved elsewhere."""
    shutil.move(exported("mmseg", hall.root), tmp_path / "moved here")
    init_default_scope("mmseg")
    return Config.fromfile(tmp_path / "moved here" / "dataset.py")


def samples(data):
    for sample in (data[i] for i in range(len(data))):
        place = sample["data_samples"].img_path.partition("/images/")[2].partition("/")[2]
        yield (
            place.rpartition(".")[0],
            sample["inputs"].numpy(),
            sample["data_samples"].gt_sem_seg.data.numpy()[0],
        )


def test_mmsegmentation_reads_the_same_pixels_with_the_written_configuration(hall, config):
    data = DATASETS.build(config.val_dataloader.dataset)
    found = {name: (image, mask) for name, image, mask in samples(data)}
    assert isinstance(data, ConcatDataset) and sorted(found) == sorted(
        hall.splits["val"]
    )  # .png and .jpg
    for name, (image, mask) in found.items():
        assert np.array_equal(mask, hall.masks[name]) and 255 in mask
        difference = image[::-1].transpose(1, 2, 0).astype(int) - hall.pixels(
            name
        )  # OpenCV's order of colours
        assert np.abs(difference).max() <= (
            0 if hall.suffixes[name] == ".png" else 3
        )  # decoders of JPEG differ
    assert data.metainfo["classes"] == hall.classes.all_names
    assert data.metainfo["palette"][1] == [250, 200, 10]


def test_every_split_is_there_and_the_training_pipeline_runs(hall, config):
    for split, ids in hall.splits.items():
        config.splits[split].pop("pipeline", None)
        built = DATASETS.build(config.splits[split])
        assert len(built) == len(ids)
        parts = built.datasets if isinstance(built, ConcatDataset) else [built]
        assert all(
            p.ignore_index == 255 and p.reduce_zero_label is False and p.label_map is None
            for p in parts
        )
    data = DATASETS.build(config.train_dataloader.dataset)
    assert len(data) == 3
    for _, image, mask in samples(data):
        assert image.shape[1:] == mask.shape and set(np.unique(mask)) <= {0, 1, 2, 3, 255}
    assert config.num_classes == 5 and config.ignore_index == 255
    metric = METRICS.build(config.val_evaluator)
    assert isinstance(metric, IoUMetric) and metric.ignore_index == 255


def test_a_set_of_one_suffix_and_one_split(pets, exported):
    init_default_scope("mmseg")
    config = Config.fromfile(exported("mmseg", pets) / "dataset.py")
    data = DATASETS.build(config.train_dataloader.dataset)
    assert (
        type(data).__name__ == "BaseSegDataset"
        and len(data) == 4
        and "val_dataloader" not in config
    )


def test_the_configuration_serves_as_a_base_beside_a_model(hall, exported, tmp_path):
    root = exported("mmseg", hall.root)
    model = Path(mmseg.__file__).parent / ".mim/configs/_base_/models/deeplabv3_r50-d8.py"
    classes = "model = dict(decode_head=dict(num_classes=5), auxiliary_head=dict(num_classes=5))\n"
    (tmp_path / "own.py").write_text(
        f"_base_ = [{str(root / 'dataset.py')!r}, {str(model)!r}]\n{classes}"
    )
    init_default_scope("mmseg")
    config = Config.fromfile(tmp_path / "own.py")
    assert config.model.decode_head.num_classes == config.num_classes == 5
    data = DATASETS.build(config.val_dataloader.dataset)
    for name, _, mask in samples(data):
        assert np.array_equal(mask, hall.masks[name])
    assert len(data) == 2
