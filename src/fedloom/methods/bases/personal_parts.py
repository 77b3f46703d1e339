"""Base classes of methods with personal parts, which stay with the client.

Of :class:`KeepsParts` the shared tensors are averaged as in FedAvg; the others are trained with them,
kept between rounds in the client's store, and are in no message, as no schema of an exchange contains
them.
"""

from __future__ import annotations

from collections.abc import Collection

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import (
    ADAPTER,
    TRAIN_REPLY_NUMBERS,
    training_exchange,
)
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import Method, ServerSide
from fedloom.tensors import State, Tensors, tensor_bytes
from fedloom.training.results import LocalResult
from fedloom.training.settings import Part, Work
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import NumberSpec, Schema

PERSONAL = "personal"
"""Slot of the client store with the personal tensors."""

PERSONAL_FIRST = "personal "
"""Purpose of a separate training of the personal tensors."""


class KeepsParts(Method):
    """FedAvg of some tensors; :meth:`keeps` defines the personal ones.

    Attributes:
        fresh: Initial values of the personal tensors.
    """

    averages = True

    personal = True
    fresh: Tensors

    def keeps(self, name: str) -> bool:
        """Return whether the tensor with this name is personal."""
        raise TypeError(f"{type(self).__name__} must define keeps(name)")

    def setup(self, server: ServerSide) -> None:
        """Store the initial personal tensors, with which the server evaluates the shared ones."""
        super().setup(server)
        self.fresh = self.own(server.model.read())

    def own(self, tensors: Tensors) -> Tensors:
        """Return the personal tensors."""
        return {name: tensor for name, tensor in tensors.items() if self.keeps(name)}

    def common(self, tensors: Tensors) -> Tensors:
        """Return the shared tensors."""
        return {name: tensor for name, tensor in tensors.items() if not self.keeps(name)}

    def initial_state(self, adapter: Tensors) -> State:
        """Return a state of the shared tensors."""
        return State(self.common(adapter))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the shared tensors, average the answers."""
        replies = yield training_exchange(cohort, state.tensors)
        return State(self.averaged(replies, cohort, state.tensors, noted=True))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def shared(self, state: State) -> Tensors:
        """Return the adapter of an unseen client: shared tensors and initial personal ones."""
        return {**self.fresh, **state.tensors}

    def sent_for_evaluation(self, state: State) -> Tensors:
        """Return the shared tensors alone."""
        return state.tensors

    def sent_shapes(self, adapter: Tensors) -> Tensors:
        """Return the shared tensors."""
        return self.common(adapter)

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the shared tensors, down and up."""
        size = tensor_bytes(self.common(adapter))
        return ParameterTraffic(size, size)

    def load(self, client: Client, payload: Payload) -> None:
        """Load the shared tensors and the personal ones, or initial ones before the first training."""
        own = client.store.get(PERSONAL) or self.own(client.initial)
        client.model.write({**own, **payload.tensors})

    def personalise(self, client: Client, learning_rate: float, work: Work) -> None:
        """Train the personal tensors with the shared ones frozen; without personal ones train all."""
        common = [name for name in client.model.parameters if not self.keeps(name)]
        frozen = common if len(common) < len(client.model.parameters) else []
        client.train(learning_rate, purpose="settling ", frozen=frozen, work=work)

    def fit(self, client: Client, learning_rate: float) -> Trainings[LocalResult]:
        """Train the loaded adapter; here all of it at once."""
        return client.training_steps(learning_rate)

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        self.load(client, payload)
        result = yield from self.fit(client, payload.numbers["learning_rate"])
        trained = client.model.read()
        if self.personal:
            client.store[PERSONAL] = self.own(trained)
        return Payload(self.common(trained), {"examples": len(client.share)}, result.metrics)


class KeepsAdapter(Method):
    """A method whose clients have a whole personal adapter beside the shared one."""

    personal = True

    def load(self, client: Client, payload: Payload) -> None:
        """Load the client's personal adapter if there is one, otherwise the shared one."""
        before = client.initial if client.own_start else payload.tensors
        client.model.write(client.store.get(ADAPTER, before))


def ask_everybody(
    action: str, cohort: Cohort, adapter: Tensors, metrics: tuple[NumberSpec, ...]
) -> Exchange:
    """Send ``adapter`` to every available client, in the cohort or not; replies hold only numbers.

    These are the examples and the declared ``metrics``.
    """
    return Exchange.broadcast(
        action,
        cohort.round,
        tuple(sorted(cohort.sizes)),
        Payload(adapter),
        Schema.of(adapter),
        Schema(numbers=TRAIN_REPLY_NUMBERS, metrics=metrics),
    )


def one_after_the_other(
    client: Client, learning_rate: float, own: Collection[str], common: Collection[str]
) -> Trainings[LocalResult]:
    """Train the personal tensors with the shared ones frozen, then the shared ones (FedRep).

    Each part gets the whole of the client's work, or half of it where an amount is of the round.
    """
    of = 2 if common else 1
    first = yield from client.training_steps(
        learning_rate, purpose=PERSONAL_FIRST, frozen=common, part=Part(0, of)
    )
    if not common:
        return first
    return (yield from client.training_steps(learning_rate, frozen=own, part=Part(1, of)))
