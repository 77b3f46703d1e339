"""RegMean: the mean of LoRA's B that changes the outputs on every client's own inputs least, exactly.

    B <- B + [sum_k (B_k - B) H_k] (sum_k H_k + ridge)^-1,    H_k = sum of (A x)(A x)^T over tokens of k,

with A frozen and the same everywhere, as in FFA-LoRA. Source: Jin et al. 2022, "Dataless Knowledge Fusion
by Merging Weights of Language Models", https://arxiv.org/abs/2212.09849, equation 2, which merges whole
layers once, with inner products of their inputs x: inputs squared numbers a layer. On W + s B A with one
A the same problem has r x r matrices and no loss; that form, in every round, is a reconstruction.

A client sends H_k beside B_k: second moments of its rows in r directions a layer, which its file must
allow ([policy] inner_products). In the published code they are means over tokens, so that clients weigh
alike, padding counts as tokens, and ``gram_n_example`` counts batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.lora import A, B
from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.regmean import kept_diagonal, packed, regmean, unpacked
from fedloom.data.client_rows import Indices
from fedloom.errors import MessageError
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.client_mixtures import passes
from fedloom.methods.bases.parameter_averaging import LEARNING_RATE, TRAIN_REPLY_NUMBERS
from fedloom.methods.bases.personal_parts import KeepsParts
from fedloom.methods.contract.averaging import weights_of
from fedloom.methods.contract.checks import require_linear_layers
from fedloom.methods.contract.client import Client, Trainings
from fedloom.methods.contract.method import (
    FirstRound,
    Reveal,
    ServerSide,
)
from fedloom.methods.declaration import AVERAGED, OTHER_STEPS, TOGETHER, Declaration, no
from fedloom.models.inner_products import collecting
from fedloom.randomness import generator
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors, tensor_bytes
from fedloom.training.results import LocalResult
from fedloom.training.settings import Work
from fedloom.wire.messages import Exchange, Payload, Reply
from fedloom.wire.schema import NumberSpec, Schema, TensorSpec

PRODUCTS = "products/"
"""Before the name of B: a reply's upper triangle of H_k, a mean over tokens."""

TOKENS = "tokens_per_row"

ROUNDING = 1e-4
"""Largest negative eigenvalue, over the sum of all, that rounding to float32 may leave."""

MOST = 10.0
"""Times the (lower) median of clients' traces above 0 that one may be; larger ones are scaled down."""


class RegMeanSettings(NamedSettings):
    """``[method] name = "regmean"``."""

    name: Literal["regmean"] = "regmean"
    rows: int = Field(default=1000, ge=1)
    """Rows of a client, drawn in each round, whose inner products it sends (all, where it has fewer)."""
    off_diagonal: float = Field(default=1.0, ge=0, le=1)
    """Share that is kept of inner products beside the diagonal: 1 is the exact solution; the published
    experiments keep 0.1, in one case 0.9, of those of whole layers."""
    weights: Literal["tokens", "clients"] = "tokens"
    """What H_k counts: the client's tokens, or as much as any other's (the published code)."""
    ridge: float = Field(default=1e-6, gt=0, le=1)
    """Added to the diagonal, times its mean: directions that no client's inputs have stay as they are."""


