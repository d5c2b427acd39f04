"""Mask settings tried on stored heat, against masks and against a segmenter's predictions."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dd import config
from dd.data.datasets import encode_image, encode_mask, heat_bytes, read_image, read_mask
from dd.evaluation import metrics
from dd.evaluation.boundary import boundary_counts, boundary_iou
from dd.evaluation.supervision import choices
from dd.masks.chain import CHAINS as CHAINS_FILE
from dd.masks.chain import parse
from dd.masks.from_heat import READING, MaskSettings, to_mask
from dd.stages import sweep as stage
from dd.stages.label import label
from dd.stages.predict_set import predict_set
from dd.stages.sweep import print_best
from dd.store.provenance import fingerprint, read_json, read_yaml, sha256, write_json
from dd.store.samples import Sample, append_records, plan_lines
from dd.taxonomy import Taxonomy
from dd.training.segmentation import Views

NAMES, SIZES = ["cat", "dog", "hot dog"], [(12, 9), (16, 16), (7, 15), (12, 9), (10, 11)]
GENERATOR = {"weights_sha256": "0" * 64, "cross_resolution": 16, "self_resolution": 32, "steps": 3}
GRID = {"power": [0, 2], "threshold": [0.3, 0.6], "band": [0.0, 0.1]}


@pytest.fixture
def folder(tmp_path):
    """A synthetic set as generate.py leaves it: images of several sizes, heat of two sources and
    three powers."""
    root, rng, plan = tmp_path / "synthetic", np.random.default_rng(0), []
    for part in ("JPEGImages", "heat"):
        (root / part).mkdir(parents=True)
    for i, size in enumerate(SIZES):
        ids = [(1,), (2, 1), (3,), (1, 3), (2,)][i]
        classes = tuple(NAMES[v - 1] for v in ids)
        sample = Sample(f"{i:06d}", "a photo", " ".join(classes), classes, ids, seed=i, unit=0)
        plan.append(sample)
        image, file = (
            encode_image(rng.integers(0, 256, (*size, 3), np.uint8), ".png"),
            root / f"heat/{sample.id}.safetensors",
        )
        (root / f"JPEGImages/{sample.id}.png").write_bytes(image)
        sources = ("class_prompt", "full_prompt_caption")
        save_file({s: rng.random((len(ids), 3, 4, 4)).astype(np.float32) for s in sources}, file)
        append_records(
            root,
            "0",
            [{"id": sample.id, "image_sha256": sha256(image), "heat_sha256": sha256(file)}],
        )
    (root / "plan.jsonl").write_text("".join(plan_lines(plan)))
    write_json(
        root / "run.json",
        {"identity": {"taxonomy": {"name": "pets", "names": NAMES}, "generator": GENERATOR}},
    )
    return root


@pytest.fixture
def exact(tmp_path):
    """Masks drawn by hand, as it were: some pixels are 255."""
    root, rng = tmp_path / "exact", np.random.default_rng(1)
    root.mkdir()
    for i, size in enumerate(SIZES):
        (root / f"{i:06d}.png").write_bytes(
            encode_mask(rng.choice([0, 1, 2, 3, 255], size).astype(np.uint8))
        )
    return root


def sweep(folder, reference, name, **settings):
    others = dict.fromkeys(("source", "limit", "workers"))
    return stage.sweep(folder, reference, stage.SweepSettings(name=name, **others | settings))


def heat_of(folder, number):
    return stage.stored_heat(folder, f"{number:06d}")


def slow_row(folder, reference, settings, ids=((1,), (2, 1), (3,), (1, 3), (2,))):
    """Scores of one setting from whole masks, through torchmetrics."""
    hidden, shown, uncertain, total = metrics.confusion_matrix(4), metrics.confusion_matrix(4), 0, 0
    for i, size in enumerate(SIZES):
        truth = read_mask(reference / f"{i:06d}.png").astype(np.int64)
        mask = to_mask(heat_of(folder, i)[settings.source], ids[i], size, settings).astype(np.int64)
        shown.update(torch.from_numpy(np.where(mask == 255, 0, mask)), torch.from_numpy(truth))
        left = np.where(mask == 255, 255, truth)
        hidden.update(torch.from_numpy(np.where(mask == 255, 0, mask)), torch.from_numpy(left))
        uncertain, total = (
            uncertain + ((mask == 255) & (truth != 255)).sum(),
            total + (truth != 255).sum(),
        )
    return metrics.miou(shown.compute()), metrics.miou(hidden.compute()), 100 * uncertain / total


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


# The table


def test_the_table_is_that_of_whole_masks(folder, exact):
    result = sweep(folder, exact, "exact", **GRID)
    rows = result["sweep"]["table"]
    assert len(rows) == 2 * 2 * 2 * 2 and result["sweep"]["left_out"] == 0
    for row in rows:
        settings = MaskSettings(
            power=row["power"], threshold=row["threshold"], band=row["band"], source=row["source"]
        )
        assert [row[k] for k in ("miou", "miou_certain", "uncertain")] == pytest.approx(
            slow_row(folder, exact, settings)
        )
    assert any(row["uncertain"] for row in rows)
    assert rows == sorted(rows, key=lambda r: (-r["miou"], r["uncertain"]))
    assert result["masks"] == {k: rows[0][k] for k in ("power", "threshold", "band", "source")}


def test_uncertain_pixels_win_nothing(folder, exact):
    """Of two settings that differ in the band alone, the one without a band comes first: their
    mIoU is the same."""
    rows = sweep(
        folder,
        exact,
        "exact",
        power=[1],
        threshold=[0.6],
        band=[0.3, 0.0],
        source=["class_prompt"],
    )
    first, second = rows["sweep"]["table"]
    assert first["miou"] == second["miou"] and (first["band"], second["band"]) == (0.0, 0.3)
    assert first["miou"] == first["miou_certain"] != second["miou_certain"]


def test_masks_that_are_uncertain_everywhere():
    found = metrics.with_uncertain(torch.tensor([[0, 0, 3], [0, 0, 1]]))
    assert found == {
        "miou": 37.5,
        "miou_certain": None,
        "uncertain": 100.0,
    }  # background 3 of 4, class 1 none
    assert metrics.with_uncertain(torch.tensor([[2, 0, 1], [0, 1, 0]])) == {
        "miou": 100.0,
        "miou_certain": 100.0,
        "uncertain": 25.0,
    }


def test_a_set_of_masks_agrees_with_itself(folder):
    settings = MaskSettings(power=2, threshold=0.6, band=0.1)
    masks = label(folder, settings, "other")
    rows = sweep(folder, masks, "itself", **GRID)["sweep"]["table"]
    same = next(
        r
        for r in rows
        if (r["power"], r["threshold"], r["band"], r["source"]) == (2, 0.6, 0.1, "class_prompt")
    )
    assert (
        same["miou_certain"] == same["miou"] == 100.0 and same["uncertain"] == 0.0
    )  # 255 of the reference is left out
    assert sum(r["miou"] == 100.0 for r in rows) == 2  # the same without the band


def test_a_sweep_touches_nothing_else(folder, exact):
    label(folder, MaskSettings(power=1, threshold=0.5), "other")
    before = contents(folder)
    sweep(folder, exact, "exact", **GRID)
    after = contents(folder)
    assert (
        set(after) - set(before) == {"sweeps/exact.json"}
        and {k: after[k] for k in before} == before
    )


def test_what_is_written_says_what_was_compared(folder, exact):
    result = sweep(folder, exact, "exact", **GRID, limit=3)
    assert read_json(folder / "sweeps/exact.json") == result
    records = [json.loads(line) for line in (folder / "records/0.jsonl").read_text().splitlines()]
    identity = result["sweep"]["identity"]
    assert (
        identity["heat"] == fingerprint([r["heat_sha256"] for r in records[:3]])
        and identity["samples"] == 3
    )
    assert identity["reference"] == fingerprint([sha256(exact / f"{i:06d}.png") for i in range(3)])
    calibration = result["calibration"]
    assert calibration["by"] == "sweep"
    assert result["chosen_on"] == [{"data": folder.name, "split": exact.name, "labels": 3}]
    reading = {**READING, "cross_resolution": 16, "self_resolution": 32}
    assert result["diffusion"] == reading and calibration["generator"] == {
        "weights_sha256": "0" * 64,
        **reading,
    }


def test_the_best_rows_are_printed(folder, exact, capsys):
    result = sweep(folder, exact, "exact", **GRID)
    print_best(result, 3)
    lines = capsys.readouterr().out
    assert (
        "16 mask settings against" in lines
        and f"{result['sweep']['table'][0]['miou']:.2f}" in lines
    )
    assert lines.count("_prompt") == 3


# Processes, interruptions


def table(result):
    return result["sweep"]["table"]


def test_the_number_of_processes_changes_nothing(folder, exact, monkeypatch):
    monkeypatch.setattr(stage, "PART", 2)
    one, two = (sweep(folder, exact, f"with_{n}", **GRID, workers=n) for n in (1, 2))
    assert table(one) == table(two)
    monkeypatch.undo()
    assert table(sweep(folder, exact, "in_one_part", **GRID)) == table(one)


def test_an_error_in_a_process_arrives(folder, exact, monkeypatch):
    monkeypatch.setattr(stage, "PART", 2)
    (folder / "heat/000003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no heat .*000003"):
        sweep(folder, exact, "exact", **GRID, workers=2)


def test_an_interrupted_sweep_goes_on(folder, exact, monkeypatch):
    whole = sweep(folder, exact, "whole", **GRID)
    monkeypatch.setattr(stage, "PART", 2)
    count, seen = stage.count_grid, []

    def crash(heat, class_ids, *rest):
        seen.append(class_ids)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return count(heat, class_ids, *rest)

    monkeypatch.setattr(stage, "count_grid", crash)
    with pytest.raises(KeyboardInterrupt):
        sweep(folder, exact, "exact", **GRID, workers=1)
    assert not (folder / "sweeps/exact.json").exists() and torch.get_num_threads() >= 1
    assert table(sweep(folder, exact, "exact", **GRID, workers=1)) == table(whole)
    assert len(seen) == 4 + 3  # the first part of two was kept
    assert not (folder / "sweeps/exact.parts").exists()


def test_parts_of_another_sweep_are_not_mixed_in(folder, exact, monkeypatch):
    expected = sweep(folder, exact, "expected", **{**GRID, "power": [1, 2]})
    monkeypatch.setattr(stage, "_results", lambda count, todo, workers: iter([(0, np.ones(3))]))
    with pytest.raises(FileNotFoundError), monkeypatch.context() as patch:
        patch.setattr(stage, "PART", 2)
        sweep(folder, exact, "exact", **GRID)
    monkeypatch.undo()
    assert table(sweep(folder, exact, "exact", **{**GRID, "power": [1, 2]})) == table(expected)


def test_a_finished_sweep_is_left_alone_and_another_one_replaces_it(folder, exact, monkeypatch):
    first = sweep(folder, exact, "exact", **GRID)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "count_grid", None)
        assert sweep(folder, exact, "exact", **GRID) == first
    (exact / "000000.png").write_bytes(encode_mask(np.full(SIZES[0], 3, np.uint8)))
    second = sweep(folder, exact, "exact", **GRID)
    assert table(second) != table(first) and read_json(folder / "sweeps/exact.json") == second


# A segmenter's predictions as the reference


RUN = {
    "taxonomy": {"name": "pets", "names": NAMES},
    "weights_sha256": "ab" * 32,
    "supervision": "A",
    "trained_on": {"source": "synthetic", "shots": None, "after": None},
}


class Colours(torch.nn.Module):
    """The brightest channel is the class; counts the batches it was shown."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return torch.cat([images.float(), torch.zeros_like(images[:, :1])], 1)


