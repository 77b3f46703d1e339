"""What methods have in common whose clients keep some of what is trained.

Of :class:`KeepsParts` the shared tensors are averaged as in FedAvg; the others are trained with them,
kept between rounds in the client's store, and are in no message: the schema of every exchange has no
place for them.
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
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.method import Method, ServerSide
from fedloom.tensors import State, Tensors, tensor_bytes
from fedloom.training.results import LocalResult
from fedloom.training.settings import Part, Work
from fedloom.wire.messages import Exchange, Payload
from fedloom.wire.schema import NumberSpec, Schema

PERSONAL = "personal"
"""Where a client keeps its own tensors."""

PERSONAL_FIRST = "personal "
"""Purpose of the training of a client's own tensors, where it is one apart."""


class KeepsParts(Method):
    """FedAvg of some tensors; :meth:`keeps` says which stay with the client.

    Attributes:
        fresh: The kept tensors as every client starts with them.
    """

    averages = True

    personal = True
    fresh: Tensors

    def keeps(self, name: str) -> bool:
        """Return whether a client keeps the tensor of this name to itself."""
        raise TypeError(f"{type(self).__name__} must define keeps(name)")

    def setup(self, server: ServerSide) -> None:
        """Note what a client starts with: a newcomer's parts, by which the server judges its share."""
        super().setup(server)
        self.fresh = self.own(server.model.read())

    def own(self, tensors: Tensors) -> Tensors:
        """Return those tensors that a client keeps."""
        return {name: tensor for name, tensor in tensors.items() if self.keeps(name)}

    def common(self, tensors: Tensors) -> Tensors:
        """Return those tensors that travel."""
        return {name: tensor for name, tensor in tensors.items() if not self.keeps(name)}

    def initial_state(self, adapter: Tensors) -> State:
        """Keep the shared tensors alone."""
        return State(self.common(adapter))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the shared tensors, average what comes back."""
        replies = yield training_exchange(cohort, state.tensors)
        return State(self.averaged(replies, cohort, state.tensors, noted=True))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def shared(self, state: State) -> Tensors:
        """Return what a client has that just joined: the shared tensors and fresh ones of its own."""
        return {**self.fresh, **state.tensors}

    def sent_for_evaluation(self, state: State) -> Tensors:
        """Return the shared tensors alone."""
        return state.tensors

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the shared tensors, down and up."""
        size = tensor_bytes(self.common(adapter))
        return ParameterTraffic(size, size)

    def load(self, client: Client, payload: Payload) -> None:
        """Write the shared tensors and the client's own, or fresh ones before its first training."""
        own = client.store.get(PERSONAL) or self.own(client.initial)
        client.model.write({**own, **payload.tensors})

    def personalise(self, client: Client, learning_rate: float, work: Work) -> None:
        """Fit the client's own tensors; what is shared stays as it is, if anything is its own."""
        common = [name for name in client.model.parameters if not self.keeps(name)]
        frozen = common if len(common) < len(client.model.parameters) else []
        client.train(learning_rate, purpose="settling ", frozen=frozen, work=work)

    def fit(self, client: Client, learning_rate: float) -> LocalResult:
        """Train what the model holds; here all of it at once."""
        return client.train(learning_rate)

    def _train(self, client: Client, payload: Payload) -> Payload:
        self.load(client, payload)
        result = self.fit(client, payload.numbers["learning_rate"])
        trained = client.model.read()
        if self.personal:
            client.store[PERSONAL] = self.own(trained)
        return Payload(self.common(trained), {"examples": len(client.share)}, result.metrics)


class KeepsAdapter(Method):
    """A method whose clients keep a whole adapter of their own beside the shared one."""

    personal = True

    def load(self, client: Client, payload: Payload) -> None:
        """Write the client's own adapter once there is one, the shared one before."""
        before = client.initial if client.own_start else payload.tensors
        client.model.write(client.store.get(ADAPTER, before))


def ask_everybody(
    action: str, cohort: Cohort, adapter: Tensors, metrics: tuple[NumberSpec, ...]
) -> Exchange:
    """Send ``adapter`` to every client there is, in the cohort or not; only numbers come back.

    They are the examples, and what is declared in ``metrics``.
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
) -> LocalResult:
    """Train a client's own tensors with the shared ones frozen, then the other way round (FedRep).

    Each part gets the whole of the client's work, or half of it where an amount is of the round.
    """
    of = 2 if common else 1
    first = client.train(learning_rate, purpose=PERSONAL_FIRST, frozen=common, part=Part(0, of))
    return client.train(learning_rate, frozen=own, part=Part(1, of)) if common else first
