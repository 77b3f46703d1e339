"""The client's own file: its rows, its models, its limits and its policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fedloom.data.examples import Kind
from fedloom.data.sources import CLIENTS as ELSEWHERE
from fedloom.data.sources import DataSettings
from fedloom.deployment.policy import PolicySettings
from fedloom.errors import SettingsError
from fedloom.settings.schema import Settings, parse
from fedloom.settings.suggestions import nearest
from fedloom.settings.toml import read_toml


class OwnData(DataSettings):
    """``[data]`` of a client's file: its rows and how they are read; no server can change it."""

    share: Literal["own", "experiment"] = "own"
    """own: all these rows belong to this client. experiment: they are the rows of all clients, of which
    this client takes its part of the experiment's partition: for built-in rows and for tests."""

    @property
    def is_whole(self) -> bool:
        """Whether all rows belong to this client, and none is in a global held-out set."""
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
                f'data.source = {self.source!r} belongs to no client: data.share = "experiment"'
            )
        for name in ("test_source", "test_split", "test_kind"):
            if getattr(self, name) is not None:
                found.append(
                    f'data.{name} is set by the coordinator, unless data.share = "experiment"'
                )
        return found


class OwnPublic(Settings):
    """``[public]`` of a client's file: rows that all parties have, and their path here."""

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
    """Path of the experiment's model on this machine."""
    revision: str | None = None
    """Of a Hub name, its branch, tag or commit."""


class OwnTraining(Settings):
    """``[training]`` of a client's file: compute settings of this machine."""

    device: str | None = None
    """As training.device of an experiment."""
    threads: int | None = Field(default=None, ge=1)
    """As training.threads of an experiment."""


class OwnWorker(Settings):
    """``[worker]`` of a client's file: the process that keeps model and rows in memory."""

    idle: float = Field(default=3600, gt=0)
    """Seconds without a message after which it ends; the next message starts it again."""
    secret_noise: bool = True
    """Whether noise that hides rows (method.embedding_noise, method.activation_noise) is drawn from this
    client's key, so that the server cannot remove it; false: from the experiment's seed, which gives the
    same bits as a simulation."""


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
    """The client's file, which stays on its machine and precedes the experiment."""

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
        if isinstance(parts.get("policy"), PolicySettings):
            problems += parts["policy"].privacy.contradictions()
        if problems:
            raise SettingsError(problems, str(path))
        return cls(**_beside(parts, path.resolve().parent))


def _beside(parts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a file's sections with relative paths made absolute, relative to the file's folder."""

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
    if (data := everything.get("data")) is not None and data.benchmarks:
        everything["data"] = placed(data, "benchmarks", every(data.benchmarks))
    if (data := everything.get("data")) is not None and data.domains:
        domains = {n: placed(own, "source", every(own.source)) for n, own in data.domains.items()}
        everything["data"] = placed(data, "domains", domains)
    if (model := parts.get("model")) is not None:
        everything["model"] = placed(model, "path", found(model.path))
    return everything