def test_predictions_are_the_segmenters_and_made_once(folder):
    segmenter, views = Colours(), Views(16)
    target = predict_set(folder, RUN, segmenter, views, batch_size=2)
    for i, size in enumerate(SIZES):
        image = read_image(folder / f"JPEGImages/{i:06d}.png")
        (expected,) = views.predict(Colours(), [views(image)], [size])
        assert np.array_equal(read_mask(target / f"{i:06d}.png"), expected.numpy())
    before, calls = contents(folder), segmenter.calls
    assert predict_set(folder, RUN, segmenter, views, batch_size=2) == target
    assert segmenter.calls == calls and contents(folder) == before
    (target / "000004.png").write_bytes(b"damaged")
    predict_set(folder, RUN, segmenter, views, batch_size=2)
    assert contents(folder) | {f"{target.relative_to(folder)}/records/0.jsonl": b""} == before | {
        f"{target.relative_to(folder)}/records/0.jsonl": b""
    }


def test_a_limit_makes_a_part_of_the_same_predictions(folder):
    part = predict_set(folder, RUN, Colours(), Views(16), limit=2, batch_size=2)
    assert sorted(p.name for p in part.glob("*.png")) == ["000000.png", "000001.png"]
    first = {p.name: p.read_bytes() for p in part.glob("*.png")}
    assert predict_set(folder, RUN, Colours(), Views(16), batch_size=2) == part
    assert (
        len(list(part.glob("*.png"))) == 5 and {n: (part / n).read_bytes() for n in first} == first
    )


