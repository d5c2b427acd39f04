import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from dd.data.coco_json import CocoImage, Shape, category_values, draw, images_of, read_coco
from dd.store.provenance import write_json
from dd.taxonomy import COCO_NAMES, Taxonomy, taxonomy

PETS = Taxonomy("pets", ["cat", "dog", "guinea pig"], {"cat": ["kitten"]})


def box(left, top, right, bottom):
    """The polygon that covers whole pixels [left, right) x [top, bottom)."""
    return [left, top, right, top, right, bottom, left, bottom]


def drawn(*shapes, height=8, width=10):
    return draw(
        CocoImage("a.jpg", height, width, tuple(Shape(i, *shape) for i, shape in enumerate(shapes)))
    )


def runs(mask):
    """Uncompressed run lengths, column by column, beginning with zeros: the form COCO writes for
    crowds."""
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
    assert np.array_equal(drawn(large, small), expected) and np.array_equal(
        drawn(small, large), expected
    )


def test_three_objects_of_two_classes():
    mask = drawn(
        (3, [box(5, 0, 7, 8)]),
        (1, [box(0, 0, 6, 4)]),
        (1, [box(0, 6, 10, 8)]),
        (2, [box(5, 3, 6, 4)]),
    )
    expected = np.array(
        [[1, 1, 1, 1, 1, 3, 3, 0, 0, 0]] * 3
        + [[1, 1, 1, 1, 1, 2, 3, 0, 0, 0]]
        + [[0, 0, 0, 0, 0, 3, 3, 0, 0, 0]] * 2
        + [[1, 1, 1, 1, 1, 3, 3, 1, 1, 1]] * 2
    )  # areas 24, 20, 16, 1
    assert np.array_equal(mask, expected)


def test_equal_areas_are_painted_in_the_order_of_the_file():
    assert drawn((1, [box(0, 0, 4, 4)]), (2, [box(2, 0, 6, 4)]))[0, :6].tolist() == [
        1,
        1,
        2,
        2,
        2,
        2,
    ]
    assert drawn((2, [box(2, 0, 6, 4)]), (1, [box(0, 0, 4, 4)]))[0, :6].tolist() == [
        1,
        1,
        1,
        1,
        2,
        2,
    ]


def test_the_area_is_that_of_the_mask_not_of_its_box():
    frame = region(0, 0, 10, 8) - region(1, 1, 9, 7)  # 32 pixels, its box 80
    expected = np.where(frame, 1, region(1, 1, 9, 7) * 2)
    assert np.array_equal(drawn((1, runs(frame)), (2, [box(0, 0, 10, 8)])), expected)


def test_crowds_are_ignored_where_no_object_is():
    crowd, small = region(0, 0, 8, 6), region(4, 3, 10, 8)
    for shapes in [
        ((1, runs(crowd), True), (2, runs(small))),
        ((2, runs(small)), (1, runs(crowd), True)),
    ]:
        assert np.array_equal(drawn(*shapes), np.where(small, 2, crowd * 255))
    large_object = (2, [box(0, 0, 10, 8)])  # larger than the crowd, and yet over it
    assert np.array_equal(drawn((1, runs(crowd), True), large_object), np.full((8, 10), 2))


def test_holes_of_run_lengths_and_parts_of_polygons():
    ring = region(1, 1, 8, 7) - region(3, 3, 5, 5)
    assert np.array_equal(drawn((1, runs(ring))), ring)
    compressed = rle.encode(np.asfortranarray(ring))
    assert np.array_equal(
        drawn((3, {**compressed, "counts": compressed["counts"].decode()})), ring * 3
    )
    parts = (
        2,
        [box(0, 0, 2, 2), box(5, 5, 9, 8), box(6, 6, 7, 7)],
    )  # parts join; a part inside another makes no hole
    assert np.array_equal(drawn(parts), 2 * (region(0, 0, 2, 2) + region(5, 5, 9, 8)))


def test_no_objects_is_background_and_an_ignored_object_is_255():
    assert not drawn().any()
    assert np.array_equal(
        drawn((255, [box(2, 2, 4, 4)]), (1, [box(0, 0, 10, 8)]))[2],
        [1, 1, 255, 255, 1, 1, 1, 1, 1, 1],
    )


