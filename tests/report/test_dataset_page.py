"""The page about one synthetic data set."""

import re
import shutil

import numpy as np
import pytest

from dd.data.datasets import read_mask
from dd.report import dataset_page as dataset
from dd.stages import report_dataset as stage
from dd.store.samples import read_plan


@pytest.fixture(scope="module")
def folder(study):
    return study / "data/synthetic/shapes"


@pytest.fixture(scope="module")
def html(folder):
    return stage.report_dataset(folder, gallery=10).read_text()


def test_the_page_shows_balance_sizes_signals_samples_and_origin(html, builder):
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    expected = {
        "Class balance: images",
        "Class balance: pixels",
        "Classes",
        "Mask areas",
        "Uncertainty",
        "Samples",
        "Quality: peak of the heat",
        "Quality: CLIP score",
        "Mask sweep: human",
        "How it was made",
    }
    assert expected <= set(titles)
    assert html.count('<li class="sample"') == 10 and "generate.py" in html
    assert html.count("<script>") == 1 and "&lt;script&gt;alert" in html
    assert "1,001" not in html and "<dd>1001</dd>" in html  # a seed as it is


def test_numbers_by_hand(folder):
    plan = read_plan(folder)
    masks = {s.id: read_mask(folder / f"SegmentationClass/{s.id}.png") for s in plan}
    found = dataset.statistics(plan, folder / "SegmentationClass")
    assert found.pixels.sum() == sum(m.size for m in masks.values())
    assert found.pixels[255] == sum(int((m == 255).sum()) for m in masks.values())
    assert found.uncertain["000000"] == pytest.approx(100 * 3 / 128)
    assert found.missing == {"000001": [plan[1].classes[0]]}
    name, number = plan[1].classes[0], plan[1].class_ids[0]
    having = [m for s, m in masks.items() if (m == number).any() and name in plan[int(s)].classes]
    assert found.present[name] == len(having) == found.asked[name] - 1
    assert found.areas[name] == pytest.approx([100 * (m == number).mean() for m in having])


def test_samples_are_chosen_so_that_each_class_has_its_turn(folder):
    plan = read_plan(folder)
    chosen = dataset.choose(plan, 8)
    assert len(chosen) == 8 and [s.id for s in chosen] == sorted(s.id for s in chosen)
    assert {c for s in chosen for c in s.classes} == {c for s in plan for c in s.classes}
    assert dataset.choose(plan, 99) == plan


def test_signals_are_taken_at_the_power_of_the_masks():
    heat = {
        "heat": {"class_prompt": {"peak": [[1.0, 2.0], [3.0, None]]}},
        "clip": {"prompt": 20.0, "classes": [21.0]},
    }
    found = dataset.signal_values([heat, {}], 1, "class_prompt")
    assert found == {
        "peak of the heat": [2.0],
        "CLIP score": [20.0],
        "CLIP score of a class": [21.0],
    }
    assert "peak of the heat" not in dataset.signal_values([heat], None, "class_prompt")


def test_a_page_that_would_be_too_large_shows_fewer_samples(folder, html, monkeypatch):
    monkeypatch.setattr(stage, "LIMIT", len(html.encode()) * 3 // 4)
    assert 0 < stage.report_dataset(folder, gallery=10).read_text().count('<li class="sample"') < 10


def test_large_images_are_shown_small(tmp_path, builder):
    large = builder.synthetic(tmp_path / "large", 2, 512)
    page = stage.report_dataset(large)
    assert (
        page.stat().st_size < 2_000_000
        and 'width="224"' in page.read_text()
        and 'width="512"' not in page.read_text()
    )


def test_bad_input_is_named(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no finished mask set masks/p9; there: SegmentationClass"
    ):
        stage.report_dataset(folder, "masks/p9")
    with pytest.raises(FileNotFoundError, match="not a synthetic data set"):
        stage.report_dataset(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "SegmentationClass/000003.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no mask .*000003.png; run generate.py with stage=label"
    ):
        stage.report_dataset(copy)


def test_a_set_without_signals_has_no_quality_charts(folder):
    found = dataset.statistics(read_plan(folder), folder / "SegmentationClass")
    assert [c.title for c in dataset.histograms(found, [], 1, "class_prompt")] == [
        "Mask areas",
        "Uncertainty",
    ]
    assert np.isfinite(list(found.uncertain.values())).all()
