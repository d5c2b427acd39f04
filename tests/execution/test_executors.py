import errno
import io
import json
import signal
from functools import partial

import pytest

from benchmarks.synthesis import synthesize
from dd import config
from dd.execution import Local, Shard, UnitsFailed
from dd.execution.base import stopped_by_signal
from dd.store.locks import Busy, Lock
from dd.store.progress import Progress
from dd.store.samples import append_records, outcomes, read_records
from dd.taxonomy import Taxonomy
from tests.faults import fake
from tests.faults.runs import contents

PETS = Taxonomy("pets", ["cat", "dog", "cow"])


def make(folder, executor=None, images=8, **settings):
    generator, build = fake.FakeGenerator(**settings), partial(fake.build, **settings)
    return synthesize(
        folder, generator, fake.prompts, PETS, images, 1, 2, "png", executor=executor, build=build
    )


@pytest.fixture
def whole(tmp_path):
    make(tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.mark.full  # a worker that is started from a test imports torch
@pytest.mark.parametrize("spread", [Local(workers=2), Local(spawn=True)])
def test_workers_make_what_one_process_makes(tmp_path, whole, spread):
    assert make(tmp_path / "set", spread)["complete"]
    assert contents(tmp_path / "set") == whole


@pytest.mark.full
def test_bad_images_are_drawn_again_by_workers_too(tmp_path):
    counts = (
        make(tmp_path / "one", bad_share=0.4),
        make(tmp_path / "two", Local(workers=2), bad_share=0.4),
    )
    assert counts[0]["drawn_again"] == counts[1]["drawn_again"] > 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.full
def test_a_worker_that_dies_is_started_again(tmp_path, whole, capsys):
    trap = tmp_path / "trap"
    trap.touch()
    assert make(tmp_path / "set", Local(workers=2), deadly=[1], trap=trap)["complete"]
    assert contents(tmp_path / "set") == whole
    assert "unit 1, attempt 1: worker" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_a_unit_that_always_fails_is_quarantined_and_made_when_it_can_be(
    tmp_path, whole, workers, capsys
):
    done = make(tmp_path / "set", Local(workers=workers, max_failed=0.25, attempts=2), broken=[1])
    assert (done["quarantined"], done["images"], done["complete"]) == (2, 6, True)
    records = read_records(tmp_path / "set")
    assert all(
        "RuntimeError: unit 1 is poisoned" in records[i]["error"] for i in ("000002", "000003")
    )
    assert capsys.readouterr().out.count("is poisoned") == 2
    assert "000002" not in (tmp_path / "set/ImageSets/Segmentation/train.txt").read_text()
    assert make(tmp_path / "set", Local())["made_now"] == 2
    assert contents(tmp_path / "set") == whole


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.full)])
def test_more_failed_units_than_allowed_end_the_run(tmp_path, whole, workers):
    with pytest.raises(
        UnitsFailed,
        match=r"(?s)2 of 4 units failed 2 times, more than executor.max_failed=0.25.*poisoned",
    ):
        make(tmp_path / "set", Local(workers=workers, max_failed=0.25, attempts=2), broken=[1, 2])
    assert make(tmp_path / "set")["complete"]
    assert contents(tmp_path / "set") == whole


@pytest.mark.full
def test_a_worker_with_another_generator_is_refused(tmp_path):
    with pytest.raises(ValueError, match="(?s)could not start: .*guidance: 3.0 -> 9.0"):
        synthesize(
            tmp_path / "set",
            fake.FakeGenerator(),
            fake.prompts,
            PETS,
            8,
            1,
            2,
            "png",
            executor=Local(workers=2),
            build=partial(fake.build, guidance=9.0),
        )


def test_shards_are_disjoint_and_together_everything(tmp_path, whole):
    units = list(range(11))
    parts = [Shard(index=i, count=3).share(units) for i in range(3)]
    assert sorted(sum(parts, [])) == units
    first = make(tmp_path / "set", Shard(index=1, count=2))
    assert (first["complete"], first["made_now"]) == (False, 4) and not (
        tmp_path / "set/ImageSets"
    ).exists()
    assert make(tmp_path / "set", Shard(index=0, count=2))["complete"]
    assert contents(tmp_path / "set") == whole


SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "5"}


