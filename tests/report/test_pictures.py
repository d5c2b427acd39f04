import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dd.report import charts, pictures
from dd.taxonomy import voc_palette

PALETTE = voc_palette()
BARS = {
    "Synthetic": [("cat & <dog>", 62.1, 0.4), ("$bus$", 30.0, None)],
    "Real": [("cat & <dog>", None, None)],
}
LINES = {"Real": ([400, 25], [70.0, 50.0], [0.5, None]), "Synthetic": ([0, 25], [52.0, None], None)}


def drawn():
    return (
        charts.bar_chart_svg(BARS, "mIoU (%)"),
        charts.line_chart_svg(LINES, "real images", "mIoU (%)"),
        charts.curves_svg(
            {"a": (list(range(1000)), list(range(1000))), "<b>": ([0, 9], [3.0, 4.0])},
            "step",
            "mIoU (%)",
        ),
        charts.histogram_svg([1, 2, 2, 40], "mIoU (%)"),
    )


def decode(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_overlay_blends_classes_stripes_uncertain_and_leaves_background():
    image = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[0], mask[1:4] = 1, 255
    out = pictures.overlay(image, mask, PALETTE, alpha=0.5)
    assert out.dtype == np.uint8
    assert (out[0] == [114, 50, 50]).all()  # halfway to (128, 0, 0)
    assert (out[4:] == 100).all()
    stripes = {tuple(rgb) for rgb in out[1:4].reshape(-1, 3).tolist()}
    assert stripes == {(110, 112, 115), (153, 154, 156)}


def test_overlay_with_opacity_zero_and_one_is_image_and_colours():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 12, 3), np.uint8)
    mask = rng.integers(1, 9, (16, 12), np.uint8)
    assert (pictures.overlay(image, mask, PALETTE, alpha=0) == image).all()
    assert (
        pictures.overlay(image, mask, PALETTE, alpha=1) == pictures.colour_mask(mask, PALETTE)
    ).all()


def test_colour_mask_and_legend_agree():
    names = ("background", "apple", "banana")
    colours = pictures.colour_mask(np.array([[0, 1, 2, 255]], np.uint8), PALETTE)[0]
    legend = pictures.legend(names, PALETTE, uncertain=True)
    assert [name for name, _ in legend] == [*names, "uncertain"]
    assert [code for _, code in legend] == ["#" + bytes(rgb).hex() for rgb in colours]
    assert colours[0].max() < 64 and colours[3].min() > 192
    assert (colours[1:3] == np.reshape(PALETTE, (-1, 3))[1:3]).all()


@pytest.mark.parametrize(
    ("image", "mask", "palette", "message"),
    [
        (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), PALETTE, "uint8"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8), PALETTE, "differ in size"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), int), PALETTE, "uint8"),
        (
            np.zeros((4, 4, 3), np.uint8),
            np.full((4, 4), 3, np.uint8),
            PALETTE[:9],
            "class 3.*ends at class 2",
        ),
    ],
)
def test_overlay_names_what_is_wrong(image, mask, palette, message):
    with pytest.raises(ValueError, match=message):
        pictures.overlay(image, mask, palette)


def test_heat_is_brightest_where_the_map_is_and_ignores_its_scale():
    image = np.full((32, 48, 3), 90, np.uint8)
    heat = np.zeros((4, 4))
    heat[0, 3] = 1e-3
    out = pictures.heat(image, heat)
    assert out.shape == image.shape and out.dtype == np.uint8
    brightness = out.sum(-1, dtype=int)
    y, x = np.unravel_index(brightness.argmax(), brightness.shape)
    assert y < 8 and x >= 36
    assert (pictures.heat(image, 5 + 1000 * heat) == out).mean() > 0.99


def test_heat_of_a_constant_map_is_cold_and_of_nan_an_error():
    image = np.full((8, 8, 3), 90, np.uint8)
    assert len(np.unique(pictures.heat(image, np.ones((2, 2))).reshape(-1, 3), axis=0)) == 1
    with pytest.raises(ValueError, match="not finite"):
        pictures.heat(image, np.full((2, 2), np.nan))