class RegMean(KeepsParts):
    """Solves for B; A is the same everywhere and is never trained."""

    declares = Declaration(
        "RegMean",
        "https://arxiv.org/abs/2212.09849",
        "reconstructed",
        "in each round, on LoRA's B between a shared A, where the solution is exact",
        "FedLLM",
        "LoRA's B, down and up; r (r + 1) / 2 inner products a layer, up",
        "nothing",
        secure_aggregation=no("the server multiplies two parts of each answer"),
        client_privacy=no("inner products of rows travel, which clipping a change does not bound"),
        row_privacy=OTHER_STEPS,
        asynchronous=TOGETHER,
        compression=no("inner products that were coded are no inner products any more"),
        absence=AVERAGED,
        problem="a mean of weights fits no client's inputs where these differ",
    )
    reveals: frozenset[Reveal] = frozenset({"adapters", "inner_products"})
    taken = ("rows", "off_diagonal", "weights", "ridge")
    two_factors = True
    personal = False
    averages = False

    def __init__(self, settings: RegMeanSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    def setup(self, server: ServerSide) -> None:
        """Check that the factors are of linear layers.

        Raises:
            ModelError: Some are of a stack of experts.
        """
        super().setup(server)
        require_linear_layers(server.model.stacked, 'method.name = "regmean"')

    def keeps(self, name: str) -> bool:
        """Leave A out of messages: every party makes the same from the seed."""
        return A in name

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send B, receive B_k and H_k, solve; what is no factor is averaged by rows."""
        specs = tuple(TensorSpec(n, tuple(t.shape), t.dtype) for n, t in state.tensors.items())
        triangles = tuple(
            TensorSpec(PRODUCTS + name, (rank * (rank + 1) // 2,), torch.float32)
            for name, rank in _ranks(state.tensors).items()
        )
        most = 2.0 * self.server.max_length  # a pair has two sequences
        replies = yield Exchange.broadcast(
            "train",
            cohort.round,
            cohort.clients,
            Payload(state.tensors, {LEARNING_RATE.name: cohort.learning_rate}),
            Schema.of(state.tensors, (LEARNING_RATE,)),
            Schema(
                specs + triangles,
                (*TRAIN_REPLY_NUMBERS, NumberSpec(TOKENS, 1.0, most)),
                cohort.reported,
            ),
            check=_check,
        )
        return State(self._solved(replies, state.tensors))

    def fit(self, client: Client, learning_rate: float) -> Trainings[LocalResult]:
        """Train B."""
        return client.training_steps(learning_rate, frozen=self._fixed(client))

    def personalise(self, client: Client, learning_rate: float, work: Work) -> None:
        """Train B."""
        client.train(learning_rate, purpose="settling ", frozen=self._fixed(client), work=work)

    def traffic(self, adapter: Tensors) -> Traffic:
        """Count the inner products on the way up."""
        shared = self.common(adapter)
        size = tensor_bytes(shared)
        products = sum(4 * rank * (rank + 1) // 2 for rank in _ranks(shared).values())
        return ParameterTraffic(size, size + products)

    def compute(self, first: FirstRound) -> float:
        """Add reading the rows whose inner products are sent."""
        rows = self._drawn(first.seed, first.client, 1, first.rows)
        return first.own_rows() + first.reading(rows)

    def _solved(self, replies: Sequence[Reply], start: Tensors) -> Tensors:
        rows = weights_of(replies, by_rows=True)
        answers = [reply.payload.tensors for reply in replies]
        by_tokens = self.settings.weights == "tokens"
        weights = [
            own * reply.payload.numbers[TOKENS] if by_tokens else 1.0
            for own, reply in zip(rows, replies, strict=True)
        ]
        found: Tensors = {}
        for name, tensor in start.items():
            if B not in name:
                found |= weighted_mean([{name: own[name]} for own in answers], rows)
                continue
            products = bounded([unpacked(own[PRODUCTS + name], tensor.shape[1]) for own in answers])
            kept = [
                weight * kept_diagonal(own, self.settings.off_diagonal)
                for weight, own in zip(weights, products, strict=True)
            ]
            solved = regmean([own[name] for own in answers], kept, tensor, self.settings.ridge)
            found[name] = solved.to(tensor.dtype)
        return found

    def _train(self, client: Client, payload: Payload) -> Trainings[Payload]:
        reply = yield from super()._train(client, payload)
        rows = self._drawn(client.seed, client.id, client.round, len(client.share))
        with collecting(client.model) as found:
            for _ in passes(client, client.share.tokens.take(rows), found.begin):
                pass
        products = {
            PRODUCTS + name.replace(A, B): packed(own / found.tokens).float()
            for name, own in found.sums.items()
        }
        ordered = {PRODUCTS + name: products[PRODUCTS + name] for name in _ranks(reply.tensors)}
        numbers = {**reply.numbers, TOKENS: found.tokens / len(rows)}
        return Payload({**reply.tensors, **ordered}, numbers, reply.metrics)

    def _drawn(self, seed: int, client: int, round: int, count: int) -> Indices:
        """Return the rows whose inner products are sent, ascending."""
        rng = generator(seed, "inner products", client, round)
        rows = rng.choice(count, min(count, self.settings.rows), replace=False)
        return np.sort(rows).astype(np.int64)

    def _fixed(self, client: Client) -> list[str]:
        return [name for name in client.model.parameters if self.keeps(name)]


def bounded(products: Sequence[Tensor]) -> list[Tensor]:
    """Return inner products without what rounding made negative, and none far above the others.

    By its trace none is above :data:`MOST` times the median of those that are not 0; larger ones are
    scaled down to that.
    """
    found = []
    for own in products:
        values, vectors = torch.linalg.eigh(own)
        found.append(own if values[0] >= 0 else vectors * values.clamp(min=0) @ vectors.T)
    traces = [float(own.trace()) for own in found]
    positive = [trace for trace in traces if trace > 0]
    most = MOST * median_low(positive) if positive else 0.0
    return [
        own * min(1.0, most / t) if t > 0 else own for own, t in zip(found, traces, strict=True)
    ]


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the rank of each B."""
    return {
        name: tensor.shape[1]
        for name, tensor in tensors.items()
        if B in name and not name.startswith(PRODUCTS)
    }


def _check(client: int, payload: Payload) -> None:
    """Refuse what no rows have as inner products."""
    for name, rank in _ranks(payload.tensors).items():
        own = unpacked(payload.tensors[PRODUCTS + name], rank)
        values = torch.linalg.eigvalsh(own.nan_to_num(nan=-1.0))
        if float(values[0]) < -ROUNDING * float(values.abs().sum()):
            raise MessageError(
                f"the inner products of {name} have an eigenvalue of {float(values[0]):.3g}; those of "
                "rows have none below 0"
            )
