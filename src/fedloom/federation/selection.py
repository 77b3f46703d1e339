"""Selection: which of the clients that are there take part in a round.

``[selection] name`` says how, by fedloom's own or a class of the user's (``fedloom.selections`` is its
group of entry points). It runs on the server and is told who is there
(:class:`~fedloom.federation.presence.Presence`); clients do not know of it. Those that also use what
single clients tell have files of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import PluginError
from fedloom.federation.flash import Flash, FlashSettings
from fedloom.federation.oort import Oort, OortSettings
from fedloom.federation.power_of_choice import PowerOfChoice, PowerOfChoiceSettings
from fedloom.federation.presence import Presence
from fedloom.federation.selection_contract import Selection as Selection
from fedloom.federation.selection_contract import Told, first, in_proportion
from fedloom.privacy.correlation import Participation
from fedloom.privacy.participations import Participations
from fedloom.randomness import generator
from fedloom.settings.plugins import Choices, undefined
from fedloom.settings.schema import NamedSettings


class UniformSettings(NamedSettings):
    """``[selection] name = "uniform"``: every client that is there is as likely as any other."""

    name: Literal["uniform"] = "uniform"


class Uniform(Selection):
    """Draws uniformly, without replacement.

    Source: McMahan et al. 2017, https://arxiv.org/abs/1602.05629, algorithm 1.
    """

    Settings = UniformSettings

    def draw(self, presence: Presence, size: int, rng: np.random.Generator) -> Sequence[int]:
        """Return ``size`` clients; see :class:`Selection`."""
        there = presence.available
        places = rng.choice(len(there), size=size, replace=False)
        return [there[place] for place in places.tolist()]


class RowsSettings(NamedSettings):
    """``[selection] name = "rows"``: clients with more training rows are drawn more often."""

    name: Literal["rows"] = "rows"


class ByRows(Selection):
    """Draws one client after another, each in proportion to its rows among those that are left.

    Where a method also weights its mean by rows, large clients count twice: in how often they are drawn,
    and in each mean.
    """

    Settings = RowsSettings

    def draw(self, presence: Presence, size: int, rng: np.random.Generator) -> Sequence[int]:
        """Return ``size`` clients; see :class:`Selection`."""
        there = presence.available
        return in_proportion(there, [presence.rows[client] for client in there], size, rng)


class AvailabilitySettings(NamedSettings):
    """``[selection] name = "availability"``: by when they last took part, for those that come and go."""

    name: Literal["availability"] = "availability"
    prefer: Literal["rare", "steady"] = "rare"
    """Whom to draw first: clients whose last answer that counted is longest ago, so that those that are
    seldom there take part when they are ("rare"); or clients that have answered and have neither been
    away nor failed since, so that fewer are lost in a round ("steady")."""


class ByAvailability(Selection):
    """Draws clients in the order of their last answers that counted; those that are alike, uniformly.

    "rare" follows the priority for the least available learners in Abdelmoniem et al. 2023, "REFL:
    Resource-Efficient Federated Learning", https://arxiv.org/abs/2111.01108, with the time since the
    last answer of a client in place of its predicted availability.
    """

    Settings = AvailabilitySettings
    settings: AvailabilitySettings

    def draw(self, presence: Presence, size: int, rng: np.random.Generator) -> Sequence[int]:
        """Return ``size`` clients; see :class:`Selection`."""
        there, last, broken = presence.available, presence.answered_last, presence.interrupted
        if self.settings.prefer == "rare":
            ranks = (last.get(client, 0) for client in there)
        else:
            ranks = (int(client not in last or client in broken) for client in there)
        order = np.fromiter(ranks, np.float64, len(there)) + rng.random(len(there))
        return first(there, order, size)


Coins = Callable[[int, int], NDArray[np.float64]]
"""From a round and a number to as many uniform numbers in [0, 1)."""


class Poisson(Selection):
    """Draws each member by a coin of its own, so that the number of those drawn varies and may be 0.

    It is what accountants assume of a cohort, and is used with ``privacy.unit = "client"`` alone. Coins
    are those of members: a client that is away and drawn is not replaced.

    Attributes:
        rate: q, the probability of each coin, in (0, 1].
    """

    exact = False

    def __init__(self, rate: float, coins: Coins | None = None) -> None:
        """Take the probability, and where secret coins are from (default: coins follow from the seed)."""
        super().__init__(NamedSettings())
        self.rate, self._coins, self._round = rate, coins, 0

    def begin(self, round: int, told: Mapping[int, Told]) -> None:
        """Begin a round; see :class:`Selection`."""
        self._round = round

    def draw(self, presence: Presence, size: int, rng: np.random.Generator) -> Sequence[int]:
        """Return the members whose coin fell and that are there; ``size`` is not looked at.

        Secret coins go by ids, so that a client's does not move with who else is a member.
        """
        members = presence.members
        if self._coins is None:
            coins = rng.random(len(members))
        else:
            coins = self._coins(self._round, 1 + max(members, default=0))[list(members)]
        drawn = zip(members, coins, strict=True)
        there = set(presence.available)
        return [client for client, coin in drawn if coin < self.rate and client in there]


class Separated(Selection):
    """Draws clients so that each takes part in few rounds, and those are apart.

    It is what accountants assume of noise that is correlated over rounds, and is used with
    ``privacy.unit = "client"`` alone. Whoever is drawn takes part, also if no answer comes. Those that
    took part in the fewest rounds come first; those that are alike, uniformly. Where fewer can be drawn
    than are asked for, there may be nobody.

    Accounting hides a client's changes, and so these may not change who else is drawn: a client that is
    suspended for its answers is drawn as if it were there, gives no answer and is not replaced, and the
    numbers that decide between clients that are alike go by their ids, not by their places.
    """

    exact = False

    def __init__(self, bounds: Participation) -> None:
        """Take the bounds."""
        super().__init__(NamedSettings())
        self._taken, self._round = Participations(bounds), 0

    def begin(self, round: int, told: Mapping[int, Told]) -> None:
        """Begin a round; see :class:`Selection`."""
        self._round = round

    def draw(self, presence: Presence, size: int, rng: np.random.Generator) -> Sequence[int]:
        """Return the available ones of at most ``size`` clients that are drawn; see the class."""
        suspended = presence.suspended.keys() - presence.unreachable
        free = [
            client
            for client in sorted({*presence.available, *suspended})
            if self._taken.may(client, self._round)
        ]
        numbers = rng.random(1 + max(presence.members, default=0))
        keys = [self._taken.times(client) + numbers[client] for client in free]
        drawn = first(free, np.array(keys, np.float64), size)
        self._taken.take(drawn, self._round)
        return [client for client in drawn if client not in suspended]

    def saved(self) -> dict[str, Any]:
        """Return how often and when each client was drawn, as plain JSON."""
        return self._taken.saved()

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take what :meth:`saved` returned."""
        self._taken.restore(saved)


