"""Finished images that a model reads: the reading of a set, and what is made of its heat."""

import json
from functools import partial

import numpy as np
import pytest

from dd.__main__ import main
from dd.data.datasets import (
    encode_image,
    heat_hashes,
    read_image,
    read_mask,
    squared,
    stored_heat,
)
from dd.execution import Local
from dd.masks.from_heat import MaskSettings, to_mask
from dd.stages import read_heat as stage
from dd.stages.label import label
from dd.stages.read_heat import Reader, read_heat
from dd.stages.report_dataset import report_dataset
from dd.stages.sweep import SweepSettings, sweep
from dd.stages.verify import verify
from dd.store.provenance import fingerprint, read_json, sha256
from dd.store.samples import read_plan, read_records, record_line
from tests.stages.test_synthesize_label import FakeGenerator, contents, make

MASKS = MaskSettings(power=1, threshold=0.4, band=0.1)
CHOICE = {"data": "pets", "labels": 4, "split": "train", "seed": 0, "what": "diffusion"}


class FakeReader(FakeGenerator):
    """Reads what the colours of an image are, by ``weights``; dies at unit ``crash_at``."""

    def __init__(self, weights="1", size=16, **settings):
        super().__init__(**{"weights_sha256": weights * 64, "reading": "after", **settings})
        self.size = size

    def read_real(self, images, samples, timesteps, seed=0):
        assert images.shape == (len(samples), self.size, self.size, 3) and not timesteps
        if len(self.units) == self.crash_at:
            raise KeyboardInterrupt
        self.units.append([s.id for s in samples])
        scale = int(self.settings["weights_sha256"][0])
        return [
            {"class_prompt": self.heat(image, sample, scale)}
            for image, sample in zip(images, samples, strict=True)
        ]

    @staticmethod
    def heat(image, sample, scale):
        shade = image[::2, ::2, 0][:8, :8] / 255.0
        powers = [shade**k * scale for k in (1, 2, 3)]
        each = [[maps + np.eye(8) * k for maps in powers] for k in range(len(sample.classes))]
        return np.array(each, np.float64)


def build(device="cpu", **settings):
    return FakeReader(**settings), None


def read(folder, reader=None, name="one", executor=None, **more):
    reader = reader or FakeReader()
    return read_heat(folder, Reader(name, reader, executor or Local(), **more))


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "set")
    return tmp_path / "set"


def reading(folder, name="one"):
    """{path: bytes} of a reading, records without their seconds."""
    return contents(folder / "heat" / name)


def everything(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def redraw(folder, name):
    """Another image of a sample, as a redrawn unit leaves it."""
    image = encode_image(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3), ".png")
    (folder / "JPEGImages" / f"{name}.png").write_bytes(image)
    path = folder / "records/0.jsonl"
    rows = read_records(folder)
    rows[name]["image_sha256"] = sha256(image)
    path.write_text("".join(map(record_line, rows.values())))


# Reading


def test_what_is_read_is_stored_with_its_records(folder):
    before = contents(folder)
    reader = FakeReader()
    done = read(folder, reader, chosen_on=[CHOICE])
    assert (done["read"], done["read_now"], done["planned"], done["complete"]) == (7, 7, 7, True)
    assert reader.units == [[f"{i:06d}" for i in unit] for unit in ((0, 1, 2), (3, 4, 5), (6,))]
    records, root = read_records(folder / "heat/one"), folder / "heat/one"
    for sample in read_plan(folder):
        path = folder / "JPEGImages" / f"{sample.id}.png"
        square = squared(read_image(path), 16)
        expected = FakeReader.heat(square, sample, 1)
        found = stored_heat(folder, sample.id, "one")["class_prompt"]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
        record = records[sample.id]
        assert record["image_sha256"] == sha256(path) and record["unit"] == sample.unit
        assert record["heat_sha256"] == sha256(root / f"{sample.id}.safetensors")
    run = read_json(root / "run.json")
    known = {k: v for k, v in reader.identity().items() if k not in stage.DRAWING}
    assert run["identity"] == {"generator": known} and run["chosen_on"] == [CHOICE]
    assert "steps" not in known and "weights_sha256" in known
    assert run["terms"] == dict(reader.terms) and {"versions", "command"} <= run.keys()
    assert {k: v for k, v in contents(folder).items() if not k.startswith("heat/one")} == before


