from unicodedata import normalize

import pytest

from dd.data.datasets import READ_SUFFIXES
from dd.data.folders import (
    IMAGES,
    MASKS,
    Finder,
    grown_splits,
    index,
    listed_splits,
    shared_splits,
    walk,
)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_files_by_stem_with_their_folders(tmp_path):
    touch(tmp_path, "b c.JPG", "day/a.jpeg", "night/a.png", "notes.txt", "a.v2.tif")
    found = index(tmp_path, IMAGES)
    assert (
        list(found) == ["a.v2", "b c", "day/a", "night/a"] and found["b c"] == tmp_path / "b c.JPG"
    )


def test_what_macos_lays_beside_files_is_no_file(tmp_path):
    assert list(index(touch(tmp_path, "a.png", "._a.png", "._b.jpg"), IMAGES)) == ["a"]


def test_a_name_that_is_no_utf8_is_shown(tmp_path):
    try:
        touch(tmp_path, "halle_\udcfc.jpg")
    except OSError:
        pytest.xfail("this file system takes names in UTF-8 alone")
    with pytest.raises(ValueError, match=r"halle_\\udcfc.jpg' is not UTF-8 .*: rename it"):
        index(tmp_path, IMAGES)


def test_endings_of_masks(tmp_path):
    touch(tmp_path, "a_mask.png", "b_mask.png", "b.png", "c.jpg")
    assert list(index(tmp_path, MASKS, "_mask")) == ["a", "b"]


def test_what_is_found_can_be_read():
    assert {*IMAGES, *(s.upper() for s in IMAGES)} <= {*READ_SUFFIXES}
    assert ".jpg" not in MASKS


def test_folders_without_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        index(tmp_path / "nowhere", IMAGES)
    with pytest.raises(
        FileNotFoundError, match=r"no file \*_mask with \.png, \.bmp, \.tif, \.tiff in"
    ):
        index(touch(tmp_path, "a.png"), MASKS, "_mask")
    with pytest.raises(ValueError, match=r"a\.jpg and .*a\.png have the same stem, .*: rename one"):
        index(touch(tmp_path, "a.jpg"), IMAGES)


def test_names_as_others_write_them():
    find = Finder(["a", "day/b", "night/b", "day/c.v2", "d e"])
    for written, found in {
        "a": "a",
        "a.jpg": "a",
        "a.JPG": "a",
        "JPEGImages/a.jpg": "a",
        "c:\\x\\a.png": "a",
        " a.jpg\n": "a",
        "day/b.png": "day/b",
        "day\\b.png": "day/b",
        "c.v2": "day/c.v2",
        "c.v2.jpg": "day/c.v2",
        "d e.jpg": "d e",
        "f": None,
        "c": None,
        "../../a.gif": None,
    }.items():
        assert find(written) == found, written
    with pytest.raises(ValueError, match="'b.jpg' may be any of day/b, night/b"):
        find("b.jpg")


def test_a_name_in_another_folder_is_another_file(tmp_path):
    find = Finder(["cam2/a", "cam2/b", "c", "deep/cam1/d", "cam1/d"])
    assert (
        find("cam1/a.jpg") is None
        and find("cam2/a.jpg") == "cam2/a"
        and find("x/cam2/b") == "cam2/b"
    )
    assert find.near("cam1/a.jpg") == "'cam1/a.jpg' (another folder has 'cam2/a')"
    assert find.near("cam1/e.jpg") == "'cam1/e.jpg'"
    assert find("cam1/d") == "cam1/d" and find("x/deep/cam1/d.png") == "deep/cam1/d"
    assert find("cam1/c.jpg") == "c"  # --images may be the folder cam1 itself, but not cam2 too
    with pytest.raises(
        ValueError, match="cam1/c and cam2/c are two files, and both would be the image 'c'"
    ):
        find("cam2/c.jpg")
    (tmp_path / "val.txt").write_text("cam1/a.jpg\n")
    with pytest.raises(
        ValueError, match=r"1 of 1 lines name no .* 'cam1/a.jpg' \(another folder has 'cam2/a'\)"
    ):
        listed_splits({"val": tmp_path / "val.txt"}, ["cam2/a", "b"])


