"""The engine with workers: several processes work on simulated clients, with the bits of one process.

The process that plays the run keeps what clients store and the ledger, and hands out one client at a
time, or one cohort of clients that are trained together, the longest first. A worker has the engine of
``in_process.py`` over the same rows and weights; it is sent a request with what the clients store, and
returns the answers with what they store now. Answers are passed on in the order in which clients were
asked, so nothing depends on who was quicker. How workers are reached is a pool's affair
(:class:`Pool`): processes of this machine (``runs/workers.py``), or actors of Ray (``ray_pool.py``).
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from fedloom.accounting.costs import Cost
from fedloom.data.client_rows import TokenShare
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import RoundFailed
from fedloom.federation.presence import Membership
from fedloom.federation.records import Absence
from fedloom.federation.secure_exchange import ClientKeys
from fedloom.storage.client_store import ClientStore, Slots
from fedloom.tensors import Tensors
from fedloom.wire.messages import Answer, Exchange

TRIES = 3
"""Times that a client's work is begun before the round is given up."""

Unit = tuple[int, ...]
"""Clients whose work one worker does at a time: one, or the clients of a cohort."""

Stored = Mapping[int, Slots]
"""What clients store."""

Reference = tuple[Tensor | None, Tensor | None]
"""Log-probs of a client's rows, and of its mismatched ones, under the reference model."""


@dataclass(frozen=True)
class ClientFacts:
    """What a worker needs of a client beside its request, and returns where it has changed.

    Attributes:
        slots: What the client stores; in a result, those that are new.
        fits: What fits into its memory at a time, where that is less than the whole.
        reference: Log-probs under the reference model: in a request, where they are known and the worker
            lacks them; in a result, where they were computed now.
    """

    slots: Slots
    fits: int | None = None
    reference: Reference | None = None


@dataclass(frozen=True)
class ClientRequest:
    """A unit of work, and all that a worker needs to carry it out.

    Attributes:
        exchange: With the requests of these clients alone.
        clients: A client, or those of a cohort, which are trained together.
        facts: What is known of each.
        earlier: What a client was asked in this round before, with those that it was trained with, and
            what all stored then: carried out first where its session was in a worker that has ended.
        keys: Keys for secure aggregation of those whose answers are masked.
    """

    exchange: Exchange
    clients: tuple[int, ...]
    facts: Mapping[int, ClientFacts]
    earlier: tuple[tuple[Exchange, Stored], ...] = ()
    keys: Mapping[int, ClientKeys] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientResult:
    """What came of a :class:`ClientRequest`.

    Attributes:
        answers: For the loop of rounds.
        costs: What they cost.
        facts: What has changed of each client.
        stored: By client, the names of all its slots.
        sessions: Clients of which the worker holds something for this round's further exchanges.
        alone: Actions whose handlers train a client by themselves, as far as the worker knows.
    """

    answers: Mapping[int, Answer]
    costs: list[Cost]
    facts: Mapping[int, ClientFacts]
    stored: Mapping[int, tuple[str, ...]]
    sessions: frozenset[int]
    alone: frozenset[str]


class Pool(Protocol):
    """Workers, each of which works on one request at a time."""

    @property
    def ready(self) -> Collection[int]:
        """The workers that there are now."""
        ...

    def send(self, worker: int, request: ClientRequest) -> None:
        """Give an idle worker of those that are ready something to do."""
        ...

    def receive(self) -> tuple[int, ClientResult | str]:
        """Wait until a worker has done its work; in place of a result, why it ended without.

        One that has ended is replaced, before this returns or later; one that comes later is returned
        with a text, too.

        Raises:
            RoundFailed: It cannot be replaced, and no other is left.
        """
        ...


def carry_out(engine: SimulationEngine, request: ClientRequest) -> ClientResult:
    """Carry out a request in a worker, whose engine stores nothing from one request to the next."""
    clients, exchange, secure = request.clients, request.exchange, engine.secure
    for client, own in request.facts.items():
        if own.reference is not None:
            engine.shares[client] = _with_reference(engine.shares[client], own.reference)
        engine.remember_fit(client, own.fits)
    if secure is not None:
        secure.given |= request.keys
    for place, (earlier, stored) in enumerate(request.earlier):
        engine.store = ClientStore.of(stored)
        engine.begin(earlier)
        if not place:
            engine.forget_attempt(clients[0])
        with engine.sessions_aside(stored.keys() - {*clients}):
            engine.answers(earlier, [*stored])
    engine.ledger.costs.clear()
    scored = {client: _reference_of(engine.shares[client]) is not None for client in clients}
    before = {client: own.slots for client, own in request.facts.items()}
    engine.store = ClientStore.of(before)
    engine.begin(exchange)
    answers = engine.answers(exchange, list(clients))
    costs, engine.ledger.costs = engine.ledger.costs, []
    after = {client: engine.store.slots(client) for client in clients}
    return ClientResult(
        answers,
        costs,
        {
            client: ClientFacts(
                {n: own for n, own in after[client].items() if own is not before[client].get(n)},
                engine.fit_of(client),
                None if scored[client] else _reference_of(engine.shares[client]),
            )
            for client in clients
        },
        {client: tuple(own) for client, own in after.items()},
        frozenset(
            client
            for client in clients
            if engine.under_way(client, exchange.round)
            or (secure is not None and secure.under_way(client))
        ),
        frozenset(engine.alone),
    )


