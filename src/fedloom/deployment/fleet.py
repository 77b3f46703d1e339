"""Flower's Fleet interface, as far as a client that is let in needs it, and as nobody else.

The gateway reads the head of each HTTP request, lets through what is named here and nothing else, for
the key that was proven, and passes the body on as it comes: none is held in memory. Flower's server
itself listens on this machine alone.
"""

from __future__ import annotations

import base64
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h11

from fedloom.deployment.connections import CHUNK
from fedloom.errors import ConnectionFailed, MessageError, OffenceKind

CALLS = {
    f"/v1/fleet/{name}": limit
    for name, limit in {
        "activate-node": 1 << 12,
        "deactivate-node": 1 << 12,
        "send-node-heartbeat": 1 << 12,
        "pull-messages": 1 << 12,
        "get-run": 1 << 12,
        "get-fab": 1 << 12,
        "pull-object": 1 << 12,
        "confirm-message-received": 1 << 12,
        "push-messages": 1 << 20,
        "push-object": 32 << 20,
    }.items()
}
"""Paths that are passed on, each with the bytes that a request may have. Flower cuts an object into parts
of 20 MB (``FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE``)."""

KEY, SIGNED_HEADERS = b"flwr-public-key", {b"flwr-timestamp", b"flwr-signature"}
HEADERS = {KEY, *SIGNED_HEADERS, b"content-type", b"accept", b"flwr-package-version"}
"""Headers that are passed on."""

PUSH = b"/v1/fleet/push-object"

HEAD = 16 << 10
"""Bytes of the longest head of a request or response."""

IDLE = 120.0
"""Seconds that a connection may wait for its next request, and a request for its next bytes."""


@dataclass(frozen=True)
class Upstream:
    """Where Flower's server listens on this machine.

    Attributes:
        context: By which it is known.
        database: Its file, in which objects that clients push wait.
        most: Bytes that the file may have before no more are taken.
    """

    host: str
    port: int
    context: ssl.SSLContext
    database: Path
    most: int

    def has_room(self) -> bool:
        """Return whether the database may grow."""
        try:
            return self.database.stat().st_size < self.most
        except OSError:
            return True

    def connect(self) -> socket.socket:
        """Return a connection to it.

        Raises:
            ConnectionFailed: It is not there.
        """
        try:
            plain = socket.create_connection((self.host, self.port), 10)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            own = self.context.wrap_socket(plain, server_hostname=self.host)
        except OSError as error:
            raise ConnectionFailed(f"Flower's server does not answer: {error}") from None
        own.settimeout(IDLE)
        return own


def key_header(public_pem: bytes) -> bytes:
    """Return the header by which Flower's node says which key it has."""
    return base64.b64encode(public_pem)


class Refused(MessageError):
    """A request that is not passed on.

    Attributes:
        status: Of the HTTP response.
    """

    def __init__(self, status: int, reason: str, kind: OffenceKind = "forbidden") -> None:
        """Keep status and reason; the kind counts where an honest client sends no such request."""
        super().__init__(reason, kind)
        self.status = status


class Forbidden(Refused):
    """A request that no honest client sends."""


def pass_on(
    connection: socket.socket,
    upstream: Upstream,
    key: bytes,
    allowed: Callable[[], bool],
    pace: Callable[[], object],
) -> None:
    """Pass the requests of a client on, one after the other, until it closes the connection.

    Args:
        connection: To the client, which has proven its key.
        upstream: Flower's server.
        key: The header that says the key which was proven.
        allowed: Returns whether the client is let in still; asked for each request.
        pace: Waits until the client may make another request.

    Raises:
        Forbidden: It sent what no honest client sends.
        Refused: It is let in no longer, or there is no room.
        ConnectionFailed: Flower's server is not there, or gave no answer.
        OSError: A connection ended or broke.
    """
    connection.settimeout(IDLE)
    client = h11.Connection(h11.SERVER, HEAD)
    flower: socket.socket | None = None
    try:
        while True:
            try:
                request = _next(client, connection, HEAD)  # or the connection ends here
                if not isinstance(request, h11.Request):
                    return
                pace()
                _require_allowed(request, key, allowed())
                if request.target == PUSH and not upstream.has_room():
                    raise Refused(507, "Flower's database is as large as gateway.flower_bytes")
            except h11.RemoteProtocolError as error:
                foreign = Forbidden(400, f"no HTTP: {error}", "malformed")
                _refuse(client, connection, foreign)
                raise foreign from None
            except Refused as error:
                _refuse(client, connection, error)
                raise
            flower = flower or upstream.connect()
            if not _exchange(client, connection, request, flower):
                return
    finally:
        if flower is not None:
            flower.close()


