"""A small HTTP server for a trained model: OpenAI's routes, on this machine unless told otherwise.

Bounds hold for whoever connects: connections, bytes of a request, seconds of silence, requests that wait.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from fedloom.display.untrusted_text import short
from fedloom.security.bounded_server import BoundedServer
from fedloom.serving.access import Access
from fedloom.serving.answers import Answers
from fedloom.serving.requests import (
    Request,
    RequestError,
    chat_request,
    completion_request,
    parsed,
)

LARGEST = 4 << 20
"""Bytes of a request; 128,000 tokens have some 500,000."""

SILENCE = 30.0
"""Seconds that a connection may say nothing, take nothing, or need for one body."""

CONNECTIONS = 64
"""Connections at once."""

ROUTES: dict[str, Callable[[Mapping[str, Any]], Request]] = {
    "/v1/chat/completions": chat_request,
    "/v1/completions": completion_request,
}

MODELS = "/v1/models"

Log = Callable[[str], None]


class ClientGone(Exception):
    """Nobody waits for an answer any more, or the server is being stopped."""


class ModelServer(BoundedServer):
    """Listens, and has at most :data:`CONNECTIONS` threads."""

    def __init__(
        self, host: str, port: int, answers: Answers, access: Access, log: Log = lambda text: None
    ) -> None:
        """Bind an address.

        Args:
            host: Name or address.
            port: 0 for any free one.
            answers: What answers.
            access: Who may ask.
            log: Is told of each request: route and status, and nothing of what is said.

        Raises:
            OSError: The address cannot be had.
        """
        self.answers, self.access, self.log = answers, access, log
        self.stopping = threading.Event()
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family, address = found[0], found[4]
        super().__init__(address[:2], Handler, CONNECTIONS)  # type: ignore[arg-type]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say on one line that a connection was closed by an error."""
        import sys

        error = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
        if not isinstance(error, OSError | ClientGone):
            self.log(short(f"a connection was closed: {type(error).__name__}: {error}", 300))

    def stop(self) -> None:
        """End answers under way at their next token, and close."""
        self.stopping.set()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: ModelServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fedloom", ""
    timeout = SILENCE
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer a request for the models."""
        self._serve(self._get)

    def do_POST(self) -> None:
        """Answer a request for an answer."""
        self._serve(self._post)

    def do_OPTIONS(self) -> None:
        """Tell a browser what pages of an allowed site may ask."""
        self._serve(lambda: self._reply(204, None), preflight=True)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request, or has no method of ours, as OpenAI's clients read it."""
        self.close_connection = True
        self._reply(int(code), RequestError(int(code), message or "no such method").body())

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: :meth:`_serve` does."""

    def _serve(self, route: Callable[[], None], *, preflight: bool = False) -> None:
        """Answer a request whose headers are right; an error is one reply, and nothing of it is kept."""
        self._begun = False
        try:
            address = str(self.connection.getsockname()[0])
            self.server.access.check(self.headers, address, preflight=preflight)
            route()
        except RequestError as error:
            self._refuse(error)
        except (ClientGone, OSError):
            self.close_connection = True
        except Exception as error:  # a model's code raises whatever it likes
            said = short(f"{type(error).__name__}: {error}", 300)
            self.server.log(f"{short(self.path, 100)} failed: {said}")
            self._refuse(RequestError(500, "the model failed; the server's log says how"))

    def _refuse(self, error: RequestError) -> None:
        self.close_connection = True  # what is left of the body is not read
        if self._begun:
            self._event(error.body())
            self._chunk(b"")
            return
        self._reply(error.status, error.body(), error.headers)

    def _get(self) -> None:
        path = urlsplit(self.path).path
        if path == "/health":
            return self._reply(200, {"status": "ok"})
        if path == MODELS:
            return self._reply(200, self.server.answers.listed())
        if path.startswith(f"{MODELS}/"):
            name = unquote(path.removeprefix(f"{MODELS}/"))
            return self._reply(200, self.server.answers.model(name))
        raise self._no_route(path)

    def _post(self) -> None:
        path = urlsplit(self.path).path
        read = ROUTES.get(path)
        if read is None:
            raise self._no_route(path)
        request = read(parsed(self._body()))
        if not request.streamed:
            return self._reply(200, self.server.answers.whole(request, self._require_alive))
        with self.server.answers.streamed(request) as run:
            self._begin(200, {"Content-Type": "text/event-stream", "Cache-Control": "no-store",
                              "Transfer-Encoding": "chunked"})  # fmt: skip
            run(self._event)
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        return None

    def _no_route(self, path: str) -> RequestError:
        known = ", ".join((MODELS, *ROUTES))
        status = 405 if path in known.split(", ") else 404
        return RequestError(
            status, f"no route {self.command} {short(path, 100)}; there are {known}"
        )

    def _body(self) -> bytes:
        """Return the body of a request.

        Raises:
            RequestError: It is too long, of no known length, or no JSON by its type.
        """
        kind = (self.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(415, "send JSON with Content-Type: application/json")
        length = self.headers.get("Content-Length") or ""
        if "Transfer-Encoding" in self.headers or not length.isdecimal() or len(length) > 15:
            raise RequestError(411, "send the body's length in Content-Length, and no chunks")
        if int(length) > LARGEST:
            raise RequestError(413, f"the body has {length} bytes; at most {LARGEST} are read")
        content, until = bytearray(), time.monotonic() + SILENCE
        while len(content) < int(length):
            piece = self.rfile.read1(int(length) - len(content))
            if not piece:
                raise ClientGone
            content += piece
            if time.monotonic() > until:
                raise RequestError(408, f"the body took more than {SILENCE:.0f} seconds")
        return bytes(content)

    def _require_alive(self) -> None:
        """Check, while an answer is generated, that somebody waits for it.

        Raises:
            ClientGone: Nobody does, or the server is being stopped.
        """
        readable, _, _ = select.select([self.connection], [], [], 0)
        gone = bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        if gone or self.server.stopping.is_set():
            raise ClientGone

    def _reply(
        self, status: int, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None = None
    ) -> None:
        content = b"" if body is None else _json(body)
        own = {} if body is None else {"Content-Type": "application/json"}
        own["Content-Length"] = str(len(content))
        self._begin(status, {**own, **(headers or {})})
        self.wfile.write(content)

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the status and all headers."""
        asked = getattr(self, "headers", None)  # none where the request was none
        origin, sends = (
            (asked.get(name) for name in ("Origin", "Access-Control-Request-Headers"))
            if asked is not None
            else (None, None)
        )
        self.server.log(f"{self.command or '-'} {short(getattr(self, 'path', '-'), 100)} {status}")
        self.send_response(status)
        shared = self.server.access.shared_with(origin, sends)
        closing = {"Connection": "close"} if self.close_connection else {}
        for name, value in {
            **headers,
            **shared,
            **closing,
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self._begun = True

    def _event(self, data: Mapping[str, Any]) -> None:
        self._require_alive()
        self._chunk(b"data: " + _json(data) + b"\n\n")

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode()


def serve_until_stopped(server: ModelServer) -> None:
    """Serve until Ctrl-C, or SIGTERM where its handler raises the same."""
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()