def test_polygons_without_an_area_draw_nothing():
    assert not drawn((1, [[1, 1, 5, 5]])).any()  # pycocotools would read a box
    assert drawn((1, [[1, 1, 5, 5], box(0, 0, 2, 2)])).sum() == 4


TRIANGLE = [2, 1, 7, 1, 2, 6]


@pytest.mark.parametrize(
    "form",
    [
        [[2.0, 1, 7.0, 1, 2, 6]],
        [[[2, 1], [7, 1], [2, 6]]],  # points as pairs
        [[2, 1], [7, 1], [2, 6]],  # the same, without a list of polygons around it
        [TRIANGLE, []],
        [runs(np.zeros((8, 10))), TRIANGLE],
    ],
)
def test_other_forms_of_a_polygon(form):
    assert np.array_equal(drawn((1, form)), drawn((1, [TRIANGLE]))) and drawn((1, form)).sum() > 8


def test_polygons_and_run_lengths_in_one_list():
    region_ = region(6, 5, 9, 8)
    both = drawn((1, [TRIANGLE, runs(region_)]))
    assert np.array_equal(both, np.maximum(drawn((1, [TRIANGLE])), region_))
    assert np.array_equal(drawn((1, [runs(region_)])), region_)
    floats = {"size": [8.0, 10.0], "counts": [float(n) for n in runs(region_)["counts"]]}
    assert np.array_equal(drawn((1, floats)), region_)


@pytest.mark.parametrize("far", [1e3, 2e8, 1e300, 1.7e308])
def test_what_lies_far_outside_the_image_takes_no_memory(far):
    """The part inside is that of the whole polygon: half-planes and wedges whose corners are far
    away."""
    assert np.array_equal(drawn((1, [box(3, 2, far, far)])), region(3, 2, 10, 8))
    assert np.array_equal(drawn((1, [box(-far, -far, 3, 2)])), region(0, 0, 3, 2))
    wedge = drawn((1, [[0, 0, far, far, 0, far]]), height=64, width=64)
    rows, columns = np.mgrid[:64, :64]
    assert wedge[rows > columns + 1].all() and not wedge[rows < columns - 1].any()
    assert not drawn((1, [box(far, far, far + 9, far + 9)])).any()


@given(st.lists(st.tuples(st.integers(-40, 60), st.integers(-40, 60)), min_size=3, max_size=7))
@settings(max_examples=60, deadline=None)
def test_a_cut_polygon_is_the_same_inside(points):
    """Against drawing on a canvas that holds all of it."""
    polygon = [float(x) for p in points for x in p]
    moved = [x + 50 for x in polygon]
    whole = draw(CocoImage("a", 120, 120, (Shape(0, 1, [moved]),)))[50:58, 50:60]
    rows, columns = np.nonzero(drawn((1, [polygon])) != whole)
    corners = np.array([*points, points[0]], float)
    for x, y in zip(columns + 0.5, rows + 0.5, strict=True):  # pixels that an edge touches
        starts, ways = corners[:-1], np.diff(corners, axis=0)
        lengths = (ways**2).sum(1).clip(1e-9)
        along = (((x, y) - starts) * ways).sum(1) / lengths
        nearest = starts + along.clip(0, 1)[:, None] * ways
        assert np.hypot(*((x, y) - nearest).T).min() <= 1


@pytest.mark.parametrize(
    ("written", "crowd"),
    [("0", False), ("1", True), (0.0, False), (True, True), ("false", False), (None, False)],
)
def test_crowds_as_others_write_them(written, crowd):
    one = content()
    one["annotations"] = [{**one["annotations"][0], "iscrowd": written}]
    images, _ = images_of(one, {18: 2, 17: 1})
    assert images[0].shapes[0].crowd is crowd


