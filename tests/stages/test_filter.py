"""Signals in records and made afterwards, classes called absent, filtered lists, and what a
training run says of them."""

import hashlib
import json
from pathlib import Path

import hydra
import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from benchmarks.synthesis import synthesize
from dd import config
from dd.data.datasets import (
    encode_mask,
    read_image,
    read_mask,
    read_split,
    stored_heat,
    synthetic_image,
    write_split,
)
from dd.data.quality import clip_signals, heat_signals, read_rules
from dd.masks.from_heat import MaskSettings, to_mask
from dd.prompts.prompt import Prompts, make_prompt
from dd.stages import filter as filter_stage
from dd.stages.filter import filter_samples, find_absent, print_counts
from dd.stages.label import label
from dd.store.provenance import read_json, sha256, write_json
from dd.store.samples import each_record, read_plan, read_records
from dd.taxonomy import taxonomy
from tests.fakes import RandomGenerator

ROOT = Path(__file__).parents[2]
SHAPES = taxonomy("shapes")
SETTINGS = MaskSettings(power=1, threshold=0.6, band=0.2)
CLASSES = [
    ["apple"],
    ["apple"],
    ["apple", "tire"],
    ["tire"],
    ["tire", "apple"],
    ["apple"],
    ["tire"],
    ["tire"],
]
PEAKS = [
    [0.5],
    [0.4],
    [0.3, 0.02],
    [0.03],
    [0.04, 0.01],
    [0.2],
    [0.05],
    [0.06],
]  # of power 1; power 0 has 0.9 everywhere


class Eight:
    append = True

    def __call__(self, taxonomy, number, seed):
        return Prompts([make_prompt(f"picture {i}", names) for i, names in enumerate(CLASSES)], [])


class Peaks(RandomGenerator):
    """Classes lie side by side, as wide as there is room; the strength of their heat is that of
    ``PEAKS``."""

    terms = {}

    def generate(self, samples, capture=True):
        images, heat, bad = super().generate(samples, capture)
        exact = [{"class_prompt": self.heat(s)} for s in samples]
        return images, exact if capture else heat, bad

    def heat(self, sample):
        maps = np.zeros((len(sample.classes), 2, 4, 4))
        for k, peak in enumerate(PEAKS[int(sample.id)]):
            maps[k, 0, 2 * k : 2 * k + 2], maps[k, 1, 2 * k : 2 * k + 2] = 0.9, peak
        return maps


def make(folder, clip=None, image_format="png"):
    synthesize(folder, Peaks(), Eight(), SHAPES, None, 0, 4, image_format, clip=clip)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "synthetic/eight")


@pytest.fixture(scope="module")
def clip(tiny_clip, tmp_path_factory):
    from dd.data.quality import ClipScore

    return ClipScore(str(tiny_clip(tmp_path_factory.mktemp("clip"))))


def rules(**given):
    return read_rules(given)


FAINT = {"action": "absent", "signal": "peak", "below": 0.035}  # tire in 2 and 3, apple in 4
MISSING = {"action": "drop", "signal": "missing", "above": 0}
FOREGROUND = {"action": "drop", "signal": "foreground", "below": 0.01}


