"""The page that compares runs, from files on disk to HTML."""

import json
import re
import shutil

import pytest

from dd.data.datasets import SegmentationFolder
from dd.stages.report import Material, report
from dd.store.provenance import read_json


@pytest.fixture(scope="module")
def make(study):
    """``make(root, **more)``: the report about the runs below ``root``/outputs, or of the study
    itself."""

    def make(root, **more):
        from dd.taxonomy import taxonomy

        shapes = taxonomy("shapes")
        domains = [n for n in ("shapes", "shapes_shift") if (study / f"data/{n}").is_dir()]
        tests = {n: SegmentationFolder(study / f"data/{n}", "test", shapes) for n in domains}
        runs = sorted(p.parent for p in (root / "outputs").glob("**/run.json"))
        budgets = sorted((root / "outputs").glob("**/budget.json"))
        synthetic = study / "data/synthetic/shapes"
        given = {"runs": runs, "tests": tests, "taxonomy": shapes, "budgets": budgets, **more}
        material = Material(synthetic=synthetic, domains=domains, **given)
        return report(root / "out", "Study", material)

    return make


@pytest.fixture(scope="module")
def html(study, make):
    return make(study).read_text()


@pytest.fixture
def copy(study, tmp_path):
    shutil.copytree(study / "outputs", tmp_path / "outputs")
    return tmp_path


def titles(html):
    return re.findall(r"<h2>(.*?)</h2>", html)


def section(html, title):
    found = re.search(rf"<h2>{re.escape(title)}</h2>(.*?)</section>", html, re.DOTALL)
    return found[1] if found else ""


