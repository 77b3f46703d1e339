"""Where the server and a client of a federation keep what is theirs."""

from __future__ import annotations

import contextlib
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedloom.deployment import worker_lock
from fedloom.deployment.client_file import OwnFile
from fedloom.deployment.worker_socket import SOCKET
from fedloom.errors import SettingsError
from fedloom.security.certificates import CA, CERTIFICATE, KEY
from fedloom.security.client_registry import FILE as MEMBERS
from fedloom.security.client_registry import Members
from fedloom.settings.schema import Settings, parse
from fedloom.settings.toml import read_toml, write_toml
from fedloom.storage.files import write_atomically


class StoredRecord(Settings):
    """What one process of ours writes for another, as TOML."""

    def write(self, path: Path) -> None:
        """Keep it; half of it is never read."""
        write_atomically(path, write_toml(self.model_dump()).encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what :meth:`write` wrote.

        Raises:
            SettingsError: It cannot be read, or is something else.
        """
        found, problems = parse(cls, read_toml(path), path.stem)
        if found is None:
            raise SettingsError(problems, str(path))
        return found


class Registration(StoredRecord):
    """How a client was joined, as its processes read it."""

    gateway: str
    """HOST:PORT of the server's gateway."""
    number: int
    """Of the member."""
    name: str
    """Of the member."""
    key: str
    authority: str | None = None
    """File of the federation's authority; left out for no TLS."""
    own: str | None = None
    """The client's file."""


@dataclass(frozen=True)
class ClientFolder:
    """A client's folder."""

    path: Path

    @property
    def socket(self) -> Path:
        """Where the worker listens."""
        return self.path / SOCKET

    @property
    def lock(self) -> Path:
        """The process that takes part, and the lock that makes it the only one."""
        return self.path / "client.pid"

    @property
    def id(self) -> str:
        """What tells this folder from all others; made at the first look.

        Raises:
            OutputError: It cannot be written down.
        """
        path = self.path / "id"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.fullmatch("[0-9a-f]{32}", known := path.read_text().strip()):
                return known
        new = uuid.uuid4().hex
        write_atomically(path, new.encode())
        return new

    @property
    def pid(self) -> Path:
        """The worker's process, and the lock that makes it the only one."""
        return self.path / worker_lock.LOCK

    def run(self, run: str) -> Path:
        """Return the folder of what this client keeps of a run."""
        return self.path / "runs" / run

    def registration(self) -> Registration:
        """Return how the client was joined.

        Raises:
            SettingsError: It was not.
        """
        return Registration.read(self.path / "client.toml")

    def write_registration(self, registration: Registration) -> None:
        """Keep how the client was joined."""
        registration.write(self.path / "client.toml")

    def own_file(self) -> OwnFile:
        """Return what the client says of itself."""
        own = self.registration().own
        return OwnFile.read(Path(own)) if own else OwnFile()


class ServerStatus(StoredRecord):
    """How the server was started, as other commands read it."""

    host: str
    port: int
    """Where the gateway listens."""
    flower: int
    """Where Flower's server listens, on this machine alone."""
    insecure: bool
    pid: int
    since: float
    """When it was started, in seconds since 1970."""
    metrics: str | None = None
    """Where it gives figures for Prometheus."""


@dataclass(frozen=True)
class ServerFolder:
    """The server's folder."""

    path: Path

    @property
    def lock(self) -> Path:
        """The process that serves, and the lock that makes it the only one."""
        return self.path / "server.pid"

    @property
    def playing(self) -> Path:
        """The process that plays a run, and the lock that makes it the only one."""
        return self.path / "run.pid"

    @property
    def authority(self) -> Path:
        """The federation's authority, which clients are given."""
        return self.path / CA

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.path / CERTIFICATE

    @property
    def key(self) -> Path:
        """Its key."""
        return self.path / KEY

    @property
    def flower(self) -> Path:
        """What Flower keeps."""
        return self.path / "flower"

    @property
    def streams(self) -> Path:
        """Sockets of runs, where the gateway passes streams on to."""
        return self.path / "streams"

    @property
    def nodes(self) -> Path:
        """The node by which Flower knows each member; see ``flower_nodes.py``."""
        return self.path / "nodes.toml"

    @property
    def database(self) -> Path:
        """What Flower's server keeps as long as this one runs."""
        return self.path / "flower.db"

    @property
    def requests(self) -> Path:
        """What was asked to be run, and how far it is."""
        return self.path / "requests"

    @property
    def settings(self) -> Path:
        """Bounds of the gateway, where they are not the defaults."""
        return self.path / "settings.toml"

    @property
    def started(self) -> Path:
        """How the server was started; not there when it does not run."""
        return self.path / "server.toml"

    def members(self) -> Members:
        """Return who is let in, as of now."""
        return Members(self.path / MEMBERS)

    def serving(self) -> ServerStatus:
        """Return how the server was started.

        Raises:
            SettingsError: It was not, or the folder is not a server's.
        """
        if not self.started.is_file():
            raise SettingsError(
                [
                    f"no server was started in {self.path}: `fedloom server start --home {self.path}`"
                ],
                "the command",
            )
        return ServerStatus.read(self.started)
