import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import Markup

from dd.report import charts, explore, pictures
from dd.report import html as page

EVIL = "<script>alert('x')</script> & \"quoted\""
SMALL = pictures.png_data_uri(np.zeros((48, 64, 3), np.uint8))
LARGE = pictures.png_data_uri(np.zeros((300, 400, 3), np.uint8))
CHART = charts.bar_chart_svg({EVIL: [(EVIL, 50.0, 1.0)]}, EVIL)


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

    VOID = {"meta", "link", "img", "input"}

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
    assert "<script" not in html.lower()  # a page without a filter has none at all
    assert html.count("&lt;script&gt;") >= 15
    assert not any(
        tag == "script" or any(a.startswith("on") for a in attrs)
        for tag, attrs in Elements(html).found
    )


def test_page_is_well_formed_and_needs_nothing_from_elsewhere(html):
    elements = Elements(html).found
    targets = [
        v
        for _, attrs in elements
        for k, v in attrs.items()
        if k in ("src", "href", "xlink:href", "srcset")
    ]
    targets += re.findall(r"url\(([^)]*)\)", html)
    assert targets and all(t.startswith(("#", "data:")) for t in targets)
    assert "@import" not in html
    policy = next(attrs["content"] for _, attrs in elements if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_every_picture_has_alt_text_and_its_size(html):
    small, large = (attrs for tag, attrs in Elements(html).found if tag == "img")
    assert small["alt"] == f"{EVIL}: {EVIL}" and large["alt"] == f"Mask: {EVIL}"
    assert (small["width"], small["height"]) == ("64", "48")
    assert (
        small["class"] == "pixel" and "class" not in large
    )  # only an enlarged picture gets hard pixel edges


def test_navigation_reaches_every_section_once(html):
    elements = Elements(html).found
    ids = [attrs["id"] for tag, attrs in elements if tag == "section"]
    links = [attrs["href"] for tag, attrs in elements if tag == "a"]
    assert len(set(ids)) == len(ids) == 4
    assert links == ["#content", *(f"#{i}" for i in ids)]  # the first one skips the navigation


def test_folded_sections_are_closed_and_reached_inside():
    html = page.render("", "", [page.Text("seen", [])], folded=[page.Text("kept", ["inside"])])
    elements = Elements(html).found
    details = [attrs for tag, attrs in elements if tag == "details"]
    assert details == [{}] and [t for t, _ in elements].count("summary") == 1
    links = [attrs["href"] for tag, attrs in elements if tag == "a"]
    assert links == ["#content", "#seen", "#kept"]
    # what a link names lies in the fold: a browser opens it then
    assert re.search(r'<details>.*id="kept".*inside.*</details>', html, re.DOTALL)
    assert "Parts that were not opened are not printed: kept." in html
    assert ".folded:has(details:not([open]))" in html.split("@media print")[1]


def test_a_verdict_is_strong_and_large_pictures_have_captions():
    verdict = page.VerdictSection("V", [(EVIL, "Verdict: no.")], "small")
    pictures = page.Pictures("P", [[(EVIL, SMALL), ("b", LARGE)]], legend=[("c", "#00ff7f")])
    html = page.render("", "", [verdict, pictures])
    Elements(html)
    assert "<strong>Verdict: no.</strong>" in html and html.count("<figcaption>") == 2
    assert "<script" not in html
    with pytest.raises(ValueError, match="pictures 'P'"):
        page.Pictures("P", [[("a", "https://example.org/a.png")]])


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
        [
            ["a", (52.34, 0.81), 3, 0.123],
            ["b", 61.0, 1200, -1.0],
            ["c", None, None, None],
            ["d", (70, None), 1, 2.0],
        ],
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
    assert {(i, j) for i, row in enumerate(cells) for j, c in enumerate(row) if c["strong"]} == {
        (3, 1),
        (0, 3),
    }
    assert [row[1]["bar"] for row in cells] == [52.34, 61.0, None, 70]


def test_neighbouring_charts_share_a_row():
    chart, text = page.Chart("c", CHART), page.Text("t", [])
    widths = re.findall(
        r'class="chart (\w+)"', page.render("", "", [chart, chart, chart, text, chart])
    )
    assert widths == ["half", "half", "full", "full"]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: page.Table("T", ["a", "b"], [["x"]]), ValueError, "2 columns, but 1 cells"),
        (
            lambda: page.Table("T", ["a"], [], best=("z",)),
            ValueError,
            r"no column \['z'\]; columns: \['a'\]",
        ),
        (lambda: page.Chart("C", "<svg></svg>"), TypeError, "must be Markup.*got str"),
        (lambda: page.Gallery("G", ["a"], [("x", [])]), ValueError, "1 columns, but 0 pictures"),
        (
            lambda: page.Gallery("G", ["a"], [("x", ["https://a.example/x.png"])]),
            ValueError,
            "PNG or JPEG data URIs",
        ),
        (
            lambda: explore.SampleBrowser(
                "S", [explore.Shown("1", "", [], [("x", "javascript:1")])]
            ),
            ValueError,
            "'1': pictures are",
        ),
        (
            lambda: explore.Matrix("M", "", ["a"], ["b"], [[1, 2]]),
            ValueError,
            "1 rows and 1 columns are named",
        ),
        (
            lambda: page.Gallery("G", [], [], legend=[("x", "red;background:url(x)")]),
            ValueError,
            "#rrggbb",
        ),
    ],
)
def test_sections_name_what_is_wrong(build, error, message):
    with pytest.raises(error, match=message):
        build()


