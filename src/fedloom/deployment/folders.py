"""The data folders of the server and of a client of a federation."""

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
    """A record that one process of fedloom writes for another, as TOML."""

    def write(self, path: Path) -> None:
        """Write it atomically."""
        write_atomically(path, write_toml(self.model_dump()).encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what :meth:`write` wrote.

        Raises:
            SettingsError: It cannot be read, or is malformed.
        """
        found, problems = parse(cls, read_toml(path), path.stem)
        if found is None:
            raise SettingsError(problems, str(path))
        return found


class Registration(StoredRecord):
    """Registration of a client with a server, as its processes read it."""

    gateway: str
    """HOST:PORT of the server's gateway."""
    number: int
    """Of the member."""
    name: str
    """Of the member."""
    key: str
    authority: str | None = None
    """File of the federation's authority; missing without TLS."""
    own: str | None = None
    """The client's file."""


@dataclass(frozen=True)
class ClientFolder:
    """A client's folder."""

    path: Path

    @property
    def socket(self) -> Path:
        """Socket of the worker."""
        return self.path / SOCKET

    @property
    def lock(self) -> Path:
        """Lock file of the client process, which holds its process id."""
        return self.path / "client.pid"

    @property
    def id(self) -> str:
        """Id of this folder; created at the first access.

        Raises:
            OutputError: It cannot be written.
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
        """Lock file of the worker, which holds its process id."""
        return self.path / worker_lock.LOCK

    def run(self, run: str) -> Path:
        """Return the folder of a run at this client."""
        return self.path / "runs" / run

    def registration(self) -> Registration:
        """Return the client's registration.

        Raises:
            SettingsError: It was not.
        """
        return Registration.read(self.path / "client.toml")

    def write_registration(self, registration: Registration) -> None:
        """Store the client's registration."""
        registration.write(self.path / "client.toml")

    def own_file(self) -> OwnFile:
        """Return the client's file."""
        own = self.registration().own
        return OwnFile.read(Path(own)) if own else OwnFile()


class ServerStatus(StoredRecord):
    """State of a started server, as other commands read it."""

    host: str
    port: int
    """Port of the gateway."""
    flower: int
    """Port of Flower's server, on this machine only."""
    insecure: bool
    pid: int
    since: float
    """When it was started, in seconds since 1970."""
    metrics: str | None = None
    """Address of the metrics for Prometheus."""


@dataclass(frozen=True)
class ServerFolder:
    """The server's folder."""

    path: Path

    @property
    def lock(self) -> Path:
        """Lock file of the server process, which holds its process id."""
        return self.path / "server.pid"

    @property
    def playing(self) -> Path:
        """Lock file of the current run's process, which holds its process id."""
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
        """Folder of Flower's files."""
        return self.path / "flower"

    @property
    def streams(self) -> Path:
        """Folder of the sockets of runs, to which the gateway passes streams."""
        return self.path / "streams"

    @property
    def nodes(self) -> Path:
        """Table of Flower's node of each member; see ``flower_nodes.py``."""
        return self.path / "nodes.toml"

    @property
    def database(self) -> Path:
        """Database of Flower's server, deleted at each start."""
        return self.path / "flower.db"

    @property
    def requests(self) -> Path:
        """Folder of run requests and run events."""
        return self.path / "requests"

    @property
    def settings(self) -> Path:
        """Settings of the gateway, where they differ from the defaults."""
        return self.path / "settings.toml"

    @property
    def started(self) -> Path:
        """State of the started server; missing when it does not run."""
        return self.path / "server.toml"

    def members(self) -> Members:
        """Return the current registry."""
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
