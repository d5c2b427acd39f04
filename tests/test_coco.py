import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from dd.coco import CocoImage, Shape, category_values, draw, images_of, read_coco
from dd.provenance import write_json
from dd.taxonomy import COCO_NAMES, Taxonomy, taxonomy

PETS = Taxonomy("pets", ["cat", "dog", "guinea pig"], {"cat": ["kitten"]})


def box(left, top, right, bottom):
    """The polygon that covers whole pixels [left, right) x [top, bottom)."""
    return [left, top, right, top, right, bottom, left, bottom]


def drawn(*shapes, height=8, width=10):
    return draw(CocoImage("a.jpg", height, width, tuple(Shape(i, *shape) for i, shape in enumerate(shapes))))


def runs(mask):
    """Uncompressed run lengths, column by column, beginning with zeros: the form COCO writes for crowds."""
    flat, counts, last = np.asarray(mask).ravel("F"), [0], 0
    for value in flat:
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return {"size": list(np.asarray(mask).shape), "counts": counts}


def region(left, top, right, bottom, height=8, width=10):
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


# The rule, on cases drawn by hand


def test_overlap_small_over_large_in_any_order():
    large, small, expected = (1, [box(1, 1, 9, 7)]), (2, [box(3, 2, 6, 5)]), region(1, 1, 9, 7)
    expected[2:5, 3:6] = 2
    assert np.array_equal(drawn(large, small), expected) and np.array_equal(drawn(small, large), expected)


def test_three_objects_of_two_classes():
    mask = drawn((3, [box(5, 0, 7, 8)]), (1, [box(0, 0, 6, 4)]), (1, [box(0, 6, 10, 8)]), (2, [box(5, 3, 6, 4)]))
    expected = np.array(
        [[1, 1, 1, 1, 1, 3, 3, 0, 0, 0]] * 3 + [[1, 1, 1, 1, 1, 2, 3, 0, 0, 0]]
        + [[0, 0, 0, 0, 0, 3, 3, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 1, 3, 3, 1, 1, 1]] * 2
    )  # areas 24, 20, 16, 1  # fmt: skip
    assert np.array_equal(mask, expected)


def test_equal_areas_are_painted_in_the_order_of_the_file():
    assert drawn((1, [box(0, 0, 4, 4)]), (2, [box(2, 0, 6, 4)]))[0, :6].tolist() == [1, 1, 2, 2, 2, 2]
    assert drawn((2, [box(2, 0, 6, 4)]), (1, [box(0, 0, 4, 4)]))[0, :6].tolist() == [1, 1, 1, 1, 2, 2]


def test_the_area_is_that_of_the_mask_not_of_its_box():
    frame = region(0, 0, 10, 8) - region(1, 1, 9, 7)  # 32 pixels, its box 80
    expected = np.where(frame, 1, region(1, 1, 9, 7) * 2)
    assert np.array_equal(drawn((1, runs(frame)), (2, [box(0, 0, 10, 8)])), expected)


def test_crowds_are_ignored_where_no_object_is():
    crowd, small = region(0, 0, 8, 6), region(4, 3, 10, 8)
    for shapes in [((1, runs(crowd), True), (2, runs(small))), ((2, runs(small)), (1, runs(crowd), True))]:
        assert np.array_equal(drawn(*shapes), np.where(small, 2, crowd * 255))
    large_object = (2, [box(0, 0, 10, 8)])  # larger than the crowd, and yet over it
    assert np.array_equal(drawn((1, runs(crowd), True), large_object), np.full((8, 10), 2))


def test_holes_of_run_lengths_and_parts_of_polygons():
    ring = region(1, 1, 8, 7) - region(3, 3, 5, 5)
    assert np.array_equal(drawn((1, runs(ring))), ring)
    compressed = rle.encode(np.asfortranarray(ring))
    assert np.array_equal(drawn((3, {**compressed, "counts": compressed["counts"].decode()})), ring * 3)
    parts = (2, [box(0, 0, 2, 2), box(5, 5, 9, 8), box(6, 6, 7, 7)])  # parts join; a part inside another makes no hole
    assert np.array_equal(drawn(parts), 2 * (region(0, 0, 2, 2) + region(5, 5, 9, 8)))


