import pytest

from dd.report import studies
from dd.report.html import Chart, Table
from dd.report.origins import differing, flatten


def test_a_curve_is_read_from_the_rows_that_have_it(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,step,train/loss,tune/miou\n0,9,2.5,\n0,19,nan,\n0,19,,40\n0,29,1.5,\n0,3"
    )
    assert studies.read_curve(path, "train/loss") == ([9, 29], [2.5, 1.5])
    assert studies.read_curve(path, "tune/miou") == ([19], [40.0])
    assert studies.read_curve(path, "other") == ([], [])


def test_the_budget_study_shows_curves_savings_and_prices(builder):
    sections = list(studies.budget_sections(builder.budget, "study"))
    assert [type(s) for s in sections] == [Chart, Chart, Table, Table, Table]
    assert (
        "all (512)" in sections[0].svg and "10 minutes an image at 24 an hour" in sections[1].note
    )
    assert "3 seeds, 40 test images" in sections[0].note
    assert "decides nothing" not in sections[0].note
    assert "at 16 images 0.003" in sections[0].note  # a rate at the edge of its grid
    skips = {row[1]: row[3:] for row in sections[3].rows}
    assert skips == {
        "0": ["38 to 52", "38; 52; at most 64", None, ""],
        "16": ["108", "86; 151; 108", "53 to 223", ""],
        "512": ["not shown", "at least 0; at least 0; costs 41", None, ""],
    }
    (target, *prices) = sections[4].rows[0]
    assert target == "65.0 (given)"
    assert prices == ["34 (8 images; 6 to 10)", "237 to 257 (59 to 64 images; 76 or fewer)"]


def test_differences_say_what_they_rest_on(builder):
    sections = studies.budget_sections(builder.budget, "study")
    (table,) = (s for s in sections if "differences" in s.title)
    rows = {(row[1], row[2].split(",")[0]): row[4:] for row in table.rows}
    # 18 and 19 more than the control, two pairs: 12.7 times 0.5
    assert rows["16", "real only"][:3] == ["+18.5", "+12.1 to +24.9", "yes"]
    assert rows["16", "real only"][5:] == [2, None]
    assert rows["512", "real only"][:3] == ["+0.5", "−1.7 to +2.7", "not shown"]
    assert rows["512", "real only"][4] >= rows["512", "real only"][3] > 0.05
    assert "all 5 differences" in table.note
    assert not table.highlight  # images were not stored: nothing is bold


def test_only_what_rests_on_enough_is_bold(builder):
    row = {
        "arm": "a",
        "k": 16,
        "against": "b",
        "against_k": 16,
        "domain": "d",
        "value": 5.0,
        "low": 4.0,
        "high": 6.0,
        "p": 0.001,
        "p_holm": 0.002,
        "runs": 3,
        "seeds": 3,
        "images": 30,
    }
    alone = dict.fromkeys(("low", "high", "p", "p_holm"))
    changes = [{}, {"images": 29}, {"seeds": 2}, {"p_holm": 0.06}, alone]
    study = {"differences": [{**row, **change} for change in changes], "seeds": [0, 1, 2]}
    (table,) = studies._differences(study, {}, "d", "s")
    assert table.highlight == {(0, 4)} and table.rows[4][5:7] == ["one run", "not shown"]


FEW = {"runs": [{"domain": "shapes", "num_images": 29}]}


@pytest.mark.parametrize("changes", [{"seeds": [0, 1]}, FEW, {"runs": []}])
def test_a_study_of_few_seeds_or_images_says_that_it_decides_nothing(builder, changes):
    sections = list(studies.budget_sections({**builder.budget, **changes}, "study"))
    tables = [s for s in sections if isinstance(s, Table)]
    assert len(tables) == 3
    for section in (sections[0], *tables):
        assert section.note.endswith("This decides nothing: it takes 3 seeds and 30 test images.")


def test_prices_of_points_by_hand(builder):
    prices = studies.Prices(**builder.budget["cost"]["prices"])
    points = {a: studies._points(v, "shapes") for a, v in builder.budget["arms"].items()}
    priced = studies._priced(points, builder.budget["cost"]["seconds"], "shapes", 512, prices, {})
    # 1 GPU hour = 2; 16 images x 10 min x 24 an hour = 64; the control took half an hour = 1
    assert priced["finetune"] == ([2.0, 66.0, 2050.0], [61.0, 69.0, 77.0])
    assert priced["real"] == ([65.0, 257.0, 2049.0], [50.5, 65.0, 76.5])
    spent = builder.budget["cost"]["seconds"]
    paid = {"finetune": {"0": {"shapes": 8}, "16": {"shapes": 24}}}  # 8 labels chose its settings
    priced = studies._priced(points, spent, "shapes", 512, prices, paid)
    assert priced["finetune"] == ([34.0, 98.0, 2050.0], [61.0, 69.0, 77.0])
    assert priced["real"] == ([65.0, 257.0, 2049.0], [50.5, 65.0, 76.5])


@pytest.mark.parametrize("study", [{"arms": {}}, {"arms": {"real": {"16": {"shapes": [None]}}}}])
def test_a_study_without_results_shows_nothing(study):
    assert list(studies.budget_sections(study, "s")) == []


def test_the_least_that_a_study_says_is_shown():
    sections = list(
        studies.budget_sections({"arms": {"mine": {"all": {"d": [5.0]}, "4": {"d": [3.0]}}}}, "s")
    )
    assert [type(s) for s in sections] == [Chart]


def test_a_sweep_is_shown_at_its_best_band_and_source():
    rows = [
        (1, 0.5, 0.1, "a", 60.0),
        (2, 0.5, 0.1, "a", 59.0),
        (1, 0.4, 0.1, "a", 58.0),
        (1, 0.5, 0.2, "a", 57.0),
    ]
    keys = ("power", "threshold", "band", "source", "miou")
    table = [dict(zip(keys, r, strict=True)) for r in rows]
    matrix = studies.sweep_section({"sweep": {"against": "m", "table": table}}, "s")
    assert (matrix.rows, matrix.columns) == (["1", "2"], ["0.4", "0.5"])
    assert matrix.values == [[58.0, 60.0], [None, 59.0]]
    assert "best of 4 settings (power 1, threshold 0.5: 60.0)" in matrix.note


def test_a_sweep_of_chains_shows_the_one_chain_that_has_powers_and_thresholds():
    refined = {"chain": "refined", "source": "a", "miou": 90.0}
    paper = {"chain": "paper", "power": 1, "threshold": 0.5, "band": 0.1, "source": "a"}
    table = [refined, {**paper, "miou": 60.0}, {**paper, "chain": "pamr", "miou": 50.0}]
    matrix = studies.sweep_section({"sweep": {"against": "m", "table": table}}, "s")
    assert matrix.values == [[60.0]]
    assert studies.sweep_section({"sweep": {"against": "m", "table": [refined]}}, "s") is None


def test_settings_that_differ_are_listed_with_their_runs():
    settings = {f"r{i}": {"a": {"b": 1}, "seed": i // 4} for i in range(5)}
    settings["r4"]["only"] = [1, 2]
    assert differing(settings) == [
        ["only", "(absent)", "r0, r1, r2 and 1 more"],
        ["only", "[1, 2]", "r4"],
        ["seed", "0", "r0, r1, r2 and 1 more"],
        ["seed", "1", "r4"],
    ]
    assert flatten({"a": {"b": {}, "c": None}}) == {"a.c": "None"}
