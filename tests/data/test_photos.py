"""Photographs as people have them, each read to known pixels or refused with a reason."""

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from dd.data.photos import (
    Photos,
    Unlabelled,
    Video,
    find_photos,
    read_photo,
    source,
    without,
)

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(tmp_path, image, name="a.png", **how):
    image.save(tmp_path / name, **how)
    return tmp_path / name


def test_a_photograph_keeps_its_pixels(tmp_path):
    assert np.array_equal(read_photo(saved(tmp_path, Image.fromarray(COLOURS))), COLOURS)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, COLOURS),
        (2, COLOURS[:, ::-1]),
        (3, COLOURS[::-1, ::-1]),
        (4, COLOURS[::-1]),
        (5, COLOURS.transpose(1, 0, 2)),
        (6, np.rot90(COLOURS, -1)),
        (7, COLOURS.transpose(1, 0, 2)[::-1, ::-1]),
        (8, np.rot90(COLOURS)),
    ],
)
def test_exif_turns_a_photograph_upright(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_photo(saved(tmp_path, Image.fromarray(COLOURS), exif=exif)), upright)


def test_grey_and_black_and_white(tmp_path):
    grey = COLOURS[..., 0]
    assert np.array_equal(
        read_photo(saved(tmp_path, Image.fromarray(grey))), grey[..., None].repeat(3, 2)
    )
    assert np.array_equal(
        read_photo(saved(tmp_path, Image.fromarray(grey > 127))),
        np.where(grey > 127, 255, 0)[..., None].repeat(3, 2),
    )


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_keep_their_whole_range(tmp_path, name):
    deep = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    found = read_photo(saved(tmp_path, Image.fromarray(deep), name))
    assert found.tolist() == [[[v] * 3 for v in row] for row in [[0, 0, 1], [128, 255, 255]]]


def test_sixteen_bits_of_colour(tmp_path):
    deep = RNG.integers(0, 65536, (4, 5, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep[..., ::-1])
    assert np.array_equal(read_photo(tmp_path / "deep.png"), (deep >> 8).astype(np.uint8))


def test_cmyk(tmp_path):
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow
    found = read_photo(saved(tmp_path, ink, "a.jpg", quality=100)).astype(int)
    assert np.abs(found - [255, 0, 0]).max() < 6


def test_transparent_pixels_lie_on_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = read_photo(saved(tmp_path, image, transparency=bytes([255, 0, 255])))
    assert found.tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    half = Image.fromarray(np.array([[[0, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 51]]], np.uint8))
    assert read_photo(saved(tmp_path, half)).tolist() == [[[0] * 3, [255] * 3, [204] * 3]]
    assert read_photo(saved(tmp_path, half.convert("LA"))).tolist() == [
        [[0] * 3, [255] * 3, [204] * 3]
    ]


def test_a_truncated_photograph_says_so(tmp_path):
    for name in ("a.jpg", "a.png"):
        path = saved(tmp_path, Image.fromarray(COLOURS.repeat(20, 0).repeat(20, 1)), name)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ValueError, match=rf"{name} is damaged, or not an image"):
            read_photo(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_says_so(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="damaged, or not an image"):
        read_photo(tmp_path / "a.jpg")


def test_floats_are_no_brightness(tmp_path):
    with pytest.raises(ValueError, match="numbers with a point"):
        read_photo(saved(tmp_path, Image.fromarray(np.ones((3, 3), np.float32)), "a.tif"))


def claimed(width, height):
    """A PNG whose header claims a size that its data do not have."""
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(b"few"),
    )
    lengths = [struct.pack(">I", len(chunk) - 4) for chunk in chunks]
    sums = [struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        b"".join(parts) for parts in zip(lengths, chunks, sums, strict=True)
    )


@pytest.mark.parametrize(
    "side", [8000, 12000, 60000]
)  # beside the limit here, Pillow warns, Pillow refuses
def test_an_enormous_image_is_refused_by_its_header(tmp_path, side):
    (tmp_path / "a.png").write_bytes(claimed(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match="limit" if side < 60000 else "is refused: .*decompression bomb"
        ):
            read_photo(tmp_path / "a.png")


def test_the_limit_is_a_choice(tmp_path):
    path = saved(tmp_path, Image.fromarray(COLOURS))
    assert read_photo(path, 54).shape == (6, 9, 3)
    with pytest.raises(ValueError, match="9x6 = .* the limit is .*: make it smaller or crop it$"):
        read_photo(path, 53)


def test_a_thread_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="at most 1000 times the other"):
        read_photo(saved(tmp_path, Image.new("RGB", (1, 1001))))
    assert read_photo(saved(tmp_path, Image.new("RGB", (1000, 1)))).shape == (1, 1000, 3)


def test_a_stream_is_read_too(tmp_path):
    stream = io.BytesIO(saved(tmp_path, Image.fromarray(COLOURS)).read_bytes())
    assert np.array_equal(read_photo(stream), COLOURS)


