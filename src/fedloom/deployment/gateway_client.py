"""A client at the gateway: it makes sure of the server, proves its key, and is let through."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from fedloom.deployment import handshake
from fedloom.deployment.connections import Duplex, notice_absence
from fedloom.deployment.handshake import Purpose
from fedloom.engines.frames import Read, reader, write_frame
from fedloom.errors import ConnectionFailed, IdentityError

TIMEOUT = 4.0
"""Seconds for each step until a client is let in."""


GREETED = 1.0
"""Seconds for a server without TLS to begin."""


class RunIsOver(ConnectionFailed):
    """The run that a stream was to be opened to is not under way."""


@dataclass(frozen=True)
class GatewayClient:
    """A client at the gateway.

    Attributes:
        address: HOST:PORT of the gateway.
        key: The client's.
        authority: PEM of the federation's authority; ``None`` for no TLS.
    """

    address: str
    key: ec.EllipticCurvePrivateKey
    authority: bytes | None

    def register(self) -> int:
        """Say who this is; return the number that the server knows it by.

        Raises:
            ConnectionFailed: The server cannot be reached, or is another than the authority vouches for.
            IdentityError: It does not let this client in.
        """
        connection, number = self.open("register")
        connection.close()
        return number

    @contextlib.contextmanager
    def stream(self, run: str) -> Iterator[tuple[Read, Callable[[bytes], None]]]:
        """Open a stream to a run: yields how to read from it and how to send a message.

        One thread may read while another sends.

        Raises:
            ConnectionFailed: It cannot be opened, or broke.
            IdentityError: The server does not let this client in.
        """
        connection, _ = self.open("stream", run)
        connection.settimeout(None)
        own = Duplex(connection)
        try:
            yield reader(own), lambda message: write_frame(own, message)
        finally:
            own.close()

    def open(self, purpose: Purpose, run: str = "") -> tuple[socket.socket, int]:
        """Return a connection on which the server has let this client in, and the client's number.

        Raises:
            ConnectionFailed: The server cannot be reached, or is another than the authority vouches for.
            IdentityError: It does not let this client in.
        """
        connection = connect(self.address, self.authority)
        try:
            answer = self._prove(connection, purpose, run)
        except (OSError, ValueError) as error:
            connection.close()
            raise ConnectionFailed(
                f"the server at {self.address} broke the connection: {error}"
            ) from None
        except ConnectionFailed:
            connection.close()
            raise
        if "number" in answer:
            return connection, int(answer["number"])
        connection.close()
        reason = str(answer.get("refused", "no reason given"))[:1000]
        if answer.get("over"):
            raise RunIsOver(reason)
        raise IdentityError(f"the server at {self.address} does not let this client in: {reason}")

    def _prove(self, connection: socket.socket, purpose: Purpose, run: str) -> dict[str, Any]:
        if self.authority is None:  # a server that speaks TLS waits for it, and says nothing
            connection.settimeout(GREETED)
        nonce = handshake.nonce_of(_read(connection, handshake.GREETING))
        if nonce is None:
            raise ConnectionFailed(
                f"what listens at {self.address} is no gateway of this version of fedloom; upgrade "
                "server and clients together"
            )
        connection.settimeout(TIMEOUT)
        certificate = b""
        if isinstance(connection, ssl.SSLSocket):
            certificate = connection.getpeercert(binary_form=True) or b""
        connection.sendall(handshake.make_claim(self.key, nonce, certificate, purpose, run))
        (length,) = handshake.LENGTH.unpack(_read(connection, handshake.LENGTH.size))
        answer = json.loads(_read(connection, length))
        if not isinstance(answer, dict):
            raise ValueError("its answer cannot be read")
        return answer


def connect(address: str, authority: bytes | None) -> socket.socket:
    """Return a connection to the server that the authority vouches for.

    Raises:
        ConnectionFailed: Nobody answers, or someone else does: says which, and what to do.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        plain = socket.create_connection((host, int(port)), TIMEOUT)
        notice_absence(plain)
    except (OSError, ValueError) as error:
        raise ConnectionFailed(
            f"nobody answers at {address}: {error}; is the server started, and is the port open?"
        ) from None
    if authority is None:
        return plain
    context = ssl.create_default_context(cadata=authority.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        _complain(address, error.verify_message)
        raise ConnectionFailed(
            f"the server at {address} is not the one that your authority vouches for "
            f"({error.verify_message}); ask the coordinator for its ca.pem of today, and for a server "
            "certificate in force that names this host (`fedloom certs --host`)"
        ) from None
    except (ssl.SSLEOFError, ConnectionError):
        plain.close()
        raise ConnectionFailed(
            f"the server at {address} closed the connection at once; has it too many from here?"
        ) from None
    except OSError as error:
        plain.close()
        raise ConnectionFailed(
            f"the server at {address} does not speak TLS: {error}; was it started with --insecure?"
        ) from None


def _complain(address: str, reason: str) -> None:
    """Tell a server that is not trusted why, for its audit log, and nothing of who says so."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError, ValueError):
        plain = socket.create_connection((host.strip("[]"), int(port)), 1.0)
        with context.wrap_socket(plain) as connection:
            if handshake.nonce_of(_read(connection, handshake.GREETING)) is not None:
                connection.sendall(handshake.make_distrust(reason))


def _read(connection: socket.socket, count: int) -> bytes:
    """Return exactly so many bytes.

    Raises:
        OSError: There are not so many.
    """
    content = reader(connection)(count)
    if content is None:
        raise ConnectionAbortedError("it was closed before it said what it had to")
    return content