def test_no_objects_is_background_and_an_ignored_object_is_255():
    assert not drawn().any()
    assert np.array_equal(drawn((255, [box(2, 2, 4, 4)]), (1, [box(0, 0, 10, 8)]))[2], [1, 1, 255, 255, 1, 1, 1, 1, 1, 1])


def test_polygons_without_an_area_draw_nothing():
    assert not drawn((1, [[1, 1, 5, 5]])).any()  # pycocotools would read a box
    assert drawn((1, [[1, 1, 5, 5], box(0, 0, 2, 2)])).sum() == 4


# Against another rasteriser


@pytest.mark.parametrize("seed", range(12))
def test_polygons_agree_with_pil_up_to_boundary_pixels(seed):
    rng = np.random.default_rng(seed)
    height, width = 90 + seed, 120 - seed
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 12)))
    radius = rng.uniform(5, 60, len(angles))  # star-shaped, partly outside the image
    points = np.stack([60 + radius * np.cos(angles), 45 + radius * np.sin(angles)], 1)
    ours = drawn((1, [points.ravel().tolist()]), height=height, width=width)
    canvas = Image.new("L", (width, height))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points - 0.5], fill=1)  # COCO's pixel 0 covers 0 to 1, PIL's is at 0
    theirs = np.asarray(canvas)
    outline = Image.new("L", (width, height))
    ImageDraw.Draw(outline).line([tuple(p) for p in [*(points - 0.5), points[0] - 0.5]], fill=1, width=3)
    assert theirs.sum() > 200
    assert not ((ours != theirs) & (np.asarray(outline) == 0)).any()
    assert (ours != theirs).sum() <= 0.75 * np.asarray(outline).sum()


# Categories


def test_the_80_categories_get_the_ids_1_to_80_in_the_order_of_their_ids():
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    ids = [i for i in range(1, 91) if i not in gaps]
    categories = [{"id": i, "name": n} for i, n in zip(ids, COCO_NAMES, strict=True)]
    values = category_values(categories[::-1], taxonomy("coco"))
    assert [values[i] for i in ids] == list(range(1, 81))
    assert values[13] == 12 and COCO_NAMES[11] == "stop sign" and values[90] == 80 and COCO_NAMES[79] == "toothbrush"


def test_categories_are_found_by_name_and_synonym_and_by_the_map():
    names = ["Dog", "kitten", "guinea pig", "_background_", "scratch", "puppy"]
    categories = [{"id": 10 * i, "name": n} for i, n in enumerate(names)]
    mapping = {"scratch": "ignore", "puppy": "dog"}
    assert category_values(categories, PETS, mapping) == {0: 2, 10: 1, 20: 3, 30: 0, 40: 255, 50: 2}


@pytest.mark.parametrize(
    ("names", "mapping", "message"),
    [
        (
            ["cat", "cow", "pig"],
            {},
            r"2 categories are no class of taxonomy 'pets': cow \(id 1\), pig \(id 2\)\. .*--map NAME=ignore",
        ),
        (["cat"], {"cow": "ignore"}, "category 'cow' is not in the file; allowed: cat"),
        (["cat", "cow"], {"cow": "bull"}, "class 'bull' is not in the taxonomy; allowed: background, ignore, cat, dog"),
    ],
)
def test_unknown_categories(names, mapping, message):
    with pytest.raises(ValueError, match=message):
        category_values([{"id": i, "name": n} for i, n in enumerate(names)], PETS, mapping)


# Files


