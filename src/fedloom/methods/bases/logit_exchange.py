"""Base of methods by which clients and server teach each other by their logits on public rows.

A round: each client trains its own adapter on its own rows, and sends what it says about public rows; the
server puts the answers together (:meth:`LogitExchange.lesson`) and its own model, which may be larger or
of another architecture, learns from them; it sends back what its model says now (or the clients'
consensus), and clients distil that.

Public rows are drawn from (seed, "public", round), which every party knows, so no ids travel. A client
keeps its adapter from round to round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch

from fedloom.accounting.costs import SERVER
from fedloom.accounting.traffic import LogitTraffic, Traffic
from fedloom.aggregation.soft_labels import SoftLabels, shortened
from fedloom.data.batching import epoch_batches
from fedloom.data.client_rows import Teacher
from fedloom.data.public import PublicRows
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.logit_wire import LogitSettings, SoftLabelWire, answers
from fedloom.methods.bases.parameter_averaging import ADAPTER, LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.contract.checks import tasks_only
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import FirstRound, Method, ModelSpec
from fedloom.methods.declaration import TOGETHER, Absence, Declaration, Fidelity, no, yes
from fedloom.objectives.base import Head, Objective
from fedloom.objectives.distillation import Distillation
from fedloom.randomness import generator
from fedloom.tensors import State, Tensors
from fedloom.training.results import reported
from fedloom.training.settings import Part, Work
from fedloom.training.steps import train_locally
from fedloom.wire.messages import Exchange, Payload, Reply
from fedloom.wire.schema import Schema, prefixed

DISTIL = "distil_"
"""Before the names of what clients report of learning from the server."""

TAKEN = (
    "temperature",
    "teacher_share",
    "top_k",
    "top_mass",
    "encoding",
    "down",
    "rows_per_round",
    "server_epochs",
)
"""Settings of all of them that clients take over."""


def exchanging_logits(title: str, paper: str, fidelity: Fidelity, difference: str) -> Declaration:
    """Return what a method is whose parties learn from each other's logits on public rows."""
    return Declaration(
        title,
        paper,
        fidelity,
        difference,
        "KD-FedLLM",
        "logits on public rows, up and down",
        "an adapter of its own",
        secure_aggregation=no("answers are put together text by text"),
        client_privacy=no("an answer is not a change of parameters"),
        row_privacy=yes("logits are those of a model that private steps made"),
        asynchronous=TOGETHER,
        compression=no("logits have an encoding of their own: method.encoding"),
        absence=Absence(
            "the teacher is made of those that answered",
            "learns from the next round's teacher, with its own adapter as it was",
            "is in no teacher",
        ),
    )


@dataclass(frozen=True)
class Lesson:
    """What a server's model learns from in a round.

    Attributes:
        teacher: Knows the answers about the public rows' positions.
        objective: Whose batches carry them.
        consensus: What clients are sent where they learn from each other alone.
    """

    teacher: Teacher
    objective: Objective
    consensus: SoftLabels


