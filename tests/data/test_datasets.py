import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from dd.data.datasets import (
    ORIENTATION,
    RECORD,
    SegmentationFolder,
    choose_shots,
    encode_image,
    encode_mask,
    image_size,
    read_captions,
    read_coloured_mask,
    read_image,
    read_labelled,
    read_list,
    read_mask,
    read_split,
    write_split,
)
from dd.data.photos import read_photo
from dd.taxonomy import Taxonomy, taxonomy, voc_palette

PETS = Taxonomy("pets", ["cat", "dog"])
COLOURED = Taxonomy("pets", ["cat", "dog"], colours={"cat": (128, 0, 0), "dog": (7, 8, 9)})
SIZES = [(12, 9), (7, 15), (8, 8), (5, 11), (9, 9)]


def test_a_png_with_another_byte_is_never_read_as_other_pixels(tmp_path):
    """Pillow decodes most of them, and forgets the error of the rest when it has looked for EXIF
    data in between."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    path, kinds = tmp_path / "a.png", []
    Image.fromarray(pixels).save(path)
    sound = path.read_bytes()
    for at in range(8, len(sound), 7):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 16]) + sound[at + 1 :])
        for read in (read_image, lambda p: read_labelled(p, (20, 24), lambda: True), read_photo):
            try:
                kinds.append("read")
                assert np.array_equal(read(path), pixels)
            except ValueError as error:
                kinds[-1] = "refused"
                assert str(path) in str(error)
    assert kinds.count("refused") > 0.9 * len(kinds)
    path.write_bytes(sound)
    assert np.array_equal(read_photo(io.BytesIO(sound)), pixels)  # a stream, as an upload is one


def picture(i):
    rng, size = np.random.default_rng(i), SIZES[i]
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.choice(
        np.array([0, 1, 2, 255], np.uint8), size
    )


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "pets"
    for folder in ("JPEGImages", "SegmentationClass", "masks/other"):
        (root / folder).mkdir(parents=True)
    for i in range(len(SIZES)):
        image, mask = picture(i)
        (root / "JPEGImages" / f"pet_{i}.png").write_bytes(encode_image(image, ".png"))
        (root / "SegmentationClass" / f"pet_{i}.png").write_bytes(encode_mask(mask))
        (root / "masks/other" / f"pet_{i}.png").write_bytes(encode_mask(np.zeros_like(mask)))
    write_split(root, "train", [f"pet_{i}" for i in range(len(SIZES))])
    write_split(root, "val", ["pet_1"])
    return root


# Files


def test_mask_ids_survive_the_palette_png(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    (tmp_path / "mask.png").write_bytes(encode_mask(mask))
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P" and image.getpalette() == voc_palette()


def test_masks_of_other_tools_are_read(tmp_path):
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    Image.fromarray(mask).save(tmp_path / "grey.png")
    few = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    few.putpalette([0, 0, 0, 128, 0, 0])
    few.save(tmp_path / "one_bit.png", bits=1)
    assert np.array_equal(read_mask(tmp_path / "grey.png"), mask)
    assert read_mask(tmp_path / "one_bit.png").tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_masks_without_class_ids_are_refused(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask .*mask\.png has mode .*one class id per pixel"):
        read_mask(tmp_path / "mask.png")


def test_images_survive_png_and_nearly_jpeg(tmp_path):
    image = np.repeat(np.repeat(picture(0)[0], 8, 0), 8, 1)
    for suffix, tolerance in ((".png", 0), (".jpg", 12)):
        (tmp_path / f"i{suffix}").write_bytes(encode_image(image, suffix))
        assert np.abs(read_image(tmp_path / f"i{suffix}").astype(int) - image).max() <= tolerance
    with Image.open(io.BytesIO(encode_image(image, ".jpg"))) as stored:
        assert stored.format == "JPEG" and stored.layer == [
            (1, 1, 1, 0),
            (2, 1, 1, 1),
            (3, 1, 1, 1),
        ]  # no subsampling
    assert encode_image(image, ".jpg") == encode_image(image, ".jpg")


def test_grey_images_become_rgb(tmp_path):
    Image.new("L", (3, 2), 7).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").tolist() == [[[7] * 3] * 3] * 2


def test_labelled_images_are_read_as_photographs_are(tmp_path):
    """Else a segmenter is trained on other pixels than it is shown later: 16 bits were white
    from 255 on."""
    Image.fromarray(np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)).save(
        tmp_path / "deep.png"
    )
    Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0]]], np.uint8)).save(
        tmp_path / "clear.png"
    )
    assert read_image(tmp_path / "deep.png")[..., 0].tolist() == [[0, 0, 1], [128, 255, 255]]
    assert read_image(tmp_path / "clear.png").tolist() == [[[200, 0, 0], [255, 255, 255]]]
    for name in ("deep.png", "clear.png"):
        shown = read_photo(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name), shown)
        assert np.array_equal(read_labelled(tmp_path / name, shown.shape[:2], lambda: True), shown)


def test_other_image_formats_are_refused():
    with pytest.raises(ValueError, match=r"image format '\.bmp'; allowed: \.jpg, \.png"):
        encode_image(picture(0)[0], ".bmp")


def test_an_interrupted_split_leaves_the_old_one(root, monkeypatch):
    path, before = root / "ImageSets/Segmentation/train.txt", read_split(root, "train")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for split in ("train", "new"):
        with pytest.raises(KeyboardInterrupt):
            write_split(root, split, ["other"])
    assert read_split(root, "train") == before
    assert not path.with_name("new.txt").exists()


# Folders


def test_pictures_come_in_the_order_of_the_split(root):
    data = SegmentationFolder(root, "train", PETS)
    assert len(data) == len(SIZES) and data.ids == [f"pet_{i}" for i in range(len(SIZES))]
    for i in range(len(SIZES)):
        for read, written in zip(data[i], picture(i), strict=True):
            assert read.dtype == np.uint8 and np.array_equal(read, written)
    named = {"root": "pets", "split": "train", "masks": "SegmentationClass", "images": 5}
    assert data.fingerprint() == {**named, "content": data.content()}


def test_another_mask_set_beside_the_default_one(root):
    assert not SegmentationFolder(root, "val", PETS, "masks/other")[0][1].any()
    assert SegmentationFolder(root, "val", PETS)[0][1].any()


def test_jpeg_images_are_found(root):
    image, _ = picture(1)
    (root / "JPEGImages/pet_1.png").unlink()
    (root / "JPEGImages/pet_1.jpg").write_bytes(encode_image(image, ".jpg"))
    assert SegmentationFolder(root, "val", PETS)[0][0].shape == image.shape


def test_class_lines_of_the_devkit_are_read(root):
    (root / "ImageSets/Segmentation/cat_train.txt").write_text("pet_0  1\npet_3 -1\n\n")
    assert read_split(root, "cat_train") == ["pet_0", "pet_3"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shots_are_nested_and_chosen_by_the_seed(seed):
    ids = [f"{i:03d}" for i in range(50)]
    all_of_them = choose_shots(ids, 50, seed)
    assert sorted(all_of_them) == ids and all_of_them != ids
    for shots in (1, 2, 16, 49):
        assert choose_shots(ids, shots, seed) == all_of_them[:shots]
    assert choose_shots(ids, 5, seed) != choose_shots(ids, 5, seed + 1)
    assert choose_shots(ids, None, seed) == ids


@pytest.mark.parametrize("shots", [0, -1, 6])
def test_impossible_numbers_of_shots(root, shots):
    with pytest.raises(
        ValueError, match=rf"shots={shots}, but the split holds 5 images; choose 1 to 5"
    ):
        SegmentationFolder(root, "train", PETS, shots=shots)


@pytest.fixture
def listed(root, tmp_path):
    """``listed(*lines, **kwargs)``: the training images of ``root`` that these lines name."""

    def read(*lines, **kwargs):
        (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        kwargs = {"shots_list": str(tmp_path / "list.txt"), **kwargs}
        return SegmentationFolder(root, "train", PETS, **kwargs)

    return read


@pytest.mark.parametrize(
    "lines",
    [
        ["pet_3", "pet_1"],
        ["", "pet_3  ", "pet_1 -1", ""],
        ["JPEGImages/pet_3.jpg SegmentationClass/pet_3.png", "JPEGImages/pet_1.jpg m/pet_1.png"],
        ["/data/VOC/JPEGImages/pet_3.jpg /data/VOC/SegmentationClass/pet_3.png", "./pet_1.png"],
        ["pet_3.jpg\r", "pet_1.jpg\r"],
    ],
)
def test_shots_are_chosen_from_a_list(listed, lines):
    data = listed(*lines)
    assert data.ids == ["pet_3", "pet_1"] and len(data[0]) == 2
    same = listed("pet_3", "pet_1").listed
    assert data.listed == same and same.keys() == {"file", "images", "ids"}
    assert (same["file"], same["images"]) == ("list.txt", 2)
    assert listed("pet_3", "pet_2").listed["ids"] != same["ids"]


def test_fewer_shots_than_a_list_names(listed):
    names = [f"pet_{i}" for i in (4, 0, 2)]
    for seed in range(3):
        whole = choose_shots(names, 3, seed)
        assert listed(*names, shots=3, seed=seed).ids == whole
        assert listed(*names, shots=2, seed=seed).ids == whole[:2]
    assert listed(*names, shots=2).listed["images"] == 3
    with pytest.raises(ValueError, match=r"shots=4, but list.txt names 3 images; choose 1 to 3"):
        listed(*names, shots=4)


def test_a_list_finds_ids_with_folders_blanks_and_dots(root, tmp_path):
    names = ["a b", "a", "x/y.v2", "y.v2"]
    (tmp_path / "list.txt").write_text("a b\nJPEGImages/x/y.v2.jpg m.png\ny.v2.png\na\n")
    found, _ = read_list(tmp_path / "list.txt", names, "train")
    assert found == ["a b", "x/y.v2", "y.v2", "a"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "names no image"),
        (["pet_1", "JPEGImages/pet_1.jpg x.png"], "line 2 names pet_1 again"),
        (["pet_1", "dog_7", "m/dog_8.jpg"], "2 of its 3 lines name no image .*'train'.*'dog_7'"),
    ],
)
def test_lists_that_do_not_fit(listed, lines, message):
    with pytest.raises(ValueError, match=message):
        listed(*lines)


def test_a_list_that_is_not_there_or_no_text(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"shots_list=.*92.txt: no such file"):
        SegmentationFolder(root, "train", PETS, shots_list=str(tmp_path / "92.txt"))
    (tmp_path / "92.txt").write_bytes(b"pet_1\n\xff\n")
    with pytest.raises(ValueError, match="92.txt is not valid UTF-8"):
        SegmentationFolder(root, "train", PETS, shots_list=str(tmp_path / "92.txt"))


def test_a_folder_of_shots(root):
    data = SegmentationFolder(root, "train", PETS, shots=2, seed=3)
    assert data.ids == choose_shots([f"pet_{i}" for i in range(5)], 2, 3)
    assert data.fingerprint()["images"] == len(data) == 2


# Errors


def test_a_missing_data_set(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"no data set at .*nowhere.*python -m dd prepare shapes.*data\.root",
    ):
        SegmentationFolder(tmp_path / "nowhere", "train", PETS)


def test_a_missing_split_is_answered_with_those_that_are_there(root):
    with pytest.raises(FileNotFoundError, match=r"has no split 'test' .*splits there: train, val"):
        SegmentationFolder(root, "test", PETS)


def test_missing_masks(root):
    with pytest.raises(FileNotFoundError, match=r"has no masks in masks/nothing\..*stage=label"):
        SegmentationFolder(root, "train", PETS, "masks/nothing")


@pytest.mark.parametrize("name", ["../pet_0", "a/../../pet_0", "/etc/pet_0", "..\\pet_0"])
def test_ids_that_leave_the_folder_are_refused(root, name):
    write_split(root, "train", ["pet_0", name])
    with pytest.raises(ValueError, match=r"train\.txt: id .* would leave the data set's folder"):
        SegmentationFolder(root, "train", PETS)


def test_an_empty_split(root):
    write_split(root, "train", [])
    with pytest.raises(ValueError, match=r"train\.txt is empty"):
        SegmentationFolder(root, "train", PETS)


@pytest.mark.parametrize(
    ("folder", "message"),
    [("JPEGImages", "no image pet_1 "), ("SegmentationClass", r"no mask .*pet_1\.png")],
)
def test_missing_files_are_named(root, folder, message):
    (root / folder / "pet_1.png").unlink()
    with pytest.raises(FileNotFoundError, match=f"{message}.*split 'val' lists it"):
        SegmentationFolder(root, "val", PETS)[0]


def test_a_mask_of_another_size(root):
    (root / "SegmentationClass/pet_1.png").write_bytes(encode_mask(np.zeros((3, 4), np.uint8)))
    with pytest.raises(ValueError, match=r"pet_1\.png is 4x3, its image 15x7"):
        SegmentationFolder(root, "val", PETS)[0]


def test_mask_values_outside_the_classes(root):
    mask = picture(1)[1]
    mask[0, :4] = 3, 7, 254, 255
    (root / "SegmentationClass/pet_1.png").write_bytes(encode_mask(mask))
    with pytest.raises(
        ValueError,
        match=r"values \[3, 7, 254\] outside the 3 classes of taxonomy 'pets' \(0 to 2, 255",
    ):
        SegmentationFolder(root, "val", PETS)[0]


def test_a_colour_mask(root):
    Image.new("RGB", (15, 7)).save(root / "SegmentationClass/pet_1.png")
    with pytest.raises(ValueError, match="mode RGB"):
        SegmentationFolder(root, "val", PETS)[0]


def test_nothing_is_written_by_reading(root):
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    (root / "SegmentationClass/pet_1.png").write_bytes(b"no png")
    data = SegmentationFolder(root, "train", PETS)
    with pytest.raises(ValueError, match=r"pet_1\.png is damaged, or not an image"):
        data[1]
    data[0]
    assert {p for p in root.rglob("*") if p.is_file()} == before.keys()


# Captions


def test_captions_by_id(root):
    (root / "captions.jsonl").write_text(
        '{"id": "pet_0", "caption": "a cat", "classes": ["cat"]}\n'
    )
    assert read_captions(root) == {"pet_0": {"id": "pet_0", "caption": "a cat", "classes": ["cat"]}}


def test_a_data_set_without_captions(root):
    with pytest.raises(FileNotFoundError, match="has no captions.jsonl"):
        read_captions(root)


# Images elsewhere, masks in colours


def test_images_apart_from_the_root(root, tmp_path):
    (tmp_path / "a").mkdir()
    (root / "JPEGImages").rename(tmp_path / "images")
    (tmp_path / "images/pet_1.png").rename(tmp_path / "a/pet_1.png")
    for images in ([tmp_path / "images", str(tmp_path / "a")], None):
        if images is None:
            record = {"images": ["../images", str((tmp_path / "a").resolve())]}
            (root / "dataset.json").write_text(json.dumps(record))
        data = SegmentationFolder(root, "train", PETS, images=images)
        assert all(np.array_equal(data[i][0], picture(i)[0]) for i in range(len(data)))
    assert (
        SegmentationFolder(root, "val", PETS, images=str(tmp_path / "a"))[0][0].shape
        == picture(1)[0].shape
    )
    with pytest.raises(
        FileNotFoundError, match=r"no image pet_0 .* in .*a, but split 'train' lists it"
    ):
        SegmentationFolder(root, "train", PETS, images=str(tmp_path / "a"))[0]


def test_our_own_copies_come_before_the_recorded_folders(root, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/pet_1.jpg").write_bytes(encode_image(np.zeros((7, 15, 3), np.uint8), ".jpg"))
    (root / "dataset.json").write_text(json.dumps({"images": ["../real"]}))
    assert SegmentationFolder(root, "val", PETS)[0][0].any()


def test_ids_with_blanks_in_prepared_lists(root):
    write_split(root, "blanks", ["photo 1", "photo 2"])
    assert read_split(root, "blanks") == [
        "photo",
        "photo",
    ]  # the devkit's class lists: id and -1, 0 or 1
    (root / "dataset.json").write_text(json.dumps({"images": []}))
    assert read_split(root, "blanks") == ["photo 1", "photo 2"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_masks_in_the_colours_of_the_taxonomy(tmp_path, mode):
    mask = np.array([[0, 1, 2], [255, 1, 0]], np.uint8)
    (tmp_path / "ids.png").write_bytes(encode_mask(mask, COLOURED.palette))
    with Image.open(tmp_path / "ids.png") as image:
        assert image.convert("RGB").getpixel((2, 0)) == (7, 8, 9)
        image.convert(mode).save(tmp_path / "colours.png")
    for name in ("ids", "colours"):
        assert np.array_equal(read_coloured_mask(tmp_path / f"{name}.png", COLOURED), mask)
    with pytest.raises(
        ValueError,
        match=r"has 2 colours that taxonomy 'pets' gives to no class, .* \[\[7, 8, 9\], "
        r"\[128, 0, 0\]\]",
    ):
        read_coloured_mask(tmp_path / "colours.png", PETS)


def test_a_data_set_of_other_classes_is_refused(root):
    """The same number of classes in another order would train, with every label shifted."""
    (root / "run.json").write_text(
        json.dumps({"identity": {"taxonomy": {"name": "pets", "names": ["cat", "dog"]}}})
    )
    assert len(SegmentationFolder(root, "train", PETS)) == len(SIZES)
    with pytest.raises(
        ValueError, match=r"made for the classes \['cat', 'dog'\], these are \['dog', 'cat'\]"
    ):
        SegmentationFolder(root, "train", Taxonomy("pets", ["dog", "cat"]))


@pytest.mark.parametrize("text", ["null", "[]", '{"sha256": null}', '{"sha256": [1]}'])
def test_a_record_of_masks_of_other_content_is_damaged(root, text):
    data = SegmentationFolder(root, "train", PETS)
    (root / data.masks / "masks.json").write_text(text)
    with pytest.raises(ValueError, match=r"masks\.json is damaged"):
        data.fingerprint()


def test_corrected_masks_are_other_data(root):
    data = SegmentationFolder(root, "train", PETS)
    before = data.fingerprint()
    assert data.fingerprint() == before
    (root / "SegmentationClass/pet_0.png").write_bytes(encode_mask(np.ones(SIZES[0], np.uint8)))
    assert data.fingerprint() != before


@pytest.mark.parametrize(
    "content", ["null", "[1]", '{"identity": null}', '{"identity": {"taxonomy": {"names": 3}}}']
)
def test_a_record_of_other_content_is_damaged(tmp_path, content):
    write_split(tmp_path, "train", ["a"])
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"run.json is damaged: .*taxonomy.names is not a list of class names"
    ):
        SegmentationFolder(tmp_path, "train", taxonomy("voc"))


# Photographs with an EXIF orientation

UPRIGHT = {  # orientation: how viewers show pixels that are stored so
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: np.rot90(x),
}


def turned_photograph(folder, turn, size=(32, 48), name="a.jpg", exif=None):
    """A real JPEG with four even corners of different colours; returns its pixels as they are
    stored."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[: size[0] // 2, size[1] // 2 :], pixels[size[0] // 2 :, : size[1] // 2] = (
        (200, 30, 30),
        (30, 200, 30),
    )
    if exif is None:
        exif = Image.Exif()
        exif[ORIENTATION] = turn
    Image.fromarray(pixels).save(folder / name, exif=exif, quality=95, subsampling=0)
    with Image.open(folder / name) as image:
        return np.asarray(image)


