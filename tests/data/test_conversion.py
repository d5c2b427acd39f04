import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dd.data import annotations, conversion, label_studio
from dd.data.coco_json import CocoImage, Shape, draw
from dd.data.conversion import MaskJob, Part, convert, finished, write_part
from dd.data.datasets import (
    ORIENTATION,
    SegmentationFolder,
    encode_image,
    encode_mask,
    read_mask,
    write_split,
)
from dd.store.provenance import read_json
from dd.taxonomy import Taxonomy

PETS = Taxonomy("pets", ["cat", "dog"], colours={"dog": (1, 2, 3)})


@pytest.fixture
def places(tmp_path):
    """(folder of images, root of the new set, jobs): seven images with one polygon each, the
    last without."""
    (tmp_path / "real").mkdir()
    jobs = []
    for i in range(7):
        height, width = 6 + i, 9
        image = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = tmp_path / "real" / f"{i}.png"
        path.write_bytes(encode_image(image, ".png"))
        shapes = (Shape(0, 1 + i % 2, [[0, 0, 3, 0, 3, 3, 0, 3]]),) if i < 6 else ()
        jobs.append(
            MaskJob(
                f"{i}",
                path,
                f"a.json, {i}.png",
                partial(draw, CocoImage(f"{i}.png", height, width, shapes)),
            )
        )
    return tmp_path / "real", tmp_path / "data/pets", jobs


def files(folder):
    return {
        p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(folder).rglob("*") if p.is_file()
    }


def whole(places, **kwargs):
    real, root, jobs = places
    lists = {"train": ["0", "1", "2", "3", "4"], "val": ["5", "6"]}
    part = Part(root, "all", {"made of": "this"}, jobs, lists, [real], PETS)
    return write_part(part, **kwargs)


def test_a_set_that_is_read_where_its_images_lie(places):
    real, root, jobs = places
    before = files(real)
    record = whole(places, notes=("look out",), workers=0)
    assert (
        record["splits"] == {"train": 5, "val": 2}
        and record["images"] == 7
        and record["notes"] == ["look out"]
    )
    assert record["classes"] == {
        "background": {"images": 7, "pixels": sum((6 + i) * 9 for i in range(7)) - 54},
        "cat": {"images": 3, "pixels": 27},
        "dog": {"images": 3, "pixels": 27},
    }
    for split in ("train", "val"):
        data = SegmentationFolder(root, split, PETS)
        for i, name in enumerate(data.ids):
            image, mask = data[i]
            assert (
                np.array_equal(mask, jobs[int(name)].draw())
                and data.image_path(name).parent.resolve() == real.resolve()
            )
            assert np.array_equal(image, np.asarray(Image.open(real / f"{name}.png")))
    with Image.open(root / "SegmentationClass/0.png") as mask:
        assert mask.mode == "P" and mask.getpalette()[6:9] == [1, 2, 3]
    assert files(real) == before and not (root / "JPEGImages").exists()


def test_the_record_is_relative_below_the_data_root_and_absolute_outside(places, tmp_path):
    real, root, _ = places
    whole(places)
    assert read_json(root / "dataset.json")["images"] == [str(real.resolve())]
    inside = root.parent / "coco2017"
    real.rename(inside)
    write_part(Part(root, "more", {}, [], {}, [inside], PETS))
    assert read_json(root / "dataset.json")["images"] == [str(real.resolve()), "../coco2017"]
    root.parent.rename(tmp_path / "moved")
    assert len(SegmentationFolder(tmp_path / "moved/pets", "val", PETS)[0]) == 2


def test_processes_give_the_same_files(places, monkeypatch):
    real, root, jobs = places
    one = convert(jobs, root / "one", PETS, workers=1)
    monkeypatch.setattr(conversion, "CHUNK", 2)
    assert convert(jobs, root / "two", PETS, workers=2) == one
    for job in jobs:
        name = f"SegmentationClass/{job.name}.png"
        assert (root / "one" / name).read_bytes() == (root / "two" / name).read_bytes()


def _die():
    os._exit(1)


def test_a_process_that_dies(places, monkeypatch):
    _, root, jobs = places
    monkeypatch.setattr(conversion, "CHUNK", 2)
    with pytest.raises(OSError, match="a worker process died .* fewer --workers"):
        convert([MaskJob("x", jobs[0].image, "x", _die), *jobs], root, PETS, workers=2)


def test_an_interrupted_set_goes_on_and_has_no_record(places, monkeypatch):
    _, root, jobs = places
    drawn = []

    def stop():
        drawn.append(1)
        raise KeyboardInterrupt

    broken = [*jobs[:3], MaskJob("3", jobs[3].image, "3", stop), *jobs[4:]]
    with pytest.raises(KeyboardInterrupt):
        whole((places[0], root, broken), workers=0)
    assert (
        drawn
        and not (root / "dataset.json").exists()
        and finished(root, "all", {"made of": "this"}) is None
    )
    before = files(root / "SegmentationClass")
    assert len(before) == 3
    whole(places, workers=0)
    after = files(root / "SegmentationClass")
    assert len(after) == 7 and before.items() <= after.items()
    assert finished(root, "all", {"made of": "this"})["images"] == 7


