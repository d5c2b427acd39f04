import hashlib

import numpy as np
import pytest
import torch

from dd.data.datasets import SegmentationFolder, encode_image, encode_mask, read_mask, write_split
from dd.evaluation import metrics
from dd.segmenters.transforms import EvalTransform
from dd.stages.score import ScoreSettings, Shown, found_text, print_table
from dd.stages.score import score as evaluate
from dd.store.provenance import read_json, write_json
from dd.taxonomy import Taxonomy
from dd.training.segmentation import Views

PETS = Taxonomy("pets", ["cat", "dog"])
RUN = {
    "taxonomy": {"name": "pets", "names": ["cat", "dog"]},
    "weights_sha256": "0" * 64,
    "supervision": "A",
    "trained_on": {"source": "synthetic"},
}
SIZES = [(12, 9), (7, 15), (8, 8), (12, 9)]


@pytest.fixture
def data(tmp_path):
    root, rng = tmp_path / "pets", np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for i, size in enumerate(SIZES):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        (root / "JPEGImages" / f"{i}.png").write_bytes(encode_image(image, ".png"))
        mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), size)
        (root / "SegmentationClass" / f"{i}.png").write_bytes(encode_mask(mask))
    write_split(root, "test", [str(i) for i in range(len(SIZES))])
    return SegmentationFolder(root, "test", PETS)


class Colours(torch.nn.Module):
    """The brightest channel is the class, but class 1 has the left side and 2 the right: a
    mirror that is not undone shows."""

    def forward(self, images):
        side = torch.linspace(1, -1, images.shape[3]).expand(len(images), images.shape[2], -1)
        return (images.float() - 128) / 32 + torch.stack([0 * side, side, -side], 1)


@pytest.fixture
def score(tmp_path, data, tiny_segmenter):
    def call(run=RUN, seed=0, views=None, segmenter=None, asked=None, **kwargs):
        views, segmenter = views or Views(16), segmenter or tiny_segmenter(seed=seed)
        where = tmp_path / "run/eval/pets" / views.name / "metrics.json"
        settings = ScoreSettings(**{"batch_size": 2, **kwargs})
        return evaluate(where, run, segmenter, data, views, settings, asked)

    return call


def by_hand(data, segmenter):
    """One image at a time: short side 16, logits back to the original size, argmax, count."""
    confusion, segmenter = np.zeros((3, 3), int), segmenter.eval()
    for image, mask in (data[i] for i in range(len(data))):
        with torch.no_grad():
            logits = segmenter(EvalTransform(16)(image)[None])
        logits = torch.nn.functional.interpolate(logits, size=mask.shape, mode="bilinear")
        np.add.at(confusion, (mask[mask != 255], logits[0].argmax(0).numpy()[mask != 255]), 1)
    return confusion


def test_metrics_are_those_of_the_whole_set(score, data, tiny_segmenter, tmp_path):
    result = score()
    confusion = by_hand(data, tiny_segmenter())
    assert result["confusion"] == confusion.tolist() and confusion.sum() > 200
    assert result["miou"] == pytest.approx(metrics.miou(torch.from_numpy(confusion)))
    assert list(result["iou"]) == ["background", "cat", "dog"]
    assert result == read_json(tmp_path / "run/eval/pets/metrics.json")


def test_metrics_say_what_was_measured(score):
    expected = {
        "data": "pets",
        "split": "test",
        "num_images": 4,
        "weights_sha256": "0" * 64,
        "weights": "ema",
        "supervision": "A",
        "protocol": {"scales": [1.0], "flip": False, "resize": 16},
        "trained_on": {"source": "synthetic"},
    }
    assert expected.items() <= score().items()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_batch_size_decides_nothing(score, data, tiny_segmenter, batch_size):
    assert score(batch_size=batch_size)["confusion"] == by_hand(data, tiny_segmenter()).tolist()


def test_augmentation_is_measured_beside_the_single_scale(score, data, tmp_path):
    single = score(segmenter=Colours())
    before = (tmp_path / "run/eval/pets/metrics.json").read_bytes()
    result = score(views=Views(16, [0.5, 1.0], True), segmenter=Colours())
    assert result["protocol"] == {"scales": [0.5, 1.0], "flip": True, "resize": 16}
    assert result == read_json(tmp_path / "run/eval/pets/scales_0.5-1_flip/metrics.json")
    assert (tmp_path / "run/eval/pets/metrics.json").read_bytes() == before
    assert sorted((tmp_path / "run/eval").glob("*/metrics.json")) == [
        tmp_path / "run/eval/pets/metrics.json"
    ]  # the report's
    segmenter, confusion = Colours(), np.zeros((3, 3), int)
    for image, mask in (data[i] for i in range(len(data))):
        mean = np.zeros((3, *mask.shape))
        for side in (8, 16):
            view = EvalTransform(side)(image)[None]
            for mirrored in (False, True):
                with torch.no_grad():
                    logits = segmenter(view.flip(3) if mirrored else view)
                logits = torch.nn.functional.interpolate(logits, size=mask.shape, mode="bilinear")
                logits = logits.flip(3) if mirrored else logits
                mean += logits[0].softmax(0).double().numpy() / 4
        np.add.at(confusion, (mask[mask != 255], mean.argmax(0)[mask != 255]), 1)
    assert result["confusion"] == confusion.tolist() != single["confusion"]


def test_a_result_is_kept_for_the_same_checkpoint_alone(score):
    first = score()
    assert score(seed=1) == first  # the same hash: not measured again
    other = score({**RUN, "weights_sha256": "1" * 64}, seed=1)
    assert other["confusion"] != first["confusion"]
    assert score({**RUN, "weights_sha256": "1" * 64}, seed=1, weights="raw")["weights"] == "raw"


