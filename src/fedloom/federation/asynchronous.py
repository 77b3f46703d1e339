"""The order of answers in asynchronous rounds between machines, and the same order from records.

Between machines answers are taken as they arrive (:class:`ArrivalsByMachine`), and each round's record
says who answered, and to the request of which round. That is all that the result depends on: a client's
work follows from its request and (seed, client, round of the request), and changes are added in the
order of client ids. So a simulation that is given those records (:class:`RecordedArrivals`) ends with
the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

from fedloom.accounting.ledger import Ledger
from fedloom.display.untrusted_text import named
from fedloom.errors import SettingsError
from fedloom.federation.clock import Assignment, Carry, ClockState, can_reach_quorum, draw_idle
from fedloom.federation.engine import RemoteEngine
from fedloom.federation.participants import FederationSettings
from fedloom.federation.records import ArrivalRecord, SimulatedTime
from fedloom.wire.messages import Answer, Exchange

SETTING = "simulation.replay"


class Arrivals(Protocol):
    """What decides when clients answer and in which order, as the loop of rounds calls it."""

    @property
    def state(self) -> ClockState:
        """What is carried from one round to the next, after the last finished round."""
        ...

    @property
    def seconds(self) -> Mapping[int, float]:
        """Seconds that each client which was asked in this round has taken, where it decides that."""
        ...

    def at(self, state: ClockState) -> Arrivals:
        """Return one that goes on from what was carried."""
        ...

    def begin(self, round: int, reachable: Mapping[int, int]) -> dict[int, int]:
        """Begin a round: return the rows of those of its clients that are there."""
        ...

    def timed(
        self,
        exchange: Exchange,
        answers: Iterable[Answer],
        ledger: Ledger,
        *,
        preliminary: bool = False,
    ) -> Iterable[Answer]:
        """Return the answers to an exchange whose clients all begin now."""
        ...

    def arrivals(self, exchange: Exchange, carry: Carry, ledger: Ledger) -> list[Assignment]:
        """Return the arrivals of a buffered exchange, in the order in which they came."""
        ...

    def close(self) -> SimulatedTime | ArrivalRecord:
        """End a round: note its state for the checkpoint, and return what its record says."""
        ...


@dataclass
class _InOrder:
    """What both orders carry: work of which the answers have not been taken, a round's staleness."""

    federation: FederationSettings
    state: ClockState = field(default_factory=ClockState)
    _staleness: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._in_flight = {own.client: own for own in self.state.in_flight}

    def at(self, state: ClockState) -> Self:
        """Return one that goes on from what was carried."""
        return replace(self, state=state)

    @property
    def seconds(self) -> Mapping[int, float]:
        """Nothing: no simulated clock goes here."""
        return {}

    def begin(self, round: int, reachable: Mapping[int, int]) -> dict[int, int]:
        """Begin a round with all that can be reached."""
        self._staleness = {}
        return dict(reachable)

    def timed(
        self,
        exchange: Exchange,
        answers: Iterable[Answer],
        ledger: Ledger,
        *,
        preliminary: bool = False,
    ) -> Iterable[Answer]:
        """Return the answers as they come."""
        return answers

    def close(self) -> ArrivalRecord:
        """End a round: note its state for the checkpoint, and return its arrivals for the record."""
        pending = tuple(own for _, own in sorted(self._in_flight.items()))
        self.state = ClockState(in_flight=pending)
        return ArrivalRecord(dict(sorted(self._staleness.items())), len(pending))

    def _taken(self, own: Assignment, round: int) -> Assignment:
        self._in_flight.pop(own.client, None)
        self._staleness[own.client] = round - own.round
        return own


