"""An OpenAI-compatible endpoint on this machine that does what a test tells it to."""

import json
import re
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest


def captions(request: dict) -> str:
    """A faultless answer: a caption for each line of classes that the request asks for."""
    text = request["messages"][1]["content"]
    lines = [line.split(", ") for line in re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)]
    number = re.search(r"Write list (\d+)", text)[1]
    rows = [
        {
            "text": f"view{number}x{i} at hour{number}x{i} in place{number}x{i}: a "
            f"{' and a '.join(line)}.",
            "classes": line,
        }
        for i, line in enumerate(lines)
    ]
    return json.dumps({"prompts": rows})


class Chat:
    """``script``: what the next requests get, each a text (the model's words), a status,
    (status, headers), a float (seconds of silence first) or bytes (a whole body, of the
    Content-Type ``body_type``); then faultless captions. ``asked``: [(body, headers)]."""

    def __init__(self):
        self.script, self.asked, self.url, self.body_type = [], [], None, "text/html"

    def answer(self, request):
        """(status, headers, body) of the next request."""
        step = self.script.pop(0) if self.script else captions(request)
        if isinstance(step, float):
            time.sleep(step)
            step = captions(request)
        if isinstance(step, bytes):
            return 200, {"Content-Type": self.body_type}, step
        if isinstance(step, int | tuple):
            status, headers = step if isinstance(step, tuple) else (step, {})
            key = self.asked[-1][1].get("authorization", "").removeprefix("Bearer ")
            return (
                status,
                headers,
                json.dumps({"error": {"message": f"no, {key}, not now"}}).encode(),
            )
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": step},
        }
        body = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": request["model"],
            "choices": [choice],
        }
        return 200, {}, json.dumps(body).encode()


@pytest.fixture
def chat():
    state = Chat()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append((request, {k.lower(): v for k, v in self.headers.items()}))
            status, headers, body = state.answer(request)
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

        def handle(self):
            with suppress(ConnectionError):  # who asked has given up
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()
