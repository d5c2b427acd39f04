"""A page that only this machine can open: it serves files and answers one kind of request. The only
importer of starlette and uvicorn.

It listens on 127.0.0.1. Requests by another name (DNS rebinding) or from another site's page are
refused, and the page may load from and ask nothing but its own server. Nothing is stored, logged or
counted. Memory is bounded: uploads that would hold more than MAX_HELD bytes together are refused,
slow ones are aborted, and images are answered one at a time.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

HOST = "127.0.0.1"
MAX_BYTES = 64 << 20  # of an uploaded file
MAX_HELD = 256 << 20  # of all uploads in progress or waiting for an answer
SECONDS = 60  # for an upload, which comes from this machine
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Held:
    """Bytes of the uploads in memory, at most ``limit``. Used by one thread, that of the event
    loop."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0

    @contextmanager
    def upload(self, size: int) -> Iterator[bool]:
        """Whether there is room for ``size`` more bytes; they are released at the end."""
        room = size if self.bytes + size <= self.limit else 0
        self.bytes += room
        try:
            yield room == size
        finally:
            self.bytes -= room


def application(
    folder: str | Path,
    answer: Callable[[bytearray], Any],
    about: dict[str, Any],
    max_bytes: int = MAX_BYTES,
    max_held: int = MAX_HELD,
    seconds: float = SECONDS,
) -> Starlette:
    """Serves the files of ``folder`` (``index.html`` as ``/``), ``GET /about``: ``about`` as JSON,
    and ``POST /segment``: the body's bytes -> ``answer(bytes)`` as JSON, one at a time. A
    ValueError of ``answer`` is status 422 with ``{"error": ...}``; 411: the size is missing; 413:
    the file is too large; 503: too many uploads; 408: it took longer than ``seconds``."""
    files = {
        "/" if p.name == "index.html" else f"/{p.name}": p
        for p in sorted(Path(folder).iterdir())
        if p.suffix in TYPES
    }
    alone, held = Lock(), Held(max_held)

    def show(path: Path) -> Callable[[Request], Response]:
        content, kind = path.read_text(encoding="utf-8"), TYPES[path.suffix]
        return lambda request: Response(content, media_type=kind, headers=HEADERS)

    def one_by_one(data: bytearray) -> Any:
        with alone:
            return answer(data)

    async def segment(request: Request) -> Response:
        try:
            size = _size_told(request, max_bytes)
            with held.upload(size) as room:
                if not room:
                    raise Refused(503, "too many images at once; wait for an answer and try again")
                data = await _received(request, size, seconds)
                return JSONResponse(await run_in_threadpool(one_by_one, data), headers=HEADERS)
        except Refused as error:
            return _refusal(error.status, str(error))
        except ValueError as error:
            return _refusal(422, str(error))

    async def tell(request: Request) -> Response:
        return JSONResponse(about, headers=HEADERS)

    routes = [Route(path, show(file)) for path, file in files.items()]
    only_here = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(
        routes=[*routes, Route("/about", tell), Route("/segment", segment, methods=["POST"])],
        middleware=[only_here],
    )


class Refused(Exception):
    """A refused upload, with its HTTP status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def _size_told(request: Request, max_bytes: int) -> int:
    """The size of the body as stated by the request, checked before a byte of it is read."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise Refused(403, "this page answers its own requests only")
    told = request.headers.get("content-length", "")
    if not (told.isascii() and told.isdigit()):
        raise Refused(411, "the request does not state the size of the file")
    size = int(told[:20])
    if size > max_bytes:
        raise Refused(413, f"the file has more than {max_bytes >> 20} MiB; make it smaller")
    return size


async def _received(request: Request, size: int, seconds: float) -> bytearray:
    """The body as one piece; a growing buffer would be moved and leave holes in memory."""
    data, got = bytearray(size), 0
    try:
        with anyio.fail_after(seconds):
            async for piece in request.stream():
                if got + len(piece) > size:  # sent in chunks, with a wrong size beside them
                    raise Refused(413, "the file is larger than its request says")
                data[got : got + len(piece)] = piece
                got += len(piece)
    except TimeoutError:
        raise Refused(408, f"the upload took longer than {seconds:g} s; try again") from None
    except ClientDisconnect:
        raise Refused(400, "the upload was broken off") from None  # nobody reads it
    return data


def _refusal(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, status, HEADERS)


def serve(app: Starlette, port: int) -> None:
    """Serve until Ctrl-C, and print the address first; ``port`` 0 takes a free one. ValueError if
    it is taken."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"port={port}: {error.strerror}; choose another, or port=0 for a free one"
            ) from None
        listener.listen()  # from now on a request waits until the server has begun
        print(f"ready: http://{HOST}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        settings = uvicorn.Config(
            app, log_level="error", access_log=False, server_header=False, lifespan="off"
        )
        uvicorn.Server(settings).run(sockets=[listener])
