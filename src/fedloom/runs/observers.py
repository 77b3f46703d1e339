"""The plan of a run, and observers of a whole run.

Nothing heavy is imported here, so a process that only watches is a small one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fedloom.display.untrusted_text import message
from fedloom.federation.records import Evaluation, Observer, RoundRecord
from fedloom.runs.progress import RoundWork


@dataclass(frozen=True)
class Plan:
    """The plan of a run, for observers.

    Attributes:
        headline: One line: who trains what how.
        details: One line: sizes.
        rounds: Rounds in all.
        metric: Name of the metric the run is judged by.
        higher_is_better: Its direction.
        names: What each client is called, where it has a name.
        work: What a round trains beside what the evaluation of the start takes, so that the time of the
            former can be told from that of the latter; 0 where that is not known.
        ahead: What each round does, that of the start first, as far as it is known.
        folder: Of the run, where it is known.
        withheld: Whether observers are not told who takes part, and may not show what rounds take.
    """

    headline: str
    details: str
    rounds: int
    metric: str
    higher_is_better: bool
    names: Mapping[int, str] = field(default_factory=dict)
    work: float = 0.0
    ahead: tuple[RoundWork, ...] = ()
    folder: str = ""
    withheld: bool = False


class RunObserver(Observer, Protocol):
    """Observer of a whole run, such as a terminal."""

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
        observer: Receives every call.
        on_round: Called with the record of each round, round 0 (the evaluation of the start) included.
        on_evaluation: Called with a round's number and its evaluation, in rounds that evaluate.
    """

    observer: RunObserver
    on_round: Callable[[RoundRecord], object] | None = None
    on_evaluation: Callable[[int, Evaluation], object] | None = None

    def stage(self, text: str) -> None:
        """Notify the observer."""
        self.observer.stage(text)

    def begin(self, plan: Plan) -> None:
        """Notify the observer."""
        self.observer.begin(plan)

    def client_done(self, round: int, client: int, done: int, of: int) -> None:
        """Notify the observer."""
        self.observer.client_done(round, client, done, of)

    def round_done(self, record: RoundRecord) -> None:
        """Notify the observer, and call the functions."""
        self.observer.round_done(record)
        if record.evaluation is not None and self.on_evaluation is not None:
            self.on_evaluation(record.round, record.evaluation)
        if self.on_round is not None:
            self.on_round(record)

    def warning(self, text: str) -> None:
        """Notify the observer."""
        self.observer.warning(text)

    def end(self) -> None:
        """Notify the observer."""
        self.observer.end()
