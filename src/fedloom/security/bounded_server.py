"""An HTTP server in threads whose connections are bounded, in number and in seconds, whoever connects."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class BoundedServer(ThreadingHTTPServer):
    """Serves each connection in a thread of its own, of which there are so many and no more."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        connections: int,
        seconds: float = math.inf,
    ) -> None:
        """Bind an address.

        Args:
            address: Host and port; port 0 for any free one.
            handler: Answers the requests of one connection.
            connections: Served at once, at least 1; what comes beyond them is closed unanswered.
            seconds: After which a connection is closed, however often it sends something.

        Raises:
            OSError: The address cannot be had.
        """
        self._free = threading.Semaphore(connections)
        self._seconds = seconds
        self._until: dict[socket.socket, float] = {}
        self._changing = threading.Lock()
        self.request_queue_size = connections
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without asking a name server what the address is called."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread, or close it where there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        with self._changing:
            self._until[request] = time.monotonic() + self._seconds
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._ended(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, and have its place free again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._ended(request)

    def service_actions(self) -> None:
        """Close, each time that the server looks for new connections, those whose time is over."""
        now = time.monotonic()
        with self._changing:
            late = [request for request, until in self._until.items() if until < now]
        for request in late:
            with contextlib.suppress(OSError):  # closed meanwhile
                request.shutdown(socket.SHUT_RDWR)

    def _ended(self, request: socket.socket) -> None:
        with self._changing:
            del self._until[request]
        self._free.release()