@dataclass
class ArrivalsByMachine(_InOrder):
    """Answers in the order in which they reach the server.

    Attributes:
        federation: Seed, cohort size and quorum.
        state: As it was after the last finished round; its work in flight has no answers: a server that
            is started again sends those requests once more.
        engine: Where clients are.
        notify: Called with the client of each answer, as which of how many it came.
    """

    engine: RemoteEngine | None = None
    notify: Callable[[int, int, int, int], object] = lambda round, client, done, of: None

    def __post_init__(self) -> None:
        """Begin where the state says."""
        super().__post_init__()
        self._lost = bool(self._in_flight)

    def arrivals(self, exchange: Exchange, carry: Carry, ledger: Ledger) -> list[Assignment]:
        """Return the earliest answers, also to requests of earlier rounds; see :class:`SimulatedClock`.

        Clients that are free are asked, drawn at random, whenever fewer are at work than the exchange's
        concurrency. A client answers at most once in a round.
        """
        buffered, engine = exchange.buffered, self.engine
        assert buffered is not None and engine is not None
        self._submit_again(exchange, engine)
        found: dict[int, Assignment] = {}
        usable = draws = 0
        while usable < buffered.size and can_reach_quorum(
            self.federation, buffered.size, len(found) - usable
        ):
            free = [c for c in exchange.requests if c not in found and c not in self._in_flight]
            slots = min(buffered.concurrency - len(self._in_flight), len(free))
            if slots > 0:
                drawn = draw_idle(self.federation.seed, exchange.round, draws, free, slots)
                self._submit(exchange, drawn, engine)
                draws += 1
                continue
            answer = engine.next_answer() if self._in_flight else None
            if answer is None:
                break
            if answer.client not in self._in_flight:
                continue  # of a request that was given up
            own = self._taken(
                replace(self._in_flight[answer.client], answer=answer), exchange.round
            )
            usable += answer.error is None
            found[answer.client] = own
            self.notify(exchange.round, answer.client, usable, buffered.size)
        return list(found.values())

    def _submit(self, exchange: Exchange, drawn: list[int], engine: RemoteEngine) -> None:
        asked = {client: exchange.requests[client] for client in drawn}
        coded = exchange.plain is not None
        for client, request in asked.items():
            schema = exchange.schema_of(client) if coded else None
            self._in_flight[client] = Assignment(
                client, exchange.round, 0.0, 0.0, request, Answer(client), schema
            )
        engine.submit(replace(exchange, requests=asked, buffered=None))

    def _submit_again(self, exchange: Exchange, engine: RemoteEngine) -> None:
        """Repeat the requests whose answers a server that was stopped has not taken."""
        if not self._lost:
            return
        self._lost = False
        rounds: dict[int, list[Assignment]] = {}
        for own in self._in_flight.values():
            rounds.setdefault(own.round, []).append(own)
        for round, work in sorted(rounds.items()):
            asked = {own.client: own.request for own in work}
            schemas = {own.client: own.schema for own in work if own.schema is not None}
            again = replace(exchange, round=round, requests=asked, schemas=schemas, buffered=None)
            engine.submit(again)


@dataclass(frozen=True)
class RecordedRound:
    """Who answered in a round: staleness by client, and of those that do not count, why."""

    staleness: Mapping[int, int]
    rejected: Mapping[int, str]


