"""The simulated clock: when the answers of simulated clients arrive, and which do not.

A client's work takes the seconds that its device and link need for the operations and bytes that the
ledger counted (``accounting/network.py``). In a synchronous exchange all clients begin at once, and the
clock goes on to the last answer, or to the deadline. In a buffered exchange clients work at their own
pace: those that are free are asked, and the earliest answers are taken, also such as were asked for in
earlier rounds. The server's own work and evaluations take no simulated time.

Everything follows from settings, seed, devices and ledger, never from a real clock, so results do not
depend on the order in which an engine returns answers, on workers, or on a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedloom.accounting.costs import REFERENCE, Cost
from fedloom.accounting.ledger import Ledger
from fedloom.accounting.quantities import human_seconds
from fedloom.accounting.traffic import Sent
from fedloom.errors import RoundFailed
from fedloom.federation.devices import Device
from fedloom.federation.participants import FederationSettings
from fedloom.federation.records import SimulatedTime
from fedloom.randomness import generator
from fedloom.storage.checkpoint import answer_name
from fedloom.tensors import Tensors
from fedloom.wire.messages import Answer, Exchange
from fedloom.wire.schema import Schema

Carry = Callable[[Exchange], Iterable[Answer]]
"""Carries an exchange to clients."""


FORGOTTEN = "its answer was deleted from the checkpoint (fedloom forget)"
"""Why an answer that was in flight does not count."""


@dataclass(frozen=True)
class Assignment:
    """Work that a client was asked for, with its answer and when that arrives.

    Attributes:
        client: Who was asked.
        round: The round in which it was asked.
        begin: When, in seconds of simulated time.
        end: When its answer arrives, or when the server learns that none will.
        request: What it was sent, encoded.
        answer: The answer, or why there is none.
        schema: Of the request, where it may have to be sent once more and is coded.
    """

    client: int
    round: int
    begin: float
    end: float
    request: bytes
    answer: Answer
    schema: Schema | None = None


@dataclass(frozen=True)
class ClockState:
    """All that the clock carries from one round to the next.

    Attributes:
        now: Seconds of simulated time since the start of the run.
        scored: Clients whose scoring of rows under the reference model has been counted.
        in_flight: Work of which the answers have not arrived yet.
    """

    now: float = 0.0
    scored: frozenset[int] = frozenset()
    in_flight: tuple[Assignment, ...] = ()

    def saved(self) -> tuple[dict[str, Any], Tensors]:
        """Return it as plain JSON, and payloads as tensors of bytes by name."""
        names = _request_names(self.in_flight)
        schemas = {own.schema.digest: own.schema for own in self.in_flight if own.schema}
        table = {
            "now": self.now,
            "scored": sorted(self.scored),
            "schemas": {digest: schema.to_table() for digest, schema in sorted(schemas.items())},
            "in_flight": [
                {
                    "client": own.client,
                    "round": own.round,
                    "begin": own.begin,
                    "end": own.end,
                    "error": own.answer.error,
                    "request": name,
                    "schema": own.schema.digest if own.schema else None,
                }
                for own, name in zip(self.in_flight, names, strict=True)
            ],
        }
        tensors = {}
        for own, name in zip(self.in_flight, names, strict=True):
            if name not in tensors:
                tensors[name] = _bytes(own.request)
            if own.answer.data is not None:
                tensors[answer_name(own.client)] = _bytes(own.answer.data)
        return table, tensors

    @classmethod
    def restored(cls, table: Mapping[str, Any], tensors: Tensors) -> ClockState:
        """Return what :meth:`saved` returned."""
        requests = {
            name: tensor.numpy().tobytes()
            for name, tensor in tensors.items()
            if name.startswith("request/")
        }
        schemas = {d: Schema.from_table(own) for d, own in table.get("schemas", {}).items()}
        in_flight = []
        for own in table["in_flight"]:
            client, data = own["client"], tensors.get(answer_name(own["client"]))
            error = own["error"] or (None if data is not None else FORGOTTEN)
            answer = Answer(client, None if data is None else data.numpy().tobytes(), error)
            request = requests[own.get("request", f"request/{own['round']:06d}")]
            schema = schemas.get(own.get("schema"))
            in_flight.append(
                Assignment(client, own["round"], own["begin"], own["end"], request, answer, schema)
            )
        return cls(table["now"], frozenset(table["scored"]), tuple(in_flight))


def _request_names(in_flight: Sequence[Assignment]) -> list[str]:
    """Return the name under which each request is kept; equal ones of a round have one name."""
    names: dict[tuple[int, bytes], str] = {}
    rounds: set[int] = set()
    for own in in_flight:
        name = f"request/{own.round:06d}" + f"/{own.client:06d}" * (own.round in rounds)
        names.setdefault((own.round, own.request), name)
        rounds.add(own.round)
    return [names[own.round, own.request] for own in in_flight]


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@dataclass
class SimulatedClock:
    """The clock of a run.

    Attributes:
        devices: Device of each client.
        federation: Seed, cohort size, deadline and quorum.
        asynchronous: Whether rounds take answers from clients that work at their own pace.
        state: As it was after the last finished round.
    """

    devices: Mapping[int, Device]
    federation: FederationSettings
    asynchronous: bool = False
    state: ClockState = ClockState()
    _seconds: dict[int, float] = field(default_factory=dict)
    _staleness: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin where the state says."""
        self.now = self.state.now
        self._scored = set(self.state.scored)
        self._in_flight = list(self.state.in_flight)

    def at(self, state: ClockState) -> SimulatedClock:
        """Return one that goes on from what was carried."""
        return replace(self, state=state)

    def begin(self, round: int, reachable: Mapping[int, int]) -> dict[int, int]:
        """Begin a round: return those of its clients that are available, once they are enough.

        A synchronous round begins when as many are available as its quorum asks for, an asynchronous one
        at once: there clients are asked whenever they are available.

        Args:
            round: From 1.
            reachable: Training rows of each client.

        Raises:
            RoundFailed: At no time will so many be available.
        """
        self._seconds, self._staleness = {}, {}
        if self.asynchronous:
            return dict(reachable)
        expected = min(self.federation.cohort_size, len(reachable))
        needed = max(1, math.ceil(self.federation.quorum * expected))
        last = 2 * max((_cycle(self.devices[c]) for c in reachable), default=0.0) + self.now
        while True:
            there = {c: n for c, n in reachable.items() if self._is_available(c)}
            if len(there) >= needed:
                return there
            wake = self._next_available(c for c in reachable if c not in there)
            if wake is None or wake > last:
                raise RoundFailed(
                    f"round {round}: after {human_seconds(self.now)} of simulated time at no moment "
                    f"{needed} of {len(reachable)} clients are available, as "
                    f"federation.quorum = {self.federation.quorum:g} asks for: give them longer "
                    "windows in simulation.devices, or lower the quorum"
                )
            self.now = wake

    @property
    def seconds(self) -> Mapping[int, float]:
        """Seconds that each client which was asked in this round has taken so far."""
        return self._seconds

    def timed(
        self,
        exchange: Exchange,
        answers: Iterable[Answer],
        ledger: Ledger,
        *,
        preliminary: bool = False,
    ) -> Iterator[Answer]:
        """Yield the answers to an exchange whose clients all begin now; late ones are errors.

        With ``federation.extra`` clients the exchange is over when as many have answered as a round
        takes.

        Args:
            exchange: What they were asked.
            answers: As the engine returns them.
            ledger: Where the engine notes what they cost.
            preliminary: Whether it is to decide who takes part in the round: all answers are waited for,
                and one that does not come is not the client's answer in the round.
        """
        begin = end = self.now
        some = self.federation.extra and not preliminary
        wanted = self.federation.cohort_size if some else len(exchange.requests)
        held = []
        for answer, seconds in self._measured(answers, ledger):
            own = self._assignment(exchange, answer, begin, seconds)
            self._seconds[own.client] = self._seconds.get(own.client, 0.0) + own.end - begin
            if preliminary and own.answer.error is not None:
                del self._seconds[own.client]
            if wanted >= len(exchange.requests):
                end = max(end, own.end)
                yield own.answer
            else:
                held.append(own)
        usable = 0
        for own in sorted(held, key=lambda own: (own.end, own.client)):
            if usable == wanted:
                self._seconds[own.client] -= own.end - end
                why = f"late: the other {wanted} had answered by then (simulated)"
                yield own.answer if own.answer.error else Answer(own.client, error=why)
                continue
            usable, end = usable + (own.answer.error is None), own.end
            yield own.answer
        self.now = end

    def arrivals(self, exchange: Exchange, carry: Carry, ledger: Ledger) -> list[Assignment]:
        """Return the earliest arrivals of a buffered exchange, and go on to the last of them.

        Clients that are free and available are asked, drawn at random, whenever fewer are at work than
        the exchange's concurrency. A client answers at most once in a round. Work that has not arrived
        stays in flight.

        Args:
            exchange: What may be asked, with a request for every client that may be.
            carry: Carries requests.
            ledger: Where the engine notes what they cost.

        Returns:
            As many answers as the buffer holds, and the failures before them; fewer answers where nobody
            is left to be asked, or where so many failed that the quorum cannot be reached.
        """
        buffered = exchange.buffered
        assert buffered is not None
        found: list[Assignment] = []
        usable = draws = 0
        while usable < buffered.size and can_reach_quorum(
            self.federation, buffered.size, len(found) - usable
        ):
            away = {own.client for own in (*found, *self._in_flight)}
            free = [client for client in exchange.requests if client not in away]
            slots = buffered.concurrency - len(self._in_flight)
            there = [client for client in free if self._is_available(client)] if slots > 0 else []
            if there:
                self._assign(exchange, there, min(slots, len(there)), draws, carry, ledger)
                draws += 1
                continue
            first = min(self._in_flight, key=lambda own: (own.end, own.client), default=None)
            wake = self._next_available(free) if slots > 0 else None
            if wake is not None and (first is None or wake < first.end):
                self.now = wake
            elif first is None:
                break
            else:
                self._in_flight.remove(first)
                self.now = first.end
                self._seconds[first.client] = first.end - first.begin
                self._staleness[first.client] = exchange.round - first.round
                usable += first.answer.error is None
                found.append(first)
        return found

    def close(self) -> SimulatedTime:
        """End a round: note its state for the checkpoint, and return its times for the record."""
        begin = self.state.now
        self.state = ClockState(self.now, frozenset(self._scored), tuple(self._in_flight))
        return SimulatedTime(
            begin,
            self.now,
            dict(sorted(self._seconds.items())),
            dict(sorted(self._staleness.items())),
            len(self._in_flight),
        )

    def _assign(
        self,
        exchange: Exchange,
        there: list[int],
        count: int,
        draw: int,
        carry: Carry,
        ledger: Ledger,
    ) -> None:
        """Draw clients that are free and have them work from now on."""
        drawn = draw_idle(self.federation.seed, exchange.round, draw, there, count)
        asked = {client: exchange.requests[client] for client in drawn}
        own = replace(exchange, requests=asked, buffered=None)
        for answer, seconds in self._measured(carry(own), ledger):
            self._in_flight.append(self._assignment(own, answer, self.now, seconds))
        self._in_flight.sort(key=lambda own: own.client)

    def _measured(
        self, answers: Iterable[Answer], ledger: Ledger
    ) -> Iterator[tuple[Answer, float]]:
        """Yield each answer with the simulated seconds of the work that came with it."""
        known, pending = len(ledger.costs), dict[int, list[Cost]]()
        for answer in answers:
            for cost in ledger.costs[known:]:  # an engine may have worked on several clients by now
                pending.setdefault(cost.client, []).append(cost)
            known, costs = len(ledger.costs), pending.pop(answer.client, [])
            if answer.client in self._scored:  # after a resume it scores its rows once more
                costs = [cost for cost in costs if cost.phase != REFERENCE]
            elif any(cost.phase == REFERENCE for cost in costs):
                self._scored.add(answer.client)
            sent = Sent(
                sum(cost.bytes_down for cost in costs),
                sum(cost.bytes_up for cost in costs),
                sum(cost.exchanges for cost in costs),
            )
            flops = sum(cost.flops for cost in costs)
            yield answer, self.devices[answer.client].link.seconds(sent, flops)

    def _assignment(
        self, exchange: Exchange, answer: Answer, begin: float, seconds: float
    ) -> Assignment:
        """Return when an answer arrives to what a client began, or when and why it does not."""
        client, deadline = answer.client, self.federation.deadline
        device, end, why = self.devices[client], begin + seconds, ""
        left = device.available.until(begin)
        if left < min(end, begin + deadline):
            end, why = (
                left,
                f"not available any more after {human_seconds(left - begin)} (simulated)",
            )
        elif seconds > deadline:
            end = begin + deadline
            why = (
                f"late: it takes {human_seconds(seconds)} (simulated), federation.deadline is "
                f"{human_seconds(deadline)}"
            )
        elif client not in self._seconds and self._drops_out(exchange.round, client, device):
            why = "lost its connection (simulated)"
        if why and answer.error is None:
            answer = Answer(client, error=why)
        return Assignment(client, exchange.round, begin, end, exchange.requests[client], answer)

    def _drops_out(self, round: int, client: int, device: Device) -> bool:
        if not device.dropout:
            return False
        return generator(self.federation.seed, "drop-out", client, round).random() < device.dropout

    def _is_available(self, client: int) -> bool:
        return self.devices[client].available.until(self.now) > self.now

    def _next_available(self, clients: Collection[int] | Iterator[int]) -> float | None:
        """Return when the first of some clients is available, from now on."""
        times = (self.devices[client].available.next(self.now) for client in clients)
        return min((time for time in times if time is not None), default=None)


def _cycle(device: Device) -> float:
    """Return the seconds after which a device's windows repeat, or have ended."""
    own = device.available
    return own.period or (own.windows[-1][1] if own.windows else 0.0)


def can_reach_quorum(federation: FederationSettings, size: int, failed: int) -> bool:
    """Return whether a buffer of ``size`` answers can reach the quorum when so many have failed."""
    return size >= math.ceil(federation.quorum * (size + failed))


def draw_idle(seed: int, round: int, draw: int, idle: Sequence[int], count: int) -> list[int]:
    """Draw idle clients, for the ``draw``-th time in an asynchronous round; return them ascending."""
    rng = generator(seed, f"assignment {draw}", round=round)
    return sorted(int(client) for client in rng.choice(idle, size=count, replace=False))
