import csv
import hashlib
import json
import os
import subprocess
import sys

import pytest

from dd import provenance
from dd.provenance import differences, fingerprint, read_json, refuse_other, sha256, write_atomic, write_csv, write_json


def test_sha256_of_bytes_and_of_files(tmp_path):
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4's example
    data = bytes(range(256)) * 8192 + b"end"  # more than one piece of a megabyte
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == sha256(data) == hashlib.sha256(data).hexdigest()


def test_a_fingerprint_depends_on_the_value_and_not_on_its_order():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": "ä"}) == hashlib.sha256('{"a":"ä"}'.encode()).hexdigest()
    assert len({fingerprint(v) for v in ({"a": 1}, {"a": 2}, {"b": 1}, [1, 2], [2, 1], "1", 1)}) == 7


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]

    def no_space(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "half")
    with pytest.raises(OSError, match="no space"):
        write_atomic(tmp_path / "other.txt", "half")
    assert path.read_bytes() == b"\x00\x01"
    assert not (tmp_path / "other.txt").exists()


def test_json_there_and_back(tmp_path):
    value = {"name": "ä", "list": [1, 2.5, None, True]}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value
    assert "ä" in (tmp_path / "v.json").read_text(encoding="utf-8")


def test_unreadable_json_names_the_file(tmp_path):
    (tmp_path / "torn.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"torn\.json is not valid JSON"):
        read_json(tmp_path / "torn.json")
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        read_json(tmp_path / "missing.json")


def test_differences_name_every_leaf():
    old = {"a": 1, "b": {"c": 1, "d": 2}, "e": 5, "same": [1]}
    new = {"a": 1, "b": {"c": 1, "d": 3}, "f": {"g": 1}, "same": [1]}
    assert differences(old, new) == ["b.d: 2 -> 3", "e: 5 -> (absent)", "f: (absent) -> {'g': 1}"]
    assert differences(old, old) == []


def test_another_identity_is_refused_and_nothing_changes(tmp_path):
    path = tmp_path / "run" / "run.json"
    refuse_other(path, {"steps": 2}, "run")  # nothing there yet
    write_json(path, {"identity": {"steps": 2, "model": {"size": 64}}, "seconds": 3})
    before = path.read_bytes()
    refuse_other(path, {"model": {"size": 64}, "steps": 2}, "run")
    with pytest.raises(
        FileExistsError, match=r"run .*run was made with other settings:\n  model\.size: 64 -> 32\n.*name="
    ) as e:
        refuse_other(path, {"steps": 2, "model": {"size": 32}}, "run")
    assert "steps" not in str(e.value)
    assert path.read_bytes() == before


def test_made_by_says_versions_commit_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
    made = provenance.made_by()
    assert made["command"] == "train.py seed=1"
    assert made["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert set(provenance.PACKAGES) <= made["versions"].keys()
    assert json.dumps(made)


def test_an_absent_package_is_no_error(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-anywhere",))
    assert provenance.versions()["no-such-package-anywhere"] == "not installed"


def test_the_commit_carries_a_mark_when_files_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GIT_DIR", raising=False)
    assert provenance.git_commit(tmp_path) == ""

    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert provenance.git_commit(tmp_path) == head
    (tmp_path / "untracked").write_text("x")
    assert provenance.git_commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert provenance.git_commit(tmp_path) == head + "+"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_commit() == ""


def test_a_cell_of_a_table_is_no_formula(tmp_path):
    rows = [["file", "=1+1 pixels", "+a", "-b", "@c", "\tx", "a=b"], ["p.jpg", -3, -0.5, None, "", "1.5", "2"]]
    write_csv(tmp_path / "t.csv", rows)
    with open(tmp_path / "t.csv", newline="") as file:
        found = list(csv.reader(file))
    assert found[0] == ["file", "'=1+1 pixels", "'+a", "'-b", "'@c", "'\tx", "a=b"]
    assert found[1] == ["p.jpg", "-3", "-0.5", "", "", "1.5", "2"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_of_other_programs_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "a.json").write_bytes('{"name": "Maß 😀"}'.encode(encoding))
    assert read_json(tmp_path / "a.json") == {"name": "Maß 😀"}


def test_text_of_another_encoding_is_named(tmp_path):
    (tmp_path / "a.json").write_bytes('{"name": "Maß"}'.encode("latin-1"))
    (tmp_path / "b.json").write_bytes('{"name": "Maß"}'.encode("utf-16")[:-1])
    for name in ("a.json", "b.json"):
        with pytest.raises(ValueError, match=rf"{name} is no text in UTF-8 \(.* at byte \d+.*: save it as UTF-8"):
            read_json(tmp_path / name)