def test_two_readers_stand_side_by_side(folder):
    read(folder)
    first = reading(folder)
    read(folder, FakeReader("2"), "two")
    assert reading(folder) == first
    one, two = (stored_heat(folder, "000000", name)["class_prompt"] for name in ("one", "two"))
    np.testing.assert_allclose(two[0], 2 * one[0], rtol=1e-5)
    assert verify(folder) == []


def test_a_whole_reading_is_left_alone(folder):
    read(folder)
    before = everything(folder)
    assert read(folder, FakeReader(crash_at=0))["read_now"] == 0
    assert everything(folder) == before


@pytest.mark.parametrize("crash_at", [0, 1, 2])
def test_an_interrupted_reading_goes_on(folder, tmp_path, crash_at):
    make(tmp_path / "other")
    read(tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        read(folder, FakeReader(crash_at=crash_at))
    assert len(read_records(folder / "heat/one")) == 3 * crash_at
    assert read(folder)["read_now"] == 7 - 3 * crash_at
    assert reading(folder) == reading(tmp_path / "other")


def test_a_crash_before_the_record_reads_the_unit_again(folder, monkeypatch):
    read(folder, name="whole")
    append = stage.append_records

    def crash(where, worker, rows):
        if rows[0]["unit"] == 1:
            raise KeyboardInterrupt
        append(where, worker, rows)

    monkeypatch.setattr(stage, "append_records", crash)
    with pytest.raises(KeyboardInterrupt):
        read(folder)
    monkeypatch.undo()
    assert read(folder)["read_now"] == 4 and reading(folder) == reading(folder, "whole")


def tear(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])


def lose(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]))


