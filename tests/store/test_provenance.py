import csv
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from dd.store import provenance
from dd.store.provenance import (
    differences,
    fault,
    fingerprint,
    quoted,
    read_json,
    read_own,
    refuse_other,
    sha256,
    shortened,
    sweep,
    sweep_beside,
    temporary_files,
    write_atomic,
    write_csv,
    write_json,
)


def test_sha256_of_bytes_and_of_files(tmp_path):
    assert (
        sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # FIPS 180-4's example
    data = bytes(range(256)) * 8192 + b"end"  # more than one piece of a megabyte
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == sha256(data) == hashlib.sha256(data).hexdigest()


def test_a_fingerprint_depends_on_the_value_and_not_on_its_order():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": "ä"}) == hashlib.sha256('{"a":"ä"}'.encode()).hexdigest()
    assert (
        len({fingerprint(v) for v in ({"a": 1}, {"a": 2}, {"b": 1}, [1, 2], [2, 1], "1", 1)}) == 7
    )


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
        FileExistsError,
        match=r"run .*run was made with other settings:\n  model\.size: 64 -> 32\n.*name=",
    ) as e:
        refuse_other(path, {"steps": 2, "model": {"size": 32}}, "run")
    assert "steps" not in str(e.value)
    assert path.read_bytes() == before


def test_made_by_says_versions_commit_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
    made = provenance.made_by()
    assert made["command"] == "python train.py seed=1"
    assert made["versions"]["python"].startswith(
        f"{sys.version_info.major}.{sys.version_info.minor}"
    )
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
        return subprocess.run(
            ["git", *who, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

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


def test_an_installation_in_the_checkout_of_something_else_has_no_commit(tmp_path):
    """As .venv/lib/.../dd in a project: nothing of it is in that repository."""
    who = ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
    (tmp_path / ".gitignore").write_text(".venv\n")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "one"]):
        subprocess.run(["git", *who, *command], check=True, cwd=tmp_path)
    (tmp_path / ".venv/dd").mkdir(parents=True)
    (tmp_path / ".venv/dd/file.py").write_text("")
    assert provenance.git_commit(tmp_path) and provenance.git_commit(tmp_path / ".venv/dd") == ""


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_commit() == ""


def test_a_cell_of_a_table_is_no_formula(tmp_path):
    rows = [
        ["file", "=1+1 pixels", "+a", "-b", "@c", "\tx", "a=b"],
        ["p.jpg", -3, -0.5, None, "", "1.5", "2"],
    ]
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
        with pytest.raises(
            ValueError, match=rf"{name} is not valid UTF-8 \(.* at byte \d+.*: save it as UTF-8"
        ):
            read_json(tmp_path / name)


def test_a_json_file_of_ours_shows_every_changed_byte_of_its_content(tmp_path):
    path, value = (
        tmp_path / "run.json",
        {"identity": {"seed": 1, "names": ["cat"]}, 3: (1.5, None), "ä": float("inf")},
    )
    write_json(path, value)
    read = {"identity": {"seed": 1, "names": ["cat"]}, "3": [1.5, None], "ä": float("inf")}
    assert read_json(path) == read
    sound, seen = path.read_bytes(), 0
    for at in range(len(sound)):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        try:  # what is still read is the same content: a blank, or the name of the checksum
            assert {k: v for k, v in read_json(path).items() if k in read} == read
        except ValueError as error:
            assert str(path) in str(error)
            seen += 1
    assert seen > 0.7 * len(sound)
    path.write_text(sound.decode().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(ValueError, match="is damaged, or was edited.*remove that line"):
        read_json(path)


def test_the_checksum_counts_wherever_it_stands(tmp_path):
    path = tmp_path / "run.json"
    provenance.write_json(path, {"a": 1})
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 2}))
    with pytest.raises(ValueError, match=r"run.json is damaged, or was edited"):
        provenance.read_json(path)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdef", "bcdefg", strict=True)
)


