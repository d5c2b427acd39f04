"""Self-training on unlabelled photographs: what the teacher says, what the student sees, that it
can be stopped."""

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from dd.segmenters.transforms import TwoViews
from dd.store.checkpoints import load
from dd.training.datamodule import Schedule, SegmentationData, WithPhotos
from dd.training.fitting import Reseed
from dd.training.mean_teacher import MeanTeacher, class_mix
from dd.training.segmentation import EMA, LastCheckpoint, Segmentation

NAMES = ["background", "cat", "dog"]


class Photos:
    """Unlabelled pictures of several sizes, each of one brightness."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return np.full((8 + index, 10, 3), 40 * index, np.uint8)


def views(photo, seed):
    """A transform whose result tells the photograph and the draw: its brightness, and that plus
    a small number."""
    shown = torch.full((3, 8, 10), float(photo.flat[0]))
    return (
        shown,
        shown + np.random.default_rng(seed).integers(1, 9),
        torch.ones(8, 10, dtype=torch.bool),
    )


class Says(torch.nn.Module):
    """A teacher whose logits [B, K, H, W] are given."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, photos):
        assert not self.training
        return self.logits


# The teacher


def test_a_pixel_gets_a_label_where_the_teacher_is_sure():
    says = Says(
        [[[[0.95, 0.5, 0.05, 0.2]], [[0.03, 0.3, 0.91, 0.79]], [[0.02, 0.2, 0.04, 0.01]]]]
    )  # one row of four pixels
    teacher, photos = MeanTeacher(3, confidence=0.8, per_class=False), torch.zeros(1, 3, 1, 4)
    known = torch.ones(1, 1, 4, dtype=torch.bool)
    assert teacher.labels(says, photos, known).tolist() == [[[0, 255, 1, 255]]]
    known[0, 0, 0] = False
    assert teacher.labels(says, photos, known).tolist() == [[[255, 255, 1, 255]]]
    assert MeanTeacher(3, confidence=0.0).labels(says, photos, torch.ones_like(known)).tolist() == [
        [[0, 0, 1, 1]]
    ]


