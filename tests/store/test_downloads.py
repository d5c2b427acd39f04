import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from collections import namedtuple

import numpy as np
import pytest

from dd.store import downloads
from dd.store.downloads import Archive, fetch, obtain, unpack

DATA = (
    np.random.default_rng(0).integers(0, 256, 3_500_000, dtype=np.uint8).tobytes()
)  # more than three pieces of 1 MiB
SHA256 = hashlib.sha256(DATA).hexdigest()
FAST = {"pause": 0.0}


def zipped(files, mode=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode or 0o100644) << 16
            archive.writestr(info, data)
    return buffer.getvalue()


def tarred(files, kind=tarfile.REGTYPE, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = "" if kind == tarfile.REGTYPE else "/etc/passwd"
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def big(web):
    web.files["big.bin"] = DATA
    return Archive(web.url("big.bin"), None, 10**9)


# Downloading


def test_a_file_is_downloaded_once(web, big, tmp_path):
    path = fetch(big, tmp_path / "new", **FAST)
    assert path == tmp_path / "new/big.bin" and path.read_bytes() == DATA
    assert fetch(big, tmp_path / "new", **FAST) == path and len(web.asked) == 1
    assert [p.name for p in path.parent.iterdir()] == ["big.bin"]


def test_broken_connections_are_continued_where_they_broke(web, big, tmp_path):
    web.cuts = [1_200_000, 0, 0, 1_100_000]
    assert fetch(big, tmp_path, retries=3, pause=0.0).read_bytes() == DATA
    begins = [int(wanted[6:-1]) if wanted else 0 for _, wanted in web.asked]
    assert begins[0] == 0 and 0 < begins[1] == begins[2] == begins[3] < begins[4] < len(DATA)


def test_half_a_file_is_kept_for_the_next_run(web, big, tmp_path):
    web.cuts = [1_500_000, 0, 0]
    with pytest.raises(
        ConnectionError,
        match=r"broke 2 times at the same place .*kept in .*big\.bin\.part: run the command again",
    ):
        fetch(big, tmp_path, retries=1, pause=0.0)
    have = (tmp_path / "big.bin.part").stat().st_size
    assert have >= 1_000_000 and not (tmp_path / "big.bin").exists()
    web.asked.clear(), web.cuts.clear()
    assert fetch(big, tmp_path, **FAST).read_bytes() == DATA
    assert web.asked == [("/big.bin", f"bytes={have}-")]
    assert [p.name for p in tmp_path.iterdir()] == ["big.bin"]


def test_ctrl_c_keeps_what_has_come(web, big, tmp_path, monkeypatch):
    pieces = []

    class Stopping(downloads.Progress):
        def update(self, *arguments, **kwargs):
            pieces.append(kwargs)
            if len(pieces) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "Progress", Stopping)
    with pytest.raises(KeyboardInterrupt):
        fetch(big, tmp_path, **FAST)
    assert (tmp_path / "big.bin.part").stat().st_size == 2 << 20
    monkeypatch.undo()
    assert fetch(big, tmp_path, **FAST).read_bytes() == DATA
    assert web.asked[-1] == ("/big.bin", f"bytes={2 << 20}-")


def test_another_file_on_the_server_is_not_glued_to_the_old_half(web, big, tmp_path):
    web.cuts = [1_500_000, 0]
    with pytest.raises(ConnectionError):
        fetch(big, tmp_path, retries=0, pause=0.0)
    web.files["big.bin"], web.etag = DATA[::-1], '"2"'
    web.cuts.clear()
    assert fetch(big, tmp_path, **FAST).read_bytes() == DATA[::-1]


@pytest.mark.parametrize("trait", [{"ranges": False}, {"etag": None}, {"etag": 'W/"1"'}])
def test_servers_that_cannot_continue_begin_again(web, big, tmp_path, trait):
    vars(web).update(trait)
    web.cuts = [1_500_000]
    assert fetch(big, tmp_path, **FAST).read_bytes() == DATA