# Folders and videos


def test_a_folder_is_read_with_the_folders_in_it(tmp_path):
    (tmp_path / "deep").mkdir()
    saved(tmp_path, Image.fromarray(COLOURS), "b.PNG")
    saved(tmp_path, Image.fromarray(COLOURS), "deep/a.bmp")
    (tmp_path / "c.jpg").write_bytes(b"broken")
    (tmp_path / "notes.txt").write_text("no image")
    assert source(tmp_path).notes == []
    for name in ("d.HEIC", "deep/e.heic", "f.gif"):
        (tmp_path / name).write_bytes(b"")
    photos = source(tmp_path)
    assert photos.notes == [
        "3 photographs are left out, as .gif, .heic is not read: convert them to JPEG or PNG"
    ]
    assert isinstance(photos, Photos) and [i.file for i in photos.items] == [
        "b.PNG",
        "c.jpg",
        "deep/a.bmp",
    ]
    first, broken, last = (found for _, found in photos.read(photos.items))
    assert (
        np.array_equal(first, COLOURS)
        and np.array_equal(last, COLOURS)
        and isinstance(broken, ValueError)
    )


def test_images_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("")
    for images, kind, message in [
        (None, FileNotFoundError, "images is not given; expected images=<a folder"),
        (tmp_path / "gone", FileNotFoundError, "gone: nothing is there"),
        (tmp_path / "empty", FileNotFoundError, "no file .*jpg.* in .*empty"),
        (tmp_path / "text.txt", ValueError, "expected an image or a folder of them .* or a video"),
    ]:
        with pytest.raises(kind, match=message):
            source(images)


