import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from benchmarks.synthesis import synthesize
from dd.data.datasets import (
    OtherDtype,
    SegmentationFolder,
    heat_bytes,
    read_image,
    read_mask,
    read_split,
    stored_heat,
)
from dd.execution import units
from dd.masks.from_heat import MaskSettings, scored, to_mask
from dd.prompts.prompt import Prompts, make_prompt
from dd.prompts.templates import TemplatePrompts
from dd.stages import label as label_stage
from dd.stages.label import label
from dd.store.provenance import read_json, sha256
from dd.store.samples import (
    append_records,
    each_record,
    read_plan,
    read_records,
    record_line,
    sample_seed,
)
from dd.taxonomy import taxonomy
from tests.fakes import RandomGenerator

SHAPES = taxonomy("shapes")
PROMPTS = TemplatePrompts(templates=["a photo of {things}"], conditions={}, counts=[0.4, 0.4, 0.2])


class FakeGenerator(RandomGenerator):
    """Random images and heat. ``bad``: {id: number of its first attempts that are bad}."""

    powers, side = 3, 8
    terms = {"licence": "Apache-2.0", "link": "https://example.org/terms"}

    def __init__(self, crash_at=None, sources=("class_prompt",), bad=None, **settings):
        self.crash_at, self.sources, self.units = crash_at, sources, []
        self.bad_seeds = {
            sample_seed(1, name, attempt) for name, n in (bad or {}).items() for attempt in range(n)
        }
        self.settings = {
            "model": "fake",
            "revision": None,
            "weights_sha256": "0" * 64,
            "scheduler": None,
            "steps": 2,
            "guidance": 3.0,
            **settings,
        }

    def identity(self):
        return self.settings

    def generate(self, samples, capture=True):
        if len(self.units) == self.crash_at:
            raise RuntimeError("out of memory")
        self.units.append([s.id for s in samples])
        images, heat, _ = super().generate(samples, capture)
        bad = ["safety checker" if s.seed in self.bad_seeds else None for s in samples]
        return images, heat, bad


def make(folder, generator=None, **kwargs):
    settings = {"num_images": 7, "seed": 1, "unit_size": 3, "image_format": "png", **kwargs}
    return synthesize(
        folder, generator or FakeGenerator(), settings.pop("prompts", PROMPTS), SHAPES, **settings
    )


