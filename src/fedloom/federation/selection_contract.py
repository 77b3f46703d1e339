"""What a selection is: who takes part in a round, and what it learns from what clients tell.

It runs on the server. Most selections know who is there and nothing else. Those that are *informed* also
use what single clients tell: the loss of their rows, and how long their work took. They are told after
each round (:meth:`Selection.observe`), may have clients asked before it (:class:`Told`), and what they
keep is named by client id and lies in the checkpoints (:meth:`Selection.saved`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedloom.federation.presence import Presence
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings

DETAILS = "selection"
"""Key of the rounds' details under which stands why clients were drawn."""


@dataclass(frozen=True)
class Told:
    """What a client told of some of its rows, under the model that it would use in this round.

    Attributes:
        loss: Their mean loss, weighted as its training weighs them.
        root_mean_square: sqrt(mean of loss_i^2) over them, at least 0.
    """

    loss: float
    root_mean_square: float

    @classmethod
    def of(cls, numbers: Mapping[str, float]) -> Told:
        """Return what the numbers of a client's answer say."""
        return cls(numbers["loss"], numbers["root_mean_square"])


@dataclass(frozen=True)
class Observation:
    """What is known of a client that was drawn, once the round is over.

    Attributes:
        answered: Whether its answer counted.
        rows: Its training rows.
        before: What it told of its rows before it trained, where it was asked and answered.
        loss: The mean loss of its training, where it reported one.
        seconds: How long it took, in all exchanges of the round; ``None`` where that is not known.
    """

    answered: bool
    rows: int
    before: Told | None = None
    loss: float | None = None
    seconds: float | None = None


class Selection:
    """Draws the clients of a round.

    What it may depend on beside its settings are the presence and, if it is informed, what it was told;
    checkpoints save both, so a resumed run draws the same.

    Attributes:
        informed: Whether it depends on what single clients tell. Where the server may see no single
            answer, such a selection is refused.
        exact: Whether as many are drawn as are asked for, where so many are there.
        sections: What a report shows of it, from the rounds' details.
        settings: Instance of :attr:`Settings`.
        reasons: Why each client that was drawn last was, by id.
    """

    Settings: ClassVar[type[NamedSettings]] = NamedSettings
    informed: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    sections: ClassVar[tuple[SectionSpec, ...]] = ()

    def __init__(self, settings: NamedSettings) -> None:
        """Take the settings, an instance of :attr:`Settings`."""
        self.settings = settings
        self.reasons: dict[int, str] = {}

    @property
    def asks(self) -> Literal["candidates", "drawn"] | None:
        """Who is asked what its rows lose: candidates before the draw, or those drawn, after it."""
        return None

    @property
    def rows(self) -> int:
        """Most rows of a client whose losses are asked for."""
        return 64

    def candidates(self, presence: Presence, size: int, rng: np.random.Generator) -> Sequence[int]:
        """Return who is asked before a draw of ``size`` clients; nobody here."""
        return ()

    def begin(self, round: int, told: Mapping[int, Told]) -> None:
        """Begin a round, before its draws.

        Args:
            round: From 1.
            told: What candidates told, by id; those that were not asked or gave no answer are not in it.
        """

    def draw(self, presence: Presence, size: int, rng: np.random.Generator) -> Sequence[int]:
        """Return ``size`` different clients of ``presence.available``, in any order.

        Args:
            presence: At the start of the round; ``available`` is ascending, and ``rows`` and
                ``answered_last`` are mappings by client id.
            size: Number of clients, from 1 to the number of those available; for what is not ``exact``
                as many as are asked for, however few are there.
            rng: The only source of randomness: its seed is of the experiment, the purpose and the round.
        """
        raise NotImplementedError

    def observe(self, round: int, observed: Mapping[int, Observation]) -> None:
        """Take what is known of the clients of a round, by id ascending, once it is over."""

    def saved(self) -> dict[str, Any]:
        """Return what must outlive the process, as plain JSON."""
        return {}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take what :meth:`saved` returned."""

    def details(self, round: int, observed: Mapping[int, Observation]) -> dict[str, Any]:
        """Return what the round's details say about its draw, as plain JSON; nothing here."""
        return {}


def first(there: Sequence[int], keys: NDArray[np.float64], size: int) -> list[int]:
    """Return the ``size`` clients with the smallest keys."""
    return [there[place] for place in np.argsort(keys, kind="stable")[:size].tolist()]


def in_proportion(
    there: Sequence[int], weights: Sequence[float], size: int, rng: np.random.Generator
) -> list[int]:
    """Return clients drawn one after another, each in proportion to its weight among those left.

    Drawn by the keys of Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir",
    https://doi.org/10.1016/j.ipl.2005.11.003.

    Args:
        there: Clients.
        weights: Of each, above 0.
        size: How many, at most all.
        rng: The source of randomness.
    """
    return first(there, rng.standard_exponential(len(there)) / np.asarray(weights), size)


def by_size(values: Sequence[float], rng: np.random.Generator) -> list[int]:
    """Return the places of values, largest first; those that are equal in an order that ``rng`` draws."""
    ties = rng.random(len(values))
    return sorted(range(len(values)), key=lambda place: (-values[place], ties[place]))