def one_image(root, mask, record=False):
    (root / "SegmentationClass").mkdir(parents=True, exist_ok=True)
    (root / "SegmentationClass/a.png").write_bytes(encode_mask(mask))
    write_split(root, "train", ["a"])
    if record:
        (root / RECORD).write_text(
            json.dumps({"images": ["JPEGImages"], "taxonomy": {"names": ["cat", "dog"]}})
        )
    return SegmentationFolder(root, "train", PETS)


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("record", [False, True])
def test_an_image_is_turned_as_its_mask_was_drawn(tmp_path, turn, record):
    stored = turned_photograph(tmp_path / "JPEGImages", turn)
    upright = UPRIGHT[turn](stored)
    image, mask = one_image(tmp_path, np.zeros(upright.shape[:2], np.uint8), record)[0]
    ambiguous = turn < 5  # the sizes agree both ways
    assert mask.shape == image.shape[:2]
    assert np.array_equal(image, stored if ambiguous and record else upright)
    assert not np.array_equal(stored, upright)
    if not ambiguous:  # drawn on the stored pixels
        assert np.array_equal(
            one_image(tmp_path, np.zeros(stored.shape[:2], np.uint8), record)[0][0], stored
        )


@pytest.mark.parametrize(("record", "turned"), [(False, True), (True, False)])
def test_a_square_image_is_upright_but_in_prepared_data(tmp_path, record, turned):
    stored = turned_photograph(tmp_path / "JPEGImages", 6, (32, 32))
    image, _ = one_image(tmp_path, np.zeros((32, 32), np.uint8), record)[0]
    assert np.array_equal(image, UPRIGHT[6](stored) if turned else stored)


