import os
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from dd.evaluation import metrics
from dd.store.checkpoints import damage
from dd.training.datamodule import whole_loader
from dd.training.segmentation import (
    EMA,
    PAPER_SCALES,
    DoesNotFit,
    LastCheckpoint,
    Predictor,
    Segmentation,
    Views,
    count,
    ema_average,
    predict,
    predict_fitting,
    unshared_statistics,
)

NAMES = ["background", "cat", "dog"]


class Watch(pl.Callback):
    """Keeps the raw weights and the learning rates of every step."""

    def __init__(self):
        self.weights, self.rates = [], []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append({k: v.clone() for k, v in module.state_dict().items()})


class Stop(pl.Callback):
    """The crash of a training at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("the lights went out")


@pytest.fixture
def fit(tmp_path, tiny_segmenter, toy_data, make_trainer):
    """``fit(steps, callbacks, data={}, module={}, resume=None, **trainer)`` -> (module,
    trainer)."""

    def run(steps, callbacks=(), data=None, module=None, resume=None, **kwargs):
        settings = {"learning_rate": 0.05, "backbone_multiplier": 0.5, **(module or {})}
        task = Segmentation(tiny_segmenter(), NAMES, **settings)
        trainer = make_trainer(tmp_path, steps, callbacks, **kwargs)
        trainer.fit(task, datamodule=toy_data(**(data or {})), ckpt_path=resume, weights_only=True)
        return task, trainer

    return run


def read(path):
    return torch.load(path, weights_only=True)


def first(task):
    return task.segmenter.backbone[0].weight


class Losses(pl.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.values.append(float(outputs["loss"]))


# The average of the weights


def averaged(decay, old, new, steps):
    """What :func:`ema_average` makes of copies of the tensors ``old``."""
    old = [o.clone() for o in old]
    ema_average(decay)(old, new, torch.tensor(steps))
    return old


def test_the_average_lies_where_the_module_is_trained():
    """Lightning copies the module before it goes to its device; an average that stays behind
    costs a transfer each step."""
    average, module = EMA(0.7), torch.nn.Linear(2, 2)
    task = Segmentation(module, NAMES)
    trainer = SimpleNamespace(global_step=0)
    average.setup(trainer, task, "fit")
    assert average.average.device.type == "cpu" and average.average.segmenter is not module
    task.to("meta")
    average.on_fit_start(trainer, task)
    assert {p.device.type for p in average.average.parameters()} == {"meta"}


def test_statistics_that_processes_do_not_share(tiny_segmenter):
    segmenter = tiny_segmenter()
    assert [tuple(b.shape) for b in unshared_statistics(segmenter)] == [(4,), (4,), ()]
    assert unshared_statistics(torch.nn.SyncBatchNorm.convert_sync_batchnorm(segmenter)) == []


def test_the_decay_warms_up():
    old, new = (
        [torch.tensor([1.0, -2.0]), torch.tensor([[0.5]])],
        [torch.tensor([3.0, 5.0]), torch.tensor([[-4.0]])],
    )
    for steps, decay in ((0, 1 / 10), (1, 2 / 11), (20, 21 / 30), (80, 0.9), (10**6, 0.9)):
        for found, o, n in zip(averaged(0.9, old, new, steps), old, new, strict=True):
            torch.testing.assert_close(found, decay * o + (1 - decay) * n)
    found = averaged(0.05, old, new, 0)[0]
    assert found.tolist() == pytest.approx((0.05 * old[0] + 0.95 * new[0]).tolist())


def test_averaging_all_tensors_at_once_changes_no_bit():
    old, new = (
        [torch.randn(n, generator=torch.Generator().manual_seed(k + n)) for n in (1, 7, 1000)]
        for k in (0, 1)
    )
    for steps in (0, 5, 10**4):
        weight = 1 - min(0.999, (1 + steps) / (10 + steps))
        assert all(
            map(
                torch.equal,
                averaged(0.999, old, new, steps),
                [o + (n - o) * weight for o, n in zip(old, new, strict=True)],
            )
        )


def test_counters_are_copied_and_not_averaged():
    assert averaged(
        0.9, [torch.tensor(3), torch.tensor(4)], [torch.tensor(8), torch.tensor(2)], 5
    ) == [8, 2]


def test_a_checkpoint_holds_the_average_and_the_raw_weights(fit, tmp_path):
    watch = Watch()
    task, _ = fit(6, [watch, EMA(0.7), LastCheckpoint(str(tmp_path / "checkpoints"), 4)])
    checkpoint = read(tmp_path / "checkpoints/last.ckpt")
    raw, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert checkpoint["global_step"] == 6
    assert raw.keys() == average.keys() == watch.weights[-1].keys()
    for name, values in ((n, [w[n] for w in watch.weights]) for n in raw):
        assert torch.equal(raw[name], values[-1])
        expected = values[0].double()
        for step, value in enumerate(values[1:], 1):
            decay = min(0.7, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * value
        if values[0].is_floating_point():
            torch.testing.assert_close(average[name].double(), expected, rtol=1e-5, atol=1e-7)
            assert not torch.equal(average[name], raw[name])
        else:
            assert average[name] == raw[name] == 6  # batches that batch norm has seen
        assert torch.equal(
            task.state_dict()[name], average[name]
        )  # what a validation after training would see


def test_hyper_parameters_are_plain(fit, tmp_path):
    fit(1, [EMA(0.7), LastCheckpoint(str(tmp_path))], module={"warmup": 2, "betas": [0.8, 0.9]})
    stored = read(tmp_path / "last.ckpt")["hyper_parameters"]
    assert stored == {
        "learning_rate": 0.05,
        "weight_decay": 1e-4,
        "backbone_multiplier": 0.5,
        "betas": [0.8, 0.9],
        "poly_power": 0.9,
        "warmup": 2,
        "channels_last": False,
        "fused": False,
        "compile": False,
    }


# Checkpoints


def test_checkpoints_come_every_n_steps_and_at_the_end(fit, tmp_path):
    class Seen(pl.Callback):
        steps = []

        def on_train_batch_end(self, trainer, *_):
            path = tmp_path / "checkpoints/last.ckpt"
            self.steps.append(read(path)["global_step"] if path.exists() else None)

    fit(7, [LastCheckpoint(str(tmp_path / "checkpoints"), 3), Seen()])
    assert Seen.steps == [None, None, 3, 3, 3, 6, 7]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "last.ckpt",
        "previous.ckpt",
        "SHA256SUMS",
    }
    assert read(tmp_path / "checkpoints/previous.ckpt")["global_step"] == 6


def test_an_interrupted_write_leaves_the_checkpoint_before(fit, tmp_path, monkeypatch):
    sync = os.fsync

    def crash(descriptor):
        path = tmp_path / "last.ckpt"
        if path.exists() and "last.next" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="No space"):
        fit(6, [LastCheckpoint(str(tmp_path), 2)])
    assert (
        read(tmp_path / "last.ckpt")["global_step"] == 2 and damage(tmp_path / "last.ckpt") is None
    )
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt", "SHA256SUMS"}


@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(fit, tmp_path, stop):
    straight = Watch()
    fit(8, [straight, EMA(0.7), LastCheckpoint(str(tmp_path / "straight"), 1)])
    with pytest.raises(RuntimeError, match="lights went out"):
        fit(8, [EMA(0.7), LastCheckpoint(str(tmp_path / "resumed"), 1), Stop(stop)])
    assert read(tmp_path / "resumed/last.ckpt")["global_step"] == stop
    rest = Watch()
    task, trainer = fit(
        8,
        [rest, EMA(0.7), LastCheckpoint(str(tmp_path / "resumed"), 1)],
        resume=tmp_path / "resumed/last.ckpt",
    )
    assert trainer.global_step == 8
    assert rest.rates == straight.rates[stop:]
    one, other = (read(tmp_path / name / "last.ckpt") for name in ("straight", "resumed"))
    for part in ("state_dict", "current_model_state"):
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), (part, name)


def test_a_resumed_training_is_still_validated(fit, tmp_path):
    every_third = {
        "limit_val_batches": 1.0,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "data": {"tune": 3},
    }

    class Looks(pl.Callback):
        def __init__(self):
            self.steps = []

        def on_validation_end(self, trainer, *_):
            self.steps.append(trainer.global_step)

    straight, rest = Looks(), Looks()
    fit(8, [straight], **every_third)
    assert straight.steps == [3, 6]
    with pytest.raises(RuntimeError, match="lights went out"):
        fit(8, [LastCheckpoint(str(tmp_path), 1), Stop(5)], **every_third)
    fit(8, [rest], resume=tmp_path / "last.ckpt", **every_third)
    assert rest.steps == [6]


# The schedule


@pytest.mark.parametrize(("power", "warmup"), [(0.9, 0), (1.0, 0), (0.9, 3)])
def test_the_polynomial_schedule(fit, power, warmup):
    watch = Watch()
    fit(10, [watch], module={"poly_power": power, "warmup": warmup})
    for step, rates in enumerate(watch.rates):
        factor = (1 - step / 10) ** power * min(1, (step + 1) / (warmup + 1))
        assert rates == pytest.approx([0.05 * 0.5 * factor, 0.05 * factor])
    assert len(watch.rates) == 10 and watch.rates[0][1] == pytest.approx(0.05 / (warmup + 1))


def test_the_optimiser_is_adamw_with_the_segmenters_groups(fit):
    _, trainer = fit(1, module={"weight_decay": 0.01, "betas": [0.8, 0.95]})
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert [g["name"] for g in optimizer.param_groups] == ["backbone", "heads"]
    assert all(
        g["weight_decay"] == 0.01 and g["betas"] == (0.8, 0.95) for g in optimizer.param_groups
    )


def test_training_lowers_the_loss(fit, toy_data):
    task, _ = fit(60, module={"learning_rate": 0.05, "backbone_multiplier": 1.0})
    images, masks = map(list, zip(*(toy_data().train[i] for i in range(7)), strict=True))
    images = torch.stack([torch.from_numpy(i.transpose(2, 0, 1)) for i in images])
    labels = torch.from_numpy(np.stack(masks).astype(np.int64))
    with torch.no_grad():
        assert float(task.segmenter.eval().loss(images, labels)["loss"]) < 0.7 * np.log(3)


def test_channels_last_is_a_layout_and_nothing_else(fit):
    plain, _ = fit(2)
    last, _ = fit(2, module={"channels_last": True})
    assert last.segmenter.backbone[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(last.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_fused_optimiser_is_faster_and_nothing_else(fit):
    """Also with a clipped gradient and mixed precision, where Lightning by itself refuses it."""
    how = {"gradient_clip_val": 0.01, "precision": "bf16-mixed"}
    plain, _ = fit(3, **how)
    fused, trainer = fit(3, module={"fused": True}, **how)
    assert trainer.optimizers[0].param_groups[0]["fused"] and not torch.equal(
        *map(first, (fused, fit(3, precision="bf16-mixed")[0]))
    )
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.full  # the compiler takes its time
def test_a_compiled_loss_is_faster_and_nothing_else(fit, tmp_path):
    plain, compiled = Losses(), Losses()
    fit(4, [EMA(0.7), plain])
    task, _ = fit(
        4, [EMA(0.7), compiled, LastCheckpoint(str(tmp_path), 4)], module={"compile": True}
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.values == pytest.approx(plain.values, rel=1e-4)
    assert read(tmp_path / "last.ckpt")["state_dict"].keys() == fit(1)[0].state_dict().keys()


# Prediction


class Corners(torch.nn.Module):
    """Logits that do not depend on the batch: the channels themselves."""

    def forward(self, images):
        return images.half()


@pytest.mark.parametrize("sizes", [[(7, 5), (7, 5)], [(1, 1), (31, 17)], [(64, 3), (9, 50)]])
@pytest.mark.parametrize("shapes", [[(8, 8), (8, 8)], [(8, 8), (5, 13)]])
def test_predictions_are_at_original_size(sizes, shapes):
    images = [
        torch.randn(4, *shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate(shapes)
    ]
    found = predict(Corners(), images, sizes)
    for image, size, ids in zip(images, sizes, found, strict=True):
        assert ids.shape == size and ids.dtype == torch.int64
        logits = F.interpolate(
            image.half().float()[None], size=size, mode="bilinear", align_corners=False
        )
        assert torch.equal(ids, logits[0].argmax(0))


def test_of_equal_logits_the_first_class_is_predicted():
    logits = torch.randint(
        0, 3, (2, 9, 16, 16), generator=torch.Generator().manual_seed(0)
    )  # nearly each pixel is a tie
    for own, ids in zip(logits, predict(Corners(), list(logits), [(16, 16)] * 2), strict=True):
        assert np.array_equal(ids.numpy(), own.numpy().argmax(0))


def test_predictions_of_a_batch_and_of_single_images_agree(tiny_segmenter, toy_data):
    segmenter, pictures = tiny_segmenter().eval(), toy_data().train
    images = [torch.from_numpy(pictures[i][0].transpose(2, 0, 1).copy()) for i in range(4)]
    with torch.no_grad():
        together = predict(segmenter, images, [(8, 10)] * 4)
        for image, ids in zip(images, together, strict=True):
            assert torch.equal(predict(segmenter, [image], [(8, 10)])[0], ids)


def test_counting_over_a_loader(tiny_segmenter, toy_data):
    segmenter, data, seen = tiny_segmenter().eval(), toy_data(tune=5), []
    loader = whole_loader(data.tune, data.eval_transform, batch_size=2)
    counted = count(segmenter, loader, metrics.confusion_matrix(3), on_batch=seen.append)
    expected = np.zeros((3, 3), int)
    with torch.no_grad():
        for i in range(5):
            image, mask = data.tune[i]
            ids = segmenter(data.eval_transform(image)[None])[0].argmax(0).numpy()
            for truth, answer in zip(mask.ravel(), ids.ravel(), strict=True):
                if truth != 255:
                    expected[truth, answer] += 1
    assert counted.tolist() == expected.tolist()
    assert [len(batch) for batch in seen] == [2, 2, 1]


def test_validation_scores_the_averaged_weights_over_the_whole_set(
    fit, tmp_path, tiny_segmenter, toy_data
):
    every_second = {
        "limit_val_batches": 1.0,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "data": {"tune": 5},
    }
    _, trainer = fit(4, [EMA(0.7), LastCheckpoint(str(tmp_path), 4)], **every_second)
    segmenter, data = tiny_segmenter().eval(), toy_data(tune=5)
    state = read(tmp_path / "last.ckpt")["state_dict"]
    segmenter.load_state_dict({k.removeprefix("segmenter."): v for k, v in state.items()})
    confusion = count(
        segmenter, whole_loader(data.tune, data.eval_transform), metrics.confusion_matrix(3)
    )
    logged = trainer.logged_metrics
    assert float(logged["tune/miou"]) == pytest.approx(metrics.miou(confusion), rel=1e-5)
    for name, value in zip(NAMES, metrics.iou(confusion), strict=True):
        assert float(logged[f"tune/iou/{name}"]) == pytest.approx(value, rel=1e-5)
    assert {"train/loss", "train/decode.loss_ce"} <= logged.keys()


# Test-time augmentation


def pictures(sizes=((12, 9), (7, 15), (12, 9))):
    return [
        np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        for i, size in enumerate(sizes)
    ]


class Colours(torch.nn.Module):
    """The brightest channel is the class, but class 1 has the left side and 2 the right: a
    mirror that is not undone shows."""

    def forward(self, images):
        side = torch.linspace(1, -1, images.shape[3]).expand(len(images), images.shape[2], -1)
        return (images.float() - 128) / 32 + torch.stack([0 * side, side, -side], 1)


def show(views, segmenter, images, **kwargs):
    with torch.no_grad():
        return views.predict(
            segmenter, [views(i) for i in images], [i.shape[:2] for i in images], **kwargs
        )


def test_one_view_is_the_prediction_without_augmentation():
    views, images = Views(16), pictures()
    with torch.no_grad():
        plain = predict(Colours(), [views(i)[0] for i in images], [i.shape[:2] for i in images])
    assert all(
        torch.equal(a, b) for a, b in zip(show(views, Colours(), images), plain, strict=True)
    )
    assert views.protocol == {"scales": [1.0], "flip": False, "resize": 16} and views.name == ""


def mmsegmentation_merges(segmenter, image, short_side, scales, flip):
    """Mean probabilities' class ids by mmsegmentation: its post-processing of each view, its
    test-time model's merging."""
    from mmseg.datasets.transforms.transforms import Resize
    from mmseg.models.segmentors import EncoderDecoder
    from mmseg.models.segmentors.seg_tta import SegTTAModel
    from mmseg.structures import SegDataSample

    module = torch.nn.Module()
    module.out_channels, module.test_step = 3, None
    samples = []
    for scale in scales:
        for mirrored in (False, True)[: 1 + flip]:
            view = Resize(scale=(int(2048 * scale), int(short_side * scale)), keep_ratio=True)(
                {"img": image}
            )["img"]
            view = view[:, ::-1] if mirrored else view
            with torch.no_grad():
                logits = segmenter(torch.from_numpy(view.transpose(2, 0, 1).copy())[None])
            meta = {
                "ori_shape": image.shape[:2],
                "flip": mirrored,
                "flip_direction": "horizontal",
                "img_path": "",
            }
            sample = [SegDataSample(metainfo=meta)]
            samples += EncoderDecoder.postprocess_result(
                SimpleNamespace(align_corners=False), logits, sample
            )
    (merged,) = SegTTAModel(module=module).merge_preds([samples])
    return merged.pred_sem_seg.data[0]