def test_other_sources_and_other_folders_are_refused(places):
    _, root, _ = places
    whole(places)
    before = files(root)
    with pytest.raises(
        FileExistsError, match="was made with other settings:\n  made of: this -> that"
    ):
        finished(root, "all", {"made of": "that"})
    (root.parent / "other").mkdir()
    (root.parent / "other/picture.jpg").touch()
    with pytest.raises(FileExistsError, match="other holds other data and is not written to"):
        finished(root.parent / "other", "all", {})
    assert finished(root.parent / "new", "all", {}) is None and files(root) == before


def test_an_unfinished_set_of_another_source_begins_anew(places):
    real, root, jobs = places
    broken = [*jobs[:6], MaskJob("6", real / "no.png", "6", jobs[6].draw)]
    with pytest.raises(ValueError, match="1 of 7 masks"):
        write_part(Part(root, "all", {"made of": "that"}, broken, {}, [real], PETS))
    assert finished(root, "all", {"made of": "this"}) is None
    other = [MaskJob(j.name, j.image, j.source, partial(np.full_like, j.draw(), 2)) for j in jobs]
    write_part(Part(root, "all", {"made of": "this"}, other, {}, [real], PETS))
    assert all((read_mask(path) == 2).all() for path in (root / "SegmentationClass").iterdir())


def test_classes_that_no_mask_has_are_counted(places):
    birds = Taxonomy("birds", ["cat", "dog", "owl", "crow"])
    real, root, jobs = places
    notes = write_part(Part(root, "all", {}, jobs, {}, [real], birds))["notes"]
    assert notes == ["2 classes are in no mask: owl, crow"]


def test_all_masks_that_fail_are_listed_and_the_others_kept(places):
    real, root, jobs = places
    Image.new("RGB", (9, 6)).save(real / "1.png")
    (real / "2.png").write_bytes(b"no image")
    (real / "3.png").unlink()
    wrong = MaskJob("4", real / "4.png", "bad mask", partial(np.full, (10, 9), 7, np.uint8))
    with pytest.raises(ValueError, match="4 of 7 masks could not be made") as error:
        convert([*jobs[:4], wrong, *jobs[5:]], root, PETS, workers=0)
    text = str(error.value)
    assert r"bad mask holds values [7] outside the 3 classes" in text
    assert (
        "1.png is 9x6 (width x height), its mask 9x7" in text
        and "2.png" in text
        and "3.png" in text
    )
    assert sorted(p.stem for p in (root / "SegmentationClass").iterdir()) == ["0", "5", "6"]
    assert max(len(line) for line in text.splitlines()) < 400


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotations(tmp_path, turn):
    """The mask of the upright image gets an upright copy of it; the mask of the pixels as they
    are stored needs none."""
    pixels = np.random.default_rng(turn).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    path = tmp_path / "real/a.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    masks = {"upright": np.ones(upright.shape[:2], np.uint8), "stored": np.ones((6, 9), np.uint8)}
    for name, mask in masks.items():
        job = MaskJob("a", path, "a", mask.copy)
        root = tmp_path / name
        record = write_part(
            Part(root, "all", {}, [job], {"val": ["a"]}, [path.parent], PETS), upright=True
        )
        image, read = SegmentationFolder(root, "val", PETS)[0]
        as_upright = (
            name == "upright" or turn < 5
        )  # of equal size: annotation tools show images upright
        assert np.array_equal(image, upright if as_upright else pixels) and np.array_equal(
            read, mask
        )
        assert record["upright"] == (as_upright and turn > 1)
        assert any("EXIF" in note for note in record["notes"]) == (as_upright and turn > 1)
    if turn >= 5:
        with pytest.raises(ValueError, match="is 9x6 .*, its mask 6x9"):
            convert(
                [MaskJob("a", path, "a", masks["upright"].copy)],
                tmp_path / "raw",
                PETS,
                upright=False,
            )


