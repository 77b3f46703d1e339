"""In which rounds each client took part, beside the bounds that accounting relies on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fedloom.errors import PrivacyError
from fedloom.privacy.correlation import Participation


class Participations:
    """How often each client took part, and when it did last."""

    def __init__(self, bounds: Participation) -> None:
        """Begin with nobody."""
        self.bounds = bounds
        self._times: dict[int, int] = {}
        self._last: dict[int, int] = {}

    def times(self, client: int) -> int:
        """Return in how many rounds a client took part."""
        return self._times.get(client, 0)

    def may(self, client: int, round: int) -> bool:
        """Return whether a client may take part in a round that follows all of its rounds."""
        apart = round - self._last.get(client, round - self.bounds.separation)
        return self.times(client) < self.bounds.most and apart >= self.bounds.separation

    def take(self, clients: Collection[int], round: int) -> None:
        """Note that clients take part in a round.

        Raises:
            PrivacyError: One of them may not, or is named twice; nothing is noted.
        """
        wrong = [client for client in sorted(clients) if not self.may(client, round)]
        if wrong or len(set(clients)) < len(clients):
            raise PrivacyError(
                f"round {round}: clients {wrong or sorted(clients)} would take part more often than "
                f"epsilon is computed for: in {self.bounds.most} rounds at most, "
                f"{self.bounds.separation} or more apart, once in each. Nothing of the round is "
                "released; a plugin that draws clients or carries answers has to keep to the cohort"
            )
        for client in clients:
            self._times[client] = self.times(client) + 1
            self._last[client] = round

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as plain JSON."""
        return {
            "times": {str(client): n for client, n in sorted(self._times.items())},
            "last": {str(client): round for client, round in sorted(self._last.items())},
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take what :meth:`saved` returned."""
        self._times = {int(client): int(n) for client, n in saved["times"].items()}
        self._last = {int(client): int(round) for client, round in saved["last"].items()}
