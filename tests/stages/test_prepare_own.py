import json

import numpy as np
import pytest
from PIL import Image

from dd.__main__ import main
from dd.datasets import SegmentationFolder, encode_image, encode_mask, read_split
from dd.stages.prepare_own import prepare_own
from dd.taxonomy import taxonomy

SITE = """
name: site
classes:
  - {name: scratch, synonyms: [scrape], colour: [255, 0, 0]}
  - {name: gold ring, colour: [0, 255, 0]}
background_colour: [10, 10, 10]
"""
COLOURS = {0: (10, 10, 10), 1: (255, 0, 0), 2: (0, 255, 0), 255: (224, 224, 192)}
NAMES = ["photo 1", "photo 2", "line/a", "line/b.v2", "c"]


def picture(name):
    rng = np.random.default_rng(sum(map(ord, name)))
    height, width = (int(x) for x in rng.integers(8, 14, 2))
    mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), (height, width))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), mask


@pytest.fixture
def site(tmp_path):
    """A folder with site.yaml, images/, ids/ (palette), grey/, colours/ and lists."""
    root = tmp_path / "site"
    for folder in ("images", "ids", "grey", "colours"):
        (root / folder / "line").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        image, mask = picture(name)
        (root / f"images/{name}{('.png', '.PNG')[i % 2]}").write_bytes(encode_image(image, ".png"))
        (root / f"ids/{name}_mask.png").write_bytes(encode_mask(mask))
        Image.fromarray(mask).save(root / f"grey/{name}.png")
        coloured = np.zeros((*mask.shape, 3), np.uint8)
        for value, colour in COLOURS.items():
            coloured[mask == value] = colour
        Image.fromarray(coloured).save(root / f"colours/{name}.png")
    (root / "site.yaml").write_text(SITE)
    (root / "train.txt").write_text("photo 1.png\nline/a\nline/b.v2\n")
    (root / "val.txt").write_text("images/photo 2.PNG\nc\n")
    return root


