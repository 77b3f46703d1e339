"""The client's side of the gateway: it verifies the server and proves its key."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from fedloom.deployment import handshake
from fedloom.deployment.connections import Duplex, notice_absence
from fedloom.deployment.handshake import Purpose
from fedloom.deployment.proxy import find_proxy
from fedloom.errors import ConnectionFailed, IdentityError, SettingsError, first_line
from fedloom.wire.envelope import PROTOCOL, printable
from fedloom.wire.framing import Read, reader, write_frame

TIMEOUT = 4.0
"""Seconds for each step until a client is admitted."""


PORT = 9092
"""Default port of a gateway."""

NONCE_SECONDS = 1.0
"""Seconds within which a server without TLS must send its first bytes."""

OUT_OF_FORCE = 9, 10
"""OpenSSL's codes of a certificate that is not valid yet, or has expired."""

INSPECTED = (
    "; or the proxy answers with a certificate of its own (TLS inspection): have its administrator "
    "exempt this host"
)
"""Another reason why a server behind a proxy may not be trusted."""


class RunIsOver(ConnectionFailed):
    """The run of a stream is not under way."""


class ProtocolMismatch(IdentityError):
    """The service at an address has another protocol version."""

    def __init__(self, address: str, protocol: int | None) -> None:
        """Name the protocol version, if it is one of this package."""
        if protocol is None:
            super().__init__(f"what listens at {address} is not a gateway of fedloom")
            return
        older, newer = "an older", "a newer"
        theirs = older if protocol < PROTOCOL else newer
        super().__init__(
            f"the server at {address} has {theirs} fedloom than this client (protocol {protocol}, here "
            f"{PROTOCOL}): install the server's version here, or have the server upgraded"
        )


@dataclass(frozen=True)
class Card:
    """The server's registration data of an admitted client.

    Attributes:
        number: The member's number.
        name: Its name.
        node: Its Flower node, for the purpose of Flower calls.
    """

    number: int
    name: str
    node: int = 0


@dataclass(frozen=True)
class GatewayClient:
    """A client's connection to the gateway.

    Attributes:
        address: HOST:PORT of the gateway.
        key: The client's.
        authority: PEM of the federation's authority; ``None`` for no TLS.
        folder_id: Id of the client's folder; see :class:`Claim`.
    """

    address: str
    key: ec.EllipticCurvePrivateKey
    authority: bytes | None
    folder_id: str

    def register(self) -> Card:
        """Prove this client's key; return its registration data.

        Raises:
            ConnectionFailed: The server cannot be reached, or has no certificate of the authority.
            IdentityError: It does not admit this client.
        """
        connection, card = self.open("register")
        connection.close()
        return card

    @contextlib.contextmanager
    def stream(self, run: str) -> Iterator[tuple[Read, Callable[[bytes], None]]]:
        """Open a stream to a run; yield a function that reads from it and one that sends a message.

        One thread may read while another sends.

        Raises:
            ConnectionFailed: It cannot be opened, or it broke.
            IdentityError: The server does not admit this client.
        """
        connection, _ = self.open("stream", run)
        connection.settimeout(None)
        own = Duplex(connection)
        try:
            yield reader(own), lambda message: write_frame(own, message)
        finally:
            own.close()

    def open(self, purpose: Purpose, run: str = "") -> tuple[socket.socket, Card]:
        """Return a connection on which the server has admitted this client, and its registration data.

        Raises:
            ConnectionFailed: The server cannot be reached, or has no certificate of the authority.
            IdentityError: It does not admit this client.
        """
        connection = connect(self.address, self.authority)
        try:
            answer = self._prove(connection, purpose, run)
        except (OSError, ValueError) as error:
            connection.close()
            raise ConnectionFailed(
                f"the server at {described(self.address)} broke the connection: {first_line(error)}"
            ) from None
        except (ConnectionFailed, IdentityError):
            connection.close()
            raise
        with contextlib.suppress(TypeError, ValueError):
            if "number" in answer:
                node = int(answer.get("node", 0))
                return connection, Card(int(answer["number"]), str(answer.get("name", "")), node)
        connection.close()
        reason = printable(str(answer.get("refused", "no reason given")))[:1000]
        if answer.get("over"):
            raise RunIsOver(reason)
        if answer.get("later"):
            raise ConnectionFailed(reason)
        raise IdentityError(
            f"the server at {described(self.address)} does not admit this client: {reason}"
        )

    def _prove(self, connection: socket.socket, purpose: Purpose, run: str) -> dict[str, Any]:
        if self.authority is None:  # a server with TLS waits for it and sends nothing
            connection.settimeout(NONCE_SECONDS)
        received = _read(connection, handshake.SERVER_NONCE_FRAME)
        nonce = handshake.nonce_of(received)
        if nonce is None:
            raise ProtocolMismatch(described(self.address), handshake.protocol_of(received))
        connection.settimeout(TIMEOUT)
        certificate = b""
        if isinstance(connection, ssl.SSLSocket):
            certificate = connection.getpeercert(binary_form=True) or b""
        connection.sendall(
            handshake.make_claim(self.key, nonce, certificate, purpose, self.folder_id, run)
        )
        (length,) = handshake.LENGTH.unpack(_read(connection, handshake.LENGTH.size))
        answer = json.loads(_read(connection, length))
        if not isinstance(answer, dict):
            raise ValueError("its answer cannot be read")
        return answer