@pytest.mark.parametrize(
    ("damage", "units"),
    [
        (lambda root: (root / "000004.safetensors").unlink(), [1]),
        (lambda root: lose(root / "records/0.jsonl"), [2]),
        (lambda root: tear(root / "records/0.jsonl"), [1, 2]),
        (lambda root: (root / "records/0.jsonl").unlink(), [0, 1, 2]),
    ],
)
def test_what_is_lost_is_read_again(folder, damage, units):
    read(folder)
    before = reading(folder)
    damage(folder / "heat/one")
    reader = FakeReader()
    read(folder, reader)
    assert [int(unit[0]) // 3 for unit in reader.units] == units
    assert reading(folder) == before
    lines = (folder / "heat/one/records/0.jsonl").read_text().splitlines()
    assert len(lines) == 7 and len({json.loads(line)["id"] for line in lines}) == 7


def test_an_image_that_has_changed_since_is_read_again(folder):
    read(folder)
    before = reading(folder)
    redraw(folder, "000004")
    reader = FakeReader()
    assert read(folder, reader)["read_now"] == 3
    assert reader.units == [["000003", "000004", "000005"]]
    after = reading(folder)
    changed = {k for k in before if k != "records" and before[k] != after[k]}
    assert changed == {"000004.safetensors"} and verify(folder) == []


def test_heat_of_an_image_as_it_was_makes_no_mask(folder):
    read(folder)
    redraw(folder, "000004")
    with pytest.raises(ValueError, match="1 of 7 samples .* 000004; .* stage=read reader=one"):
        label(folder, MASKS, reading="one")
    (problem,) = [p for p in verify(folder) if p["kind"] == "heat" and "/one/" in p["file"]]
    assert problem["file"] == "heat/one/000004.safetensors" and "as it was before" in problem["why"]


def test_an_image_that_is_not_as_recorded_is_not_read(folder):
    (folder / "JPEGImages/000000.png").write_bytes(
        encode_image(np.zeros((16, 16, 3), np.uint8), ".png")
    )
    with pytest.raises(Exception, match="does not match its record"):
        read(folder)


def test_another_model_under_the_same_name_is_refused(folder):
    read(folder)
    before = everything(folder)
    with pytest.raises(FileExistsError, match="reader=") as error:
        read(folder, FakeReader("2", guidance=4.0))
    text = str(error.value)
    assert "generator.weights_sha256: 1" in text
    assert "guidance" not in text  # it has no part in a reading
    assert " name=" not in text and everything(folder) == before


@pytest.mark.parametrize("name", ["../out", "", ".hidden", "a/b", None, "000000.safetensors"])
def test_a_reading_lies_in_the_folder_of_the_set(folder, name):
    before = everything(folder)
    with pytest.raises(ValueError, match="reader="):
        read(folder, name=name)
    assert everything(folder) == before


def test_a_set_that_is_not_drawn_to_the_end_is_not_read(tmp_path):
    with pytest.raises(RuntimeError):
        make(tmp_path / "set", FakeGenerator(crash_at=1))
    with pytest.raises(ValueError, match="4 of 7 samples are not generated yet"):
        read(tmp_path / "set")
    assert not (tmp_path / "set/heat/one").exists()


def test_words_that_the_reader_does_not_hold_stop_before_any_work(folder):
    class Narrow(FakeReader):
        def spans(self, sample):
            raise ValueError("class 'tire' is cut off")

    with pytest.raises(ValueError, match="cannot be used"):
        read(folder, Narrow())
    assert not (folder / "heat/one").exists()


def test_two_workers_give_the_bytes_of_one(folder):
    read(folder, name="alone")
    done = read(folder, executor=Local(workers=2), build=partial(build))
    assert done["complete"] and reading(folder) == reading(folder, "alone")


def test_a_worker_with_another_model_is_refused(folder):
    with pytest.raises(Exception, match="differs from the driver's"):
        read(folder, executor=Local(workers=2), build=partial(build, weights="2"))
    assert not read_records(folder / "heat/one")


def test_a_set_that_grew_is_read_on(folder):
    read(folder)
    before = reading(folder)
    make(folder, num_images=12)
    with pytest.raises(ValueError, match="5 of 12 samples are not read yet"):
        label(folder, MASKS, reading="one")
    reader = FakeReader()
    done = read(folder, reader)
    assert (done["read_now"], done["read"]) == (5, 12)
    assert [name for unit in reader.units for name in unit] == [f"{i:06d}" for i in range(7, 12)]
    after = reading(folder)
    same = {k for k in before if k != "records"}
    assert {k: after[k] for k in same} == {k: before[k] for k in same} and verify(folder) == []


# Masks, sweeps, reports


def test_labels_from_a_reading_are_masks_of_its_heat(folder):
    read(folder, chosen_on=[CHOICE])
    target = label(folder, MASKS, reading="one")
    plan = read_plan(folder)
    for sample in plan:
        maps = stored_heat(folder, sample.id, "one")["class_prompt"]
        expected = to_mask(maps, sample.class_ids, (16, 16), MASKS)
        assert np.array_equal(read_mask(target / f"{sample.id}.png"), expected)
    done, hashes = read_json(target / "masks.json"), heat_hashes(folder, "one")
    assert done["identity"]["reading"] == "one" and done["chosen_on"] == [CHOICE]
    assert done["identity"]["heat"] == fingerprint([hashes[s.id] for s in plan])
    assert "Attention read by `fake`" in (folder / "README.md").read_text()
    before = everything(folder)
    label(folder, MASKS, reading="one")
    assert everything(folder) == before
    label(folder, MASKS)  # of the drawing
    assert "reading" not in read_json(target / "masks.json")["identity"]


def test_a_reading_that_is_not_there_is_named_with_those_that_are(folder):
    read(folder)
    with pytest.raises(FileNotFoundError, match=r"heat=two: no such reading .* there is one\."):
        label(folder, MASKS, reading="two")
    with pytest.raises(ValueError, match="heat="):
        label(folder, MASKS, reading="../one")


def test_settings_chosen_for_another_reading_are_refused(folder):
    read(folder)
    theirs = {"weights_sha256": "1" * 64, "reading": "after", "read_at": [100]}
    label(folder, MASKS, calibration={"by": "hand", "generator": theirs}, reading="one")
    before = everything(folder)
    for key, value in (("weights_sha256", "2" * 64), ("reading", "sampling"), ("read_at", [50])):
        chosen = {"by": "hand", "generator": {**theirs, key: value}}
        with pytest.raises(ValueError, match=f"chosen for other attention.*\n  {key}: "):
            label(folder, MASKS, calibration=chosen, reading="one")
    with pytest.raises(ValueError, match="reading: sampling -> after"):  # of the drawing
        label(folder, MASKS, calibration={"by": "hand", "generator": theirs})
    assert everything(folder) == before


def tried(folder, reference, heat):
    ranges = {"power": None, "threshold": [0.3, 0.4], "band": [0.1], "source": None}
    settings = SweepSettings(name=str(heat), limit=None, workers=1, heat=heat, **ranges)
    return sweep(folder, reference, settings)


def test_a_sweep_looks_at_the_heat_of_its_reading(folder, tmp_path):
    read(folder)
    reference = label(folder, MASKS, "exact", reading="one")
    (reference / "masks.json").rename(tmp_path / "masks.json")
    found = tried(folder, reference, "one")
    assert found["masks"]["threshold"] == 0.4 and found["masks"]["power"] == 1
    assert found["diffusion"]["reading"] == found["calibration"]["generator"]["reading"] == "after"
    assert found["calibration"]["generator"]["weights_sha256"] == "1" * 64
    drawn = tried(folder, reference, None)
    assert drawn["diffusion"]["reading"] == "sampling"
    assert drawn["sweep"]["table"][0]["miou"] < found["sweep"]["table"][0]["miou"]
    label(folder, MASKS, calibration=found["calibration"], reading="one")
    with pytest.raises(ValueError, match="other attention"):
        label(folder, MASKS, calibration=drawn["calibration"], reading="one")
    with pytest.raises(FileNotFoundError, match="no such reading"):
        tried(folder, reference, "two")


def test_a_report_shows_the_heat_of_the_masks(folder, monkeypatch):
    read(folder)
    label(folder, MASKS, reading="one")
    for path in (folder / "heat").glob("*.safetensors"):
        path.unlink()  # that of the drawing is not looked at
    assert report_dataset(folder).is_file()


# Verify


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "damage", "heals"),
    [
        ("heat", lambda root: flip(root / "000004.safetensors"), True),
        ("heat", lambda root: (root / "000004.safetensors").unlink(), True),
        ("orphan", lambda root: (root / "extra.safetensors").write_bytes(b"x"), False),
        ("temporary file", lambda root: (root / ".a.safetensors.77.tmp").write_bytes(b"x"), True),
    ],
)
def test_damage_of_a_reading_is_found_and_healed_by_it_alone(folder, kind, damage, heals, capsys):
    read(folder)
    read(folder, FakeReader("2"), "two")
    label(folder, MASKS, reading="one")
    before = reading(folder), reading(folder, "two"), contents(folder)
    damage(folder / "heat/one")
    (problem,) = verify(folder)
    assert problem["kind"] == kind and problem["file"].startswith("heat/one/")
    assert problem["heals"] == heals
    assert main(["verify", str(folder), "--repair"]) == 1
    if kind == "heat":
        assert len(read_records(folder)) == len(read_records(folder / "heat/two")) == 7
        assert len(read_records(folder / "heat/one")) == 4
    if heals:
        assert make(folder, FakeGenerator(crash_at=0))["made_now"] == 0
        read(folder)
        after = reading(folder), reading(folder, "two"), contents(folder)
        assert verify(folder) == [] and after == before