class LogitExchange(Method):
    """Logits travel: up what clients say, down what the server's model has learnt from it."""

    own_models = True
    needs_public = True
    mixed_models = True
    shares_parameters = False
    bounded = MappingProxyType({"client_epochs": "max_steps", "server_rank": "max_rank"})
    named_models = ("server_model",)
    settings: LogitSettings

    def lesson(
        self,
        answers: Sequence[SoftLabels],
        replies: Sequence[Reply],
        public: PublicRows,
        cohort: Cohort,
    ) -> Lesson:
        """Return what the server's model learns from.

        Args:
            answers: What clients say about the round's public rows, one each.
            replies: The clients' replies, in the same order.
            public: The rows.
            cohort: Takes notes.
        """
        raise TypeError(
            f"{type(self).__name__} must define lesson(answers, replies, public, cohort)"
        )

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also what ranks and the server's own model do not go with."""
        yield from super().check(view)
        yield from tasks_only(view)
        method, adapter = view.method, view.adapter
        if adapter is not None and adapter.kind != "lora":
            for name, group in view.groups.items():
                if group.rank:
                    yield f"clients.groups.{name}.rank is a setting of lora"
            if method.server_rank:
                yield "method.server_rank is a setting of lora"
        if adapter is not None and adapter.start is not None:
            for name in ("server_model", "server_rank"):
                if getattr(method, name) is not None:
                    yield f"adapter.start is of one model and rank: leave method.{name} out"

    def server_model(self, spec: ModelSpec) -> ModelSpec:
        """Return the server's own, where the settings name one."""
        own = self.settings
        return ModelSpec(own.server_model or spec.path, own.server_rank or spec.rank)

    def compute(self, first: FirstRound) -> float:
        """Add scoring the public rows once, and learning from them."""
        assert first.public is not None, "the method's rows have been read"
        share = self.rows_of_round(first.public, first.seed, 1).share
        rows, training = np.arange(len(share)), first.training
        with torch.no_grad():
            scoring = first.passes(share, rows, scoring=True)
        order = generator(first.seed, "distil batches", first.client, 1)
        epochs = self.settings.client_epochs
        batches = epoch_batches(len(share), training.batch_size, order, epochs=epochs)
        learning = sum(first.passes(share, indices) for indices in batches)
        return first.own_rows() + (scoring + learning)

    def round(self, state: State, cohort: Cohort) -> Round:
        """Collect answers, learn from them, send back what is known then."""
        server, settings = self.server, self.settings
        assert server.public is not None, "assembly gives public rows to methods that need them"
        public = self.rows_of_round(server.public, server.seed, cohort.round)
        head = server.objective.head
        wire = SoftLabelWire(settings, public)
        replies = yield Exchange.broadcast(
            "train",
            cohort.round,
            cohort.clients,
            Payload(numbers={"learning_rate": cohort.learning_rate}),
            Schema(numbers=(LEARNING_RATE,)),
            Schema(wire.specs, TRAIN_REPLY_NUMBERS, cohort.reported),
            lambda client, payload: wire.check(payload.tensors),
        )
        with server.ledger.measure(cohort.round, SERVER, "train") as cost:
            before = server.model.flops
            lesson = self.lesson(
                [wire.unpack(reply.payload.tensors) for reply in replies],
                replies,
                public,
                cohort,
            )
            server.model.write(state.tensors)
            result = server.train(
                replace(public.share, teacher=lesson.teacher),
                lesson.objective,
                cohort,
                work=Work(epochs=settings.server_epochs),
                purpose="distil ",
            )
            if settings.down == "server":
                known = answers(server.model, public, head, settings, server.training)
            else:
                known = shortened(lesson.consensus, settings.top_k, settings.top_mass)
            tensors = server.model.read()
            cost.flops = server.model.flops - before
            cost.tokens, cost.examples, cost.steps = result.tokens, result.examples, result.steps
        yield Exchange.broadcast(
            "distil",
            cohort.round,
            tuple(reply.client for reply in replies),
            Payload(wire.pack(known), {"learning_rate": cohort.learning_rate}),
            Schema(wire.specs, (LEARNING_RATE,)),
            Schema(metrics=prefixed(DISTIL, reported(self.distillation(public, head)))),
        )
        return State(tensors)

    def trainings_of(self, round: int, rounds: int) -> int:
        """Train on the client's own rows, then on the public ones."""
        return 2

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train, "distil": self._distil}

    def traffic(self, adapter: Tensors) -> Traffic:
        """Return the closed form for the public rows of a round."""
        server, settings = self.server, self.settings
        assert server.public is not None, "assembly gives public rows to methods that need them"
        wire = SoftLabelWire(settings, self.rows_of_round(server.public, server.seed, 1))
        index = wire.index.itemsize if wire.sparse else 0
        return LogitTraffic(wire.positions, wire.k, settings.encoding, index, wire.adaptive)

    def load(self, client: Client, payload: Payload) -> None:
        """Write the client's own adapter, or the initial one before its first training."""
        client.model.write(client.store.get(ADAPTER, client.initial))

    def _train(self, client: Client, payload: Payload) -> Payload:
        self.load(client, payload)
        result = client.train(payload.numbers["learning_rate"], part=Part(0, 2))
        client.store[ADAPTER] = client.model.read()
        public, wire = self._client_rows(client)
        said = answers(client.model, public, client.objective.head, self.settings, client.training)
        numbers = {"examples": len(client.share)}
        return Payload(wire.pack(said), numbers, result.metrics)

    def _distil(self, client: Client, payload: Payload) -> Payload:
        public, wire = self._client_rows(client)
        wire.check(payload.tensors)
        self.load(client, payload)
        client.last = train_locally(
            client.model,
            replace(public.share, teacher=wire.unpack(payload.tensors)),
            self.distillation(public, client.objective.head),
            client.training,
            learning_rate=payload.numbers["learning_rate"],
            seed=client.seed,
            client=client.id,
            round=client.round,
            work=self._distilling(client),
            purpose="distil ",
            on_step=client.on_step,
        )
        client.store[ADAPTER] = client.model.read()
        metrics = client.last.metrics
        return Payload(metrics={DISTIL + name: value for name, value in metrics.items()})

    def _distilling(self, client: Client) -> Work:
        """Return how much a client distils: what is left of its round, or passes over public rows."""
        if client.training.amount_per == "round":
            return client.due(Part(1, 2))
        return Work(epochs=self.settings.client_epochs)

    def _client_rows(self, client: Client) -> tuple[PublicRows, SoftLabelWire]:
        assert client.public is not None, "the engine gives clients the public rows"
        public = self.rows_of_round(client.public, client.seed, client.round)
        return public, SoftLabelWire(self.settings, public)

    def rows_of_round(self, public: PublicRows, seed: int, round: int) -> PublicRows:
        """Return the public rows of a round, the same for every party."""
        total = len(public.share)
        count = self.settings.rows_per_round or total
        if count >= total:
            return public
        drawn = generator(seed, "public", round=round).choice(total, count, replace=False)
        return replace(public, share=public.share.take(np.sort(drawn)))

    def distillation(self, public: PublicRows, head: Head) -> Distillation:
        """Return the objective of who learns from soft labels about public rows."""
        settings = self.settings
        return Distillation(
            head, settings.temperature, settings.teacher_share, labelled=public.labelled
        )