MATRIX = explore.Matrix(EVIL, EVIL, [EVIL, "b"], ["x", EVIL], [[0.0, 100.0], [None, 50.0]], EVIL)
SAMPLES = explore.SampleBrowser(
    EVIL,
    [
        explore.Shown("7", EVIL, [EVIL, "it's"], [(EVIL, SMALL)], [EVIL], {"seed": "12345"}),
        explore.Shown("8", "Plain", ["it's"], [("image", SMALL)]),
    ],
    EVIL,
    [(EVIL, "#00ff7f")],
)


def test_the_only_script_is_ours_and_the_policy_knows_its_hash():
    html = page.render(EVIL, "", [SAMPLES, MATRIX])
    elements = Elements(html).found
    assert [tag for tag, _ in elements].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in elements for name in attrs)
    policy = next(attrs["content"] for _, attrs in elements if "http-equiv" in attrs)
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.search(r"script-src ([^;]*)", policy)[1].split() == [f"'sha256-{digest}'"]
    assert (
        policy.startswith("default-src 'none'")
        and "unsafe" not in re.search(r"script-src ([^;]*)", policy)[1]
    )
    assert not re.search(r"innerHTML|eval|fetch|XMLHttp|import", script)


def test_samples_carry_what_the_filter_looks_for():
    elements = Elements(page.render("", "", [SAMPLES])).found
    first, second = (attrs for tag, attrs in elements if attrs.get("class") == "sample")
    assert json.loads(first["data-classes"]) == [EVIL, "it's"] and json.loads(
        first["data-missing"]
    ) == [EVIL]
    assert (
        json.loads(second["data-classes"]) == ["it's"] and json.loads(second["data-missing"]) == []
    )
    assert first["data-text"] == f"7 {EVIL} 12345".lower()
    options = [attrs["value"] for tag, attrs in elements if tag == "option"]
    assert options == ["", EVIL, "it's"]
    labelled = {attrs["for"] for tag, attrs in elements if tag == "label" and "for" in attrs}
    controls = {
        attrs["id"] for tag, attrs in elements if tag in ("select", "input") and "id" in attrs
    }
    assert controls == labelled and len(controls) == 2
    form = next(attrs for tag, attrs in elements if tag == "form")
    assert "hidden" in form  # it appears with the script that it needs
    assert any(attrs.get("role") == "status" for _, attrs in elements)


def test_a_matrix_is_shaded_between_its_limits():
    cells = MATRIX.cells()
    assert [[c["shade"] for c in row] for row in cells] == [[0, 100], [0, 50]]
    assert [[c["text"] for c in row] for row in cells] == [["0", "100"], ["", "50"]]
    html = page.render("", "", [MATRIX])
    assert html.count('scope="row"') == 2 and html.count('scope="col"') == 3
    assert [c["shade"] for c in explore.Matrix("", "", ["a"], ["b"], [[3.0]]).cells()[0]] == [0]


def test_a_chart_is_the_one_thing_not_escaped():
    assert "<svg><g></g></svg>" in page.render(
        "", "", [page.Chart("c", Markup("<svg><g></g></svg>"))]
    )


def test_write_replaces_the_page_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    assert page.write(path, "é") == path and path.read_text(encoding="utf-8") == "é"

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        page.write(path, "new")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == "é"