def test_another_checkpoint_has_its_own_predictions(folder):
    one, other = (
        predict_set(folder, {**RUN, "weights_sha256": c * 64}, Colours(), Views(16), limit=1)
        for c in "12"
    )
    assert one != other and one.name.startswith("1" * 12)


def test_a_sweep_against_predictions_says_whose(folder):
    target = predict_set(folder, RUN, Colours(), Views(16))
    result = sweep(folder, target, "agreement", **GRID)
    teacher = result["calibration"]["reference"]["teacher"]
    assert (
        teacher["weights_sha256"] == RUN["weights_sha256"] and "shots" not in result["calibration"]
    )
    row = table(result)[0]
    settings = MaskSettings(**result["masks"])
    assert row["miou"] == pytest.approx(slow_row(folder, target, settings)[0])


BY_IMAGES = {"what": "masks", "data": "here/tune", "labels": 16}


@pytest.mark.parametrize(
    ("trained_on", "chosen", "expected"),
    [
        (RUN["trained_on"], [], []),
        (RUN["trained_on"], [BY_IMAGES], [{"data": "here/tune", "labels": 16}]),
        (
            {"source": "real", "data": "here", "split": "train", "images": 9, "shots": "all"},
            [BY_IMAGES],
            [{"data": "here/train", "labels": 9}, {"data": "here/tune", "labels": 16}],
        ),
    ],
)
def test_a_choice_by_a_run_owes_what_the_run_owes(folder, trained_on, chosen, expected):
    run = {**RUN, "trained_on": trained_on, "chosen_on": chosen}
    result = sweep(folder, predict_set(folder, run, Colours(), Views(16)), "agreement", **GRID)
    found = choices("masks", result["chosen_on"])
    assert found == [{"what": "masks", **one} for one in expected]