def _require_allowed(request: h11.Request, key: bytes, allowed: bool) -> None:
    headers = dict(request.headers)
    path = request.target.decode("latin-1")
    if not allowed:
        raise Refused(401, "its key is let in no longer")
    if request.method != b"POST" or path not in CALLS:
        method = request.method.decode("latin-1")[:8]
        raise Forbidden(403, f"{method} {path[:80]!r} is not offered")
    if headers.get(KEY) != key:
        raise Forbidden(403, "the request names another key than the one that was proven")
    length = headers.get(b"content-length", b"")
    if not length.isdigit() or len(length) > 12:
        raise Forbidden(411, "the request does not say how long it is", "malformed")
    if int(length) > CALLS[path]:
        reason = f"{int(length)} bytes to {path}, {CALLS[path]} are allowed"
        raise Forbidden(413, reason, "oversized")


def _refuse(client: h11.Connection, connection: socket.socket, error: Refused) -> None:
    """Tell the client, and read no more of it."""
    text = str(error).encode()
    headers = [
        ("content-length", str(len(text))),
        ("content-type", "text/plain"),
        ("connection", "close"),
    ]
    events = [
        h11.Response(status_code=error.status, headers=headers),
        h11.Data(data=text),
        h11.EndOfMessage(),
    ]
    connection.sendall(b"".join(filter(None, map(client.send, events))))


def _exchange(
    client: h11.Connection, connection: socket.socket, request: h11.Request, flower: socket.socket
) -> bool:
    """Pass one request on, and the response back; return whether another may follow."""
    server = h11.Connection(h11.CLIENT, HEAD)
    named = dict(request.headers)
    kept = [(name, value) for name, value in request.headers if name in HEADERS]
    headers = [(b"host", b"localhost"), (b"content-length", named[b"content-length"]), *kept]
    flower.sendall(
        server.send(h11.Request(method="POST", target=request.target, headers=headers)) or b""
    )
    try:
        while not isinstance(event := _next(client, connection), h11.EndOfMessage):
            flower.sendall(server.send(event) or b"")
    except h11.RemoteProtocolError as error:
        raise Forbidden(400, f"no HTTP: {error}", "malformed") from None
    flower.sendall(server.send(h11.EndOfMessage()) or b"")
    try:
        while not isinstance(event := _next(server, flower), h11.EndOfMessage):
            if not isinstance(event, h11.InformationalResponse):
                connection.sendall(client.send(event) or b"")
    except h11.RemoteProtocolError as error:
        raise ConnectionFailed(f"Flower's server gave no answer: {error}") from None
    connection.sendall(client.send(h11.EndOfMessage()) or b"")
    if h11.MUST_CLOSE in (
        client.our_state,
        client.their_state,
        server.our_state,
        server.their_state,
    ):
        return False
    client.start_next_cycle()
    return True


def _next(side: h11.Connection, connection: socket.socket, at_once: int = CHUNK) -> h11.Event:
    """Return the next event of a connection, reading as much as it needs, so many bytes at a time.

    Raises:
        RemoteProtocolError: What comes is no HTTP.
        OSError: The connection has ended, between two requests or in the middle of one.
    """
    while not isinstance(event := side.next_event(), h11.Event):
        content = connection.recv(at_once)
        if not content:
            raise ConnectionAbortedError("it was closed")
        side.receive_data(content)
    return event
