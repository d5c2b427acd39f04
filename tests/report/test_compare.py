import json

import numpy as np
import pytest

from dd.evaluation.statistics import interval
from dd.report.compare import comparable, comparison, image_miou, read_metrics, signed
from dd.report.rows import Row


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
    assert (
        found["images"]["confusion"].sum(0).tolist() == found["confusion"]
        and len(found["images"]["ids"]) == 12
    )


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
        (
            {"per_image": {"file": "per_image.npz", "sha256": "0"}},
            "not the file that metrics.json names",
        ),
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


def row(label, *results, seeds=None, draws=None):
    """A recipe whose runs, one seed each, have these results on ``shapes``."""
    seeds, draws = seeds or range(len(results)), draws or [None] * len(results)
    runs = [
        {"seed": s, "draw": d, "supervision": "A", "metrics": {"shapes": r}}
        for s, d, r in zip(seeds, draws, results, strict=True)
    ]
    return Row(None, runs, label=label)


def cells(section):
    return {line[0]: dict(zip(section.columns, line, strict=True)) for line in section.rows}


def test_without_the_images_own_matrices_there_is_no_interval(result):
    plain = row("a", read_metrics(result("a", per_image=False)))
    section = comparison("T", [plain, row("b", read_metrics(result("b", 0.1)))], "shapes", plain)
    found = cells(section)
    assert (
        found["a"]["95 % interval"] is None
        and found["b"]["95 % interval of the difference"] is None
    )
    assert found["b"]["95 % interval"] is not None and found["b"]["p (Holm)"] is None
    assert "evaluate the run again" in section.note


def test_runs_on_other_images_or_classes_are_separated_with_the_reason(result, builder, tmp_path):
    results = {n: read_metrics(result(n, seed=i, content="1")) for i, n in enumerate("ab")}
    results["masks"] = read_metrics(result("masks", content="2"))
    results["split"] = read_metrics(result("split", split="tune"))
    results["classes"] = read_metrics(result("classes", names=[*builder.names[:-1], "oak"]))
    results["set"] = read_metrics(result("set", masks_made_with={"power": 1}))
    other = builder.test(tmp_path / "else" / "shapes", 12)
    (other.root / "ImageSets/Segmentation/test.txt").write_text(
        "".join(f"t{i}\n" for i in range(12))[::-1].strip()
    )
    other.ids = other.ids[::-1]
    builder.result(tmp_path / "ids", other, 0.3, 0)
    results["ids"] = read_metrics(tmp_path / "ids/metrics.json")
    kept, left_out = comparable(results)
    assert list(kept) == ["a", "b"]
    assert {n: why.split(": ")[1] for n, why in left_out.items()} == {
        "masks": "content",
        "split": "split",
        "classes": "classes",
        "set": "masks made with",
        "ids": "ids",
    }
    assert list(comparable(results, "split")[0]) == ["split"]  # the baseline sets the standard
    assert comparable({}) == ({}, {})


def test_a_result_that_names_no_images_goes_with_those_of_as_many(result):
    results = {"a": read_metrics(result("a")), "old": read_metrics(result("old", per_image=False))}
    assert list(comparable(results)[0]) == ["a", "old"]


@pytest.fixture
def many(tmp_path, builder):
    """``many(name, error, seeds)``: results on 40 test images, one for each seed."""
    data = builder.test(tmp_path / "many" / "shapes", 40)

    def make(name, error, seeds=3, shift=0):
        found = []
        for seed in range(seeds):
            builder.result(tmp_path / name / str(seed), data, error, seed + shift)
            found.append(read_metrics(tmp_path / name / str(seed) / "metrics.json"))
        return row(name, *found)

    return make


def test_differences_are_paired_over_seeds_and_images(many):
    base, twin, good = many("base", 0.5), many("twin", 0.5), many("good", 0.05, shift=7)
    section = comparison("T", [base, twin, good], "shapes", base)
    found, difference = cells(section), "difference to base"
    assert section.rows[0][0] == "good"  # the best first
    assert found["base"][difference] == "baseline" and found["base"]["seeds"] == 3
    own = [
        found["twin"][k]
        for k in (difference, "95 % interval of the difference", "p (Holm)", "pairs")
    ]
    assert own == ["+0.0", "+0.0 to +0.0", "1.000", 3]  # the same predictions, seed by seed
    low, high = (float(v) for v in found["good"]["95 % interval of the difference"].split(" to "))
    expected = interval(good.scores("shapes"), base.scores("shapes"))
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.051)
    shown = found["good"]["p (Holm)"]  # one of two rows
    assert shown == ("< 0.001" if 2 * expected.p < 0.001 else f"{2 * expected.p:.3f}")
    assert section.highlight == {(0, 5)} and "on 40 test images" in section.note
    assert "decides nothing" not in section.note
    gone = row("x", *[r["metrics"]["shapes"] for r in good.runs])
    gone.runs = [{**r, "metrics": {}} for r in gone.runs]
    with pytest.raises(ValueError, match="baseline 'x' has no result.*base, twin, good"):
        comparison("T", [base, twin, good], "shapes", gone)


def test_few_seeds_or_few_images_decide_nothing(many, result):
    base, good = many("base", 0.5, seeds=2), many("good", 0.05, seeds=2)
    section = comparison("T", [base, good], "shapes", base)
    assert (
        not section.highlight
        and "decides nothing" in section.note
        and "2 paired seeds." in section.note
    )
    few = [
        row(name, *[read_metrics(result(f"{name}{s}", error, s)) for s in range(3)])
        for name, error in (("a", 0.5), ("b", 0.02))
    ]
    section = comparison("T", few, "shapes", few[0])
    low, _ = cells(section)["b"]["95 % interval of the difference"].split(" to ")
    assert float(low) > 0 and not section.highlight  # twelve images and an interval above 0
    assert "decides nothing (it takes 30 test images and 3 seeds): 12 test images." in section.note


def test_only_runs_of_one_seed_and_draw_are_pairs(result):
    results = [read_metrics(result(str(i), 0.3, i)) for i in range(6)]
    base, other = row("base", *results[:2], seeds=[0, 1]), row("other", *results[2:4], seeds=[2, 3])
    found = cells(comparison("T", [base, other], "shapes", base))["other"]
    assert (found["difference to base"], found["pairs"]) == ("no seed in both", 0)
    drawn = row("drawn", *results[:4], seeds=[0, 0, 1, 1], draws=[0, 1, 0, 1])
    real = row("real", *results[4:], seeds=[0, 1])
    found = cells(comparison("T", [drawn, real], "shapes", real))["drawn"]
    assert (found["seeds"], found["pairs"]) == ("2 on 2 draws", 4)
    assert found["difference to real"] == signed(
        sum(r["miou"] for r in results[:4]) / 4 - sum(r["miou"] for r in results[4:]) / 2
    )


def test_image_miou_by_hand():
    confusion = np.array([[[6, 2], [0, 0]], [[0, 0], [0, 0]], [[4, 0], [1, 3]]], np.uint32)
    found = image_miou({"confusion": confusion, "ids": ["a", "ignored", "b"]})
    assert found == pytest.approx({"a": 37.5, "b": 100 * (4 / 5 + 3 / 4) / 2})
    assert signed(-1.25).startswith("\N{MINUS SIGN}1.2") and signed(2.0) == "+2.0"
