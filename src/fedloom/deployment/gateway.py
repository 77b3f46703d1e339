"""The gateway: the only port of a federation that is open to the network.

A connection is admitted in three steps, each with a bound on its cost: TLS, within some seconds; a proof
of the client's key (``handshake.py``), in one frame of at most a kilobyte; then the service of an
admitted client: its number, calls of Flower's Fleet interface (``flower_fleet.py``), or a stream of
messages, passed on unread to the process that runs the rounds. A connection without a proof of a key, or
with any other request, is closed. Flower itself listens on this machine alone.

Unauthenticated connections are handled by one thread, and use nothing else until their first byte
arrives: so thousands of idle ones cost one socket each, and the oldest are closed for new ones.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import ipaddress
import json
import logging
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fedloom.deployment import flower_fleet, handshake
from fedloom.deployment.connections import CHUNK, Duplex, abort, notice_absence
from fedloom.deployment.counters import Counts
from fedloom.deployment.flower_nodes import NodeKey
from fedloom.deployment.handshake import Claim, Distrust, Purpose
from fedloom.deployment.processes import cannot_listen
from fedloom.errors import (
    ConnectionFailed,
    FedloomError,
    IdentityError,
    OutputError,
    SettingsError,
)
from fedloom.federation.violations import Report, one_line
from fedloom.security.audit_log import Limited
from fedloom.security.client_registry import CachedMembers, Members
from fedloom.security.rate_limits import RateLimits, TokenBucket
from fedloom.settings.schema import Settings, parse
from fedloom.settings.toml import read_toml
from fedloom.wire.framing import connect, write_frame

LOG = logging.getLogger("fedloom.gateway")

BATCH = 64
"""Connections that are accepted in one batch, before waiting ones are handled again."""

BODIES = 2
"""Large bodies of one client that are passed on at a time: Flower holds each whole in memory."""

NOT_YET = "the server is starting, or has just admitted this client: it is tried again"

KNOWN = 65536
"""Addresses of admitted clients that are remembered; the one unused for longest is forgotten."""

SETTLING = 10.0
"""Seconds within which an admitted client must read the answer."""


Refusal = Literal["rate", "room", "time", "handshake", "identity", "distrust", "later"]
"""Kinds of refusals before a client is admitted: rate, no room, timeout, no handshake, a key that is not
allowed, a client that does not trust this server, retry later."""


class _Later(IdentityError):
    """A client is refused now, and may be admitted later."""


class GatewaySettings(Settings):
    """``[gateway]`` of ``settings.toml`` in the server's folder: bounds of what faces the network."""

    unproven: int = Field(default=512, ge=1)
    """Most open connections without a proof of a key; the oldest is closed for a new one. Each takes some
    30 kB once TLS has begun, 1 kB before."""
    unproven_per_address: int = Field(default=64, ge=1)
    """The same per address; a hospital behind one address needs a few, for a moment each."""
    handshake_seconds: float = Field(default=10.0, gt=0)
    """Seconds until a connection must have proven a key, including TLS."""
    handshakes_per_second: float = Field(default=10.0, gt=0)
    """Handshakes per second and address, on average; further connections are closed at once."""
    handshake_burst: int = Field(default=100, ge=1)
    """Handshakes per address in a burst."""
    unknown_per_second: float = Field(default=50.0, gt=0)
    """Handshakes per second, on average, from all addresses together at which no client has been admitted
    since the server started; further connections from such addresses are closed at once."""
    unknown_burst: int = Field(default=1000, ge=1)
    """Handshakes from such addresses in a burst."""
    connections_per_client: int = Field(default=16, ge=6)
    """Most open connections of one client. It has two for Flower's calls and one for its run, and for a
    while others that broke without notice."""
    requests_per_second: float = Field(default=20.0, gt=0)
    """Flower calls per second and client, on average; further calls wait. A client polls at most twice a
    second."""
    request_burst: int = Field(default=200, ge=1)
    """Flower calls per client in a burst."""
    flower_bytes: int = Field(default=16 << 30, ge=1 << 20)
    """Bytes of Flower's database above which no more data is accepted from clients: answers that are sent
    as messages wait there; answers over streams do not."""
    connections: int = Field(default=4096, ge=2)
    """Connections of all clients; each has a thread, a stream two."""

    @classmethod
    def read(cls, path: Path) -> GatewaySettings:
        """Return the settings in a file, the defaults where there is none.

        Raises:
            SettingsError: With every mistake in it.
        """
        if not path.is_file():
            return cls()
        table = read_toml(path)
        found, problems = parse(cls, table.get("gateway", {}), "gateway")
        problems += [
            f"[{section}]: unknown section; there is [gateway]"
            for section in table
            if section != "gateway"
        ]
        if problems or found is None:
            raise SettingsError(problems, str(path))
        return found


