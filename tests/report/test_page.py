import re
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import Markup

from dd.report import page, pictures

EVIL = "<script>alert('x')</script> & \"quoted\""
SMALL = pictures.png_data_uri(np.zeros((48, 64, 3), np.uint8))
LARGE = pictures.png_data_uri(np.zeros((300, 400, 3), np.uint8))
CHART = pictures.bar_chart_svg({EVIL: [(EVIL, 50.0, 1.0)]}, EVIL)


def sections():
    return [
        page.Text(EVIL, [EVIL]),
        page.Table(EVIL, ["Model", EVIL], [[EVIL, 50.0]], note=EVIL, bars=(EVIL,)),
        page.Chart(EVIL, CHART, EVIL),
        page.Gallery(EVIL, [EVIL, "Mask"], [(EVIL, [SMALL, LARGE])], EVIL, [(EVIL, "#00ff7f")]),
    ]


@pytest.fixture(scope="module")
def html():
    return page.render(EVIL, EVIL, sections(), {EVIL: EVIL})


class Elements(HTMLParser):
    """All start tags as (name, attributes); fails on an end tag that closes nothing."""

    VOID = {"meta", "link", "img"}

    def __init__(self, html):
        super().__init__()
        self.found, self.open = [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_everything_written_by_others_is_escaped(html):
    assert "<script" not in html.lower()
    assert html.count("&lt;script&gt;") >= 15
    assert not any(tag == "script" or any(a.startswith("on") for a in attrs) for tag, attrs in Elements(html).found)


def test_page_is_well_formed_and_needs_nothing_from_elsewhere(html):
    elements = Elements(html).found
    targets = [v for _, attrs in elements for k, v in attrs.items() if k in ("src", "href", "xlink:href", "srcset")]
    targets += re.findall(r"url\(([^)]*)\)", html)
    assert targets and all(t.startswith(("#", "data:")) for t in targets)
    assert "@import" not in html
    policy = next(attrs["content"] for _, attrs in elements if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_every_picture_has_alt_text_and_its_size(html):
    small, large = (attrs for tag, attrs in Elements(html).found if tag == "img")
    assert small["alt"] == f"{EVIL}: {EVIL}" and large["alt"] == f"Mask: {EVIL}"
    assert (small["width"], small["height"]) == ("64", "48")
    assert small["class"] == "pixel" and "class" not in large  # only an enlarged picture gets hard pixel edges


def test_navigation_reaches_every_section_once(html):
    elements = Elements(html).found
    ids = [attrs["id"] for tag, attrs in elements if tag == "section"]
    links = [attrs["href"] for tag, attrs in elements if tag == "a"]
    assert len(set(ids)) == len(ids) == 4
    assert links == [f"#{i}" for i in ids]


def test_page_is_deterministic(html):
    assert html == page.render(EVIL, EVIL, sections(), {EVIL: EVIL})


def test_page_without_subtitle_facts_or_sections():
    html = page.render("Empty", "", [])
    assert "<dl" not in html and 'class="subtitle"' not in html
    Elements(html)


def test_table_formats_numbers_and_marks_the_best():
    table = page.Table(
        "Results",
        ["Model", "mIoU", "Seeds", "Ratio"],
        [["a", (52.34, 0.81), 3, 0.123], ["b", 61.0, 1200, -1.0], ["c", None, None, None], ["d", (70, None), 1, 2.0]],
        bars=("mIoU",),
        best=("mIoU",),
        highlight=frozenset({(0, 3)}),
        digits={"Ratio": 2},
    )
    cells = table.cells()
    assert [[c["text"] for c in row] for row in cells] == [
        ["a", "52.3 ± 0.8", "3", "0.12"],
        ["b", "61.0", "1,200", "−1.00"],
        ["c", "–", "–", "–"],
        ["d", "70", "1", "2.00"],
    ]
    assert [c["numeric"] for c in cells[0]] == [False, True, True, True]
    assert {(i, j) for i, row in enumerate(cells) for j, c in enumerate(row) if c["strong"]} == {(3, 1), (0, 3)}
    assert [row[1]["bar"] for row in cells] == [52.34, 61.0, None, 70]


def test_neighbouring_charts_share_a_row():
    chart, text = page.Chart("c", CHART), page.Text("t", [])
    widths = re.findall(r'class="chart (\w+)"', page.render("", "", [chart, chart, chart, text, chart]))
    assert widths == ["half", "half", "full", "full"]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: page.Table("T", ["a", "b"], [["x"]]), ValueError, "2 columns, but 1 cells"),
        (lambda: page.Table("T", ["a"], [], best=("z",)), ValueError, r"no column \['z'\]; columns: \['a'\]"),
        (lambda: page.Chart("C", "<svg></svg>"), TypeError, "must be Markup.*got str"),
        (lambda: page.Gallery("G", ["a"], [("x", [])]), ValueError, "1 columns, but 0 pictures"),
        (lambda: page.Gallery("G", ["a"], [("x", ["https://a.example/x.png"])]), ValueError, "PNG data URIs"),
        (lambda: page.Gallery("G", [], [], legend=[("x", "red;background:url(x)")]), ValueError, "#rrggbb"),
    ],
)
def test_sections_name_what_is_wrong(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_chart_is_the_one_thing_not_escaped():
    assert "<svg><g></g></svg>" in page.render("", "", [page.Chart("c", Markup("<svg><g></g></svg>"))])


def test_write_replaces_the_page_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    assert page.write(path, "é") == path and path.read_text(encoding="utf-8") == "é"

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(page.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        page.write(path, "new")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == "é"