def turned(folder, name, turn, seed, size=(6, 9)):
    """(stored pixels, upright pixels) of a photograph that is saved with an EXIF orientation."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{name}.png", exif=exif)
    with Image.open(folder / f"{name}.png") as image:
        return pixels, np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("drawn_on", [("stored",), ("upright",), ("stored", "upright"), ()])
def test_what_sizes_do_not_tell_follows_the_rest_of_the_set(tmp_path, drawn_on):
    """Masks are where red is above 128 in the pixels that they were drawn on."""
    real, jobs, expected = tmp_path / "real", [], {}
    rows = [(f"sure{i}", 6, how, (6, 9)) for i, how in enumerate(drawn_on)]
    rows += [
        ("around", 3, None, (6, 9)),
        ("square", 6, None, (7, 7)),
        ("mirrored", 2, None, (6, 9)),
    ]
    followed = "stored" if drawn_on == ("stored",) else "upright"
    for seed, (name, turn, how, size) in enumerate(rows):
        both = dict(zip(("stored", "upright"), turned(real, name, turn, seed, size), strict=True))
        expected[name] = both[how or followed]
        mask = (expected[name][..., 0] > 128).astype(np.uint8)
        jobs.append(MaskJob(name, real / f"{name}.png", name, mask.copy))
    unmarked = turned(real, "unmarked", 6, 99)[
        1
    ]  # its mask lies as we made it, which is no evidence
    empty = np.zeros(unmarked.shape[:2], np.uint8)
    jobs.append(MaskJob("unmarked", real / "unmarked.png", "u", empty.copy))
    root, names = tmp_path / "data/own", [job.name for job in jobs]
    record = write_part(
        Part(root, "all", {}, jobs, {"val": names}, [real], PETS), upright=True, workers=0
    )
    data = SegmentationFolder(root, "val", PETS)
    for i, name in enumerate(data.ids[:-1]):
        image, mask = data[i]
        assert np.array_equal(image, expected[name]), name
        assert np.array_equal(mask == 1, image[..., 0] > 128), name
    [note] = [n for n in record["notes"] if n.startswith("3 images carry an EXIF rotation, and")]
    assert {
        ("stored",): "taken as of stored pixels, like the 1 masks",
        ("upright",): "taken as upright, like the 1 masks",
        ("stored", "upright"): "but 1 others are of stored pixels, 1 upright: look",
        (): "nor does any other",
    }[drawn_on] in note
    # the same folder in VOC layout, read as it is
    voc = tmp_path / "voc"
    write_split(voc, "val", names[:-1])
    (voc / "SegmentationClass").mkdir()
    real.rename(voc / "JPEGImages")
    for name in names[:-1]:
        file = f"SegmentationClass/{name}.png"
        (voc / file).write_bytes((root / file).read_bytes())
    data = SegmentationFolder(voc, "val", PETS)
    for i, name in enumerate(data.ids):
        assert np.array_equal(data[i][0], expected[name]), name


def test_images_of_which_the_high_byte_says_nothing_are_counted(places):
    real, root, jobs = places
    for name, top in (("0", 4095), ("1", 60000), ("2", 16383)):
        with Image.open(real / f"{name}.png") as image:
            height, width = image.height, image.width
        values = np.linspace(0, top, height * width).reshape(height, width).astype(np.uint16)
        Image.fromarray(values).save(real / f"{name}.png")
    notes = whole(places)["notes"]
    assert [
        n for n in notes if n.startswith("2 images of 16 bits use less than a quarter of the range")
    ]


def test_the_background_of_a_turned_image_is_upright(tmp_path):
    """Images that nobody marked lie as those that were marked: as the tool showed them."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (9, 6)).save(tmp_path / "a.jpg", exif=exif)
    unmarked = label_studio.Labelled("a.jpg", None, [])
    for mask in (
        annotations._background(tmp_path / "a.jpg"),
        annotations._brushes(unmarked, {}, tmp_path / "a.jpg"),
    ):
        assert mask.shape == (9, 6) and not mask.any()


def test_a_set_in_which_no_class_occurs_is_not_ready(places):
    real, root, jobs = places
    for value, held in (
        (0, "background alone"),
        (255, r"0 \(background\) and 255 \(ignored\) alone"),
    ):
        empty = [
            MaskJob(j.name, j.image, j.source, partial(np.full_like, j.draw(), value)) for j in jobs
        ]
        with pytest.raises(
            ValueError, match=rf"no class of .*'pets' occurs in the 7 masks: they hold {held}"
        ):
            write_part(Part(root, "all", {"value": value}, empty, {"train": ["0"]}, [real], PETS))
        assert finished(root, "all", {"value": value}) is None


def test_a_cause_is_told_once(places):
    _, root, jobs = places
    wrong = [
        MaskJob(j.name, j.image, f"/masks/{j.name}.png", partial(np.full_like, j.draw(), 7))
        for j in jobs[:5]
    ]
    with pytest.raises(ValueError, match="5 of 7 masks") as error:
        convert([*wrong, *jobs[5:]], root, PETS, workers=0)
    lines = str(error.value).splitlines()[1:]
    assert (
        len(lines) == 1
        and lines[0].count("/masks/") == 1
        and lines[0].startswith("  /masks/0.png holds values [7]")
    )
    assert lines[0].endswith(
        "--map 7=ignore, or =background, or a class (and 4 more for this reason)"
    )


def test_masks_that_claim_another_size_are_not_drawn(places):
    _, root, jobs = places
    job = MaskJob(
        "0", jobs[0].image, "huge", partial(pytest.fail, "drawn"), size=lambda: (30000, 30000)
    )
    with pytest.raises(ValueError, match=r"0\.png is 9x6 \(width x height\), its mask 30000x30000"):
        convert([job], root, PETS, workers=0)


def test_masks_that_are_there_are_read_not_drawn(places):
    _, root, jobs = places
    (root / "SegmentationClass").mkdir(parents=True)
    mask = np.full((6, 9), 255, np.uint8)
    (root / "SegmentationClass/0.png").write_bytes(encode_mask(mask))
    counts = convert(jobs[:1], root, PETS)
    assert counts["ignored_pixels"] == 54 and np.array_equal(
        read_mask(root / "SegmentationClass/0.png"), mask
    )
