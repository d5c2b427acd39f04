"""The pages in a headless Chromium, driven over its DevTools pipe: no console message, pictures
load, the filters work."""

import base64
import json
import os
import shutil
import signal
import subprocess

import pytest

from dd.data.datasets import SegmentationFolder
from dd.stages.report import Material, report
from dd.stages.report_dataset import report_dataset

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
pytestmark = pytest.mark.browser


class Browser:
    """One page of a headless Chromium; ``messages`` is what its console and its security policy
    said."""

    def __init__(self, profile):
        program = next(filter(None, map(shutil.which, BROWSERS)), None)
        if program is None:
            pytest.fail(
                f"no browser: install one of {', '.join(BROWSERS)}, or leave this test out with "
                '-m "not browser"'
            )
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}',
                program,
                *flags,
                "about:blank",
            ],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in), os.close(theirs_out)
        self.out, self.into, self.number, self.session = (
            os.fdopen(ours_out, "wb"),
            os.fdopen(ours_in, "rb"),
            0,
            None,
        )
        self.rest, self.messages, self.events = b"", [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _receive(self):
        while b"\0" not in self.rest:
            data = self.into.read1(1 << 20)
            if not data:
                raise RuntimeError("the browser has ended")
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def _wait(self, found):
        while True:
            message = self._receive()
            method = message.get("method", "")
            if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.messages.append(message["params"])
            if found(message):
                return message

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        self.out.write(
            json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode()
            + b"\0"
        )
        self.out.flush()
        answer = self._wait(lambda m: m.get("id") == self.number)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path, width=1280, dark=False):
        self.messages.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        self._wait(lambda m: m.get("method") == "Page.loadEventFired")

    def js(self, expression):
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def keys(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self):
        self.out.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.into.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(study):
    from dd.taxonomy import taxonomy

    shapes = taxonomy("shapes")
    tests = {
        n: SegmentationFolder(study / f"data/{n}", "test", shapes)
        for n in ("shapes", "shapes_shift")
    }
    runs = sorted(p.parent for p in (study / "outputs").glob("**/run.json"))
    synthetic = study / "data/synthetic/shapes"
    budgets = sorted((study / "outputs").glob("**/budget.json"))
    given = Material(runs, tests, synthetic, shapes, list(tests), budgets=budgets)
    runs_page = report(study / "seen", "Study", given)
    return {"runs": runs_page, "data": report_dataset(synthetic, gallery=14)}


@pytest.mark.parametrize("which", ["runs", "data"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_page_opens_quietly_and_fits(browser, pages, which, width, dark):
    browser.open(pages[which], width, dark)
    assert browser.messages == []
    pictures = browser.js("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(pictures) > 20 and all(pictures)
    assert browser.js("document.documentElement.scrollWidth") <= width  # tables scroll on their own
    colour = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour.strip("rgb()").split(","))) < 150) is dark
    assert (
        browser.js(
            "performance.getEntriesByType('resource').filter(e => "
            "!e.name.startsWith('data:')).length"
        )
        == 0
    )


def test_a_phone_shows_the_main_numbers_without_scrolling(browser, pages):
    browser.open(pages["runs"], 390)
    said = browser.js("document.querySelector('.said').getBoundingClientRect().bottom")
    assert said < 844  # the first verdict is on the first screen of a phone
    browser.js("location.hash = '#results'; new Promise(done => setTimeout(done, 50))")
    table = "document.querySelector('#results .scroll')"
    assert browser.js(f"{table}.offsetParent !== null")  # a link opens what is folded
    heads = browser.js(f"[...{table}.querySelectorAll('thead th')].map(h => h.textContent)")
    main = [i for i, head in enumerate(heads) if head.startswith("mIoU on")]
    rows = f"[...{table}.querySelectorAll('tbody tr')]"
    ends = browser.js(f"{rows}.map(r => r.children[{main[-1]}].getBoundingClientRect().right)")
    assert main == [1, 2] and max(ends) <= browser.js(f"{table}.getBoundingClientRect().right")


def test_paper_has_what_is_seen_and_says_what_is_not(browser, pages):
    browser.open(pages["runs"])
    browser.call("Emulation.setEmulatedMedia", media="print")
    shown = "[...document.querySelectorAll('h2')].filter(h => h.offsetParent).map(h => h.innerText)"
    closed = browser.js(shown)
    assert "Verdict" in closed and "Costs" in closed and "Results" not in closed
    left = browser.js("document.querySelector('.on-paper').innerText")
    assert "Results" in left and "Verdict" not in left
    browser.js("document.querySelector('#results').closest('details').open = true")
    assert set(browser.js(shown)) == {*closed, "Results"}
    browser.call("Emulation.setEmulatedMedia", media="")


SHOWN = (
    "[...document.querySelectorAll('li.sample')].filter(c => c.offsetParent).map(c => "
    "c.querySelector('dd').textContent)"
)
CHANGED = "form.dispatchEvent(new Event('input', {bubbles: true}))"


def test_filters_show_what_they_say(browser, pages, study):
    browser.open(pages["data"])
    plan = [
        json.loads(line)
        for line in (study / "data/synthetic/shapes/plan.jsonl").read_text().splitlines()
    ]
    assert browser.js(SHOWN) == [p["id"] for p in plan]
    name = plan[0]["classes"][0]
    browser.js(
        f"form = document.forms[0]; form.elements.class.value = {json.dumps(name)}; {CHANGED}"
    )
    assert browser.js(SHOWN) == [p["id"] for p in plan if name in p["classes"]]
    status = browser.js("document.querySelector('[role=status]').textContent")
    assert status == f"{len(browser.js(SHOWN))} of {len(plan)} samples shown"
    browser.js("form.reset(); new Promise(done => setTimeout(done, 20))")
    assert len(browser.js(SHOWN)) == len(plan)
    browser.js(f"form.elements.missing.checked = true; {CHANGED}")
    assert browser.js(SHOWN) == ["000001"]
    browser.js(f"form.elements.class.value = {json.dumps(plan[1]['classes'][-1])}; {CHANGED}")
    assert browser.js(SHOWN) == []  # that class is in the mask
    assert browser.messages == []


def test_the_search_works_from_the_keyboard(browser, pages):
    browser.open(pages["data"])
    browser.js("document.querySelector('input[type=search]').focus()")
    browser.keys("1005 LIGHT")  # a seed and a word
    assert browser.js(SHOWN) == ["000005"]
    browser.open(pages["data"])
    browser.press("Tab", 9)
    assert browser.js("document.activeElement.className") == "skip"
    browser.open(pages["data"])
    browser.js("document.querySelector('input[type=search]').focus()")
    browser.keys("<script> alert")
    assert browser.js(SHOWN) == ["000001"]


def test_no_other_script_may_run(browser, pages, tmp_path):
    page = tmp_path / "other.html"
    page.write_text(
        pages["data"]
        .read_text()
        .replace("</main>", "</main><script>document.title = 'stolen'</script>", 1)
    )
    browser.open(page)
    assert browser.js("document.title") != "stolen"
    assert any("Content Security Policy" in json.dumps(m) for m in browser.messages)
