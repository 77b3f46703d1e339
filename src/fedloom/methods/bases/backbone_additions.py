"""Base class of methods that add the clients' updates to the backbone itself.

Averaging LoRA's A and B apart is not averaging their products. These methods keep the sum exact: what the
factors of one low rank cannot hold is sent to every client as stacked factors after each round, and
server and clients add the product to the frozen weights. A client keeps the sum of these products, as
large as the layers that LoRA is beside, and the weights as they were loaded stay the reference model's.

Each addition has a number. A client that missed some is sent them before it trains, in the same round:
one by one, or the sum of all additions where that is smaller. The server stores, by client id, the number
of additions that each client has, and the additions that a client lacks, while they are smaller than the
sum. A new client is sent the sum, and so is a client that did not confirm an addition, as its state is
then unknown. A client that turns out to lack some (its store is lost) would train another model: it
reports that, and is left out until the next round.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace

import torch

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.lora import only_factors
from fedloom.errors import TrainingError
from fedloom.federation.protocol import Cohort, Replies, Round
from fedloom.methods.bases.packed_factors import FACTORS, pack, unpack
from fedloom.methods.bases.parameter_averaging import (
    ADAPTER,
    TRAIN_REPLY_NUMBERS,
    training_exchange,
)
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.method import Method, ServerSide
from fedloom.models.backbone_delta import MOVED, products
from fedloom.tensors import State, Tensors, join_parts, part_of, tensor_bytes
from fedloom.wire.messages import Exchange, Payload, Reply
from fedloom.wire.schema import Schema, amount

BASE = "base"
"""Part of the state, and slot of the client store, with the sum of all products."""

ADDITIONS = "merges"
"""Number of rounds whose products are in the sum."""

ADDITION_COUNT = amount(ADDITIONS)
"""The same number in messages."""

MADE = "made/"
"""Prefix of the id of a client that is out of date: the number of its additions; 0 where unknown."""

ADDITION = "addition/"
"""Prefix of the number of an addition that some client lacks: its packed factors."""

OUT_OF_DATE = "behind "
"""Prefix of the id of such a client in checkpoints of an earlier release, without the number."""


class BackboneAdditions(Method):
    """A method whose rounds end with factors that server and clients add to the backbone.

    A subclass defines the training of a round (:meth:`training`), the next adapter and the factors to add
    (:meth:`combined`), and the adapter that a client trains from (:meth:`start`).

    Attributes:
        fresh: The server's adapter as it was initialised.
        scaling: Of LoRA's products.
    """

    changes_backbone = True
    two_factors = True
    fresh: Tensors
    scaling: float

    def setup(self, server: ServerSide) -> None:
        """Store the adapter's shapes and scaling."""
        super().setup(server)
        self.fresh, self.scaling = server.model.read(), server.model.scaling

    def training(self, cohort: Cohort, adapter: Tensors, additions: int) -> Exchange:
        """Return the training exchange of the cohort; its request has the number ``additions``."""
        return training_exchange(cohort, adapter, {ADDITION_COUNT: float(additions)})

    def combined(self, replies: Sequence[Reply], cohort: Cohort) -> tuple[Tensors, Tensors]:
        """Return the next round's adapter, and the factors whose products are added to the backbone."""
        raise TypeError(f"{type(self).__name__} must define combined(replies, cohort)")

    def kept(self, adapter: Tensors) -> Tensors:
        """Return the part of an adapter that the state keeps; here all of it."""
        return adapter

    def start(self, client: Client, payload: Payload) -> Tensors:
        """Return the adapter that a client trains from; here the one it received."""
        return payload.tensors

    def upload(self, trained: Tensors) -> Tensors:
        """Return the part of the trained adapter that a client sends; here all of it."""
        return trained

    def initial_state(self, adapter: Tensors) -> State:
        """Return the adapter with no additions."""
        return State(join_parts(adapter=self.kept(adapter)), {ADDITIONS: 0.0})

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send missing additions; train; send the new factors to be added by all."""
        adapter, base = part_of(state.tensors, ADAPTER), part_of(state.tensors, BASE)
        additions, earlier = int(state.numbers[ADDITIONS]), _additions(state)
        out_of_date = yield from self._catch_up_all(
            cohort, base, earlier, additions, _out_of_date(state)
        )
        there = tuple(client for client in cohort.clients if client not in out_of_date)
        replies = yield self.training(replace(cohort, clients=there), adapter, additions)
        adapter, factors = self.combined(replies, cohort)
        added, base = pack(factors), self._moved(base, factors)
        asked = [client for client in cohort.presence.available if client not in out_of_date]
        confirmed = yield self._send("merge", cohort, asked, added, additions + 1)
        made = {client: out_of_date.get(client, additions) for client in cohort.presence.members}
        made |= dict.fromkeys(cohort.presence.left, 0)  # if it is ever allowed again
        made |= dict.fromkeys(asked, 0) | dict.fromkeys(confirmed.answered, additions + 1)
        lacking = {client: count for client, count in made.items() if count <= additions}
        kept = _still_wanted({**earlier, additions + 1: added}, lacking, tensor_bytes(base))
        numbers = {f"{MADE}{client:06d}": float(count) for client, count in lacking.items()}
        tensors = join_parts(adapter=adapter, base=base)
        for number, factors in kept.items():
            tensors |= {f"{ADDITION}{number:06d}/{name}": t for name, t in factors.items()}
        return State(tensors, {ADDITIONS: additions + 1.0, **numbers})

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train, "merge": self._merge, "catch_up": self._catch_up}

    def shared(self, state: State) -> Tensors:
        """Return the adapter and the changes of the backbone."""
        return {
            **self.fresh,
            **part_of(state.tensors, ADAPTER),
            **part_of(state.tensors, BASE),
        }

    def sent_for_evaluation(self, state: State) -> Tensors:
        """Return the adapter alone, with the number of additions that it goes with."""
        additions = torch.tensor([int(state.numbers[ADDITIONS])])
        return {**part_of(state.tensors, ADAPTER), ADDITIONS: additions}

    def sent_to_unseen(self, state: State) -> Tensors:
        """Return the changes of the backbone too."""
        return {**self.sent_for_evaluation(state), **part_of(state.tensors, BASE)}

    def load(self, client: Client, payload: Payload) -> None:
        """Write the backbone's changes, received or kept, and the adapter received."""
        adapter = {n: t for n, t in payload.tensors.items() if n != ADDITIONS}
        received = any(name.startswith(MOVED) for name in adapter)
        base = {} if received else self._base(client, int(payload.tensors[ADDITIONS]))
        client.model.write({**client.initial, **adapter, **base})

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the adapter down and up, and then the stacked factors down."""
        factors = tensor_bytes(only_factors(adapter))
        down = tensor_bytes(self.kept(adapter))
        return ParameterTraffic(down, tensor_bytes(adapter), also_down=self.stacked() * factors)

    def stacked(self) -> int:
        """Return how many clients' factors are sent to all clients after a round; here a cohort's."""
        return self.server.cohort

    def _catch_up_all(
        self,
        cohort: Cohort,
        base: Tensors,
        earlier: Mapping[int, Tensors],
        additions: int,
        out_of_date: Mapping[int, int],
    ) -> Generator[Exchange, Replies, dict[int, int]]:
        """Send missing additions; return the clients that are still out of date, with their numbers."""
        made = dict(out_of_date)
        there = [client for client in cohort.presence.available if client in made]
        size = tensor_bytes(base)
        in_parts = {c for c in there if _bytes_lacking(earlier, made[c], additions) < size}
        whole = [client for client in there if client not in in_parts]
        if whole:
            confirmed = yield self._send("catch_up", cohort, whole, base, additions)
            made |= dict.fromkeys(confirmed.answered, additions)
        for number in sorted(earlier):
            asked = [client for client in in_parts if made[client] == number - 1]
            if asked:
                confirmed = yield self._send("merge", cohort, asked, earlier[number], number)
                made |= dict.fromkeys(asked, 0) | dict.fromkeys(confirmed.answered, number)
        return {client: count for client, count in made.items() if count < additions}

    def _send(
        self,
        action: str,
        cohort: Cohort,
        clients: Collection[int],
        tensors: Tensors,
        additions: int,
    ) -> Exchange:
        return Exchange.broadcast(
            action,
            cohort.round,
            tuple(sorted(clients)),
            Payload(tensors, {ADDITIONS: float(additions)}),
            Schema.of(tensors, (ADDITION_COUNT,)),
            Schema(numbers=TRAIN_REPLY_NUMBERS),
        )

    def _moved(self, base: Tensors, factors: Tensors) -> Tensors:
        changes = products(factors, self.scaling)
        return {name: base[name] + t if name in base else t for name, t in changes.items()}

    def _base(self, client: Client, additions: int) -> Tensors:
        """Return a client's changes of the backbone.

        Raises:
            TrainingError: It has not made all additions that the server has.
        """
        kept = client.store.get(BASE, {})
        own = int(kept[ADDITIONS]) if kept else 0
        if own != additions:
            raise TrainingError(
                f"its backbone has the additions of {own} of {additions} rounds; the server sends all of "
                "it before the next round"
            )
        return {name: tensor for name, tensor in kept.items() if name != ADDITIONS}

    def _train(self, client: Client, payload: Payload) -> Payload:
        base = self._base(client, int(payload.numbers[ADDITIONS]))
        client.model.write({**self.start(client, payload), **base})
        result = client.train(payload.numbers["learning_rate"])
        sent = self.upload(client.model.read())
        return Payload(sent, {"examples": len(client.share)}, result.metrics)

    def _merge(self, client: Client, payload: Payload) -> Payload:
        additions = int(payload.numbers[ADDITIONS])
        factors = unpack(payload.tensors, client.initial)
        base = self._moved(self._base(client, additions - 1), factors)
        rank = len(payload.tensors[FACTORS])
        client.model.flops += sum(2.0 * rank * change.numel() for change in base.values())
        return self._keep(client, base, additions)

    def _catch_up(self, client: Client, payload: Payload) -> Payload:
        return self._keep(client, payload.tensors, int(payload.numbers[ADDITIONS]))

    def _keep(self, client: Client, base: Tensors, additions: int) -> Payload:
        client.store[BASE] = {**base, ADDITIONS: torch.tensor([additions])}
        return Payload(numbers={"examples": len(client.share)})


def _out_of_date(state: State) -> dict[int, int]:
    """Return the clients that are out of date, each with the number of its additions."""
    found = {
        int(n.removeprefix(OUT_OF_DATE)): 0 for n in state.numbers if n.startswith(OUT_OF_DATE)
    }
    made = {n.removeprefix(MADE): v for n, v in state.numbers.items() if n.startswith(MADE)}
    return found | {int(client): int(count) for client, count in made.items()}


def _additions(state: State) -> dict[int, Tensors]:
    """Return the stored additions by number, ascending."""
    names = [n.removeprefix(ADDITION) for n in state.tensors if n.startswith(ADDITION)]
    numbers = sorted({name.partition("/")[0] for name in names})
    return {int(number): part_of(state.tensors, f"{ADDITION}{number}") for number in numbers}


def _bytes_lacking(earlier: Mapping[int, Tensors], made: int, additions: int) -> float:
    """Return the bytes of the additions after the first ``made``; infinite where one is not kept."""
    lacking = range(made + 1, additions + 1)
    if any(number not in earlier for number in lacking):
        return math.inf
    return sum(tensor_bytes(earlier[number]) for number in lacking)


def _still_wanted(
    additions: Mapping[int, Tensors], lacking: Mapping[int, int], most: int
) -> dict[int, Tensors]:
    """Return the additions of which some client lacks less than ``most`` bytes."""
    newest = max(additions)
    counts = [
        made for made in lacking.values() if made and _bytes_lacking(additions, made, newest) < most
    ]
    oldest = min(counts, default=newest)
    return {number: own for number, own in sorted(additions.items()) if number > oldest}
