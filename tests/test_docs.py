"""The documentation as a site: every page is found, and no link is dead."""

import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dd import __main__ as commands
from dd import config
from dd.data.datasets import encode_image, encode_mask

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def entries() -> list[str]:
    """Targets of the site's navigation, as from docs/."""
    before = list(sys.path)
    try:
        settings = runpy.run_path(str(DOCS / "conf.py"))
    finally:
        sys.path[:] = before
    trees = settings["navigation"]((DOCS / "index.md").read_text())
    return re.findall(r"^.+ <(.+)>$", trees, re.MULTILINE)


def test_every_page_is_in_the_navigation_once():
    found = [entry for entry in entries() if not entry.startswith("/")]
    assert sorted(found) == PAGES, "docs/index.md has a row for each page of docs/"


def test_the_navigation_leads_to_files():
    outside = [entry for entry in entries() if entry.startswith("/")]
    assert {"/README", "/CONTRIBUTING", "/LOG"} <= set(outside)
    assert all((ROOT / f"{entry[1:]}.md").is_file() for entry in outside)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_what_it_is_for(page):
    title, empty, first = (DOCS / f"{page}.md").read_text().splitlines()[:3]
    assert title.startswith("# ") and not empty
    assert re.match(r"[A-Z`\[]?\w", first), "a sentence first, then tables, lists and commands"


def test_the_tools_are_pinned_and_do_not_slow_the_tests():
    pinned = set(re.findall(r"^([\w-]+)==", (DOCS / "requirements.txt").read_text(), re.MULTILINE))
    locked = (ROOT / "requirements.lock").read_text()
    assert {"Sphinx", "myst-parser", "furo"} <= pinned
    assert not [name for name in pinned if re.search(rf"(?mi)^{name}==", locked)]


@pytest.fixture
def made_site(tmp_path, monkeypatch):
    """A working folder in which the site tutorial's second step was done."""
    for name, encode in {"photos": encode_image, "images": encode_image, "masks": None}.items():
        folder = tmp_path / ("photos" if name == "photos" else f"labelled/{name}")
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = np.full((32, 32, 3), 20 * i, np.uint8)
            content = encode(pixels, ".png") if encode else encode_mask(pixels[..., 0] // 160)
            (folder / f"p{i}.png").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    [start] = [line for line in tutorial_lines() if line.startswith("python -m dd init")]
    assert commands.main(shlex.split(start)[3:]) == 0
    return tmp_path


def tutorial_lines() -> list[str]:
    """The commands of the site tutorial, for a site that has a name."""
    text = (DOCS / "tutorial-site.md").read_text().replace("<my-site>", "my-site")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [re.sub(r"\s#\s.*", "", line).strip() for line in blocks.splitlines()]


def test_the_site_tutorials_commands_exist_for_the_site_it_makes(made_site):
    asked = [re.match(r"python (generate|train|evaluate)\.py (.*)", x) for x in tutorial_lines()]
    asked = [found for found in asked if found]
    assert len(asked) > 8
    for found in asked:
        arguments = [a for a in shlex.split(found[2]) if a != "-m"]
        config.check_overrides(found[1], [config.quoted(a) for a in arguments])
    with pytest.raises(ValueError, match="my-site_synthetic"):
        config.check_overrides("train", ["experiment=my-site_synthetics"])


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    missing = [n for n in ("sphinx", "myst_parser", "furo") if not importlib.util.find_spec(n)]
    assert not missing, (
        f"{', '.join(missing)} not installed; `make docs` or pip install -r docs/requirements.txt "
        "brings what builds the site"
    )
    how = ["--quiet", "--fail-on-warning", "--keep-going", "--no-color"]
    command = [sys.executable, "-m", "sphinx", *how, "-c", "docs", ".", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.mark.full
def test_the_site_is_built_and_can_be_searched(tmp_path):
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "docs/index.html" in (tmp_path / "index.html").read_text()
    for page in PAGES:
        assert (tmp_path / f"docs/{page}.html").is_file()
    index = (tmp_path / "searchindex.js").read_text()
    assert "docs/tutorial-site" in index and "dd.masks.propagate" in index
    verbs = (tmp_path / "docs/api.html").read_text()
    assert 'id="dd.generate"' in verbs and "Draw images and read masks" in verbs


GOOD = """# A page

[a](index.md) [b](page.md#a-head) [c](../results) [d](../results/one.json) [e](../README.md)

## A head

```{eval-rst}
:func:`dd.masks.resize.resize`, :attr:`dd.api.Shown.shares`, :class:`torch.Tensor`
```
"""
BAD = """
[a](nowhere.md) [b](page.md#no-head) [c](../results/nowhere.json) [d](../nowhere)

```{eval-rst}
:func:`dd.masks.resize.nothing`
```
"""


@pytest.mark.full
@pytest.mark.parametrize("added", ["", BAD], ids=["sound", "dead links"])
def test_a_dead_link_fails(added, tmp_path):
    for folder in ("docs", "results"):
        (tmp_path / folder).mkdir()
    for file in ("conf.py", "site.css"):
        shutil.copy(DOCS / file, tmp_path / "docs")
    (tmp_path / "dd").symlink_to(ROOT / "dd")
    (tmp_path / "README.md").write_text("# Start\n")
    (tmp_path / "results/one.json").write_text("{}")
    (tmp_path / "docs/index.md").write_text("# Index\n\n## All\n\n| [A page](page.md) | |\n")
    (tmp_path / "docs/page.md").write_text(GOOD + added)
    if added:
        (tmp_path / "docs/orphan.md").write_text("# Nobody leads here\n")
    done = build(tmp_path, tmp_path / "site")
    faults = [line for line in done.stderr.splitlines() if "WARNING" in line]
    assert done.returncode == bool(added) and len(faults) == (6 if added else 0), done.stderr
    named = ("nowhere.md", "no-head", "nowhere.json", "../nowhere'", "resize.nothing", "orphan.md")
    assert not added or all(any(name in fault for fault in faults) for name in named), faults