def test_masks_of_other_heat_of_a_reading_are_noticed(folder):
    read(folder)
    label(folder, MASKS, reading="one")
    redraw(folder, "000004")
    read(folder)
    assert {(p["kind"], p["why"]) for p in verify(folder)} == {
        ("mask set", "was made from other heat")
    }
    label(folder, MASKS, reading="one")
    assert verify(folder) == []


def test_an_image_that_is_drawn_again_is_read_again(folder):
    read(folder)
    flip(folder / "JPEGImages/000004.png")
    verify(folder, repair=True)
    assert len(read_records(folder)) == len(read_records(folder / "heat/one")) == 4


def test_a_record_of_no_sample_is_noticed_in_a_reading(folder):
    read(folder)
    path = folder / "heat/one/records/0.jsonl"
    row = {**json.loads(path.read_text().splitlines()[0]), "id": "000099"}
    row.pop("sum")
    path.write_text(path.read_text() + record_line(row))
    (problem,) = verify(folder)
    assert (problem["kind"], problem["file"]) == ("record", "000099")


def test_an_unfinished_reading_is_no_damage(folder):
    with pytest.raises(KeyboardInterrupt):
        read(folder, FakeReader(crash_at=1))
    assert verify(folder) == []


# The commands


def test_the_commands_read_with_what_was_chosen_for_it(tmp_path, run, capsys, monkeypatch):
    words = ["num_images=2", "unit_size=2", "diffusion.steps=2", "name=set", "device=cpu"]
    given = ["experiment=shapes", f"data_root={tmp_path}", *words]
    given += ["+diffusion.chosen_on={data: shapes, split: tune, labels: 128}"]
    run("generate", *given, "stage=synthesize")
    folder = tmp_path / "synthetic/set"
    run("generate", *given, "stage=read", "reader=near", "diffusion.read_at=[50]")
    made = read_json(folder / "heat/near/run.json")
    assert made["identity"]["generator"]["read_at"] == [50]
    assert [c["labels"] for c in made["chosen_on"]] == [128]
    # what decides the drawing alone has no part in a reading: it goes on
    others = ["diffusion.steps=3", "diffusion.guidance=2.0", "diffusion.read_at=[50]"]
    run("generate", *given, *others, "stage=read", "reader=near")
    assert read_json(folder / "heat/near/run.json") == made
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["generate.py", "stage=read", "diffusion.reading=sampling"])
        with pytest.raises(ValueError, match="diffusion.reading=sampling has no effect with stage"):
            run("generate", *given, "stage=read", "reader=other", "diffusion.reading=sampling")
    run("generate", *given, "stage=label", "heat=near", "mask_set=exact")
    run("generate", *given, "stage=label", "heat=near", "mask_set=fine", "masks=refined")
    wrong = "masks.steps=[{propagate: wak},{normalise: min_max},{threshold: fixed}]"
    with pytest.raises(ValueError, match="steps: propagate: 'wak': no such step; allowed: power"):
        run("generate", *given, "stage=label", "heat=near", "mask_set=fine", wrong)
    chains = [f"sweep.masks={folder}/masks/fine", "sweep.heat=near", "sweep.chains=all"]
    few = ["sweep.power=[0,1]", "sweep.threshold=[0.5]", "sweep.band=[0.1]", "sweep.name=chains"]
    run("evaluate", f"synthetic={folder}", "name=set", "stage=sweep", *chains, *few)
    table = read_json(folder / "sweeps/chains.json")["sweep"]["chains"]
    assert len(table) >= 30 and table["refined, band"]["miou"] == 100
    assert "refined" in (folder / "sweeps/chains.html").read_text()
    swept = [f"sweep.masks={folder}/masks/exact", "sweep.heat=near", "sweep.name=near"]
    run("evaluate", f"synthetic={folder}", "name=set", "stage=sweep", *swept)
    chosen = f"masks_from={folder}/sweeps/near.json"
    run("generate", *given, "stage=read", "reader=again", chosen)
    again = read_json(folder / "heat/again/run.json")
    assert again["identity"] == made["identity"]
    run("generate", *given, "stage=label", "heat=again", chosen)
    assert read_json(folder / "SegmentationClass/masks.json")["identity"]["reading"] == "again"
    with pytest.raises(ValueError, match="reading: sampling -> after"):
        run("generate", *given, "stage=label", chosen)
    rule = "+quality.rules.faint={action: absent, signal: spread, below: 0.0}"
    with pytest.raises(ValueError, match="heat=near and rules of quality"):
        run("generate", *given, "stage=label", "heat=near", rule)
    with pytest.raises(ValueError, match="heat=near has no effect with labeler.run=a_run"):
        run("generate", *given, "stage=label", "heat=near", "labeler.run=a_run")
