import json
import re
from functools import partial

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.synthesis import synthesize
from dd.__main__ import main
from dd.data import datasets
from dd.data.datasets import SegmentationFolder, stored_heat
from dd.execution import Shard
from dd.masks.from_heat import MaskSettings
from dd.stages.export import export
from dd.stages.filter import filter_samples
from dd.stages.label import label
from dd.stages.merge import merge
from dd.stages.prepare_shapes import prepare_shapes
from dd.stages.report_dataset import report_dataset
from dd.stages.sweep import SweepSettings
from dd.stages.sweep import sweep as sweep_masks
from dd.stages.verify import verify
from dd.store.locks import Lock
from dd.store.provenance import read_json, sha256
from dd.store.samples import each_record, record_line
from dd.taxonomy import Taxonomy
from tests.faults import fake
from tests.faults.runs import contents

PETS = Taxonomy("pets", ["cat", "dog", "cow"])


def make(folder, executor=None, **settings):
    generator = fake.FakeGenerator(**settings)
    return synthesize(
        folder,
        generator,
        fake.prompts,
        PETS,
        9,
        1,
        2,
        "png",
        executor=executor,
        build=partial(fake.build),
    )


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "set")
    label(tmp_path / "set", MaskSettings(power=1, threshold=0.5, band=0.1))
    return tmp_path / "set"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_whole_set_has_no_problems(folder, capsys):
    before = contents(folder)
    assert verify(folder) == verify(folder, repair=True) == []
    assert main(["verify", str(folder)]) == 0 and "whole" in capsys.readouterr().out
    assert contents(folder) == before


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGE = {
    "image": lambda f: flip(f / "JPEGImages/000003.png"),
    "heat": lambda f: flip(f / "heat/000008.safetensors"),
    "image ": lambda f: (f / "JPEGImages/000000.png").unlink(),
    "image  ": lambda f: (f / "JPEGImages/000000.png").write_bytes(b""),
    "heat ": lambda f: (f / "heat/000001.safetensors").unlink(),
    "mask": lambda f: flip(f / "SegmentationClass/000002.png"),
    "mask ": lambda f: (f / "SegmentationClass/000002.png").unlink(),
    "mask set": lambda f: (f / "SegmentationClass/masks.json").write_text("{"),
    "mask set ": lambda f: edit(
        f / "SegmentationClass/masks.json", '"threshold": 0.', '"threshold": 1.'
    ),
    "record ": lambda f: edit(f / "records/0.jsonl", '"unit": 0', '"unit": 1'),
    "record  ": lambda f: (f / "records/0.jsonl").write_bytes(b""),
    "split": lambda f: (f / "ImageSets/Segmentation/train.txt").write_text("000001\n"),
    "split ": lambda f: (f / "ImageSets/Segmentation/train.txt").write_text("../x\n"),
    "record": lambda f: (f / "records/0.jsonl").write_bytes(
        (f / "records/0.jsonl").read_bytes()[:-40]
    ),
    "plan": lambda f: flip(f / "plan.jsonl"),
    "plan ": lambda f: (f / "plan.jsonl").unlink(),
    "temporary file": lambda f: (f / "heat/.000001.safetensors.77.tmp").write_bytes(b"x"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_named_and_healed(folder, kind, capsys):
    before = contents(folder)
    DAMAGE[kind](folder)
    damaged = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found = verify(folder)
    assert {p["kind"] for p in found} == {kind.strip()} and all(p["heals"] for p in found)
    assert {
        p: p.read_bytes() for p in folder.rglob("*") if p.is_file()
    } == damaged  # looking changes nothing
    assert main(["verify", str(folder), "--repair"]) == 1
    assert re.search(r"ready to be healed by: \S", capsys.readouterr().out)
    make(folder)
    label(folder, MaskSettings(power=1, threshold=0.5, band=0.1))
    assert verify(folder) == [] and contents(folder) == before


def test_only_the_damaged_unit_is_made_again(folder):
    flip(folder / "JPEGImages/000003.png")
    verify(folder, repair=True)
    assert make(folder)["made_now"] == 2


def test_heat_in_half_precision_is_named_and_left(folder):
    """A set from before heat was float32: it cannot be gone on with, so no record is taken away."""
    path, records = folder / "heat/000003.safetensors", folder / "records/0.jsonl"
    save_file(
        {"class_prompt": stored_heat(folder, "000003")["class_prompt"].astype(np.float16)}, path
    )
    rows = list(each_record(records))
    for row in rows:
        row["heat_sha256"] = sha256(path) if row["id"] == "000003" else row["heat_sha256"]
    records.write_text("".join(map(record_line, rows)))
    before = records.read_bytes()
    (problem,) = [p for p in verify(folder, repair=True) if p["kind"] == "heat"]
    assert (
        problem["file"] == "heat/000003.safetensors"
        and "holds class_prompt in float16" in problem["why"]
    )
    assert not problem["heals"] and records.read_bytes() == before


def test_masks_that_are_wrong_in_spite_of_their_hash(folder):
    target, done = folder / "SegmentationClass", read_json(folder / "SegmentationClass/masks.json")
    for name, pixels in (
        ("000001", np.full((16, 16), 4, np.uint8)),
        ("000004", np.zeros((8, 16), np.uint8)),
    ):
        Image.fromarray(pixels).save(target / f"{name}.png")
    Image.new("RGB", (16, 16)).save(target / "000005.png")
    import hashlib

    for name in ("000001", "000004", "000005"):
        done["sha256"][name] = hashlib.sha256((target / f"{name}.png").read_bytes()).hexdigest()
    (target / "masks.json").write_text(json.dumps(done))
    whys = {p["file"][-10:-4]: p["why"] for p in verify(folder)}
    assert (
        "ids [4] of no class" in whys["000001"] and "(8, 16), its image (16, 16)" in whys["000004"]
    )
    assert "mode RGB" in whys["000005"]


def test_files_of_no_sample_are_named_and_left(folder):
    extra = folder / "JPEGImages/holiday.png"
    extra.write_bytes(b"mine")
    (problem,) = verify(folder, repair=True)
    assert problem["kind"] == "orphan" and "holiday.png" in problem["file"] and extra.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"identity": {}}', '{"identity": 3}'])
def test_a_damaged_run_json_is_one_line(folder, text, capsys):
    (folder / "run.json").write_text(text)
    assert main(["verify", str(folder)]) == 2
    assert "run.json" in capsys.readouterr().err


def test_every_changed_character_of_run_and_masks_json_is_seen(folder):
    for path, old, new in (
        ("run.json", '"seed": 1', '"seed": 7'),
        ("SegmentationClass/masks.json", '"pixels"', '"pixals"'),
    ):
        edit(folder / path, old, new)
        try:
            (problem,) = verify(folder)
            assert path in problem["file"] and "is damaged, or was edited" in problem["why"]
        except ValueError as error:
            assert f"{path} is damaged, or was edited" in str(error)
        edit(folder / path, new, old)
    assert verify(folder) == []


def test_a_folder_without_a_set(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "no run.json. Make one with generate.py" in capsys.readouterr().err


def test_a_set_that_is_being_written_is_not_repaired(folder, capsys):
    with Lock(folder):
        assert verify(folder) == []
        assert main(["verify", str(folder), "--repair"]) == 5
    assert "is being written by process" in capsys.readouterr().err


# merge


@pytest.fixture
def shards(tmp_path):
    for i in range(2):
        make(tmp_path / f"shard{i}", Shard(index=i, count=2))
    return [tmp_path / "shard0", tmp_path / "shard1"]


def test_merged_shards_are_the_set_that_was_made_at_once(tmp_path, folder, shards):
    done = merge(shards, tmp_path / "both")
    assert (done["samples"], done["copied"], done["missing"]) == (9, 9, 0)
    label(tmp_path / "both", MaskSettings(power=1, threshold=0.5, band=0.1))
    ours, theirs = contents(tmp_path / "both"), contents(folder)
    assert ours.keys() == theirs.keys()
    assert {k for k in ours if ours[k] != theirs[k]} <= {
        "README.md"
    }  # the card names no other thing than the command
    assert verify(tmp_path / "both") == []
    assert merge(shards, tmp_path / "both")["copied"] == 0


def test_half_a_set_is_merged_and_finished_later(tmp_path, folder, shards, capsys):
    assert main(["merge", str(shards[1]), "--into", str(tmp_path / "both")]) == 0
    assert "4 of 9 samples copied" in capsys.readouterr().out
    assert {p["kind"] for p in verify(tmp_path / "both")} == {"record", "split"}
    assert make(tmp_path / "both")["made_now"] == 5
    assert merge([shards[0]], tmp_path / "both")["copied"] == 0
    assert verify(tmp_path / "both") == []


def test_shards_of_other_settings_are_refused_by_name(tmp_path, shards):
    make(tmp_path / "other", Shard(index=0, count=2), guidance=4.0)
    with pytest.raises(ValueError, match="(?s)cannot be merged:.*generator.guidance: 3.0 -> 4.0"):
        merge([shards[0], tmp_path / "other"], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_conflicts_are_named_before_anything_is_written(tmp_path, folder, shards):
    path = folder / "records/0.jsonl"
    text = path.read_text()
    record = json.loads(text.splitlines()[1]) | {"image_sha256": "1" * 64}
    path.write_text(
        "".join([text.splitlines(True)[0], record_line(record), *text.splitlines(True)[2:]])
    )
    with pytest.raises(ValueError, match="(?s)1 samples differ between sources.*000001: "):
        merge([*shards, folder], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_damaged_file_is_not_merged(tmp_path, shards):
    flip(shards[0] / "heat/000000.safetensors")
    with pytest.raises(
        ValueError, match="000000.safetensors does not match its record; python -m dd verify"
    ):
        merge(shards, tmp_path / "both")


ITSELF = SweepSettings(
    name="itself",
    power=[0],
    threshold=[0.4, 0.5, 0.6],
    band=[0.1],
    source=None,
    limit=None,
    workers=1,
)
READERS = {
    "label": lambda f: label(f, MaskSettings(power=0, threshold=0.5, band=0.1), "other"),
    "report": lambda f: report_dataset(f),
    "train": lambda f: [SegmentationFolder(f, "train", PETS)[i] for i in range(9)],
    "sweep": lambda f: sweep_masks(f, f / "SegmentationClass", ITSELF),
    "filter": lambda f: filter_samples(f, []),
    "export": lambda f: export("coco", f, f.parent / "exported"),
}
USED = {  # what is damaged: by whom it is used
    "image": ("label", "report", "train", "sweep", "export"),
    "heat": ("label", "report", "sweep"),
    "mask": ("report", "train", "sweep", "filter", "export"),
    "split": ("train", "export"),
    "record": ("label", "report", "sweep", "filter"),
    "record ": ("label", "report", "sweep", "filter"),
    "record  ": ("label", "report", "sweep", "filter"),
    "mask set ": ("report", "train", "filter", "export"),
    "plan": ("label", "report", "sweep", "filter", "export"),
}


@pytest.mark.parametrize("kind", USED)
def test_damage_is_seen_where_a_file_is_used(folder, kind):
    DAMAGE[kind](folder)
    for reader in USED[kind]:
        with pytest.raises(
            ValueError, match="verify|damaged|not generated|not finished|not the list|holds|another"
        ):
            READERS[reader](folder)


def test_a_sound_set_is_used_by_all(folder):
    for reader in READERS.values():
        reader(folder)
    assert verify(folder) == []


def test_a_file_is_looked_at_once_in_a_process(folder, monkeypatch):
    data, seen = SegmentationFolder(folder, "train", PETS), []
    before = datasets.sha256
    monkeypatch.setattr(datasets, "sha256", lambda path: seen.append(path) or before(path))
    for _ in range(3):
        data[0], data[1]
    assert len(seen) == 4 and data.unchecked() == 0


def test_images_without_a_recorded_hash_are_counted(folder):
    (folder / "records/0.jsonl").unlink()
    assert SegmentationFolder(folder, "train", PETS).unchecked() == 9


@pytest.mark.parametrize(
    "file, old, new, reader",
    [
        ("SegmentationClass/masks.json", None, '{"sha256": {}}', "report"),
        ("SegmentationClass/masks.json", None, '{"identity": "x", "sha256": {}}', "filter"),
        ("SegmentationClass/masks.json", None, '{"identity": null, "sha256": {}}', "export"),
        ("run.json", None, '{"identity": null}', "label"),
        ("run.json", None, '{"identity": null}', "report"),
        ("run.json", None, "5", "export"),
        ("plan.jsonl", '"class_ids": [1]', '"class_ids": null', "label"),
        ("plan.jsonl", '"class_ids": [1]', '"class_ids": [255]', "sweep"),
        ("plan.jsonl", '"prompt": "a photo 0; cat"', '"prompt": 1', "report"),
        ("records/0.jsonl", None, '{"id": "000000", "signals": 5}\n', "filter"),
        ("records/0.jsonl", None, '{"id": "000000", "signals": {"heat": 1}}\n', "report"),
    ],
)
def test_a_valid_file_of_other_content_is_named(folder, file, old, new, reader):
    if old is None:
        (folder / file).write_text(new)
    else:
        edit(folder / file, old, new)
    with pytest.raises(ValueError, match=file.split("/")[-1] if "records" not in file else "set"):
        READERS[reader](folder)


def test_a_prepared_set_is_not_called_damaged(tmp_path, capsys):
    prepare_shapes(tmp_path, sizes={"train": 1, "tune": 1, "test": 1})
    assert main(["verify", str(tmp_path / "shapes")]) == 2
    said = capsys.readouterr().err
    assert (
        "shapes is not a synthetic data set: its images are the scenes of 'shapes'" in said
        and "damaged" not in said
    )
