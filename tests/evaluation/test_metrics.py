import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from dd.evaluation import metrics
from dd.segmenters._compiled_ops import install_placeholder

install_placeholder()  # before the first import of mmseg

from mmseg.evaluation.metrics import IoUMetric  # noqa: E402


def pairs(num_classes, absent=(), ignored=True, seed=0):
    """(labels, predictions) of several images of odd, differing sizes."""
    rng, there = np.random.default_rng(seed), [c for c in range(num_classes) if c not in absent]
    for size in [(7, 5), (1, 13), (31, 17), (64, 3), (333, 500), (427, 641)]:
        label = rng.choice(there, size)
        predicted = np.where(rng.random(size) < 0.5, label, rng.choice(there, size))
        if ignored:
            label = np.where(rng.random(size) < 0.3, 255, label)
        yield torch.from_numpy(label), torch.from_numpy(predicted)


def confusion(data, num_classes):
    metric = metrics.confusion_matrix(num_classes)
    for label, predicted in data:
        metric.update(predicted, label)
    return metric.compute()


def six_lines(data, num_classes):
    label, predicted = (np.concatenate([x[i].numpy().ravel() for x in data]) for i in (0, 1))
    label, predicted = label[label != 255], predicted[label != 255]
    table = np.bincount(num_classes * label + predicted, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )
    with np.errstate(invalid="ignore"):
        iou = 100 * np.diag(table) / (table.sum(0) + table.sum(1) - np.diag(table))
    return table, iou, 100 * np.diag(table).sum() / table.sum()


CASES = [
    (2, (), True),
    (21, (), True),
    (21, (3, 20), True),
    (9, (0,), True),
    (9, (1, 2, 3, 4, 5, 6, 7, 8), True),
    (81, (), False),
    (81, (0, 5, 44, 80), True),
]


@pytest.mark.parametrize(("num_classes", "absent", "ignored"), CASES)
def test_against_numpy(num_classes, absent, ignored):
    data = list(pairs(num_classes, absent, ignored))
    table, iou, accuracy = six_lines(data, num_classes)
    found = confusion(data, num_classes)
    assert not found.is_floating_point() and np.array_equal(found.numpy(), table)
    assert [i for i, v in enumerate(metrics.iou(found)) if v is None] == np.flatnonzero(
        np.isnan(iou)
    ).tolist()
    np.testing.assert_allclose(
        [np.nan if v is None else v for v in metrics.iou(found)], iou, rtol=1e-12
    )
    assert metrics.miou(found) == pytest.approx(np.nanmean(iou), rel=1e-12)
    assert metrics.pixel_accuracy(found) == pytest.approx(accuracy, rel=1e-12)


@pytest.mark.parametrize(("num_classes", "absent", "ignored"), CASES)
def test_against_mmsegmentation(num_classes, absent, ignored):
    """Shares of 1 from IoUMetric as its Runner feeds it, before its rounding: equal to 1e-6."""
    data = list(pairs(num_classes, absent, ignored, seed=1))
    metric = IoUMetric(ignore_index=255)
    metric.dataset_meta = {"classes": [str(c) for c in range(num_classes)]}
    samples = [
        {"pred_sem_seg": {"data": p[None]}, "gt_sem_seg": {"data": label[None]}}
        for label, p in data
    ]
    metric.process({}, samples)
    areas = [sum(area) for area in zip(*metric.results, strict=True)]
    theirs = IoUMetric.total_area_to_metrics(*areas, metrics=["mIoU"])
    found = confusion(data, num_classes)
    ours = np.array([np.nan if v is None else v for v in metrics.iou(found)]) / 100
    np.testing.assert_allclose(ours, theirs["IoU"], atol=1e-6, rtol=0)
    assert [int(c) for c in np.flatnonzero(np.isnan(ours))] == sorted(absent)
    assert metrics.miou(found) / 100 == pytest.approx(np.nanmean(theirs["IoU"]), abs=1e-6)
    assert metrics.pixel_accuracy(found) / 100 == pytest.approx(float(theirs["aAcc"]), abs=1e-6)


