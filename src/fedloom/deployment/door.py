"""The door: where clients of a federation say who they are, and are let through to a run.

A gRPC service beside Flower's, with the same certificate. A client that joins knocks, and is told its
number or why it is not let in; both are noted in the server's audit log. During a run it may open a
stream: bytes both ways, passed on unread to the process that plays the rounds, which learns from the
door whose they are. Who knocks signs the moment and what it wants with its key.

All that a stranger says is in the metadata of its call: no thread waits for more of it.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from fedloom.engines.frames import LENGTH, Read, connect, write_frame
from fedloom.errors import ConnectionFailed, IdentityError
from fedloom.identity import (
    Current,
    Members,
    hosts_of,
    is_signed,
    public_key,
    public_line,
    public_pem,
    sign,
)

BEHIND, AHEAD = 300, 4
"""Seconds by which a client's clock may be behind the server's, and ahead of it.

Flower lets in what is less than 305 behind and 5 ahead (``TIMESTAMP_TOLERANCE`` and
``SYSTEM_TIME_TOLERANCE`` in ``flwr.common.constant``) and does not say why it lets in no other. A second
less here, as clocks drift.
"""

CHUNK = 1 << 18
"""Bytes that a stream passes on at a time."""

WAITING = 8
"""Chunks that may wait to be sent, before who sends more waits."""

STREAMS = 4096
"""Streams that may be open at a time: each has a thread, started when it is opened."""

SHARE = 16
"""Calls that one connection may have open at a time: a client has a stream for each of its runs."""

KNOCK, STREAM = "/fedloom.Door/Knock", "/fedloom.Door/Stream"
DISTRUST, WHY = "/fedloom.Door/Distrust", "reason-bin"
"""A client tells why it turned away from this server, and where that stands."""

REASON = 200
"""Characters of what is noted of that."""

BURST, PACE = 100, 10.0
"""Refusals that are noted at once, and seconds for one more from then on: 3 MB of audit log a day."""

OPTIONS = [
    ("grpc.max_receive_message_length", 4 * CHUNK),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
]


@dataclass(frozen=True)
class Welcome:
    """What a client that is let in is told: its number, and where Flower listens."""

    number: int
    flower_port: int


class RunIsOver(ConnectionFailed):
    """The run that a stream was to be opened to is not under way."""


class Refusals:
    """Notes who is not let in, no more than so often: strangers must not fill the disk.

    From wherever they come, as addresses cost nothing. The next that is noted says how many before it
    were not (``more``). Threads may share one.
    """

    def __init__(
        self, note: Callable[..., None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Pass on to ``note``; ``clock`` gives seconds."""
        self._note, self._clock = note, clock
        self._room, self._since, self._more = float(BURST), clock(), 0
        self._lock = threading.Lock()

    def __call__(self, **facts: Any) -> None:
        """Note a refusal, or count it."""
        with self._lock:
            now = self._clock()
            self._room = min(BURST, self._room + (now - self._since) / PACE)
            self._since = now
            if self._room < 1:
                self._more += 1
                return
            self._room -= 1
            more = {"more": self._more} if self._more else {}
            self._note("refused_client", **facts, **more)
            self._more = 0


