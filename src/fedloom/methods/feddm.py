"""FedDM: clients send synthetic inputs that look to the model as their rows do; it is trained on these.

Source: Xiong et al. 2022, "FedDM: Iterative Distribution Matching for Communication-Efficient Federated
Learning", https://arxiv.org/abs/2207.09653, with the losses of a public re-implementation. Made for
images; for text a synthetic row is a block of input embeddings with a class. For each class c of its rows
X_c a client minimises, over its synthetic rows S_c and models near the received one,

    ||mean phi(X_c) - mean phi(S_c)||^2 + ||mean z(X_c) - mean z(S_c)||^2,

phi the last hidden state at a text's last token and z the logits. The server trains the adapter on the
synthetic rows of all, until it is ``radius`` away from what it sent, as they say nothing beyond.

A reconstruction for text. Each optimizer step takes a batch of rows, and a model drawn within the radius,
by which the adapter moves in a random direction. Synthetic rows are those of the round before, trained
further; at first they are noise as large as embeddings (``start``), as those of real rows would be sent
as they are, which a client's file must allow ([policy] first_tokens). Which classes it has is sent too.
What this gives away is in docs/privacy_audit.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedloom.accounting.costs import SERVER
from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.errors import MessageError
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.distribution_matching import (
    CLASSES,
    MATCHING,
    Edge,
    Matching,
    together,
)
from fedloom.methods.bases.parameter_averaging import training_exchange
from fedloom.methods.contract.checks import optimizer_anew
from fedloom.methods.contract.client import Client, Handler, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import FirstRound, Method, Reveal
from fedloom.methods.declaration import TOGETHER, Absence, Declaration, no
from fedloom.randomness import generator
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, tensor_bytes
from fedloom.training.coordinates import Coordinates
from fedloom.training.results import LocalResult
from fedloom.training.settings import Work
from fedloom.training.steps import finished, local_steps
from fedloom.training.synthetic_inputs import (
    NO_ROWS,
    SYNTHETIC_INPUTS,
    SyntheticRows,
    embeddings_of,
    width_of,
)
from fedloom.wire.messages import Payload
from fedloom.wire.schema import TensorSpec, amount


class FedDMSettings(NamedSettings):
    """``[method] name = "feddm"``."""

    name: Literal["feddm"] = "feddm"
    per_class: int = Field(default=2, ge=1, le=1000)
    """Synthetic rows of a class that a client sends (paper: 10)."""
    length: int = Field(default=8, ge=1, le=4096)
    """Positions of each."""
    input_rate: float = Field(default=0.1, gt=0)
    """Learning rate of synthetic rows, in units of the standard deviation of embeddings."""
    radius: float = Field(default=1.0, gt=0)
    """rho, the distance of drawn models from the received adapter at most, and how far the server goes in
    a round (a re-implementation: 5, of whole networks)."""
    server_steps: int = Field(default=50, ge=1)
    """Optimizer steps of the server on synthetic rows at most."""
    start: Literal["noise", "rows"] = "noise"
    """What synthetic rows are at first. rows: the first tokens of real ones, as in the paper: whoever
    gets them reads these tokens, so that clients must allow it ([policy] first_tokens)."""


class FedDM(Method):
    """Synthetic rows travel up, and the server trains on them."""

    declares = Declaration(
        "FedDM",
        "https://arxiv.org/abs/2207.09653",
        "reconstructed",
        "for text: input embeddings in place of images",
        "FedLLM",
        "the adapter down; synthetic input embeddings of each class up",
        "its synthetic rows",
        secure_aggregation=no("the server trains on each client's synthetic rows"),
        client_privacy=no("an answer is not a change of parameters"),
        row_privacy=no("synthetic rows follow from features of rows, without noise"),
        asynchronous=TOGETHER,
        compression=no("what is sent are inputs of the model, on which no codec was tried"),
        absence=Absence(
            "the server trains on synthetic rows of those that answered",
            "trains the synthetic rows that it kept further, by today's adapter",
            "its synthetic rows are not used",
        ),
        problem="slow links",
    )
    reveals: frozenset[Reveal] = frozenset({"embeddings", "first_tokens"})
    taken = ("input_rate", "radius", "server_steps", "start")
    bounded = MappingProxyType({"per_class": "max_batch", "length": "max_tokens"})

    def __init__(self, settings: FedDMSettings) -> None:
        """Keep the settings."""
        self.settings = settings
        if settings.start == "noise":
            self.reveals = self.reveals - {"first_tokens"}

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that rows must have classes, and what takes no input embeddings."""
        yield from super().check(view)
        yield from optimizer_anew(view, "trains synthetic rows, not the adapter, at the clients")
        if view.objective is not None and view.objective_name != "classification":
            yield (
                f"method.name = {view.name!r} matches rows class by class: use objective.name = "
                f'"classification", not {view.objective_name!r}'
            )
        if view.admission is not None and view.admission.max_change is not None:
            yield (
                f"admission.max_change bounds changes of parameters, and clients of method.name = "
                f"{view.name!r} send synthetic rows: use admission.max_value"
            )
        if view.adapter is not None and view.adapter.kind not in ("lora", "ia3"):
            yield (
                f"adapter.kind = {view.adapter.kind!r}: method.name = {view.name!r} trains input "
                'embeddings with "lora" or "ia3"'
            )

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter; train it on what comes back."""
        server, own = self.server, self.settings
        shape = (server.width, own.per_class, own.length, width_of(server.model))

        def check(client: int, payload: Payload) -> None:
            if int(payload.tensors[CLASSES].max()) > 1 or not int(payload.tensors[CLASSES].sum()):
                raise MessageError("its classes are not 0 or 1, or it has none", "out_of_range")

        synthetic = (
            TensorSpec(SYNTHETIC_INPUTS, shape, torch.float32),
            TensorSpec(CLASSES, shape[:1], torch.uint8),
        )
        replies = yield training_exchange(
            cohort, state.tensors, metrics=(amount(MATCHING),), answered=synthetic, check=check
        )
        model = server.model
        with server.ledger.measure(cohort.round, SERVER, "train") as cost:
            before = model.flops
            model.write(state.tensors)
            result = self._trained(together(replies), cohort)
            cost.flops = model.flops - before
            cost.tokens, cost.examples, cost.steps = result.tokens, result.examples, result.steps
        return State(model.read())

    def _trained(self, rows: SyntheticRows, cohort: Cohort) -> LocalResult:
        """Train the adapter that the server's model holds on synthetic rows, within the radius."""
        server, model = self.server, self.server.model
        start = {name: own.detach().clone() for name, own in model.parameters.items()}
        rng = generator(server.seed, "synthetic batches", SERVER, cohort.round)
        edge = Edge(start, self.settings.radius)
        batches = rows.batches(server.training.batch_size, rng)
        return finished(
            local_steps(
                model,
                NO_ROWS,
                lambda parts, totals: rows.gradients(model, parts, totals),
                server.training,
                learning_rate=cohort.learning_rate,
                seed=server.seed,
                client=SERVER,
                round=cohort.round,
                work=Work(),
                purpose="synthetic ",
                after_step=edge.keep_within,
                batches=edge.until_reached(batches, self.settings.server_steps),
            )
        )

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": self._train}

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the adapter down, and synthetic rows of all classes up."""
        own, width = self.settings, width_of(self.server.model)
        classes = self.server.width
        up = 4 * classes * own.per_class * own.length * width + classes
        return ParameterTraffic(tensor_bytes(adapter), up)

    def compute(self, first: FirstRound) -> float:
        """Count reading the rows; passes over synthetic rows, which are few and short, are left out."""
        return first.own_forward_passes()

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        model, embeddings = client.model, embeddings_of(client.model)
        scale = float(embeddings.float().std())
        model.write(payload.tensors)
        kept = client.store.get(SYNTHETIC_INPUTS)
        kept = self._begun(client, embeddings.float().cpu() / scale) if kept is None else kept
        rows = Coordinates(kept, lambda parts: {}, model.device)
        steps = Matching(rows, scale, dict(model.parameters), self.settings.radius)
        result = yield from client.training_steps(
            self.settings.input_rate,
            frozen=[*model.parameters],
            coordinates=rows,
            driver=steps,
        )
        client.store[SYNTHETIC_INPUTS] = rows.read()
        held = np.bincount(client.share.tokens.labels, minlength=client.width) > 0
        present = torch.from_numpy(held[: client.width])
        sent = rows.read()[SYNTHETIC_INPUTS] * scale * present.view(-1, 1, 1, 1)
        return Payload(
            {SYNTHETIC_INPUTS: sent, CLASSES: present.to(torch.uint8)},
            {"examples": len(client.share)},
            result.metrics,
        )

    def _begun(self, client: Client, embeddings: Tensor) -> Tensors:
        """Return the first synthetic rows, in units of the standard deviation of embeddings."""
        own = self.settings
        shape = (client.width, own.per_class, own.length, embeddings.shape[1])
        rng = generator(client.seed, "synthetic inputs", client.id)
        inputs = torch.from_numpy(rng.standard_normal(shape).astype("float32"))
        if own.start == "rows":
            tokens = client.share.tokens
            for label in np.unique(tokens.labels):
                of_class = np.flatnonzero(tokens.labels == label)
                for place, row in enumerate(rng.choice(of_class, own.per_class)):
                    text = tokens.tokens[tokens.starts[row] : tokens.starts[row + 1]]
                    ids = np.resize(text[: own.length], own.length).astype(np.int64)
                    inputs[label, place] = embeddings[torch.from_numpy(ids)]
        return {SYNTHETIC_INPUTS: inputs}