@pytest.mark.parametrize("written", ["maybe", 2, [0], 0.5])
def test_crowds_that_are_neither(written):
    one = content()
    one["annotations"] = [{**one["annotations"][0], "iscrowd": written}]
    with pytest.raises(ValueError, match="annotation 1: iscrowd is .*; expected 0 or 1"):
        images_of(one, {18: 2, 17: 1})


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
    ImageDraw.Draw(canvas).polygon(
        [tuple(p) for p in points - 0.5], fill=1
    )  # COCO's pixel 0 covers 0 to 1, PIL's is at 0
    theirs = np.asarray(canvas)
    outline = Image.new("L", (width, height))
    ImageDraw.Draw(outline).line(
        [tuple(p) for p in [*(points - 0.5), points[0] - 0.5]], fill=1, width=3
    )
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
    assert (
        values[13] == 12
        and COCO_NAMES[11] == "stop sign"
        and values[90] == 80
        and COCO_NAMES[79] == "toothbrush"
    )


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
            r"categories are not a class of taxonomy 'pets': cow \(id 1\), pig \(id 2\)\. .*--map "
            r"NAME=ignore",
        ),
        (["cat"], {"cow": "ignore"}, "category 'cow' is not in the file; allowed: cat"),
        (
            ["cat", "cow"],
            {"cow": "bull"},
            "class 'bull' is not in the taxonomy; allowed: background, ignore, cat, dog",
        ),
    ],
)
def test_unknown_categories(names, mapping, message):
    with pytest.raises(ValueError, match=message):
        category_values([{"id": i, "name": n} for i, n in enumerate(names)], PETS, mapping)


def test_categories_that_no_annotation_has_need_no_class():
    categories = [
        {"id": 0, "name": "objects-abcd"},
        {"id": 1, "name": "cat"},
        {"id": 2, "name": "Cat"},
    ]
    assert category_values(categories, PETS, used={1, 2}) == {1: 1, 2: 1}
    with pytest.raises(ValueError, match=r"1 categories are not a class .* objects-abcd \(id 0\)"):
        category_values(categories, PETS, used={0, 1})


def test_whole_numbers_with_a_point(tmp_path):
    floats = content()
    for row in floats["images"]:
        row |= {k: float(row[k]) for k in ("id", "height", "width")}
    for row in floats["annotations"]:
        row |= {k: float(row[k]) for k in ("id", "image_id", "category_id")}
    for row in floats["categories"]:
        row["id"] = float(row["id"])
    write_json(tmp_path / "a.json", content())
    write_json(tmp_path / "b.json", floats)
    images = [
        images_of(read_coco(tmp_path / name), {18: 2, 17: 1})[0] for name in ("a.json", "b.json")
    ]
    assert images[0] == images[1]


def test_ids_of_two_kinds_are_listed():
    one = content(
        annotations=[{"image_id": 7, "category_id": 91}, {"image_id": 7, "category_id": "x"}]
    )
    with pytest.raises(ValueError, match=r"not define: \[91, 'x'\]; defined: \[17, 18, 'a'\]"):
        images_of(one, {18: 2, "a": 1, 17: 1})


# Files


def content(**changes):
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "height": 8, "width": 10},
            {"id": 3, "file_name": "dir\\a.b.png", "height": 4, "width": 4},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 18,
                "segmentation": [box(0, 0, 2, 2)],
                "iscrowd": 0,
            },
            {
                "id": 2,
                "image_id": 7,
                "category_id": 17,
                "segmentation": runs(region(0, 0, 4, 4)),
                "iscrowd": 1,
            },
            {"id": 3, "image_id": 7, "category_id": 17, "segmentation": []},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        **changes,
    }


def test_images_and_their_shapes(tmp_path):
    write_json(tmp_path / "a.json", content())
    images, notes = images_of(read_coco(tmp_path / "a.json"), {18: 2, 17: 1})
    assert [(i.stem, len(i.shapes)) for i in images] == [("b", 2), ("a.b", 0)]
    assert np.array_equal(
        draw(images[0]), np.where(region(0, 0, 2, 2), 2, region(0, 0, 4, 4) * 255)
    )
    assert draw(images[1]).shape == (4, 4) and not draw(images[1]).any()
    assert notes == [
        "1 annotations have no segmentation (boxes?): left out",
        "1 crowd annotations (iscrowd=1) are 255 where no object covers them",
    ]
    images, notes = images_of(content(), {18: 2, 17: 1}, crowds=False)
    assert (
        np.array_equal(draw(images[0]), np.where(region(0, 0, 2, 2), 2, region(0, 0, 4, 4)))
        and len(notes) == 1
    )


