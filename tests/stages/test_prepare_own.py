import io
import json
import re
import zipfile
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from dd.__main__ import main
from dd.data.datasets import SegmentationFolder, encode_image, encode_mask, read_split
from dd.data.groups import recorded_groups
from dd.stages.prepare_own import OwnData, prepare_own
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
    return prepare_own(
        site.parent / "data",
        site / "site.yaml",
        kwargs.pop("name", "own"),
        OwnData(site / "images", **kwargs),
    )


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
    assert root.name == "hall_3" and {s: len(v) for s, v in found.items()} == {
        "train": 3,
        "val": 1,
        "tune": 1,
    }
    assert sorted(sum(found.values(), [])) == sorted(NAMES)


def test_folders_that_only_partly_match(site):
    (site / "images/line/a.png").unlink()
    (site / "grey/c.png").unlink()
    _, notes = own(site, masks=site / "grey")
    assert notes == [
        "1 images have no mask of the same stem and are left out, such as ['c']",
        "1 masks have no image of the same stem and are left out, such as ['line/a']",
    ]
    with pytest.raises(
        ValueError,
        match=r"no mask in .*ids has the stem of an image: .*'line/a_mask'.*--mask-ending",
    ):
        own(site, masks=site / "ids", name="other")


def test_values_and_colours_that_no_class_has(site):
    mask = picture("c")[1]
    mask[0, :3] = 3, 4, 77
    Image.fromarray(mask).save(site / "grey/c.png")
    with pytest.raises(
        ValueError,
        match=r"1 of 5 masks .*\n.*c\.png holds values \[3, 4, 77\] outside the 3 classes",
    ):
        own(site, masks=site / "grey")
    coloured = np.full((*mask.shape, 3), 10, np.uint8)
    coloured[0, 0] = 1, 2, 3
    Image.fromarray(coloured).save(site / "colours/c.png")
    with pytest.raises(
        ValueError,
        match=r"c\.png has 1 colours that taxonomy 'site' gives to no class, such as "
        r"\[\[1, 2, 3\]\]",
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
    (tmp_path / "more.yaml").write_text(
        SITE.replace("background_colour", "  - dent\n  - {name: rust}\nbackground_colour")
    )
    _, notes = prepare_own(
        tmp_path / "data", tmp_path / "more.yaml", "own", OwnData(site / "images", site / "grey")
    )
    assert notes == ["2 classes are in no mask: dent, rust"]


def test_changed_masks_are_noticed(site):
    root, _ = own(site, masks=site / "grey")
    everything = files(root)
    assert own(site, masks=site / "grey")[0] == root and files(root) == everything
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(site / "grey/c.png")
    with pytest.raises(FileExistsError, match="own was made with other settings:\n  masks_state"):
        own(site, masks=site / "grey")
    assert files(root) == everything


def test_values_that_mean_something_else(site):
    for file in (site / "grey").rglob("*.png"):
        mask = np.asarray(Image.open(file))
        Image.fromarray(np.array([7, 8, 1, *[11] * 253], np.uint8)[mask]).save(file)
    with pytest.raises(
        ValueError,
        match=r"holds values \[7, 8, 11\] .* --map 7=ignore, or =background, or a class \(and 4",
    ):
        own(site, masks=site / "grey")
    mapping = {"7": "background", "8": "scratch", "11": "ignore"}
    with pytest.raises(
        ValueError,
        match="holds value 1, the place of 'scratch', to which --map sends 8: say what 1 means",
    ):
        own(site, masks=site / "grey", mapping=mapping)
    root, _ = own(
        site, masks=site / "grey", mapping=mapping | {"1": "gold ring"}, split_files=lists(site)
    )
    data = SegmentationFolder(root, "train", taxonomy(root / "taxonomy.yaml"))
    assert all(np.array_equal(data[i][1], picture(name)[1]) for i, name in enumerate(data.ids))
    with pytest.raises(FileExistsError, match="map"):
        own(site, masks=site / "grey", mapping=mapping | {"1": "ignore"}, split_files=lists(site))
    for wrong, message in (
        ({"300": "ignore"}, "'300' is not a value"),
        ({"1": "dent"}, "class 'dent' is not in the taxonomy"),
    ):
        with pytest.raises(ValueError, match=message):
            own(site, masks=site / "grey", mapping=wrong, name="other")


def black_and_white(site):
    for file in (site / "grey").rglob("*.png"):
        Image.fromarray((np.asarray(Image.open(file)) == 1).astype(np.uint8) * 255).save(file)


def test_black_and_white_masks_are_asked_about(site):
    black_and_white(site)
    with pytest.raises(
        ValueError,
        match=r"no class .* occurs in the 5 masks: .* 255 \(ignored\) alone\. .*--map 255=CLASS",
    ):
        own(site, masks=site / "grey")
    root, notes = own(site, masks=site / "grey", mapping={"255": "scratch"})
    mask = np.asarray(Image.open(root / "SegmentationClass/c.png"))
    assert np.array_equal(mask, picture("c")[1] == 1) and notes == [
        "1 classes are in no mask: gold ring"
    ]


def test_white_that_the_taxonomy_gives_to_a_class(site):
    black_and_white(site)
    (site / "site.yaml").write_text(
        "name: site\nclasses: [{name: scratch, colour: [255, 255, 255]}]\n"
    )
    with pytest.raises(
        ValueError, match=r"value 255 is ignored, its colour \[255, 255, 255\] 'scratch'"
    ):
        own(site, masks=site / "grey")


def test_colours_that_nobody_gave_are_not_read(site):
    (site / "site.yaml").write_text("name: site\nclasses: [scratch, gold ring]\n")
    for file in (site / "colours").rglob("*.png"):
        pixels = np.asarray(Image.open(file)).copy()
        pixels[(pixels == (255, 0, 0)).all(-1)] = 0, 128, 0
        pixels[(pixels == (0, 255, 0)).all(-1)] = 128, 0, 0
        pixels[(pixels == (10, 10, 10)).all(-1)] = 0, 0, 0
        Image.fromarray(pixels).save(file)
    with pytest.raises(
        ValueError, match=r"VOC's for 'scratch', 'gold ring', but .*write colour: .*\(and 4 more"
    ):
        own(site, masks=site / "colours")
    # the same beside a labelmap.txt, which says what they mean
    voc = site / "export"
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (site / "images").rename(voc / "JPEGImages")
    (site / "colours").rename(voc / "SegmentationClass")
    (voc / "labelmap.txt").write_text(
        "background:0,0,0::\nscratch:0,128,0::\ngold_ring:128,0,0::\nignored:224,224,192::\n"
    )
    for split in ("train", "val"):
        (site / f"{split}.txt").rename(voc / f"ImageSets/Segmentation/{split}.txt")
    root, _ = prepare_own(site.parent / "data", site / "site.yaml", "own", OwnData(voc=voc))
    for split in ("train", "val"):
        data = SegmentationFolder(root, split, taxonomy(root / "taxonomy.yaml"))
        for i, name in enumerate(data.ids):
            assert np.array_equal(data[i][1], picture(name)[1])
    other, _ = prepare_own(  # as images and masks, which lie beside it
        site.parent / "data",
        site / "site.yaml",
        "o",
        OwnData(voc / "JPEGImages", voc / "SegmentationClass"),
    )
    for file in (root / "SegmentationClass").rglob("*.png"):
        assert file.read_bytes() == (other / file.relative_to(root)).read_bytes()
    unknown = "background:0,0,0::\nscratch:0,128,0::\nring:128,0,0::\nignored:224,224,192::\n"
    (voc / "labelmap.txt").write_text(unknown)
    with pytest.raises(ValueError, match="1 labels in it are not a class of the taxonomy: ring"):
        prepare_own(
            site.parent / "data",
            site / "site.yaml",
            "p",
            OwnData(voc / "JPEGImages", voc / "SegmentationClass"),
        )


def cvat(site, path, top="", extra=(), listed="{}"):
    """A zip as CVAT writes it and as people hand it on, of all images."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{top}labelmap.txt",
            "background:0,0,0::\nscratch:9,9,9::\ngold ring:8,8,8::\nignored:7,7,7::\n",
        )
        archive.writestr(
            f"{top}ImageSets/Segmentation/default.txt",
            "".join(listed.format(n) + "\n" for n in NAMES),
        )
        for name in NAMES:
            colours = np.array([(0, 0, 0), (9, 9, 9), (8, 8, 8), *[(7, 7, 7)] * 253], np.uint8)
            data = io.BytesIO()
            Image.fromarray(colours[picture(name)[1]]).save(data, "PNG")
            archive.writestr(f"{top}SegmentationClass/{name}.png", data.getvalue())
        for name in extra:
            archive.writestr(name, b"\0\5\26\7")
    return path


@pytest.mark.parametrize(
    "how",
    [
        {"top": "my_export/"},
        {
            "extra": [
                "SegmentationClass/._c.png",
                "__MACOSX/SegmentationClass/._c.png",
                "__MACOSX/._labelmap.txt",
            ]
        },
        {"listed": "{}.jpg"},
        {"listed": "JPEGImages/{}.PNG", "top": "a/", "extra": ["__MACOSX/a/._labelmap.txt"]},
    ],
)
@pytest.mark.parametrize("unpacked", [False, True])
def test_archives_of_cvat_as_people_hand_them_on(site, tmp_path, how, unpacked):
    path = cvat(site, tmp_path / "e.zip", **how)
    if unpacked:
        zipfile.ZipFile(path).extractall(tmp_path / "e")
        path = tmp_path / "e"
    root, notes = own(site, cvat=path, split_files=lists(site))
    assert notes == []
    data = SegmentationFolder(root, "train", taxonomy(root / "taxonomy.yaml"))
    assert all(np.array_equal(data[i][1], picture(name)[1]) for i, name in enumerate(data.ids))


def test_names_in_a_zip_without_the_flag_of_utf8(site, tmp_path):
    next((site / "images").glob("c.*")).rename(site / "images/Maß.png")
    path = cvat(site, tmp_path / "e.zip")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "f.zip", "w") as other:
        for info in archive.infolist():
            content = archive.read(info).replace(b"\nc\n", "\nMaß\n".encode())
            other.writestr(info.filename.replace("/c.png", "/MaXX.png"), content)
    raw = (
        (tmp_path / "f.zip").read_bytes().replace(b"/MaXX.png", "/Maß.png".encode())
    )  # names of equal length
    (tmp_path / "f.zip").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "f.zip") as archive:
        assert "SegmentationClass/Ma├ƒ.png" in archive.namelist()
    root, _ = own(site, cvat=tmp_path / "f.zip")
    assert np.array_equal(
        np.asarray(Image.open(root / "SegmentationClass/Maß.png")), picture("c")[1]
    )


def test_lists_in_an_archive_that_unpack_to_more_than_a_list_holds(site, tmp_path):
    path = cvat(site, tmp_path / "e.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ImageSets/Segmentation/more.txt", bytes(17 << 20))
    with pytest.raises(ValueError, match=r"more\.txt is larger than 16 MiB unpacked"):
        own(site, cvat=path)


def test_a_member_that_is_damaged_in_its_packing(site, tmp_path):
    path = tmp_path / "e.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("labelmap.txt", "background:0,0,0::\nscratch:9,9,9::\n" * 50)
    data = bytearray(path.read_bytes())
    at = data.index(b"labelmap.txt") + 12
    data[at + 4 : at + 24] = b"\xff" * 20
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"labelmap\.txt is damaged, or packed in a way that cannot be read"
    ):
        own(site, cvat=path)


def test_formats_that_are_recognised_and_not_read(site, tmp_path):
    (tmp_path / "annotations.xml").write_text("<annotations/>")
    with pytest.raises(
        ValueError,
        match=r"annotations\.xml is an XML file: export .* as \"Segmentation mask 1\.1\", a zip",
    ):
        own(site, cvat=tmp_path / "annotations.xml")
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/instances_default.json").write_text("{}")
    with pytest.raises(ValueError, match=r'This is an export as "COCO 1\.0"'):
        own(site, cvat=tmp_path / "coco")
    (tmp_path / "sa.json").write_text('{"image": {"image_id": 1}, "annotations": []}')
    with pytest.raises(ValueError, match="This is SA-1B's form"):
        own(site, coco_file=tmp_path / "sa.json")
    (tmp_path / "tasks.json").write_text("[]")
    with pytest.raises(ValueError, match="A list of tasks comes from Label Studio: --label-studio"):
        own(site, coco_file=tmp_path / "tasks.json")


def test_images_and_masks_in_one_folder(site):
    with pytest.raises(
        ValueError,
        match="images and masks are one folder, .*: say what the names of masks have more",
    ):
        own(site, masks=site / "images")
    for file in [p for p in (site / "ids").rglob("*") if p.is_file()]:
        file.rename(site / "images" / file.relative_to(site / "ids"))
    root, notes = own(site, masks=site / "images", mask_ending="_mask", split_files=lists(site))
    assert notes == []
    data = SegmentationFolder(root, "train", taxonomy(root / "taxonomy.yaml"))
    assert all(np.array_equal(data[i][1], picture(name)[1]) for i, name in enumerate(data.ids))


def test_names_with_something_before_or_behind(site):
    for what, (before, behind) in {
        "images": ("image_", "_leftImg8bit"),
        "grey": ("gt_", "_gtFine_labelIds"),
    }.items():
        for file in [p for p in (site / what).rglob("*") if p.is_file()]:
            file.rename(file.with_name(f"{before}{file.stem}{behind}{file.suffix}"))
    with pytest.raises(
        ValueError, match="no mask in .* --image-ending and --image-beginning take a part off"
    ):
        own(site, masks=site / "grey", mask_ending="_gtFine_labelIds")
    ends = {"mask_ending": "_gtFine_labelIds", "mask_beginning": "gt_"}
    ends |= {"image_ending": "_leftImg8bit", "image_beginning": "image_"}
    next((site / "images").glob("image_c_*")).rename(site / "images/d.png")
    root, notes = own(site, masks=site / "grey", **ends)
    assert notes == [
        "1 images are not called image_*_leftImg8bit and are left out, such as ['d']",
        "1 masks have no image of the same stem and are left out, such as ['c']",
    ]
    data = SegmentationFolder(root, "train", taxonomy(root / "taxonomy.yaml"))
    masks = {data.ids[i]: data[i][1] for i in range(len(data))}
    for name in set(NAMES) - {"c"}:
        folder, slash, last = name.rpartition("/")
        if (full := f"{folder}{slash}image_{last}_leftImg8bit") in masks:
            assert np.array_equal(masks[full], picture(name)[1])


# COCO JSON of other tools


def export(site, **changes):
    """As labelme, CVAT and Label Studio write it: polygons with file names in their own way, in
    the order they like."""
    sizes = {name: picture(name)[1].shape for name in NAMES}
    written = {
        "photo 1": "photo 1.png",
        "photo 2": "JPEGImages/photo 2.PNG",
        "line/a": "line\\a.png",
        "line/b.v2": "/data/upload/3/b.v2.PNG",
        "c": "c.png",
    }
    content = {
        "images": [
            {"id": i, "file_name": written[n], "height": sizes[n][0], "width": sizes[n][1]}
            for i, n in enumerate(NAMES)
        ],
        "categories": [
            {"id": 0, "name": "_background_"},
            {"id": 7, "name": "Gold Ring"},
            {"id": 3, "name": "scrape"},
        ],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": 7,
                "segmentation": [[0, 0, 4, 0, 4, 3, 0, 3]],
                "iscrowd": 0,
            }
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
    with pytest.raises(
        FileExistsError,
        match=r"images.new lies in .*images, which holds other data and is not written to",
    ):
        prepare_own(
            site / "images",
            site / "site.yaml",
            "new",
            OwnData(site / "images", masks=site / "grey"),
        )
    assert files(site) == before


def test_brushed_masks_that_are_marked_as_crowds(site):
    path = export(site)
    content = json.loads(path.read_text())
    content["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    root, notes = own(site, coco_file=path)
    assert notes[-1].endswith("--crowds objects paints them as objects")
    other, notes = own(site, coco_file=path, crowds=False, name="objects")
    masks = [
        SegmentationFolder(r, "train", taxonomy(root / "taxonomy.yaml")) for r in (root, other)
    ]
    assert notes == ["1 images have no object: background"]
    values = [{int(v) for i in range(len(m)) for v in np.unique(m[i][1])} for m in masks]
    assert 255 not in values[1] and (255 in values[0]) == ("photo 2" in masks[0].ids)


def test_categories_that_are_no_class(site):
    categories = [
        {"id": 0, "name": "_background_"},
        {"id": 7, "name": "shadow"},
        {"id": 3, "name": "scratch"},
    ]
    path = export(site, categories=categories)
    with pytest.raises(
        ValueError,
        match=r"export\.json: 1 categories are not a class of taxonomy 'site': shadow \(id 7\)",
    ):
        own(site, coco_file=path)
    root, notes = own(site, coco_file=path, mapping={"shadow": "ignore"})
    assert "1 classes are in no mask: gold ring" in notes
    assert (
        {255}
        <= set(np.unique(np.asarray(Image.open(root / "SegmentationClass/line/a.png"))).tolist())
        <= {0, 255}
    )


def test_an_export_of_other_images(site):
    path = export(site)
    (site / "images/c.png").rename(site / "images/d.png")
    with pytest.raises(
        ValueError,
        match=r"does not match the images: 1 of the 5 images it lists are not in .*, such as "
        r"'c\.png'",
    ):
        own(site, coco_file=path)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_masks_whose_names_are_of_the_other_form(site, tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    name = normalize(form, "Maß é")
    (site / "images/c.png").rename(site / f"images/{name}.png")
    (site / "grey/c.png").rename(site / f"grey/{normalize(other, name)}.png")
    (site / "val.txt").write_text(f"photo 2\n{normalize(other, name)}\n")
    root, notes = own(site, masks=site / "grey", split_files=lists(site))
    data = SegmentationFolder(root, "val", taxonomy(root / "taxonomy.yaml"))
    assert notes == [] and np.array_equal(data[1][1], picture("c")[1])
    # a folder in VOC layout whose lists are of the other form than its files
    voc = tmp_path / "voc"
    voc.mkdir()
    for folder, part in (("JPEGImages", "images"), ("SegmentationClass", "grey")):
        (site / part).rename(voc / folder)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/val.txt").write_text(f"{normalize(other, 'Maß_é')}\n")
    (voc / f"JPEGImages/{name}.png").rename(voc / f"JPEGImages/{normalize(form, 'Maß_é')}.png")
    mask = next((voc / "SegmentationClass").glob("Ma*.png"))
    mask.rename(mask.with_name(f"{normalize(form, 'Maß_é')}.png"))
    read = SegmentationFolder(voc, "val", taxonomy(site / "site.yaml"))[0]
    assert np.array_equal(read[1], picture("c")[1])


def test_labels_of_another_camera_are_not_taken(site):
    path = export(site)
    content = json.loads(path.read_text())
    content["images"][2]["file_name"] = "cam1/a.png"
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"1 of the 5 .*such as 'cam1/a\.png' \(another folder has 'line/a'\)"
    ):
        own(site, coco_file=path)


def test_one_coco_file_for_each_split(site, capsys):
    """As Roboflow lays it out: a JSON beside the images of each split, and the same names in all
    of them."""
    content = json.loads(export(site).read_text())
    for split, names in {"train": NAMES[:3], "valid": NAMES[3:]}.items():
        (site / split).mkdir()
        rows = []
        for i, name in enumerate(names):
            file = next((site / "images").glob(f"{name}.*"))
            file.rename(site / split / f"{i}.png")
            rows.append({**content["images"][NAMES.index(name)], "file_name": f"{i}.png"})
        found = {row["id"] for row in rows}
        part = {
            **content,
            "images": rows,
            "annotations": [a for a in content["annotations"] if a["image_id"] in found],
        }
        part["categories"] = [
            *content["categories"],
            {"id": 99, "name": "objects-abcd", "supercategory": "none"},
        ]
        (site / split / "_annotations.coco.json").write_text(json.dumps(part))
    (site / "images/line").rmdir()
    for split in ("train", "valid"):
        (site / split).rename(site / "images" / split)
    files = [
        f"--coco={s}={site / 'images' / f / '_annotations.coco.json'}"
        for s, f in (("train", "train"), ("val", "valid"))
    ]
    command = [
        "prepare",
        "own",
        "--root",
        str(site.parent / "data"),
        "--taxonomy",
        str(site / "site.yaml"),
    ]
    assert main([*command, "--images", str(site / "images"), *files]) == 0
    root = site.parent / "data/own"
    assert read_split(root, "train") == ["train/0", "train/1", "train/2"] and read_split(
        root, "val"
    ) == ["valid/0", "valid/1"]
    for split, names in (("train", NAMES[:3]), ("val", NAMES[3:])):
        data = SegmentationFolder(root, split, taxonomy(root / "taxonomy.yaml"))
        assert all(np.array_equal(data[i][0], picture(name)[0]) for i, name in enumerate(names))
    assert capsys.readouterr().err.count("warning: val: 1 images have no object: background") == 1
    for more, message in (
        (["--share", "val=0.2"], "give it without --split and --share"),
        (["--map", "cow=ignore"], "category 'cow' is not in the file"),
    ):
        assert (
            main([*command, "--images", str(site / "images"), *files, *more, "--name", "other"])
            == 2
        )
        assert message in capsys.readouterr().err
    assert (
        main(
            [
                *command,
                "--images",
                str(site / "images"),
                files[0],
                files[0].replace("=train=", "=test="),
            ]
        )
        == 2
    )
    assert "holds 3 images of another split too, such as ['train/0'" in capsys.readouterr().err
    assert main([*command, "--images", str(site / "images"), files[0], files[0]]) == 2
    assert "several files need a split each" in capsys.readouterr().err


def test_names_that_label_studio_puts_into_its_coco(site):
    path = export(site)
    content = json.loads(path.read_text())
    for row, name in zip(content["images"], NAMES, strict=True):
        row["file_name"] = f"images/1a2b3c4d-{name.rpartition('/')[2].replace(' ', '_')}.png"
    path.write_text(json.dumps(content))
    assert own(site, coco_file=path)[1] == ["1 images have no object: background"]


def test_sizes_that_a_file_claims_are_compared_before_anything_is_drawn(site, monkeypatch):
    path = export(site)
    content = json.loads(path.read_text())
    for row in content["images"]:
        row |= {"height": 60000, "width": 60000}
    path.write_text(json.dumps(content))
    monkeypatch.setattr("dd.data.coco_json.draw", lambda image: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"(?s)5 of 5 masks .* its mask 60000x60000"):
        own(site, coco_file=path)


def test_hidden_and_linked_folders(site, tmp_path):
    (tmp_path / "disk2").mkdir()
    for folder in ("images", "grey"):
        (site / folder / ".ipynb_checkpoints").mkdir()
        file = next((site / folder).glob("c.*"))
        (site / folder / f".ipynb_checkpoints/c-checkpoint{file.suffix}").write_bytes(
            file.read_bytes()
        )
    (site / "images/line").rename(tmp_path / "disk2/line")
    (site / "images/line").symlink_to(tmp_path / "disk2/line")
    root, notes = own(site, masks=site / "grey", split_files=lists(site))
    assert len(notes) == 2 and all("1 hidden files in" in note for note in notes)
    assert len(read_split(root, "train")) == 3


# VOC layout, command line


def test_a_folder_in_voc_layout(site, tmp_path):
    voc = tmp_path / "voc"
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (site / "images").rename(voc / "JPEGImages")
    (site / "colours").rename(voc / "SegmentationClass")
    for split in ("train", "val"):
        (site / f"{split}.txt").rename(voc / f"ImageSets/Segmentation/{split}.txt")
    (voc / "ImageSets/Segmentation/trainval.txt").write_text("c\n")
    root, _ = prepare_own(tmp_path / "data", site / "site.yaml", "own", OwnData(voc=voc))
    assert {s: len(read_split(root, s)) for s in ("train", "val")} == {"train": 3, "val": 2}
    root, _ = prepare_own(
        tmp_path / "data", site / "site.yaml", "shared", OwnData(voc=voc, shares={"val": 0.4})
    )
    assert {s: len(read_split(root, s)) for s in ("train", "val")} == {"train": 3, "val": 2}


def test_the_command_line(site, tmp_path, capsys):
    command = [
        "prepare",
        "own",
        "--root",
        str(tmp_path / "data"),
        "--taxonomy",
        str(site / "site.yaml"),
        "--images",
        str(site / "images"),
    ]
    splits = [f"--split={s}={site / s}.txt" for s in ("train", "val")]
    assert (
        main(
            [
                *command,
                "--masks",
                str(site / "ids"),
                "--mask-ending",
                "_mask",
                *splits,
                "--name",
                "hall",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == f"ready: {tmp_path / 'data/hall'}\n"
    export(site)
    assert (
        main(
            [
                *command,
                "--coco",
                str(site / "export.json"),
                "--share",
                "val=0.4",
                "--map",
                "scrape=gold ring",
            ]
        )
        == 0
    )
    assert "warning: 1 classes are in no mask: scratch" in capsys.readouterr().err
    assert len(read_split(tmp_path / "data/own", "val")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --images with one of --masks, --coco, --cvat and --label-studio"),
        (
            ["--masks", "a", "--coco", "b"],
            "give --images with one of --masks, --coco, --cvat and --label-studio",
        ),
        (["--masks", "a", "--map", "b=c"], "map: 'b' is not a value of a mask"),
        (["--masks", "a", "--crowds", "objects"], "--crowds belongs to --coco"),
        (["--coco", "a", "--image-ending", "_b"], "belong to --masks and --voc"),
        (
            ["--masks", "a", "--split", "val=x", "--share", "val=0.1"],
            "give either --split files or --share parts",
        ),
        (["--masks", "a", "--share", "val=much"], "--share val=much: expected a part of 1"),
        (["--masks", "a", "--name", "../b"], "name='../b': expected the name of a folder"),
        (["--masks", "nowhere"], "no folder nowhere"),
        (["--coco", "nowhere.json"], "nowhere.json"),
    ],
)
def test_options_that_make_no_sense(site, tmp_path, options, message, capsys):
    command = [
        "prepare",
        "own",
        "--root",
        str(tmp_path / "data"),
        "--taxonomy",
        str(site / "site.yaml"),
        "--images",
    ]
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
    assert "is not a prepared data set" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- groups


@pytest.fixture
def cameras(tmp_path):
    """Twelve images of four cameras, three frames of each, with masks."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for camera in range(4):
        scene = np.random.default_rng(camera).integers(0, 256, (64, 72, 3), dtype=np.uint8)
        scene = np.kron(scene[::8, ::8], np.ones((8, 8, 1), np.uint8))
        for frame in range(3):
            image, mask = scene.copy(), np.zeros((64, 72), np.uint8)
            image[2 + frame : 5 + frame, 2:5], mask[2 + frame : 5 + frame, 2:5] = 255, 1 + frame % 2
            name = f"cam{camera}_{frame}.png"
            (tmp_path / "images" / name).write_bytes(encode_image(image, ".png"))
            (tmp_path / "masks" / name).write_bytes(encode_mask(mask))
    (tmp_path / "site.yaml").write_text(SITE)
    return tmp_path


def prepare(root, *more, name="own"):
    where = ["--root", str(root / "data"), "--taxonomy", str(root / "site.yaml"), "--name", name]
    given = ["--images", str(root / "images"), "--masks", str(root / "masks")]
    return main(["prepare", "own", *where, *given, "--share", "val=0.25", *more])


def test_a_camera_falls_into_one_split_and_it_is_recorded(cameras, capsys):
    assert prepare(cameras, "--group", r"(?P<camera>cam\d+)") == 0
    assert "look like" not in capsys.readouterr().err  # no frame has its neighbour elsewhere
    root = cameras / "data/own"
    train, val = (read_split(root, split) for split in ("train", "val"))
    assert len(val) == 3 and len({name[:4] for name in val}) == 1
    assert not {name[:4] for name in val} & {name[:4] for name in train}
    part = json.loads((root / "dataset.json").read_text())["parts"]["all"]
    assert part["groups"] == {
        "by": r"(?P<camera>cam\d+)",
        "noun": "camera",
        "number": 4,
        "splits": {"train": 3, "val": 1},
    }
    assert recorded_groups(root) == "split by group: 4 cameras (train 3, val 1)"
    before = files(root)
    assert prepare(cameras, "--group", r"(?P<camera>cam\d+)") == 0 and files(root) == before


def test_twins_in_two_splits_are_warned_of(cameras, capsys):
    assert prepare(cameras) == 0  # by image
    told = capsys.readouterr().err
    assert re.search(
        r"warning: \d+ images look like one of another split \(\d+ pairs\), such", told
    )
    assert recorded_groups(cameras / "data/own") is None


def test_groups_need_shares(cameras, capsys):
    (cameras / "train.txt").write_text("cam0_0\n")
    lists = f"train={cameras}/train.txt"
    where = ["--root", str(cameras / "data"), "--taxonomy", str(cameras / "site.yaml")]
    given = ["--images", str(cameras / "images"), "--masks", str(cameras / "masks")]
    assert main(["prepare", "own", *where, *given, "--split", lists, "--group", "folder"]) == 2
    assert "--group says how images are shared out (--share)" in capsys.readouterr().err
    assert prepare(cameras, "--group", "cam[1-3]", name="b") == 2
    assert "3 of 12 images have no group by it" in capsys.readouterr().err


def test_more_frames_of_a_camera_go_where_it_is(cameras):
    assert prepare(cameras, "--group", r"cam\d") == 0
    val = read_split(cameras / "data/own", "val")
    for name in (val[0], read_split(cameras / "data/own", "train")[0]):
        for folder in ("images", "masks"):
            copied = (cameras / folder / f"{name}.png").read_bytes()
            (cameras / folder / f"{name[:4]}_9.png").write_bytes(copied)
    grown = ("--splits-of", str(cameras / "data/own"), "--group", r"cam\d")
    assert prepare(cameras, *grown, name="more") == 0
    assert read_split(cameras / "data/more", "val") == [*val, f"{val[0][:4]}_9"]


def test_a_card_says_how_images_were_split(cameras):
    from dd.exports.card import _origin
    from dd.exports.checked import _about

    assert prepare(cameras, "--group", r"(?P<camera>cam\d+)") == 0
    about = _about(cameras / "data/own", "SegmentationClass", {})
    assert _origin(about).endswith("split by group: 4 cameras (train 3, val 1).")