def test_a_part_that_is_whole_already(web, big, tmp_path):
    (tmp_path / "big.bin.part").write_bytes(DATA)
    (tmp_path / "big.bin.part.json").write_text(json.dumps({"version": web.etag}))
    assert fetch(big, tmp_path, **FAST).read_bytes() == DATA
    assert web.asked == [("/big.bin", f"bytes={len(DATA)}-")]
    (tmp_path / "big.bin").unlink()
    (tmp_path / "big.bin.part").write_bytes(DATA + b"more")
    (tmp_path / "big.bin.part.json").write_text(json.dumps({"version": web.etag}))
    assert fetch(big, tmp_path, **FAST).read_bytes() == DATA


def test_errors_of_the_server(web, big, tmp_path):
    web.status = 503
    with pytest.raises(ConnectionError, match="503"):
        fetch(big, tmp_path, retries=1, pause=0.0)
    assert len(web.asked) == 2
    web.status = 403
    with pytest.raises(FileNotFoundError, match="the server answers 403 .*--url"):
        fetch(big, tmp_path, **FAST)
    assert len(web.asked) == 3


def test_a_disk_that_is_too_small(big, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage(1000))
    with pytest.raises(OSError, match="0.0 GB to download, 0.0 GB free in"):
        fetch(big, tmp_path, **FAST)


# Checksums


@pytest.mark.parametrize("checksum", [f"sha256:{SHA256}", f"md5:{hashlib.md5(DATA).hexdigest()}"])
def test_a_known_checksum(big, tmp_path, checksum):
    assert fetch(Archive(big.url, checksum, 1), tmp_path, **FAST).read_bytes() == DATA


def test_a_wrong_checksum_keeps_nothing(big, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"another checksum than sha256:0{64} \(known for this archive\).*--checksum",
    ):
        fetch(Archive(big.url, "sha256:" + "0" * 64, 1), tmp_path, **FAST)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_placed_by_hand_that_is_damaged_is_told_of(big, tmp_path, capsys):
    archive = Archive(big.url, f"sha256:{SHA256}", 1)
    (tmp_path / "big.bin").write_bytes(DATA[:100])
    assert fetch(archive, tmp_path, **FAST).read_bytes() == DATA
    assert "big.bin has another checksum than sha256:" in capsys.readouterr().err
    fetch(archive, tmp_path, **FAST)
    assert capsys.readouterr().err == ""


def test_the_checksum_of_the_first_download_is_recorded_and_compared(web, tmp_path):
    web.files["a.zip"] = zipped({"top/pets/a.txt": "cat"})
    archive = Archive(web.url("a.zip"), None, 1000)
    obtain(archive, tmp_path / "downloads", tmp_path / "pets", "pets", **FAST)
    record = json.loads((tmp_path / "downloads/a.zip.json").read_text())
    assert (
        record["sha256"] == hashlib.sha256(web.files["a.zip"]).hexdigest()
        and record["url"] == archive.url
    )
    (tmp_path / "downloads/a.zip").write_bytes(b"damaged")  # is noticed, and downloaded again
    assert fetch(archive, tmp_path / "downloads", **FAST).read_bytes() == web.files["a.zip"]
    (tmp_path / "downloads/a.zip").unlink()
    web.files["a.zip"] = zipped({"top/pets/a.txt": "dog"})
    with pytest.raises(
        ValueError, match=r"recorded at the first download in .*a\.zip\.json.*delete .*a\.zip\.json"
    ):
        fetch(archive, tmp_path / "downloads", **FAST)


@pytest.mark.parametrize("url", ["ftp://x/a.zip", "/data/a.zip", "http://x/"])
def test_addresses_that_are_none(url):
    with pytest.raises(ValueError, match="expected http"):
        Archive(url, None, 1)


@pytest.mark.parametrize("checksum", ["0" * 32, "md5:00", "sha1:" + "0" * 40, "md5:" + "G" * 32])
def test_checksums_that_are_none(checksum):
    with pytest.raises(ValueError, match="expected md5: and 32 or sha256: and 64"):
        Archive("http://x/a.zip", checksum, 1)


# Unpacking


@pytest.mark.parametrize("name", ["a.zip", "a.tgz", "a.tar"])
def test_archives_are_unpacked(tmp_path, name):
    files = {"top/a.txt": b"cat", "top/deep/b.bin": bytes(5000)}
    data = (
        zipped(files) if name == "a.zip" else tarred(files, mode="w:gz" if name == "a.tgz" else "w")
    )
    (tmp_path / name).write_bytes(data)
    unpack(tmp_path / name, tmp_path / "out", 5003)
    assert {
        str(p.relative_to(tmp_path / "out")): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    } == files
    with pytest.raises(ValueError, match="unpacks to more than"):
        unpack(tmp_path / name, tmp_path / "less", 5002)


