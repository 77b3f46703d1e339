"""Several clients' work on one request, their trainings made in lockstep (``training/cohort.py``).

Each client's handler goes on until it needs a training; once all wait, those that are alike are made
together. What a client's model holds is changed whenever its handler goes on, so that handlers know
nothing of each other. One that fails ends by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

from fedloom.accounting.costs import Cost
from fedloom.accounting.ledger import peak_memory, reset_peak_memory
from fedloom.engines.in_process import SimulationEngine
from fedloom.federation.client_link import ClientLink
from fedloom.methods.contract.client import Client, Trainings
from fedloom.models.adapters import AdapterModel
from fedloom.models.stacked_lora import reason_against
from fedloom.training.cohort import Outcome, alone, likeness, tokens_together, train_together
from fedloom.training.memory import is_out_of_memory
from fedloom.training.steps import Training
from fedloom.wire.messages import Answer, Exchange, Payload

LOG = logging.getLogger(__name__)


@dataclass
class _Work:
    """One client's work on a request.

    Attributes:
        number: The client's id.
        model: What it computes with.
        cost: What it has cost so far.
        put_back: Has the model hold what this client's handler left in it.
        link: The request, decoded.
        client: As its handler sees it.
        steps: The handler, waiting; ``None`` where it trains a client by itself.
        asked: The training that it waits for; ``None`` before it has begun, and at the end.
        reply: What it returned.
        error: Why it failed.
    """

    number: int
    model: AdapterModel
    cost: Cost
    put_back: Callable[[], None]
    link: ClientLink | None = None
    client: Client | None = None
    steps: Trainings[Payload] | None = None
    asked: Training | None = None
    reply: Payload | None = None
    error: Exception | None = None

    def go_on(self, further: Callable[[], Training | None]) -> None:
        """Let the handler go on to the next training that it waits for, or to its end.

        Raises:
            MemoryError: Memory does not suffice.
        """
        began, before = time.perf_counter(), self.model.flops
        self.put_back()
        self.asked = None
        try:
            self.asked = further()
        except StopIteration as stop:
            self.reply = stop.value
        except Exception as error:
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            self.error = error
        finally:
            self.put_back = self.model.as_it_is()
            self.cost.flops += self.model.flops - before
            self.cost.seconds += time.perf_counter() - began

    def take(self, outcome: Outcome) -> None:
        """Let the handler go on with what came of the training that it waits for."""
        self.cost.flops += outcome.flops
        self.cost.seconds += outcome.seconds
        assert self.steps is not None, "it waits"
        if outcome.error is not None:
            self.go_on(partial(self.steps.throw, outcome.error))
        elif outcome.result is not None:
            self.go_on(partial(self.steps.send, outcome.result))


def answers_together(
    engine: SimulationEngine, exchange: Exchange, clients: Sequence[int]
) -> dict[int, Answer]:
    """Carry out a request at several clients of one model; return their answers.

    Where memory does not suffice, they are worked on one after another.
    """
    model = engine.resources[clients[0]].model
    before, flops = model.as_it_is(), model.flops
    works = [
        _Work(own, model, Cost(exchange.round, own, exchange.action), before) for own in clients
    ]
    try:
        for work in works:
            work.go_on(partial(engine.prepare, exchange, work.number))
            work.cost.flops = work.cost.seconds = 0  # that of a reference has a cost of its own
        reset_peak_memory()
        for work in works:
            if work.error is None:
                work.go_on(partial(_begin, engine, exchange, work))
        while waiting := [work for work in works if work.asked is not None]:
            for work, outcome in zip(waiting, _trained(engine, waiting), strict=True):
                work.take(outcome)
        return {work.number: _answer(engine, work) for work in works}
    except MemoryError:
        LOG.warning(
            "round %d: memory does not suffice for %d clients together; they are trained one by one, "
            "with the same results up to rounding: a smaller simulation.cohort says so from the start",
            exchange.round,
            len(clients),
        )
    finally:
        before()
        model.flops = flops
        engine.ledger.costs.extend(work.cost for work in works)
    for work in works:
        work.steps = work.asked = None
        engine.forget_attempt(work.number)
    return {client: engine.answer(exchange, client) for client in clients}


def _begin(engine: SimulationEngine, exchange: Exchange, work: _Work) -> Training | None:
    """Have a client's handler begin, with parameters of its own to write into."""
    work.cost.bytes_down, work.cost.exchanges = exchange.bytes_down(work.number), 1
    work.link = engine.link(exchange, work.number)
    work.model.hold(work.model.parameters_of(dict(work.model.parameters)))
    work.client = engine.client(work.number, exchange.round, work.link)
    reply = engine.handlers[exchange.action](work.client, work.link.payload)
    if isinstance(reply, Generator):
        work.steps = reply
        return next(work.steps)
    if exchange.action not in engine.alone and work.client.last is not None:
        LOG.warning(
            "simulation.cohort: clients are trained one by one, as the method's handler of %r trains a "
            "client by itself (it would have to be a generator: client.training_steps)",
            exchange.action,
        )
    engine.alone.add(exchange.action)
    work.reply = reply
    return None


def _trained(engine: SimulationEngine, works: Sequence[_Work]) -> list[Outcome]:
    """Make the trainings that some clients wait for: those that are alike together."""
    alike: dict[object, list[int]] = {}
    trainings = []
    for place, work in enumerate(works):
        assert work.asked is not None, "it waits"
        trainings.append(work.asked)
        work.put_back()
        key = likeness(work.asked) if not reason_against(work.model) else place
        alike.setdefault(key, []).append(place)
    found: dict[int, Outcome] = {}
    for places in alike.values():
        if len(places) > 1:
            budget = tokens_together(works[0].model) if engine.cohort == "auto" else None
            own = [trainings[place] for place in places]
            holders = [works[place].put_back for place in places]
            found |= zip(places, train_together(own, holders, budget), strict=True)
        else:
            works[places[0]].put_back()
            found[places[0]] = alone(trainings[places[0]])
    return [found[place] for place in range(len(works))]


def _answer(engine: SimulationEngine, work: _Work) -> Answer:
    """Return a client's answer, once its handler has ended, and let what it has stored count."""
    work.cost.peak_memory = peak_memory()
    client, reply, link = work.client, work.reply, work.link
    try:
        if client is not None:
            engine.count_training(work.cost, client)
        if work.error is not None:
            raise work.error
        assert client is not None and reply is not None and link is not None, "it has ended"
        encoded = engine.encoded_reply(link, client, reply, work.cost)
        engine.store.stage(work.number, link.stored(client.store))
        return Answer(work.number, encoded)
    except Exception as error:
        engine.forget_attempt(work.number)
        return Answer(work.number, error=engine.error_text(error))