@pytest.fixture
def video(tmp_path):
    """Seven frames, each of one brightness."""
    writer = cv2.VideoWriter(
        str(tmp_path / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (32, 24)
    )
    for i in range(7):
        writer.write(np.full((24, 32, 3), [0, 0, 30 * i], np.uint8))  # BGR: red
    writer.release()
    return tmp_path / "film.avi"


def test_the_frames_of_a_video(video):
    film = source(video, every=3)
    assert isinstance(film, Video) and [i.id for i in film.items] == [
        "frame_000000",
        "frame_000003",
        "frame_000006",
    ]
    for every, (item, frame) in zip((0, 3, 6), film.read(film.items), strict=True):
        assert item.file == f"film.avi#{every}" and frame.shape == (24, 32, 3)
        assert np.abs(frame.astype(int) - [30 * every, 0, 0]).max() < 8
    assert film.notes == []
    assert [i.id for i, _ in film.read(film.items[2:])] == ["frame_000006"]


def test_a_video_that_cannot_be_read(video):
    whole, cut = video.read_bytes(), video.with_name("cut.avi")
    writer = cv2.VideoWriter(str(cut), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for _ in range(20):
        writer.write(RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    writer.release()
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    film = Video(cut)
    assert 0 < len(film.items) < 20
    assert film.notes == [
        f"{cut} ends after {len(film.items)} of the 20 frames that its header promises"
    ]
    video.write_bytes(b"no film at all")
    with pytest.raises(ValueError, match=r"film.avi is damaged, or not a video"):
        source(video)
    video.write_bytes(whole)
    with pytest.raises(ValueError, match="the limit is"):
        source(video, max_pixels=100)


# Photographs to train with


def test_photographs_to_train_with_are_upright_and_damaged_ones_are_stood_in_for(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(tmp_path, Image.fromarray(COLOURS), "a.png", exif=exif)
    saved(tmp_path, Image.fromarray(COLOURS).convert("CMYK"), "b.tif")
    saved(tmp_path, Image.fromarray(COLOURS[..., 0].astype(np.uint16) << 8), "c.png")
    torn = saved(tmp_path, Image.fromarray(COLOURS.repeat(8, 0).repeat(8, 1)), "d.jpg")
    torn.write_bytes(torn.read_bytes()[:-200])
    (tmp_path / "e").mkdir()
    saved(tmp_path, Image.fromarray(COLOURS[..., 0]), "e/e.png")
    photos = Unlabelled(tmp_path)
    assert [p.name for p in photos.files] == ["a.png", "b.tif", "c.png", "d.jpg", "e.png"] and len(
        photos
    ) == 5
    assert np.array_equal(photos[0], np.rot90(COLOURS, -1)) and photos[1].shape == (6, 9, 3)
    grey = COLOURS[..., :1].repeat(3, 2)
    assert np.array_equal(photos[2], grey) and np.array_equal(photos[4], grey)
    for _ in range(2):
        assert np.array_equal(photos[3], grey)  # the next one
    assert capsys.readouterr().err.count("d.jpg") == 1
    with pytest.raises(
        ValueError,
        match=r"1 of 5 images cannot be read; remove them, or give unlabelled\.list:\n.*d\.jpg",
    ):
        photos.check()


def test_a_list_names_photographs_by_path_or_by_stem(tmp_path):
    for name in ("0.png", "cam1/0.png", "cam1/1.png", "cam2/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        saved(tmp_path, Image.fromarray(COLOURS), name)

    def listed(*lines):
        (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        return [
            p.relative_to(tmp_path).as_posix()
            for p in Unlabelled(tmp_path, tmp_path / "list.txt").files
        ]

    assert listed("cam2/0.png") == ["cam2/0.png"] and listed("cam1\\0", "1.png") == [
        "cam1/0.png",
        "cam1/1.png",
    ]
    assert listed("0") == ["0.png"] and listed("elsewhere/cam1/1.png") == ["cam1/1.png"]
    assert listed("elsewhere/0") == ["0.png"]
    saved(tmp_path, Image.fromarray(COLOURS), "cam2/1.png")
    with pytest.raises(
        ValueError, match="'1.png' may be any of cam1/1, cam2/1: write its folder too"
    ):
        listed("1.png")
    with pytest.raises(ValueError, match=r"'elsewhere/1' \(another folder has 'cam1/1'\)"):
        listed("elsewhere/1")
    with pytest.raises(ValueError, match="1 images are not in .*, such as '2.png'"):
        listed("0", "2.png")


def test_an_empty_list_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("\n \n")
    with pytest.raises(
        ValueError, match=r"unlabelled\.list=.*list\.txt names no image; one a line, or null"
    ):
        find_photos(tmp_path, tmp_path / "list.txt")


def test_all_that_cannot_be_read_are_named_and_the_enormous_found_by_their_headers(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"?")
    Image.new("1", (8000, 7000)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"2 of 3 images cannot be read") as raised:
        find_photos(tmp_path)
    lines = str(raised.value).splitlines()
    assert (
        "b.png" in lines[1] and "c.png has 8000x7000" in lines[2] and "max_pixels" not in lines[2]
    )


def test_what_a_run_records_of_its_photographs(tmp_path):
    for name in ("a.png", "b.png"):
        saved(tmp_path, Image.fromarray(COLOURS), name)
    found = Unlabelled(tmp_path).fingerprint()
    assert found["number"] == 2 and found == Unlabelled(str(tmp_path) + "/").fingerprint()
    (tmp_path / "list.txt").write_text("b\n")
    assert Unlabelled(tmp_path, tmp_path / "list.txt").fingerprint()["number"] == 1
    saved(tmp_path, Image.fromarray(COLOURS[:3]), "b.png")
    assert Unlabelled(tmp_path).fingerprint()["sha256"] != found["sha256"]


def test_a_folder_of_damaged_photographs_ends(tmp_path):
    torn = saved(tmp_path, Image.fromarray(COLOURS.repeat(8, 0).repeat(8, 1)), "d.jpg")
    torn.write_bytes(torn.read_bytes()[:-200])
    with pytest.raises(ValueError, match="none of the 1 photographs in .* can be read"):
        Unlabelled(tmp_path)[0]


def test_images_that_are_not_to_be_chosen(tmp_path):
    (tmp_path / "p/cam2").mkdir(parents=True)
    for name in ("p/a.png", "p/cam2/b.Png", "p/c.png"):
        saved(tmp_path, Image.fromarray(COLOURS), name)
    items, listed = Photos(tmp_path / "p").items, tmp_path / "val.txt"
    listed.write_text("b\nelsewhere\nc.png\n")
    assert [item.id for item in items] == ["a", "c", "cam2/b"] and [
        item.id for item in without(items, listed)
    ] == ["a"]
    listed.write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match="names all 3 images"):
        without(items, listed)
    with pytest.raises(FileNotFoundError, match=r"leave_out=.*none\.txt: no such file"):
        without(items, tmp_path / "none.txt")


def test_whole_numbers_with_a_sign_are_no_brightness(tmp_path):
    with pytest.raises(
        ValueError, match="whole numbers with a sign or of 32 bits .* 16 bits without a sign"
    ):
        read_photo(saved(tmp_path, Image.fromarray(np.ones((3, 3), np.int32)), "a.tif"))


def test_photographs_that_come_out_nearly_black_are_counted(tmp_path, capsys):
    for name, top in (("a", 4095), ("b", 65535), ("c", 0)):
        pixels = np.linspace(0, top, 24).reshape(4, 6).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    photos = Photos(tmp_path)
    assert photos.notes == []
    for _ in range(2):  # each is counted once
        assert (
            len([pixels for _, pixels in photos.read(photos.items) if pixels.shape == (4, 6, 3)])
            == 3
        )
    [note] = photos.notes
    assert note.startswith("1 images of 16 bits use less than a quarter of the range")
    Unlabelled(tmp_path).check()
    assert capsys.readouterr().err == f"warning: {note}\n"
