"""FedKSeed: zeroth-order steps along K known directions; seeds and scalars are all that travels.

    w = w_0 + sum_j a_j z_j,    g = (L(w + eps z_j) - L(w - eps z_j)) / (2 eps),    w <- w - eta g z_j,

z_j normal, from the j-th of K candidate seeds; a client draws a seed for each step and sends its
history, (j, -eta g) step by step. The server adds the histories up, weighted by rows, into the K sums
a_j, and sends these: that is FedAvg of the clients' models. Source: Qin et al. 2023, "Federated
Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes",
https://arxiv.org/abs/2312.06353. ``sampling = "weighted"`` is its FedKSeed-Pro: a seed is drawn with
the probability softmax((m_j - min m) / (max m - min m)), m_j the mean of |g| seen along z_j, 0 of those
not seen.

w is what the adapter trains: LoRA's factors, or with ``adapter.kind = "full"`` the linear layers of the
blocks themselves, as the paper trains all parameters; embeddings, norms and the head stay. Rebuilding w
draws K n normals a round for n trained numbers, once in a process. A step is two forward passes,
without graphs and without dropout, and plain SGD: of ``[training]`` the optimizer is not read, and
``max_grad_norm`` bounds |g| (the paper has no bound). The z_j are drawn in whole numbers and the sums
are added up one by one, so all machines rebuild the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.errors import MessageError
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.bases.trained_coordinates import start_of
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, FirstRound, Method, ServerSide
from fedloom.methods.declaration import AVERAGED, TOGETHER, Declaration, no
from fedloom.randomness import generator
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors
from fedloom.training.zeroth_order import (
    SCALARS,
    SEEDS,
    SUMS,
    Floats,
    ZerothOrder,
    moved,
    probabilities,
    unflattened,
)
from fedloom.wire.messages import Exchange, Payload, Reply
from fedloom.wire.schema import Schema, TensorSpec

MAGNITUDES, COUNTS = "magnitudes", "counts"
"""The sum of |g| seen along z_j, or in a request the mean; and how often it was seen."""

LARGEST = 1000.0
"""|g| counts at most so much in the probabilities (official code)."""


OF_GRADIENTS = ("weight_decay", "momentum", "keep_optimizer_state", "neftune_noise_alpha")
"""Of ``[training]``, what is of gradients or of other steps than plain ones."""


class FedKSeedSettings(NamedSettings):
    """``[method] name = "fedkseed"``."""

    name: Literal["fedkseed"] = "fedkseed"
    candidates: int = Field(default=4096, ge=1, le=1 << 15)
    """K, seeds that directions are drawn from (paper: 4,096): 4 bytes each are sent down a round, 8 with
    sampling = "weighted"; a step sends 6 up."""
    epsilon: float = Field(default=5e-4, gt=0)
    """eps, by how much the model is moved along a direction to see losses change (code: 5e-4)."""
    sampling: Literal["uniform", "weighted"] = "uniform"
    """How a seed is drawn: all alike, or (FedKSeed-Pro) those more often whose |g| was larger."""


class FedKSeed(Method):
    """Adds up histories of zeroth-order steps."""

    declares = Declaration(
        "FedKSeed",
        "https://arxiv.org/abs/2312.06353",
        "adapted",
        "on what the adapter trains; the step, and not g, is sent, so that learning rates may change",
        "FedLLM",
        "a sum for each candidate seed down; the seed and the scalar of each step up",
        "nothing",
        secure_aggregation=no("the server reads which seeds each client drew"),
        client_privacy=no("an answer is a list of steps and no change of parameters"),
        row_privacy=no("the scalars of steps are differences of losses of rows, without noise"),
        asynchronous=TOGETHER,
        compression=no("a seed and a scalar are small already, and all must have the same sums"),
        absence=AVERAGED,
    )
    reveals = ADAPTERS_ALONE
    taken = ("candidates", "epsilon", "sampling")

    def __init__(self, settings: FedKSeedSettings) -> None:
        """Keep the settings."""
        self.settings = settings
        self._rebuilt: tuple[bytes, Floats] = (b"", np.zeros(0, np.float32))

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also what is of another optimizer than plain SGD, or of gradients."""
        yield from super().check(view)
        name, training = view.name, view.training
        if training is not None:
            given = [f"training.{key}" for key in OF_GRADIENTS if getattr(training, key)]
            for setting in (*given, *training.several_rates):
                yield (
                    f"{setting}: method.name = {name!r} makes plain steps of SGD, which the "
                    "sums of its scalars stand for: leave it out"
                )
            if training.optimizer not in ("sgd", "adamw"):  # the default is what nobody chose
                yield f'training.optimizer: method.name = {name!r} makes steps of SGD: use "sgd"'
        if view.adapter is not None and view.adapter.dropout:
            yield (
                f"adapter.dropout: method.name = {name!r} compares losses without dropout: leave it out"
            )
        if view.admission is not None and view.admission.max_change is not None:
            yield f"admission.max_change: method.name = {name!r} sends steps and no parameters"

    def setup(self, server: ServerSide) -> None:
        """Store the initial adapter."""
        super().setup(server)
        self.fresh, self.seed = server.model.read(), server.seed

    def initial_state(self, adapter: Tensors) -> State:
        """Return sums of 0."""
        size = self.settings.candidates
        seen = {MAGNITUDES: torch.zeros(size), COUNTS: torch.zeros(size, dtype=torch.int32)}
        return State({SUMS: torch.zeros(size)} | (seen if self._weighted else {}))

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the sums, add up the histories."""
        sent = {SUMS: state.tensors[SUMS]}
        if self._weighted:
            sent[MAGNITUDES] = state.tensors[MAGNITUDES] / state.tensors[COUNTS].clamp(min=1)
        training, rows = (
            self.server.training,
            max(cohort.sizes[client] for client in cohort.clients),
        )
        work = training.work(rows, self.server.participations)
        most = work.most_steps(rows, training.batch_size)
        replies = yield Exchange.broadcast(
            "train",
            cohort.round,
            cohort.clients,
            Payload(sent, {LEARNING_RATE.name: cohort.learning_rate}),
            Schema.of(sent, (LEARNING_RATE,)),
            Schema(
                (
                    TensorSpec(SEEDS, (most,), torch.int16, ragged=True),
                    TensorSpec(SCALARS, (most,), torch.float32, ragged=True),
                ),
                TRAIN_REPLY_NUMBERS,
                cohort.reported,
            ),
            self._check_history,
        )
        return State(self._added(state.tensors, replies, cohort.learning_rate))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def shared(self, state: State) -> Tensors:
        """Return the adapter that the sums stand for."""
        return unflattened(self._moved(self.fresh, self.seed, state.tensors[SUMS]), self.fresh)

    def sent_for_evaluation(self, state: State) -> Tensors:
        """Return the sums alone."""
        return {SUMS: state.tensors[SUMS]}

    def load(self, client: Client, payload: Payload) -> None:
        """Write the adapter that the received sums stand for."""
        start = start_of(client)
        client.model.write(unflattened(self._received(client, start, payload), start))

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the sums down, and a seed and a scalar up for each step."""
        return ParameterTraffic(4 * self.settings.candidates * (1 + self._weighted), 0, up_a_step=6)

    def compute(self, first: FirstRound) -> float:
        """Count two forward passes a step."""
        return 2 * first.own_forward_passes()

    @property
    def _weighted(self) -> bool:
        return self.settings.sampling == "weighted"

    def _received(self, client: Client, start: Tensors, payload: Payload) -> Floats:
        """Return what received sums stand for, within the client's bounds."""
        sums = payload.tensors[SUMS]
        if len(sums) != self.settings.candidates:
            raise MessageError(f"{len(sums)} sums, for {self.settings.candidates} seeds")
        return self._moved(start, client.seed, sums, client.model.allowance.check)

    def _moved(self, start: Tensors, seed: int, sums: Tensor, *each: Callable[[], None]) -> Floats:
        """Return w_0 + sum_j a_j z_j as one vector; the last one asked for is kept."""
        key = sums.numpy().tobytes()
        if self._rebuilt[0] != key:
            self._rebuilt = key, moved(start, seed, sums, *each)
        return self._rebuilt[1].copy()

    def _check_history(self, client: int, payload: Payload) -> None:
        """Check that each seed is one of the candidates and has a scalar."""
        seeds, size = payload.tensors[SEEDS], self.settings.candidates
        if len(seeds) != len(payload.tensors[SCALARS]):
            raise MessageError("its history has not as many scalars as seeds")
        if len(seeds) and not 0 <= int(seeds.min()) <= int(seeds.max()) < size:
            raise MessageError(f"its history has a seed that is none of the {size} candidates")

    def _added(self, before: Tensors, replies: list[Reply], learning_rate: float) -> Tensors:
        """Return the state after some histories."""
        weights = [reply.payload.numbers["examples"] for reply in replies]
        found = {name: tensor.double().numpy() for name, tensor in before.items()}
        for reply, weight in zip(replies, weights, strict=True):
            seeds = reply.payload.tensors[SEEDS].numpy()
            scalars = reply.payload.tensors[SCALARS].double().numpy()
            np.add.at(found[SUMS], seeds, weight / sum(weights) * scalars)
            if self._weighted:
                seen = np.minimum(np.abs(scalars) / learning_rate, LARGEST)
                np.add.at(found[MAGNITUDES], seeds, seen)
                np.add.at(found[COUNTS], seeds, 1)
        return {name: torch.from_numpy(own).to(before[name].dtype) for name, own in found.items()}

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        start = start_of(client)
        own = ZerothOrder(
            self._received(client, start, payload),
            client.seed,
            self.settings.epsilon,
            probabilities(payload.tensors.get(MAGNITUDES, torch.zeros(self.settings.candidates))),
            generator(client.seed, "candidate seeds", client.id, client.round),
            client.model.device,
        )
        client.model.write(start)
        rate = payload.numbers["learning_rate"]
        result = yield from client.training_steps(rate, coordinates=own, driver=own)
        return Payload(own.history, {"examples": len(client.share)}, result.metrics)
