"""Flower's Fleet interface, restricted to the calls that an admitted client needs.

The gateway reads the head of each HTTP request, passes on only the calls named here, signs
it as the node of the member that has proven its key (``flower_nodes.py``), and streams the body through
without holding it in memory. Flower's server itself listens on this machine alone.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import h11
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError

from fedloom.deployment.connections import CHUNK
from fedloom.deployment.flower_nodes import NodeKey
from fedloom.errors import ConnectionFailed, MessageError, ViolationKind

CALLS = {
    f"/v1/fleet/{name}": limit
    for name, limit in {
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

HEADERS = {b"flwr-package-version", b"content-type", b"accept"}
"""Headers of a client that are passed on, beside those by which the gateway signs."""

PUSH, PUSH_MESSAGES = b"/v1/fleet/push-object", b"/v1/fleet/push-messages"

HEAD = 16 << 10
"""Bytes of the longest head of a request or response."""

SLOWEST = 1 << 16
"""Bytes a second that a body must come at, after the seconds of ``IDLE``."""

IDLE = 120.0
"""Seconds that a connection may wait for its next request, and a request for its next bytes."""


class Connection(Protocol):
    """The part of a socket that is used."""

    def settimeout(self, seconds: float | None, /) -> None:
        """See ``socket``."""
        ...

    def recv(self, count: int, /) -> bytes:
        """See ``socket``."""
        ...

    def sendall(self, content: bytes, /) -> None:
        """See ``socket``."""
        ...


@dataclass(frozen=True)
class Upstream:
    """Where Flower's server listens on this machine.

    Attributes:
        context: Verifies its certificate.
        database: File of its database, which holds objects that clients have pushed.
        most: Bytes of the file above which no more objects are accepted.
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
            ConnectionFailed: It cannot be reached.
        """
        try:
            plain = socket.create_connection((self.host, self.port), 10)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            own = self.context.wrap_socket(plain, server_hostname=self.host)
        except OSError as error:
            raise ConnectionFailed(f"Flower's server does not answer: {error}") from None
        own.settimeout(IDLE)
        return own


class Refused(MessageError):
    """A request that is not passed on.

    Attributes:
        status: Of the HTTP response.
    """

    def __init__(self, status: int, reason: str, kind: ViolationKind = "forbidden") -> None:
        """Keep status and reason; ``kind`` is the kind of violation."""
        super().__init__(reason, kind)
        self.status = status


class Forbidden(Refused):
    """A request that no honest client sends."""


def pass_on(
    connection: Connection,
    upstream: Upstream,
    node: Callable[[], NodeKey | None],
    pace: Callable[[], object],
    turn: AbstractContextManager[object],
) -> None:
    """Pass the requests of a client on, one after the other, until it closes the connection.

    Args:
        connection: To the client, which has proven its key.
        upstream: Flower's server.
        node: Returns the client's node while it is allowed; asked for each request.
        pace: Waits until the client may make another request.
        turn: Lock that is held while one of its large bodies is passed on, which Flower holds in memory.

    Raises:
        Forbidden: It sent something that honest clients do not send.
        Refused: It is no longer allowed, or the database is full.
        ConnectionFailed: Flower's server is not there, or gave no answer.
        OSError: A connection ended or broke.
    """
    connection.settimeout(IDLE)
    client = h11.Connection(h11.SERVER, HEAD)
    flower: socket.socket | None = None
    try:
        while True:
            try:
                request = _next(client, connection, HEAD)  # otherwise the connection ends here
                if not isinstance(request, h11.Request):
                    return
                pace()
                own = node()
                if own is None:
                    raise Refused(401, "its key is no longer allowed")
                length = _require_allowed(request)
                if request.target in (PUSH, PUSH_MESSAGES) and not upstream.has_room():
                    raise Refused(507, "Flower's database is as large as gateway.flower_bytes")
                with turn if request.target == PUSH else contextlib.nullcontext():
                    flower = flower or upstream.connect()
                    going_on = _exchange(client, connection, request, length, own, flower)
            except h11.ProtocolError as error:
                foreign = Forbidden(400, f"no HTTP: {error}", "malformed")
                _refuse(client, connection, foreign)
                raise foreign from None
            except Refused as error:
                _refuse(client, connection, error)
                raise
            if not going_on:
                return
    finally:
        if flower is not None:
            flower.close()


def _require_allowed(request: h11.Request) -> int:
    """Return how long the body of a request is, if it may be passed on."""
    headers = dict(request.headers)
    path = request.target.decode("latin-1")
    if request.method != b"POST" or path not in CALLS:
        method = request.method.decode("latin-1")[:8]
        raise Forbidden(403, f"{method} {path[:80]!r} is not offered")
    if len(headers) != len(
        request.headers
    ):  # readers that take the first and the last would disagree
        raise Forbidden(400, "a header is given twice", "malformed")
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not length.isdigit() or len(length) > 12:
        raise Forbidden(411, "the request does not state its length", "malformed")
    if int(length) > CALLS[path]:
        reason = f"{int(length)} bytes to {path}, {CALLS[path]} are allowed"
        raise Forbidden(413, reason, "oversized")
    return int(length)


def require_own_reply(body: bytes) -> None:
    """Check that a client pushes exactly one message: its own reply to the server.

    Flower authenticates the calling node, but trusts the sender and target inside the messages.

    Raises:
        Forbidden: It is something else.
    """
    try:
        pushed = PushMessagesRequest.FromString(body)
    except DecodeError as error:
        raise Forbidden(400, f"no messages: {error}", "malformed") from None
    if len(pushed.messages_list) != 1 or len(pushed.message_object_trees) != 1:
        raise Forbidden(403, f"{len(pushed.messages_list)} messages at once, one is allowed")
    said, tree = pushed.messages_list[0].metadata, pushed.message_object_trees[0]
    if said.src_node_id != pushed.node.node_id or said.dst_node_id != SUPERLINK_NODE_ID:
        raise Forbidden(403, "a message in the name of another node, or to another", "forged")
    if not said.reply_to_message_id or said.message_id != tree.object_id:
        raise Forbidden(403, "a message that is not a reply", "replayed")


def _refuse(client: h11.Connection, connection: Connection, error: Refused) -> None:
    """Send the refusal to the client, and read nothing more from it."""
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
    client: h11.Connection,
    connection: Connection,
    request: h11.Request,
    length: int,
    node: NodeKey,
    flower: socket.socket,
) -> bool:
    """Pass one request on, and the response back; return whether another may follow.

    Raises:
        ProtocolError: The body is not HTTP.
    """
    server, end = h11.Connection(h11.CLIENT, HEAD), time.monotonic() + IDLE + length / SLOWEST
    kept = [(name, value) for name, value in request.headers if name in HEADERS]
    headers = [(b"host", b"localhost"), (b"content-length", b"%d" % length), *node.headers(), *kept]
    head = server.send(h11.Request(method="POST", target=request.target, headers=headers)) or b""
    body = _parts(client, connection, end)
    if request.target == PUSH_MESSAGES:
        whole = b"".join(body)
        require_own_reply(whole)
        body = iter([whole])
    flower.sendall(head)
    for part in body:
        flower.sendall(server.send(h11.Data(data=part)) or b"")
    flower.sendall(server.send(h11.EndOfMessage()) or b"")
    try:
        while not isinstance(event := _next(server, flower), h11.EndOfMessage):
            if not isinstance(event, h11.InformationalResponse):
                connection.sendall(client.send(event) or b"")
    except h11.ProtocolError as error:
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


def _parts(client: h11.Connection, connection: Connection, end: float) -> Iterator[bytes]:
    """Yield the body of a request in parts, as it arrives."""
    while isinstance(event := _next(client, connection), h11.Data):
        if time.monotonic() > end:
            raise ConnectionAbortedError("the body arrived too slowly")
        yield bytes(event.data)


def _next(side: h11.Connection, connection: Connection, at_once: int = CHUNK) -> h11.Event:
    """Return the next event of a connection, reading as much as it needs, so many bytes at a time.

    Raises:
        RemoteProtocolError: What comes is not HTTP.
        OSError: The connection has ended, between two requests or in the middle of one.
    """
    while not isinstance(event := side.next_event(), h11.Event):
        content = connection.recv(at_once)
        if not content:
            raise ConnectionAbortedError("it was closed")
        side.receive_data(content)
    return event