def rows_of(html, title):
    """The cells of a table of the page, as text."""
    found = re.findall(r"<tr>(.*?)</tr>", section(html, title).split("<tbody>")[1], re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>\s*(.*?)\s*</t[hd]>", row, re.DOTALL) for row in found]
    return [
        [re.sub(r"<span.*", "", cell, flags=re.DOTALL).strip() for cell in row] for row in cells
    ]


def seeds_of(html, title):
    return {row[0]: row[2] for row in rows_of(html, title)}


def test_the_page_says_what_its_numbers_rest_on(html):
    first = {row[0]: row[-2:-4:-1] for row in rows_of(html, "Results")}  # steps, seeds
    assert first == {
        "synthetic only": ["300", "2"],
        "synthetic, then 16 real": ["400", "2"],
        "16 real only": ["400", "2"],
        "synthetic, then 64 real": ["400", "2"],
        "64 real only": ["400", "2"],
    }
    assert "mIoU on shapes (12 images)" in section(html, "Results")
    assert "Fewer than 30 test images decide nothing: shapes has 12, shapes_shift has 12." in html
    assert "Fewer than 3 seeds decide nothing: no row has more than 2." in html
    assert (
        "Same total steps in both arms (400); mean and one standard deviation of 2 seeds on 12"
        in html
    )
    assert 'class="number strong"' not in html and 'class="strong"' not in html
    for title in ("Differences on shapes", "IoU per class on shapes", "Confusions on shapes"):
        assert "12 test images" in section(html, title)


def test_a_cell_of_fewer_runs_than_its_row_is_named(copy, make):
    """The second seed was never scored behind the gap: its mean there is of one seed."""
    found = [
        p
        for p in (copy / "outputs").glob("**/eval/shapes_shift")
        if {"seed=1", "synthetic"} <= set(p.parts)
    ]
    assert len(found) == 1
    shutil.rmtree(found[0])
    html = make(copy).read_text()
    assert "Not of all its runs: synthetic only on shapes_shift (1 of 2)." in section(
        html, "Results"
    )
    assert "synthetic only on shapes_shift (1 of 2)" in section(
        html, "IoU per class on shapes_shift"
    )
    assert "Not of all its runs" not in section(html, "IoU per class on shapes")


def test_the_chart_of_equal_steps_has_no_other_ones(copy, make, builder, tests_of):
    """A control of fewer steps has more seeds, a fair one is there at one number of images only: no
    curve is left."""
    for seed in (0, 1):
        shutil.rmtree(copy / f"outputs/shapes/real/shots=64,seed={seed}")
    for seed in range(3):
        folder = copy / f"outputs/shapes/real_short/shots=64,seed={seed}"
        builder.run(folder, tests_of.values(), 0.9, seed, "real", 64, steps=100)
    html = make(copy).read_text()
    assert "Label budget: shapes" not in titles(html)
    assert ["64 real only", "100", "3"] in [
        [row[0], *row[-2:-4:-1]] for row in rows_of(html, "Results")
    ]


def test_a_run_on_top_of_a_real_one_is_called_so(copy, make, builder, tests_of):
    whole = builder.run(copy / "outputs/whole", tests_of.values(), 0.1, 0, "real", "all", steps=400)
    builder.run(copy / "outputs/more", tests_of.values(), 0.1, 0, "real", 8, whole, steps=10)
    html = make(copy).read_text()
    assert "all real, then 8 real" in [row[0] for row in rows_of(html, "Results")]
    summary = json.loads((copy / "out/summary.json").read_text())
    assert set(summary["finetuned"]) == {"16", "64"}


def test_what_a_pattern_misses_or_is_not_finished_is_listed(copy, study, run, builder):
    runs = copy / "outputs/shapes"
    (runs / "begun").mkdir()
    (runs / "begun/settings.json").write_text(
        json.dumps({"identity": {"trained_on": {"source": "real"}}})
    )
    (runs / "adapter").mkdir()  # another stage's folder is no missing row
    (runs / "adapter/settings.json").write_text(
        json.dumps({"identity": {"stage": "adapt_generator"}})
    )
    builder.run(runs / "silent", [], 0.1, 7)
    where = [
        "data=shapes",
        f"data_root={study}/data",
        f"output_root={copy}",
        "report.domains=[shapes]",
    ]
    run("evaluate", "stage=report", f"report.runs={runs}", "name=out", *where)
    found = dict(rows_of((copy / "out/report.html").read_text(), "Not compared"))
    assert found[str(runs / "begun")].startswith("begun and not finished (no run.json)")
    assert found["silent"].startswith("finished and never evaluated") and len(found) == 2
    run("evaluate", "stage=report", f"report.runs={runs}/r*", "name=out", *where)
    found = dict(rows_of((copy / "out/report.html").read_text(), "Not compared"))
    (line,) = [name for name, why in found.items() if "the pattern of runs leaves it out" in why]
    assert line.endswith("and 2 more") and str(runs / "finetune/shots=16,seed=0") in line


def test_a_folder_whose_name_is_a_pattern_is_a_folder(copy, study, run):
    shutil.move(copy / "outputs/shapes", copy / "outputs/site [1]")
    where = [
        "data=shapes",
        f"data_root={study}/data",
        f"output_root={copy}",
        "report.domains=[shapes]",
    ]
    run("evaluate", "stage=report", f'report.runs="{copy}/outputs/site [1]"', "name=out", *where)
    assert len(json.loads((copy / "out/summary.json").read_text())["recipes"]) == 5


def test_the_page_answers_every_question(html):
    expected = {
        "Results",
        "Differences on shapes",
        "Differences on shapes_shift",
        "IoU per class on shapes",
        "IoU bars on shapes",
        "Confusions on shapes",
        "Worst predictions on shapes",
        "Best predictions on shapes",
        "Predictions on shapes",
        "Learning curves: training loss",
        "Learning curves: mIoU on tune (%)",
        "Label budget: shapes",
        "Synthetic images",
        "shapes_budget: how much labelling on shapes",
        "shapes_budget: what it costs on shapes",
        "shapes_budget: real images you can skip on shapes",
        "shapes_budget: price of a target on shapes",
        "Mask sweep: human",
        "Settings that differ",
        "Versions",
        "Commands",
    }
    assert expected <= set(titles(html)) and "Not compared" not in titles(html)
    assert len(html) < 20_000_000 and 'src="http' not in html


def test_what_others_wrote_is_escaped(html):
    assert "<script" not in html.lower() and "train.py &lt;script&gt;" in section(html, "Commands")


def test_settings_that_differ_are_named(html):
    text = section(html, "Settings that differ")
    assert (
        "trainer.max_steps" in text and "trained_on.shots" in text and "segmenter.depth" not in text
    )


def test_best_and_worst_are_those_of_the_images_themselves(html, study, builder):
    worst, best = (
        [
            float(v)
            for v in re.findall(
                r"mIoU ([\d.]+)</div>", section(html, f"{which} predictions on shapes")
            )
        ]
        for which in ("Worst", "Best")
    )
    assert (
        len(worst) == len(best) == 4
        and worst == sorted(worst)
        and best == sorted(best, reverse=True)
    )
    assert max(worst) < min(best)


def test_rows_of_the_confusion_matrix_add_up(html):
    rows = re.findall(r'<th scope="row">.*?</tr>', section(html, "Confusions on shapes"), re.DOTALL)
    sums = [sum(int(v) for v in re.findall(r">(\d+)</td>", row)) for row in rows]
    assert len(sums) == 11 and all(97 <= s <= 103 for s in sums)  # rounded


def test_summary_keeps_its_form(study, html):
    summary = read_json(study / "out/summary.json")
    own = {
        "mask_miou",
        "synthetic_only",
        "finetuned",
        "real_only",
        "shots_from",
        "seconds",
        "seeds",
    }
    assert set(summary) == own | {"test_images", "recipes", "verdict"}
    assert (
        set(summary["finetuned"]) == {"16", "64"} and len(summary["synthetic_only"]["shapes"]) == 2
    )


def test_the_baseline_can_be_chosen(copy, make):
    text = section(
        make(copy, baseline=copy / "outputs/shapes/real/shots=16,seed=0").read_text(),
        "Differences on shapes",
    )
    assert "difference to 16 real only" in text
    with pytest.raises(ValueError, match="baseline=nowhere: none of the evaluated runs, which are"):
        make(copy, baseline="nowhere")


def test_an_edited_result_is_kept_apart_with_the_reason(copy, make, capsys):
    path = copy / "outputs/shapes/synthetic/seed=0/eval/shapes/metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "miou": 99.9}))
    html = make(copy).read_text()
    assert "99.9" not in html and "it was edited or damaged" in section(html, "Not compared")
    assert "not compared" in capsys.readouterr().err
    assert not isinstance(
        json.loads((copy / "out/summary.json").read_text())["synthetic_only"]["shapes"], list
    )


def test_a_result_on_other_data_is_kept_apart(copy, make, builder, study):
    data = SegmentationFolder(study / "data/shapes", "test", builder.shapes)
    builder.result(copy / "outputs/shapes/synthetic/seed=1/eval/shapes", data, 0.3, 0, split="tune")
    html = make(copy).read_text()
    assert "synthetic/seed=1 on shapes" in section(html, "Not compared")
    assert "split: test -&gt; tune" in section(html, "Not compared")
    assert seeds_of(html, "Differences on shapes")["synthetic only"] == "1"
    assert seeds_of(html, "Differences on shapes_shift")["synthetic only"] == "2"


def test_nothing_left_to_compare_is_an_error_with_the_reasons(copy, make):
    for path in copy.glob("outputs/**/metrics.json"):
        path.write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"none of .* is a finished run with an evaluation\n.*another version wrote it",
    ):
        make(copy)


def test_another_taxonomy_is_refused(study, make):
    from dd.taxonomy import Taxonomy

    with pytest.raises(
        ValueError, match="was evaluated with the classes .*give the report the data of the runs"
    ):
        make(study, taxonomy=Taxonomy("pets", ["cat", "dog"]))
