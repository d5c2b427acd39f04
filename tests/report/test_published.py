"""The reproduction table: published numbers with sources, measured ones beside them, empty where
nothing was run."""

import json
from statistics import stdev

import pytest

from dd.report import html as page
from dd.report import published


def entry(
    segmenter,
    arm,
    miou,
    seed=0,
    tta=False,
    supervision="A",
    number=40000,
    steps=20000,
    variant="",
    origin="",
):
    return {
        "segmenter": segmenter,
        "arm": arm,
        "miou": miou,
        "seed": seed,
        "tta": tta,
        "supervision": supervision,
        "images": f"{number} synthetic",
        "number": number,
        "steps": steps,
        "variant": variant,
        "origin": origin,
        "recipe": f"{number} {steps} {variant} {origin}",
    }


def row(table, segmenter, trained_on):
    (found,) = [r for r in table.rows if r[0] == segmenter and r[1] == trained_on]
    return dict(zip(table.columns, found, strict=True))


def test_every_published_number_has_a_source_and_a_supervision_class():
    for result in published.PUBLISHED["results"]:
        assert result["source"] in published.PUBLISHED["sources"]
        assert result["supervision"] in published.PUBLISHED["supervision"]
        assert 0 < result["miou"] < 100 and result["arm"] in published.TRAINED_ON
    for result in published.PUBLISHED["others"]:
        assert result["source"] and result["supervision"] in published.PUBLISHED["supervision"]


def test_the_papers_three_segmenters_stand_in_the_table_of_both_data_sets():
    for data, expected in {"voc": (61.6, 64.8, 60.2), "coco": (32.4, 34.2, 31.0)}.items():
        table = published.reproduction(data, [])[0]
        names = ("DeepLabV3 R50", "DeepLabV3 R101", "Mask2Former R50")
        assert tuple(row(table, n, "synthetic")["published"] for n in names) == expected


def test_what_was_not_run_is_empty():
    table = published.reproduction("voc", [])[0]
    for cells in table.rows:
        line = dict(zip(table.columns, cells, strict=True))
        assert line["measured"] is None and line["difference"] is None and line["seeds"] == ""


def test_one_run_shows_its_difference_and_three_show_mean_and_deviation():
    one = published.reproduction("voc", [entry("DeepLabV3 R101", "synthetic", 62.8)])[0]
    assert row(one, "DeepLabV3 R101", "synthetic")["difference"] == pytest.approx(-2.0)
    runs = [entry("DeepLabV3 R101", "synthetic", m, s) for s, m in enumerate((62.0, 63.0, 65.0))]
    line = row(published.reproduction("voc", runs)[0], "DeepLabV3 R101", "synthetic")
    assert line["measured"] == pytest.approx((190 / 3, stdev((62.0, 63.0, 65.0))))
    assert line["difference"] == pytest.approx(190 / 3 - 64.8) and line["seeds"] == "0, 1, 2"


def test_what_was_trained_on_stands_beside_what_was_published():
    """16 images and 5 steps are no reproduction of 40,000 images: no difference is given."""
    small = entry("DeepLabV3 R101", "synthetic", 3.0, number=16, steps=5)
    line = row(published.reproduction("voc", [small])[0], "DeepLabV3 R101", "synthetic")
    assert (
        line["measured with"] == "16 synthetic images, 5 steps"
        and line["published for"] == "40k synthetic"
    )
    assert line["measured"] == 3.0 and line["difference"] is None
    whole = entry("DeepLabV3 R101", "real", 79.0, number=10582, supervision="real")
    line = row(published.reproduction("voc", [whole])[0], "DeepLabV3 R101", "real")
    assert line["difference"] == pytest.approx(-0.9)  # 11.5k are published


def test_another_recipe_is_a_row_of_its_own():
    runs = [
        entry("DeepLabV3 R101", "synthetic", 62.8),
        entry("DeepLabV3 R101", "synthetic", 9.0, variant="5 steps"),
    ]
    table = published.reproduction("voc", runs)[0]
    assert row(table, "DeepLabV3 R101", "synthetic")["measured"] == 62.8
    other = row(table, "DeepLabV3 R101", "synthetic; 5 steps")
    assert (other["measured"], other["published"]) == (9.0, None)


def test_real_images_of_two_data_sets_are_no_seeds_of_one_recipe():
    """Whole splits of VOC and of VOC with SBD's masks: the number of images says which one was
    published."""
    few = entry("DeepLabV3 R101", "real", 45.2, number=1464, supervision="real", origin="voc")
    many = [
        entry("DeepLabV3 R101", "real", m, s, number=10582, supervision="real", origin="voc_aug")
        for s, m in enumerate((77.0, 78.0))
    ]
    table = published.reproduction("voc", [few, *many])[0]
    line = row(table, "DeepLabV3 R101", "real")
    assert (
        line["measured"] == pytest.approx((77.5, stdev((77.0, 78.0)))) and line["seeds"] == "0, 1"
    )
    assert line["difference"] == pytest.approx(77.5 - line["published"])
    other = row(table, "DeepLabV3 R101", "real (real images from voc)")
    assert (other["measured"], other["published"], other["seeds"]) == (45.2, None, "0")


def test_what_saw_real_labels_is_not_compared_with_what_did_not():
    runs = [
        entry("DeepLabV3 R50", "synthetic", 60.0),
        entry("DeepLabV3 R50", "synthetic", 70.0, supervision="B"),
    ]
    lines = [
        dict(zip(t.columns, r, strict=True))
        for t in published.reproduction("voc", runs)[:1]
        for r in t.rows
    ]
    found = [(x["saw"], x["published"], x["measured"]) for x in lines if x["measured"] is not None]
    assert found == [("A", 61.6, 60.0), ("B", None, 70.0)]


def test_test_time_augmentation_never_mixes_with_single_scale():
    runs = [
        entry("DeepLabV3 R50", "synthetic", 60.0),
        entry("DeepLabV3 R50", "synthetic", 70.0, tta=True),
    ]
    line = row(published.reproduction("voc", runs)[0], "DeepLabV3 R50", "synthetic")
    assert (line["measured"], line["measured, multi-scale + flip"]) == (60.0, 70.0)


def test_runs_without_a_published_twin_get_rows_of_their_own():
    runs = [entry("SegFormer B0", "synthetic", 58.0), entry("DeepLabV3 R50", "self_training", 63.0)]
    table = published.reproduction("voc", runs)[0]
    assert row(table, "SegFormer B0", "synthetic")["published"] is None
    assert row(table, "DeepLabV3 R50", "synthetic, self-training")["measured"] == 63.0


def test_other_data_has_no_reproduction_table():
    assert published.reproduction("shapes", [entry("DeepLabV3 R18", "synthetic", 60.0)]) == []


def test_the_page_shows_the_table():
    html = page.render(
        "t", "s", published.reproduction("voc", [entry("DeepLabV3 R101", "synthetic", 62.8)])
    )
    assert (
        "64.8" in html
        and "62.8" in html
        and "−2.0" in html
        and "never" not in json.dumps(published.PUBLISHED)
    )
