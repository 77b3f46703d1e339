"""The administration socket: commands send requests to the running server of a folder, as the same user.

A command sends one request as JSON and receives one answer. Imports stay small.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pwd
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedloom.deployment.folders import ServerFolder
from fedloom.errors import ConnectionFailed, FedloomError
from fedloom.storage.files import lock_owner
from fedloom.wire.framing import (
    connect,
    listen,
    read_frame,
    reader,
    serve_each,
    stop_listening,
    write_frame,
)

LOG = logging.getLogger("fedloom.control")

SOCKET = Path("control") / "socket"
"""In the server's folder."""

LONGEST = 16 << 20
"""Largest request or answer in bytes: an experiment, and the status of ten thousand members."""

TIMEOUT = 20.0
"""Seconds that a command waits for an answer, and the server for a request."""

Handler = Callable[[dict[str, Any]], object]
"""Handles a request; returns what JSON can hold."""


class ControlSocket:
    """The socket on which a server answers the commands of its user."""

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        """Answer requests at ``path``, by name, until :meth:`close`.

        Raises:
            ConnectionFailed: The socket cannot be created.
        """
        self._path, self._handlers = path, handlers
        self._listening = listen(path)
        serve_each(self._listening, self._serve)

    def close(self) -> None:
        """Stop answering."""
        stop_listening(self._listening, self._path)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(TIMEOUT)
            with contextlib.suppress(FedloomError, OSError):
                asked = read_frame(reader(connection), lambda: LONGEST)
                if asked is not None:
                    write_frame(connection, json.dumps(self._answer(asked)).encode())

    def _answer(self, asked: bytes) -> dict[str, Any]:
        try:
            table = json.loads(asked)
            return {"answer": self._handlers[table.pop("ask")](table)}
        except FedloomError as error:
            return {"error": str(error), "exit_code": error.exit_code}
        except Exception as error:  # an error in one command must not stop the server
            LOG.exception("a command was not answered")
            return {"error": f"{type(error).__name__}: {error}", "exit_code": 1}


def ask(server_folder: ServerFolder, request: str, **facts: Any) -> Any:
    """Send a request to the server of a folder; return its answer.

    Raises:
        ConnectionFailed: No server runs there, or it is another user's.
        FedloomError: The server refuses the request, for the given reason.
    """
    require_own(server_folder.path)
    try:
        connection = connect(server_folder.path / SOCKET, TIMEOUT)
    except ConnectionFailed:
        if lock_owner(server_folder.lock) is not None:
            raise ConnectionFailed(
                f"the server in {server_folder.path} is starting or ending; try again"
            ) from None
        raise ConnectionFailed(
            f"no server runs in {server_folder.path}: `fedloom server start --home {server_folder.path}`"
        ) from None
    with connection:
        connection.settimeout(TIMEOUT)
        write_frame(connection, json.dumps({"ask": request, **facts}).encode())
        content = read_frame(reader(connection), lambda: LONGEST)
    if content is None:
        raise ConnectionFailed(
            f"the server in {server_folder.path} gave no answer within {TIMEOUT:.0f} s"
        )
    found = json.loads(content)
    if "error" in found:
        failed = FedloomError(found["error"])
        failed.exit_code = int(found["exit_code"])
        raise failed
    return found["answer"]


def require_own(folder: Path) -> None:
    """Check that a folder exists and belongs to this user, or that this user is root.

    Raises:
        ConnectionFailed: It is another user's, or there is none.
    """
    try:
        owner = folder.stat().st_uid
    except (FileNotFoundError, NotADirectoryError):
        raise ConnectionFailed(
            f"no server was started in {folder}: `fedloom server start --home {folder}`, or give the "
            "server's folder with --home"
        ) from None
    except PermissionError:
        raise ConnectionFailed(
            f"{folder} cannot be read by {_user(os.geteuid())}: run this command as the server's "
            "user (`sudo -u USER fedloom ...`)"
        ) from None
    if owner != os.geteuid() != 0:
        raise ConnectionFailed(
            f"{folder} is {_user(owner)}'s and this is {_user(os.geteuid())}: run this command as the "
            f"server's user: `sudo -u {_user(owner)} fedloom ...`"
        )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
