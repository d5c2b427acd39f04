"""summary.json of the whole study of the embedded benchmark."""

import json

from dd.report.summary import collect, summarise


def probe_file(folder, name, miou, **more):
    (folder / name).write_text(json.dumps({"miou": miou, **more}))


def test_the_study_has_all_its_numbers(tmp_path, builder):
    tests = [builder.test(tmp_path / "data" / name) for name in ("shapes", "shapes_shift")]
    runs = tmp_path / "outputs"
    plain = [builder.run(runs / f"synthetic/seed={seed}", tests, 0.3, seed) for seed in (0, 1)]
    for data in tests:
        builder.result(plain[0] / f"eval/{data.root.name}-raw", data, 0.4, 0)
    builder.run(runs / "ablation/power=1/seed=0", tests, 0.5)
    builder.run(runs / "ablation/append=off/seed=0", tests, 0.5)
    builder.run(runs / "ablation/band=off/seed=0", tests, 0.5)
    builder.run(runs / "ablation/paper/seed=0", tests, 0.5)
    builder.run(runs / "ablation/paper/seed=1", tests, 0.5, 1)
    probe_file(runs / "ablation/paper", "probe_shapes_test.json", 33.0)
    judge = builder.run(runs / "real/shots=all,seed=0", tests, 0.1, 0, "real", "all")
    few = builder.run(runs / "real/shots=16,seed=0", tests, 0.6, 0, "real", 16)
    agreement = builder.result(judge / "audit/set/SegmentationClass", tests[0], 0.2, 0)["miou"]
    builder.result(
        judge / "audit/set_no_append/SegmentationClass", tests[0], 0.8, 1
    )  # of another set, and of another mask set,
    builder.result(judge / "audit/set/power=1", tests[0], 0.8, 2)
    builder.result(few / "audit/set/SegmentationClass", tests[0], 0.8, 3)  # and by a segmenter that is no reference
    for seed in (0, 1):  # masks calibrated on other images for each seed, on the list of a filter
        run = builder.run(runs / f"ablation/calibrated/seed={seed}", tests, 0.5, seed)
        content = json.loads((run / "run.json").read_text())
        content["trained_on"] |= {"root": "set", "masks": f"masks/calibrated_{seed}", "split": "train_filtered"}
        (run / "run.json").write_text(json.dumps(content))
        probe_file(run, "probe_shapes_test.json", 70.0 + 4 * seed)
        builder.result(judge / f"audit/set/calibrated_{seed}-train_filtered", tests[0], 0.3 * (seed + 1), 4 + seed)
    probe_file(runs, "probe_shapes_test.json", 82.0, ablations={"power=1": 80.0, "power=2": 65.0})
    probe_file(runs, "probe_shapes_test_append=off.json", 79.0)

    entries, left_out = collect([f.parent for f in runs.rglob("run.json")])
    summary = summarise(entries, runs, ["shapes", "shapes_shift"], tmp_path / "set")
    assert not left_out
    assert summary["mask_miou"] == 82.0 and summary["mask_agreement"] == agreement
    assert len(summary["synthetic_only"]["shapes"]) == 2 and set(summary["real_only"]) == {"16", "all"}
    ablations = summary["ablations"]
    assert set(ablations) == {"power=1", "append=off", "band=off", "ema=off", "calibrated", "paper"}
    calibrated = ablations.pop("calibrated")
    assert ablations.pop("paper")["mask_miou"] == 33.0
    assert calibrated["mask_miou"] == [70.0, 74.0] and len(calibrated["shapes"]) == 2
    audits = [json.loads(p.read_text())["miou"] for p in judge.glob("audit/set/calibrated_*/metrics.json")]
    assert calibrated["mask_agreement"] == sum(audits) / 2 and audits[0] != audits[1]
    assert {name: row.get("mask_miou") for name, row in ablations.items()} == {
        "power=1": 80.0, "append=off": 79.0, "band=off": None, "ema=off": None
    }  # fmt: skip
