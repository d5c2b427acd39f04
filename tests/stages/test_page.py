"""python -m dd page: an image in, mask, overlay and areas out, for this machine alone."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from dd import __main__ as door
from dd.deploy.page_server import application
from dd.stages.page import FILES, about, answer_of, page
from dd.taxonomy import voc_palette
from dd.training.segmentation import Predictor, Views

ROOT = Path(__file__).parents[2]
NAMES = ["background", "cat", "dog"]
HERE = "http://127.0.0.1:8000"
ABOUT = {"run": "seed=0", "classes": ["cat", "dog"], "scores": [["pets/test, 512 images", "77.4"]]}
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)


def file_of(pixels, kind="PNG", **how):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **how)
    return stream.getvalue()


def picture_of(uri, kind):
    assert uri.startswith(f"data:{kind};base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def brightest(images):
    """The brightest channel is the class."""
    return [image.argmax(2).astype(np.uint8) for image in images]


@pytest.fixture
def client():
    return TestClient(page(brightest, NAMES, voc_palette(), ABOUT), base_url=HERE)


def test_an_image_is_answered(client):
    answer = client.post("/segment", content=file_of(COLOURS))
    assert answer.status_code == 200
    found, mask = answer.json(), COLOURS.argmax(2)
    assert (found["width"], found["height"]) == (9, 12)
    shown = picture_of(found["mask"], "image/png")
    assert np.array_equal(np.asarray(shown), mask) and shown.getpalette() == voc_palette()
    assert (
        picture_of(found["overlay"], "image/jpeg").size
        == picture_of(found["image"], "image/jpeg").size
        == (9, 12)
    )
    assert [a["class"] for a in found["areas"]] == NAMES and [
        a["colour"] for a in found["areas"][1:]
    ] == [
        "#800000",
        "#008000",
    ]
    for value, area in enumerate(found["areas"]):
        assert area["pixels"] == (mask == value).sum() and area["percent"] == pytest.approx(
            100 * (mask == value).mean()
        )


def test_a_photograph_is_turned_upright(client):
    turned = Image.Exif()
    turned[0x0112] = 6
    found = client.post("/segment", content=file_of(COLOURS, exif=turned)).json()
    assert (found["width"], found["height"]) == (12, 9)


@pytest.mark.parametrize("data", [b"", b"no image", file_of(COLOURS)[:60]])
def test_what_is_no_image_is_told(client, data):
    answer = client.post("/segment", content=data)
    assert (
        answer.status_code == 422
        and "the file is damaged, or not an image" in answer.json()["error"]
    )


def test_too_many_pixels_and_too_many_bytes():
    small = TestClient(
        application(FILES, answer_of(brightest, NAMES, voc_palette(), 107), ABOUT), base_url=HERE
    )
    answer = small.post("/segment", content=file_of(COLOURS))
    assert answer.status_code == 422 and "the file has 9x12" in answer.json()["error"]
    few = TestClient(
        application(FILES, lambda data: pytest.fail("asked"), ABOUT, 1 << 20), base_url=HERE
    )
    answer = few.post("/segment", content=bytes((1 << 20) + 1))
    assert answer.status_code == 413 and "more than 1 MiB" in answer.json()["error"]


def test_the_page_says_which_run_it_shows(client, tmp_path):
    assert client.get("/about").json() == ABOUT
    run = {
        "trained_on": {"source": "synthetic", "root": "pets"},
        "supervision": "B",
        "steps": 540,
        "taxonomy": {"names": ["cat", "dog"]},
    }
    (tmp_path / "seed=0/eval/pets").mkdir(parents=True)
    scored = {"data": "pets", "split": "test", "num_images": 512, "miou": 77.43}
    (tmp_path / "seed=0/eval/pets/metrics.json").write_text(json.dumps(scored))
    assert about(tmp_path / "seed=0", run) == {
        "run": "seed=0",
        "trained_on": "synthetic + pets",
        "supervision": "B",
        "steps": 540,
        "classes": ["cat", "dog"],
        "scores": [["pets/test, 512 images", "77.4"]],
    }


def test_uploads_share_a_bounded_memory():
    """While one image is answered, others wait with their bytes; one that would not fit is
    refused, and later fits."""
    answering, go_on = threading.Event(), threading.Event()

    def answer(data):
        answering.set()
        assert go_on.wait(60)
        return {"bytes": len(data)}

    client = TestClient(application(FILES, answer, ABOUT, 1 << 20, 3 << 19), base_url=HERE)
    with client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/segment", content=bytes(1 << 20))
        assert answering.wait(60)
        refused = client.post("/segment", content=bytes(1 << 20))
        assert refused.status_code == 503 and "too many images at once" in refused.json()["error"]
        go_on.set()
        assert first.result().json() == {"bytes": 1 << 20}
        assert client.post("/segment", content=bytes(1 << 20)).status_code == 200


def test_an_upload_holds_no_more_than_it_says():
    """A server may take chunks beside a size: what comes beyond it is not kept."""
    app = application(FILES, lambda data: pytest.fail("asked"), ABOUT)
    sent = []

    async def receive():
        return {"type": "http.request", "body": bytes(8), "more_body": True}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-length", b"10")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/segment",
        "headers": headers,
        "query_string": b"",
    }
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413 and b"larger than its request says" in sent[1]["body"]
    unsized = TestClient(app, base_url=HERE).post("/segment", content=iter([b"half"]))
    assert unsized.status_code == 411


def test_an_upload_that_stands_still_is_given_up():
    app = application(FILES, lambda data: pytest.fail("asked"), ABOUT, seconds=0.1)
    sent = []

    async def receive():
        if not sent:
            sent.append(None)
            return {"type": "http.request", "body": b"half", "more_body": True}
        await asyncio.sleep(600)

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-length", b"10")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/segment",
        "headers": headers,
        "query_string": b"",
    }
    asyncio.run(app(scope, receive, send))
    assert sent[1]["status"] == 408 and b"took longer than 0.1 s" in sent[2]["body"]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ({"origin": "https://elsewhere.example"}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "elsewhere.example"}, 400),
        ({"origin": HERE}, 200),
        ({"host": "localhost:8000"}, 200),
        ({}, 200),
    ],
)
def test_only_its_own_page_is_answered(client, header, status):
    assert client.post("/segment", content=file_of(COLOURS), headers=header).status_code == status


def test_the_page_loads_nothing_from_elsewhere(client):
    index = client.get("/")
    assert (
        index.headers["content-type"].startswith("text/html")
        and "default-src 'none'" in index.headers["content-security-policy"]
    )
    loaded = re.findall(r'(?:src|href)="([^"]+)"', index.text)
    assert loaded == ["/page.css", "/page.js"]
    texts = [index.text, *(client.get(path).text for path in loaded)]
    assert all(client.get(path).status_code == 200 for path in loaded)
    assert set(re.findall(r"https?://[^\"' ]+", "".join(texts))) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not an address
    ids = set(re.findall(r'id="(\w+)"', index.text))
    assert ids == set(re.findall(r'at\("(\w+)"\)', texts[2]))
    assert (
        client.get("/../page_server.py").status_code == client.get("/segment/x").status_code == 404
    )


# The command


@pytest.fixture(scope="module")
def served(tmp_path_factory, finished_run):
    """(the page's address, run.json, the segmenter) of the command in a process of its own; it
    ends well by Ctrl-C."""
    folder, run, segmenter = finished_run(tmp_path_factory.mktemp("runs") / "run")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "dd", "page", f"run={folder}", "port=0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            said = server.stdout.readline()
            found = re.fullmatch(r"ready: (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", said)
            assert found, said
            yield found[1], run, segmenter, server.pid
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0 and server.stderr.read() == ""


def test_the_command_serves_this_machine_alone(served):
    address, run, segmenter, pid = served
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(
        urllib.request.Request(f"{address}/segment", file_of(COLOURS), {}), timeout=60
    ) as answer:
        mask = np.asarray(picture_of(json.load(answer)["mask"], "image/png"))
    assert np.array_equal(mask, Predictor(run, segmenter, Views(32))([COLOURS])[0])
    with pytest.raises(urllib.error.HTTPError) as error:
        direct.open(urllib.request.Request(f"{address}/segment", b"no image", {}), timeout=60)
    assert error.value.code == 422
    with (
        pytest.raises(OSError),
        socket.create_connection(("127.0.0.2", int(address.rpartition(":")[2])), timeout=5),
    ):
        pass


def raw(address, head, body=b""):
    """A connection that has sent so much of a request."""
    connection = socket.create_connection(
        ("127.0.0.1", int(address.rpartition(":")[2])), timeout=60
    )
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


POST = "POST /segment HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {}"


def peak(pid) -> int:
    """Largest memory of a process so far, in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) >> 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_clients_that_leave_crowd_or_talk_nonsense(served):
    """None of them prints anything (the fixture looks at the end), memory stays bounded, and the
    next one is answered."""
    address, run, segmenter, pid = served
    before, size = peak(pid), 24 << 20
    raw(address, POST.format(size), bytes(1 << 20)).close()  # leaves in the middle
    with raw(address, "NONSENSE\x00") as nonsense:
        assert nonsense.recv(100).startswith(b"HTTP/1.1 400")
    crowd = [raw(address, POST.format(size), bytes(1 << 16)) for _ in range(50)]

    def finish(connection):
        with contextlib.suppress(OSError):  # refused before all was sent
            connection.sendall(bytes(size - (1 << 16)))
        with connection:
            try:
                return int(connection.recv(100).split()[1])
            except OSError:
                return 503  # the refusal was lost with the rest of what was sent

    with ThreadPoolExecutor(50) as pool:
        codes = set(pool.map(finish, crowd))
    assert codes <= {422, 503} and 422 in codes
    assert peak(pid) - before < 700  # 50 of them together have 1,200 MiB
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(
        urllib.request.Request(f"{address}/segment", file_of(COLOURS), {}), timeout=60
    ) as answer:
        assert answer.status == 200


