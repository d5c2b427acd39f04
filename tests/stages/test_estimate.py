"""Stage estimate: quality of masks from the labels of a few images."""

import csv
import re

import numpy as np
import pytest

from dd.data.datasets import SegmentationFolder, encode_image, encode_mask, write_split
from dd.evaluation.few_labels import sums
from dd.stages.estimate import EstimateSettings, estimate_masks, print_estimate, reliability
from dd.store.provenance import read_json
from dd.taxonomy import Taxonomy

PETS = Taxonomy("pets", ["cat", "dog"])
NUMBER = 60


def masks_of(i, wrong):
    """(truth, a mask whose first ``wrong`` rows of 10 are background)."""
    truth = np.zeros((10, 12), np.uint8)
    truth[:, :6] = 1 + i % 2
    mask = truth.copy()
    mask[:wrong] = 0
    return truth, mask


@pytest.fixture
def made(tmp_path):
    """A set of images, two mask sets that are wrong alike in a number of rows, labels of 30."""
    root, rng = tmp_path / "set", np.random.default_rng(0)
    ids = [f"{i:03d}" for i in range(NUMBER)]
    for i, name in enumerate(ids):
        wrong = int(rng.integers(0, 8))
        truth, mask = masks_of(i, wrong)
        _, other = masks_of(i, 0)
        other[: max(0, wrong - 1), 3:] = 0
        for folder, content in (("SegmentationClass", mask), ("masks/after", other)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / f"{name}.png").write_bytes(encode_mask(content))
        (root / "JPEGImages").mkdir(exist_ok=True)
        image = np.zeros((10, 12, 3), np.uint8)
        (root / "JPEGImages" / f"{name}.png").write_bytes(encode_image(image, ".png"))
        if i in range(0, 48, 2) or i in range(1, 48, 8):
            (tmp_path / "labels").mkdir(exist_ok=True)
            (tmp_path / "labels" / f"{name}.png").write_bytes(encode_mask(truth))
    write_split(root, "train", ids)
    return tmp_path


def run(made, **given):
    given = {"labels": str(made / "labels"), "other": "masks/after", **given}
    seed = given.pop("seed", 0)
    masks = SegmentationFolder(made / "set", "train", PETS, "SegmentationClass")
    return estimate_masks(made / "set", masks, EstimateSettings(**given), PETS, seed)


def test_the_estimate_of_labelled_images(made, capsys):
    found = run(made)
    labelled = sorted(p.stem for p in (made / "labels").iterdir())
    assert (found["labelled"], found["images"]) == (len(labelled), NUMBER) == (30, 60)
    assert found["classes"] == ["background", "cat", "dog"] and found["rare"] == {}
    assert found["used"] and found["correlation"] > 0.5
    assert found["low"] < found["miou"] < found["high"]
    assert found["high"] - found["low"] < found["plain_high"] - found["plain_low"]
    assert sum(row["images"] for row in found["reliability"]) == 30
    assert read_json(made / "set/estimates/SegmentationClass_masks-after.json")["estimate"] == found
    print_estimate(made / "set", found)
    said = capsys.readouterr().out
    number = r"[\d.]+"
    interval = rf"{number} \[{number}, {number}\]"
    assert re.search(f"mIoU of SegmentationClass: {interval}, from 30 labelled of 60", said)
    assert ": used" in said and "within ± 2" in said


def test_images_are_listed_from_the_least_agreed(made):
    run(made)
    with open(made / "set/estimates/SegmentationClass_masks-after.csv") as file:
        rows = list(csv.DictReader(file))
    values = [float(row["agreement"]) for row in rows]
    assert values == sorted(values) and len({row["id"] for row in rows}) == NUMBER
    assert sum(bool(row["miou"]) for row in rows) == 30
    truth, mask = masks_of(0, 3)
    shares = [hit / union for hit, union in sums(mask, truth, 3) if union]
    assert shares == [60 / 78, 42 / 60]


def test_images_to_label_are_drawn_at_random(made, capsys):
    found = run(made, labels=None, draw=7)
    path = made / "set/estimates/to_label.txt"
    listed = path.read_text().split()
    assert listed == found["to_label"] == sorted(set(listed)) and len(listed) == 7
    assert run(made, labels=None, draw=7)["to_label"] == listed
    print_estimate(made / "set", found)
    assert "7 images drawn at random to be labelled" in capsys.readouterr().out
    more = run(made, labels=None, draw=12)["to_label"]
    assert set(listed) < set(more) and path.read_text().split() == more
    before = path.read_bytes()
    for other in ({"draw": 5}, {"draw": 12, "seed": 1}):
        with pytest.raises(FileExistsError, match="another draw of 12 images"):
            run(made, labels=None, **other)
    assert path.read_bytes() == before


