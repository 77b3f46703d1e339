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

CHUNK = 1 << 18


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


KINDS: dict[int, OffenceKind] = {
    400: "malformed",
    411: "malformed",
    413: "oversized",
    507: "oversized",
}
"""What kind of offence a request is that is answered by a status; any other is forbidden."""


class Forbidden(MessageError):
    """A request that is not passed on.

    Attributes:
        status: Of the HTTP response.
    """

    def __init__(self, status: int, reason: str) -> None:
        """Keep both."""
        super().__init__(reason, KINDS.get(status, "forbidden"))
        self.status = status


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
        Forbidden: It asked for something that it is not offered; it has been told so.
        OSError: A connection broke.
    """
    connection.settimeout(IDLE)
    client = h11.Connection(h11.SERVER, HEAD)
    flower: socket.socket | None = None
    try:
        while True:
            try:
                request = _next(client, connection, HEAD)
                if not isinstance(request, h11.Request):
                    return
                pace()
                _require_allowed(request, key, allowed())
                if request.target == PUSH and not upstream.has_room():
                    raise Forbidden(507, "Flower's database is as large as gateway.flower_bytes")
            except Forbidden as error:
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
        raise Forbidden(401, "its key is let in no longer")
    if request.method != b"POST" or path not in CALLS:
        raise Forbidden(403, f"{request.method.decode('latin-1')[:8]} {path[:80]!r} is not offered")
    if headers.get(KEY) != key:
        raise Forbidden(403, "the request names another key than the one that was proven")
    length = headers.get(b"content-length", b"")
    if not length.isdigit() or len(length) > 12:
        raise Forbidden(411, "the request does not say how long it is")
    if int(length) > CALLS[path]:
        raise Forbidden(413, f"{int(length)} bytes to {path}, {CALLS[path]} are allowed")


def _refuse(client: h11.Connection, connection: socket.socket, error: Forbidden) -> None:
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
    while not isinstance(event := _next(client, connection), h11.EndOfMessage):
        if not isinstance(event, h11.Data):
            return False
        flower.sendall(server.send(event) or b"")
    flower.sendall(server.send(h11.EndOfMessage()) or b"")
    while not isinstance(event := _next(server, flower), h11.EndOfMessage):
        if isinstance(event, h11.ConnectionClosed):
            return False
        if isinstance(event, h11.InformationalResponse):
            continue
        connection.sendall(client.send(event) or b"")
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
        Forbidden: What comes is no HTTP.
    """
    try:
        while not isinstance(event := side.next_event(), h11.Event):
            side.receive_data(connection.recv(at_once))
    except h11.RemoteProtocolError as error:
        raise Forbidden(400, f"no HTTP: {error}") from None
    return event