@dataclass
class RecordedArrivals(_InOrder):
    """Answers in the order that the records of another run say.

    Attributes:
        federation: Of the experiment.
        state: As it was after the last finished round.
        recorded: Who answered in each round of the other run.
    """

    recorded: Mapping[int, RecordedRound] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Note by the round of a request whose answers to it count, and in which round."""
        super().__post_init__()
        self._counted: dict[int, dict[int, int]] = {}
        for round, own in self.recorded.items():
            for client, age in own.staleness.items():
                if client not in own.rejected:
                    self._counted.setdefault(round - age, {})[client] = round

    def arrivals(self, exchange: Exchange, carry: Carry, ledger: Ledger) -> list[Assignment]:
        """Have those work now whose answers to this round's request count later; return this round's.

        Raises:
            SettingsError: The other run ended before this round.
        """
        now, request = exchange.round, next(iter(exchange.requests.values()))
        if now not in self.recorded:
            raise SettingsError(
                [
                    f"records end with round {max(self.recorded, default=0)}, and this run goes on with "
                    f"round {now}: give it the [evaluation] with which the other one stopped early"
                ],
                SETTING,
            )
        taken = self._counted.get(now, {})
        if others := sorted(taken.keys() - exchange.requests.keys()):
            raise SettingsError(
                [
                    f"round {now} of the records has an answer of client {others[0]}, which this run "
                    "does not train: give it the [clients] and the members of the other one"
                ],
                SETTING,
            )
        asked = {client: exchange.requests[client] for client in sorted(taken)}
        if asked:
            for answer in carry(replace(exchange, requests=asked, buffered=None)):
                sent, counts = asked[answer.client], float(taken[answer.client])
                self._in_flight[answer.client] = Assignment(
                    answer.client, now, 0.0, counts, sent, answer
                )
        found, own = [], self.recorded[now]
        for client, age in sorted(own.staleness.items()):
            if client in own.rejected:
                failed = Answer(client, error=own.rejected[client])
                sent = exchange.requests.get(client, request)
                work = Assignment(client, now - age, 0.0, 0.0, sent, failed)
            else:
                work = self._in_flight[client]
            found.append(self._taken(work, now))
        return found


def recorded_arrivals(
    path: Path, federation: FederationSettings, *, stops_early: bool = False
) -> dict[int, RecordedRound]:
    """Read who answered in each round of a run between machines.

    Args:
        path: The ``rounds.jsonl`` of its folder.
        federation: Of the experiment that repeats it.
        stops_early: Whether the run may end before ``federation.rounds``: then the last rounds need not
            be recorded.

    Raises:
        SettingsError: The file is not there, a line is no record of such a round of these clients, or a
            round is missing.
    """
    found: dict[int, RecordedRound] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "is no text"
        raise SettingsError([f"{named(path)} cannot be read: {why}"], SETTING) from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record["round"]:
                round, own = _recorded(record, federation.clients)
                found[round] = own
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            told = str(error) if isinstance(error, _NotRecordedError) else "is no record of a round"
            raise SettingsError([f"{named(path)}, line {number}: {told}"], SETTING) from None
    _require_one_at_a_time(found, path)
    last = min(federation.rounds, max(found, default=1)) if stops_early else federation.rounds
    missing = sorted(set(range(1, last + 1)) - found.keys())
    if missing:
        raise SettingsError(
            [
                f"{named(path)} has no round {missing[0]}, and federation.rounds = {federation.rounds}: "
                "give as many rounds as were recorded"
            ],
            SETTING,
        )
    return found


def _require_one_at_a_time(found: Mapping[int, RecordedRound], path: Path) -> None:
    """Check that no client was asked before its answer to an earlier request was taken.

    Raises:
        SettingsError: One was.
    """
    answered: dict[int, int] = {}
    for round, own in sorted(found.items()):
        for client, age in own.staleness.items():
            if round - age <= answered.get(client, 0):
                raise SettingsError(
                    [
                        f"{named(path)}: client {client} answers in round {round} to a request of round "
                        f"{round - age}, before its answer in round {answered[client]} was taken: these "
                        "are not the records of one run"
                    ],
                    SETTING,
                )
            answered[client] = round


class _NotRecordedError(ValueError):
    """Why a line is not the record of an asynchronous round."""


def _recorded(record: Mapping[str, Any], clients: int) -> tuple[int, RecordedRound]:
    """Return what a line records of its round.

    Raises:
        ValueError: It is not what a run between machines writes.
    """
    round, arrivals = record["round"], record.get("arrivals")
    if type(round) is not int or round < 1:
        raise _NotRecordedError(f"round = {round!r} is no number from 1")
    if not isinstance(arrivals, dict):
        raise _NotRecordedError(
            f"round {round} has no arrivals: the run was not an asynchronous one between machines"
        )
    staleness = {}
    for text, age in arrivals["staleness"].items():
        client = int(text)
        if not 0 <= client < clients:
            raise _NotRecordedError(f"client {client} is none of the {clients} of the experiment")
        if type(age) is not int or not 0 <= age < round:
            raise _NotRecordedError(
                f"staleness {age!r} of client {client} is not from 0 to {round - 1}"
            )
        staleness[client] = age
    rejected = {own["client"]: str(own["reason"]) for own in record["rejected"]}
    return round, RecordedRound(staleness, rejected)


def records_digest(path: Path | None) -> str | None:
    """Return the SHA-256 of the records that are repeated, ``None`` where there are none.

    Raises:
        SettingsError: They cannot be read.
    """
    if path is None:
        return None
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SettingsError([f"{named(path)} cannot be read: {error.strerror}"], SETTING) from None
