"""Evaluates one state on the server's held-out set and on every client's own.

Clients are asked through an exchange like any other, so the same code serves every engine and its
bytes are counted. Clients with personal models are evaluated with these, also on the global set: means
over clients are given beside the server's figures, or instead of them where it has no model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedloom.accounting.costs import SERVER
from fedloom.accounting.ledger import Ledger
from fedloom.evaluation.held_out import HeldOut
from fedloom.evaluation.metrics import HELD_OUT, METRICS
from fedloom.federation.admission import Admission
from fedloom.federation.engine import Engine
from fedloom.federation.protocol import EVALUATE
from fedloom.federation.records import Evaluation
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.method import Method
from fedloom.models.adapters import AdapterModel
from fedloom.security.audit_log import Record, no_op_recorder
from fedloom.tensors import State, Tensors
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import NumberSpec, Schema, fraction, prefixed

COMMON = "common."
"""Prefix of metrics on the global set that clients report for their own adapters."""

ALSO_COMMON = fraction("common")
"""Whether clients judge on the global set too."""

CLIENTS = "clients_"
"""Prefix of the means of these over clients, where the server has figures of its own."""


@dataclass(frozen=True)
class Evaluator:
    """Everything an evaluation needs.

    Attributes:
        method: Says what the global adapter is and what a client would use.
        held_out: The global held-out set, as the server's model reads it.
        common: The same as each client's model reads it.
        client_held_out: Own held-out sets of the clients in this process.
        judged: Clients that have one, wherever they are.
        every: Rounds between evaluations.
        rounds: Rounds in all; the last is always evaluated.
        kind: Kind of the clients' own held-out rows, as they are judged.
        keeps_rows: Whether each round's evaluation is recorded by rows, since any may be the run's last.
    """

    method: Method
    held_out: HeldOut
    common: Mapping[int, HeldOut]
    client_held_out: Mapping[int, HeldOut]
    judged: Collection[int]
    every: int
    rounds: int
    kind: str
    keeps_rows: bool = False

    def handler(self) -> Handler:
        """Return the client side of the exchange."""

        def evaluate(client: Client, payload: Payload) -> Payload:
            self.method.load(client, payload)
            metrics: dict[str, float] = {}
            examples = 0
            own = self.client_held_out.get(client.id)
            if own is not None:
                metrics |= own.score(client.model)
                examples = len(own)
            if payload.numbers["common"] and len(self.common[client.id]):
                # elsewhere the coordinator alone has the set
                common = self.common[client.id].score(client.model)
                metrics |= {COMMON + name: value for name, value in common.items()}
            return Payload(numbers={"held_out": examples}, metrics=metrics)

        return evaluate

    def evaluate(
        self,
        state: State,
        round: int,
        engine: Engine,
        model: AdapterModel,
        ledger: Ledger,
        admission: Admission,
        audit: Record = no_op_recorder,
    ) -> Evaluation | None:
        """Judge ``state`` after ``round``, or return ``None`` in a round that does not evaluate.

        Args:
            state: The server's state.
            round: 0 before any training.
            engine: Where the clients are.
            model: The server's own model.
            ledger: Where the server's costs go.
            admission: Checks the clients' answers; who is in quarantine is not asked.
            audit: Where messages are noted.
        """
        if round % self.every and round != self.rounds:
            return None
        adapter = self.method.shared(state)
        sent = self.method.sent_for_evaluation(state)
        clients = {} if self.method.pools_data else self._ask(sent, round, engine, admission, audit)
        common = _means([_part(metrics, COMMON) for metrics in clients.values()])
        clients = {c: m for c, m in ((c, _without(m, COMMON)) for c, m in clients.items()) if m}
        if adapter is None:
            return Evaluation(common, clients)
        with ledger.measure(round, SERVER, EVALUATE) as cost:
            before = model.flops
            model.write(adapter)
            metrics = self.held_out.score(model)
            if self.method.pools_data:  # all rows are here, the clients' held-out ones too
                for client, rows in self.client_held_out.items():
                    clients[client] = {**rows.score(model), "examples": len(rows)}
            cost.flops, cost.examples = model.flops - before, len(self.held_out)
        return Evaluation(
            {**metrics, **{CLIENTS + n: v for n, v in common.items()}},
            clients,
            self.held_out.sample,
            kept=self.keeps_rows or round in (0, self.rounds),
        )

    def loss_of(
        self, tensors: Tensors, round: int, model: AdapterModel, ledger: Ledger
    ) -> float | None:
        """Return the loss of the global held-out set under an adapter, while a round is under way.

        Args:
            tensors: The adapter, and maybe others beside.
            round: The round to which its cost belongs.
            model: The server's own model, which holds afterwards what it held before.
            ledger: Where the cost goes.

        Returns:
            The loss; ``None`` where there are no rows, no such metric, or ``tensors`` hold no adapter of
            ``model``.
        """
        shapes = {name: parameter.shape for name, parameter in model.parameters.items()}
        fits = all(name in tensors and tensors[name].shape == own for name, own in shapes.items())
        if not len(self.held_out) or not shapes or not fits:
            return None
        with ledger.measure(round, SERVER, EVALUATE) as cost:
            before = model.flops
            with model.holding({name: tensors[name] for name in shapes}):
                found = self.held_out.score(model).get("loss")
            cost.flops, cost.examples = model.flops - before, len(self.held_out)
        return found

    def reported(self, *, common: bool) -> tuple[NumberSpec, ...]:
        """Return names and ranges of what clients report, with ``common`` of the global set too."""
        return METRICS[self.kind] + (
            prefixed(COMMON, METRICS[self.held_out.kind]) if common else ()
        )

    def _ask(
        self,
        adapter: Tensors | None,
        round: int,
        engine: Engine,
        admission: Admission,
        audit: Record,
    ) -> dict[int, dict[str, float]]:
        """Ask clients to judge what they make of ``adapter``; if ``None``, on the global set too."""
        sizes = engine.sizes()
        asked = sizes if adapter is None else [c for c in sizes if c in self.judged]
        if not asked:
            return {}
        exchange = Exchange.broadcast(
            EVALUATE,
            round,
            tuple(asked),
            Payload(adapter or {}, {"common": float(adapter is None)}),
            Schema.of(adapter or {}, (ALSO_COMMON,)),
            Schema((), (HELD_OUT,), self.reported(common=adapter is None)),
        )
        exchange = admission.without_paused(exchange)
        replies, _ = admission.accept(engine.exchange(exchange), exchange, sizes, audit=audit)
        return {
            reply.client: dict(reply.payload.metrics)
            | ({"examples": reply.payload.numbers["held_out"]} if reply.payload.metrics else {})
            for reply in replies
        }


def _part(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {n.removeprefix(prefix): v for n, v in metrics.items() if n.startswith(prefix)}


def _without(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(prefix)}


def _means(all_metrics: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for metrics in all_metrics for name in metrics})
    return {
        name: sum(m[name] for m in all_metrics if name in m) / sum(name in m for m in all_metrics)
        for name in names
    }
