"""``[federation]`` and ``[clients]``: participation, rounds, and groups of clients."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fedloom.settings.schema import Of, Settings


class ClientGroup(Settings):
    """``[clients.groups.NAME]``: clients with another backbone, rank or rewards than the others."""

    clients: list[int] = Field(min_length=1)
    """Their ids."""
    model: str | None = None
    """Their backbone (default: model.path)."""
    rank: int | None = Field(default=None, ge=1)
    """Their LoRA rank (default: adapter.rank)."""
    rewards: list[str] | None = Field(default=None, min_length=1, max_length=16)
    """What their answers are rewarded for (default: objective.rewards), with equal weights."""


class ClientsSettings(Settings):
    """``[clients]``: differences of clients other than their data."""

    groups: dict[str, ClientGroup] = {}
    """Groups by name; clients in no group use [model] and [adapter]."""
    newcomers: list[int] = []
    """Unseen clients, which take no part in training: after the last round they receive the shared state,
    train newcomer_steps on their own rows, and are evaluated before and after."""
    newcomer_steps: Annotated[int, Of("joins", (True,), "clients.newcomers is empty")] = Field(
        default=20, ge=1
    )
    """Optimizer steps of each unseen client."""

    def contradictions(self, clients: int) -> list[str]:
        """Return the contradictions in these settings, one line each."""
        found = [
            f"clients.newcomers: there is no client {client} (0 to {clients - 1})"
            for client in self.newcomers
            if not 0 <= client < clients
        ]
        if len(set(self.newcomers)) >= clients:
            found.append("clients.newcomers: no client is left to train")
        group_of: dict[int, str] = {}
        for name, group in self.groups.items():
            for client in group.clients:
                if not 0 <= client < clients:
                    found.append(
                        f"clients.groups.{name}: there is no client {client} (0 to {clients - 1})"
                    )
                if client in group_of:
                    found.append(
                        f"clients.groups: client {client} is in {group_of[client]} and in {name}"
                    )
                group_of[client] = name
        return found


class FederationSettings(Settings):
    """``[federation]``: who takes part, and how often."""

    rounds: int = Field(default=10, ge=1)
    """Rounds in all."""
    clients: int = Field(default=8, ge=1)
    """Number of clients (between machines by default that of the allowed members)."""
    members: list[str] | None = None
    """Between machines, names of the members that take part, in the order of their clients' numbers
    (default: all allowed members, by number). It is not sent to clients."""
    require: Literal["all"] | int | float = "all"
    """Between machines, clients that must be ready before a run starts: all, a number, or a share."""
    clients_per_round: int | None = Field(default=None, ge=1)
    """Clients drawn for each round (default: all); with privacy.unit = "client" the number expected."""
    seed: int = Field(default=0, ge=0)
    """Seed; all randomness is derived from it, the purpose, the client and the round."""
    quorum: float = Field(default=0.5, gt=0, le=1)
    """Share of a round's clients that must give a usable answer; below it the run stops."""
    replacements: int = Field(default=0, ge=0)
    """Most replacements drawn for clients that gave no usable answer to the first request of a round."""
    extra: int = Field(default=0, ge=0)
    """Clients drawn for each round beyond clients_per_round; the earliest clients_per_round answers count
    (over-sampling). It needs [simulation.devices]."""
    deadline: float = Field(default=43_200, gt=0)
    """Seconds within which a client on another machine must answer (default: twelve hours, the lifetime
    of a Flower message), or with [simulation.devices] of simulated time; a later client is left out of
    the round."""
    streams: bool = True
    """Whether clients on other machines may keep a stream open; without one each exchange is a Flower
    message, which takes some seconds."""
    reconnect: float = Field(default=10, ge=0)
    """Seconds within which a client must reconnect after its stream breaks in an exchange; the exchange
    then continues where it stopped, otherwise the client is left out of the round."""
    patience: float = Field(default=600, gt=0)
    """Seconds that a run waits at its start for all clients on other machines, and a round for a quorum
    of them."""

    @field_validator("require", mode="before")
    @classmethod
    def _all_number_or_share(cls, value: object) -> object:
        whole = type(value) is int and value >= 1
        if value == "all" or whole or (type(value) is float and 0 < value <= 1):
            return value
        raise ValueError('must be "all", a whole number of at least 1, or a share in (0, 1]')

    @property
    def required(self) -> int:
        """Number of clients that must be ready before a run between machines starts."""
        if self.require == "all":
            return self.clients
        if isinstance(self.require, int):
            return min(self.require, self.clients)
        return max(1, math.ceil(self.require * self.clients))

    def contradictions(self) -> list[str]:
        """Return the contradictions in these settings, one line each."""
        found = []
        if isinstance(self.require, int) and self.require > self.clients:
            found.append(
                f"federation.require = {self.require}, but there are federation.clients = {self.clients}"
            )
        if self.members is not None and len(set(self.members)) < len(self.members):
            found.append("federation.members names a member twice")
        return found

    @property
    def cohort_size(self) -> int:
        """Clients drawn for each round."""
        return self.clients_per_round or self.clients

    @property
    def drawn(self) -> int:
        """Clients drawn for each round, those that are drawn beyond its size included."""
        return self.cohort_size + self.extra

    def participations(self, clients: int) -> float:
        """Return the rounds that each of ``clients`` takes part in on average, T |S| / N."""
        return self.rounds * min(self.cohort_size, clients) / clients
