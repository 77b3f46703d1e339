"""The interface of engines, which carry exchanges to clients in this process or on other machines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedloom.accounting.ledger import Ledger
from fedloom.federation.presence import Membership
from fedloom.federation.records import Absence, Participant
from fedloom.federation.violations import Report, ViolationObserver
from fedloom.security.audit_log import Record, no_op_recorder
from fedloom.tensors import Tensors
from fedloom.wire.envelope import PrivateWork
from fedloom.wire.messages import Answer, Exchange, Payload


class Engine(Protocol):
    """Carries exchanges to clients. It sees messages, not algorithms.

    Whatever goes wrong on a client becomes an :class:`Answer` that says so.
    """

    def sizes(self) -> dict[int, int]:
        """Return the training rows of each client that can be asked now."""
        ...

    def membership(self) -> Membership:
        """Return the clients that belong to the federation, reachable or not."""
        ...

    def absent(self) -> dict[int, Absence]:
        """Return the clients that the run expects and that are absent."""
        ...

    def title(self, client: int) -> str:
        """Return the name of a client in messages."""
        ...

    def signing_keys(self) -> Mapping[int, bytes]:
        """Return the public keys with which clients sign in secure aggregation."""
        ...

    def exchange(self, exchange: Exchange) -> Iterable[Answer]:
        """Carry requests to clients and yield their answers, in any order."""
        ...

    def discard(self, clients: Collection[int]) -> None:
        """Discard what these clients stored in the last exchange, as their answers do not count."""
        ...

    def finish_round(self) -> None:
        """Let what clients stored in this round take effect."""
        ...


@dataclass(frozen=True)
class RunDescription:
    """The description of a run that is sent to clients on other machines before any request.

    Attributes:
        run: Id of the run; stays the same when it is resumed.
        experiment: Its TOML.
        classes: Class names in the order of their ids.
        model: SHA-256 of the backbone and tokenizer that all must have.
        began: For each time that the run began or was resumed, the last round finished before.
        audit: Audit log of clients that register and that are refused.
        discarded: Messages whose answers did not count: client, how many times the run had begun or been
            resumed, number.
        report: Called with violations outside of answers, from any thread.
        warn: Called with a text that names the clients that the run waits for.
        start: Payload with the start of the run, sent once to every client; ``None`` where there is none.
        plugins: By section, SHA-256 of the file of each class that is not fedloom's; all must have it.
        private: Whether clients are to hide rows in their own steps, and must say how.
        summed: Whether their answers are summed under secure aggregation, for which each has a key.
    """

    run: str
    experiment: str
    classes: tuple[str, ...]
    model: str
    began: tuple[int, ...]
    audit: Record = no_op_recorder
    discarded: tuple[tuple[int, int, int], ...] = ()
    report: Report = lambda client, kind, reason: None
    warn: Callable[[str], None] = lambda text: None
    start: Tensors | None = None
    plugins: Mapping[str, str] = field(default_factory=dict)
    private: bool = False
    summed: bool = False


class RemoteEngine(Engine, Protocol):
    """An engine whose clients are other processes, which must register before they can be asked."""

    @property
    def name(self) -> str:
        """Its name for ``fedloom run --engine``."""
        ...

    @property
    def watch(self) -> ViolationObserver:
        """Observer of violations and quarantine."""
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
        """Return the number of held-out rows of each registered client."""
        ...

    def private_work(self) -> dict[int, PrivateWork]:
        """Return what registered clients have said of their private steps."""
        ...

    def begin(self, run_description: RunDescription, ledger: Ledger) -> None:
        """Wait for the clients to register; their costs go to the ledger.

        Raises:
            RoundFailed: Fewer than required registered in time.
        """
        ...

    def submit(self, exchange: Exchange) -> None:
        """Send requests to clients that work at their own pace, and wait for no answer."""
        ...

    def next_answer(self) -> Answer | None:
        """Wait for the next answer to a submitted request; ``None`` where none is awaited."""
        ...

    def end(self, keep: Payload | None) -> None:
        """Tell clients that the run is over; from ``keep`` they build their own models."""
        ...
