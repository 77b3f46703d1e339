"""Connections between a client and the gateway, which notice when the other end is gone."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading

CHUNK = 1 << 18
"""Bytes that are passed on at a time."""

PROBE, PATIENCE = 10, 15
"""Seconds without a word after which it is asked whether the other end is there, and in which it must
have confirmed what it was sent: then it is broken, however silent the network was about that."""


def notice_absence(connection: socket.socket) -> None:
    """Have the system end a connection whose other end has gone without a word."""
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
    """Break a connection, so that whoever waits for it is woken.

    TLS is not told: by its own shutdown the connection would go on in clear.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class Duplex:
    """A connection of which one thread may read while another writes.

    OpenSSL allows one call at a time for a connection of TLS. So each is made under a lock and never
    waits there: who must wait for the network does so outside.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connection, with TLS or without."""
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
        """Break the connection; who waits for it is woken. Called any number of times, by any thread."""
        self._over = True
        abort(self._connection)

    def close(self) -> None:
        """Let go of it, once nobody uses it any more."""
        self.end()
        self._connection.close()