@pytest.mark.parametrize(
    ("environment", "given", "shard"),
    [
        ({}, (2, 5), (2, 5)),
        (SLURM, (), (3, 5)),
        (SLURM, (None, 9), (7, 9)),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_STEP": "2"}, (), (2, 5)),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (), (1, 4)),
    ],
)
def test_where_a_shard_gets_its_number(monkeypatch, environment, given, shard):
    for key in ("SLURM_ARRAY_TASK_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    executor = Shard(**dict(zip(("index", "count"), given, strict=False)))
    assert executor.shard == shard
    assert executor.places("cuda") == (
        ["cuda:1"] if "LOCAL_RANK" in environment else executor.places("cuda")
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "0 <= index < count"),
        ({"index": 0}, "0 <= index < count"),
        ({"index": 2, "count": 2}, "0 <= index < count"),
        ({"index": -1, "count": 2}, "executor.index=-1: expected a whole number of 0 or more"),
        ({"index": "0", "count": 2}, "executor.index='0': expected a whole number of 0 or more"),
    ],
)
def test_a_shard_without_a_place_is_refused(monkeypatch, given, message):
    for key in ("SLURM_ARRAY_TASK_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(ValueError, match=message):
        Shard(**given)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"workers": 0}, "workers"),
        ({"attempts": 0}, "attempts"),
        ({"threads": 1.5}, "threads"),
        ({"max_failed": 2}, "max_failed"),
        ({"devices": "cuda:0"}, "devices"),
    ],
)
def test_settings_that_make_no_sense(settings, named):
    with pytest.raises(ValueError, match=f"executor.{named}="):
        Local(**settings)


def test_workers_are_spread_over_devices():
    assert Local(workers=3, devices=["cuda:0", "cuda:1"]).places("cpu") == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
    ]
    assert Local().places("cpu") == ["cpu"] and Local(workers=2).places("cuda:1") == ["cuda:1"] * 2


# Locks


def test_locks(tmp_path):
    with Lock(tmp_path), pytest.raises(Busy, match="is being written by process"), Lock(tmp_path):
        pass
    with Lock(tmp_path, (0, 2)) as first, Lock(tmp_path, (1, 2)) as second:
        assert not first.alone() and not second.alone()
        with pytest.raises(Busy, match="executor.count=2"), Lock(tmp_path, (0, 3)):
            pass
    with Lock(tmp_path, (1, 2)) as one:
        assert one.alone()
    assert not list(tmp_path.iterdir())


def test_what_a_dead_process_left_is_no_lock(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 4_000_000, "host": "elsewhere", "count": 9}))
    with Lock(tmp_path):
        pass
    (tmp_path / ".lock").write_text("half a li")
    with Lock(tmp_path, (0, 1)):
        pass
    assert not list(tmp_path.iterdir())


# Records, progress, exit codes


def test_a_good_record_counts_more_than_a_quarantine(tmp_path):
    append_records(tmp_path, "0", [{"id": "a", "unit": 0}])
    append_records(
        tmp_path,
        "1",
        [{"id": "a", "unit": 0, "failed": True, "error": "x"}, {"id": "b", "error": "y"}],
    )
    assert outcomes(tmp_path) == {"a": "good", "b": "quarantined"}
    assert "error" not in read_records(tmp_path)["a"]


def test_progress_in_a_log_file_is_plain_lines(monkeypatch):
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr("dd.store.progress.time.monotonic", lambda: now[0])
    with Progress("generate", 100, 20, every=10, stream=stream) as progress:
        for _ in range(8):
            now[0] += 4
            progress.advance(2)
        progress.fail("unit 3, attempt 1: out of memory")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "generate: 26 of 100 images, 0.50 images/s, 0:02:28 left"
    assert lines[-2:] == [
        "generate: unit 3, attempt 1: out of memory",
        "generate: 36 of 100 images, 0.50 images/s, 0:02:08 left, 1 failed attempt",
    ]
    assert len(lines) == 4 and "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(), 2),
        (UnitsFailed(), 3),
        (OSError(errno.ENOSPC, "full"), 4),
        (OSError(errno.EROFS, "read-only"), 4),
        (PermissionError(errno.EACCES, "no"), 4),
        (Busy(), 5),
        (ConnectionError(), None),
        (FileExistsError(), 2),
    ],
)
def test_exit_codes(error, code):
    assert config.exit_code(error) == code


@pytest.mark.parametrize("other", [None, 1])
def test_a_signal_ends_with_its_own_code_whatever_a_library_makes_of_it(other, capsys):
    """Ray turns every exit that it sees while it waits into 1."""
    with pytest.raises(SystemExit) as end, stopped_by_signal():
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit:
            if other is None:
                raise
            raise SystemExit(other) from None
    assert end.value.code == 143
    assert "The same command resumes from here" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end, stopped_by_signal():
        raise SystemExit(2)  # nobody sent a signal
    assert end.value.code == 2