def files(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def own(site, **kwargs):
    return prepare_own(site.parent / "data", site / "site.yaml", kwargs.pop("name", "own"), site / "images", **kwargs)


def lists(site):
    return {"train": site / "train.txt", "val": site / "val.txt"}


@pytest.mark.parametrize("kind", ["ids", "grey", "colours"])
def test_masks_in_every_form_become_ids(site, kind):
    before = files(site)
    ending = "_mask" if kind == "ids" else ""
    root, notes = own(site, masks=site / kind, mask_ending=ending, split_files=lists(site))
    assert notes == [] and files(site) == before and not (root / "JPEGImages").exists()
    classes = taxonomy(root / "taxonomy.yaml")
    assert classes == taxonomy(site / "site.yaml")
    assert read_split(root, "train") == ["photo 1", "line/a", "line/b.v2"]
    for split in ("train", "val"):
        data = SegmentationFolder(root, split, classes)
        for i, name in enumerate(data.ids):
            for read, made in zip(data[i], picture(name), strict=True):
                assert np.array_equal(read, made)


def test_shares_and_another_name(site):
    root, _ = own(site, masks=site / "grey", shares={"val": 0.2, "tune": 0.2}, name="hall_3")
    found = {s: read_split(root, s) for s in ("train", "val", "tune")}
    assert root.name == "hall_3" and {s: len(v) for s, v in found.items()} == {"train": 3, "val": 1, "tune": 1}
    assert sorted(sum(found.values(), [])) == sorted(NAMES)


def test_folders_that_only_partly_match(site):
    (site / "images/line/a.png").unlink()
    (site / "grey/c.png").unlink()
    _, notes = own(site, masks=site / "grey")
    assert notes == [
        "1 images have no mask of the same stem and are left out, such as ['c']",
        "1 masks have no image of the same stem and are left out, such as ['line/a']",
    ]
    with pytest.raises(ValueError, match=r"no mask in .*ids has the stem of an image: .*'line/a_mask'.*--mask-ending"):
        own(site, masks=site / "ids", name="other")


def test_values_and_colours_that_no_class_has(site):
    mask = picture("c")[1]
    mask[0, :3] = 3, 4, 77
    Image.fromarray(mask).save(site / "grey/c.png")
    with pytest.raises(ValueError, match=r"1 of 5 masks .*\n.*c\.png holds values \[3, 4, 77\] outside the 3 classes"):
        own(site, masks=site / "grey")
    coloured = np.full((*mask.shape, 3), 10, np.uint8)
    coloured[0, 0] = 1, 2, 3
    Image.fromarray(coloured).save(site / "colours/c.png")
    with pytest.raises(
        ValueError, match=r"c\.png has 1 colours that no class of taxonomy 'site' has, such as \[\[1, 2, 3\]\]"
    ):
        own(site, masks=site / "colours", name="other")
    clear = np.dstack([coloured, np.full(mask.shape, 100, np.uint8)])
    Image.fromarray(clear).save(site / "colours/c.png")
    with pytest.raises(ValueError, match=r"c\.png is transparent in places"):
        own(site, masks=site / "colours", name="other")
    clear[..., 3], clear[0, 0, :3] = 255, 10
    Image.fromarray(clear).save(site / "colours/c.png")  # mended: the same command goes on
    root, _ = own(site, masks=site / "colours", name="other")
    assert not np.asarray(Image.open(root / "SegmentationClass/c.png")).any()


def test_classes_that_no_mask_has_are_warned_of(site, tmp_path):
    (tmp_path / "more.yaml").write_text(SITE.replace("background_colour", "  - dent\n  - {name: rust}\nbackground_colour"))
    _, notes = prepare_own(tmp_path / "data", tmp_path / "more.yaml", "own", site / "images", site / "grey")
    assert notes == ["2 classes are in no mask: dent, rust"]


def test_changed_masks_are_noticed(site):
    root, _ = own(site, masks=site / "grey")
    everything = files(root)
    assert own(site, masks=site / "grey")[0] == root and files(root) == everything
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(site / "grey/c.png")
    with pytest.raises(FileExistsError, match="own was made with other settings:\n  masks_state"):
        own(site, masks=site / "grey")
    assert files(root) == everything


# COCO JSON of other tools


def export(site, **changes):
    """As labelme, CVAT and Label Studio write it: polygons with file names in their own way, in the order they like."""
    sizes = {name: picture(name)[1].shape for name in NAMES}
    written = {"photo 1": "photo 1.png", "photo 2": "JPEGImages/photo 2.PNG", "line/a": "line\\a.png",
               "line/b.v2": "/data/upload/3/b.v2.PNG", "c": "c.png"}  # fmt: skip
    content = {
        "images": [
            {"id": i, "file_name": written[n], "height": sizes[n][0], "width": sizes[n][1]} for i, n in enumerate(NAMES)
        ],
        "categories": [{"id": 0, "name": "_background_"}, {"id": 7, "name": "Gold Ring"}, {"id": 3, "name": "scrape"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 7, "segmentation": [[0, 0, 4, 0, 4, 3, 0, 3]], "iscrowd": 0}
            for i in range(4)
        ],
        **changes,
    }
    content["annotations"][0]["category_id"] = 3
    (site / "export.json").write_text(json.dumps(content))
    return site / "export.json"


def test_an_export_in_coco_form(site):
    root, notes = own(site, coco_file=export(site), split_files=lists(site))
    assert notes == ["1 images have no object: background"]
    for split in ("train", "val"):
        data = SegmentationFolder(root, split, taxonomy(root / "taxonomy.yaml"))
        for i, name in enumerate(data.ids):
            image, mask = data[i]
            expected = np.zeros(mask.shape, int)
            expected[:3, :4] = {"photo 1": 1, "c": 0}.get(name, 2)
            assert np.array_equal(mask, expected) and np.array_equal(image, picture(name)[0])


def test_polygons_without_a_pixel_are_counted(site):
    path = export(site)
    content = json.loads(path.read_text())
    content["annotations"][1]["segmentation"] = [[1, 1, 3, 3]]
    content["annotations"][2]["segmentation"] = [[90, 90, 95, 90, 95, 95]]
    path.write_text(json.dumps(content))
    for _ in range(2):  # a finished set says it again
        notes = own(site, coco_file=path)[1]
        assert "2 annotations cover no pixel (no area, or outside the image): left out" in notes


def test_nothing_is_written_below_the_real_images(site):
    before = files(site)
    with pytest.raises(FileExistsError, match=r"images.new lies in .*images, which holds other data, which is not written to"):
        prepare_own(site / "images", site / "site.yaml", "new", site / "images", masks=site / "grey")
    assert files(site) == before


def test_brushed_masks_that_are_marked_as_crowds(site):
    path = export(site)
    content = json.loads(path.read_text())
    content["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    root, notes = own(site, coco_file=path)
    assert notes[-1].endswith("--crowds objects paints them as objects")
    other, notes = own(site, coco_file=path, crowds=False, name="objects")
    masks = [SegmentationFolder(r, "train", taxonomy(root / "taxonomy.yaml")) for r in (root, other)]
    assert notes == ["1 images have no object: background"]
    values = [{int(v) for i in range(len(m)) for v in np.unique(m[i][1])} for m in masks]
    assert 255 not in values[1] and (255 in values[0]) == ("photo 2" in masks[0].ids)


def test_categories_that_are_no_class(site):
    categories = [{"id": 0, "name": "_background_"}, {"id": 7, "name": "shadow"}, {"id": 3, "name": "scratch"}]
    path = export(site, categories=categories)
    with pytest.raises(ValueError, match=r"export\.json: 1 categories are no class of taxonomy 'site': shadow \(id 7\)"):
        own(site, coco_file=path)
    root, notes = own(site, coco_file=path, mapping={"shadow": "ignore"})
    assert "1 classes are in no mask: gold ring" in notes
    assert {255} <= set(np.unique(np.asarray(Image.open(root / "SegmentationClass/line/a.png"))).tolist()) <= {0, 255}


def test_an_export_of_other_images(site):
    path = export(site)
    (site / "images/c.png").rename(site / "images/d.png")
    with pytest.raises(
        ValueError, match=r"does not match the images: 1 of the 5 images it lists are not in .*, such as \['c\.png'\]"
    ):
        own(site, coco_file=path)


# VOC layout, command line


def test_a_folder_in_voc_layout(site, tmp_path):
    voc = tmp_path / "voc"
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (site / "images").rename(voc / "JPEGImages")
    (site / "colours").rename(voc / "SegmentationClass")
    for split in ("train", "val"):
        (site / f"{split}.txt").rename(voc / f"ImageSets/Segmentation/{split}.txt")
    (voc / "ImageSets/Segmentation/trainval.txt").write_text("c\n")
    root, _ = prepare_own(tmp_path / "data", site / "site.yaml", "own", voc=voc)
    assert {s: len(read_split(root, s)) for s in ("train", "val")} == {"train": 3, "val": 2}
    root, _ = prepare_own(tmp_path / "data", site / "site.yaml", "shared", voc=voc, shares={"val": 0.4})
    assert {s: len(read_split(root, s)) for s in ("train", "val")} == {"train": 3, "val": 2}


def test_the_command_line(site, tmp_path, capsys):
    command = ["prepare", "own", "--root", str(tmp_path / "data"), "--taxonomy", str(site / "site.yaml"), "--images",
               str(site / "images")]  # fmt: skip
    splits = [f"--split={s}={site / s}.txt" for s in ("train", "val")]
    assert main([*command, "--masks", str(site / "ids"), "--mask-ending", "_mask", *splits, "--name", "hall"]) == 0
    assert capsys.readouterr().out == f"ready: {tmp_path / 'data/hall'}\n"
    export(site)
    assert main([*command, "--coco", str(site / "export.json"), "--share", "val=0.4", "--map", "scrape=gold ring"]) == 0
    assert "warning: 1 classes are in no mask: scratch" in capsys.readouterr().err
    assert len(read_split(tmp_path / "data/own", "val")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --images with one of --masks, --coco, --cvat and --label-studio"),
        (["--masks", "a", "--coco", "b"], "give --images with one of --masks, --coco, --cvat and --label-studio"),
        (["--masks", "a", "--map", "b=c"], "--map and --crowds belong to --coco"),
        (["--masks", "a", "--split", "val=x", "--share", "val=0.1"], "give either --split files or --share parts"),
        (["--masks", "a", "--share", "val=much"], "--share val=much: expected a part of 1"),
        (["--masks", "a", "--name", "../b"], "name '../b': expected the name of a folder"),
        (["--masks", "nowhere"], "no folder nowhere"),
        (["--coco", "nowhere.json"], "nowhere.json"),
    ],
)
def test_options_that_make_no_sense(site, tmp_path, options, message, capsys):
    command = ["prepare", "own", "--root", str(tmp_path / "data"), "--taxonomy", str(site / "site.yaml"), "--images"]
    assert main([*command, str(site / "images"), *options]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and not (tmp_path / "data").exists()


def test_more_labelled_images_make_a_set_in_which_the_old_splits_are_kept(site, capsys):
    """The refusal of the larger set under the old name says the command."""
    data, every = site.parent / "data", []
    command = ["prepare", "own", "--taxonomy", str(site / "site.yaml"), "--root", str(data)]
    command += ["--images", str(site / "images"), "--masks", str(site / "colours")]
    assert main([*command, "--name", "small"]) == 0
    before = {split: read_split(data / "small", split) for split in ("train", "val")}
    for i in range(6):
        image, _ = picture(f"new {i}")
        (site / f"images/new {i}.png").write_bytes(encode_image(image, ".png"))
        Image.fromarray(np.full_like(image, (255, 0, 0))).save(site / f"colours/new {i}.png")
    assert main([*command, "--name", "small"]) == 2
    assert f"--name small_11 --splits-of {data / 'small'}" in capsys.readouterr().err
    assert main([*command, "--name", "small_11", "--splits-of", str(data / "small")]) == 0
    assert "6 images are new, 5 stay in their splits" in capsys.readouterr().err
    for split, ids in before.items():
        assert read_split(data / "small", split) == ids
        every += (now := read_split(data / "small_11", split))
        assert set(ids) < set(now)
    assert len(every) == len(set(every)) == 11
    assert main([*command, "--name", "x", "--splits-of", str(site / "images")]) == 2
    assert "is no prepared data set" in capsys.readouterr().err
