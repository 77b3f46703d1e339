"""Check before the server starts that nothing of Flower answers from the network."""

from __future__ import annotations

import contextlib
import socket
import ssl

from fedloom.errors import ConnectionFailed

PATHS = (
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/runtime/get-nodes",
    "/v1/fleet/activate-node",
    "/v1/fleet/pull-messages",
    "/health",
    "/docs",
)
"""One or two calls of each interface of Flower's server."""

HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""First bytes of a gRPC client: preface, and a frame of empty settings."""

SETTINGS = b"\x04\x00\x00\x00\x00\x00"
"""What follows the length in the frame of settings with which a server of HTTP/2 answers."""


def require_unexposed(host: str, port: int, *, tls: bool, private: int) -> None:
    """Check that neither the gateway's port nor Flower's own answers from the network as Flower does.

    Args:
        host: Where this machine reaches the gateway.
        port: The gateway's.
        tls: Whether it speaks TLS.
        private: Port of Flower's server, which must be reachable on this machine alone.

    Raises:
        ConnectionFailed: One does, so the server must not start.
    """
    requests = [
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\n\r\n".encode()
        for path in PATHS
    ]
    for request in [*requests, HTTP2]:
        answer = _answer(host, port, request, tls=tls)
        if b"HTTP/1" in answer or SETTINGS in answer[3:9]:
            what = request.split(b" HTTP")[0].decode()
            raise ConnectionFailed(
                f"port {port} answers {what!r} without a proof of a key; this server does not serve"
            )
    for address in _own_addresses():
        with contextlib.suppress(OSError), socket.create_connection((address, private), 0.5):
            raise ConnectionFailed(
                f"Flower's server can be reached at {address}:{private}, from outside of this machine; "
                "this server does not serve"
            )


def _answer(host: str, port: int, request: bytes, *, tls: bool) -> bytes:
    """Return the answer to a connection that sends only this request, without authentication."""
    answer = b""
    with contextlib.suppress(OSError):
        connection = socket.create_connection((host, port), 2)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = context.wrap_socket(connection)
        with connection:
            connection.settimeout(2)
            connection.sendall(request)
            while len(answer) < 1 << 16 and (part := connection.recv(1 << 12)):
                answer += part
    return answer


def _own_addresses() -> set[str]:
    """Return the addresses by which other machines may reach this one."""
    found: set[str] = set()
    for target in ("192.0.2.1", "2001:db8::1"):  # reserved for documentation; nothing is sent
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            found.add(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    return {address for address in found if not address.startswith("127.") and address != "::1"}