class Door(grpc.GenericRpcHandler):
    """Lets clients in.

    Attributes:
        members: Returns who is let in, as of now.
        note: Told of each client that is let in, for the audit log.
        refuse: Told of each that is not.
        streams: Folder of the sockets of runs, by the run's id.
        flower_port: Where Flower listens.
    """

    def __init__(
        self,
        members: Callable[[], Members],
        note: Callable[..., None],
        streams: Path,
        flower_port: int,
    ) -> None:
        """Keep what it needs."""
        self.members = Current(members, lambda reason: note("unread_members", reason=reason))
        self.note, self.refuse = note, Refusals(note)
        self.streams, self.flower_port = streams, flower_port

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return who handles a call.

        A knock has an empty message, which a handler of a unary call would have a thread wait for; to
        one of a stream that does not look into it, on the wire the same, it need never come.
        """
        if details.method == KNOCK:
            return grpc.stream_unary_rpc_method_handler(self._knock)
        if details.method == STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream)
        if details.method == DISTRUST:
            return grpc.stream_unary_rpc_method_handler(self._distrusted)
        return None

    def _knock(self, incoming: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        number = self._admit(context, "joins")
        return json.dumps({"number": number, "flower_port": self.flower_port}).encode()

    def _distrusted(self, incoming: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        said = dict(context.invocation_metadata()).get(WHY, b"").decode(errors="replace")
        reason = "it does not trust this server: " + said[:REASON]
        self.refuse(what="joins", peer=context.peer(), reason=reason)
        return b""

    def _stream(self, incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        claims = dict(context.invocation_metadata())
        run = str(claims.get("run", ""))
        number = self._admit(context, "opens a stream")
        if not re.fullmatch(r"[0-9a-f]{32}", run):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{run[:40]!r} is no run")
        try:
            inner = connect(self.streams / run)
        except ConnectionFailed:
            context.abort(grpc.StatusCode.NOT_FOUND, f"run {run[:8]} is not under way")
        context.add_callback(lambda: _end(inner))
        write_frame(inner, json.dumps({"client": number}).encode())
        threading.Thread(target=_pass_on, args=(incoming, inner), daemon=True).start()
        while chunk := _receive(inner):
            yield chunk

    def _admit(self, context: grpc.ServicerContext, what: str) -> int:
        """Return the number of the client that calls, or end the call with the reason."""
        claims = dict(context.invocation_metadata())
        try:
            number = self._number(claims)
        except IdentityError as error:
            self.refuse(what=what, peer=context.peer(), reason=str(error))
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        self.note("client", what=what, client=number)
        return number

    def _number(self, claims: dict[str, Any]) -> int:
        key = _signed_by(claims)
        members = self.members()
        number = members.number_of(public_pem(key))
        if number is None:
            known = any(member.key == key for member in members.members)
            why = "has been revoked" if known else "is not known here"
            raise IdentityError(
                f"the key {key.split()[-1][-16:]} {why}; the coordinator lets it in with "
                "`fedloom keys allow NAME FILE.pub`"
            )
        return number


def serve(door: Door, address: str, certificate: tuple[bytes, bytes] | None) -> grpc.Server:
    """Start the door at ``address``; ``certificate`` is key and certificate in PEM, ``None`` for no TLS.

    Raises:
        ConnectionFailed: Something else listens there, or key and certificate do not fit.
    """
    options = [*OPTIONS, ("grpc.max_concurrent_streams", SHARE)]
    server = grpc.server(
        ThreadPoolExecutor(STREAMS), options=options, maximum_concurrent_rpcs=STREAMS
    )
    server.add_generic_rpc_handlers((door,))
    try:
        if certificate is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, grpc.ssl_server_credentials([certificate]))
    except RuntimeError as error:
        other = ", or its key and certificate do not fit together" if certificate else ""
        raise ConnectionFailed(f"cannot listen at {address}: something else does{other}") from error
    server.start()
    return server


@dataclass(frozen=True)
class Caller:
    """A client at the door.

    Attributes:
        address: HOST:PORT of the door.
        key: The client's.
        authority: PEM of the federation's authority; ``None`` for no TLS.
    """

    address: str
    key: ec.EllipticCurvePrivateKey
    authority: bytes | None

    def knock(self, timeout: float = 4.0) -> Welcome:
        """Say who this is.

        Raises:
            ConnectionFailed: The server cannot be reached, or is another than the authority vouches for.
            IdentityError: It does not let this client in.
        """
        require_server(self.address, self.authority, timeout)
        with self._channel() as channel:
            try:
                answer = channel.unary_unary(KNOCK)(b"", timeout=timeout, metadata=self._claims(""))
            except grpc.RpcError as error:
                raise _reason(error, self.address) from None
        return Welcome(**json.loads(answer))

    @contextlib.contextmanager
    def stream(self, run: str) -> Iterator[tuple[Read, Callable[[bytes], None]]]:
        """Open a stream to a run: yields how to read from it and how to send a message.

        Raises:
            ConnectionFailed: It cannot be opened.
            IdentityError: The server does not let this client in.
        """
        outgoing: queue.Queue[bytes | None] = queue.Queue(maxsize=WAITING)
        with self._channel() as channel:
            call = channel.stream_stream(STREAM)(
                iter(outgoing.get, None), metadata=self._claims(run)
            )

            def send(message: bytes) -> None:
                whole = memoryview(LENGTH.pack(len(message)) + message)
                for start in range(0, len(whole), CHUNK):
                    while call.is_active():
                        with contextlib.suppress(queue.Full):
                            outgoing.put(bytes(whole[start : start + CHUNK]), timeout=1.0)
                            break

            try:
                yield _reader(call), send
            except grpc.RpcError as error:
                raise _reason(error, self.address) from None
            finally:
                call.cancel()
                with contextlib.suppress(queue.Full):
                    outgoing.put_nowait(None)

    def _channel(self) -> grpc.Channel:
        if self.authority is None:
            return grpc.insecure_channel(self.address, OPTIONS)
        return grpc.secure_channel(
            self.address, grpc.ssl_channel_credentials(self.authority), OPTIONS
        )

    def _claims(self, run: str) -> tuple[tuple[str, str], ...]:
        key, moment = public_line(self.key), f"{time.time():.3f}"
        signature = sign(self.key, _claim(key, moment, run)).hex()
        return (("key", key), ("time", moment), ("run", run), ("signature", signature))


def require_server(address: str, authority: bytes | None, timeout: float = 4.0) -> None:
    """Check that a server answers at ``address`` and is the one that the authority vouches for.

    Raises:
        ConnectionFailed: Nobody answers, or someone else does: says which, and what to do.
    """
    host, _, port = address.rpartition(":")
    try:
        plain = socket.create_connection((host.strip("[]"), int(port)), timeout)
    except (OSError, ValueError) as error:
        raise ConnectionFailed(
            f"nobody answers at {address}: {error}; is the server started, and is the port open?"
        ) from None
    if authority is None:
        plain.close()
        return
    context = ssl.create_default_context(cadata=authority.decode())
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(plain, server_hostname=host.strip("[]")):
            pass
    except ssl.SSLCertVerificationError as error:
        _complain(address, error.verify_message)
        raise ConnectionFailed(
            f"the server at {address} is not the one that your authority vouches for "
            f"({error.verify_message}); ask the coordinator for its ca.pem of today, and for a server "
            "certificate in force that names this host (`fedloom certs --host`)"
        ) from None
    except (ssl.SSLError, OSError) as error:
        raise ConnectionFailed(
            f"the server at {address} does not speak TLS: {error}; was it started with --insecure?"
        ) from None


def _complain(address: str, reason: str) -> None:
    """Tell a server that is not trusted why, for its audit log, and nothing of who says so.

    One whose certificate has expired is not told: it knows.
    """
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, ValueError, grpc.RpcError):
        shown = ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=1.0)
        credentials = grpc.ssl_channel_credentials(shown.encode())
        options = [*OPTIONS, ("grpc.ssl_target_name_override", hosts_of(shown)[0])]
        with grpc.secure_channel(address, credentials, options) as channel:
            why = ((WHY, reason[:REASON].encode()),)
            channel.unary_unary(DISTRUST)(b"", timeout=1.0, metadata=why)


def _signed_by(claims: dict[str, Any]) -> str:
    """Return the key by which a call was signed a moment ago, be it known here or not.

    Raises:
        IdentityError: It was not signed, by another key, or at another time.
    """
    key, moment, run = (str(claims.get(name, "")) for name in ("key", "time", "run"))
    try:
        behind = time.time() - float(moment)
        signature = bytes.fromhex(str(claims.get("signature", "")))
    except ValueError:
        raise IdentityError("the call is not signed as a client of fedloom signs") from None
    if not -AHEAD <= behind <= BEHIND:  # NaN is in no range
        where, allowed = ("behind", BEHIND) if behind > 0 else ("ahead of", AHEAD)
        raise IdentityError(
            f"its clock is {abs(behind):.1f} seconds {where} the server's, {allowed} are allowed: set "
            "the clock that is wrong"
        )
    if not is_signed(public_key(key), _claim(key, moment, run), signature):
        raise IdentityError("the signature is not one of the key that it names")
    return key


def _claim(key: str, moment: str, run: str) -> bytes:
    return f"fedloom {key} {moment} {run}".encode()


def _reason(error: Any, address: str) -> Exception:
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return IdentityError(f"the server at {address} does not let this client in: {details}")
    kind = RunIsOver if code == grpc.StatusCode.NOT_FOUND else ConnectionFailed
    return kind(f"the door at {address} cannot be used: {details or code}")


def _reader(chunks: Iterator[bytes]) -> Read:
    """Return how to read exactly so many bytes of a stream of chunks."""
    rest = b""

    def read(count: int) -> bytes | None:
        nonlocal rest
        parts, held = [rest], len(rest)
        while held < count:
            chunk = next(chunks, None)
            if chunk is None:
                return None
            parts.append(chunk)
            held += len(chunk)
        whole = b"".join(parts)
        found, rest = whole[:count], whole[count:]
        return found

    return read


def _pass_on(incoming: Iterator[bytes], inner: socket.socket) -> None:
    with contextlib.suppress(grpc.RpcError, OSError):
        for chunk in incoming:
            inner.sendall(chunk)
    _end(inner)


def _receive(inner: socket.socket) -> bytes:
    try:
        return inner.recv(CHUNK)
    except OSError:
        return b""


def _end(inner: socket.socket) -> None:
    with contextlib.suppress(OSError):
        inner.shutdown(socket.SHUT_RDWR)
    inner.close()