def contents(folder):
    """Bytes of every file, but for the seconds in the records and the versions in run.json."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl" and path.parent.name == "records":
            continue
        found[name] = read_json(path)["identity"] if name == "run.json" else path.read_bytes()
    records = read_records(folder)
    return found | {"records": {k: {**r, "seconds": None} for k, r in records.items()}}


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "set")
    return tmp_path / "set"


# Synthesis


def test_everything_that_is_promised_is_there(tmp_path):
    folder, generator = tmp_path / "set", FakeGenerator()
    done = make(folder, generator)
    assert (done["images"], done["made_now"]) == (7, 7) and done["seconds"] > 0
    plan, records, run = read_plan(folder), read_records(folder), read_json(folder / "run.json")
    assert [[s.id for s in plan if s.unit == u] for u in range(3)] == generator.units
    assert read_split(folder, "train") == [s.id for s in plan] == list(records)
    assert {p.name for p in (folder / "JPEGImages").iterdir()} == {f"{s.id}.png" for s in plan}
    assert {p.name for p in (folder / "heat").iterdir()} == {f"{s.id}.safetensors" for s in plan}
    assert run["identity"]["generator"] == generator.identity()
    assert (
        run["identity"]["plan_sha256"]
        == hashlib.sha256((folder / "plan.jsonl").read_bytes()).hexdigest()
    )
    assert {"versions", "git_commit", "command"} <= run.keys()


def test_files_hold_what_was_generated_and_records_their_hashes(folder):
    plan, records = read_plan(folder), read_records(folder)
    images, heat, _ = FakeGenerator().generate(plan[3:6])
    for sample, image, maps in zip(plan[3:6], images, heat, strict=True):
        paths = [
            folder / "JPEGImages" / f"{sample.id}.png",
            folder / "heat" / f"{sample.id}.safetensors",
        ]
        assert np.array_equal(read_image(paths[0]), image)
        held = load_file(paths[1])
        assert {v.dtype.name for v in held.values()} == {"float32"}
        whole = held["class_prompt"] + held["class_prompt.mean"][..., None, None]
        np.testing.assert_allclose(whole, maps["class_prompt"], rtol=1e-6, atol=1e-7)
        hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]
        record = records[sample.id]
        assert [record["image_sha256"], record["heat_sha256"]] == hashes
        assert record["unit"] == sample.unit == 1
        with safe_open(paths[1], "numpy") as file:
            described = " ".join(file.metadata().values())
        assert (
            all(name in described for name in sample.classes) and "3" in described
        )  # classes and number of powers


def test_prompts_and_classes_of_the_plan_come_from_the_prompts(folder):
    for sample, prompt in zip(read_plan(folder), PROMPTS(SHAPES, 7, 1), strict=True):
        assert (sample.prompt, sample.class_prompt, sample.classes) == (
            prompt.text,
            prompt.class_prompt,
            prompt.classes,
        )
        assert list(sample.class_ids) == SHAPES.ids(prompt.classes)


def test_the_same_heat_is_the_same_file(tmp_path, folder):
    make(tmp_path / "other")
    for path in (folder / "heat").iterdir():
        assert (tmp_path / "other/heat" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("crash_at", [0, 1, 2])
def test_a_resumed_synthesis_is_byte_identical(tmp_path, folder, crash_at):
    other = tmp_path / "other"
    with pytest.raises(RuntimeError, match="out of memory"):
        make(other, FakeGenerator(crash_at))
    assert len(read_records(other)) == 3 * crash_at
    assert not (other / "ImageSets").exists()
    rest = FakeGenerator()
    assert make(other, rest)["made_now"] == 7 - 3 * crash_at
    assert len(rest.units) == 3 - crash_at
    assert contents(other) == contents(folder)


def test_a_crash_before_the_record_makes_the_unit_again(tmp_path, folder, monkeypatch):
    other, append = tmp_path / "other", units.append_records

    def crash(where, worker, records):
        if records[0]["unit"] == 1:
            raise KeyboardInterrupt
        append(where, worker, records)

    monkeypatch.setattr(units, "append_records", crash)
    with pytest.raises(KeyboardInterrupt):
        make(other)
    monkeypatch.undo()
    assert len(list((other / "JPEGImages").iterdir())) == 6 and len(read_records(other)) == 3
    assert make(other)["made_now"] == 4
    assert contents(other) == contents(folder)


def test_a_torn_record_makes_its_whole_unit_again(tmp_path, folder):
    other = tmp_path / "other"
    make(other)
    path = other / "records/0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    rest = FakeGenerator()
    assert make(other, rest)["made_now"] == 4
    assert rest.units == [["000003", "000004", "000005"], ["000006"]]
    assert contents(other) == contents(folder)


def test_a_finished_set_is_left_alone(folder):
    before, generator = contents(folder), FakeGenerator(crash_at=0)
    assert make(folder, generator)["made_now"] == 0
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"generator": FakeGenerator(guidance=4.0)}, ["generator.guidance: 3.0 -> 4.0"]),
        ({"seed": 2}, ["seed: 1 -> 2", "plan_sha256: "]),
        ({"num_images": 6}, ["num_images: 7 -> 6", "plan_sha256: "]),
        ({"unit_size": 2}, ["unit_size: 3 -> 2", "plan_sha256: "]),
        ({"image_format": "jpg"}, ["image_format: .png -> .jpg"]),
        (
            {"prompts": TemplatePrompts(templates=["{things}"], conditions={}, counts=[1])},
            ["plan_sha256: "],
        ),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(folder, change, named):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(
        FileExistsError, match="data set .*set was made with other settings"
    ) as error:
        make(folder, **change)
    lines = [line.strip() for line in str(error.value).splitlines()[1:-1]]
    assert len(lines) == len(named) and all(
        any(line.startswith(n) for line in lines) for n in named
    )
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_prompt_that_cannot_be_used_stops_before_any_work(tmp_path):
    class Picky(FakeGenerator):
        def spans(self, sample):
            if sample.id == "000005":
                raise ValueError("class 'tire' is cut off")

    with pytest.raises(ValueError, match="cut off"):
        make(tmp_path / "set", Picky())
    assert not (tmp_path / "set").exists()


class Long:
    """Five prompts, two of them too long for a limit of 9 words, and a caption that was left
    out."""

    def __call__(self, taxonomy, number, seed):
        captions = [
            "a red thing",
            "a photo of something that is on a table",
            "a red thing",
            "a long row of things on a floor",
            "x",
        ]
        dropped = [{"reason": "names no class", "filename": "b.jpg", "caption": "a blue sky"}]
        return Prompts(
            [make_prompt(c, ["apple", "tire"]) for c in captions][: number or None], dropped
        )


class ShortSighted(FakeGenerator):
    token_limit = 11


def test_prompts_over_the_token_limit_stop_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="2 of 5 prompts .* longer than the 11 tokens") as error:
        make(tmp_path / "set", ShortSighted(), prompts=Long(), num_images=None)
    assert "a photo of something" in str(error.value) and "a long row" in str(error.value)
    assert not (tmp_path / "set").exists()


def test_captions_are_trimmed_when_asked_for_and_all_prompts_are_used(tmp_path, capsys):
    make(
        tmp_path / "set", ShortSighted(), prompts=Long(), num_images=None, prompts_over_limit="trim"
    )
    plan = read_plan(tmp_path / "set")
    assert [s.prompt for s in plan] == [
        "a red thing; apple tire",
        "a photo of something that is on; apple tire",
        "a red thing; apple tire",
        "a long row of things on a; apple tire",
        "x; apple tire",
    ]
    assert read_json(tmp_path / "set/run.json")["identity"]["num_images"] == 5
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "caption trimmed to the limit 2" in printed
        and "captions left out 1: names no class" in printed
    )
    dropped = [
        json.loads(line)
        for line in (tmp_path / "set/dropped_captions.jsonl").read_text().splitlines()
    ]
    assert dropped == [{"reason": "names no class", "filename": "b.jpg", "caption": "a blue sky"}]


@pytest.mark.parametrize("change", [{"num_images": 0}, {"unit_size": 0}])
def test_impossible_numbers(tmp_path, change):
    with pytest.raises(ValueError, match="=0: expected a whole number of 1 or more"):
        make(tmp_path / "set", **change)
    assert not (tmp_path / "set").exists()


def test_an_unknown_image_format_stops_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"allowed: \.jpg, \.png"):
        make(tmp_path / "set", image_format="jpeg")
    assert not (tmp_path / "set").exists()


# Bad images


BAD = {
    "000001": 2,
    "000002": 1,
    "000004": 9,
}  # of unit 0 two are drawn again, of unit 1 one stays bad


@pytest.fixture
def spoilt(tmp_path):
    """A set in which two images were drawn again and one sample was left out."""
    make(tmp_path / "spoilt", FakeGenerator(bad=BAD))
    return tmp_path / "spoilt"


def test_a_bad_image_is_drawn_again_alone_from_the_seed_of_the_attempt(tmp_path, folder, spoilt):
    generator = FakeGenerator(bad=BAD)
    done = make(tmp_path / "other", generator)
    units = [
        ["000000", "000001", "000002"],
        ["000001"],
        ["000001"],
        ["000002"],
        ["000003", "000004", "000005"],
    ]
    assert generator.units == [*units, *[["000004"]] * 3, ["000006"]]
    assert (done["images"], done["drawn_again"], done["failed"], done["made_now"]) == (6, 2, 1, 7)
    records = read_records(tmp_path / "other")
    assert {i: r["attempt"] for i, r in records.items() if r["attempt"]} == {
        "000001": 2,
        "000002": 1,
        "000004": 3,
    }
    assert {i: len(r["faults"]) for i, r in records.items() if "faults" in r} == {
        "000001": 2,
        "000002": 1,
        "000004": 4,
    }
    assert set(records["000001"]["faults"]) == {"safety checker"}
    (again,) = (s for s in read_plan(tmp_path / "other") if s.id == "000001")
    images, _, _ = FakeGenerator().generate(
        [replace(again, seed=sample_seed(1, "000001", attempt=2))]
    )
    assert np.array_equal(read_image(tmp_path / "other/JPEGImages/000001.png"), images[0])
    for name in (
        "000000",
        "000003",
        "000005",
        "000006",
    ):  # the good ones of the same units are as they were
        assert records[name] == {**read_records(folder)[name], "seconds": records[name]["seconds"]}


def test_a_sample_that_stays_bad_is_left_out_of_everything_but_plan_and_records(spoilt):
    ids = [f"{i:06d}" for i in (0, 1, 2, 3, 5, 6)]
    record = read_records(spoilt)["000004"]
    assert (
        record["failed"]
        and record["faults"] == ["safety checker"] * 4
        and "image_sha256" not in record
    )
    assert '"000004"' in (spoilt / "plan.jsonl").read_text()
    assert [s.id for s in read_plan(spoilt)] == read_split(spoilt, "train") == ids
    assert not list(spoilt.rglob("000004.*"))
    target = label(spoilt, SETTINGS)
    assert (
        sorted(read_json(target / "masks.json")["sha256"])
        == sorted(p.stem for p in target.glob("*.png"))
        == ids
    )
    assert len(SegmentationFolder(spoilt, "train", SHAPES)) == 6
    text = (spoilt / "README.md").read_text()
    assert (
        "6 images made by" in text
        and "Bad images: 2 drawn again, 1 samples left out" in " ".join(text.split())
    )


@pytest.mark.parametrize("crash_at", range(9))
def test_a_resumed_synthesis_with_bad_images_is_byte_identical(tmp_path, spoilt, crash_at):
    other = tmp_path / "other"
    with pytest.raises(RuntimeError, match="out of memory"):
        make(other, FakeGenerator(crash_at, bad=BAD))
    make(other, FakeGenerator(bad=BAD))
    assert contents(other) == contents(spoilt)


def test_a_finished_set_with_samples_left_out_is_left_alone(spoilt):
    before = contents(spoilt)
    assert make(spoilt, FakeGenerator(crash_at=0, bad=BAD))["made_now"] == 0
    assert contents(spoilt) == before


def test_the_number_of_attempts_is_a_setting_and_part_of_the_identity(tmp_path, folder, spoilt):
    generator = FakeGenerator(bad=BAD)
    done = make(tmp_path / "once", generator, redraw=1)
    assert (done["images"], done["drawn_again"], done["failed"]) == (5, 1, 2)
    assert make(tmp_path / "none", FakeGenerator(bad=BAD), redraw=0)["failed"] == 3
    with pytest.raises(FileExistsError, match=r"redraw: \(absent\) -> 1"):
        make(spoilt, FakeGenerator(bad=BAD), redraw=1)
    with pytest.raises(ValueError, match="redraw=-1: .*of 0 or more"):
        make(tmp_path / "nothing", redraw=-1)
    assert not (tmp_path / "nothing").exists()
    assert (
        "redraw" not in read_json(folder / "run.json")["identity"]
    )  # as in sets made before it was a setting


def test_a_set_without_a_good_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="each of its 7 images stayed bad after all attempts"):
        make(tmp_path / "set", FakeGenerator(bad={f"{i:06d}": 9 for i in range(7)}))
    with pytest.raises(ValueError, match="each of its 7 images stayed bad"):
        label(tmp_path / "set", SETTINGS)


# Labels


def stored(folder, sample):
    return stored_heat(folder, sample.id)["class_prompt"]


SETTINGS = MaskSettings(power=1, threshold=0.7, band=0.2)


def test_masks_are_those_of_the_stored_heat(folder):
    target = label(folder, SETTINGS)
    assert target == folder / "SegmentationClass"
    for sample in read_plan(folder):
        path = target / f"{sample.id}.png"
        assert np.array_equal(
            read_mask(path), to_mask(stored(folder, sample), sample.class_ids, (16, 16), SETTINGS)
        )
        with Image.open(path) as image:
            assert image.mode == "P"
    data = SegmentationFolder(folder, "train", SHAPES)
    assert [data[i][1].shape for i in range(7)] == [(16, 16)] * 7


REFINED = MaskSettings(
    steps=[
        {"propagate": "walk"},
        {"normalise": "min_max"},
        {"refine": "pamr", "dilations": [1, 2]},
        {"threshold": "otsu"},
        {"uncertain": "band"},
    ]
)


def test_refined_masks_follow_the_images_of_the_set(folder):
    target = label(folder, REFINED, mask_set="refined")
    assert target == folder / "masks/refined"
    for sample in read_plan(folder):
        image = read_image(folder / f"JPEGImages/{sample.id}.png")
        heat = stored(folder, sample)
        expected = to_mask(heat, sample.class_ids, (16, 16), REFINED, image)
        assert np.array_equal(read_mask(target / f"{sample.id}.png"), expected)
        other = to_mask(heat, sample.class_ids, (16, 16), REFINED, image[::-1])
        assert not np.array_equal(expected, other)
    assert read_json(target / "masks.json")["identity"]["settings"] == REFINED.identity()
    before = {p: p.read_bytes() for p in target.iterdir()}
    assert label(folder, MaskSettings(**REFINED.identity()), mask_set="refined") == target
    assert {p: p.read_bytes() for p in target.iterdir()} == before


def test_masks_json_holds_settings_hashes_and_pixels(folder):
    target = label(folder, SETTINGS)
    done = read_json(target / "masks.json")
    assert done["identity"]["settings"] == {
        "power": 1,
        "threshold": 0.7,
        "band": 0.2,
        "source": "class_prompt",
    }
    ids = [s.id for s in read_plan(folder)]
    assert done["sha256"] == {
        i: hashlib.sha256((target / f"{i}.png").read_bytes()).hexdigest() for i in ids
    }
    values, counts = np.unique(
        np.concatenate([read_mask(target / f"{i}.png").ravel() for i in ids]), return_counts=True
    )
    assert done["pixels"] == {str(v): int(n) for v, n in zip(values, counts, strict=True)}


def test_uncertain_pixels_come_from_the_band_alone(folder):
    def pixels(settings, name):
        return read_json(label(folder, settings, name) / "masks.json")["pixels"]

    with_band, without = (
        pixels(SETTINGS, "a"),
        pixels(SETTINGS.model_copy(update={"band": 0.0}), "b"),
    )
    assert with_band["255"] > 0 and "255" not in without
    assert without["0"] == with_band["0"] + with_band["255"]
    assert {k: v for k, v in without.items() if k != "0"} == {
        k: v for k, v in with_band.items() if k not in ("0", "255")
    }


def test_labels_that_chose_are_told_beside_what_decides_a_pixel(folder, monkeypatch):
    """In masks.json and on the card; another record makes no mask anew."""
    target = label(folder, SETTINGS)
    assert read_json(target / "masks.json")["chosen_on"] == []
    assert "No real label was used" in (folder / "README.md").read_text()
    before = read_json(target / "masks.json")
    monkeypatch.setattr(label_stage, "scored", None)
    chosen = [{"what": "masks", "data": "shapes/tune", "labels": 128}]
    label(folder, SETTINGS, chosen_on=chosen)
    assert read_json(target / "masks.json") == {**before, "chosen_on": chosen}
    assert "128 labels of shapes/tune (masks)" in (folder / "README.md").read_text()
    run = read_json(folder / "run.json")
    assert run["chosen_on"] == []
    (folder / "run.json").write_text(
        json.dumps({**run, "chosen_on": [{**chosen[0], "what": "attention"}]})
    )
    label(folder, SETTINGS, chosen_on=chosen)
    assert [c["what"] for c in read_json(target / "masks.json")["chosen_on"]] == [
        "attention",
        "masks",
    ]
    assert "chosen_on" not in json.dumps(run["identity"])


def test_labelling_twice_does_nothing(folder, monkeypatch):
    label(folder, SETTINGS)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(label_stage, "scored", None)
    assert (
        label(folder, MaskSettings(power=1, threshold=0.7, band=0.2))
        == folder / "SegmentationClass"
    )
    assert {
        p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    } == before


def test_other_settings_make_the_set_anew(folder):
    first = read_json(label(folder, SETTINGS) / "masks.json")
    second = read_json(label(folder, MaskSettings(power=2, threshold=0.7, band=0.2)) / "masks.json")
    assert second["identity"]["settings"]["power"] == 2
    assert first["sha256"].keys() == second["sha256"].keys() and first["sha256"] != second["sha256"]
    assert label(folder, SETTINGS) and read_json(folder / "SegmentationClass/masks.json") == first


def test_a_second_set_stands_beside_the_first(folder):
    label(folder, SETTINGS)
    first = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    target = label(folder, MaskSettings(power=0), "power=0")
    assert target == folder / "masks/power=0" and len(list(target.glob("*.png"))) == 7
    assert {p: p.read_bytes() for p in first} == first  # the data card too
    data = SegmentationFolder(folder, "train", SHAPES, "masks/power=0")
    sample = read_plan(folder)[2]
    assert np.array_equal(
        data[2][1],
        to_mask(stored(folder, sample), sample.class_ids, (16, 16), MaskSettings(power=0)),
    )


def test_the_default_set_by_its_name(folder):
    assert label(folder, SETTINGS, "SegmentationClass") == folder / "SegmentationClass"


def test_other_heat_makes_the_masks_anew(folder):
    before = read_json(label(folder, SETTINGS) / "masks.json")
    path = folder / "records/0.jsonl"
    heat = folder / "heat/000000.safetensors"
    save_file({source: maps[..., ::-1].copy() for source, maps in load_file(heat).items()}, heat)
    lines = list(each_record(path))
    lines[0]["heat_sha256"] = sha256(heat)
    path.write_text("".join(map(record_line, lines)))
    after = read_json(label(folder, SETTINGS) / "masks.json")
    assert after["identity"]["settings"] == before["identity"]["settings"]
    assert after["identity"]["heat"] != before["identity"]["heat"]


def test_an_interrupted_labelling_is_not_complete(folder, monkeypatch):
    calls = []

    def crash(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return scored(*arguments)

    monkeypatch.setattr(label_stage, "scored", crash)
    with pytest.raises(KeyboardInterrupt):
        label(folder, SETTINGS)
    assert not (folder / "SegmentationClass/masks.json").exists()
    monkeypatch.undo()
    assert len(read_json(label(folder, SETTINGS) / "masks.json")["sha256"]) == 7


def test_the_data_card(folder):
    label(folder, SETTINGS)
    text = (folder / "README.md").read_text()
    plan, pixels = read_plan(folder), read_json(folder / "SegmentationClass/masks.json")["pixels"]
    assert "7 images" in text and "Licence" in text and "Known biases" in text
    assert "power 1, threshold 0.7, uncertainty band 0.2" in text
    for i, name in enumerate(SHAPES.all_names):
        asked = sum(name in s.classes for s in plan) if i else 7
        assert f"| {name} | {asked} | {100 * pixels.get(str(i), 0) / (7 * 256):.1f} % |" in text
    assert f"| uncertain (255) | | {100 * pixels['255'] / (7 * 256):.1f} % |" in text
    assert read_image(folder / "card.png").std() > 0
    flat = " ".join(text.split())
    assert "Licence of the generator's weights: Apache-2.0 (https://example.org/terms)." in flat
    assert "safety checker off. Bad images: 0 drawn again, 0 samples left out" in flat


@pytest.mark.parametrize("terms", [None, {"licence": None, "link": None}])
def test_a_card_without_a_licence_says_whom_to_ask(folder, terms):
    run = read_json(folder / "run.json")
    run["terms"] = terms
    (folder / "run.json").write_text(
        json.dumps(run if terms else {k: v for k, v in run.items() if k != "terms"})
    )
    label(folder, SETTINGS)
    text = " ".join((folder / "README.md").read_text().split())
    assert (
        "Licence of the generator's weights: not stated, ask the owner of the weights. It governs"
        in text
    )


# What can go wrong with labels


def test_an_unfinished_set_is_not_labelled(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        make(tmp_path / "set", FakeGenerator(crash_at=2))
    with pytest.raises(
        ValueError,
        match="1 of 7 samples are not generated yet, such as 000006; run generate.py first",
    ):
        label(tmp_path / "set", SETTINGS)
    with pytest.raises(FileNotFoundError, match="is not a synthetic data set"):
        label(tmp_path / "nothing", SETTINGS)


def test_a_source_that_is_not_stored(folder):
    message = (
        "full_prompt_caption is not stored .*holds class_prompt. .*diffusion.full_prompt=caption"
    )
    with pytest.raises(ValueError, match=message):
        label(folder, SETTINGS.model_copy(update={"source": "full_prompt_caption"}))


def test_the_full_prompt_can_be_the_source(tmp_path):
    make(tmp_path / "set", FakeGenerator(sources=("class_prompt", "full_prompt_caption")))
    target = label(tmp_path / "set", SETTINGS.model_copy(update={"source": "full_prompt_caption"}))
    sample = read_plan(tmp_path / "set")[0]
    heat = stored_heat(tmp_path / "set", sample.id)["full_prompt_caption"]
    assert np.array_equal(
        read_mask(target / f"{sample.id}.png"), to_mask(heat, sample.class_ids, (16, 16), SETTINGS)
    )


def record_heat(folder, name):
    """A record of the heat file as it is now."""
    digest = sha256(folder / f"heat/{name}.safetensors")
    append_records(folder, "0", [{**read_records(folder)[name], "heat_sha256": digest}])


def test_heat_in_half_precision_makes_no_mask(folder):
    label(folder, SETTINGS)
    path = folder / "heat/000000.safetensors"
    save_file(
        {"class_prompt": stored_heat(folder, "000000")["class_prompt"].astype(np.float16)}, path
    )
    record_heat(folder, "000000")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(
        OtherDtype,
        match="holds class_prompt in float16, expected float32: .*Nothing is converted. Draw",
    ):
        label(folder, SETTINGS.model_copy(update={"power": 2}))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_classes_that_show_nothing_at_the_power_in_use_are_named(folder, capsys):
    """Flat at power 2 alone: at another power the same class has its pixels."""
    sample = read_plan(folder)[0]
    maps = stored(folder, sample)
    maps[0, 2] = maps[0, 2].mean() + 1e-8 * (maps[0, 2] - maps[0, 2].mean())
    (folder / "heat" / f"{sample.id}.safetensors").write_bytes(
        heat_bytes({"class_prompt": maps}, {})
    )
    record_heat(folder, sample.id)
    target = label(folder, SETTINGS)
    assert (
        "vanished" not in read_json(target / "masks.json")
        and "warning" not in capsys.readouterr().out
    )
    assert sample.class_ids[0] in read_mask(target / f"{sample.id}.png")
    target = label(folder, SETTINGS.model_copy(update={"power": 2}), "high")
    assert read_json(target / "masks.json")["vanished"] == {sample.id: [sample.classes[0]]}
    assert sample.class_ids[0] not in read_mask(target / f"{sample.id}.png")
    said = capsys.readouterr().out
    assert "warning: 1 classes of 1 samples show nothing at power 2 of class_prompt" in said
    absent = {"rules": {}, "classes": {sample.id: list(sample.classes[:1])}}
    again = read_json(
        label(folder, SETTINGS.model_copy(update={"power": 2}), "absent", absent=absent)
        / "masks.json"
    )
    assert "vanished" not in again  # it was not drawn anyway


@pytest.mark.parametrize(
    "impossible",
    [
        SETTINGS.model_copy(update={"power": 3}),
        SETTINGS.model_copy(update={"source": "full_prompt_caption"}),
    ],
)
def test_impossible_settings_leave_the_set_that_is_there(folder, impossible):
    label(folder, SETTINGS)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="is not stored"):
        label(folder, impossible)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_damaged_heat_is_named(folder):
    path = folder / "heat/000003.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(
        ValueError,
        match=r"000003\.safetensors does not match its record: .*python -m dd verify .*/set "
        r"lists all",
    ):
        label(folder, SETTINGS)


@pytest.mark.parametrize("lost", ["heat/000003.safetensors", "JPEGImages/000003.png"])
def test_a_lost_file_is_named_and_made_again(folder, lost):
    whole = contents(folder)
    (folder / lost).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no .*000003.*run generate\.py again to make the missing ones"
    ):
        label(folder, SETTINGS)
    assert make(folder)["made_now"] == 3
    assert whole.items() <= contents(folder).items()
