"""A plugin: play an experiment's rounds over the real engine, without a run folder."""

from dataclasses import dataclass

import pytest

from fedloom.federation.admission import Admission
from fedloom.federation.compressed_exchange import Compression
from fedloom.federation.rounds import Server
from fedloom.federation.secure_exchange import SecureAggregation
from fedloom.runs.answer_order import order_of_answers
from fedloom.runs.assembly import assemble
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.training.optimizers import round_learning_rate
from fedloom.training.results import reported
from fedloom.wire.messages import Answer


@dataclass
class Federation:
    """What came of rounds that were played without a run folder."""

    parts: object
    state: object
    records: list
    compression: Compression | None = None

    @property
    def adapter(self):
        return self.parts.method.shared(self.state)

    def costs(self, client, round=-1):
        return [c for c in self.records[round].costs if c.client == client]


@pytest.fixture
def federate():
    """Play an experiment's rounds over the real engine; ``break_`` may change it before they start.

    ``after`` is called with each record and the parts once a round is over.
    """

    def play(
        experiment,
        break_=lambda parts: None,
        evaluate=False,
        after=lambda *_: None,
        disk_buffer=None,
    ):
        parts = assemble(experiment, partition_data(experiment))
        break_(parts)
        records = []

        def finish(record, state):
            parts.engine.finish_round()
            records.append(record)
            after(record, parts)

        rounds = experiment.federation.rounds
        admission = Admission(experiment.admission)
        seed = experiment.federation.seed
        compression = Compression.of(experiment.wire, seed, parts.initial)
        server = Server(
            parts.method,
            parts.engine,
            experiment.federation,
            lambda round: round_learning_rate(experiment.training, round, rounds),
            lambda state, round: (
                (
                    evaluate
                    and parts.evaluator.evaluate(
                        state, round, parts.engine, parts.model, parts.ledger, admission
                    )
                )
                or None
            ),
            finish,
            parts.ledger,
            Silent(),
            admission,
            disk_buffer=disk_buffer,
            reported=reported(parts.objective),
            clock=order_of_answers(experiment),
            secure=SecureAggregation.of(experiment.privacy, "run"),
            compression=compression,
        )
        state = server.run(parts.method.initial_state(parts.initial), -1 if evaluate else 0)
        return Federation(parts, state, records, compression)

    return play


@pytest.fixture
def compressed(experiment):
    """Make an experiment with three clients and ``[wire]``."""

    def make(wire, **sections):
        own = {"keep_plain_below": 0, **wire}
        federation = {"rounds": 3, **sections.pop("federation", {})}
        training = {"local_steps": 1, **sections.pop("training", {})}
        judged = {"per_client": False}
        return experiment(
            wire=own, federation=federation, training=training, evaluation=judged, **sections
        )

    return make


class Sent:
    """What clients changed, what the server read of it, and the requests, by round and client.

    Attributes:
        absent: Clients that give no answer, by round.
    """

    def __init__(self, absent=None):
        self.absent = absent or {}
        self.changed, self.read, self.exchanges = {}, {}, {}

    def watch_requests(self, parts):
        """Have an engine's exchanges be noted by round."""
        carried = parts.engine.exchange

        def exchange(asked):
            self.exchanges[asked.round] = asked
            yield from carried(asked)

        parts.engine.exchange = exchange

    def watch(self, parts):
        """Have an engine's exchanges and its handler of training be looked at."""
        handler = parts.local.handlers["train"]

        def train(client, payload):
            reply = yield from handler(client, payload)
            change = {n: t - payload.tensors[n] for n, t in reply.tensors.items()}
            self.changed[client.round, client.id] = change
            return reply

        self.watch_requests(parts)
        noted = parts.engine.exchange

        def exchange(asked):
            for answer in noted(asked):
                if answer.client in self.absent.get(asked.round, ()):
                    yield Answer(answer.client, error="its line broke")
                    continue
                sent = asked.sent_to(answer.client)
                found = asked.read_reply(answer.client, answer.data)
                change = {n: t - sent[n] for n, t in found.tensors.items()}
                self.read[asked.round, answer.client] = change
                yield answer

        parts.local.handlers = {**parts.local.handlers, "train": train}
        parts.engine.exchange = exchange