def split_address(address: str, default: int = PORT) -> tuple[str, int]:
    """Return host and port of HOST:PORT or HOST; an IPv6 address is in brackets.

    Raises:
        SettingsError: It is neither.
    """
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]]+))(?::(\d{1,5}))?", address)
    port = int(found[3] or default) if found else 0
    if found is None or not 0 < port < 1 << 16:
        raise SettingsError(
            [
                f"{address!r} is not a HOST:PORT, such as fed.example.org:{default} or "
                f"[2001:db8::1]:{default}"
            ],
            "the command",
        )
    return found[1] or found[2], port


def described(address: str) -> str:
    """Return HOST:PORT, and the proxy by which it is reached, for messages.

    Raises:
        SettingsError: The environment names a proxy that cannot be used.
    """
    proxy = find_proxy(*split_address(address))
    return address if proxy is None else f"{address} (through the proxy at {proxy})"


def connect(address: str, authority: bytes | None) -> socket.socket:
    """Return a connection to the server, verified by the authority.

    Raises:
        ConnectionFailed: Nothing answers, or the answer is not that of a fedloom server.
        IdentityError: Another server answers.
        SettingsError: The environment names a proxy that cannot be used.
    """
    host, _ = split_address(address)
    try:
        plain = _reach(address, TIMEOUT)
        notice_absence(plain)
    except OSError as error:
        raise ConnectionFailed(
            f"nobody answers at {address}: {first_line(error)}; is the server started, and is the port "
            "open?"
        ) from None
    if authority is None:
        return plain
    where = described(address)
    context = ssl.create_default_context(cadata=authority.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        _complain(address, error.verify_message)
        if error.verify_code in OUT_OF_FORCE:
            raise ConnectionFailed(
                f"the certificate of the server at {where} is not in force ({error.verify_message}): "
                "the coordinator makes a new one with `fedloom certs`, or this machine's clock is wrong"
            ) from None
        raise IdentityError(
            f"the server at {where} does not have a certificate of your authority "
            f"({error.verify_message}); ask the coordinator for its ca.pem of today, and for a server "
            "certificate that names this host (`fedloom certs --host`)"
            f"{INSPECTED if where != address else ''}"
        ) from None
    except (ssl.SSLEOFError, ConnectionError):
        plain.close()
        raise ConnectionFailed(
            f"the server at {where} closed the connection at once; are there too many connections from "
            "this address?"
        ) from None
    except OSError as error:
        plain.close()
        raise ConnectionFailed(
            f"the server at {where} does not speak TLS: {first_line(error)}; was it started with "
            "--insecure?"
        ) from None


def _reach(address: str, timeout: float) -> socket.socket:
    """Return a connection without TLS, through the proxy if there is one.

    Raises:
        OSError: Nobody answers at the address.
        ConnectionFailed: The proxy does not open the connection.
    """
    host, port = split_address(address)
    proxy = find_proxy(host, port)
    if proxy is not None:
        return proxy.connect(host, port, timeout)
    return socket.create_connection((host, port), timeout)


def _complain(address: str, reason: str) -> None:
    """Send the reason of distrust to an untrusted server, for its audit log, without an identity."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError, ValueError, ConnectionFailed):
        plain = _reach(address, 1.0)
        with context.wrap_socket(plain) as connection:
            if handshake.nonce_of(_read(connection, handshake.SERVER_NONCE_FRAME)) is not None:
                connection.sendall(handshake.make_distrust(reason))


def _read(connection: socket.socket, count: int) -> bytes:
    """Return exactly so many bytes.

    Raises:
        OSError: The connection ends before.
    """
    content = reader(connection)(count)
    if content is None:
        raise ConnectionAbortedError("the connection was closed before the handshake was complete")
    return content
