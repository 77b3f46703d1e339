"""Where the server and a client of a federation keep what is theirs, and the client's own file."""

from __future__ import annotations

import contextlib
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from fedloom.data.examples import Kind
from fedloom.data.sources import CLIENTS as ELSEWHERE
from fedloom.data.sources import DataSettings
from fedloom.deployment import worker_process
from fedloom.deployment.calling import SOCKET
from fedloom.deployment.policy import PolicySettings
from fedloom.errors import SettingsError
from fedloom.files import write_whole
from fedloom.identity import CA, CERTIFICATE, KEY
from fedloom.members import FILE as MEMBERS
from fedloom.members import Members
from fedloom.settings import Settings, nearest, parse, read_toml, write_toml


class OwnData(DataSettings):
    """``[data]`` of a client's file: its rows and how they are read, which no server can change."""

    share: Literal["own", "experiment"] = "own"
    """own: all these rows are this client's. experiment: they are the rows of all clients, of which
    this one takes its share as the experiment deals them, with its seed: for built-in rows, and for
    trying things."""

    @property
    def is_whole(self) -> bool:
        """Whether all rows are this client's, and none is held out for all."""
        return self.share == "own"

    def contradictions(self) -> list[str]:
        """Return what in these settings cannot both be meant."""
        if "source" not in self.model_fields_set and not self.domains:
            return ["data.source: missing; it has no default"]
        if ELSEWHERE in self.all_sources:
            return [f'data.source = "{ELSEWHERE}" is for experiments; name this client\'s rows']
        found = super().contradictions()
        if self.share == "experiment":
            return found
        if self.is_builtin and not self.domains:
            found.append(
                f'data.source = {self.source!r} is nobody\'s own: data.share = "experiment"'
            )
        for name in ("test_source", "test_split", "test_kind"):
            if getattr(self, name) is not None:
                found.append(f'data.{name} is the coordinator\'s, unless data.share = "experiment"')
        return found


class OwnPublic(Settings):
    """``[public]`` of a client's file: rows that all parties have, as they lie here."""

    source: str | list[str]
    """As public.source of an experiment."""
    kind: Kind | None = None
    """As public.kind (default: data.kind)."""
    columns: dict[str, str] = {}
    """As public.columns."""
    template: str | None = None
    """As public.template."""


class OwnModel(Settings):
    """``[model]`` of a client's file."""

    path: str
    """Where the experiment's model lies on this machine."""
    revision: str | None = None
    """Of a Hub name, its branch, tag or commit."""


class OwnTraining(Settings):
    """``[training]`` of a client's file: how this machine computes."""

    device: str | None = None
    """As training.device of an experiment."""
    threads: int | None = Field(default=None, ge=1)
    """As training.threads of an experiment."""


class OwnWorker(Settings):
    """``[worker]`` of a client's file: the process that keeps model and rows between messages."""

    idle: float = Field(default=3600, gt=0)
    """Seconds without a message after which it ends; the next message starts it again."""
    secret_noise: bool = True
    """Whether noise that hides rows (method.embedding_noise, method.activation_noise) is drawn from
    this client's key, so that the server cannot take it off again; false: from the experiment's seed,
    which gives the bits of a simulation."""


OWN_SECTIONS: dict[str, type[Settings]] = {
    "data": OwnData,
    "public": OwnPublic,
    "model": OwnModel,
    "policy": PolicySettings,
    "training": OwnTraining,
    "worker": OwnWorker,
}


@dataclass(frozen=True)
class OwnFile:
    """What a client says of itself: nothing of it leaves its machine, and it decides."""

    data: OwnData | None = None
    public: OwnPublic | None = None
    model: OwnModel | None = None
    policy: PolicySettings = field(default_factory=PolicySettings)
    training: OwnTraining = field(default_factory=OwnTraining)
    worker: OwnWorker = field(default_factory=OwnWorker)

    @classmethod
    def read(cls, path: Path) -> OwnFile:
        """Read a client's file.

        Raises:
            SettingsError: With every mistake found in it.
        """
        table, problems = read_toml(path), []
        parts: dict[str, Any] = {}
        for section in sorted(table.keys() - OWN_SECTIONS.keys()):
            problems.append(f"[{section}]: unknown section; {nearest(section, OWN_SECTIONS)}")
        for section in sorted(table.keys() & OWN_SECTIONS.keys()):
            settings, complaints = parse(OWN_SECTIONS[section], table[section], section)
            problems += complaints
            parts[section] = settings
        if isinstance(parts.get("data"), OwnData):
            problems += parts["data"].contradictions()
        if problems:
            raise SettingsError(problems, str(path))
        return cls(**_beside(parts, path.resolve().parent))


def _beside(parts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a file's sections with the paths in them that lie beside the file as absolute ones."""

    def found(text: str) -> str:
        return str(folder / text) if (folder / text).exists() else text

    def every(source: str | list[str]) -> str | list[str]:
        return found(source) if isinstance(source, str) else [found(one) for one in source]

    def placed(own: Settings, name: str, changed: object) -> Settings:
        return own if changed == getattr(own, name) else own.model_copy(update={name: changed})

    everything = dict(parts)
    for section in ("data", "public"):
        if (own := parts.get(section)) is not None:
            everything[section] = placed(own, "source", every(own.source))
    if (data := everything.get("data")) is not None and data.domains:
        domains = {n: placed(own, "source", every(own.source)) for n, own in data.domains.items()}
        everything["data"] = placed(data, "domains", domains)
    if (model := parts.get("model")) is not None:
        everything["model"] = placed(model, "path", found(model.path))
    return everything


class Note(Settings):
    """What one process of ours writes for another, as TOML."""

    def write(self, path: Path) -> None:
        """Keep it; half of it is never read."""
        write_whole(path, write_toml(self.model_dump()).encode())

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


class Joining(Note):
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
class ClientHome:
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
        write_whole(path, new.encode())
        return new

    @property
    def pid(self) -> Path:
        """The worker's process, and the lock that makes it the only one."""
        return self.path / worker_process.LOCK

    def run(self, run: str) -> Path:
        """Return the folder of what this client keeps of a run."""
        return self.path / "runs" / run

    def joining(self) -> Joining:
        """Return how the client was joined.

        Raises:
            SettingsError: It was not.
        """
        return Joining.read(self.path / "client.toml")

    def write_joining(self, joining: Joining) -> None:
        """Keep how the client was joined."""
        joining.write(self.path / "client.toml")

    def own_file(self) -> OwnFile:
        """Return what the client says of itself."""
        own = self.joining().own
        return OwnFile.read(Path(own)) if own else OwnFile()


class Serving(Note):
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
class ServerHome:
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

    def serving(self) -> Serving:
        """Return how the server was started.

        Raises:
            SettingsError: It was not, or the folder is no server's.
        """
        if not self.started.is_file():
            raise SettingsError(
                [
                    f"no server was started in {self.path}: `fedloom server start --home {self.path}`"
                ],
                "the command",
            )
        return Serving.read(self.started)
