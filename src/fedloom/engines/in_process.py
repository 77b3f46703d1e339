"""The simulation engine: all clients in this process, with one frozen backbone per kind of model.

Requests and replies are encoded and decoded exactly as they would be between machines, so the ledger
counts the bytes that would be sent, and no client sees another client's tensors.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from fedloom.accounting.costs import REFERENCE, Cost
from fedloom.accounting.ledger import Ledger
from fedloom.data.client_rows import TokenShare
from fedloom.data.public import PublicRows
from fedloom.errors import FedloomError, MessageError, PluginError
from fedloom.federation.client_link import ClientLink
from fedloom.federation.compression_messages import of_methods
from fedloom.federation.contract import fault_of, kind_of
from fedloom.federation.presence import Membership
from fedloom.federation.protocol import EVALUATE
from fedloom.federation.records import Absence
from fedloom.federation.secure_exchange import PROTOCOL, SecureClients
from fedloom.methods.contract.client import Client, Handler, carried_out, unchanged
from fedloom.models.adapters import AdapterModel
from fedloom.models.request_limits import Allowance
from fedloom.models.stacked_lora import reason_against
from fedloom.objectives.base import Objective
from fedloom.settings.plugins import plugin_place
from fedloom.storage.client_store import SEPARATOR, ClientStore
from fedloom.tensors import Tensors
from fedloom.training.cohort import cohort_size
from fedloom.training.layout import budget_of, scoring_budget
from fedloom.training.memory import fitting, largest_pass
from fedloom.training.reference_cache import ReferenceCache
from fedloom.training.references import add_reference_logps
from fedloom.training.results import OnStep, StepRecord
from fedloom.training.settings import TrainingSettings
from fedloom.training.steps import BatchMaker, Driver
from fedloom.wire.messages import Answer, Exchange, Payload
from fedloom.wire.settings import WireSettings

LOG = logging.getLogger(__name__)


def named(error: Exception) -> str:
    """Return the text of an error at a client."""
    if isinstance(error, FedloomError):
        return str(error)
    LOG.debug("a client failed", exc_info=error)
    place = plugin_place(error)
    return f"{type(error).__name__}: {error}{f' ({place})' * bool(place)}"


class CallbackError(BaseException):
    """What ``on_step`` raised: no failure of the client that nobody may take for one, or try again after.

    Attributes:
        error: The exception itself.
    """

    def __init__(self, error: Exception) -> None:
        """Keep it."""
        super().__init__(error)
        self.error = error


def ending(on_step: OnStep) -> OnStep:
    """Return a function that calls ``on_step`` and raises what that raises as :class:`CallbackError`."""

    def call(step: StepRecord) -> None:
        try:
            on_step(step)
        except Exception as error:
            raise CallbackError(error) from error

    return call


@dataclass(frozen=True)
class ClientResources:
    """Model and data of a client; clients of one kind share them and load their adapters in turn.

    Attributes:
        model: The backbone, or the client part of a split model, with the adapter.
        initial: The adapter as it was initialised.
        max_length: Longest training sequence in tokens.
        width: Classes, or tokens of the vocabulary.
        public: The public rows under this model's tokenizer.
        reference: Adapter of the reference model, where that is not the base model.
        own_start: Whether ``initial`` is this client's own model, of an earlier run.
    """

    model: AdapterModel
    initial: Tensors
    max_length: int
    width: int
    public: PublicRows | None = None
    reference: Tensors | None = None
    own_start: bool = False
    maker: BatchMaker | None = None


Together = Callable[["SimulationEngine", Exchange, list[int]], dict[int, Answer]]
"""Carries out a request at several clients of one model; returns their answers."""


@dataclass
class SimulationEngine:
    """Runs the handlers of clients one after the other.

    Attributes:
        resources: Model and data of each client.
        shares: Training rows of each client; reference log-probs are added when the client first takes
            part.
        handlers: Client-side handler of every action.
        objective: Objective that clients minimise.
        training: Settings of local training.
        seed: The experiment's seed.
        participations: Expected number of rounds in which a client takes part.
        rounds: Rounds of the run.
        store: The client store.
        ledger: The ledger of costs.
        unseen: Unseen clients: present, but asked only when named explicitly.
        noise_seed: Seed of noise that hides rows, if not the experiment's seed.
        error_text: Returns the text about an error that is sent to the server.
        allowance: Bound on the work of one request.
        references: Cache of log-probs under reference models.
        on_step: Called after each optimizer step of a client; what it raises is raised as it is.
        cohort: How many clients are trained in lockstep.
        together: Has several clients carry out a request in lockstep (``cohorts.py``).
        alone: Actions whose handlers train a client by themselves, as far as is known.
        drivers: What makes the trainings of each client, where row-level privacy hides its rows.
        secure: The clients' part in secure aggregation, where there is some.
        wire: How tensors are compressed.
    """

    resources: Mapping[int, ClientResources]
    shares: dict[int, TokenShare]
    handlers: Mapping[str, Handler]
    objective: Objective
    training: TrainingSettings
    seed: int
    participations: float
    rounds: int
    store: ClientStore
    ledger: Ledger
    unseen: frozenset[int] = frozenset()
    noise_seed: int | None = None
    error_text: Callable[[Exception], str] = named
    allowance: Allowance = field(default_factory=Allowance)
    references: ReferenceCache | None = None
    on_step: OnStep | None = None
    cohort: Literal["auto"] | int = 1
    together: Together | None = None
    alone: set[str] = field(default_factory=set)
    drivers: Mapping[int, Driver] = field(default_factory=dict)
    secure: SecureClients | None = None
    wire: WireSettings = field(default_factory=WireSettings)
    _sessions: dict[int, dict[str, Any]] = field(default_factory=dict)
    _round: int = -1
    _fits: dict[int, int] = field(default_factory=dict)
    """Largest pass that fits into a client's memory, in tokens or examples, once it has been measured."""

    def sizes(self) -> dict[int, int]:
        """Return the number of training rows of each client."""
        return self._sizes

    def membership(self) -> Membership:
        """Return all clients but unseen ones: in one process no client leaves."""
        return self._membership

    @cached_property
    def _sizes(self) -> dict[int, int]:
        return {
            client: len(share)
            for client, share in sorted(self.shares.items())
            if client not in self.unseen
        }

    @cached_property
    def _membership(self) -> Membership:
        return Membership(tuple(self._sizes), rows=self._sizes)

    def absent(self) -> dict[int, Absence]:
        """Return no client: all clients are in this process."""
        return {}

    def title(self, client: int) -> str:
        """Return the name of a client in messages."""
        return f"client {client}"

    def exchange(self, exchange: Exchange) -> Iterator[Answer]:
        """Carry out a request at each client, one after the other."""
        self.begin(exchange)
        cohorts = {client: own for own in self.cohorts(exchange) for client in own}
        answers: dict[int, Answer] = {}
        for client in exchange.requests:
            if client not in answers:
                answers |= self.answers(exchange, cohorts[client])
            yield answers.pop(client)

    def begin(self, exchange: Exchange) -> None:
        """Begin an exchange; the first of a round ends what clients had of the round before."""
        if exchange.round != self._round:
            self._sessions, self._round = {}, exchange.round
        self.store.begin_exchange()

    def cohorts(self, exchange: Exchange, apart: Collection[int] = ()) -> list[list[int]]:
        """Return who is worked on together, in the order of the requests; it follows from these alone.

        Args:
            exchange: What is asked.
            apart: Clients that are in the middle of work elsewhere, each of which is worked on by itself.
        """
        found: list[list[int]] = []
        alike: dict[int, list[int]] = {}
        for client in exchange.requests:
            if client not in apart and self._together(exchange, client):
                alike.setdefault(id(self.resources[client].model), []).append(client)
            else:
                found.append([client])
        for clients in alike.values():
            model = self.resources[clients[0]].model
            shares = [self.shares[client] for client in clients]
            size = cohort_size(self.cohort, model, shares, self.training.batch_size)
            found += [clients[start : start + size] for start in range(0, len(clients), size)]
        return found

    def _together(self, exchange: Exchange, client: int) -> bool:
        """Return whether a client's work on a request may be done with others'."""
        bounded = min(self.allowance.steps, self.allowance.seconds) < math.inf
        if self.cohort == 1 or bounded or client in self.drivers:
            return False
        if exchange.action in (EVALUATE, *self.alone):
            return False
        if exchange.action not in self.handlers or self.under_way(client, exchange.round):
            return False
        own = self.resources[client]
        return own.maker is None and not reason_against(own.model)

    def answers(self, exchange: Exchange, clients: list[int]) -> dict[int, Answer]:
        """Return the answers of clients that are worked on together, or of one."""
        if len(clients) > 1 and self.together is not None:
            try:
                return self.together(self, exchange, clients)
            except CallbackError as raised:
                failure = raised.error
            raise failure
        return {own: self.answer(exchange, own) for own in clients}

    def rows(self, client: int) -> int:
        """Return the training rows of a client, which may be unseen."""
        return len(self.shares[client])

    def fit_of(self, client: int) -> int | None:
        """Return what fits into a client's memory at a time, in tokens or examples, if that is known."""
        return self._fits.get(client)

    def remember_fit(self, client: int, size: int | None) -> None:
        """Begin a client's work with passes of this size, as :meth:`fit_of` returned it elsewhere."""
        if size is not None:
            self._fits[client] = size

    def under_way(self, client: int, round: int) -> bool:
        """Return whether a client is in the middle of work that takes several exchanges."""
        return round == self._round and bool(self._sessions.get(client))

    def restart(self, store: ClientStore) -> None:
        """Replace the client store, as if no round were under way."""
        self.store, self._round = store, -1

    def discard(self, clients: Collection[int]) -> None:
        """Discard what these clients stored in the last exchange."""
        for client in clients:
            self.store.discard(client)

    def signing_keys(self) -> Mapping[int, bytes]:
        """Return the public keys with which clients sign; none where no sums are asked for."""
        return self.secure.public_keys() if self.secure is not None else {}

    def finish_round(self) -> None:
        """Let what clients have put aside in this round count."""
        self.store.finish_round()

    def answer(self, exchange: Exchange, client: int) -> Answer:
        """Carry out a request at one client."""
        try:
            if exchange.action in PROTOCOL and self.secure is not None:
                return Answer(client, self._protocol_answer(self.secure, exchange, client))
            if exchange.action not in self.handlers:
                raise MessageError(
                    f"there is no action {exchange.action[:40]!r}: the method's handlers() has "
                    f"{', '.join(sorted(self.handlers))}"
                )
            self.prepare(exchange, client)
            return Answer(client, self._handle(exchange, client))
        except CallbackError as raised:
            failure = raised.error
        except Exception as error:  # an error at one client must not stop the others
            return Answer(client, error=self.error_text(error))
        raise failure  # here, so that it is as the user's function raised it

    def _protocol_answer(self, secure: SecureClients, exchange: Exchange, client: int) -> bytes:
        """Return a client's answer in a stage of secure aggregation that is no work on its rows."""
        with self.ledger.measure(exchange.round, client, exchange.action) as cost:
            cost.bytes_down, cost.exchanges = exchange.bytes_down(client), 1
            encoded = secure.answer(exchange, client)
            cost.bytes_up = len(encoded)
        return encoded

    def prepare(self, exchange: Exchange, client: int) -> None:
        """Have a client begin its work on a request, with its reference's log-probs known."""
        self.allowance.begin(going_on=self.under_way(client, exchange.round))
        self.resources[client].model.allowance = self.allowance
        if exchange.action != EVALUATE:
            self.add_reference(exchange.round, client)

    def _handle(self, exchange: Exchange, number: int) -> bytes:
        """Decode a request, carry it out, encode the reply, then update the client store."""
        with self.ledger.measure(exchange.round, number, exchange.action) as cost:
            cost.bytes_down, cost.exchanges = exchange.bytes_down(number), 1
            link = self.link(exchange, number)
            client, reply = self._worked(exchange, number, link, cost)
            encoded = self.encoded_reply(link, client, reply, cost)
        self.store.stage(number, link.stored(client.store))
        return encoded

    def link(self, exchange: Exchange, client: int) -> ClientLink:
        """Decode a client's request.

        Raises:
            MessageError: It is none that this client can use.
        """
        slots, initial = self.store.slots(client), self.resources[client].initial
        return ClientLink.opened(exchange, client, self.wire, self.seed, slots, initial)

    def _worked(
        self, exchange: Exchange, number: int, link: ClientLink, cost: Cost
    ) -> tuple[Client, Payload]:
        """Carry out an action; where memory does not suffice, use smaller passes from then on."""

        def work(size: int) -> tuple[Client, Payload]:
            self._fits[number] = size
            client = self.client(number, exchange.round, link)
            before = client.model.flops
            try:
                reply = self.handlers[exchange.action](client, link.payload)
                return client, carried_out(reply) if isinstance(reply, Generator) else reply
            except Exception:
                if not under_way:
                    self.forget_attempt(number)
                raise
            finally:
                cost.flops += client.model.flops - before
                self.count_training(cost, client)

        under_way = self.under_way(number, exchange.round)
        budget = budget_of(self.training, self.resources[number].model)
        whole, measure = largest_pass(budget, self.shares[number])
        size = self._fits.get(number, whole)
        return work(size) if under_way else fitting(work, size, f"client {number}", measure)

    def forget_attempt(self, client: int) -> None:
        """Discard what a failed attempt at a client's work has left for this round."""
        self._sessions.pop(client, None)

    @contextlib.contextmanager
    def sessions_aside(self, clients: Collection[int]) -> Iterator[None]:
        """Have clients work as at the start of a round; afterwards they hold what they held before."""
        held = {own: self._sessions.pop(own) for own in clients if own in self._sessions}
        try:
            yield
        finally:
            for own in clients:
                self.forget_attempt(own)
            self._sessions |= held

    def encoded_reply(self, link: ClientLink, client: Client, reply: Payload, cost: Cost) -> bytes:
        """Return what a client sends back, masked where it is to be summed.

        Raises:
            PluginError: What its handler made is not sound.
        """
        exchange = link.exchange
        _require_sound(exchange.action, client, reply)
        if exchange.masking is not None and self.secure is not None:
            encoded = self.secure.masked(exchange, client.id, reply)
        else:
            encoded = link.encoded(reply)
        cost.bytes_up = len(encoded)
        return encoded

    @staticmethod
    def count_training(cost: Cost, client: Client) -> None:
        """Let a cost have the sums of a client's trainings of a request."""
        if client.last is not None:
            cost.tokens, cost.examples = client.last.tokens, client.last.examples
            cost.steps, cost.targets = client.last.steps, client.last.targets

    def client(self, number: int, round: int, link: ClientLink | None = None) -> Client:
        """Return the client that a handler works on, in answer to a request where there is one."""
        own = self.resources[number]
        training = self.training
        if number in self._fits:
            budget = budget_of(training, own.model)
            whole, measure = largest_pass(budget, self.shares[number])
            if (size := self._fits[number]) < whole:
                changed = {"accumulation": None, measure.setting: size}
                training = training.model_copy(update=changed)
        return Client(
            id=number,
            round=round,
            model=own.model,
            initial=own.initial,
            share=self.shares[number],
            objective=self.objective,
            training=training,
            seed=self.seed,
            noise_seed=self.seed if self.noise_seed is None else self.noise_seed,
            participations=self.participations,
            rounds=self.rounds,
            store=of_methods(self.store.slots(number)),
            max_length=own.max_length,
            width=own.width,
            public=own.public,
            own_start=own.own_start,
            session=self._sessions.setdefault(number, {}),
            on_step=ending(self.on_step) if self.on_step is not None else None,
            driver=self.drivers.get(number),
            maker=own.maker,
            as_read=link.as_read if link is not None else unchanged,
        )

    def add_reference(self, round: int, client: int) -> None:
        """Compute a client's log-probs under the reference model when it first takes part."""
        share = self.shares[client]
        if not self.objective.needs_reference or share.reference_logps is not None:
            return
        with self.ledger.measure(round, client, REFERENCE) as cost:
            own = self.resources[client]
            model, before = own.model, own.model.flops
            budget = scoring_budget(self.training, model)
            if client in self.drivers:  # rounding would couple the rows of a pass
                budget = replace(budget, rows=1)
            whole, measure = largest_pass(budget, share)
            self.shares[client] = fitting(
                lambda size: add_reference_logps(
                    model, share, budget.of_size(size), own.reference, self.references
                ),
                whole,
                f"client {client}, the reference model",
                measure,
            )
            cost.flops = model.flops - before
            cost.tokens, cost.examples = len(share.tokens.tokens), len(share)


def _require_sound(action: str, client: Client, reply: object) -> None:
    """Check what a handler returned, and what it left in the client's store.

    Raises:
        PluginError: It is no payload, or what is stored are no named tensors.
    """
    if not isinstance(reply, Payload):
        raise PluginError(
            f"the handler of {action!r} returned {kind_of(reply)}: it must return "
            "Payload(tensors, numbers, metrics)"
        )
    for slot, tensors in client.store.items():
        if SEPARATOR in slot:
            raise PluginError(f"client.store[{slot!r}]: the name of a slot holds no {SEPARATOR!r}")
        if fault := fault_of(tensors):
            raise PluginError(
                f"in client.store[{slot!r}], {fault}; a slot holds a dictionary of tensors, such as "
                f'client.store["counts"] = {{"steps": torch.tensor(3.0)}}'
            )