def _lacks(kind: type[Selection]) -> list[str]:
    return undefined(kind, ("draw",), Selection)


SELECTIONS: Choices[Selection] = Choices(
    "fedloom.selections",
    {
        "uniform": (UniformSettings, Uniform),
        "rows": (RowsSettings, ByRows),
        "availability": (AvailabilitySettings, ByAvailability),
        "power_of_choice": (PowerOfChoiceSettings, PowerOfChoice),
        "oort": (OortSettings, Oort),
        "flash": (FlashSettings, Flash),
    },
    Selection,
    _lacks,
)
"""Name in ``[selection]`` to its settings and its class."""

DEFAULT = "uniform"


def make_selection(settings: NamedSettings) -> Selection:
    """Return the selection that settings of ``[selection]`` describe.

    Raises:
        PluginError: Its class, which is not fedloom's, does not take them.
    """
    kind = SELECTIONS[settings.name][1]
    try:
        return kind(settings)
    except TypeError as error:
        raise PluginError(
            f"selection {settings.name}: {error}: it must define __init__(self, settings), which gets "
            "its settings and nothing else"
        ) from error


def draw(
    selection: Selection,
    presence: Presence,
    size: int,
    seed: int,
    round: int,
    purpose: str = "cohort",
) -> tuple[int, ...]:
    """Return the clients that a selection draws from those that are there, ascending.

    Args:
        selection: How.
        presence: At the start of the round.
        size: Number of clients; all are drawn where fewer are there. What is not ``exact`` is told it as
            it is, and may draw others.
        seed: The experiment's.
        round: From 1.
        purpose: Of the draw, for its seed.

    Raises:
        PluginError: A class that is not fedloom's returned something else than that many of them.
    """
    if selection.exact:
        size = min(size, len(presence.available))
    drawn = selection.draw(presence, size, generator(seed, purpose, round=round))
    count = size if selection.exact else None
    return _available("draw", selection, drawn, presence, count)


def draw_candidates(
    selection: Selection, presence: Presence, size: int, seed: int, round: int
) -> tuple[int, ...]:
    """Return the clients that are asked before a draw, ascending; see :func:`draw`.

    Raises:
        PluginError: A class that is not fedloom's returned something else than some of those there.
    """
    size = min(size, len(presence.available))
    found = selection.candidates(presence, size, generator(seed, "candidates", round=round))
    return _available("candidates", selection, found, presence)


def _available(
    what: str,
    selection: Selection,
    returned: Sequence[int],
    presence: Presence,
    count: int | None = None,
) -> tuple[int, ...]:
    """Return clients ascending, checked to be there, and so many if a count is given."""
    try:
        clients = tuple(sorted({int(client) for client in returned}))
        sound = presence.are_available(clients) and count in (None, len(clients))
    except (TypeError, ValueError):
        clients, sound = (), False
    if not sound:
        raise PluginError(
            f"{type(selection).__name__}.{what} returned {returned!r:.200}: it must return "
            f"{'some' if count is None else count} different clients of presence.available"
        )
    return clients