def forget_signals(folder):
    """The records of a set that was made before there were signals."""
    path = folder / "records/0.jsonl"
    rows = [{k: v for k, v in row.items() if k != "signals"} for row in each_record(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


# Signals


def test_a_class_that_vanishes_at_the_power_in_use_is_missing(tmp_path, monkeypatch):
    faded = Peaks()

    def heat(sample):
        maps = Peaks.heat(faded, sample)
        if sample.id == "000004":
            maps[0, 1] = 0.3  # flat at power 1 alone
        return maps

    monkeypatch.setattr(faded, "heat", heat)
    folder = tmp_path / "faded"
    synthesize(folder, faded, Eight(), SHAPES, None, 0, 4, "png")
    for power, dropped in ((0, set()), (1, {"000004"})):
        label(folder, MaskSettings(power=power, threshold=0.6, band=0.2), f"power={power}")
        found = filter_samples(folder, rules(missing=MISSING), f"power={power}", f"power_{power}")
        assert found["dropped"].keys() == dropped


def test_records_hold_the_signals_of_the_stored_heat(folder):
    records = read_records(folder)
    for sample in read_plan(folder):
        assert records[sample.id]["signals"] == {
            "heat": {"class_prompt": heat_signals(stored_heat(folder, sample.id)["class_prompt"])}
        }
    assert [r["signals"]["heat"]["class_prompt"]["peak"][0][0] for r in records.values()] == [
        pytest.approx(0.9, abs=1e-3)
    ] * 8


def test_scores_are_those_of_the_stored_image(tmp_path, clip):
    folder = make(tmp_path / "jpg", clip, "jpg")
    for sample in read_plan(folder):
        image = read_image(synthetic_image(folder, sample.id))
        assert read_records(folder)[sample.id]["signals"]["clip"] == clip_signals(
            clip, image, sample.prompt, sample.classes
        )


def test_signals_made_afterwards_are_those_of_generation(tmp_path, folder, clip, monkeypatch):
    with_scores, recorded = make(tmp_path / "scores", clip), files(folder)["records/0.jsonl"]
    expected = {i: r["signals"] for i, r in read_records(with_scores).items()}
    label(folder, SETTINGS)
    filter_samples(folder, rules(missing=MISSING), clip=clip)
    assert {i: r["signals"] for i, r in read_records(folder / "quality").items()} == expected
    assert files(folder)["records/0.jsonl"] == recorded
    monkeypatch.setattr(filter_stage, "clip_signals", None)  # what is there is not made again
    filter_samples(folder, rules(missing=MISSING), clip=clip)
    rule = rules(score={"action": "drop", "signal": "clip", "below_percentile": 30})
    again = filter_samples(folder, rule)  # and is read without the model
    assert (
        again["identity"]["clip"] == clip.weights_sha256[:16]
        and again["rules"]["score"]["samples"] == 3
    )


def test_a_set_without_signals_works_and_an_interruption_goes_on(folder, monkeypatch):
    label(folder, SETTINGS)
    drop = rules(faint=FAINT | {"action": "drop"})
    wanted, before = filter_samples(folder, drop), read_records(folder)
    forget_signals(folder)
    assert read_records(folder)["000000"].keys() == before["000000"].keys() - {"signals"}
    monkeypatch.setattr(filter_stage, "PART", 2)
    heat_of, asked = filter_stage.stored_heat, []

    def crash(where, name):
        asked.append(name)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return heat_of(where, name)

    monkeypatch.setattr(filter_stage, "stored_heat", crash)
    with pytest.raises(KeyboardInterrupt):
        filter_samples(folder, drop)
    assert len(read_records(folder / "quality")) == 4
    assert filter_samples(folder, drop)["identity"] == wanted["identity"]
    assert asked[6:] == ["000004", "000005", "000006", "000007"]


def test_signals_of_other_heat_do_not_count(folder):
    label(folder, SETTINGS)
    forget_signals(folder)
    filter_samples(folder, rules(missing=MISSING))
    path = folder / "quality/records/0.jsonl"
    rows = list(each_record(path))
    path.write_text(
        "".join(
            json.dumps(row | {"heat_sha256": "other", "signals": {"heat": {}}}) + "\n"
            for row in rows
        )
    )
    assert filter_samples(folder, rules(faint={"action": "drop", "signal": "peak", "above": 0.45}))[
        "dropped"
    ].keys() == {"000000"}


def test_rules_on_scores_need_the_scores_of_one_model(tmp_path, folder, clip):
    label(folder, SETTINGS)
    rule = rules(score={"action": "drop", "signal": "clip", "below": 1})
    with pytest.raises(
        ValueError, match="for all 8 samples; 0 have scores, by 0 models. Give quality.clip.model"
    ):
        filter_samples(folder, rule)
    append = [
        {**r, "signals": {**r["signals"], "clip": {"by": i, "prompt": 9, "classes": [9, 9]}}}
        for i, r in read_records(folder).items()
    ]
    (folder / "records/1.jsonl").write_text("".join(json.dumps(r) + "\n" for r in append))
    with pytest.raises(ValueError, match="8 have scores, by 8 models"):
        filter_samples(folder, rule)
    assert (
        filter_samples(folder, rule, clip=clip, max_share=1)["identity"]["clip"]
        == clip.weights_sha256[:16]
    )


# Classes called absent


def test_absent_classes_are_not_drawn_and_the_mask_set_says_so(folder, capsys):
    before = read_json(label(folder, SETTINGS) / "masks.json")
    absent = find_absent(folder, rules(faint=FAINT), SETTINGS)
    assert absent == {
        "rules": {"faint": FAINT},
        "classes": {"000002": ["tire"], "000003": ["tire"], "000004": ["apple"]},
    }
    assert "quality.rules.faint: 3 classes of 3 samples called absent" in capsys.readouterr().out
    target = label(folder, SETTINGS, absent=absent)
    done = read_json(target / "masks.json")
    assert (
        done["identity"]["absent"]["rules"] == {"faint": FAINT}
        and done["absent"] == absent["classes"]
    )
    assert {k: v for k, v in done["identity"].items() if k != "absent"} == before["identity"]
    apple, tire = SHAPES.ids(["apple", "tire"])
    for sample in read_plan(folder):
        mask = read_mask(target / f"{sample.id}.png")
        heat = stored_heat(folder, sample.id)["class_prompt"]
        drawn = [
            k
            for k, name in enumerate(sample.classes)
            if name not in absent["classes"].get(sample.id, ())
        ]
        expected = (
            to_mask(heat[drawn], [sample.class_ids[k] for k in drawn], (16, 16), SETTINGS)
            if drawn
            else np.zeros((16, 16))
        )
        assert np.array_equal(mask, expected)
        assert (
            hashlib.sha256((target / f"{sample.id}.png").read_bytes()).hexdigest()
            == done["sha256"][sample.id]
        )
    assert apple in read_mask(target / "000002.png") and tire not in read_mask(
        target / "000002.png"
    )
    assert not read_mask(target / "000003.png").any()
    assert "not drawn: 3 (" in (folder / "README.md").read_text()


def test_labelling_with_the_same_rules_does_nothing_and_without_them_draws_again(folder):
    absent = find_absent(folder, rules(faint=FAINT), SETTINGS)
    label(folder, SETTINGS, absent=absent)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    label(folder, SETTINGS, absent=find_absent(folder, rules(faint=FAINT), SETTINGS))
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before
    assert find_absent(folder, rules(missing=MISSING), SETTINGS) is None
    assert "absent" not in read_json(label(folder, SETTINGS) / "masks.json")
    assert read_mask(folder / "SegmentationClass/000003.png").any()


def test_rules_for_absent_classes_read_the_power_of_the_masks(folder):
    weak = rules(weak={"action": "absent", "signal": "peak", "below": 0.8})
    assert find_absent(folder, weak, MaskSettings(power=0))["classes"] == {}
    with pytest.raises(
        ValueError, match=r"rules.weak would take out 10 of 10 classes .*every image of apple, tire"
    ):
        find_absent(folder, weak, SETTINGS)
    with pytest.raises(ValueError, match="every image of tire"):
        find_absent(folder, rules(weak=weak[0].settings() | {"below": 0.1}), SETTINGS, max_share=1)
    strong = {"action": "absent", "signal": "peak", "above_percentile": 40}
    with pytest.raises(
        ValueError, match="together, would take out 9 of 10 classes .*every image of tire"
    ):
        find_absent(folder, rules(faint=FAINT, strong=strong), SETTINGS, max_share=1)


# Filtered lists


def test_a_filter_writes_a_list_and_its_reasons_and_nothing_else(folder, capsys):
    label(folder, SETTINGS, absent=find_absent(folder, rules(faint=FAINT), SETTINGS))
    before = files(folder)
    given = rules(
        faint=FAINT,
        empty=FOREGROUND,
        strong={"action": "drop", "signal": "peak", "above_percentile": 75},
    )
    result = filter_samples(folder, given)
    # apple: 0.5 0.4 0.3 0.01 0.2, 75th percentile 0.4; tire: 0.02 0.03 0.04 0.05 0.06, 0.05
    assert result["dropped"].keys() == {"000000", "000003", "000007"}
    assert result["dropped"]["000003"] == [
        {"rule": "empty", "class": "all", "value": 0.0, "threshold": 0.01}
    ]
    (reason,) = result["dropped"]["000000"]
    assert (reason["rule"], reason["class"]) == ("strong", "apple")
    assert (reason["value"], reason["threshold"]) == (0.5, pytest.approx(0.4, abs=1e-3))
    assert read_split(folder, "train_filtered") == [
        "000001",
        "000002",
        "000004",
        "000005",
        "000006",
    ]
    assert {name: rule["samples"] for name, rule in result["rules"].items()} == {
        "empty": 1,
        "strong": 2,
    }
    assert (result["samples"], result["kept"]) == (8, 5)
    assert result["classes"] == {
        "apple": {"samples": 5, "kept": 4},
        "tire": {"samples": 5, "kept": 3},
    }
    assert read_json(folder / "quality/train_filtered/filter.json") == result
    after = files(folder)
    assert after.keys() - before.keys() == {
        "ImageSets/Segmentation/train_filtered.txt",
        "quality/train_filtered/filter.json",
    }
    assert {name: after[name] for name in before} == before
    filter_samples(folder, given)
    assert files(folder) == after
    print_counts(result)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "5 of 8 samples kept" in printed
        and "apple 4 of 5, tire 3 of 5" in printed
        and "25.0 %" in printed
    )


def test_missing_classes_and_uncertain_pixels_are_those_of_the_mask_set(folder):
    wide = label(folder, MaskSettings(power=1, threshold=0.9, band=0.5), "wide")
    result = filter_samples(
        folder,
        rules(u={"action": "drop", "signal": "uncertain", "above_percentile": 70}),
        "wide",
        "certain",
    )
    shares = {
        s.id: float((read_mask(wide / f"{s.id}.png") == 255).mean()) for s in read_plan(folder)
    }
    assert [256 * share for share in shares.values()] == [
        32,
        32,
        64,
        32,
        64,
        32,
        32,
        32,
    ]  # with two classes twice the edge
    assert result["dropped"].keys() == {"000002", "000004"}
    assert result["rules"]["u"]["thresholds"] == {"all": 32 / 256}
    assert result["identity"]["mask_set"]["masks"] == "masks/wide"
    label(folder, SETTINGS, absent=find_absent(folder, rules(faint=FAINT), SETTINGS))
    path = folder / "SegmentationClass/000002.png"
    path.write_bytes(encode_mask(np.zeros((16, 16), np.uint8)))
    done = read_json(path.with_name("masks.json"))
    done["sha256"]["000002"] = sha256(path)
    write_json(path.with_name("masks.json"), done)
    result = filter_samples(
        folder, rules(faint=FAINT, missing=MISSING)
    )  # its tire was called absent, its apple is missing
    assert result["dropped"] == {
        "000002": [{"rule": "missing", "class": "all", "value": 1, "threshold": 0.0}]
    }


def test_other_rules_replace_the_list(folder):
    label(folder, SETTINGS)
    first = filter_samples(
        folder, rules(strong={"action": "drop", "signal": "peak", "above": 0.45})
    )
    second = filter_samples(
        folder, rules(strong={"action": "drop", "signal": "peak", "above": 0.35})
    )
    assert first["kept"] == 7 and second["kept"] == 6 == len(read_split(folder, "train_filtered"))


def test_an_interrupted_filter_is_noticed_and_made_again(folder, monkeypatch):
    label(folder, SETTINGS)
    given = rules(strong={"action": "drop", "signal": "peak", "above": 0.45})

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(filter_stage, "write_split", crash)
    with pytest.raises(KeyboardInterrupt):
        filter_samples(folder, given)
    monkeypatch.undo()
    assert (
        len(filter_samples(folder, given)["dropped"]) == 1
        and len(read_split(folder, "train_filtered")) == 7
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"action": "drop", "signal": "peak", "below": 0.35},
            r"rules.r would take out 6 of 8 samples \(75 %\)|every image of",
        ),
        (
            {"action": "drop", "signal": "peak", "below": 0.1},
            r"rules.r would take out 5 of 8 .*every image of tire\.",
        ),
    ],
)
def test_a_filter_that_takes_too_much_changes_nothing(folder, rule, message):
    label(folder, SETTINGS)
    before = files(folder)
    with pytest.raises(ValueError, match=message):
        filter_samples(folder, rules(r=rule))
    assert files(folder) == before


