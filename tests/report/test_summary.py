"""summary.json of the whole study of the embedded benchmark."""

import json

import pytest

from dd.report.rows import arrange
from dd.report.summary import collect, summarise


def probe_file(folder, name, miou, **more):
    (folder / name).write_text(json.dumps({"miou": miou, **more}))


def test_the_study_has_all_its_numbers(tmp_path, builder):
    tests = [builder.test(tmp_path / "data" / name) for name in ("shapes", "shapes_shift")]
    runs = tmp_path / "outputs"

    def masked(name, power=0, seed=0, **more):
        settings = {"settings": {"power": power}, "heat": "h"}
        data = {"root": "set", "masks": f"masks/{name}", "mask_settings": settings, **more}
        return builder.run(runs / f"ablation/{name}/seed={seed}", tests, 0.5, seed, data=data)

    own = {"root": "set", "mask_settings": {"settings": {"power": 0}, "heat": "h"}}
    plain = [
        builder.run(runs / f"synthetic/seed={seed}", tests, 0.3, seed, data=own) for seed in (0, 1)
    ]
    for data in tests:
        builder.result(plain[0] / f"eval/{data.root.name}-raw", data, 0.4, 0)
    masked("power=1", 1)
    masked("append=off", root="set_no_append")
    masked("band=off", 9)
    masked("paper", 4)
    masked("paper", 4, seed=1)
    probe_file(runs / "ablation/paper", "probe_shapes_test.json", 33.0)
    judge = builder.run(runs / "real/shots=all,seed=0", tests, 0.1, 0, "real", "all")
    few = builder.run(runs / "real/shots=16,seed=0", tests, 0.6, 0, "real", 16)
    agreement = builder.result(judge / "audit/set/SegmentationClass", tests[0], 0.2, 0)["miou"]
    builder.result(
        judge / "audit/set_no_append/SegmentationClass", tests[0], 0.8, 1
    )  # of another set, and of another mask set,
    builder.result(judge / "audit/set/power=1", tests[0], 0.8, 2)
    builder.result(
        few / "audit/set/SegmentationClass", tests[0], 0.8, 3
    )  # and by a segmenter that is no reference
    for seed in (0, 1):  # masks calibrated on other images for each seed, on the list of a filter
        choice = {
            "settings": {"power": seed},
            "heat": "h",
            "calibration": {"shots": 16, "seed": seed},
        }
        filtered = {
            "masks": f"masks/calibrated_{seed}",
            "split": "train_filtered",
            "mask_settings": choice,
        }
        run = masked("calibrated", seed=seed, **filtered)
        probe_file(run, "probe_shapes_test.json", 70.0 + 4 * seed)
        builder.result(
            judge / f"audit/set/calibrated_{seed}-train_filtered",
            tests[0],
            0.3 * (seed + 1),
            4 + seed,
        )
    probe_file(runs, "probe_shapes_test.json", 82.0, ablations={"power=1": 80.0, "power=2": 65.0})
    probe_file(runs, "probe_shapes_test_append=off.json", 79.0)

    entries, left_out = collect([f.parent for f in runs.rglob("run.json")])
    rows, twice = arrange(entries, "set")
    summary = summarise(rows, runs, ["shapes", "shapes_shift"], tmp_path / "set")
    assert not left_out and not twice
    assert summary["mask_miou"] == 82.0 and summary["mask_agreement"] == agreement
    assert len(summary["synthetic_only"]["shapes"]) == 2 and set(summary["real_only"]) == {
        "16",
        "all",
    }
    ablations = summary["ablations"]
    assert set(ablations) == {"power=1", "append=off", "band=off", "ema=off", "calibrated", "paper"}
    calibrated = ablations.pop("calibrated")
    assert ablations.pop("paper")["mask_miou"] == 33.0
    assert calibrated["mask_miou"] == [70.0, 74.0] and len(calibrated["shapes"]) == 2
    assert calibrated["seeds"] == [0, 1] and ablations["power=1"]["seeds"] == [0]
    raw = ablations["ema=off"]  # of seed 0 alone, and compared with seed 0 alone
    assert raw["seeds"] == [0] and raw["less"]["shapes"]["seeds"] == 1
    assert raw["less"]["shapes"]["value"] == pytest.approx(
        raw["shapes"] - summary["synthetic_only"]["shapes"][0]
    )
    paired = calibrated["less"]["shapes"]
    each = [
        a - b
        for a, b in zip(calibrated["shapes"], summary["synthetic_only"]["shapes"], strict=True)
    ]
    assert paired["seeds"] == 2 and paired["value"] == pytest.approx(sum(each) / 2)
    assert summary["test_images"] == {"shapes": 12, "shapes_shift": 12}
    (described,) = [r for r in summary["recipes"] if r["name"] == "synthetic only"]
    assert (
        described["main"]
        and described["steps"] == 300
        and described["trained_on"] == "512 synthetic"
    )
    assert [(r["seed"], r["miou"]["shapes"]) for r in described["runs"]] == list(
        enumerate(summary["synthetic_only"]["shapes"])
    )
    audits = [
        json.loads(p.read_text())["miou"] for p in judge.glob("audit/set/calibrated_*/metrics.json")
    ]
    assert calibrated["mask_agreement"] == sum(audits) / 2 and audits[0] != audits[1]
    assert {name: row.get("mask_miou") for name, row in ablations.items()} == {
        "power=1": 80.0,
        "append=off": 79.0,
        "band=off": None,
        "ema=off": None,
    }
