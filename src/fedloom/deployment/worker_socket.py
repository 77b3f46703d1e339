"""Connects to the worker of a client's folder, and starts one where none runs. No torch here."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

from fedloom.deployment.processes import child_environment
from fedloom.deployment.worker_lock import LOCK
from fedloom.errors import ConnectionFailed
from fedloom.runs.parent_process import of_this_process
from fedloom.storage.files import lock_owner
from fedloom.wire.envelope import Envelope
from fedloom.wire.framing import connect, read_frame, reader, write_frame

SOCKET = Path("worker") / "socket"
LOG = Path("worker.log")
START = 120.0
"""Seconds that a worker may take to listen."""

NO_LIMIT = 1 << 40


def ask_worker(client_folder: Path, envelope: Envelope) -> Envelope:
    """Send a request to the worker; return its reply, after the work is done.

    Raises:
        ConnectionFailed: No worker can be started, or it died over this.
    """
    with reach_worker(client_folder) as connection:
        write_frame(connection, envelope.pack())
        reply = read_frame(reader(connection), lambda: NO_LIMIT)
    if reply is None:
        raise ConnectionFailed(f"the worker gave no answer; see {client_folder / LOG}")
    return Envelope.unpack(reply)


def reach_worker(client_folder: Path) -> socket.socket:
    """Return a connection to the worker of a client's folder; start one if there is none."""
    process, end = None, time.monotonic() + START
    while time.monotonic() < end:
        try:
            return connect(client_folder / SOCKET)
        except ConnectionFailed:
            if process is not None and process.poll():
                break
            if lock_owner(client_folder / LOCK) is None and (
                process is None or process.poll() is not None
            ):
                process = start_worker(client_folder)
            time.sleep(0.1)
    raise ConnectionFailed(f"the worker cannot be started; see {client_folder / LOG}")


def start_worker(client_folder: Path) -> subprocess.Popen[bytes]:
    """Start a worker that ends with this process."""
    with (client_folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fedloom.deployment.worker_process", str(client_folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**child_environment(), "PYTHONUNBUFFERED": "1", **of_this_process()},
        )