def test_a_run_of_other_classes_is_refused(folder):
    with pytest.raises(
        ValueError,
        match="trained for the classes .'cow'.*compared with the predictions of a run with",
    ):
        predict_set(
            folder, {**RUN, "taxonomy": {"name": "farm", "names": ["cow"]}}, Colours(), Views(16)
        )
    assert not (folder / "sweeps").exists()


# What can go wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"power": [0, 3]}, r"masks\.power=3 is not stored .*powers 0 to 2"),
        ({"threshold": [0.5, 1.5]}, r"sweep\.threshold=\[0.5, 1.5\]"),
        ({"limit": 0}, "sweep.limit=0: expected a whole number of 1 or more, or null"),
        ({"workers": 0}, "sweep.workers=0"),
        ({"name": "../up"}, "sweep.name='../up'"),
    ],
)
def test_impossible_sweeps_are_refused_before_any_work(folder, exact, change, message):
    with pytest.raises(ValueError, match=message):
        sweep(folder, exact, **{"name": "a", **GRID, **change})
    assert not (folder / "sweeps").exists()


def test_a_source_that_is_not_stored(folder, exact):
    for i in range(5):
        path = folder / f"heat/{i:06d}.safetensors"
        maps = heat_of(folder, i)["class_prompt"].copy()
        path.unlink()
        path.write_bytes(heat_bytes({"class_prompt": maps}, {}))
        image = sha256(folder / f"JPEGImages/{i:06d}.png")
        append_records(
            folder, "0", [{"id": f"{i:06d}", "image_sha256": image, "heat_sha256": sha256(path)}]
        )
    with pytest.raises(ValueError, match="masks.source=full_prompt_appended is not stored"):
        sweep(folder, exact, "a", **GRID, source=["full_prompt_appended"])
    assert len(table(sweep(folder, exact, "a", **GRID))) == 8  # by default all that are stored


def test_references_that_do_not_fit(folder, exact, tmp_path):
    with pytest.raises(FileNotFoundError, match="sweep.masks: no folder"):
        sweep(folder, tmp_path / "nowhere", "a", **GRID)
    mask = read_mask(exact / "000001.png")
    (exact / "000001.png").write_bytes(encode_mask(mask[:-1]))
    with pytest.raises(ValueError, match="000001.png is 16x15, its image 16x16"):
        sweep(folder, exact, "a", **GRID)
    (exact / "000001.png").write_bytes(encode_mask(np.full_like(mask, 9)))
    with pytest.raises(ValueError, match=r"000001.png holds values \[9\] outside the 4 classes"):
        sweep(folder, exact, "a", **GRID)
    (exact / "000001.png").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 5 masks, such as 000001.png"):
        sweep(folder, exact, "a", **GRID)
    assert not (folder / "sweeps/a.json").exists()
    assert table(sweep(folder, exact, "a", **GRID, limit=1))


