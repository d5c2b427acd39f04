"""The table of labelers and students."""

from types import SimpleNamespace

from dd.report.whose_masks import REAL, source_of, whose_masks

ATTENTION = {"source": "synthetic", "masks": "SegmentationClass", "mask_settings": {"heat": "0"}}
SAM = {
    "source": "synthetic",
    "masks": "masks/sam3",
    "mask_settings": {"labeler": {"name": "sam3", "supervision": "D"}},
}
TAUGHT = {"source": "synthetic", "masks": "masks/again", "mask_settings": {"teacher": {}}}
WHOLE = {"source": "real", "masks": "SegmentationClass"}


def entry(trained_on, miou, supervision="A", arm="synthetic_only", steps=100, **more):
    what = {"arm": arm, "shots": None, "segmenter": "DeepLabV3 R18", "steps": steps, **more}
    return {
        "run": {"trained_on": {"after": None, **trained_on}},
        "recipe": SimpleNamespace(**what),
        "supervision": supervision,
        "metrics": {"shapes": {"miou": miou}},
    }


def test_whose_masks_a_run_was_trained_on():
    assert source_of(entry(ATTENTION, 1.0)) == ("SegmentationClass (attention)", "")
    assert source_of(entry(SAM, 1.0)) == ("masks/sam3 (sam3)", "SAM License")
    assert source_of(entry(TAUGHT, 1.0)) == ("masks/again (a run)", "")
    assert source_of(entry(WHOLE, 1.0, arm="real_only", shots="all")) == (REAL, "")
    assert source_of(entry(WHOLE, 1.0, arm="real_only", shots="16")) is None
    assert source_of(entry(WHOLE | {"after": ATTENTION}, 1.0, arm="finetuned", shots="16")) is None
    assert source_of(entry(ATTENTION | {"after": SAM}, 1.0)) is None


def test_a_row_for_each_mask_set_and_a_column_for_each_student():
    entries = [
        entry(SAM, 60.0, "D"),
        entry(ATTENTION, 50.0),
        entry(ATTENTION, 52.0),
        entry(ATTENTION, 40.0, segmenter="EoMT Base"),
        entry(ATTENTION, 55.0, steps=400),
        entry(WHOLE, 80.0, "real", "real_only", shots="all"),
        {**entry(SAM, 1.0, "D"), "metrics": {}},
    ]
    (table,) = whose_masks(entries, "shapes")
    students = ["DeepLabV3 R18, 100 steps", "DeepLabV3 R18, 400 steps", "EoMT Base, 100 steps"]
    assert table.columns == ["masks", *students, "supervision", "licence"]
    first, second, last = table.rows
    assert first[0] == "SegmentationClass (attention)" and first[2:] == [55.0, 40.0, "A", "–"]
    assert first[1][0] == 51.0 and round(first[1][1], 3) == 1.414
    assert second == ["masks/sam3 (sam3)", 60.0, None, None, "D", "SAM License"]
    assert last == [REAL, 80.0, None, None, "real", "–"]


def test_one_mask_set_makes_no_table():
    assert not list(whose_masks([entry(ATTENTION, 50.0), entry(WHOLE, 80.0)], "shapes"))
    assert not list(whose_masks([entry(ATTENTION, 50.0), entry(SAM, 60.0)], "voc"))
