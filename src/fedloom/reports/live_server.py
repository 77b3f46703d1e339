"""The live page of a run on this machine: ``http.server`` on 127.0.0.1, which only reads.

Whoever may see the run has the address, which holds a secret: other users of this machine do not. A
request must name this machine in its ``Host``, so that no site reaches the page by a name that it
lets point here (DNS rebinding). Nothing of a request names a file: the run folder is chosen before,
and its records are read by :mod:`fedloom.reports.live_run`. What clients said is sent as JSON and
shown as text.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import json
import math
import re
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fedloom.errors import OutputError, first_line
from fedloom.reports.html import fill
from fedloom.reports.live_run import CURVES, LiveRun
from fedloom.security.bounded_server import BoundedServer

HOST = "127.0.0.1"

SECONDS = 10
"""After which a connection that sends nothing is closed."""

CONNECTIONS = 16
"""Connections at once; a browser opens six."""

LONGEST = 30.0
"""Seconds of a connection, which asks one question."""

LATELY = 3.5
"""Seconds in which a page that is open asks again."""

ALLOWED = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
"""What a request may call this machine; the port differs behind an SSH tunnel."""

NUMBER = re.compile(r"\d{1,9}", re.ASCII)


class LivePage:
    """The server of one run's page, in threads of its own; a context in which it answers."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        """Open the port.

        Args:
            folder: Of the run.
            port: To listen at; 0 takes a free one.

        Raises:
            OutputError: It is no run folder, or the port is taken.
        """
        self.run = LiveRun(folder)
        self.secret = secrets.token_urlsafe(16)
        self.page, self.policy = live_page(self.run.name)
        try:
            self._server = _Server((HOST, port), self)
        except OSError as error:
            raise OutputError(
                f"the live page cannot listen at {HOST}:{port}: {first_line(error)}; choose another "
                "--port, or leave it out"
            ) from error
        self._asked, self._again = -math.inf, threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def address(self) -> str:
        """The page's address."""
        return f"http://{HOST}:{self._server.server_port}/{self.secret}/"

    def __enter__(self) -> LivePage:
        """Begin to answer."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()

    def show_the_end(self) -> None:
        """Wait, if a page has asked lately, until it asks once more and so shows how the run ended."""
        if time.monotonic() - self._asked < LATELY:
            self._again.clear()
            self._again.wait(LATELY)

    def answer(self, target: str, host: str | None) -> tuple[int, str, bytes]:
        """Return the status, the media type and the body for a GET.

        Args:
            target: Path and query of the request.
            host: Its ``Host``.
        """
        if not ALLOWED.fullmatch(host or ""):
            return _said(421, "this page is only for names of this machine")
        parts = urlsplit(target)
        pieces = parts.path.split("/")
        if len(pieces) != 3 or not hmac.compare_digest(pieces[1].encode(), self.secret.encode()):
            return _said(404, "there is nothing here: use the address that the command printed")
        match pieces[2]:
            case "":
                return 200, "text/html; charset=utf-8", self.page
            case "state":
                self._asked = time.monotonic()
                self._again.set()
                query = parse_qs(parts.query, max_num_fields=8)
                start = query.get("from", ["0"])[0]
                if not NUMBER.fullmatch(start):
                    return _said(400, "from is the number of rounds that the page has")
                return _json(self.run.state(query.get("generation", [""])[0], int(start)))
            case "curves":
                asked = parse_qs(parts.query, max_num_fields=8).get("clients", [""])[0].split(",")
                if len(asked) > CURVES or not all(map(NUMBER.fullmatch, asked)):
                    return _said(400, f"clients are up to {CURVES} numbers, with commas between")
                return _json(self.run.curves(map(int, asked)))
        return _said(404, "there is nothing here")


def live_page(title: str) -> tuple[bytes, str]:
    """Return the page, and the policy by which a browser runs nothing but the page's own script."""
    templates = Path(__file__).with_name("templates")
    style = (templates / "style.css").read_text(encoding="utf-8")
    script = "".join(
        (templates / name).read_text(encoding="utf-8") for name in ("charts.js", "live.js")
    )
    page = fill("live.html.j2", title=title, style=style, script=script)
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _said(status: int, text: str) -> tuple[int, str, bytes]:
    return status, "text/plain; charset=utf-8", f"{text}\n".encode()


def _json(content: object) -> tuple[int, str, bytes]:
    return 200, "application/json", json.dumps(content, allow_nan=False).encode()


class _Server(BoundedServer):
    def __init__(self, address: tuple[str, int], page: LivePage) -> None:
        self.live = page
        super().__init__(address, _Handler, CONNECTIONS, LONGEST)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that break."""


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = SECONDS
    server: _Server

    def do_GET(self) -> None:
        """Answer the one method that there is."""
        try:
            answer = self.server.live.answer(self.path, self.headers.get("Host"))
        except ValueError:  # no URL, or too many fields
            answer = _said(400, "this is no question that the page asks")
        self._send(*answer)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no GET, with nothing of the request in it."""
        self.close_connection = True
        self._send(*_said(code, "only GET is answered here"))

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response_only(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", self.server.live.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Write no log: the address in it is a secret."""
