"""Unseen clients, which take no part in training: the benefit of the federation for them.

Each receives the shared state, has initial personal parts, trains some steps on its own rows, and is
evaluated on its held-out rows before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedloom.evaluation.held_out import HeldOut
from fedloom.evaluation.metrics import HELD_OUT, METRICS
from fedloom.federation.admission import Admission
from fedloom.federation.engine import Engine
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.method import Method
from fedloom.security.audit_log import Record, no_op_recorder
from fedloom.tensors import State
from fedloom.training.settings import Work
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import Schema, prefixed

ACTION = "join"
AFTER = "after."
"""Prefix of the metrics after the steps."""


@dataclass(frozen=True)
class UnseenClients:
    """Evaluates unseen clients.

    Attributes:
        method: Defines what a client is sent and how it personalises.
        clients: Their ids.
        held_out: Each one's held-out rows.
        steps: Optimizer steps that each makes.
        learning_rate: Of these.
        kind: Kind of the held-out rows, as they are judged.
    """

    method: Method
    clients: Sequence[int]
    held_out: Mapping[int, HeldOut]
    steps: int
    learning_rate: float
    kind: str

    def handler(self) -> Handler:
        """Return the client side of the exchange."""

        def join(client: Client, payload: Payload) -> Payload:
            own = self.held_out[client.id]
            self.method.load(client, payload)
            before = own.score(client.model)
            self.method.personalise(client, self.learning_rate, Work(steps=self.steps))
            after = {AFTER + name: value for name, value in own.score(client.model).items()}
            client.store.clear()
            return Payload(numbers={"held_out": len(own)}, metrics={**before, **after})

        return join

    def evaluate_all(
        self,
        state: State,
        round: int,
        engine: Engine,
        admission: Admission,
        audit: Record = no_op_recorder,
    ) -> dict[int, dict[str, float]]:
        """Evaluate them after ``round``; return their metrics, those after their steps as ``after.``."""
        shared = self.method.sent_to_unseen(state)
        if not self.clients:
            return {}
        own = METRICS[self.kind]
        exchange = Exchange.broadcast(
            ACTION,
            round,
            tuple(self.clients),
            Payload(shared or {}),
            Schema.of(shared or {}),
            Schema((), (HELD_OUT,), own + prefixed(AFTER, own)),
        )
        replies, _ = admission.accept(
            engine.exchange(exchange), exchange, engine.sizes(), audit=audit
        )
        return {
            reply.client: {**reply.payload.metrics, "examples": reply.payload.numbers["held_out"]}
            for reply in replies
        }