def test_masks_that_were_made_anew_are_measured_anew(score, data):
    done = data.root / data.masks / "masks.json"
    write_json(done, {"identity": {"settings": {"power": 4}}})
    first = score()
    for name in data.ids:
        path = data.root / data.masks / f"{name}.png"
        path.write_bytes(encode_mask(np.zeros_like(read_mask(path))))
    write_json(done, {"identity": {"settings": {"power": 0}}})
    assert score()["confusion"] != first["confusion"]


def test_each_image_keeps_its_own_matrix(score, data, tiny_segmenter, tmp_path):
    result, folder = score(), tmp_path / "run/eval/pets"
    with np.load(folder / "per_image.npz", allow_pickle=False) as stored:
        confusion, ids = stored["confusion"], stored["ids"].tolist()
    assert confusion.dtype == np.uint32 and confusion.shape == (4, 3, 3) and ids == data.ids
    assert confusion.sum(0).tolist() == result["confusion"]
    assert confusion.sum((1, 2)).tolist() == [int((data[i][1] != 255).sum()) for i in range(4)]
    alone = by_hand([data[2]], tiny_segmenter())
    assert (confusion[2] == alone).all()
    digest = hashlib.sha256((folder / "per_image.npz").read_bytes()).hexdigest()
    assert result["per_image"] == {"file": "per_image.npz", "sha256": digest}


def test_a_result_without_its_images_is_measured_again(score, tmp_path):
    first, path = score(), tmp_path / "run/eval/pets/per_image.npz"
    path.unlink()
    assert score() == first and path.is_file()


def test_an_audit_keeps_no_matrix_of_each_image(score, tmp_path):
    whole, result = (
        score(views=Views(16)),
        score({**RUN, "weights_sha256": "1" * 64}, per_image=False),
    )
    assert "per_image" not in result and result["confusion"] == whole["confusion"]


class Part(torch.nn.Module):
    """Class 1 in the upper left corner, ``pixels`` of them in a row; background elsewhere."""

    def __init__(self, pixels):
        super().__init__()
        self.pixels = pixels

    def forward(self, images):
        scores = torch.zeros(len(images), 3, *images.shape[2:])
        scores[:, 0] = 0.5
        scores[:, 1, 0, : self.pixels] = 1.0
        return scores


def test_an_audit_counts_in_how_many_images_a_class_is_seen(tmp_path):
    """Of 40 x 40 pixels 0.2 % are 3.2: four pixels are a class, three are none."""
    root = tmp_path / "drawn"
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for name in "abc":
        image, mask = np.zeros((40, 40, 3), np.uint8), np.full((40, 40), 255, np.uint8)
        mask[-1] = 0  # what is uncertain is looked at too
        (root / "JPEGImages" / f"{name}.png").write_bytes(encode_image(image, ".png"))
        (root / "SegmentationClass" / f"{name}.png").write_bytes(encode_mask(mask))
    write_split(root, "test", list("abc"))
    data = SegmentationFolder(root, "test", PETS)
    asked = {"c": (1,), "a": (1, 2), "b": (2,)}
    for pixels, cats in ((4, 2), (3, 0)):
        where = tmp_path / f"{pixels}/metrics.json"
        given = ({**RUN, "weights_sha256": str(pixels)}, Part(pixels), data, Views(40))
        result = evaluate(where, *given, ScoreSettings(per_image=False), asked)
        assert result["found"] == {
            "cat": {"found": cats, "asked": 2},
            "dog": {"found": 0, "asked": 2},
        }
    assert found_text({"cat": {"found": 3, "asked": 4}, "dog": {"found": 1, "asked": 2}}) == (
        "66.7 % of 6; dog 50.0 % of 2, cat 75.0 % of 4"
    )


def test_an_audit_of_before_is_measured_again_with_what_is_found(score):
    assert "found" not in score(per_image=False)
    asked = {str(i): (1,) for i in range(len(SIZES))}
    assert score(per_image=False, asked=asked)["found"]["cat"]["asked"] == len(SIZES)


def test_predictions_of_the_first_the_best_and_the_worst_images_are_kept():
    shown = Shown()
    for i in range(40):
        right = (i * 7) % 40  # all different; the image itself says which one it is
        shown.add(torch.tensor([i]), np.array([[right + 1, 40 - right], [0, 0]]))
    shown.add(torch.tensor([40]), np.zeros((2, 2), int))  # nothing but 255: neither good nor bad
    kept = shown.predictions()
    ranked = sorted(range(40), key=lambda i: (i * 7) % 40)
    assert set(kept) == {*range(8), *ranked[:4], *ranked[-4:]}
    assert all(int(p) == i for i, p in kept.items())


def test_other_classes_are_refused(score, tmp_path):
    other = {**RUN, "taxonomy": {"name": "farm", "names": ["cow", "pig"]}}
    with pytest.raises(
        ValueError, match=r"classes \['cow', 'pig'\], data 'pets' has \['cat', 'dog'\]"
    ):
        score(other)
    assert not (tmp_path / "run").exists()


def test_the_table_shows_every_class(score, capsys):
    result = score()
    print_table({"one": result, "two": {**result, "iou": {**result["iou"], "dog": None}}}, "IoU")
    shown = capsys.readouterr().out
    assert all(
        name in shown
        for name in ("background", "cat", "dog", "mIoU", "one", "two", f"{result['miou']:.1f}", "-")
    )
