"""Connections between a client and the gateway that detect a lost peer."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading

CHUNK = 1 << 18
"""Bytes that are passed on per read."""

PROBE, PATIENCE = 10, 15
"""Seconds of silence after which TCP keep-alive probes start, and within which sent data must be
acknowledged; then the connection counts as broken."""


def notice_absence(connection: socket.socket) -> None:
    """Make the system end a connection whose peer is lost."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", PROBE),
        ("TCP_KEEPINTVL", PATIENCE - PROBE),
        ("TCP_KEEPCNT", 1),
        ("TCP_USER_TIMEOUT", 1000 * PATIENCE),
    ):
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def abort(connection: socket.socket) -> None:
    """Break a connection, so that threads waiting for it are woken.

    Without a TLS shutdown: after one the connection would continue unencrypted.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class Duplex:
    """A connection of which one thread may read while another writes.

    OpenSSL allows one call at a time for a TLS connection. So each call is made under a lock and does not
    block; waiting for the network happens outside the lock.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Wrap a connection, with TLS or without."""
        connection.setblocking(False)
        self._connection, self._lock = connection, threading.Lock()
        self._over = False

    def recv_into(self, buffer: memoryview, count: int = 0) -> int:
        """Read at most so many bytes; 0 at the end.

        Raises:
            OSError: The connection is broken.
        """
        while True:
            try:
                with self._lock:
                    return self._connection.recv_into(buffer, count)
            except (ssl.SSLWantReadError, BlockingIOError):
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
            except ssl.SSLEOFError:
                return 0

    def sendall(self, content: bytes | memoryview) -> None:
        """Write all of it; waits while the other end does not read.

        Raises:
            OSError: The connection is broken.
        """
        rest = memoryview(content)
        while rest:
            try:
                with self._lock:
                    rest = rest[self._connection.send(rest[:CHUNK]) :]
            except (ssl.SSLWantWriteError, BlockingIOError):
                self._wait(select.POLLOUT)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._connection, event)
        poll.poll()
        if self._over:
            raise ConnectionAbortedError("the connection was closed")

    def end(self) -> None:
        """Break the connection; waiting threads are woken. Idempotent and thread-safe."""
        self._over = True
        abort(self._connection)

    def close(self) -> None:
        """Close it, once no thread uses it."""
        self.end()
        self._connection.close()