@pytest.mark.parametrize("shape", [(3, 5, 3), (3, 5)])
def test_png_data_uri_enlarges_pixels_without_loss(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    uri = pictures.png_data_uri(array, scale=3)
    assert uri.startswith("data:image/png;base64,")
    assert (decode(uri) == array.repeat(3, 0).repeat(3, 1)).all()


def test_contact_sheet_without_labels_is_a_plain_grid():
    red, blue = (np.full((6, 10, 3), c, np.uint8) for c in ([255, 0, 0], [0, 0, 255]))
    sheet = pictures.contact_sheet([[red, blue], [blue]], scale=2, gap=3)
    assert sheet.shape == (3 + 2 * (12 + 3), 3 + 2 * (20 + 3), 3) and sheet.dtype == np.uint8
    assert (sheet[3:15, 3:23] == [255, 0, 0]).all() and (sheet[3:15, 26:46] == [0, 0, 255]).all()
    assert (sheet[18:30, 26:46] == 255).all()  # the short row leaves its cell white
    assert (sheet[:3] == 255).all() and (sheet[:, -3:] == 255).all()


def test_contact_sheet_makes_room_for_labels_and_moves_nothing_else():
    picture = np.zeros((40, 40, 3), np.uint8)
    plain = pictures.contact_sheet([[picture] * 2] * 2)
    sheet = pictures.contact_sheet(
        [[picture] * 2] * 2,
        row_labels=["a long prompt that wraps over lines", "b"],
        column_labels=["Image", "Mask"],
    )
    left, top = sheet.shape[1] - plain.shape[1], sheet.shape[0] - plain.shape[0]
    assert 20 < left < 170 and 8 < top < 40
    assert (sheet[top + 4 :, left + 4 :] == plain[4:, 4:]).all()
    assert (
        sheet[:top, left:].min() < 128 and sheet[top:, :left].min() < 128
    )  # something is written there
    assert (sheet[:2] == 255).all() and (sheet[:, :2] == 255).all()  # and nothing is cut off


def test_contact_sheet_refuses_labels_that_do_not_fit():
    picture = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="2 row labels for 1 rows"):
        pictures.contact_sheet([[picture]], row_labels=["a", "b"])
    with pytest.raises(ValueError, match="at least one picture"):
        pictures.contact_sheet([[]])


def test_charts_are_deterministic():
    assert drawn() == drawn()


@pytest.mark.parametrize("svg", drawn(), ids=["bar", "line", "curves", "histogram"])
def test_chart_is_one_self_contained_svg_element(svg):
    root = ElementTree.fromstring(svg)  # well-formed, one root
    assert (
        root.tag.endswith("}svg") and root.get("viewBox") and "mIoU (%)" in root.get("aria-label")
    )
    assert not re.search(r"<style|<metadata|<script|<image|@import|<!DOCTYPE|<\?xml", svg)
    targets = re.findall(r'href="([^"]*)"', svg) + re.findall(r"url\(([^)]*)\)", svg)
    assert all(target.startswith("#") for target in targets)
    assert "#ffffff" not in svg  # transparent background


def test_bar_chart_writes_labels_numbers_and_leaves_gaps():
    texts = [
        "".join(e.itertext())
        for e in ElementTree.fromstring(drawn()[0]).iter()
        if e.tag.endswith("}text")
    ]
    assert {"cat & <dog>", "$bus$", "62.1 ± 0.4", "30.0", "Synthetic", "Real"} <= set(texts)
    assert sum("." in text for text in texts) == 2  # two bars; the missing ones have no number


def test_line_chart_sorts_numeric_labels_over_all_series():
    texts = [
        "".join(e.itertext())
        for e in ElementTree.fromstring(drawn()[1]).iter()
        if e.tag.endswith("}text")
    ]
    assert [text for text in texts if text in ("0", "25", "400")] == ["0", "25", "400"]


def test_bar_chart_of_differences_goes_both_ways():
    svg = charts.bar_chart_svg(
        {"gain": [("a", -3.2, 0.5), ("b", 4.1, None), ("c", 0.0, None)]}, "points"
    )
    assert "−3.2 ± 0.5" in svg and "4.1" in svg


def test_a_long_curve_is_thinned_and_a_short_one_is_whole():
    svg = charts.curves_svg({"a": (list(range(10_000)), list(range(10_000)))}, "step", "loss")
    assert len(svg) < 30_000
    assert (
        charts.curves_svg({"a": ([0, 5, 9], [1.0, 2.0, 3.0])}, "euro", "mIoU", points=True).count(
            "<use "
        )
        >= 3
    )


def test_a_histogram_says_what_it_holds():
    svg = charts.histogram_svg([1, 2, 2, 40], "share", limits=(0, 50))
    assert "4 values, median 2, 1 to 40" in svg and "median 2" in svg


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_a_histogram_of_nothing_is_refused(values):
    with pytest.raises(ValueError, match="needs finite numbers"):
        charts.histogram_svg(values, "share")


def test_large_pictures_are_shrunk_and_masks_keep_their_colours():
    noise = np.random.default_rng(0).integers(0, 256, (600, 300, 3), dtype=np.uint8)
    uri = pictures.small_data_uri(noise)
    assert uri.startswith("data:image/jpeg;base64,") and decode(uri).shape == (224, 112, 3)
    mask = pictures.colour_mask(
        np.tile(np.array([[0, 1], [2, 255]], np.uint8), (300, 300)), PALETTE
    )
    small = decode(pictures.small_data_uri(mask, 100, photo=False))
    assert small.shape == (100, 100, 3) and {tuple(c) for c in small.reshape(-1, 3)} <= {
        tuple(c) for c in mask.reshape(-1, 3)
    }
    assert (
        decode(pictures.small_data_uri(noise[:64, :64])) == noise[:64, :64]
    ).all()  # a small one is left as it is


def test_charts_refuse_to_show_nothing():
    with pytest.raises(ValueError, match="at least one point"):
        charts.curves_svg({"a": ([], [])}, "x", "y")
    with pytest.raises(ValueError, match="at least one mean"):
        charts.bar_chart_svg({"a": [("x", None, None)]}, "mIoU")
    with pytest.raises(ValueError, match="at least one point"):
        charts.line_chart_svg({}, "x", "y")