@pytest.mark.browser
def test_the_page_in_a_browser(served, tmp_path):
    address, run, segmenter, pid = served
    pixels = (
        np.random.default_rng(3)
        .integers(0, 256, (6, 8, 3), dtype=np.uint8)
        .repeat(40, 0)
        .repeat(40, 1)
    )
    (tmp_path / "photo.png").write_bytes(file_of(pixels))
    (tmp_path / "broken.png").write_bytes(b"no image")
    browser = runpy.run_path(str(ROOT / "tests/report/test_browser.py"))["Browser"](
        tmp_path / "profile"
    )

    def choose(name):
        chosen = browser.call("Runtime.evaluate", expression="document.getElementById('file')")[
            "result"
        ]["objectId"]
        browser.call("DOM.setFileInputFiles", files=[str(tmp_path / name)], objectId=chosen)
        done = (
            f"at('state').textContent.startsWith('{name}') && "
            "!at('state').textContent.endsWith('…')"
        )
        browser.js(
            f"new Promise(r => {{ const t = setInterval(() => {{ if ({done}) {{ clearInterval(t); "
            f"r() }} }}, 20) }})"
        )
        return browser.js("at('state').textContent")

    try:
        browser.open(SimpleNamespace(as_uri=lambda: address))
        assert choose("photo.png") == "photo.png: 320 × 240 pixels" and browser.messages == []
        [mask] = Predictor(run, segmenter, Views(32))([pixels])
        values, counts = np.unique(mask, return_counts=True)
        areas = browser.js(
            "[...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => "
            "c.textContent))"
        )
        assert areas == [
            [NAMES[v], str(n), f"{100 * n / mask.size:.2f} %"]
            for n, v in sorted(zip(counts, values, strict=True), reverse=True)
        ]
        sizes = (
            "[...document.images].filter(i => i.offsetParent).map(i => i.decode().then(() => "
            "i.naturalWidth))"
        )
        assert browser.js(f"Promise.all({sizes})") == [320, 320]
        browser.js("at('kind').click()")
        assert browser.js(f"Promise.all({sizes})") == [320, 320] and browser.js(
            "at('mask').offsetParent !== null"
        )
        assert browser.js("at('save').download") == "mask.png"
        assert (
            browser.js(
                "new Set(performance.getEntriesByType('resource').map(e => new "
                "URL(e.name).host)).size"
            )
            == 1
        )
        assert choose("broken.png").startswith("broken.png: the file is damaged, or not an image")
        assert browser.js("at('found').hidden && at('state').className") == "wrong"
    finally:
        browser.close()


def test_what_the_command_refuses(finished_run, tmp_path, capsys):
    folder, _, _ = finished_run(tmp_path / "run")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/settings.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for given, message in [
            ([f"run={tmp_path}/gone"], "no finished training run there"),
            ([f"run={tmp_path}/begun"], "has begun and is not finished"),
            ([f"run={folder}", "port=http"], "port=http: expected a number"),
            ([f"run={folder}", "port=65536"], "port=65536: expected a number"),
            ([f"run={folder}", f"port={taken.getsockname()[1]}"], "in use; choose another"),
            ([f"run={folder}", "share=true"], "'share=true': expected key=value; keys: run, "),
        ]:
            assert door.main(["page", *given]) == 2, given
            assert message in capsys.readouterr().err, given