def test_thresholds_follow_how_sure_the_teacher_is_of_each_class():
    says = Says(
        [[[[0.9, 0.1, 0.2, 0.3]], [[0.1, 0.6, 0.8, 0.7]], [[0.0001, 0.3, 0.00001, 0.00001]]]]
    )
    teacher, known = (
        MeanTeacher(3, confidence=0.9, momentum=0.5),
        torch.ones(1, 1, 4, dtype=torch.bool),
    )
    known[0, 0, 3] = False
    first = teacher.labels(says, torch.zeros(1, 3, 1, 4), known)
    certainty = [
        0.5 + 0.5 * 0.9,
        0.5 + 0.5 * (0.6 + 0.8) / 2,
        1.0,
    ]  # a class that nobody has seen stays where it was
    assert teacher.certainty.tolist() == pytest.approx(certainty, abs=1e-4)
    assert teacher.thresholds().tolist() == pytest.approx([0.9 * c for c in certainty], abs=1e-4)
    assert first.tolist() == [[[0, 255, 1, 255]]]  # 0.8 is enough for class 1, at 0.9 * 0.85
    for _ in range(20):
        teacher.labels(says, torch.zeros(1, 3, 1, 4), known)
    assert teacher.thresholds()[1].item() == pytest.approx(
        0.9 * 0.7, abs=1e-3
    )  # class 2 keeps the largest mean, 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"confidence": 1.5}, r"teacher\.confidence=1\.5: expected a number from 0 to 1"),
        ({"confidence": True}, "expected a number"),
        ({"momentum": -1}, "momentum=-1"),
        ({"mix": "yes"}, "mix='yes': expected true or false"),
        ({"per_class": 1}, "expected true or false"),
        ({"weight": 0}, "weight=0: expected a number above 0, or self_training=off"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        MeanTeacher(3, **setting)


# ClassMix


def test_half_of_the_classes_are_pasted_with_their_labels():
    images, photos = torch.rand(40, 3, 2, 3), torch.rand(40, 3, 2, 3) + 1
    labels = torch.tensor([[0, 1, 2], [255, 1, 2]]).expand(40, 2, 3).clone()
    pseudo = torch.full((40, 2, 3), 7)
    torch.manual_seed(0)
    mixed, found = class_mix(images, labels, photos, pseudo)
    chosen = set()
    for i in range(40):
        pasted = found[i] != 7
        classes = set(labels[i][pasted].tolist())
        assert len(classes) == 2 and 255 not in classes  # half of three, rounded up
        assert torch.equal(pasted, torch.isin(labels[i], torch.tensor(sorted(classes))))
        assert torch.equal(found[i][pasted], labels[i][pasted])
        assert torch.equal(mixed[i][:, pasted], images[i][:, pasted]) and torch.equal(
            mixed[i][:, ~pasted], photos[i][:, ~pasted]
        )
        chosen.add(frozenset(classes))
    assert len(chosen) == 3  # any two of them
    torch.manual_seed(0)
    assert torch.equal(class_mix(images, labels, photos, pseudo)[1], found)


def test_an_image_without_labels_leaves_the_photograph_as_it_is():
    labels, photos, pseudo = (
        torch.full((1, 2, 2), 255),
        torch.rand(1, 3, 2, 2),
        torch.ones(1, 2, 2, dtype=torch.int64),
    )
    mixed, found = class_mix(torch.zeros(1, 3, 2, 2), labels, photos, pseudo)
    assert torch.equal(mixed, photos) and torch.equal(found, pseudo)


# What is seen


def test_teacher_and_student_see_the_same_part_of_a_photograph():
    rng = np.random.default_rng(0)
    photo = (
        (rng.integers(0, 2, (12, 20, 1)) * 160 + 40)
        .repeat(3, 2)
        .astype(np.uint8)
        .repeat(8, 0)
        .repeat(8, 1)
    )
    transform = TwoViews(scale=64, crop_size=48, blur=0.0, grey=0.0)
    differ = padded = 0
    for seed in range(12):
        before = np.random.get_state()[1].tolist(), random.getstate()
        shown, changed, known = transform(photo, seed)
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before
        assert (
            shown.shape == changed.shape == (3, 48, 48)
            and known.shape == (48, 48)
            and known.dtype == torch.bool
        )
        assert (
            shown.dtype == changed.dtype == torch.float32
            and changed.min() >= 0
            and changed.max() <= 255
        )
        again = transform(photo, seed)
        assert all(torch.equal(a, b) for a, b in zip((shown, changed, known), again, strict=True))
        bright = [(v.mean(0) > v.mean(0)[known].mean())[known] for v in (shown, changed)]
        assert (bright[0] == bright[1]).float().mean() > 0.97  # the same scene ...
        differ += not torch.allclose(shown[:, known], changed[:, known])  # ... in another light
        assert torch.equal(shown[:, ~known], changed[:, ~known])
        padded += int((~known).any())
    assert differ >= 6 and padded >= 1


def test_students_pictures_are_blurred_and_greyed_as_often_as_asked():
    photo = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    never, blurred, grey = (
        TwoViews(scale=48, ratio_range=(1.0, 1.0), crop_size=48, blur=b, grey=g)
        for b, g in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    )
    rough = smooth = 0
    for seed in range(6):
        plain, soft, without = (transform(photo, seed)[1] for transform in (never, blurred, grey))
        assert torch.equal(without[0], without[1]) and torch.equal(without[1], without[2])
        assert not torch.equal(plain[0], plain[1])
        rough, smooth = (
            rough + plain.diff(dim=2).abs().mean(),
            smooth + soft.diff(dim=2).abs().mean(),
        )
    assert smooth < 0.9 * rough
    grey = TwoViews(scale=48, ratio_range=(1.0, 1.0), crop_size=48, blur=0.0, grey=0.2)
    found = sum(torch.equal(c[0], c[1]) for _, c, _ in (grey(photo, seed) for seed in range(100)))
    assert 10 <= found <= 32
    with pytest.raises(ValueError, match=r"blur=1\.2: expected a number from 0 to 1"):
        TwoViews(scale=48, blur=1.2)


def test_photographs_have_passes_of_their_own(toy_data):
    data = toy_data(count=3).train
    schedule = Schedule(
        data, lambda image, mask, seed: (torch.tensor(seed), torch.tensor(0)), 20, seed=4
    )
    both = WithPhotos(schedule, Photos(), views)
    assert len(both) == 20
    rows = [both[i] for i in range(20)]
    assert [int(row[0]) for row in rows] == [int(schedule[i][0]) for i in range(20)]
    drawn = [int(row[2][0, 0, 0]) // 40 for row in rows]
    assert all(
        sorted(drawn[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5)
    )  # each once a pass
    assert len({tuple(drawn[i : i + 5]) for i in range(0, 20, 5)}) > 1
    changes = [int((row[3] - row[2]).mean()) for row in rows]
    assert len(set(changes)) > 3
    halves = [
        WithPhotos(Schedule(data, toy_label, 10, 4, 2, i), Photos(), views) for i in (0, 1)
    ]  # of two processes
    assert [int(halves[i % 2][i // 2][2][0, 0, 0]) // 40 for i in range(20)] == drawn


def toy_label(image, mask, seed):
    return torch.tensor(seed), torch.tensor(0)


# Training


@pytest.fixture
def fit(tmp_path, tiny_segmenter, toy_data, make_trainer):
    """``fit(steps, callbacks, teacher={}, resume=None)`` -> the module."""

    def run(steps, callbacks, teacher=None, resume=None, **trainer):
        settings = {"confidence": 0.4, "momentum": 0.9, **(teacher or {})}
        task = Segmentation(
            tiny_segmenter(), NAMES, learning_rate=0.05, teacher=MeanTeacher(3, **settings)
        )
        plain = toy_data()
        data = SegmentationData(
            plain.train,
            None,
            plain.train_transform,
            plain.eval_transform,
            2,
            seed=0,
            photos=(Photos(), views),
        )
        fitted = make_trainer(tmp_path, steps, [Reseed(0), *callbacks], **trainer)
        fitted.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
        return task

    return run


def test_the_average_teaches_and_is_not_moved_by_it(fit, monkeypatch):
    """Its weights are the average's, which the step before left, its statistics too: a look at
    photographs leaves no trace."""
    seen, averages, steps = [], EMA(0.7), []
    real = MeanTeacher.labels

    def labels(self, teacher, photos, known):
        before = {k: v.clone() for k, v in teacher.state_dict().items()}
        found = real(self, teacher, photos, known)
        assert not found.requires_grad and all(p.grad is None for p in teacher.parameters())
        assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
        seen.append(before)
        return found

    class After(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            steps.append({k: v.clone() for k, v in averages.average.segmenter.state_dict().items()})
            raw = module.segmenter.backbone[0].weight
            assert torch.equal(raw, steps[-1]["backbone.0.weight"]) == (
                len(steps) == 1
            )  # the first step is all there is

    monkeypatch.setattr(MeanTeacher, "labels", labels)
    fit(4, [averages, After()])
    assert len(seen) == 4
    for taught, left in zip(seen[1:], steps[:-1], strict=True):
        assert all(torch.equal(v, left[k]) for k, v in taught.items())


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_loss_is_that_of_the_labelled_images_and_of_the_photographs(
    fit, tiny_segmenter, weight
):
    parts = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            metrics = trainer.callback_metrics
            parts.append(
                [
                    float(v)
                    for v in (outputs["loss"], metrics["train/loss"], metrics["train/photo_loss"])
                ]
            )

    task = fit(3, [EMA(0.7), Losses()], {"weight": weight, "mix": False})
    for total, labelled, photos in parts:
        assert photos > 0 and total == pytest.approx(labelled + weight * photos, rel=1e-5)
    assert 0 < float(task.trainer.callback_metrics["train/taught"]) <= 1


@pytest.mark.parametrize("mix", [True, False])
def test_an_interrupted_self_training_goes_on_as_if_it_had_not_been(fit, tmp_path, mix):
    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise RuntimeError("the lights went out")

    def saved(name):
        return [EMA(0.7), LastCheckpoint(str(tmp_path / name), 1)]

    fit(6, saved("straight"), {"mix": mix})
    with pytest.raises(RuntimeError, match="lights"):
        fit(6, [*saved("resumed"), Crash()], {"mix": mix})
    fit(6, saved("resumed"), {"mix": mix}, resume=tmp_path / "resumed/last.ckpt")
    one, other = (load(tmp_path / name / "last.ckpt") for name in ("straight", "resumed"))
    assert "teacher.certainty" in one["current_model_state"]
    for part in ("state_dict", "current_model_state"):
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), (part, name)


def test_there_is_no_teacher_without_an_average(fit):
    with pytest.raises(
        ValueError,
        match=r"needs the average of the weights as its teacher: trainer\.callbacks\.ema",
    ):
        fit(1, [])
