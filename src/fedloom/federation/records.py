"""Records of rounds, and the interface of observers.

Nothing heavy is imported here, so a process that only observes stays small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedloom.accounting.costs import Cost
from fedloom.federation.presence import NOBODY_YET, Presence
from fedloom.federation.violations import Violation
from fedloom.statistics.intervals import Sample


@dataclass(frozen=True)
class Evaluation:
    """Held-out metrics of one state: on the global set, and on each client's own.

    Attributes:
        metrics: On the global set.
        clients: On each client's own rows.
        sample: Contribution of each row of the global set to the primary metric, where the server has a
            model.
        kept: Whether the sample goes into the record, as at the start and after the last round.
    """

    metrics: Mapping[str, float]
    clients: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    sample: Sample | None = None
    kept: bool = False


@dataclass(frozen=True)
class Participant:
    """A member of a federation that a run expects.

    Attributes:
        number: The member's.
        name: The member's.
    """

    number: int
    name: str


@dataclass(frozen=True)
class Absence:
    """Why a client that a run expects does not take part.

    Attributes:
        since: When that began, in seconds since 1970.
        reason: Reason, in words that the operators of server and client can act on.
    """

    since: float
    reason: str


@dataclass(frozen=True)
class SimulatedTime:
    """The simulated time of a round, in seconds since the start of the run.

    Attributes:
        begin: When it began: the end of the round before.
        end: When it was over.
        clients: Seconds that each client which was asked took, or after which the server learned of its
            failure.
        staleness: Of each arrival of an asynchronous round, server updates since the client was asked.
        in_flight: Clients still at work when the round was over.
    """

    begin: float
    end: float
    clients: Mapping[int, float] = field(default_factory=dict)
    staleness: Mapping[int, int] = field(default_factory=dict)
    in_flight: int = 0

    def to_record(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {
            "begin": self.begin,
            "end": self.end,
            "seconds": self.end - self.begin,
            "clients": {str(client): seconds for client, seconds in self.clients.items()},
            "staleness": {str(client): age for client, age in self.staleness.items()},
            "in_flight": self.in_flight,
        }


@dataclass(frozen=True)
class ArrivalRecord:
    """Who answered in an asynchronous round between machines; the round can be repeated from it.

    Attributes:
        staleness: Of each client that answered or failed, server updates since it was asked.
        in_flight: Clients still at work when the round was over.
    """

    staleness: Mapping[int, int] = field(default_factory=dict)
    in_flight: int = 0

    def to_record(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        ages = {str(client): age for client, age in self.staleness.items()}
        return {"staleness": ages, "in_flight": self.in_flight}


@dataclass(frozen=True)
class RoundRecord:
    """What is known about one round.

    Attributes:
        round: From 1; 0 is the evaluation before any training.
        clients: The cohort.
        rejected: Clients left out of the round, and why.
        offences: Protocol violations in the round; one entry per client and kind.
        paused: Clients in quarantine for earlier violations, each with its last round there.
        weighed: Clients whose claimed examples exceeded the weight bound: claimed, and counted.
        replaced: Clients of the first draw that were replaced by others.
        absent: Clients that could not be drawn, as they were absent.
        learning_rate: Of the round.
        train: Mean training metrics over the clients' examples; empty for round 0.
        client_train: The same for each client.
        evaluation: Held-out metrics, in rounds that evaluate.
        costs: What the round cost, by client and phase.
        seconds: Wall-clock time of the round, evaluation included.
        details: Further facts from the method, as plain JSON.
        presence: Presence, for the following rounds.
        simulated: Its simulated time, where clients have simulated devices.
        arrivals: Who answered, in an asynchronous round whose order no simulated clock decides.
        wire: Codecs that the experiment does not name, as plain JSON: what was measured and chosen.
    """

    round: int
    clients: tuple[int, ...] = ()
    rejected: Mapping[int, str] = field(default_factory=dict)
    offences: tuple[Violation, ...] = ()
    paused: Mapping[int, int] = field(default_factory=dict)
    weighed: Mapping[int, tuple[float, int]] = field(default_factory=dict)
    replaced: tuple[int, ...] = ()
    absent: Mapping[int, Absence] = field(default_factory=dict)
    learning_rate: float = 0.0
    train: Mapping[str, float] = field(default_factory=dict)
    client_train: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    costs: tuple[Cost, ...] = ()
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    presence: Presence = NOBODY_YET
    simulated: SimulatedTime | None = None
    arrivals: ArrivalRecord | None = None
    wire: Mapping[str, Any] = field(default_factory=dict)


class Observer(Protocol):
    """Observer of a run: the terminal, an event file, a test."""

    def client_done(self, round: int, client: int, done: int, of: int) -> None:
        """Client ``client`` has answered, as number ``done`` of ``of`` in this exchange."""
        ...

    def round_done(self, record: RoundRecord) -> None:
        """A round is over and its record is written."""
        ...

    def warning(self, text: str) -> None:
        """A warning to the user, which does not stop the run."""
        ...
