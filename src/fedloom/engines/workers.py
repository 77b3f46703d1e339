"""The engine with workers: several processes work on simulated clients, with the bits of one process.

The process that plays the run keeps what clients store and the ledger, and hands out one client at a
time, the longest first. A worker has the engine of ``in_process.py`` over the same rows and weights; it
is sent a request with what the client stores, and returns the answer with what the client stores now.
Answers are passed on in the order in which clients were asked, so nothing depends on who was quicker.
How workers are reached is a pool's affair (:class:`Pool`): processes of this machine
(``runs/workers.py``), or actors of Ray (``ray_pool.py``).
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

Reference = tuple[Tensor | None, Tensor | None]
"""Log-probs of a client's rows, and of its mismatched ones, under the reference model."""


@dataclass(frozen=True)
class ClientRequest:
    """A client's part of an exchange, and all that a worker needs to carry it out.

    Attributes:
        exchange: With the request of this client alone.
        client: Whom it is for.
        slots: What the client stores.
        fits: What fits into its memory at a time, where that is less than the whole.
        reference: Log-probs under the reference model, where they are known and this worker lacks them.
        earlier: What the client was asked in this round before, with what it stored then: carried out
            first where its session was in a worker that has ended.
        keys: Its keys for secure aggregation, where its answer is masked.
    """

    exchange: Exchange
    client: int
    slots: Slots
    fits: int | None = None
    reference: Reference | None = None
    earlier: tuple[tuple[Exchange, Slots], ...] = ()
    keys: ClientKeys | None = None


@dataclass(frozen=True)
class ClientResult:
    """What came of a :class:`ClientRequest`.

    Attributes:
        answer: For the loop of rounds.
        costs: What it cost.
        slots: Those of the client's slots that are new.
        stored: The names of all its slots.
        session: Whether the worker holds something of the client for this round's further exchanges.
        fits: As in the request, afterwards.
        reference: Log-probs under the reference model, where they were computed now.
    """

    answer: Answer
    costs: list[Cost]
    slots: Slots
    stored: tuple[str, ...]
    session: bool
    fits: int | None
    reference: Reference | None


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
    client, exchange = request.client, request.exchange
    if request.reference is not None:
        engine.shares[client] = _with_reference(engine.shares[client], request.reference)
    engine.remember_fit(client, request.fits)
    secure = engine.secure
    if secure is not None and request.keys is not None:
        secure.given[client] = request.keys
    for earlier, slots in request.earlier:
        engine.store = ClientStore.of(client, slots)
        list(engine.exchange(earlier))
    engine.ledger.costs.clear()
    scored = _reference_of(engine.shares[client]) is not None
    engine.store = ClientStore.of(client, request.slots)
    (answer,) = engine.exchange(exchange)
    costs, engine.ledger.costs = engine.ledger.costs, []
    after = engine.store.slots(client)
    return ClientResult(
        answer,
        costs,
        {name: own for name, own in after.items() if own is not request.slots.get(name)},
        tuple(after),
        engine.under_way(client, exchange.round)
        or (secure is not None and secure.under_way(client)),
        engine.fit_of(client),
        None if scored else _reference_of(engine.shares[client]),
    )


