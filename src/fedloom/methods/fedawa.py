"""FedAWA: the weights of clients are learnt from how their changes agree, by a few steps on the server.

    min over T of sum_k p_k dist(w, w_k) + sum_k p_k ||D_k - sum_j p_j D_j||,   p = softmax(T),
    w <- sum_k p_k w_k,   D_k = w_k - w.

Source: Shi et al. 2025, "FedAWA: Adaptive Optimization of Aggregation Weights in Federated Learning Using
Client Vectors", https://arxiv.org/abs/2503.15842, and its published code. As published, T begins at the
shares of rows, which a softmax makes nearly equal, and one step of Adam at 0.001 a round moves a logit by
0.3 in 300 rounds: the weights hardly leave their start. Here T_k begins at log n_k, which is FedAvg; the
steps are larger; weights are those after the last step; T belongs to clients and not to places among
those that answered. One client alone makes the second term 0, so that weights go on concentrating, with
nobody to leave out as well: no share passes ``most`` times that of the start, and logits stay with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.weights import (
    capped,
    change_products,
    learnt_logits,
    model_distances,
)
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import train_and_upload, training_exchange
from fedloom.methods.contract.averaging import weights_of
from fedloom.methods.contract.client import Handler
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import (
    EACH_ANSWER,
    OWN_STEPS,
    TOGETHER,
    Absence,
    Declaration,
    no,
    yes,
)
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State, Tensors
from fedloom.wire.messages import Reply

LEAST = 1e-6
"""Smallest share that a logit is kept of."""

LOGIT = "logit/"
"""Prefix of a client's id among the numbers of the state."""


class FedAWASettings(NamedSettings):
    """``[method] name = "fedawa"``."""

    name: Literal["fedawa"] = "fedawa"
    steps: int = Field(default=10, ge=0, le=10_000)
    """Steps of Adam on the weights in a round (published: 1; 0 is FedAvg)."""
    learning_rate: float = Field(default=0.01, gt=0, le=10)
    """Of these steps (published: 0.001, which moves a weight by 1 % in ten rounds of one step)."""
    start: Literal["rows", "shares"] = "rows"
    """Where T_k begins: at the logarithm of a client's rows, which is FedAvg, or at its share of the rows
    of all clients, in the round or not (published), of which a softmax makes nearly equal weights."""
    distance: Literal["none", "cosine", "euclidean"] = "none"
    """dist(w, w_k): with LoRA a cosine of whole adapters is near 1 for all, as the random start of A
    outweighs what was learnt (published: cosine)."""
    most: float = Field(default=1.5, ge=1)
    """Times the share that a client would have by T's start alone, that its share may be (published: no
    bound; 1 is no learning at all)."""


class FedAWA(Method):
    """FedAvg with learnt weights."""

    declares = Declaration(
        "FedAWA",
        "https://arxiv.org/abs/2503.15842",
        "adapted",
        "begins at FedAvg's weights, larger steps, a largest share, on the adapter",
        "FedLLM",
        "the adapter, down and up",
        "nothing",
        secure_aggregation=EACH_ANSWER,
        client_privacy=no("a client's weight follows from its own answer and the others'"),
        row_privacy=OWN_STEPS,
        asynchronous=TOGETHER,
        compression=yes("an answer is a change of parameters, of which the server takes a mean"),
        absence=Absence(
            "weights are over those that answered; its logit, kept by its id, stays as it is",
            "counts with the logit that it had, at first that of its rows",
            "is in no mean",
        ),
        problem="changes of some clients disagree with the others', whatever their rows",
    )
    reveals = ADAPTERS_ALONE
    taken = ("steps", "learning_rate", "start", "distance", "most")

    def __init__(self, settings: FedAWASettings) -> None:
        """Keep the settings."""
        self.settings = settings

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, learn the weights of what comes back, take its mean."""
        replies = yield training_exchange(cohort, state.tensors)
        adapters = [reply.payload.tensors for reply in replies]
        begun = self._begun(replies, cohort)
        logits = self._logits(replies, begun, state, adapters)
        shares = capped(_softmax(logits), [self.settings.most * own for own in _softmax(begun)])
        kept = _of_shares(shares, logits)
        learnt = {_name(r.client): own for r, own in zip(replies, kept, strict=True)}
        cohort.details["weights"] = {
            str(r.client): share for r, share in zip(replies, shares, strict=True)
        }
        cohort.notes["weight_entropy"] = -sum(p * math.log(p) for p in shares if p > 0)
        numbers = {**state.numbers, **learnt}
        return State(weighted_mean(adapters, shares), dict(sorted(numbers.items())))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": train_and_upload}

    def _begun(self, replies: Sequence[Reply], cohort: Cohort) -> list[float]:
        """Return the logits that these clients begin with, whoever else answered."""
        rows = weights_of(replies, by_rows=True)
        whole = sum(cohort.presence.rows.values())
        by_rows = self.settings.start == "rows"
        return [math.log(n) if by_rows else n / whole for n in rows]

    def _logits(
        self,
        replies: Sequence[Reply],
        begun: Sequence[float],
        state: State,
        adapters: Sequence[Tensors],
    ) -> list[float]:
        """Return the logit of each client that answered, after the steps."""
        own = self.settings
        before = [
            state.numbers.get(_name(reply.client), first)
            for reply, first in zip(replies, begun, strict=True)
        ]
        if not own.steps:
            return before
        products = change_products(adapters, state.tensors)
        distances = model_distances(adapters, state.tensors, own.distance)
        start = torch.tensor(before, dtype=torch.float64)
        found: list[float] = learnt_logits(
            start, products, distances, own.steps, own.learning_rate
        ).tolist()
        return found


def _name(client: int) -> str:
    return f"{LOGIT}{client:06d}"


def _of_shares(shares: Sequence[float], logits: Sequence[float]) -> list[float]:
    """Return the logits of shares, with the mean of ``logits``; these where no share was cut."""
    if torch.allclose(torch.tensor(shares), torch.tensor(_softmax(logits))):
        return list(logits)
    found = [math.log(max(share, LEAST)) for share in shares]
    shift = (sum(logits) - sum(found)) / len(found)
    return [own + shift for own in found]


def _softmax(logits: Sequence[float]) -> list[float]:
    found: list[float] = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    return found