def test_names_that_label_studio_changed_at_the_upload():
    find = Finder(["my photo (1)", "day/b-c", "Maß 2", "x 1", "x_1"])
    for written, found in {
        "upload/3/1a2b3c4d-my_photo_1.jpg": "my photo (1)",
        "/data/upload/12/b-c.PNG": "day/b-c",
        "images/1a2b3c4d-b-c.jpg": "day/b-c",
        "1a2b3c4d-Maß_2.jpg": "Maß 2",
        "cam/1a2b3c4d-b-c.jpg": None,
        "1a2b3c4d-x_1.jpg": None,
        "b-c.jpg": None,
        "my_photo_1.jpg": None,
        "1a2b3c4d-": None,
    }.items():
        assert find.upload(written) == found, written


def test_names_in_either_form_of_their_letters(tmp_path):
    whole, apart = normalize("NFC", "Maß_é"), normalize("NFD", "Maß_é")
    assert whole != apart
    assert Finder([apart])(f"{whole}.jpg") == apart and Finder([whole])(apart) == whole
    touch(tmp_path, f"{apart}_mäsk.png")
    assert [normalize("NFC", n) for n in index(tmp_path, MASKS, normalize("NFC", "_mäsk"))] == [
        whole
    ]
    touch(tmp_path / "two", f"{whole}.png", f"{apart}.png")
    if len(list((tmp_path / "two").iterdir())) == 2:  # a file system that keeps them apart
        with pytest.raises(ValueError, match="have the same stem"):
            index(tmp_path / "two", MASKS)


