import json

import numpy as np
import pytest

from dd.report.compare import comparable, comparison, image_miou, read_metrics, signed


@pytest.fixture
def result(tmp_path, builder):
    """``make(name, error, **more)``: metrics.json on twelve images, read back."""
    data = builder.test(tmp_path / "shapes")

    def make(name, error=0.3, seed=0, **more):
        builder.result(tmp_path / name, data, error, seed, **more)
        return tmp_path / name / "metrics.json"

    return make


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_honest_file_is_read_with_its_images(result):
    found = read_metrics(result("a"), "c" * 64)
    assert found["images"]["confusion"].sum(0).tolist() == found["confusion"] and len(found["images"]["ids"]) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"miou": 99.0}, "not those of its confusion matrix: it was edited"),
        ({"pixel_accuracy": 99.0}, "not those of its confusion matrix"),
        ({"iou": {"background": 1.0}}, "not those of its confusion matrix"),
        ({"confusion": [[1, 2], [3]]}, "not those of its confusion matrix"),
        ({"confusion": "x"}, "not those of its confusion matrix"),
        ({"num_images": 11}, "does not add up to metrics.json"),
        ({"weights_sha256": "d" * 64}, "another checkpoint than the run has now"),
        ({"per_image": {"file": "per_image.npz", "sha256": "0"}}, "not the file that metrics.json names"),
    ],
)
def test_an_edited_file_is_refused(result, changes, message):
    path = result("a")
    edit(path, **changes)
    with pytest.raises(ValueError, match=message):
        read_metrics(path, "c" * 64)


def test_one_class_changed_is_noticed(result):
    path = result("a")
    ious = json.loads(path.read_text())["iou"]
    edit(path, iou={**ious, "apple": ious["apple"] + 0.01})
    with pytest.raises(ValueError, match="edited"):
        read_metrics(path)


def test_another_version_is_named_by_what_it_lacks(result):
    path = result("a")
    content = json.loads(path.read_text())
    del content["protocol"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks protocol: another version wrote it"):
        read_metrics(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="another version"):
        read_metrics(path)


def test_without_the_images_own_matrices_there_is_no_interval(result):
    plain = read_metrics(result("a", per_image=False))
    assert "images" not in plain
    section = comparison("T", {"a": plain, "b": read_metrics(result("b", 0.1))}, "a")
    by_name = {row[0]: row for row in section.rows}
    assert by_name["a"][3] is None and by_name["b"][5] is None and by_name["b"][3] is not None
    assert "evaluate the run again" in section.note


def test_runs_on_other_images_or_classes_are_separated_with_the_reason(result, builder, tmp_path):
    results = {n: read_metrics(result(n, seed=i, content="1")) for i, n in enumerate("ab")}
    results["masks"] = read_metrics(result("masks", content="2"))
    results["split"] = read_metrics(result("split", split="tune"))
    results["classes"] = read_metrics(result("classes", names=[*builder.names[:-1], "oak"]))
    results["set"] = read_metrics(result("set", masks_made_with={"power": 1}))
    other = builder.test(tmp_path / "else" / "shapes", 12)
    (other.root / "ImageSets/Segmentation/test.txt").write_text("".join(f"t{i}\n" for i in range(12))[::-1].strip())
    other.ids = other.ids[::-1]
    builder.result(tmp_path / "ids", other, 0.3, 0)
    results["ids"] = read_metrics(tmp_path / "ids/metrics.json")
    kept, left_out = comparable(results)
    assert list(kept) == ["a", "b"]
    assert {n: why.split(": ")[1] for n, why in left_out.items()} == {
        "masks": "content", "split": "split", "classes": "classes", "set": "masks made with", "ids": "ids"
    }  # fmt: skip
    assert list(comparable(results, "split")[0]) == ["split"]  # the baseline sets the standard
    assert comparable({}) == ({}, {})


def test_a_result_that_names_no_images_goes_with_those_of_as_many(result):
    results = {"a": read_metrics(result("a")), "old": read_metrics(result("old", per_image=False))}
    assert list(comparable(results)[0]) == ["a", "old"]


def test_differences_come_with_a_paired_interval(result):
    results = {"base": read_metrics(result("base", 0.5)), "twin": read_metrics(result("twin", 0.5))}
    results["good"] = read_metrics(result("good", 0.05, seed=3))
    section = comparison("T", results, "base")
    by_name = {row[0]: row for row in section.rows}
    assert section.rows[0][0] == "good"  # the best first
    assert by_name["base"][4] == "baseline"
    assert by_name["twin"][4:] == ["+0.0", "+0.0 to +0.0"]  # the same predictions: paired draws never differ
    low, high = (float(v) for v in by_name["good"][5].split(" to "))
    assert 0 < low < results["good"]["miou"] - results["base"]["miou"] < high
    assert section.highlight == {(0, 4)}
    with pytest.raises(ValueError, match="baseline='x' has no result.*base, twin, good"):
        comparison("T", results, "x")


def test_image_miou_by_hand():
    confusion = np.array([[[6, 2], [0, 0]], [[0, 0], [0, 0]], [[4, 0], [1, 3]]], np.uint32)
    found = image_miou({"confusion": confusion, "ids": ["a", "ignored", "b"]})
    assert found == pytest.approx({"a": 37.5, "b": 100 * (4 / 5 + 3 / 4) / 2})
    assert signed(-1.25).startswith("\N{MINUS SIGN}1.2") and signed(2.0) == "+2.0"
