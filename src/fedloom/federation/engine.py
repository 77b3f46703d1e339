"""What the loop of rounds needs of whatever carries its exchanges, here or on other machines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedloom.accounting.ledger import Ledger
from fedloom.federation.offences import OffenceObserver, Report
from fedloom.federation.presence import Membership
from fedloom.federation.records import Absence, Participant
from fedloom.security.audit_log import Record, no_op_recorder
from fedloom.tensors import Tensors
from fedloom.wire.messages import Answer, Exchange, Payload


class Engine(Protocol):
    """Where clients run. It sees messages, not algorithms.

    Whatever goes wrong on a client becomes an :class:`Answer` that says so.
    """

    def sizes(self) -> dict[int, int]:
        """Return the training rows of each client that can be asked now."""
        ...

    def membership(self) -> Membership:
        """Return who belongs to the federation, whether it can be asked now or not."""
        ...

    def absent(self) -> dict[int, Absence]:
        """Return the clients that the run expects and that are not there."""
        ...

    def title(self, client: int) -> str:
        """Return what a client is called in messages."""
        ...

    def exchange(self, exchange: Exchange) -> Iterable[Answer]:
        """Carry requests to clients and yield their answers, in any order."""
        ...

    def discard(self, clients: Collection[int]) -> None:
        """Have what these clients put aside over the last exchange not count, as their answers do not."""
        ...

    def finish_round(self) -> None:
        """Let what clients have put aside in this round count."""
        ...


@dataclass(frozen=True)
class RunDescription:
    """What clients elsewhere must know of a run before they are asked anything.

    Attributes:
        run: Tells it from all others; stays when it is resumed.
        experiment: Its TOML.
        classes: Class names in the order of their ids.
        model: SHA-256 of the backbone and tokenizer that all must have.
        began: For each time that the run began or was resumed, the last round finished before.
        audit: Told who joins and who is refused.
        undone: Messages whose answers did not count: client, how many times the run had begun or been
            resumed, number.
        report: Told of offences that are found outside of answers, by any thread.
        warn: Told, in words, who is waited for.
        start: What every client is sent once of what the run starts from; ``None`` where nothing is.
    """

    run: str
    experiment: str
    classes: tuple[str, ...]
    model: str
    began: tuple[int, ...]
    audit: Record = no_op_recorder
    undone: tuple[tuple[int, int, int], ...] = ()
    report: Report = lambda client, kind, reason: None
    warn: Callable[[str], None] = lambda text: None
    start: Tensors | None = None


class RemoteEngine(Engine, Protocol):
    """An engine whose clients are other processes, which must be met before they can be asked."""

    @property
    def name(self) -> str:
        """What ``fedloom run --engine`` calls it."""
        ...

    @property
    def watch(self) -> OffenceObserver:
        """Who is told of offences and quarantine as they come."""
        ...

    @property
    def judged(self) -> Collection[int]:
        """Clients that have held-out rows of their own."""
        ...

    @property
    def participants(self) -> Sequence[Participant]:
        """The members that the run expects, in the order of their clients' numbers."""
        ...

    def held_out(self) -> dict[int, int]:
        """Return the rows that each client which was met is judged by."""
        ...

    def begin(self, run_description: RunDescription, ledger: Ledger) -> None:
        """Meet the clients; their costs go to the ledger.

        Raises:
            RoundFailed: Fewer than are required came in time.
        """
        ...

    def end(self, keep: Payload | None) -> None:
        """Tell clients that the run is over; with ``keep``, what they make their own models of."""
        ...