def content(**changes):
    return {
        "images": [{"id": 7, "file_name": "b.jpg", "height": 8, "width": 10},
                   {"id": 3, "file_name": "dir\\a.b.png", "height": 4, "width": 4}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 18, "segmentation": [box(0, 0, 2, 2)], "iscrowd": 0},
                        {"id": 2, "image_id": 7, "category_id": 17, "segmentation": runs(region(0, 0, 4, 4)), "iscrowd": 1},
                        {"id": 3, "image_id": 7, "category_id": 17, "segmentation": []}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        **changes,
    }  # fmt: skip


def test_images_and_their_shapes(tmp_path):
    write_json(tmp_path / "a.json", content())
    images, notes = images_of(read_coco(tmp_path / "a.json"), {18: 2, 17: 1})
    assert [(i.stem, len(i.shapes)) for i in images] == [("b", 2), ("a.b", 0)]
    assert np.array_equal(draw(images[0]), np.where(region(0, 0, 2, 2), 2, region(0, 0, 4, 4) * 255))
    assert draw(images[1]).shape == (4, 4) and not draw(images[1]).any()
    assert notes == [
        "1 annotations have no segmentation (boxes?): left out",
        "1 crowd annotations (iscrowd=1) are 255 where no object covers them",
    ]
    images, notes = images_of(content(), {18: 2, 17: 1}, crowds=False)
    assert np.array_equal(draw(images[0]), np.where(region(0, 0, 2, 2), 2, region(0, 0, 4, 4))) and len(notes) == 1


IMAGE = {"id": 1, "file_name": "a.jpg", "height": 8, "width": 10}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": None}, "holds the lists images, annotations, categories"),
        ({"images": []}, "lists no images"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "height": 8}]}, "an entry of images has no 'width'"),
        ({"images": [{**IMAGE, "width": 10.5}]}, "whole numbers of pixels"),
        ({"images": [{**IMAGE, "height": 0}]}, "whole numbers of pixels"),
        ({"images": [IMAGE, {**IMAGE, "id": 2}]}, r"images must have different file_names, got \['a.jpg'\]"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}, "categories must have different ids"),
        ({"annotations": [{"image_id": 7}]}, "an entry of annotations has no 'category_id'"),
    ],
)
def test_files_that_are_doubtful(tmp_path, changes, message):
    write_json(tmp_path / "a.json", content(**changes))
    with pytest.raises(ValueError, match=f"a.json.* {message}"):
        read_coco(tmp_path / "a.json")


def test_files_that_are_no_json(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_coco(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_id": 9, "category_id": 17, "segmentation": [[1]]}, r"1 annotations belong to images .* image_id \[9\]"),
        ({"image_id": 7, "category_id": 91, "segmentation": [[1]]}, r"category ids .* not define: \[91\]; defined: \[17"),
        ({"image_id": 7, "category_id": 17, "bbox": [1, 2, 3, 4]}, "none of the 1 annotations has a segmentation"),
    ],
)  # fmt: skip
def test_annotations_that_belong_nowhere(row, message):
    with pytest.raises(ValueError, match=message):
        images_of(content(annotations=[row]), {18: 2, 17: 1})


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 5, 1, 5, 5, 1]], "odd number"),
        ([["a", 1, 5, 1, 5, 5]], "could not convert"),
        ([1, 2, 3, 4, 5, 6], "has no len"),
        ({"size": [10, 8], "counts": [80]}, r"for \[height, width\] \[10, 8\], the image is \[8, 10\]"),
        ({"size": [8, 10], "counts": [70, 5]}, "do not add up"),
        ({"size": [8, 10], "counts": [100, -20]}, "do not add up"),
        ({"size": [8, 10], "counts": rle.encode(np.eye(20, dtype=np.uint8, order="F"))["counts"].decode()}, "Invalid RLE"),
        ({"counts": [80]}, "size"),
    ],
)
def test_segmentations_that_cannot_be_drawn(segmentation, message):
    with pytest.raises(ValueError, match=f"annotation 0: .*({message})"):
        drawn((1, segmentation))