def test_rules_that_take_too_much_together_change_nothing(folder):
    label(folder, SETTINGS)
    before = files(folder)
    strong, weak = (
        {"action": "drop", "signal": "peak", **bound}
        for bound in ({"above": 0.25}, {"below": 0.025})
    )
    (
        filter_samples(folder, rules(strong=strong), split="a"),
        filter_samples(folder, rules(weak=weak), split="b"),
    )
    with pytest.raises(
        ValueError, match=r"the rules together would take out 4 of 8 samples \(50 %\), more than"
    ):
        filter_samples(folder, rules(strong=strong, weak=weak), max_share=0.4)
    assert (
        files(folder).items() >= before.items() and not (folder / "quality/train_filtered").exists()
    )


def test_dropping_what_is_left_of_a_class_after_absent_ones_is_refused(folder):
    faint = {**FAINT, "below": 0.055}  # every tire but that of 7
    label(folder, SETTINGS, absent=find_absent(folder, rules(faint=faint), SETTINGS))
    last = {"action": "drop", "signal": "peak", "above": 0.055, "power": 1}
    with pytest.raises(
        ValueError, match="with those that call classes absent, .*every image of .*tire"
    ):
        filter_samples(folder, rules(faint=faint, last=last), max_share=1)


def test_masks_made_with_other_absent_rules_are_refused(folder):
    label(folder, SETTINGS)
    with pytest.raises(
        ValueError,
        match=r"other rules for absent classes(.|\n)*faint: \(absent\) -> (.|\n)*stage=label",
    ):
        filter_samples(folder, rules(faint=FAINT, missing=MISSING))
    assert not (folder / "quality").exists()


