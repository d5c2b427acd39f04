"""The labels behind the runs of a page."""

from dd.report.labels import labels_behind, labels_section

TUNE = {"what": "masks", "data": "shapes/tune", "labels": 128}
SYNTHETIC = {"source": "synthetic", "mask_settings": {}, "after": None, "shots": None}
FEW = {"source": "real", "data": "shapes", "split": "train", "images": 16, "shots": 16, "seed": 0}


def entry(name, supervision, trained_on, **more):
    return {"name": name, "supervision": supervision, "run": {"trained_on": trained_on, **more}}


def test_labels_behind_a_run():
    run = {"trained_on": {**FEW, "after": SYNTHETIC}, "chosen_on": [TUNE, {**TUNE, "what": "rate"}]}
    assert labels_behind(run) == {
        "number": 144,
        "chosen": "128 labels of shapes/tune (masks, rate)",
        "trained": "16 labels of shapes/train",
    }
    assert labels_behind({"trained_on": SYNTHETIC, "chosen_on": []})["number"] == 0
    told = labels_behind({"trained_on": SYNTHETIC})
    assert (told["number"], told["chosen"]) == (None, "not recorded")


def test_the_class_a_row_stands_beside_the_others():
    found = labels_section(
        [
            entry("synthetic/seed=0", "B", SYNTHETIC, chosen_on=[TUNE]),
            entry("synthetic/seed=1", "B", SYNTHETIC, chosen_on=[TUNE]),
            entry("label_free/seed=0", "A", SYNTHETIC, chosen_on=[]),
            *(entry(f"real/{i}", "real", FEW | {"seed": i}, chosen_on=[]) for i in range(5)),
        ]
    )
    assert found.rows[:2] == [
        ["label_free/seed=0", "A", 0, "no label", "no label"],
        [
            "synthetic/seed=0, synthetic/seed=1",
            "B",
            128,
            "128 labels of shapes/tune (masks)",
            "no label",
        ],
    ]
    assert found.rows[2][0] == "real/0, real/1, real/2 and 2 more" and found.rows[2][2] == 16