@pytest.mark.parametrize(
    ("scales", "flip"),
    [(PAPER_SCALES, True), (PAPER_SCALES, False), ((0.5, 1.0), True), ((1.0,), True)],
)
def test_augmented_predictions_are_those_of_mmsegmentation(scales, flip):
    images = pictures()
    found = show(Views(16, scales, flip), Colours(), images)
    expected = [mmsegmentation_merges(Colours(), i, 16, scales, flip) for i in images]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    single = show(Views(16), Colours(), images)
    assert any(not torch.equal(a, b) for a, b in zip(found, single, strict=True))
    assert {int(v) for ids in found for v in ids.unique()} == {0, 1, 2}


def test_augmented_probabilities_sum_to_one():
    views, images = Views(16, [0.5, 1.5], True), pictures()
    with torch.no_grad():
        found = views.probabilities(
            Colours(), [views(i) for i in images], [i.shape[:2] for i in images]
        )
    for image, probabilities in zip(images, found, strict=True):
        assert probabilities.shape == (3, *image.shape[:2])
        torch.testing.assert_close(probabilities.sum(0), torch.ones(image.shape[:2]))


def test_uncertain_pixels_are_255():
    images = pictures()
    for views in (Views(16), Views(16, [0.5, 1.0], True)):
        sure, ids = show(views, Colours(), images, confidence=0.0), show(views, Colours(), images)
        assert all(torch.equal(a, b) for a, b in zip(sure, ids, strict=True))
        with torch.no_grad():
            found = views.probabilities(
                Colours(), [views(i) for i in images], [i.shape[:2] for i in images]
            )
        for kept, plain, probabilities in zip(
            show(views, Colours(), images, confidence=0.6), ids, found, strict=True
        ):
            weak = (probabilities < 0.6).all(0)
            assert weak.any() and not weak.all()
            assert (kept[weak] == 255).all() and torch.equal(kept[~weak], plain[~weak])


