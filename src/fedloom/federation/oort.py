"""Oort: clients with large losses that are fast are drawn again, and new ones are tried out.

Source: Lai et al. 2021, "Oort: Efficient Federated Learning via Guided Participant Selection",
https://arxiv.org/abs/2010.06081; constants as in the published code (SymbioticLab/Oort). Other than
there: a row's loss is its own and not the mean of its batch, under the model before its training; the
clip bounds the normalised utility as well; new clients are drawn by rows among all and not the largest;
places for which too few new clients are there go to known ones. With the published default durations
never count (``round_threshold`` 101); here ``percentile`` sets where they begin to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fedloom.aggregation.client_scores import (
    bounded,
    normalised,
    paced,
    preferred_seconds,
    slow_factor,
    staleness_bonus,
    utility,
)
from fedloom.federation.informed_selection import InformedSelection, InformedSettings
from fedloom.federation.presence import Presence
from fedloom.federation.selection_contract import Observation, by_size, in_proportion

LEAST_SCORE = 1e-9
"""Weight of a client whose score is 0, so that it can be drawn."""


class OortSettings(InformedSettings):
    """``[selection] name = "oort"``: those with large losses that are fast, and new ones."""

    name: Literal["oort"] = "oort"
    explore: float = Field(default=0.9, ge=0, le=1)
    """Share of a round's places for clients that have not taken part, before the first round."""
    explore_decay: float = Field(default=0.95, gt=0, le=1)
    """What that share is multiplied by in every round."""
    explore_least: float = Field(default=0.2, ge=0, le=1)
    """The least that it becomes."""
    cut_off: float = Field(default=0.7, ge=0, le=1)
    """Known clients are drawn in proportion to their scores among those whose score is at least this
    share of the best ones'."""
    speed: bool = True
    """Whether times count: those of [simulation.devices], or as measured between machines. In one
    process without devices no times are known, and none count."""
    percentile: float = Field(default=80, ge=0, le=100)
    """Percentile of the known durations above which a client counts as slow, at first; 100: none does."""
    penalty: float = Field(default=2, ge=0)
    """Exponent of (T / its seconds), by which the score of a slow client is multiplied."""
    pace_rounds: int = Field(default=20, ge=1)
    """Rounds after which the percentile rises where the utility of those drawn for it has stalled."""
    pace_step: float = Field(default=5, ge=0, le=100)
    """Points that it rises by."""


class Oort(InformedSelection):
    """Draws known clients by their scores and new ones by their rows.

    Attributes:
        percentile: Of durations, above which clients count as slow now.
        gained: Mean utility of known clients that were drawn and answered, of each round.
    """

    Settings = OortSettings
    settings: OortSettings

    def __init__(self, settings: OortSettings) -> None:
        """Begin with the settings' percentile."""
        super().__init__(settings)
        self.percentile, self.gained = settings.percentile, list[float]()

    def draw(self, presence: Presence, size: int, rng: np.random.Generator) -> Sequence[int]:
        """Return ``size`` clients; see :class:`Selection`."""
        own = self.settings
        there = presence.available
        known = [client for client in there if self._utility_known(client)]
        tried = {*known}
        new = [client for client in there if client not in tried]
        share = max(own.explore_least, own.explore * own.explore_decay**self.round)
        exploited = min(int(size * (1 - share)), len(known))
        explored = min(size - exploited, len(new))
        best = self._best(known, size - explored, rng)
        weights = [presence.rows[client] * self._slow(client) for client in new]
        tried_out = in_proportion(new, weights, explored, rng)
        return self.drawn(best, "its score") + self.drawn(tried_out, "tried out")

    def observe(self, round: int, observed: Mapping[int, Observation]) -> None:
        """Keep what is known, and the pace."""
        super().observe(round, observed)
        again = [
            client
            for client, own in observed.items()
            if own.answered and self.reasons.get(client) == "its score"
        ]
        every = [client for client in self.known if self._utility_known(client)]
        gained = dict(zip(every, self.utilities(every), strict=True))
        values = [gained.get(client, 0.0) for client in again]
        self.gained.append(sum(values) / len(values) if values else 0.0)
        own = self.settings
        self.percentile = paced(self.percentile, self.gained, own.pace_rounds, own.pace_step)

    def utilities(self, clients: Sequence[int]) -> list[float]:
        """Return the statistical utility of some known clients, each with its loss bounded."""
        told = [self.known[client].root_mean_square or 0.0 for client in clients]
        limited = bounded(told, self.settings.largest)
        return [
            utility(self.known[client].rows, value)
            for client, value in zip(clients, limited, strict=True)
        ]

    def scores(self, clients: Sequence[int]) -> list[float]:
        """Return the scores of some known clients in this round."""
        if not clients:
            return []
        return [
            (value + staleness_bonus(self.round, self.known[client].last)) * self._slow(client)
            for client, value in zip(clients, normalised(self.utilities(clients)), strict=True)
        ]

    def saved(self) -> dict[str, Any]:
        """Return what is known and the pace."""
        return {**super().saved(), "percentile": self.percentile, "gained": list(self.gained)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take what :meth:`saved` returned."""
        super().restore(saved)
        self.percentile, self.gained = float(saved["percentile"]), list(saved["gained"])

    def _utility_known(self, client: int) -> bool:
        own = self.known.get(client)
        return own is not None and own.last > 0 and own.root_mean_square is not None

    def _best(self, known: Sequence[int], size: int, rng: np.random.Generator) -> list[int]:
        """Return known clients, drawn in proportion to their scores among the best."""
        scores = dict(zip(known, self.scores(known), strict=True))
        order = by_size([scores[client] for client in known], rng)
        ordered = [known[place] for place in order]
        if size >= len(ordered):
            return ordered
        least = self.settings.cut_off * scores[ordered[size]]
        among = [client for client in ordered if scores[client] >= least]
        weights = [max(LEAST_SCORE, scores[client]) for client in among]
        return in_proportion(among, weights, size, rng)

    def _slow(self, client: int) -> float:
        own = self.known.get(client)
        if not self.settings.speed or own is None or not own.seconds:
            return 1.0
        every = [one.seconds for one in self.known.values() if one.seconds]
        preferred = preferred_seconds(every, self.percentile)
        return slow_factor(own.seconds, preferred, self.settings.penalty)