@dataclass(frozen=True)
class Allowed:
    """The allowed members by key; a table lookup.

    Attributes:
        numbers: Numbers of allowed members, by key in OpenSSH format.
        revoked: Keys that were revoked.
    """

    numbers: dict[str, int]
    revoked: frozenset[str]

    @classmethod
    def of(cls, members: Members) -> Allowed:
        """Return the table of a registry."""
        numbers = {own.key: own.number for own in members.allowed}
        return cls(numbers, frozenset(own.key for own in members.members) - numbers.keys())

    def number(self, key: str) -> int:
        """Return the number of the client with a key.

        Raises:
            IdentityError: It is not allowed.
        """
        if key not in self.numbers:
            why = "has been revoked" if key in self.revoked else "is not known here"
            raise IdentityError(
                f"the key {key[-16:]} {why}; the coordinator allows it with "
                "`fedloom members allow NAME FILE.pub`"
            )
        return self.numbers[key]


@dataclass
class _Unproven:
    """A connection without a proof of a key."""

    connection: socket.socket
    address: str
    end: float
    nonce: bytes = b""
    got: bytearray = field(default_factory=bytearray)
    encrypted: bool = False
    nonce_sent: bool = False


@dataclass
class _Admitted:
    """A connection of an admitted client."""

    client: int
    key: str
    folder_id: str
    purpose: Purpose
    end: Callable[[], None]


def source(host: str) -> str:
    """Return the address that is counted: for IPv6 the /64 network."""
    own = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(own, ipaddress.IPv6Address):
        if own.ipv4_mapped is not None:
            return str(own.ipv4_mapped)
        return str(ipaddress.ip_network((own, 64), strict=False))
    return host


