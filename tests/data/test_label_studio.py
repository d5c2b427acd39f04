"""Run lengths of brushes, checked by another program that reads and writes them; tasks and
exports."""

import json
import xml.etree.ElementTree as ElementTree

import label_studio_brush_rle_rs as other
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dd.data.label_studio import (
    SIZES,
    WORD,
    configuration,
    decode,
    draw,
    encode,
    read_export,
    task,
    tasks_text,
)

MASKS = {
    "nothing": np.zeros((5, 4), bool),
    "everything": np.ones((3, 3), bool),
    "one pixel": np.eye(1, dtype=bool),
    "more than 65,536 of a kind": np.ones((200, 300), bool),
    "noise": np.random.default_rng(0).random((37, 23)) < 0.5,
    "stripes": np.arange(60 * 70).reshape(60, 70) // 97 % 2 == 1,
}


@pytest.mark.parametrize("name", MASKS)
def test_another_program_reads_what_is_written(name):
    mask = MASKS[name]
    read = np.asarray(other.decode_rle(encode(mask), False), np.uint8).reshape(*mask.shape, 4)
    assert np.array_equal(read, mask[..., None].repeat(4, 2) * np.uint8(255))


@pytest.mark.parametrize("name", MASKS)
def test_what_another_program_writes_is_read(name):
    mask = MASKS[name]
    values = (mask * np.uint8(255)).ravel().repeat(4)
    rle = [int(b) for b in other.encode_rle(values, WORD, list(SIZES))]
    assert np.array_equal(decode(rle, *mask.shape), mask)


@given(st.integers(1, 9), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_round_trip(height, width, data):
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits, bool).reshape(height, width)
    assert np.array_equal(decode(encode(mask), height, width), mask)


def test_blocks_of_different_values_and_half_transparent_edges():
    """As the page itself writes: values in a row without repetition, alpha between 0 and 255."""
    alphas = [0, 127, 128, 255]
    bits = f"{16:032b}{7:05b}" + "".join(f"{s - 1:04b}" for s in SIZES) + f"001{15:04b}"
    bits += "".join(f"{v:08b}" for a in alphas for v in (9, 8, 7, a))
    bits += "0" * (-len(bits) % 8)
    rle = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert decode(rle, 2, 2).ravel().tolist() == [False, False, True, True]
    assert list(other.decode_rle(rle, False))[3::4] == alphas


@pytest.mark.parametrize(
    "change",
    [lambda r: r[:-2], lambda r: r[:4], lambda r: [], lambda r: "abc", lambda r: [*r[:-1], 256]],
)
def test_damaged_run_lengths(change):
    with pytest.raises(ValueError, match="damaged run lengths"):
        decode(change(encode(MASKS["noise"])), 37, 23)


def test_too_long_a_run_and_another_size():
    whole = encode(np.ones((2, 2), bool))
    claimed = [0, 0, 0, 8, *whole[4:]]  # 16 values where 8 are announced
    with pytest.raises(ValueError, match="overflow after 0 of 8"):
        decode(claimed, 1, 2)
    with pytest.raises(
        ValueError, match="run lengths of 16 values; 3x2 pixels of 4 channels are 24"
    ):
        decode(whole, 2, 3)
    with pytest.raises(ValueError, match="of 4294967295 values"):  # nothing is reserved for it
        decode([255] * 12, 2, 2)


MASK = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
LABELS = {1: "cat", 2: 'dog "hot" & cold'}


def made():
    return task("more/a b.png", MASK, LABELS, "abc", {"rank": 1}, "/data/local-files/?d=images/")


def annotated(**more):
    one = made()
    [prediction] = one.pop("predictions")
    return {**one, "id": 7, "annotations": [{"id": 1, "result": prediction["result"], **more}]}


def test_tasks_hold_what_label_studio_asks_for():
    [one] = json.loads(tasks_text([made()]))
    assert one["data"] == {
        "image": "/data/local-files/?d=images/more/a%20b.png",
        "file": "more/a b.png",
        "rank": 1,
    }
    [prediction] = one["predictions"]
    for value, region in zip((1, 2), prediction["result"], strict=True):
        assert (region["type"], region["from_name"], region["to_name"]) == (
            "brushlabels",
            "label",
            "image",
        )
        assert (region["original_width"], region["original_height"], region["image_rotation"]) == (
            3,
            2,
            0,
        )
        assert region["value"]["format"] == "rle" and region["value"]["brushlabels"] == [
            LABELS[value]
        ]
        read = np.asarray(other.decode_rle(region["value"]["rle"], False)).reshape(2, 3, 4)[..., 3]
        assert np.array_equal(read == 255, value == MASK)


def test_the_configuration_names_the_same_tags():
    root = ElementTree.fromstring(configuration({"cat": (1, 2, 255), LABELS[2]: (0, 0, 0)}))
    assert (
        root.find("Image").attrib["value"] == "$image"
        and root.find("Image").attrib["name"] == "image"
    )
    brushes = root.find("BrushLabels")
    assert brushes.attrib == {"name": "label", "toName": "image"}
    assert [x.attrib for x in brushes] == [
        {"value": "cat", "background": "#0102ff"},
        {"value": LABELS[2], "background": "#000000"},
    ]