def test_linked_folders_are_followed_each_once(tmp_path):
    touch(tmp_path / "disk2", "d.jpg", "deep/e.jpg")
    photos = touch(tmp_path / "photos", "a.jpg", "own/b.jpg")
    (photos / "again").symlink_to(photos / "own")  # a folder that is here anyway keeps its name
    (photos / "more").symlink_to(tmp_path / "disk2")
    (photos / "twice").symlink_to(tmp_path / "disk2")
    (tmp_path / "disk2/round").symlink_to(photos)
    (photos / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert list(index(photos, IMAGES)) == ["a", "more/d", "more/deep/e", "own/b"]


def test_hidden_files_are_passed_over_and_counted(tmp_path):
    touch(
        tmp_path,
        "a.jpg",
        ".ipynb_checkpoints/a-checkpoint.jpg",
        ".Trash/b.jpg",
        ".c.jpg",
        "@eaDir/a.jpg/THUMB.jpg",
    )
    touch(tmp_path, "._a.jpg", "__MACOSX/._a.jpg", ".git/notes.txt")
    found = index(tmp_path, IMAGES)
    assert list(found) == ["a"]
    assert found.notes == [
        f"4 hidden files in {tmp_path} are passed over, such as {tmp_path / '.Trash/b.jpg'}"
    ]
    assert list(index(touch(tmp_path / ".cache/photos", "a.jpg"), IMAGES)) == [
        "a"
    ]  # asked for by name
    assert len(walk(tmp_path)[1]) == 8


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lists_in_every_encoding_that_says_what_it_is(tmp_path, encoding):
    (tmp_path / "val.txt").write_bytes("Maß\r\n b.jpg \r\n".encode(encoding))
    splits, _ = listed_splits({"val": tmp_path / "val.txt"}, ["Maß", "b", "c"])
    assert splits == {"train": ["c"], "val": ["Maß", "b"]}


def test_a_list_in_another_encoding_is_named(tmp_path):
    (tmp_path / "val.txt").write_bytes("Maß\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"val\.txt is not valid UTF-8 \(.*\): save it as UTF-8"):
        listed_splits({"val": tmp_path / "val.txt"}, ["Maß", "c"])


def test_splits_from_lists(tmp_path):
    (tmp_path / "train.txt").write_text("a.jpg\n\nx/b.jpg\na\n")
    (tmp_path / "val.txt").write_text("c\n")
    files = {"train": tmp_path / "train.txt", "val": tmp_path / "val.txt"}
    splits, notes = listed_splits(files, ["a", "b", "c", "d"])
    assert splits == {"train": ["a", "b"], "val": ["c"]} and notes == [
        "1 labelled images are in no split"
    ]
    assert listed_splits(files, ["a", "b", "c"])[1] == []
    only = {"val": files["val"]}  # kept from before: the rest, new labels too, is trained on
    assert listed_splits(only, ["a", "b", "c", "d"]) == (
        {"train": ["a", "b", "d"], "val": ["c"]},
        [],
    )
    with pytest.raises(ValueError, match="none is left for train"):
        listed_splits(only, ["c"])
    (tmp_path / "val.txt").write_text("c\nb\n")
    with pytest.raises(ValueError, match=r"splits train and val share 1 images, such as \['b'\]"):
        listed_splits(files, ["a", "b", "c"])
    with pytest.raises(
        ValueError,
        match=r"split train \(.*\): 2 of 3 lines name no labelled image, such as 'a.jpg', 'a'$",
    ):
        listed_splits(files, ["b", "c"])
    (tmp_path / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match="split val .* is empty"):
        listed_splits(files, ["a", "b", "c"])
    with pytest.raises(FileNotFoundError, match="split test: no file"):
        listed_splits({"test": tmp_path / "test.txt"}, ["a"])


def test_splits_by_share_are_disjoint_and_seeded():
    ids = [f"{i:03d}" for i in range(100)]
    splits = shared_splits({"val": 0.2, "tune": 0.1}, ids, 0)
    assert {k: len(v) for k, v in splits.items()} == {"train": 70, "val": 20, "tune": 10}
    assert sorted(sum(splits.values(), [])) == ids
    assert shared_splits({"val": 0.2, "tune": 0.1}, ids[::-1], 0) == splits
    assert (
        shared_splits({"val": 0.2}, ids, 1)["val"]
        != shared_splits({"val": 0.2}, ids, 0)["val"]
        == splits["val"]
    )
    more = shared_splits({"val": 0.2}, [*ids, "100"], 0)["val"]
    assert len(set(more) ^ set(splits["val"])) <= 2


@pytest.mark.parametrize(
    "shares", [{"val": 0}, {"val": 1}, {"val": 0.6, "test": 0.4}, {"train": 0.5}, {"val": -0.1}]
)
def test_shares_that_make_no_sense(shares):
    with pytest.raises(ValueError, match="expected parts of 1"):
        shared_splits(shares, ["a", "b", "c"], 0)


def test_too_few_images_for_the_shares():
    with pytest.raises(ValueError, match="2 labelled images are too few"):
        shared_splits({"val": 0.2, "tune": 0.1}, ["a", "b"], 0)


def test_images_of_a_set_that_has_grown_stay_in_their_splits():
    old = shared_splits({"val": 0.2}, [f"{i:02d}" for i in range(20)], 0)
    ids = [f"{i:02d}" for i in range(1, 50)]
    found, notes = grown_splits({"val": 0.2}, ids, 0, old)
    for split in ("train", "val"):
        assert set(old[split]) - {"00"} <= set(found[split])
    assert sorted(found["train"] + found["val"]) == ids
    assert len(found["val"]) == len(set(old["val"]) - {"00"}) + 6  # a fifth of the 30 new ones
    assert notes == [
        "30 images are new, 19 stay in their splits",
        "1 images of the earlier set are not labelled here",
    ]
    one, _ = grown_splits({"val": 0.2}, [*ids[:19], "99"], 0, old)
    assert "99" in one["train"]
    with pytest.raises(ValueError, match="none of the images of the earlier set"):
        grown_splits({"val": 0.2}, ["a", "b"], 0, old)
    with pytest.raises(ValueError, match=r"has the splits train, val, the shares make train, tune"):
        grown_splits({"tune": 0.2}, ids, 0, old)