def test_views_are_of_the_scaled_short_side():
    views = Views(16, [1.5, 0.5], True)
    assert views.scales == (0.5, 1.5)  # in order: the same set of scales is the same protocol
    assert [tuple(v.shape) for v in views(np.zeros((20, 30, 3), np.uint8))] == [
        (3, 8, 12),
        (3, 24, 36),
    ]


def test_protocols_have_their_own_names():
    names = [
        Views(16, *a).name
        for a in (
            [PAPER_SCALES, True],
            [PAPER_SCALES],
            [[1.0], True],
            [[1], False],
            [[0.5, 1], True],
            [[0.5, 2], True],
        )
    ]
    assert names == ["ms_flip", "ms", "flip", "", "scales_0.5-1_flip", "scales_0.5-2_flip"]


def test_repeated_scales_are_refused():
    with pytest.raises(ValueError, match=r"scales=.*expected different numbers above 0"):
        Views(16, [1.0, 1])


def test_counting_with_views(toy_data):
    views, data = Views(16, [0.5, 1.0], True), toy_data(tune=5).tune
    counted = count(
        Colours(), whole_loader(data, views, 2), metrics.confusion_matrix(3), predict=views.predict
    )
    expected = np.zeros((3, 3), int)
    for i in range(5):
        image, mask = data[i]
        (ids,) = show(views, Colours(), [image])
        np.add.at(expected, (mask[mask != 255], ids.numpy()[mask != 255]), 1)
    assert counted.tolist() == expected.tolist()