def test_lists_that_are_not_ours_are_left_alone(folder):
    label(folder, SETTINGS)
    write_split(folder, "mine", ["000001"])
    for split in ("train", "mine"):
        with pytest.raises(ValueError, match=f"{split}.txt is a list that no filter wrote"):
            filter_samples(folder, rules(missing=MISSING), split=split)
    for split in ("", "../train", ".hidden"):
        with pytest.raises(ValueError, match="quality.split="):
            filter_samples(folder, rules(missing=MISSING), split=split)


@pytest.mark.parametrize(
    "name", ["../heat", "../records", "../../../../esc", "/etc", "..", "", "a\nb", ["a"], 1]
)
def test_mask_sets_stay_among_the_mask_sets(folder, name):
    before = sorted(p.relative_to(folder.parent) for p in folder.parent.rglob("*"))
    with pytest.raises(ValueError, match="mask_set=.*expected the name of a folder"):
        label(folder, SETTINGS, name)
    with pytest.raises(ValueError, match="mask_set=.*expected the name of a folder"):
        filter_samples(folder, rules(missing=MISSING), name)
    assert sorted(p.relative_to(folder.parent) for p in folder.parent.rglob("*")) == before


def test_masks_that_are_not_there(folder):
    with pytest.raises(FileNotFoundError, match="masks/later is not finished.*stage=label first"):
        filter_samples(folder, rules(missing=MISSING), "later")
    target = label(folder, SETTINGS)
    done = read_json(target / "masks.json")
    del done["sha256"]["000003"]
    write_json(target / "masks.json", done)
    with pytest.raises(ValueError, match="has other samples than"):
        filter_samples(folder, rules(missing=MISSING))