def test_a_yaml_file_whose_aliases_have_no_end(tmp_path):
    """Ten lines stand for ten million values: refused before anything walks through them."""
    (tmp_path / "sound.yaml").write_bytes("\ufeffa: &a [1, µ]\nb: *a\nc: {<<: {d: 1}}\n".encode())
    assert provenance.read_yaml(tmp_path / "sound.yaml") == {
        "a": [1, "µ"],
        "b": [1, "µ"],
        "c": {"d": 1},
    }
    (tmp_path / "empty.yaml").write_text("")
    assert provenance.read_yaml(tmp_path / "empty.yaml") is None
    for text in (
        BOMB,
        "&a [*a]",
        "a: &a {b: *a}",
        "[" * 3000,
        "a: b: c",
        "x: !!python/object:os.system ls",
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"bad.yaml is not valid YAML: "):
            provenance.read_yaml(tmp_path / "bad.yaml")


def test_files_of_others_and_of_earlier_versions_have_no_checksum(tmp_path):
    for text, value in (('{"a": 1}', {"a": 1}), ("[1]", [1]), ("{}", {})):
        (tmp_path / "a.json").write_text(text)
        assert read_json(tmp_path / "a.json") == value


SCHEMA = {"id": str, "sizes": [int], "more?": {"*": (float, None)}, "any": object}


@pytest.mark.parametrize(
    "value, wrong",
    [
        ({"id": "a", "sizes": [1, 2], "any": 5, "other": 1}, None),
        ({"id": "a", "sizes": [], "any": None, "more": {"x": 1, "y": None, "z": 0.5}}, None),
        (5, "the whole value is 5, expected an object"),
        ({"id": "a", "sizes": []}, "any is missing"),
        ({"id": None, "sizes": [], "any": 1}, "id is None, expected a text"),
        ({"id": "a", "sizes": [1, True], "any": 1}, "sizes.1 is True, expected a whole number"),
        ({"id": "a", "sizes": {"0": 1}, "any": 1}, "sizes is an object of 1, expected a list"),
        (
            {"id": "a", "sizes": [], "any": 1, "more": {"x": "1"}},
            "more.x is '1', expected a number or null",
        ),
        (
            {"id": 10**300, "sizes": [], "any": 1},
            "id is 1" + "0" * 79 + " ... 0000000000, expected a text",
        ),
    ],
)
def test_a_file_of_ours_says_which_field_is_wrong(tmp_path, value, wrong):
    assert fault(value, SCHEMA) == wrong
    (tmp_path / "own.json").write_text(json.dumps(value))
    if wrong is None:
        assert read_own(tmp_path / "own.json", SCHEMA) == value
    else:
        with pytest.raises(
            ValueError, match=re.escape(f"own.json is damaged: {wrong}. Restore it")
        ):
            read_own(tmp_path / "own.json", SCHEMA)


def test_what_is_quoted_is_short():
    assert (
        quoted("cat") == "'cat'"
        and len(quoted("c" * 10**6)) < 120
        and len(quoted([1] * 10**6)) < 120
    )
    assert shortened("one\ntwo") == "one\ntwo"
    long = shortened("begin " + "x" * 10**6 + " end")
    assert (
        long.startswith("begin xxx")
        and long.endswith("x end")
        and " 998,510 characters " in long
        and len(long) < 1600
    )
    lines = shortened("\n".join(map(str, range(10**5)))).split("\n")
    assert (
        lines[0] == "0"
        and lines[-1] == "99999"
        and "... 99,900 lines ..." in lines
        and len(lines) == 101
    )


def test_temporary_files_of_writers_that_are_gone_are_swept_and_others_stay(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [tmp_path / "a" / f".000004.png.{gone.pid}.tmp", tmp_path / f".b.json.{os.getpid()}.tmp"]
    others = tmp_path / f".b.json.{os.getppid()}.tmp"  # that is alive
    kept = [tmp_path / ".b.tmp", tmp_path / f"b.json.{gone.pid}.tmp"]
    for path in [*left, others, *kept]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    assert sorted(temporary_files(tmp_path)) == sorted([*left, others])
    sweep_beside(tmp_path / "b.json", tmp_path / "no" / "folder")
    assert left[0].exists() and others.exists() and not left[1].exists()
    sweep(tmp_path)
    assert not left[0].exists() and not others.exists() and all(path.exists() for path in kept)


def test_the_doors_repeat_no_long_input(capsys):
    from dd.__main__ import main

    assert main(["verify", "x" * 10**6]) != 0
    assert len(capsys.readouterr().err) < 3000
