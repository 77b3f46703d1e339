"""Power-of-choice: of some candidates, those take part whose rows have the largest loss.

Source: Cho, Wang and Joshi 2020, "Client Selection in Federated Learning: Convergence Analysis and
Power-of-Choice Selection Strategies", https://arxiv.org/abs/2010.01243: pow-d, with a sample of rows
cpow-d, and with the last losses that clients reported rpow-d. The bound on what a false loss can do
(``largest``) is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fedloom.aggregation.client_scores import bounded
from fedloom.federation.informed_selection import InformedSelection, InformedSettings
from fedloom.federation.presence import Presence
from fedloom.federation.selection_contract import Observation, Told, by_size, in_proportion


class PowerOfChoiceSettings(InformedSettings):
    """``[selection] name = "power_of_choice"``: of some candidates, those with the largest losses."""

    name: Literal["power_of_choice"] = "power_of_choice"
    candidates: int | None = Field(default=None, ge=1)
    """d, candidates of a round (default: twice as many as are drawn). As many as are drawn: sampling by
    rows; all clients: those with the largest losses of all."""
    by: Literal["rows", "clients"] = "rows"
    """How candidates are drawn: in proportion to their rows, as in the paper, whose mean then counts
    clients alike; or all alike, which suits methods whose mean is by rows."""


class PowerOfChoice(InformedSelection):
    """Draws d candidates without replacement, and keeps those whose losses are largest."""

    Settings = PowerOfChoiceSettings
    settings: PowerOfChoiceSettings

    def __init__(self, settings: PowerOfChoiceSettings) -> None:
        """Begin without candidates."""
        super().__init__(settings)
        self._told: dict[int, float] = {}
        self._asked: frozenset[int] = frozenset()

    @property
    def asks(self) -> Literal["candidates", "drawn"] | None:
        """Candidates are asked, unless the last losses of trainings are what it goes by."""
        return "candidates" if self.settings.losses == "rows" else None

    def candidates(self, presence: Presence, size: int, rng: np.random.Generator) -> Sequence[int]:
        """Return d of those that are there, drawn without replacement."""
        there = presence.available
        count = min(len(there), max(size, self.settings.candidates or 2 * size))
        weights = [presence.rows[c] if self.settings.by == "rows" else 1.0 for c in there]
        self._asked = frozenset(in_proportion(there, weights, count, rng))
        return sorted(self._asked)

    def begin(self, round: int, told: Mapping[int, Told]) -> None:
        """Take what candidates told."""
        super().begin(round, told)
        self._told = {client: own.loss for client, own in told.items()}

    def draw(self, presence: Presence, size: int, rng: np.random.Generator) -> Sequence[int]:
        """Return the candidates with the largest losses, and of others as many as these lack."""
        if self.settings.losses == "training":
            self.candidates(presence, size, rng)
        asked = [client for client in presence.available if client in self._asked]
        losses = self._losses(asked)
        order = by_size(losses, rng)
        chosen = [asked[place] for place in order[:size]]
        found = self.drawn(
            chosen,
            "a large loss" if len(asked) > size else "a candidate",
        )
        others = [c for c in presence.available if c not in self._asked]
        weights = [presence.rows[client] for client in others]
        more = in_proportion(others, weights, size - len(found), rng)
        return found + self.drawn(more, "in place of a candidate")

    def _losses(self, clients: Sequence[int]) -> list[float]:
        """Return the loss of each client; one that did not tell it comes last, one never seen first."""
        unseen = math.inf
        if self.settings.losses == "rows":
            known, unseen = self._told, -math.inf
        else:
            known = {c: own.loss for c, own in self.known.items() if own.loss is not None}
        told = [client for client in clients if client in known]
        most = dict(
            zip(told, bounded([known[c] for c in told], self.settings.largest), strict=True)
        )
        silent = dict.fromkeys(self.known.keys() - most.keys(), -math.inf)
        return [most.get(client, silent.get(client, unseen)) for client in clients]

    def details(self, round: int, observed: Mapping[int, Observation]) -> dict[str, Any]:
        """Return also what candidates told."""
        told = {str(client): loss for client, loss in sorted(self._told.items())}
        return {**super().details(round, observed), "candidates": told}