def test_what_does_not_fit_together_is_tried_alone(tiny_segmenter):
    """A device whose memory holds 200 pixels of one batch."""

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_segmenter()

        def forward(self, images):
            if images.shape[0] * images.shape[2] * images.shape[3] > 200:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.inner(images)

    predictor, said, unreadable = Predictor({}, Small(), Views(10)), [], {}
    sizes = [(10, 12), (10, 12), (10, 40), (10, 15)]
    batch = [
        (SimpleNamespace(file=f"{i}.png"), np.full((*size, 3), 40 * i, np.uint8))
        for i, size in enumerate(sizes)
    ]
    with pytest.raises(
        DoesNotFit,
        match=r"1 images of up to 40x10 do not fit into the memory of cpu: make them smaller",
    ):
        predictor([batch[2][1]])
    rows = predict_fitting(predictor, batch, unreadable, said.append)
    assert [item.file for item, _, _ in rows] == ["0.png", "1.png", "3.png"] and list(
        unreadable
    ) == ["2.png"]
    assert said == ["2.png is left out"] and "40x10" in unreadable["2.png"]
    for _, image, mask in rows:
        assert np.array_equal(mask, predictor([image])[0])
    chances = predict_fitting(predictor.probabilities, batch[:2], unreadable)
    assert [tuple(c.shape) for _, _, c in chances] == [(3, 10, 12)] * 2