def test_a_set_that_is_not_generated_yet(folder, exact, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a synthetic data set"):
        sweep(tmp_path, exact, "a", **GRID)
    lines = (folder / "records/0.jsonl").read_text().splitlines(keepends=True)
    (folder / "records/0.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(ValueError, match="2 of 5 samples are not generated yet"):
        sweep(folder, exact, "a", **GRID)
    assert table(sweep(folder, exact, "a", **GRID, limit=3))


# Chains

CHAINS = {
    "paper": [{"propagate": "power"}, {"normalise": "min_max"}, {"threshold": "fixed"}],
    "refined": [
        {"propagate": "walk"},
        {"normalise": "min_max"},
        {"refine": "pamr", "dilations": [1, 2]},
        {"threshold": "otsu"},
        {"uncertain": "band"},
    ],
}


def test_chains_are_compared_image_by_image(folder, exact):
    result = sweep(folder, exact, "chains", **GRID, chains=CHAINS)
    table, chains = result["sweep"]["table"], result["sweep"]["chains"]
    by_chain = {name: [row for row in table if row["chain"] == name] for name in CHAINS}
    # the paper's reads power and threshold and no band, the other one the band alone; two sources
    assert [len(rows) for rows in by_chain.values()] == [2 * 2 * 2, 2 * 2]
    assert list(chains) == ["paper", "refined"]
    for name, row in chains.items():
        best = by_chain[name][0]
        assert row["settings"] == {k: best[k] for k in row["settings"]}
        assert row["miou"] == pytest.approx(best["miou"]) and row["milliseconds"] > 0
        settings = MaskSettings(**row["settings"])
        confusion, outlines = metrics.confusion_matrix(4), np.zeros((4, 2), np.int64)
        for i, size in enumerate(SIZES):
            truth = read_mask(exact / f"{i:06d}.png")
            image = read_image(folder / f"JPEGImages/{i:06d}.png")
            ids = ((1,), (2, 1), (3,), (1, 3), (2,))[i]
            mask = to_mask(heat_of(folder, i)[settings.source], ids, size, settings, image)
            outlines += boundary_counts(mask, truth, 4)
            pair = (np.where(mask == 255, 0, mask), truth)
            confusion.update(*(torch.from_numpy(m.astype(np.int64)) for m in pair))
        assert row["miou"] == pytest.approx(metrics.miou(confusion.compute()))
        assert row["boundary_iou"] == pytest.approx(boundary_iou(outlines))
    refined = chains["refined"]
    assert refined["less_first"][0] == pytest.approx(refined["miou"] - chains["paper"]["miou"])
    assert refined["less_first"][1] < refined["less_first"][0] < refined["less_first"][2]
    assert 0 <= refined["p"] <= 1 and sorted(refined["gained"]) == sorted(refined["lost"])
    assert "less_first" not in chains["paper"]
    assert MaskSettings(**result["masks"]).identity() == result["masks"]


def test_a_sweep_of_chains_has_a_page(folder, exact, tmp_path):
    result = sweep(folder, exact, "chains", **GRID, chains=CHAINS)
    seen = stage.Seen(folder, exact, Taxonomy("pets", NAMES))
    page = stage.write_page(tmp_path / "page.html", seen, result).read_text()
    best = max(result["sweep"]["chains"], key=lambda n: result["sweep"]["chains"][n]["miou"])
    assert "Chains of mask steps" in page and "boundary IoU" in page
    for name, row in result["sweep"]["chains"].items():
        assert name in page and f"{row['miou']:.1f}" in page
    pictures = 0 if best == "paper" else 2 * 5 * 4  # five samples, gained and lost
    assert page.count("<img") == pictures


def test_a_chain_that_is_none_is_refused_before_any_work(folder, exact):
    broken = {"broken": [{"refine": "crf"}]}
    with pytest.raises(ValueError, match=r"sweep.chains: broken: steps: refine: 'crf': no such"):
        sweep(folder, exact, "chains", **GRID, chains=broken)
    assert not (folder / "sweeps").exists()


def test_the_chains_that_ship_are_chains():
    """Thirty and more, the first of them the paper's."""
    chains = read_yaml(CHAINS_FILE)
    parsed = {name: parse(steps) for name, steps in chains.items()}
    assert len(set(parsed.values())) == len(parsed) >= 30
    assert parsed["paper"] == parse(CHAINS["paper"])
    own = config.compose("generate", ["masks=refined"]).masks
    assert config.instantiate(own).steps == parsed["refined, band"]