def test_an_export_is_read():
    [image], notes = read_export("e.json", [annotated()])
    assert (image.file, image.size, notes) == ("more/a b.png", (2, 3), [])
    assert np.array_equal(draw(image, {"cat": 1, LABELS[2]: 2}, (9, 9)), MASK)


def test_later_brushes_lie_on_earlier_ones_and_no_brush_is_background():
    one = annotated()
    region = one["annotations"][0]["result"][0]
    top = {**region, "value": {**region["value"], "rle": encode(MASK > 0), "brushlabels": ["top"]}}
    one["annotations"][0]["result"].append(top)
    [image], _ = read_export("e.json", [one])
    assert np.array_equal(draw(image, {"cat": 1, LABELS[2]: 2, "top": 3}, (2, 3)), (MASK > 0) * 3)
    one["annotations"][0]["result"] = [{"type": "choices", "value": {"choices": ["seen"]}}]
    [image], _ = read_export("e.json", [one])
    assert image.size is None and np.array_equal(draw(image, {}, (4, 5)), np.zeros((4, 5)))


def test_the_last_annotation_counts_and_skipped_ones_do_not():
    one = annotated(updated_at="2026-01-02")
    one["annotations"] += [
        {"id": 2, "result": [], "updated_at": "2026-01-01"},
        {"id": 3, "result": [], "updated_at": "2026-01-03", "was_cancelled": True},
    ]
    untouched = {**made(), "annotations": []}
    [image], notes = read_export("e.json", [one, untouched])
    assert len(image.brushes) == 2
    assert notes == [
        "1 tasks have no annotation and are left out",
        "1 tasks have several annotations: the one changed last counts",
    ]


@pytest.mark.parametrize(
    ("address", "file"),
    [
        ("/data/upload/3/0a1b2c3d-photo-1.jpg", "/data/upload/3/0a1b2c3d-photo-1.jpg"),
        ("/data/local-files/?d=images/more/a%20b.png", "images/more/a b.png"),
        ("https://example.com/photos/a%20b.jpg?v=1", "/photos/a b.jpg"),
    ],
)
def test_names_in_addresses(address, file):
    [image], _ = read_export("e.json", [{**annotated(), "data": {"image": address}}])
    assert image.file == file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, r: r.update(type="rectanglelabels"), "task 7 .*'rectanglelabels'; only brushes"),
        (lambda t, r: r["value"].update(brushlabels=["a", "b"]), "give it one label"),
        (lambda t, r: r.update(image_rotation=90), "turn it back"),
        (lambda t, r: r.update(original_width=4), "original_height and original_width"),
        (lambda t, r: r.update(original_height="x"), "original_height and original_width"),
        (lambda t, r: r.update(original_height=[2, 3]), "original_height and original_width"),
        (lambda t, r: r.pop("original_height"), "original_height and original_width"),
        (lambda t, r: r["value"].update(format="png"), "--brushes-only leaves the others out"),
        (
            lambda t, r: t.update(data={"a": "x.jpg", "b": "y.jpg"}),
            "or one other text in data that is the image's name",
        ),
        (lambda t, r: t.update(data={}), "data.file, data.image or one other text in data"),
        (lambda t, r: t.update(annotations=[]), "none of its 1 tasks has an annotation"),
        (lambda t, r: t.pop("annotations"), 'export the project as "JSON"'),
    ],
)
def test_other_files_are_refused(change, message):
    one = annotated()
    change(one, one["annotations"][0]["result"][0])
    with pytest.raises(ValueError, match=message):
        read_export("e.json", [one])


def test_what_label_studio_writes_otherwise():
    one = annotated()
    for region in one["annotations"][0]["result"]:
        del region["value"]["format"], region["original_width"], region["original_height"]
    one["data"] = {"photo": "/data/upload/3/1a2b3c4d-a_b.png", "note": "taken in May", "rank": 3}
    [image], _ = read_export("e.json", [one])
    assert image.file == "/data/upload/3/1a2b3c4d-a_b.png" and image.size is None
    assert np.array_equal(draw(image, {"cat": 1, LABELS[2]: 2}, MASK.shape), MASK)


def test_regions_that_are_no_brush_are_left_out_on_request():
    one = annotated()
    one["annotations"][0]["result"] += [
        {"type": "keypointlabels", "value": {"x": 1, "keypointlabels": ["cat"]}}
    ] * 2
    with pytest.raises(
        ValueError, match="'keypointlabels'; only brushes .* --brushes-only leaves the others out"
    ):
        read_export("e.json", [one])
    [image], notes = read_export("e.json", [one], brushes_only=True)
    assert len(image.brushes) == 2 and notes == ["2 regions are not a brush and are left out"]