# Commands


def compose(root, *overrides):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose(root, overrides=list(overrides))
    OmegaConf.set_struct(cfg, True)
    return cfg


@pytest.fixture
def generate(run, folder):
    def generate(*overrides):
        masks = ["masks.power=1", "masks.threshold=0.6", "masks.band=0.2"]
        return run("generate", f"data_root={folder.parents[1]}", "name=eight", *masks, *overrides)

    return generate


TIRES = "+quality.rules.faint={action: absent, signal: peak, below: 0.035}"
MINE = {"data": "here/tune", "labels": 8}
STRONG = "+quality.rules.strong={action: drop, signal: peak, above: 0.45}"


def test_the_commands_make_masks_and_a_list_and_training_records_them(generate, folder, capsys):
    # the rule's bound was chosen there
    looked = "+quality.chosen_on={data: here, split: tune, labels: 8}"
    generate("stage=label", TIRES, looked)
    generate("stage=filter", TIRES, STRONG, "quality.split=good", looked)
    assert "synthetic_split=good" in capsys.readouterr().out
    train = ["experiment=shapes_synthetic", f"synthetic={folder}", "device=cpu"]
    whole, part = compose("train", *train), compose("train", *train, "synthetic_split=good")
    images, _ = config.training_sets(part)
    identity, record = config.training_record(part, images)
    trained_on = record["trained_on"]
    filtered = read_json(folder / "quality/good/filter.json")
    assert images.ids == [f"{i:06d}" for i in range(1, 8)] and (
        trained_on["split"],
        trained_on["images"],
    ) == ("good", 7)
    assert trained_on["filter"] == filtered["identity"] and record["supervision"] == "B"
    assert filtered["chosen_on"] == [{"what": "quality", **MINE}, {"what": "samples", **MINE}]
    assert record["chosen_on"][:2] == [{"what": "quality", **MINE}, {"what": "samples", **MINE}]
    assert "chosen_on" not in json.dumps(identity)
    assert trained_on["filter"]["rules"] == {
        "strong": {"action": "drop", "signal": "peak", "above": 0.45}
    }
    assert trained_on["mask_settings"]["absent"]["rules"].keys() == {"faint"}
    other, record = config.training_record(whole, config.training_sets(whole)[0])
    assert record["trained_on"].keys() == trained_on.keys() - {"filter"} and other != identity
    write_split(folder, "good", ["000001"])
    with pytest.raises(
        ValueError,
        match="split good is not the list of .*filter.json; run generate.py stage=filter",
    ):
        config.training_record(part, config.training_sets(part)[0])
    write_split(folder, "own", ["000001", "000002"])
    own = compose("train", *train, "synthetic_split=own")
    first = config.training_record(own, config.training_sets(own)[0])[0]
    write_split(folder, "own", ["000001", "000003"])
    assert config.training_record(own, config.training_sets(own)[0])[0] != first


