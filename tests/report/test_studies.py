import pytest

from dd.report import studies
from dd.report.origins import differing, flatten
from dd.report.page import Chart, Table


def test_a_curve_is_read_from_the_rows_that_have_it(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss,tune/miou\n0,9,2.5,\n0,19,nan,\n0,19,,40\n0,29,1.5,\n0,3")
    assert studies.read_curve(path, "train/loss") == ([9, 29], [2.5, 1.5])
    assert studies.read_curve(path, "tune/miou") == ([19], [40.0])
    assert studies.read_curve(path, "other") == ([], [])


def test_the_budget_study_shows_curves_savings_and_prices(builder):
    sections = list(studies.budget_sections(builder.budget, "study"))
    assert [type(s) for s in sections] == [Chart, Chart, Table, Table]
    assert "all (512)" in sections[0].svg and "10 minutes an image at 24 an hour" in sections[1].note
    skips = {row[1]: row[3:] for row in sections[2].rows}
    assert skips == {"16": ["88", "72"], "512": ["more than measured", "at least 0"]}
    assert sections[3].rows == [["65.0 (real only, 64 images)", "38 (9 images)", "more than 512 images"]]


def test_prices_of_points_by_hand(builder):
    prices = studies.Prices(**builder.budget["cost"]["prices"])
    points = {a: studies._points(v, "shapes") for a, v in builder.budget["arms"].items()}
    priced = studies._priced(points, builder.budget["cost"]["seconds"], "shapes", 512, prices)
    # 1 GPU hour = 2; 16 images x 10 min x 24 an hour = 64; the control took half an hour = 1
    assert priced == {"finetune": ([2.0, 66.0], [61.0, 69.0]), "real": ([65.0], [50.0])}
    spent = builder.budget["cost"]["seconds"]
    paid = {"finetune": {"0": {"shapes": 8}, "16": {"shapes": 24}}}  # 8 labels chose its settings
    priced = studies._priced(points, spent, "shapes", 512, prices, paid)
    assert priced == {"finetune": ([34.0, 98.0], [61.0, 69.0]), "real": ([65.0], [50.0])}


@pytest.mark.parametrize("study", [{"arms": {}}, {"arms": {"real": {"16": {"shapes": [None]}}}}])
def test_a_study_without_results_shows_nothing(study):
    assert list(studies.budget_sections(study, "s")) == []


def test_the_least_that_a_study_says_is_shown():
    sections = list(studies.budget_sections({"arms": {"mine": {"all": {"d": [5.0]}, "4": {"d": [3.0]}}}}, "s"))
    assert [type(s) for s in sections] == [Chart]


def test_a_sweep_is_shown_at_its_best_band_and_source():
    rows = [(1, 0.5, 0.1, "a", 60.0), (2, 0.5, 0.1, "a", 59.0), (1, 0.4, 0.1, "a", 58.0), (1, 0.5, 0.2, "a", 57.0)]
    keys = ("power", "threshold", "band", "source", "miou")
    table = [dict(zip(keys, r, strict=True)) for r in rows]
    matrix = studies.sweep_section({"sweep": {"against": "m", "table": table}}, "s")
    assert (matrix.rows, matrix.columns) == (["1", "2"], ["0.4", "0.5"])
    assert matrix.values == [[58.0, 60.0], [None, 59.0]]
    assert "best of 4 settings (power 1, threshold 0.5: 60.0)" in matrix.note


def test_settings_that_differ_are_listed_with_their_runs():
    settings = {f"r{i}": {"a": {"b": 1}, "seed": i // 4} for i in range(5)}
    settings["r4"]["only"] = [1, 2]
    assert differing(settings) == [
        ["only", "(absent)", "r0, r1, r2 and 1 more"], ["only", "[1, 2]", "r4"],
        ["seed", "0", "r0, r1, r2 and 1 more"], ["seed", "1", "r4"],
    ]  # fmt: skip
    assert flatten({"a": {"b": {}, "c": None}}) == {"a.c": "None"}
