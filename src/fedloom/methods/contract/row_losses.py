"""What a client's rows lose under the model that it would use now: an exchange of its own.

Selections that go by losses ask for them before clients train (``federation/selection_contract.py``). A
client is sent what it is sent to be judged with, so that it works for every method whose clients hold a
whole model. It answers with two numbers over :data:`LEAST_ROWS` of its rows or more, or over all of
them where it has fewer. Means over two known sets of rows can be subtracted from each other, and carry
no noise.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from fedloom.accounting.costs import ROW_LOSSES
from fedloom.errors import MessageError, TrainingError
from fedloom.federation.informed_selection import LEAST_ROWS
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.method import Method
from fedloom.tensors import State
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import NumberSpec, Schema, amount, score

ROWS = NumberSpec("rows", LEAST_ROWS, 2.0**40)
"""Most rows whose losses are asked for."""

LOSS, ROOT_MEAN_SQUARE = score("loss"), amount("root_mean_square")


@dataclass(frozen=True)
class RowLosses:
    """Both sides of the exchange.

    Attributes:
        method: Says what a client would use.
    """

    method: Method

    def handler(self) -> Handler:
        """Return the client side."""

        def losses(client: Client, payload: Payload) -> Payload:
            rows = payload.numbers["rows"]
            if rows < LEAST_ROWS:
                raise MessageError(
                    f"losses of {rows:g} rows are asked for, {LEAST_ROWS} is the least"
                )
            self.method.load(client, payload)
            return Payload(numbers=summary(*client.row_losses(int(rows))))

        return losses

    def request(self, state: State, round: int, clients: Collection[int], rows: int) -> Exchange:
        """Return the exchange in which clients are asked.

        Args:
            state: Before the round.
            round: From 1.
            clients: Who is asked.
            rows: Most rows of each.
        """
        sent = self.method.sent_for_evaluation(state) or {}
        return Exchange.broadcast(
            ROW_LOSSES,
            round,
            tuple(sorted(clients)),
            Payload(sent, {"rows": float(rows)}),
            Schema.of(sent, (ROWS,)),
            Schema((), (LOSS, ROOT_MEAN_SQUARE)),
        )


def summary(losses: list[float], weights: list[float]) -> dict[str, float]:
    """Return the mean of some rows' losses, weighted, and their root mean square, by name.

    Raises:
        TrainingError: There is none, or one is not finite.
    """
    total = math.fsum(weights)
    if not total or not all(map(math.isfinite, losses)):
        raise TrainingError("the losses of its rows are not finite, or nothing counts in them")
    mean = math.fsum(w * own for w, own in zip(weights, losses, strict=True)) / total
    square = math.fsum(own * own for own in losses) / len(losses)
    return {"loss": mean, "root_mean_square": math.sqrt(square)}