def work_packed(engine: SimulationEngine, request: ClientRequest) -> bytes:
    """Carry out a request in a worker; return the result pickled, for the process that asked."""
    result = carry_out(engine, request)
    facts = {
        client: replace(own, slots={name: _owned(slot) for name, slot in own.slots.items()})
        for client, own in result.facts.items()
    }
    return pickle.dumps(replace(result, facts=facts), pickle.HIGHEST_PROTOCOL)


def _owned(tensors: Tensors) -> Tensors:
    """Return tensors without what else lies in their storages, which would travel along."""
    return {
        name: tensor
        if tensor.untyped_storage().nbytes() == tensor.nbytes
        else tensor.detach().clone()
        for name, tensor in tensors.items()
    }


@dataclass
class WorkersEngine:
    """Runs handlers in workers.

    Attributes:
        local: The engine of this process: its rows, its store, its ledger.
        pool: The workers.
    """

    local: SimulationEngine
    pool: Pool
    _round: int = -1
    _holders: dict[int, int] = field(default_factory=dict)
    """The worker that holds a client's session of this round."""
    _earlier: dict[int, list[tuple[Exchange, Stored]]] = field(default_factory=dict)
    """What clients with a session were asked in this round, with what they stored then."""
    _scored: set[tuple[int, int]] = field(default_factory=set)
    """Workers and the clients whose log-probs under the reference model they have."""
    _busy: dict[int, tuple[int, Unit]] = field(default_factory=dict)
    """Workers at work: on which exchange, by its serial number, and on whom."""
    _serial: int = 0

    def sizes(self) -> dict[int, int]:
        """Return the number of training rows of each client."""
        return self.local.sizes()

    def membership(self) -> Membership:
        """Return all clients but newcomers."""
        return self.local.membership()

    def absent(self) -> dict[int, Absence]:
        """Return nobody: a worker that ends is replaced."""
        return {}

    def title(self, client: int) -> str:
        """Return what a client is called in messages."""
        return self.local.title(client)

    def discard(self, clients: Collection[int]) -> None:
        """Forget what these clients have put aside over the last exchange."""
        self.local.discard(clients)

    def signing_keys(self) -> Mapping[int, bytes]:
        """Return the public keys with which clients sign; none where no sums are asked for."""
        return self.local.signing_keys()

    def finish_round(self) -> None:
        """Let what clients have put aside in this round count."""
        self.local.finish_round()

    def exchange(self, exchange: Exchange) -> Iterator[Answer]:
        """Carry out one action on every client asked; answers come in the order of the requests.

        The clients of a cohort are one unit of work, and are those that one process would train together:
        a client with a session works by itself, also where the worker that held it has ended.

        Raises:
            RoundFailed: A client's work has ended its worker three times.
        """
        if exchange.round != self._round:
            self._round, self._holders, self._earlier = exchange.round, {}, {}
        self._serial += 1
        self.local.store.begin_exchange()
        units = [tuple(own) for own in self.local.cohorts(exchange, apart=self._earlier)]
        unit_of = {client: unit for unit in units for client in unit}
        waiting = sorted(units, key=self._expected, reverse=True)
        results: dict[Unit, ClientResult] = {}
        answers: dict[int, Answer] = {}
        tries: dict[Unit, int] = {}
        for client in exchange.requests:
            unit = unit_of[client]
            while client not in answers and unit not in results:
                self._hand_out(exchange, waiting)
                self._receive(exchange, waiting, results, tries)
            if client not in answers:
                answers |= self._taken(results.pop(unit))
            yield answers.pop(client)

    def _receive(
        self,
        exchange: Exchange,
        waiting: list[Unit],
        results: dict[Unit, ClientResult],
        tries: dict[Unit, int],
    ) -> None:
        """Wait until a worker has done its work or has ended, and note what came of it.

        Raises:
            RoundFailed: The same work has ended its worker three times.
        """
        worker, result = self.pool.receive()
        if worker not in self._busy:  # it was idle when it ended, or has come since
            self._lost(worker)
            return
        serial, done = self._busy.pop(worker)
        if isinstance(result, str):
            self._lost(worker)
        if serial != self._serial:
            return  # of an exchange that was given up
        if not isinstance(result, str):
            results[done] = result
            self._note(worker, done, exchange, result)
            return
        tries[done] = tries.get(done, 0) + 1
        if tries[done] == TRIES:
            who = ", ".join(map(self.title, done))
            raise RoundFailed(
                f"round {exchange.round}: {who}'s work ended its worker {TRIES} times, the last time "
                f"{result}"
            )
        waiting.insert(0, done)

    def _expected(self, unit: Unit) -> float:
        """Return what work is expected to take, in tokens of its clients' rows."""
        return sum(map(self._expected_of, unit))

    def _expected_of(self, client: int) -> float:
        share, training = self.local.shares[client], self.local.training
        if not len(share):
            return 0.0
        work = training.work(len(share), self.local.participations)
        steps = work.most_steps(len(share), training.batch_size)
        return steps * training.batch_size * float(share.tokens.lengths.mean())

    def _hand_out(self, exchange: Exchange, waiting: list[Unit]) -> None:
        """Give every idle worker the next work that may go there."""
        for worker in sorted(self.pool.ready):
            if worker in self._busy:
                continue
            for unit in waiting:
                if self._holders.get(unit[0], worker) == worker:  # one with a session is alone
                    waiting.remove(unit)
                    self._busy[worker] = self._serial, unit
                    self.pool.send(worker, self._request(exchange, worker, unit))
                    break

    def _request(self, exchange: Exchange, worker: int, unit: Unit) -> ClientRequest:
        first, secure = unit[0], self.local.secure
        masked = secure is not None and exchange.masking is not None
        return ClientRequest(
            _only(exchange, unit),
            unit,
            {client: self._facts(worker, client) for client in unit},
            tuple(self._earlier.get(first, ())) if first not in self._holders else (),
            {c: secure.keys_of(exchange, c) for c in unit} if secure is not None and masked else {},
        )

    def _facts(self, worker: int, client: int) -> ClientFacts:
        known = _reference_of(self.local.shares[client])
        has = known is None or (worker, client) in self._scored
        if known is not None:
            self._scored.add((worker, client))
        slots = self.local.store.slots(client)
        return ClientFacts(slots, self.local.fit_of(client), None if has else known)

    def _note(self, worker: int, unit: Unit, exchange: Exchange, result: ClientResult) -> None:
        """Remember where clients' sessions and log-probs are, and how the sessions came about."""
        self.local.alone |= result.alone
        asked = _only(exchange, unit), {own: self.local.store.slots(own) for own in unit}
        for client in unit:
            if result.facts[client].reference is not None:
                self._scored.add((worker, client))
            if client in result.sessions:
                self._holders[client] = worker
                self._earlier.setdefault(client, []).append(asked)
            else:
                self._holders.pop(client, None)
                self._earlier.pop(client, None)

    def _lost(self, worker: int) -> None:
        """Forget what a worker had that has ended."""
        self._holders = {client: own for client, own in self._holders.items() if own != worker}
        self._scored = {(own, client) for own, client in self._scored if own != worker}

    def _taken(self, result: ClientResult) -> Mapping[int, Answer]:
        """Let a result count here as if it had been computed here; return its answers."""
        local = self.local
        local.ledger.costs.extend(result.costs)
        for client, own in result.facts.items():
            before = local.store.slots(client)
            local.remember_fit(client, own.fits)
            if own.reference is not None:
                local.shares[client] = _with_reference(local.shares[client], own.reference)
            if result.answers[client].error is None:
                names = result.stored[client]
                kept = {name: before[name] for name in names if name not in own.slots}
                local.store.stage(client, {**kept, **own.slots})
        return result.answers


def _only(exchange: Exchange, unit: Unit) -> Exchange:
    """Return some clients' part of an exchange; what checks replies stays here."""
    masking = exchange.masking
    if masking is not None:
        own = {who: data for who, data in masking.messages.items() if who in unit}
        masking = replace(masking, messages=own)
    return replace(
        exchange,
        requests={client: exchange.requests[client] for client in unit},
        check=None,
        masking=masking,
        schemas={c: own for c, own in exchange.schemas.items() if c in unit},
        plain=None,
        read=None,
    )


def _reference_of(share: TokenShare) -> Reference | None:
    if share.reference_logps is None:
        return None
    return share.reference_logps, share.mismatched_reference_logps


def _with_reference(share: TokenShare, reference: Reference) -> TokenShare:
    logps, mismatched = reference
    return replace(share, reference_logps=logps, mismatched_reference_logps=mismatched)
