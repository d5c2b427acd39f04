"""A synthetic set that grows: more samples of the same prompts, the old ones untouched."""

import pytest

from dd.data.datasets import SegmentationFolder, read_split
from dd.execution import Shard, units
from dd.masks.from_heat import MaskSettings
from dd.prompts.prompt import Prompts
from dd.stages import synthesize as stage
from dd.stages.label import label
from dd.stages.report_dataset import report_dataset
from dd.stages.verify import verify
from dd.store.locks import Busy, Lock
from dd.store.provenance import read_json, sha256
from dd.store.samples import make_plan, plan_sha256, read_plan
from tests.stages.test_synthesize_label import PROMPTS, SHAPES, FakeGenerator, contents, make

MASKS = MaskSettings(power=1, threshold=0.4, band=0.0)


def files(folder):
    found = {}
    for name in ("JPEGImages", "heat"):
        found |= {p.relative_to(folder): p.read_bytes() for p in (folder / name).iterdir()}
    return found


def test_a_set_grows_and_its_old_units_stay_as_they_are(tmp_path):
    folder, generator = tmp_path / "set", FakeGenerator()
    make(folder)
    before = files(folder)
    done = make(folder, generator, num_images=12)
    assert (done["made_now"], done["images"], done["complete"]) == (5, 12, True)
    assert generator.units == [["000007", "000008", "000009"], ["000010", "000011"]]
    after = files(folder)
    assert len(after) == 24 and {k: after[k] for k in before} == before
    plan, run = read_plan(folder), read_json(folder / "run.json")["identity"]
    assert [s.unit for s in plan] == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4]
    assert [s.prompt for s in plan] == [p.text for p in PROMPTS(SHAPES, 12, 1)]
    assert (run["num_images"], run["grown"]) == (12, [7])
    assert run["plan_sha256"] == sha256(folder / "plan.jsonl")
    assert read_split(folder, "train") == [s.id for s in plan] and not verify(folder)
    again = FakeGenerator(crash_at=0)
    assert make(folder, again, num_images=12)["made_now"] == 0


def test_a_set_of_whole_units_grows_into_what_one_command_makes(tmp_path):
    make(tmp_path / "grown", num_images=6)
    make(tmp_path / "grown", num_images=8)
    make(tmp_path / "grown", num_images=9)
    make(tmp_path / "once", num_images=6)
    make(tmp_path / "once", num_images=9)
    assert read_json(tmp_path / "grown/run.json")["identity"]["grown"] == [8]
    make(tmp_path / "at once", num_images=9)
    assert contents(tmp_path / "once") == contents(tmp_path / "at once")


def test_units_never_go_across_the_ends_of_earlier_plans():
    prompts = list(PROMPTS(SHAPES, 12, 1))
    units_of = lambda *ends: [s.unit for s in make_plan(prompts, SHAPES, 1, 4, ends)]  # noqa: E731
    assert units_of() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert units_of(2) == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert units_of(2, 7) == [0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4]


def test_a_lost_plan_of_a_grown_set_is_written_again(tmp_path):
    folder = tmp_path / "set"
    make(folder)
    make(folder, num_images=12)
    text = (folder / "plan.jsonl").read_bytes()
    (folder / "plan.jsonl").unlink()
    assert make(folder, num_images=12)["made_now"] == 0
    assert (folder / "plan.jsonl").read_bytes() == text


@pytest.mark.parametrize("at", ["plan.jsonl", "run.json"])
def test_growing_that_is_stopped_goes_on(tmp_path, monkeypatch, at):
    folder, whole = tmp_path / "set", tmp_path / "whole"
    for one in (folder, whole):
        make(one)
    make(whole, num_images=12)

    def stopped(path, *more):
        if path.name == at:
            raise KeyboardInterrupt
        return write(path, *more)

    name = "write_atomic" if at == "plan.jsonl" else "write_json"
    write = getattr(stage, name)
    monkeypatch.setattr(stage, name, stopped)
    with pytest.raises(KeyboardInterrupt):
        make(folder, num_images=12)
    monkeypatch.undo()
    assert make(folder, num_images=12)["made_now"] == 5
    assert contents(folder) == contents(whole)


def test_a_set_that_grows_is_unfinished_until_its_end(tmp_path):
    """The list and masks of the smaller set are not taken for those of the larger one."""
    folder = tmp_path / "set"
    make(folder)
    label(folder, MASKS)
    with pytest.raises(RuntimeError, match="out of memory"):
        make(folder, FakeGenerator(crash_at=1), num_images=12)
    what = "its generation is not finished: 10 of 12 images are made"
    for use in (
        lambda: SegmentationFolder(folder, "train", SHAPES),
        lambda: report_dataset(folder),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=what):
            use()
    with pytest.raises(ValueError, match="2 of 12 samples are not generated yet"):
        label(folder, MASKS)
    make(folder, num_images=12)
    label(folder, MASKS)
    assert len(SegmentationFolder(folder, "train", SHAPES)) == 12
    assert len(read_json(folder / "SegmentationClass/masks.json")["sha256"]) == 12


def test_masks_of_the_smaller_set_are_named_as_such(tmp_path):
    """Synthesised to the end and not labelled again: some images have no mask."""
    folder = tmp_path / "set"
    make(folder)
    label(folder, MASKS)
    make(folder, num_images=12)
    with pytest.raises(FileNotFoundError, match=r"5 of the 12 of 'train' have none.* stage=label"):
        SegmentationFolder(folder, "train", SHAPES)


def test_other_prompts_cannot_be_added(tmp_path):
    """A source that orders all its prompts anew for another number has no old plan within the
    new one."""
    folder = tmp_path / "set"

    def backwards(taxonomy, number, seed):
        return Prompts(reversed(PROMPTS(taxonomy, number, seed)))

    make(folder, prompts=backwards)
    before = contents(folder)
    with pytest.raises(
        FileExistsError, match=r"first 7 prompts .* are not those of the set.*name="
    ):
        make(folder, num_images=12, prompts=backwards)
    assert contents(folder) == before


def test_shards_grow_a_set_together(tmp_path):
    folder, whole = tmp_path / "set", tmp_path / "whole"
    for one in (folder, whole):
        make(one)
    make(whole, num_images=12)
    with Lock(folder, (0, 2)), pytest.raises(Busy, match="other shards .* end"):
        make(folder, num_images=12, executor=Shard(index=1, count=2))
    beside = []

    class Second(FakeGenerator):
        def generate(self, samples):
            if not beside:  # the first shard has begun, the second one comes
                beside.append(make(folder, num_images=12, executor=Shard(index=0, count=2)))
            return super().generate(samples)

    assert make(folder, Second(), num_images=12, executor=Shard(index=1, count=2))["complete"]
    assert beside[0]["made_now"] and not beside[0]["complete"]
    assert contents(folder) == contents(whole)


def test_plan_hash_is_that_of_the_file(tmp_path):
    make(tmp_path / "set")
    assert plan_sha256(read_plan(tmp_path / "set")) == sha256(tmp_path / "set/plan.jsonl")
    assert units.read_run(tmp_path / "set")["identity"].get("grown") is None
