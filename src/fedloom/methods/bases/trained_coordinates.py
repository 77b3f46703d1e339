"""Base class of methods that train coordinates: a few numbers that the whole adapter follows from.

Server and clients know what the adapter is as a function of the coordinates, by the seed or by what was
sent once, so the coordinates alone travel. Their mean is weighted by rows as in FedAvg; where the
function is linear, that is the mean of the adapters exactly. What is saved is the adapter, an ordinary
PEFT folder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.errors import TrainingError
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import training_exchange
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.method import Method, ServerSide
from fedloom.tensors import State, Tensors, tensor_bytes
from fedloom.training.coordinates import Coordinates
from fedloom.wire.messages import Payload

TensorFunction = Callable[[Mapping[str, Tensor]], Tensors]
"""Tensors of the adapter, by name, from coordinates by name."""


class TrainsCoordinates(Method):
    """FedAvg of coordinates; :meth:`first` and :meth:`function` define them.

    Attributes:
        fresh: The adapter that the server begins with.
        seed: The experiment's.
    """

    averages = True
    fresh: Tensors
    seed: int

    def setup(self, server: ServerSide) -> None:
        """Store the initial adapter."""
        super().setup(server)
        self.fresh, self.seed = server.model.read(), server.seed

    def first(self, adapter: Tensors) -> Tensors:
        """Return the coordinates of the adapter as it is initialised."""
        raise TypeError(f"{type(self).__name__} must define first(adapter)")

    def function(self, start: Tensors, seed: int, kept: Mapping[str, Tensors]) -> TensorFunction:
        """Return the adapter as a function of coordinates; it is differentiable, and writes no input.

        Args:
            start: The initial adapter, on the device that it will be on.
            seed: The experiment's.
            kept: What a client stores by slot; the server's counterpart is empty.
        """
        raise TypeError(f"{type(self).__name__} must define function(start, seed, kept)")

    def fixed(self, start: Tensors, seed: int, kept: Mapping[str, Tensors]) -> Tensors:
        """Return what is as no coordinate changes it and not as in ``start``; here nothing."""
        return {}

    def kept(self, state: State) -> Mapping[str, Tensors]:
        """Return what a client stores, as the server has it; here nothing."""
        return {}

    def coordinates(self, state: State) -> Tensors:
        """Return the coordinates in a state; here all of it."""
        return state.tensors

    def trained(self, coordinates: Tensors) -> Tensors:
        """Return what a client's training begins with, given what it was sent; here that."""
        return coordinates

    def answer(self, coordinates: Tensors) -> Tensors:
        """Return the coordinates that a client sends, given what was trained; here that."""
        return coordinates

    def function_flops(self, adapter: Tensors) -> float:
        """Return the operations of matrix products in the function; here it has none."""
        return 0.0

    def frozen(self, names: Collection[str]) -> list[str]:
        """Return which of the adapter's tensors no coordinate changes."""
        return []

    def initial_state(self, adapter: Tensors) -> State:
        """Return the coordinates alone."""
        return State(self.first(adapter))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the coordinates, average the answers."""
        replies = yield training_exchange(cohort, state.tensors)
        return State(self.averaged(replies, cohort, state.tensors))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def shared(self, state: State) -> Tensors:
        """Return the adapter that the coordinates stand for."""
        return self._adapter(self.fresh, self.seed, self.coordinates(state), self.kept(state))

    def sent_for_evaluation(self, state: State) -> Tensors:
        """Return the coordinates alone."""
        return self.coordinates(state)

    def sent_shapes(self, adapter: Tensors) -> Tensors:
        """Return the coordinates."""
        return self.first(adapter)

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the coordinates, down and up."""
        size = tensor_bytes(self.first(adapter))
        return ParameterTraffic(size, size)

    def load(self, client: Client, payload: Payload) -> None:
        """Write the adapter that the received coordinates stand for."""
        self.place(client, payload.tensors, client.store)

    def place(self, client: Client, coordinates: Tensors, kept: Mapping[str, Tensors]) -> None:
        """Write the adapter that coordinates stand for, with what a client stores or was just sent."""
        start = start_of(client)
        client.model.write(self._adapter(start, client.seed, coordinates, kept))
        client.model.flops += self.function_flops(start)

    def _adapter(
        self, start: Tensors, seed: int, coordinates: Tensors, kept: Mapping[str, Tensors]
    ) -> Tensors:
        with torch.no_grad():
            found = self.function(start, seed, kept)(coordinates)
        return {**start, **self.fixed(start, seed, kept), **found}

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        self.load(client, payload)
        device = client.model.device
        start = {name: tensor.to(device) for name, tensor in client.initial.items()}
        function = self.function(start, client.seed, client.store)
        own = Coordinates(self.trained(payload.tensors), function, device)
        result = yield from client.training_steps(
            payload.numbers["learning_rate"],
            frozen=self.frozen(client.model.parameters),
            coordinates=own,
        )
        # once before the first step; of each step, its backward pass and the function again
        client.model.flops += (1 + 2 * result.steps) * self.function_flops(start)
        return Payload(self.answer(own.read()), {"examples": len(client.share)}, result.metrics)


def start_of(client: Client) -> Tensors:
    """Return the adapter that coordinates of all clients begin with.

    Raises:
        TrainingError: This client's is one of its own, of an earlier run, which nobody else has.
    """
    if client.own_start:
        raise TrainingError(
            "adapter.start names a run in which this client has a model of its own, and coordinates are "
            "of one adapter that all have: name the run's folder adapter/, its global one"
        )
    return client.initial


def signed_partition(rng: np.random.Generator, size: int, parts: int) -> tuple[Tensor, Tensor]:
    """Divide places into parts, as equal as can be, each place with a random sign.

    As the rows of a matrix, with the signs in the places of each part and 0 elsewhere, the parts are
    orthogonal. It is drawn in whole numbers: the same on every machine.

    Args:
        rng: Draws it.
        size: Places, from 1.
        parts: At most ``size``.

    Returns:
        ``(parts, ceil(size / parts))`` int64 places, ``size`` where a part has one fewer; and float32
        signs of the same shape, 0 there.
    """
    width = -(-size // parts)
    order = np.full(parts * width, size, np.int64)
    order[:size] = rng.permutation(size)
    places = order.reshape(width, parts).T  # gaps in the last column alone
    signs = np.where(places < size, 2 * rng.integers(0, 2, places.shape) - 1, 0)
    return torch.from_numpy(places.copy()), torch.from_numpy(signs.astype(np.float32))
