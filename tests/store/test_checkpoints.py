"""Files that a crash or a bad disk cannot make a training go on from."""

import hashlib
import os
import struct
import subprocess

import pytest
import torch

from dd.store import checkpoints


def content(step):
    return {"global_step": step, "state_dict": {"w": torch.arange(1000.0) + step}}


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, of steps 1 and 2."""
    for step in (1, 2):
        checkpoints.save(content(step), tmp_path / "last.ckpt")
    return tmp_path


def step_of(path):
    return checkpoints.load(path)["global_step"]


def flip(path, place=-2000):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_the_one_before_is_kept_and_each_has_a_checksum(folder):
    assert step_of(folder / "last.ckpt") == 2 and step_of(folder / "previous.ckpt") == 1
    assert {p.name for p in folder.iterdir()} == {"last.ckpt", "previous.ckpt", "SHA256SUMS"}
    for digest, name in checkpoints.sums(folder):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    checkpoints.save(content(3), folder / "last.ckpt")
    assert step_of(folder / "last.ckpt") == 3 and step_of(folder / "previous.ckpt") == 2


def test_the_checksums_are_those_of_sha256sum(folder):
    checkpoints.save(content(9), folder / "best.ckpt")
    checkpoints.save(content(8), folder / "best.ckpt")
    assert step_of(folder / "best.ckpt") == 8 and step_of(folder / "previous.ckpt") == 1
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count(": OK") == 3, done


@pytest.mark.parametrize(
    "harm", [flip, lambda p: p.write_bytes(p.read_bytes()[:-300]), lambda p: p.write_bytes(b"")]
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(folder, harm):
    assert checkpoints.newest(folder) == (folder / "last.ckpt", "")
    harm(folder / "last.ckpt")
    path, warning = checkpoints.newest(folder)
    assert path == folder / "previous.ckpt" and step_of(path) == 1
    assert warning.startswith(f"warning: {folder / 'last.ckpt'} is damaged (its SHA-256 is not")
    assert warning.endswith(f"resuming from the one before, {path}")
    checkpoints.save(content(3), folder / "last.ckpt")
    assert (
        step_of(folder / "last.ckpt") == 3 and step_of(folder / "previous.ckpt") == 1
    )  # not replaced by the damaged one
    assert (folder / "damaged.ckpt").is_file() and checkpoints.newest(folder) == (
        folder / "last.ckpt",
        "",
    )


def test_only_damaged_checkpoints_are_an_error_that_says_what_to_do(folder):
    for name in ("last.ckpt", "previous.ckpt"):
        flip(folder / name)
    with pytest.raises(
        ValueError,
        match=r"last\.ckpt is damaged.*previous\.ckpt is damaged.*Restore a copy of one of them",
    ):
        checkpoints.newest(folder)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged \(its SHA-256"):
        checkpoints.load(folder / "last.ckpt")


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path):
    assert checkpoints.newest(tmp_path / "nowhere") == (None, "")


@pytest.mark.parametrize(
    ("harm", "wrong"),
    [
        (None, None),
        (flip, "wrong checksum of its part"),
        (lambda p: p.write_bytes(p.read_bytes()[:-300]), "not a complete file"),
        (lambda p: p.write_bytes(b""), "not a complete file"),
        (lambda p: p.write_bytes(b"x" * 5000), "not a complete file"),
    ],
)
def test_a_checkpoint_without_a_recorded_sum_is_judged_by_the_sums_inside(tmp_path, harm, wrong):
    path = tmp_path / "last.ckpt"
    torch.save(content(5), path)
    if harm is None:
        assert step_of(path) == 5 and checkpoints.newest(tmp_path) == (path, "")
        checkpoints.save(content(6), path)  # the next one finds it, and gives it a sum
        assert {name for _, name in checkpoints.sums(tmp_path)} == {"last.ckpt", "previous.ckpt"}
        assert step_of(tmp_path / "previous.ckpt") == 5
    else:
        harm(path)
        assert wrong in checkpoints.damage(path)
        with pytest.raises(ValueError, match="last.ckpt is damaged"):
            checkpoints.newest(tmp_path)


class Crash(BaseException):
    """What is not caught by anything: the process is gone."""


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("number", range(5))
def test_a_crash_at_any_moment_of_writing_leaves_a_sound_checkpoint(
    folder, monkeypatch, call, number
):
    real, seen = getattr(os, call), []

    def crash(*arguments):
        if len(seen) == number:
            raise Crash
        seen.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(os, call, crash)
    crashed = False
    try:
        checkpoints.save(content(3), folder / "last.ckpt")
    except Crash:
        crashed = True
    monkeypatch.undo()
    assert crashed == (number < {"replace": 5, "fsync": 3}[call])
    path, warning = checkpoints.newest(folder)
    assert warning == "" and step_of(path) in (2, 3)
    for name in ("last.ckpt", "previous.ckpt"):
        assert not (folder / name).exists() or checkpoints.damage(folder / name) is None
    checkpoints.tidy(folder)
    checkpoints.save(content(4), folder / "last.ckpt")
    assert step_of(folder / "last.ckpt") == 4
    assert {p.name for p in folder.iterdir()} == {"last.ckpt", "previous.ckpt", "SHA256SUMS"}


def test_half_written_files_are_tidied_up_and_nothing_else(folder):
    for name in (".last.next.99.tmp", "last.next", ".SHA256SUMS.99.tmp"):
        (folder / name).write_bytes(b"half")
    (folder / "mine.txt").write_text("kept")
    checkpoints.tidy(folder)
    assert {p.name for p in folder.iterdir()} == {
        "last.ckpt",
        "previous.ckpt",
        "SHA256SUMS",
        "mine.txt",
    }


def test_a_broken_list_of_sums_is_no_traceback(folder):
    (folder / "SHA256SUMS").write_bytes(b"\xff\x00garbage\n\nab  last.ckpt\n")
    assert checkpoints.newest(folder) == (folder / "last.ckpt", "")


# The hash of the tensors themselves


def test_weights_have_the_hash_of_their_names_kinds_shapes_and_values():
    state = {
        "b.bias": torch.tensor([1.5, -2.0]),
        "a.count": torch.tensor(7),
        "c": torch.tensor([[1.0]], dtype=torch.bfloat16),
        "d": torch.zeros(0, 2, dtype=torch.bool),
    }
    expected = b'["a.count", "int64", []]\n' + struct.pack("<q", 7)
    expected += b'["b.bias", "float32", [2]]\n' + struct.pack("<2f", 1.5, -2.0)
    expected += b'["c", "bfloat16", [1, 1]]\n' + b"\x80\x3f" + b'["d", "bool", [0, 2]]\n'
    assert checkpoints.weights_sha256(state) == hashlib.sha256(expected).hexdigest()


def test_the_hash_of_weights_is_that_of_the_tensors_and_not_of_a_file():
    image = torch.arange(24.0).view(1, 2, 3, 4)
    state = {"w": image, "n": torch.tensor(3)}
    same = {"n": torch.tensor(3), "w": image.to(memory_format=torch.channels_last)}
    assert checkpoints.weights_sha256(same) == checkpoints.weights_sha256(state)
    for other in (
        {**state, "w": image + 1e-5 * (image == 5)},
        {**state, "w": image.double()},
        {**state, "w": image.view(1, 2, 4, 3)},
        {"v": image, "n": state["n"]},
        {"w": image},
        {**state, "n": torch.tensor(4)},
    ):
        assert checkpoints.weights_sha256(other) != checkpoints.weights_sha256(state)