@pytest.mark.parametrize(("num_classes", "absent", "ignored"), CASES)
@pytest.mark.parametrize(
    "kinds", [(torch.int64, torch.int64), (torch.uint8, torch.uint8), (torch.int64, torch.uint8)]
)
def test_against_torchmetrics_image_by_image(num_classes, absent, ignored, kinds):
    """The same integers for a batch of differing sizes at once, of whatever integers the ids
    are."""
    labels, predictions = map(list, zip(*pairs(num_classes, absent, ignored, seed=2), strict=True))
    labels.append(torch.full((4, 6), 255))
    predictions.append(torch.zeros(4, 6, dtype=torch.int64))
    given = [p.to(kinds[0]) for p in predictions], [label.to(kinds[1]) for label in labels]
    before = [x.clone() for part in given for x in part]
    counts = metrics.image_counts(*given, num_classes)
    theirs = MulticlassConfusionMatrix(num_classes, ignore_index=255)
    for own, prediction, label in zip(counts, predictions, labels, strict=True):
        assert own.dtype == torch.int64 and torch.equal(own, theirs(prediction[None], label[None]))
    ours = metrics.confusion_matrix(num_classes)
    ours.update(*given)
    assert torch.equal(ours.compute(), theirs.compute())
    assert all(
        map(torch.equal, before, [x for part in given for x in part])
    )  # what was given is left as it was


@pytest.mark.parametrize("value", [3, 254])
def test_a_label_outside_the_classes_is_an_error(value):
    labels = [torch.tensor([[0, 255]]), torch.tensor([[2, value]])]
    with pytest.raises(
        ValueError, match=rf"labels hold the values \[{value}\]; allowed: 0..2, and 255"
    ):
        metrics.image_counts([torch.zeros(1, 2, dtype=torch.int64)] * 2, labels, 3)


def test_it_is_one_matrix_over_the_set_and_no_mean_over_images():
    data = list(pairs(5))
    each = [metrics.miou(confusion([pair], 5)) for pair in data]
    assert metrics.miou(confusion(data, 5)) != pytest.approx(np.mean(each), abs=0.1)
    assert torch.equal(confusion(data, 5), sum(confusion([pair], 5) for pair in data))


def test_rows_are_labels_and_columns_predictions():
    found = confusion([(torch.tensor([[0, 0, 1, 255]]), torch.tensor([[1, 1, 1, 0]]))], 3)
    assert found.tolist() == [[0, 2, 0], [0, 1, 0], [0, 0, 0]]


def test_counts_beyond_float32_stay_exact():
    large = torch.tensor([[2**40 + 1, 1], [0, 2**40]])
    assert metrics.iou(large)[0] == 100 * (2**40 + 1) / (2**40 + 2)


def test_background_counts_and_absent_classes_do_not():
    table = torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]])
    assert metrics.iou(table) == [75.0, 50.0, None]
    assert metrics.miou(table) == 62.5
    assert metrics.pixel_accuracy(table) == 80.0


def test_a_class_that_is_only_predicted_counts_as_zero():
    assert metrics.iou(torch.tensor([[3, 1], [0, 0]])) == [75.0, 0.0]


def test_nothing_scored_is_an_error():
    with pytest.raises(ValueError, match="confusion matrix is empty.*255"):
        metrics.miou(
            confusion([(torch.full((3, 3), 255), torch.zeros(3, 3, dtype=torch.int64))], 4)
        )


def test_the_summary_is_plain_and_named():
    table = torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]])
    assert metrics.summarise(table, ["background", "cat", "dog"]) == {
        "miou": 62.5,
        "iou": {"background": 75.0, "cat": 50.0, "dog": None},
        "pixel_accuracy": 80.0,
        "confusion": [[6, 2, 0], [0, 2, 0], [0, 0, 0]],
    }
    with pytest.raises(ValueError):
        metrics.summarise(table, ["background", "cat"])
