"""Stage pilot: what a small set says of a large one."""

import json

import numpy as np
import pytest

from dd.data.datasets import encode_mask, read_mask
from dd.stages.pilot import PilotSettings, pilot, print_pilot
from dd.store.provenance import read_json
from tests.doors import exit_status
from tests.report.conftest import NAMES, make_synthetic

SITES = [
    {"name": "a", "kind": "cross", "heads": 8, "side": 16},
    {"name": "b", "kind": "cross", "heads": 8, "side": 16},
    {"name": "c", "kind": "self", "heads": 8, "side": 32},
]


@pytest.fixture
def folder(tmp_path):
    root = make_synthetic(tmp_path / "data/synthetic/shapes", count=10)
    run = json.loads((root / "run.json").read_text())
    (root / "run.json").write_text(json.dumps({**run, "sites": SITES}))
    return root


def records(folder, change):
    path = folder / "records/0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_numbers_by_hand(folder, capsys):
    found = pilot(folder, PilotSettings(images=1000, per_gpu_hour=3.0))
    assert (found["images"], found["bad"], found["stop"]) == (10, 0, [])
    assert found["sites"] == [
        {"kind": "cross", "side": 16, "layers": 2},
        {"kind": "self", "side": 32, "layers": 1},
    ]
    masks = np.stack([read_mask(folder / f"SegmentationClass/{i:06d}.png") for i in range(10)])
    assert sum(found["pixels"].values()) == pytest.approx(100)
    assert found["pixels"]["uncertain"] == pytest.approx(100 * (masks == 255).mean())
    assert found["pixels"]["apple"] == pytest.approx(100 * (masks == NAMES.index("apple")).mean())
    assert sum(c["missing"] for c in found["classes"].values()) == 1
    cost = found["cost"]  # half a second an image
    assert cost["per_second"] == 2.0 and cost["gpu_hours"] == pytest.approx(500 / 3600)
    assert cost["price"] == pytest.approx(3 * 500 / 3600)
    parts = ("JPEGImages/*.png", "heat/*.safetensors", "SegmentationClass/*.png")
    size = sum(p.stat().st_size for part in parts for p in folder.glob(part))
    assert cost["gigabytes"] == pytest.approx(size / 10 * 1000 / 1e9)
    assert read_json(folder / "pilot.json")["pixels"] == found["pixels"]
    print_pilot(found)
    said = capsys.readouterr().out
    assert "2 cross at 16x16, 1 self at 32x32" in said and "\ngo: " in said
    assert "2.00 images/s; 1,000 images: 0.1 GPU-hours, price 0" in said


def test_each_limit_stops(folder, capsys):
    name = next(n for n, c in pilot(folder, PilotSettings())["classes"].items() if c["asked"] >= 5)
    number = NAMES.index(name)
    for i in range(10):
        path = folder / f"SegmentationClass/{i:06d}.png"
        mask = read_mask(path)
        mask[mask == number] = 255
        mask[mask == 0] = 255
        path.write_bytes(encode_mask(mask))
    records(folder, lambda row: row.update(faults=["constant"]) if row["id"] == "000003" else None)
    found = pilot(folder, PilotSettings(least=60.0))
    asked = found["classes"][name]["asked"]
    bad, missing, drawn, uncertain = found["stop"]
    assert bad.startswith("1 of 10 images had a bad attempt (10 %, at most 5 %)")
    assert missing.startswith(f"{name}: no pixel in {asked} of the {asked} images that ask for it")
    assert "% of the pixels are of a class (expected 60 to 90 %)" in drawn
    assert "% of the pixels are uncertain (at most 40 %)" in uncertain
    print_pilot(found)
    assert capsys.readouterr().out.count("\nstop: ") == 4
    limits = {"bad": 10.0, "unseen": 100.0, "uncertain": 100.0, "least": 0.0}
    assert pilot(folder, PilotSettings(**limits))["stop"] == []


def test_the_exit_code_tells_go_from_stop(folder):
    given = (f"synthetic={folder}", "stage=pilot")
    assert exit_status("evaluate", *given) == 0
    assert exit_status("evaluate", *given, "pilot.least=89") == 1


def test_what_is_not_finished_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="has no finished mask set masks/other"):
        pilot(folder, PilotSettings(), "masks/other")
    lines = (folder / "records/0.jsonl").read_text().splitlines(keepends=True)
    (folder / "records/0.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="not finished: 9 of 10 images are made"):
        pilot(folder, PilotSettings())
