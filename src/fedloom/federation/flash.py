"""FLASH, a reconstruction: a linear bandit scores clients by what they told; the best take part.

Source: Chang et al. 2024, "FLASH: Federated Learning Across Simultaneous Heterogeneities",
https://arxiv.org/abs/2402.08769. Its abstract says that a contextual multi-armed bandit scores clients
under label noise, skewed data and latency at once; contexts, reward and posterior were found nowhere.
Here: LinUCB (Li et al. 2010) with the context

    x = [1, its loss / the largest known, its last relative drop, n_k / the largest n,
         its seconds / the longest known, rounds since it took part / this round],  each in [-1, 1]

and for a client that took part the reward

    r = (loss before - loss while it trained) / loss before / max(1, seconds / median of seconds).

The drop is relative, since clients whose labels are noise keep a large loss and would win by an absolute
one; what a client says of it can be false, within -1 and 1. How near its change is to the mean of all is
left out of the context: not every method sends changes, and the server would have to hold all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fedloom.aggregation.client_scores import LinearBandit, bounded
from fedloom.federation.informed_selection import (
    InformedSelection,
    InformedSettings,
    Known,
    relative_drop,
)
from fedloom.federation.presence import Presence
from fedloom.federation.selection_contract import Observation

FEATURES = 6
"""m, numbers of a context."""


class FlashSettings(InformedSettings):
    """``[selection] name = "flash"``: a linear bandit scores clients by what they told."""

    name: Literal["flash"] = "flash"
    ridge: float = Field(default=1, gt=0)
    """Lambda, the weight of the bandit's prior that all rewards are 0."""
    width: float = Field(default=0.5, ge=0)
    """C, how much the uncertainty about a client's reward adds to its score; 0: none is added."""
    speed: bool = True
    """Whether times count: those of [simulation.devices], or as measured between machines. In one
    process without devices no times are known, and none count."""


class Flash(InformedSelection):
    """Draws clients that were never drawn first, then those with the largest upper bounds.

    Of clients that were drawn and never answered, one a round is tried again.

    Attributes:
        bandit: What rewards have taught.
    """

    Settings = FlashSettings
    settings: FlashSettings

    def __init__(self, settings: FlashSettings) -> None:
        """Begin without any reward."""
        super().__init__(settings)
        self.bandit = LinearBandit.begun(FEATURES, settings.ridge)

    def draw(self, presence: Presence, size: int, rng: np.random.Generator) -> Sequence[int]:
        """Return ``size`` clients; see :class:`Selection`. Ties are broken by ``rng``."""
        there = presence.available
        order = rng.permutation(len(there)).tolist()
        shuffled = [there[place] for place in order]
        new = [client for client in shuffled if client not in self.known][:size]
        old = [client for client in shuffled if self._took_part(client)]
        silent = [c for c in shuffled if c in self.known and not self._took_part(c)]
        left = size - len(new)
        retried = silent[: max(left - len(old), min(1, left - 1), 0)]
        contexts = self.contexts({client: self.known[client] for client in old})
        bounds = self.bandit.upper_bounds(contexts, self.settings.width)
        best = np.argsort([-own for own in bounds], kind="stable").tolist()
        scored = [old[place] for place in best[: left - len(retried)]]
        found = self.drawn(new, "never drawn before") + self.drawn(scored, "its score")
        return found + self.drawn(retried, "tried again, as it never answered")

    def contexts(self, clients: Mapping[int, Known]) -> list[list[float]]:
        """Return the context of each client, :data:`FEATURES` numbers from -1 to 1."""
        every = [*self.known.values(), *clients.values()]
        most_times = self.settings.largest
        losses = bounded([abs(own.loss) for own in every if own.loss is not None], most_times)
        times = bounded([own.seconds for own in every if own.seconds is not None], most_times)
        largest, longest = (max(values, default=0.0) or 1.0 for values in (losses, times))
        most = max((own.rows for own in every), default=0) or 1
        found = []
        for own in clients.values():
            seconds = (own.seconds or 0.0) / longest if self.settings.speed else 0.0
            age = (self.round - own.last) / self.round
            context = [1.0, (own.loss or 0.0) / largest, own.drop, own.rows / most, seconds, age]
            found.append([min(1.0, max(-1.0, value)) for value in context])
        return found

    def observe(self, round: int, observed: Mapping[int, Observation]) -> None:
        """Teach the bandit each client's reward in its context, with what it told before it trained."""
        self.round = round
        for client, own in observed.items():
            if own.answered:
                before = self._before(client, own)
                reward = relative_drop(self.known.get(client, Known()), own) / self._slow(own)
                self.bandit = self.bandit.observed(self.contexts({client: before})[0], reward)
        super().observe(round, observed)

    def saved(self) -> dict[str, Any]:
        """Return what is known, M and b."""
        own = self.bandit
        return {**super().saved(), "matrix": own.matrix.tolist(), "vector": own.vector.tolist()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take what :meth:`saved` returned."""
        super().restore(saved)
        self.bandit = LinearBandit(np.asarray(saved["matrix"]), np.asarray(saved["vector"]))

    def _took_part(self, client: int) -> bool:
        return client in self.known and self.known[client].count > 0

    def _before(self, client: int, own: Observation) -> Known:
        """Return what was known of a client before it trained, with what it told then."""
        known = self.known.get(client, Known())
        loss = own.before.loss if own.before is not None else known.loss
        seconds = own.seconds if known.seconds is None else known.seconds
        return replace(known, rows=own.rows, loss=loss, seconds=seconds)

    def _slow(self, own: Observation) -> float:
        """Return max(1, seconds / median of the seconds known)."""
        every = [one.seconds for one in self.known.values() if one.seconds]
        if not self.settings.speed or own.seconds is None or not every:
            return 1.0
        return max(1.0, own.seconds / float(np.median(every)))