IMAGE = {"id": 1, "file_name": "a.jpg", "height": 8, "width": 10}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": None}, "holds the lists images, annotations, categories"),
        ({"images": []}, "lists no images"),
        (
            {"images": [{"id": 1, "file_name": "a.jpg", "height": 8}]},
            "an entry of images has no 'width'",
        ),
        ({"images": [{**IMAGE, "width": 10.5}]}, "whole numbers of pixels"),
        ({"images": [{**IMAGE, "height": 0}]}, "whole numbers of pixels"),
        (
            {"images": [IMAGE, {**IMAGE, "id": 2}]},
            r"images must have different file_names, got \['a.jpg'\]",
        ),
        (
            {"categories": [{"id": 1, "name": "cat"}, {"id": 1.0, "name": "dog"}]},
            "categories must have different ids",
        ),
        (
            {"images": [{**IMAGE, "id": float("nan")}]},
            "id of an entry of images must be a number or a text",
        ),
        ({"images": [{**IMAGE, "id": 1.5}]}, "id of an entry of images must be a number or a text"),
        (
            {"annotations": [{"image_id": 7, "category_id": [1]}]},
            "category_id of an entry of annotations must be a number",
        ),
        ({"images": [{**IMAGE, "height": 1e30}]}, "whole numbers of pixels"),
        ({"images": [{**IMAGE, "height": float("inf")}]}, "whole numbers of pixels"),
        (
            {"annotations": [{"image_id": 7, "segments_info": []}]},
            "no 'category_id': .* This is a panoptic file",
        ),
        (
            {"annotations": [{"image_id": 7, "caption": "a"}], "categories": None},
            "This is a file of captions",
        ),
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
        (
            {"image_id": 9, "category_id": 17, "segmentation": [[1]]},
            r"1 annotations belong to images .* image_id \[9\]",
        ),
        (
            {"image_id": 7, "category_id": 91, "segmentation": [[1]]},
            r"category ids .* not define: \[91\]; defined: \[17",
        ),
        (
            {"image_id": 7, "category_id": 17, "bbox": [1, 2, 3, 4]},
            "none of the 1 annotations has a segmentation",
        ),
    ],
)
def test_annotations_that_belong_nowhere(row, message):
    with pytest.raises(ValueError, match=message):
        images_of(content(annotations=[row]), {18: 2, 17: 1})


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 5, 1, 5, 5, 1]], "odd number"),
        ([["a", 1, 5, 1, 5, 5]], r"holds \['a', 1, .*; expected polygons"),
        ([1, 2, 3, 4, 5, 6], "holds 1; expected polygons"),
        (
            {"size": [10, 8], "counts": [80]},
            r"for \[height, width\] \[10, 8\], the image is \[8, 10\]",
        ),
        ({"size": [8, 10], "counts": [70, 5]}, "do not add up"),
        ({"size": [8, 10], "counts": [100, -20]}, "do not add up"),
        (
            {
                "size": [8, 10],
                "counts": rle.encode(np.eye(20, dtype=np.uint8, order="F"))["counts"].decode(),
            },
            "Invalid RLE",
        ),
        ({"counts": [80]}, "size"),
        ([[2, 1, float("nan"), 1, 6, 4, 2, 4]], "a coordinate of its segmentation is nan"),
        ([[2, 1, float("inf"), 1, 6, 4, 2, 4]], "a coordinate of its segmentation is inf"),
        ([[2, 1, -(10**400), 1, 6, 4, 2, 4]], "a coordinate of its segmentation is -inf"),
        ([[2, 1, 10**400, 1, 6, 4, 2, 4]], "a coordinate of its segmentation is inf"),
        ([{"x": 2, "y": 1}, {"x": 6, "y": 1}], r"holds \{'x': 2, 'y': 1\}; expected polygons"),
        ([[[2, 1, 0], [6, 1, 0], [6, 4, 0]]], r"holds \[\[2, 1, 0\], .*; expected polygons"),
        ("2 1 6 1 6 4", "holds '2 1 6 1 6 4'; expected polygons"),
        ([[True, 1, 5, 1, 5, 5]], r"holds \[True, 1, .*; expected polygons"),
        ({"size": [8, 10], "counts": [40.5, 39.5]}, "do not add up"),
        ({"size": [8, 10], "counts": {"a": 1}}, r"its run lengths are \{'a': 1\}; expected"),
        ({"size": [[8], 10], "counts": [80]}, r"the image is \[8, 10\]"),
        ({"size": 8, "counts": [80]}, "not iterable"),
    ],
)
def test_segmentations_that_cannot_be_drawn(segmentation, message):
    with pytest.raises(ValueError, match=f"annotation 0: .*({message})"):
        drawn((1, segmentation))
