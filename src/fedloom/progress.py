"""What is told of a run while it is under way, and who is told: plan, rounds, warnings.

Nothing heavy is imported here, so a process that only watches is a small one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedloom.accounting.costs import Cost
from fedloom.intervals import Sample
from fedloom.offences import Offence
from fedloom.presence import NOBODY_YET, Presence
from fedloom.shown import message


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, for whoever watches.

    Attributes:
        headline: One line: who trains what how.
        details: One line: sizes.
        rounds: Rounds in all.
        metric: Name of the metric the run is judged by.
        higher_is_better: Its direction.
        names: What each client is called, where it has a name.
        work: What a round trains beside what the evaluation of the start takes, so that the time of the
            former can be told from that of the latter; 0 where that is not known.
    """

    headline: str
    details: str
    rounds: int
    metric: str
    higher_is_better: bool
    names: Mapping[int, str] = field(default_factory=dict)
    work: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """Held-out metrics of one state: on the global set, and on each client's own.

    Attributes:
        metrics: On the global set.
        clients: On each client's own rows.
        sample: What each row of the global set adds to the headline metric, where the server has a model.
        kept: Whether that goes into the record, as at the start and after the last round.
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
        reason: In words that both operators can act on.
    """

    since: float
    reason: str


@dataclass(frozen=True)
class RoundRecord:
    """What is known about one round.

    Attributes:
        round: From 1; 0 is the evaluation before any training.
        clients: The cohort.
        rejected: Clients left out of the round, and why.
        offences: What clients got wrong in it, in an answer or otherwise; one of each client and kind.
        paused: Clients in quarantine for earlier offences, each with the last round of that.
        weighed: Clients that claimed more examples than one may weigh: claimed, and counted.
        replaced: Clients of the first draw in whose place others were drawn.
        absent: Clients that could not be drawn for it, as they were not there.
        learning_rate: Of the round.
        train: Mean training metrics over the clients' examples; empty for round 0.
        client_train: The same for each client.
        evaluation: Held-out metrics, in rounds that evaluate.
        costs: What the round cost, by client and phase.
        seconds: Wall-clock time of the round, evaluation included.
        details: What else the method shows of it, as plain JSON.
        presence: What is remembered of who was there, for the rounds to come.
    """

    round: int
    clients: tuple[int, ...] = ()
    rejected: Mapping[int, str] = field(default_factory=dict)
    offences: tuple[Offence, ...] = ()
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


class Observer(Protocol):
    """Who watches a run: the terminal, an event file, a test."""

    def client_done(self, round: int, client: int, done: int, of: int) -> None:
        """Client ``client`` has answered, as number ``done`` of ``of`` in this exchange."""
        ...

    def round_done(self, record: RoundRecord) -> None:
        """A round is over and its record is written."""
        ...

    def warning(self, text: str) -> None:
        """Something the user should know, which does not stop the run."""
        ...


class RunObserver(Observer, Protocol):
    """Who watches a whole run; a terminal, for one."""

    def stage(self, text: str) -> None:
        """Something is being prepared."""
        ...

    def begin(self, plan: Plan) -> None:
        """Training is about to start."""
        ...

    def end(self) -> None:
        """The run is over, well or not."""
        ...


class Silent:
    """An observer that shows nothing: the default in Python."""

    def stage(self, text: str) -> None:
        """Show nothing."""

    def begin(self, plan: Plan) -> None:
        """Show nothing."""

    def client_done(self, round: int, client: int, done: int, of: int) -> None:
        """Show nothing."""

    def round_done(self, record: RoundRecord) -> None:
        """Show nothing."""

    def warning(self, text: str) -> None:
        """Print the warning on standard error."""
        print(message(f"fedloom: warning: {text}"), file=sys.stderr)

    def end(self) -> None:
        """Show nothing."""


@dataclass
class Callbacks:
    """Calls functions beside an observer.

    What a function raises ends the run; the rounds until then are saved, and the run can be resumed.

    Attributes:
        observer: Is told of everything.
        on_round: Called with the record of each round, round 0 (the evaluation of the start) included.
        on_evaluation: Called with a round's number and its evaluation, in rounds that evaluate.
    """

    observer: RunObserver
    on_round: Callable[[RoundRecord], object] | None = None
    on_evaluation: Callable[[int, Evaluation], object] | None = None

    def stage(self, text: str) -> None:
        """Tell the observer."""
        self.observer.stage(text)

    def begin(self, plan: Plan) -> None:
        """Tell the observer."""
        self.observer.begin(plan)

    def client_done(self, round: int, client: int, done: int, of: int) -> None:
        """Tell the observer."""
        self.observer.client_done(round, client, done, of)

    def round_done(self, record: RoundRecord) -> None:
        """Tell the observer, and call the functions."""
        self.observer.round_done(record)
        if record.evaluation is not None and self.on_evaluation is not None:
            self.on_evaluation(record.round, record.evaluation)
        if self.on_round is not None:
            self.on_round(record)

    def warning(self, text: str) -> None:
        """Tell the observer."""
        self.observer.warning(text)

    def end(self) -> None:
        """Tell the observer."""
        self.observer.end()