def test_a_tar_of_a_folder_itself_is_unpacked(tmp_path):
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets/a.txt").write_text("cat")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "pets", ".")
    unpack(tmp_path / "a.tar", tmp_path / "out", 1000)
    assert (tmp_path / "out/a.txt").read_text() == "cat"


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "C:/evil", "..\\evil"])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_members_that_leave_the_folder_are_refused(tmp_path, name, pack):
    (tmp_path / "bad").write_bytes(pack({"good": b"x", name: b"x"}))
    with pytest.raises((ValueError, tarfile.FilterError), match="evil"):
        unpack(tmp_path / "bad", tmp_path / "a/out", 1000)
    assert not list(tmp_path.rglob("*evil*")) and not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize(
    "data",
    [
        zipped({"link": "/etc/passwd"}, 0o120777),
        tarred({"link": b""}, tarfile.SYMTYPE),
        tarred({"link": b""}, tarfile.LNKTYPE),
        tarred({"link": b""}, tarfile.FIFOTYPE),
    ],
    ids=["zip", "symbolic", "hard", "fifo"],
)
def test_links_and_devices_are_refused(tmp_path, data):
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(ValueError, match="'link' is a link or special file"):
        unpack(tmp_path / "bad", tmp_path / "out", 1000)
    assert not list((tmp_path / "out").iterdir())


def test_a_member_larger_than_it_says(tmp_path):
    data = bytearray(zipped({"bomb": bytes(100_000)}))
    for at in (
        data.index(b"PK\3\4") + 22,
        data.index(b"PK\1\2") + 24,
    ):  # uncompressed size, local and central
        data[at : at + 4] = (10).to_bytes(4, "little")
    (tmp_path / "bad.zip").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        unpack(tmp_path / "bad.zip", tmp_path / "out", 1000)
    assert all(p.stat().st_size <= 10 for p in (tmp_path / "out").iterdir())


FILES = {f"{i}": np.random.default_rng(i).bytes(20_000) for i in range(3)}


@pytest.mark.parametrize(
    "whole", [zipped(FILES), tarred(FILES), tarred(FILES, mode="w")], ids=["zip", "tgz", "tar"]
)
@pytest.mark.parametrize("damage", ["half", "flipped", "text"])
def test_damaged_archives_are_named(tmp_path, whole, damage, request):
    data = {
        "half": whole[: len(whole) // 2],
        "text": b"<html>not found</html>",
        "flipped": bytearray(whole),
    }[damage]
    if damage == "flipped":
        if "tar]" in request.node.name.replace("-", "]"):
            data[100:160] = bytes(60)  # a plain tar has checksums in its heads only
        data[len(data) // 2] ^= 0xFF
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(
        ValueError, match="bad is damaged or incomplete .*Delete it and run the command again"
    ):
        unpack(tmp_path / "bad", tmp_path / "out", 10**6)


# Both


def test_the_folder_appears_at_once_and_whole(web, tmp_path):
    web.files["a.tgz"] = tarred({"benchmark/dataset/cls/a.mat": b"a", "benchmark/README": b"b"})
    target = tmp_path / "data/sbd"
    archive = Archive(web.url("a.tgz"), None, 1000)
    assert obtain(archive, tmp_path / "downloads", target, "dataset", **FAST) == target
    assert [str(p.relative_to(target)) for p in target.rglob("*")] == ["cls", "cls/a.mat"]
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["sbd"]


def test_a_failure_leaves_no_folder_and_records_no_checksum(web, tmp_path):
    web.files |= {"half.tgz": tarred(FILES)[:30_000], "other.tgz": tarred({"x/y": b"z"})}
    for name, message in (
        ("half.tgz", "damaged"),
        ("other.tgz", "has no folder 'dataset' in it: is it another archive"),
    ):
        with pytest.raises(ValueError, match=message):
            obtain(
                Archive(web.url(name), None, 10**6),
                tmp_path / "downloads",
                tmp_path / "sbd",
                "dataset",
                **FAST,
            )
        assert not (tmp_path / "downloads" / f"{name}.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["downloads"]
    shutil.rmtree(tmp_path / "downloads")
