"""A page that only this machine sees: files, and one question that is answered. The only importer of starlette and uvicorn.

Bound to 127.0.0.1; requests by another name (DNS rebinding) or from another site's page are refused, and the page may load
and ask nothing but its own server. Nothing is stored, logged or counted.
"""

import socket
from pathlib import Path
from threading import Lock
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

HOST = "127.0.0.1"
MAX_BYTES = 64 << 20  # of an uploaded file
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def application(folder: str | Path, answer, max_bytes: int = MAX_BYTES) -> Starlette:
    """The files of ``folder`` (``index.html`` as ``/``), and ``POST /segment``: the body's bytes -> ``answer(bytes)`` as JSON,
    one at a time. A ValueError of ``answer`` is status 422 with ``{"error": ...}``; 413: the file is too large."""
    files = {"/" if p.name == "index.html" else f"/{p.name}": p for p in sorted(Path(folder).iterdir()) if p.suffix in TYPES}
    alone = Lock()

    def show(path: Path):
        content, kind = path.read_text(encoding="utf-8"), TYPES[path.suffix]
        return lambda request: Response(content, media_type=kind, headers=HEADERS)

    def one_by_one(data: bytes):
        with alone:
            return answer(data)

    async def segment(request):
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return _refusal(403, "this page answers its own requests only")
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > max_bytes:
                return _refusal(413, f"the file has more than {max_bytes >> 20} MiB; make it smaller")
        try:
            return JSONResponse(await run_in_threadpool(one_by_one, bytes(data)), headers=HEADERS)
        except ValueError as error:
            return _refusal(422, str(error))

    routes = [Route(path, show(file)) for path, file in files.items()]
    only_here = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=[*routes, Route("/segment", segment, methods=["POST"])], middleware=[only_here])


def _refusal(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, status, HEADERS)


def serve(app: Starlette, port: int) -> None:
    """Serve until Ctrl-C, and print the address first; ``port`` 0 takes a free one. ValueError if it is taken."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise ValueError(f"port={port}: {error.strerror}; choose another, or port=0 for a free one") from None
        listener.listen()  # from now on a request waits until the server has begun
        print(f"ready: http://{HOST}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
        uvicorn.Server(settings).run(sockets=[listener])