def test_a_draw_leaves_an_estimate_alone(made):
    run(made)
    files = [made / f"set/estimates/SegmentationClass_masks-after.{s}" for s in ("json", "csv")]
    before = [f.read_bytes() for f in files]
    run(made, labels=None, draw=7)
    assert [f.read_bytes() for f in files] == before


def test_what_counts_nothing_is_no_label_and_is_looked_at_first(made, capsys):
    nothing = encode_mask(np.full((10, 12), 255, np.uint8))
    (made / "labels/000.png").write_bytes(nothing)
    (made / "set/masks/after/002.png").write_bytes(nothing)
    found = run(made)
    assert (found["labelled"], found["empty"]) == (29, 1)
    assert sum(row["images"] for row in found["reliability"]) == 28
    text = (made / "set/estimates/SegmentationClass_masks-after.json").read_text()
    assert "NaN" not in text
    table = (made / "set/estimates/SegmentationClass_masks-after.csv").read_text()
    assert table.splitlines()[1].startswith("002,,") and "nan" not in table
    print_estimate(made / "set", found)
    assert "1 labels hold no pixel that counts" in capsys.readouterr().out


def test_labels_that_do_not_differ_tell_nothing(made, capsys):
    for path in (made / "labels").iterdir():
        mask = (made / "set/SegmentationClass" / path.name).read_bytes()
        path.write_bytes(mask)
    found = run(made)
    assert found["low"] == found["high"] == pytest.approx(100)
    print_estimate(made / "set", found)
    said = capsys.readouterr().out
    assert "an interval of width 0 proves nothing" in said and "nan" not in said


def test_a_rare_class_is_named(made, capsys):
    for i in range(17, 48, 8):
        (made / "labels" / f"{i:03d}.png").unlink()
    found = run(made)
    assert found["classes"] == ["background", "cat"] and found["rare"] == {"dog": 2}
    print_estimate(made / "set", found)
    assert "left out, in too few of the labelled images: dog (2)" in capsys.readouterr().out


def test_reliability_has_bins_of_equally_many():
    rows = reliability(np.arange(10.0), np.arange(10.0) * 2)
    assert [row["images"] for row in rows] == [2] * 5
    assert rows[0] == {"agreement": 0.5, "miou": 1.0, "images": 2}


def test_what_cannot_be_read_rightly_is_refused(made):
    labels = made / "labels"
    with pytest.raises(ValueError, match="other=SegmentationClass is the mask set itself"):
        run(made, other="SegmentationClass")
    for other in ("./SegmentationClass", "../set/masks/after"):
        with pytest.raises(ValueError, match="other"):
            run(made, other=other)
    with pytest.raises(FileNotFoundError, match="no masks in masks/none"):
        run(made, other="masks/none")
    with pytest.raises(FileNotFoundError, match=r"estimate\.labels: no folder .*nowhere"):
        run(made, labels=str(made / "nowhere"))
    (labels / "stranger.png").write_bytes(encode_mask(np.zeros((10, 12), np.uint8)))
    with pytest.raises(ValueError, match=r"1 images that are not in the set, such as stranger.png"):
        run(made)
    (labels / "stranger.png").unlink()
    good = (labels / "000.png").read_bytes()
    (labels / "000.png").write_bytes(encode_mask(np.zeros((5, 12), np.uint8)))
    with pytest.raises(ValueError, match=r"000.png is 12x5, the mask of its image 12x10"):
        run(made)
    (labels / "000.png").write_bytes(encode_mask(np.full((10, 12), 9, np.uint8)))
    with pytest.raises(ValueError, match=r"000.png holds values \[9\] outside the 3 classes"):
        run(made)
    (labels / "000.png").write_bytes(good)
    mask = made / "set/SegmentationClass/001.png"
    kept = mask.read_bytes()
    mask.write_bytes(encode_mask(np.full((10, 12), 77, np.uint8)))
    with pytest.raises(ValueError, match=r"SegmentationClass/001.png holds values \[77\]"):
        run(made)
    mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"001.png is missing from its mask set"):
        run(made)
    mask.write_bytes(kept)
    for path in sorted(labels.iterdir())[19:]:
        path.unlink()
    with pytest.raises(ValueError, match="19 labelled images: an interval needs at least 20"):
        run(made)