def work_packed(engine: SimulationEngine, request: ClientRequest) -> bytes:
    """Carry out a request in a worker; return the result pickled, for the process that asked."""
    result = carry_out(engine, request)
    owned = {name: _owned(own) for name, own in result.slots.items()}
    return pickle.dumps(replace(result, slots=owned), pickle.HIGHEST_PROTOCOL)


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
    _earlier: dict[int, list[tuple[Exchange, Slots]]] = field(default_factory=dict)
    """What clients with a session were asked in this round, with what they stored then."""
    _scored: set[tuple[int, int]] = field(default_factory=set)
    """Workers and the clients whose log-probs under the reference model they have."""
    _busy: dict[int, tuple[int, int]] = field(default_factory=dict)
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

        Raises:
            RoundFailed: A client's work has ended its worker three times.
        """
        if exchange.round != self._round:
            self._round, self._holders, self._earlier = exchange.round, {}, {}
        self._serial += 1
        self.local.store.begin_exchange()
        waiting = sorted(exchange.requests, key=self._expected, reverse=True)
        results: dict[int, ClientResult] = {}
        tries: dict[int, int] = {}
        for client in exchange.requests:
            while client not in results:
                self._hand_out(exchange, waiting)
                worker, result = self.pool.receive()
                if worker not in self._busy:  # it was idle when it ended, or has come since
                    self._lost(worker)
                    continue
                serial, done = self._busy.pop(worker)
                if isinstance(result, str):
                    self._lost(worker)
                if serial != self._serial:
                    continue  # of an exchange that was given up
                if isinstance(result, str):
                    tries[done] = tries.get(done, 0) + 1
                    if tries[done] == TRIES:
                        raise RoundFailed(
                            f"round {exchange.round}: {self.title(done)}'s work ended its worker "
                            f"{TRIES} times, the last time {result}"
                        )
                    waiting.insert(0, done)
                else:
                    results[done] = result
                    self._note(worker, done, exchange, result)
            yield self._taken(client, results.pop(client))

    def _expected(self, client: int) -> float:
        """Return what a client's work is expected to take, in tokens of its rows."""
        share, training = self.local.shares[client], self.local.training
        if not len(share):
            return 0.0
        work = training.work(len(share), self.local.participations)
        steps = work.most_steps(len(share), training.batch_size)
        return steps * training.batch_size * float(share.tokens.lengths.mean())

    def _hand_out(self, exchange: Exchange, waiting: list[int]) -> None:
        """Give every idle worker the next client that may go there."""
        for worker in sorted(self.pool.ready):
            if worker in self._busy:
                continue
            for client in waiting:
                if self._holders.get(client, worker) == worker:
                    waiting.remove(client)
                    self._busy[worker] = self._serial, client
                    self.pool.send(worker, self._request(exchange, worker, client))
                    break

    def _request(self, exchange: Exchange, worker: int, client: int) -> ClientRequest:
        known = _reference_of(self.local.shares[client])
        has = known is None or (worker, client) in self._scored
        if known is not None:
            self._scored.add((worker, client))
        moved, secure = client not in self._holders, self.local.secure
        masked = secure is not None and exchange.masking is not None
        return ClientRequest(
            _only(exchange, client),
            client,
            self.local.store.slots(client),
            self.local.fit_of(client),
            None if has else known,
            tuple(self._earlier.get(client, ())) if moved else (),
            secure.keys_of(exchange, client) if secure is not None and masked else None,
        )

    def _note(self, worker: int, client: int, exchange: Exchange, result: ClientResult) -> None:
        """Remember where a client's session and log-probs are, and how the session came about."""
        if result.reference is not None:
            self._scored.add((worker, client))
        if result.session:
            self._holders[client] = worker
            asked = _only(exchange, client), self.local.store.slots(client)
            self._earlier.setdefault(client, []).append(asked)
        else:
            self._holders.pop(client, None)
            self._earlier.pop(client, None)

    def _lost(self, worker: int) -> None:
        """Forget what a worker had that has ended."""
        self._holders = {client: own for client, own in self._holders.items() if own != worker}
        self._scored = {(own, client) for own, client in self._scored if own != worker}

    def _taken(self, client: int, result: ClientResult) -> Answer:
        """Let a result count here as if it had been computed here."""
        local, before = self.local, self.local.store.slots(client)
        local.ledger.costs.extend(result.costs)
        local.remember_fit(client, result.fits)
        if result.reference is not None:
            local.shares[client] = _with_reference(local.shares[client], result.reference)
        if result.answer.error is None:
            kept = {name: before[name] for name in result.stored if name not in result.slots}
            local.store.stage(client, {**kept, **result.slots})
        return result.answer


def _only(exchange: Exchange, client: int) -> Exchange:
    """Return one client's part of an exchange; what checks replies stays here."""
    masking = exchange.masking
    if masking is not None:
        own = {who: data for who, data in masking.messages.items() if who == client}
        masking = replace(masking, messages=own)
    return replace(
        exchange,
        request_schema=exchange.schema_of(client),
        requests={client: exchange.requests[client]},
        check=None,
        masking=masking,
        schemas={},
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
