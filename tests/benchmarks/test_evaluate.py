"""benchmarks/evaluate.py at a small size: what it prints, and that a wrong count does not pass."""

import json

import pytest
import torch

from benchmarks import evaluate
from dd.evaluation import metrics
from dd.store.provenance import read_json


def test_its_last_line_holds_the_ratios(capsys, tmp_path):
    small = [
        "--images",
        "7",
        "--network",
        "3",
        "--batch",
        "2",
        "--depth",
        "18",
        "--size",
        "64",
        "--device",
        "cpu",
    ]
    result = evaluate.main([*small, "--output", str(tmp_path / "evaluate.json")])
    assert (
        json.loads(capsys.readouterr().out.splitlines()[-1])
        == result
        == read_json(tmp_path / "evaluate.json")
    )
    assert result["images"] == 7 and result["threads"] == torch.get_num_threads()
    each = result["milliseconds_an_image"]
    assert each.keys() == {"ours", "torchmetrics", "mmsegmentation"} and min(each.values()) > 0
    assert result["torchmetrics_over_ours"] == pytest.approx(
        each["torchmetrics"] / each["ours"], rel=0.02
    )
    assert sum(result["share_percent"].values()) == pytest.approx(100, abs=0.1)
    assert result["outside_the_network_percent"] == pytest.approx(
        100 - result["share_percent"]["network"], abs=0.02
    )


def test_a_count_that_differs_is_an_error(monkeypatch):
    right = metrics.image_counts
    monkeypatch.setattr(metrics, "image_counts", lambda *given: right(*given).roll(1, 2))
    with pytest.raises(RuntimeError, match="the three counts differ"):
        evaluate.count(3, 2, "cpu")


def test_nothing_to_count_is_refused(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--images", "0"])
    assert "--images 0: use 1 or more" in capsys.readouterr().err