def test_a_mask_that_fits_neither_way_is_told_both_sizes(tmp_path):
    turned_photograph(tmp_path / "JPEGImages", 6)
    data = one_image(tmp_path, np.zeros((40, 48), np.uint8))
    with pytest.raises(
        ValueError,
        match=r"a.png is 48x40, its image 48x32 \(32x48 upright by EXIF; prepare own writes "
        r"upright",
    ):
        data[0]
    assert image_size(tmp_path / "JPEGImages/a.jpg") == (32, 48)
    assert image_size(tmp_path / "JPEGImages/a.jpg", upright=True) == (48, 32)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0no TIFF at all", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"]
)
def test_exif_data_that_cannot_be_read_say_nothing(tmp_path, exif):
    stored = turned_photograph(tmp_path / "JPEGImages", None, exif=exif)
    assert np.array_equal(one_image(tmp_path, np.zeros((32, 48), np.uint8))[0][0], stored)


@pytest.mark.parametrize("value", [0, 9, 1])
def test_orientations_that_do_not_exist_are_none(tmp_path, value):
    stored = turned_photograph(tmp_path / "JPEGImages", value)
    assert np.array_equal(one_image(tmp_path, np.zeros((32, 48), np.uint8))[0][0], stored)


def test_an_image_is_decoded_once(tmp_path, monkeypatch):
    turned_photograph(tmp_path / "JPEGImages", 6)
    data, opens, real = one_image(tmp_path, np.zeros((48, 32), np.uint8)), [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, *a, **k: opens.append(str(path)) or real(path, *a, **k)
    )
    assert data[0][0].shape == (48, 32, 3)
    assert len(opens) == 2 and sum(name.endswith("a.jpg") for name in opens) == 1  # image and mask