def test_the_rule_of_the_docs(generate, folder):
    faint = "+quality.rules.faint={action: absent, signal: spread, below_percentile: 20}"
    generate("stage=label", faint)
    rule = read_json(folder / "SegmentationClass/masks.json")["identity"]["absent"]["rules"][
        "faint"
    ]
    assert "power" not in rule  # that of the masks
    with pytest.raises(ValueError, match="stage=filter needs a rule of action drop"):
        generate("stage=filter", faint)  # it only calls classes absent


def test_nothing_is_filtered_unless_asked_for(generate, folder):
    generate("stage=label")
    assert (
        "absent" not in json.dumps(read_json(folder / "SegmentationClass/masks.json"))
        and not (folder / "quality").exists()
    )
    with pytest.raises(ValueError, match="stage=filter needs a rule of action drop, such as "):
        generate("stage=filter")
    with pytest.raises(
        ValueError, match="a rule of quality reads CLIP scores: give quality.clip.model="
    ):
        generate("stage=all", "+quality.rules.c={action: drop, signal: clip, below: 20}")


def test_a_clip_model_by_command(generate, folder, tiny_clip, tmp_path):
    model = f"quality.clip.model={tiny_clip(tmp_path / 'clip')}"
    generate("stage=label")
    generate(
        "stage=filter",
        model,
        "+quality.rules.c={action: drop, signal: clip_class, below_percentile: 25}",
    )
    assert {"heat", "clip"} == read_records(folder / "quality")["000000"]["signals"].keys()
    assert 0 < len(read_json(folder / "quality/train_filtered/filter.json")["dropped"]) < 5
