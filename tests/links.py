"""Links between machines that can be cut."""

import contextlib
import math
import socket
import threading
import time


class Link:
    """A port of this machine that leads to another; all connections through it can be broken.

    Attributes:
        port: Where to connect to.
        cuts: Bytes that go towards the target over a connection before it breaks, one for each of the
            next connections.
        carried: Bytes that came from those who connected, over all connections.
    """

    def __init__(self, target, cuts=()):
        self.target, self.cuts, self.carried = target, list(cuts), 0
        self.cut_until, self.open = 0.0, set()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listening.accept()
                try:
                    if time.monotonic() < self.cut_until:
                        raise OSError
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                self.open |= {near, far}
                room = self.cuts.pop(0) if self.cuts else math.inf
                threading.Thread(target=self.pump, args=(near, far, room), daemon=True).start()
                threading.Thread(target=self.pump, args=(far, near), daemon=True).start()

    def pump(self, source, target, room=None):
        sent = 0
        with contextlib.suppress(OSError):
            while (data := source.recv(1 << 16)) and (room is None or sent <= room):
                target.sendall(data)
                sent += len(data)
                self.carried += len(data) * (room is not None)
        for end in (source, target):
            self.open.discard(end)
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self, seconds=0.0):
        """Break all connections, and refuse new ones for a while."""
        self.cut_until = time.monotonic() + seconds
        for end in list(self.open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