class Gateway:
    """Admits clients.

    Attributes:
        settings: Bounds.
        note: Audit log of admitted clients and refused connections, at a bounded rate per client and for
            all refused connections together.
        report: Called with violations of an admitted client: its number, kind and reason.
        streams: Folder of the sockets of runs, by the run's id.
        upstream: Flower's server.
        node: Returns the node by which Flower knows the client of a number, once there is one.
        counts: Counts of connections by purpose, of refusals by kind, of bytes of streams and calls.
    """

    def __init__(
        self,
        members: Callable[[], Members],
        note: Callable[..., None],
        streams: Path,
        upstream: flower_fleet.Upstream,
        settings: GatewaySettings | None = None,
        report: Report = lambda client, kind, reason: None,
        stamp: Callable[[], object] | None = None,
        node: Callable[[int], NodeKey | None] = lambda number: None,
    ) -> None:
        """Keep what it needs; see :meth:`listen`, and :class:`CachedMembers` for ``stamp``."""
        self.node = node
        self.settings = settings or GatewaySettings()
        self.members = CachedMembers(
            members, lambda reason: note("unread_members", reason=reason), stamp
        )
        self.note, self.report = Limited(note), report
        self.counts = Counts()
        self.streams, self.upstream = streams, upstream
        self._allowed: tuple[Members | None, Allowed] = None, Allowed({}, frozenset())
        self._context: ssl.SSLContext | None = None
        self._certificate = b""
        self._unproven: dict[int, _Unproven] = {}  # oldest first
        self._addresses: collections.Counter[str] = collections.Counter()
        self._handshakes = RateLimits(
            self.settings.handshakes_per_second, self.settings.handshake_burst
        )
        self._unknown = TokenBucket(
            self.settings.unknown_per_second, self.settings.unknown_burst, time.monotonic()
        )
        self._known: dict[str, None] = {}  # addresses of admitted clients, the last one last
        self._requests: dict[int, TokenBucket] = {}
        self._turns: dict[int, threading.BoundedSemaphore] = {}
        self._connections: dict[int, _Admitted] = {}
        self._presence: dict[
            int, tuple[int, float]
        ] = {}  # connections that make it present, and since
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def listen(self, host: str, port: int, certificate: tuple[Path, Path] | None) -> None:
        """Listen and serve until :meth:`stop`.

        Args:
            host: Address.
            port: Of the gateway.
            certificate: Files of the certificate and its key; ``None`` for no TLS.

        Raises:
            ConnectionFailed: Something else listens there, or certificate and key do not fit together.
        """
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.minimum_version = ssl.TLSVersion.TLSv1_3
            self._context.num_tickets = (
                0  # no TLS session is resumed: each connection must prove its key
            )
            try:
                self._context.load_cert_chain(*certificate)
            except (ssl.SSLError, OSError) as error:
                raise ConnectionFailed(
                    f"the certificate {certificate[0]} and its key cannot be used: {error}"
                ) from None
            self._certificate = ssl.PEM_cert_to_DER_cert(certificate[0].read_text())
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(1024)
        except OSError as error:
            listening.close()
            raise cannot_listen(host, port, error) from None
        listening.setblocking(False)
        self._selector.register(listening, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._serve, args=(listening,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and end all connections."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            admitted = list(self._connections.values())
        for own in admitted:
            own.end()

    def follow(self) -> None:
        """End the connections of clients that are no longer allowed."""
        allowed = self._current()
        with self._lock:
            gone = [own for own in self._connections.values() if own.key not in allowed.numbers]
        for own in gone:
            own.end()

    def open_connections(self) -> tuple[int, int]:
        """Return the numbers of open connections of clients and of unauthenticated ones."""
        return len(self._connections), len(self._unproven)

    def presence(self) -> dict[int, tuple[bool, float]]:
        """Return for each client seen so far whether it is connected, and since when (s since 1970)."""
        with self._lock:
            return {client: (count > 0, since) for client, (count, since) in self._presence.items()}

    def _count_presence(self, client: int, change: int) -> None:
        with self._lock:
            before, since = self._presence.get(client, (0, 0.0))
            count = before + change
            if (before > 0) != (count > 0):
                since = time.time()
            self._presence[client] = count, since

    def _current(self) -> Allowed:
        members = self.members()
        known, allowed = self._allowed
        if members is not known:
            allowed = Allowed.of(members)
            self._allowed = members, allowed
        return allowed

    # what comes in

    def _serve(self, listening: socket.socket) -> None:
        looked = time.monotonic()
        while not self._stopping:
            for key, _ in self._selector.select(0.2):
                try:
                    if key.data is None:
                        self._accept(listening)
                    elif id(key.data) in self._unproven:  # it may have been closed for another
                        self._advance(key.data)
                except Exception:  # an error in one connection must not stop the others
                    LOG.exception("a connection was dropped")
                    if key.data is not None:
                        self._drop(key.data)
            if time.monotonic() > looked + 0.2:
                looked = time.monotonic()
                self._expire(looked)
        for own in list(self._unproven.values()):
            self._drop(own)
        listening.close()
        self._selector.close()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(BATCH):
            try:
                connection, (host, *_) = listening.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._shed()
                return  # no more connections are waiting
            now, address = time.monotonic(), source(host)
            crowd = ""
            if not self._handshakes.allows(address, now):
                crowd = "too many connections a second"
            elif address not in self._known and not self._unknown.take(now):
                crowd = "too many connections a second from unknown addresses"
            if crowd:
                connection.close()
                self._noted("connects", address, crowd, "rate")
                continue
            self._make_room(address)
            connection.setblocking(False)
            own = _Unproven(connection, address, now + self.settings.handshake_seconds)
            self._unproven[id(own)] = own
            self._addresses[address] += 1
            self._selector.register(connection, selectors.EVENT_READ, own)
            if self._context is None:
                self._advance(own)

    def _shed(self) -> None:
        """Close the oldest connection where the system has no more descriptors."""
        if self._unproven:
            oldest = next(iter(self._unproven.values()))
            self._refused(oldest, "the system has no room for more", "room")
        else:
            time.sleep(0.05)

    def _make_room(self, address: str) -> None:
        """Close the oldest connections where there are too many, those of the busiest address first."""
        if self._addresses[address] >= self.settings.unproven_per_address:
            crowded = address
        elif len(self._unproven) >= self.settings.unproven:
            crowded = max(self._addresses, key=self._addresses.__getitem__)
        else:
            return
        oldest = next(own for own in self._unproven.values() if own.address == crowded)
        self._refused(oldest, "it was closed for newer connections before it proved a key", "room")

    def _expire(self, now: float) -> None:
        while self._unproven:
            oldest = next(iter(self._unproven.values()))
            if now < oldest.end:
                break
            seconds = self.settings.handshake_seconds
            self._refused(oldest, f"no proof of a key within {seconds:g} seconds", "time")
        self._handshakes.forget(now, lambda address: self._addresses[address] > 0)

    def _advance(self, own: _Unproven) -> None:
        """Continue the handshake of a connection as far as its data allows."""
        try:
            self._begin(own)
            if self._received(own):
                self._decide(own)
        except (ssl.SSLWantReadError, BlockingIOError):
            self._selector.modify(own.connection, selectors.EVENT_READ, own)
        except ssl.SSLWantWriteError:
            self._selector.modify(own.connection, selectors.EVENT_WRITE, own)
        except IdentityError as error:
            later = isinstance(error, _Later)
            self._refused(
                own, str(error), "later" if later else "identity", notify=True, later=later
            )
        except FedloomError as error:  # the registry could never be read
            self._refused(own, f"it cannot be decided: {error}", "later")
        except OSError as error:  # OpenSSL's text of the TLS alert
            reason = getattr(error, "reason", None) or error.strerror or "it broke"
            self._refused(own, f"no handshake: {str(reason)[:80]}", "handshake")

    def _begin(self, own: _Unproven) -> None:
        """Complete TLS, and send the nonce.

        Raises:
            OSError: More data is needed, or the connection has failed.
        """
        if self._context is not None and not own.encrypted:
            self._selector.unregister(own.connection)
            own.connection = self._context.wrap_socket(
                own.connection, server_side=True, do_handshake_on_connect=False
            )
            own.encrypted = True
            self._selector.register(own.connection, selectors.EVENT_READ, own)
        if not own.nonce_sent:
            if isinstance(own.connection, ssl.SSLSocket):
                own.connection.do_handshake()
            own.nonce = own.nonce or os.urandom(handshake.NONCE)
            own.connection.send(handshake.MAGIC + own.nonce)
            own.nonce_sent = True

    @staticmethod
    def _received(own: _Unproven) -> bool:
        """Return whether the first frame is complete; nothing beyond it is read.

        Raises:
            OSError: It is too long, or the connection has ended.
        """
        while True:
            whole = handshake.LENGTH.size
            if len(own.got) >= whole:
                whole += handshake.LENGTH.unpack_from(own.got)[0]
                if whole > handshake.LENGTH.size + handshake.LONGEST:
                    raise ConnectionAbortedError(0, handshake.FOREIGN)
                if len(own.got) == whole:
                    return True
            new = own.connection.recv(whole - len(own.got))
            if not new:
                raise ConnectionAbortedError(0, "it was closed")
            own.got += new

    def _decide(self, own: _Unproven) -> None:
        """Admit a client, or refuse it.

        Raises:
            IdentityError: It is refused, for the given reason.
        """
        claim = handshake.read_claim(bytes(own.got[handshake.LENGTH.size :]))
        if isinstance(claim, Distrust):
            reason = "it does not trust this server: " + claim.reason
            self._refused(own, reason, "distrust", what="joins")
            return
        claim.require_proof(
            own.nonce, self._certificate
        )  # otherwise it would learn which keys are known
        number = self._current().number(claim.key)
        with self._lock:
            all_mine = [other for other in self._connections.values() if other.client == number]
            full = len(self._connections) >= self.settings.connections
        mine = len(all_mine)
        if any(other.purpose == "fleet" and other.folder_id != claim.home for other in all_mine):
            raise _Later(
                "with this key a client in another folder or on another machine takes part already; stop "
                "that one first. If there is none, inform the coordinator: the key may have been copied"
            )
        if full or mine >= self.settings.connections_per_client:
            raise _Later(
                "the server has no room for more connections"
                if full
                else f"client {number} has {mine} connections open already"
            )
        self._remember(own.address)
        self._forget(own)
        own.connection.setblocking(True)
        notice_absence(own.connection)
        admitted = _Admitted(
            number, claim.key, claim.home, claim.purpose, lambda: abort(own.connection)
        )
        with self._lock:
            self._connections[id(admitted)] = admitted
        threading.Thread(
            target=self._serve_client, args=(own.connection, claim, admitted), daemon=True
        ).start()

    def _remember(self, address: str) -> None:
        """Remember the address of an admitted client: the rate of unknown ones is not its own."""
        self._known.pop(address, None)
        self._known[address] = None
        if len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]

    def _forget(self, own: _Unproven) -> None:
        """Stop watching a connection."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(own.connection)
        if self._unproven.pop(id(own), None) is not None:
            self._addresses[own.address] -= 1
            if not self._addresses[own.address]:
                del self._addresses[own.address]

    def _drop(self, own: _Unproven) -> None:
        self._forget(own)
        own.connection.close()

    def _refused(
        self,
        own: _Unproven,
        reason: str,
        kind: Refusal,
        *,
        notify: bool = False,
        later: bool = False,
        what: str = "connects",
    ) -> None:
        """Close a connection; send the reason if the handshake began correctly."""
        if notify:
            with contextlib.suppress(OSError):
                own.connection.send(handshake.frame({"refused": reason, "later": later}))
            what = "joins"
        self._drop(own)
        self._noted(what, own.address, reason, kind)

    def _noted(self, what: str, address: str, reason: str, kind: Refusal) -> None:
        """Record a refusal; it also takes effect where the disk is full."""
        self.counts.add("refusals", kind)
        with contextlib.suppress(OutputError):
            self.note("refused_client", what=what, peer=address, reason=one_line(reason))

    # services for admitted clients

    def _serve_client(self, connection: socket.socket, claim: Claim, own: _Admitted) -> None:
        self.counts.add("connections", claim.purpose)
        try:
            connection.settimeout(SETTLING)
            if claim.purpose == "stream":
                self._stream(connection, claim.run, own)
                return
            if claim.purpose == "register":
                connection.sendall(handshake.frame(self._card(own.client)))
                with contextlib.suppress(OutputError):
                    self.note("client", source=own.client, what="joins", client=own.client)
                return
            node = self.node(own.client)
            if node is None:
                connection.sendall(handshake.frame({"refused": NOT_YET, "later": True}))
                return
            connection.sendall(handshake.frame({**self._card(own.client), "node": str(node.node)}))
            self._count_presence(own.client, 1)
            try:
                flower_fleet.pass_on(
                    _Counted(connection, self.counts),
                    self.upstream,
                    lambda: self.node(own.client) if claim.key in self._current().numbers else None,
                    self._pace_of(own.client),
                    self._turn_of(own.client),
                )
            finally:
                self._count_presence(own.client, -1)
        except flower_fleet.Forbidden as error:
            self.report(own.client, error.kind, str(error))
        except (OSError, FedloomError):
            pass  # it disconnected, or Flower is restarting: it reconnects
        finally:
            with self._lock:
                self._connections.pop(id(own), None)
            abort(connection)
            connection.close()

    def _card(self, number: int) -> dict[str, Any]:
        """Return the registration data that a client is sent."""
        member = self.members().numbered(number)
        return {"number": number, "name": member.name if member else ""}

    def _pace_of(self, client: int) -> Callable[[], object]:
        """Return a function that waits until a client may make another Flower call."""
        with self._lock:
            new = TokenBucket(
                self.settings.requests_per_second, self.settings.request_burst, time.monotonic()
            )
            bucket = self._requests.setdefault(client, new)

        def wait() -> None:
            while not bucket.take(time.monotonic()):
                time.sleep(1 / self.settings.requests_per_second)

        return wait

    def _turn_of(self, client: int) -> threading.BoundedSemaphore:
        """Return the semaphore that bounds a client's concurrent large bodies."""
        with self._lock:
            return self._turns.setdefault(client, threading.BoundedSemaphore(BODIES))

    def _stream(self, connection: socket.socket, run: str, own: _Admitted) -> None:
        """Pass bytes between a client and the process of a run."""
        try:
            inner = connect(self.streams / run)
        except ConnectionFailed:
            connection.sendall(
                handshake.frame({"refused": f"run {run[:8]} is not under way", "over": True})
            )
            return
        with inner:
            connection.sendall(handshake.frame({"number": own.client}))
            with contextlib.suppress(OutputError):
                told = {"what": "opens a stream", "client": own.client}
                self.note("client", source=own.client, **told)
            write_frame(inner, json.dumps({"client": own.client}).encode())
            connection.settimeout(None)
            outer = Duplex(connection)
            sent = partial(self.counts.add, "sent", "stream")
            back = threading.Thread(target=_pass_on, args=(inner, outer, sent), daemon=True)
            back.start()
            _pass_on(outer, inner, partial(self.counts.add, "received", "stream"))
            back.join()


class _Counted:
    """A connection that counts its bytes, for Flower calls."""

    def __init__(self, connection: socket.socket, counts: Counts) -> None:
        """Count the bytes from a client as received, and those to it as sent."""
        self._connection, self._counts = connection, counts
        self.settimeout = connection.settimeout

    def recv(self, count: int) -> bytes:
        """Read at most so many bytes."""
        content = self._connection.recv(count)
        self._counts.add("received", "calls", len(content))
        return content

    def sendall(self, content: bytes) -> None:
        """Write all of it."""
        self._connection.sendall(content)
        self._counts.add("sent", "calls", len(content))


def _pass_on(
    source: Duplex | socket.socket, target: Duplex | socket.socket, passed: Callable[[int], object]
) -> None:
    """Pass bytes on until one of two connections ends; then end the other."""
    buffer = memoryview(bytearray(CHUNK))
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            target.sendall(buffer[:count])
            passed(count)
    for own in (source, target):
        own.end() if isinstance(own, Duplex) else abort(own)
