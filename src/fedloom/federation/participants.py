"""``[federation]`` and ``[clients]``: who takes part, how often, and groups of clients."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fedloom.settings.schema import Of, Settings


class ClientGroup(Settings):
    """``[clients.groups.NAME]``: clients that compute with something else than the others."""

    clients: list[int] = Field(min_length=1)
    """Their ids."""
    model: str | None = None
    """Their backbone (default: model.path)."""
    rank: int | None = Field(default=None, ge=1)
    """Their LoRA rank (default: adapter.rank)."""


class ClientsSettings(Settings):
    """``[clients]``: what clients differ in beside their data."""

    groups: dict[str, ClientGroup] = {}
    """Groups by name; clients in none have what [model] and [adapter] say."""
    newcomers: list[int] = []
    """Clients that join when training is over: given what is shared, they make newcomer_steps on their
    own rows and are judged before and after."""
    newcomer_steps: Annotated[int, Of("joins", (True,), "clients.newcomers names nobody")] = Field(
        default=20, ge=1
    )
    """Optimizer steps that each of them makes."""

    def contradictions(self, clients: int) -> list[str]:
        """Return what in these settings cannot both be meant."""
        found = [
            f"clients.newcomers: there is no client {client} (0 to {clients - 1})"
            for client in self.newcomers
            if not 0 <= client < clients
        ]
        if len(set(self.newcomers)) >= clients:
            found.append("clients.newcomers: nobody is left to train")
        homes: dict[int, str] = {}
        for name, group in self.groups.items():
            for client in group.clients:
                if not 0 <= client < clients:
                    found.append(
                        f"clients.groups.{name}: there is no client {client} (0 to {clients - 1})"
                    )
                if client in homes:
                    found.append(
                        f"clients.groups: client {client} is in {homes[client]} and in {name}"
                    )
                homes[client] = name
        return found


class FederationSettings(Settings):
    """``[federation]``: who takes part, and how often."""

    rounds: int = Field(default=10, ge=1)
    """Rounds in all."""
    clients: int = Field(default=8, ge=1)
    """Clients there are (between machines by default the members that are let in)."""
    members: list[str] | None = None
    """Between machines, names of the members that take part, in the order of their clients' numbers
    (default: all that are let in, by number). Clients are not told."""
    require: Literal["all"] | int | float = "all"
    """Between machines, clients without which a run does not begin: all, a number, or a share."""
    clients_per_round: int | None = Field(default=None, ge=1)
    """Clients drawn for each round (default: all)."""
    seed: int = Field(default=0, ge=0)
    """All randomness comes from it, the purpose, the client and the round."""
    quorum: float = Field(default=0.5, gt=0, le=1)
    """Share of a round's clients that must give a usable answer; below it the run stops."""
    replacements: int = Field(default=0, ge=0)
    """Clients that are drawn at most in place of those who gave no usable answer to a round's first
    question."""
    deadline: float = Field(default=43_200, gt=0)
    """Seconds that a client on another machine has to answer (default: twelve hours, as long as a message
    of Flower's lives); who is later is left out of the round."""
    streams: bool = True
    """Whether clients on other machines may keep a stream open; without one each exchange is a message
    of Flower's, which takes some seconds."""
    reconnect: float = Field(default=10, ge=0)
    """Seconds that a client whose stream breaks in the middle of an exchange has to come back; it goes
    on where it was then, and is left out of the round otherwise."""
    patience: float = Field(default=600, gt=0)
    """Seconds that a run waits for all of its clients on other machines when it begins, and a round for a
    quorum of them."""

    @field_validator("require", mode="before")
    @classmethod
    def _all_number_or_share(cls, value: object) -> object:
        whole = type(value) is int and value >= 1
        if value == "all" or whole or (type(value) is float and 0 < value <= 1):
            return value
        raise ValueError('must be "all", a whole number of at least 1, or a share in (0, 1]')

    @property
    def required(self) -> int:
        """Clients without which a run between machines does not begin."""
        if self.require == "all":
            return self.clients
        if isinstance(self.require, int):
            return min(self.require, self.clients)
        return max(1, math.ceil(self.require * self.clients))

    def contradictions(self) -> list[str]:
        """Return what in these settings cannot both be meant."""
        found = []
        if isinstance(self.require, int) and self.require > self.clients:
            found.append(
                f"federation.require = {self.require}, but there are federation.clients = {self.clients}"
            )
        if self.members is not None and len(set(self.members)) < len(self.members):
            found.append("federation.members names somebody twice")
        return found

    @property
    def cohort_size(self) -> int:
        """Clients drawn for each round."""
        return self.clients_per_round or self.clients
